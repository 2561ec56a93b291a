"""One picture of a run and what it says: loss curves, the blend, and spectrograms beside the real recordings.

python examples/quickstart/picture.py --run RUN --report REPORT_DIR --canaries C.yaml --output picture.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import soundfile
from matplotlib.axes import Axes

from megatron_speech.codecs.audio import read_audio
from megatron_speech.errors import InputError, command
from megatron_speech.evaluation.canaries import load_canaries
from megatron_speech.evaluation.report import spectrogram
from megatron_speech.evaluation.run_files import RunFiles, read_run
from megatron_speech.files import atomic_write, read_json

SAMPLE_RATE_HZ = 8000
COLUMNS = 4


def draw_losses(axes: Axes, run: RunFiles) -> None:
    """Training and validation loss of audio and text over the tokens trained on."""
    for key, label, colour in (("loss/modality/audio", "audio", "C0"), ("loss/modality/text", "text", "C1")):
        for rows, style, suffix in ((run.training, "-", ""), (run.validation, "o--", ", held out")):
            points = [(row["consumed_tokens"] / 1e6, row[key]) for row in rows if row.get(key) is not None]
            if points:
                axes.plot(
                    *zip(*points, strict=True), style, color=colour, markersize=3, linewidth=1, label=label + suffix
                )
    stages = {row["stage"]: row["consumed_tokens"] / 1e6 for row in reversed(run.training)}
    for name, start in stages.items():
        axes.axvline(start, color="#999", linewidth=0.8, linestyle=":")
        axes.text(start, 0.98, f" {name}", transform=axes.get_xaxis_transform(), va="top", fontsize=8)
    axes.set(xlabel="million tokens", ylabel="nats per token", title="loss")
    axes.legend(fontsize=7, frameon=False)


def draw_blend(axes: Axes, run: RunFiles) -> None:
    """Target and realised shares of tokens by task, one pair of bars per stage."""
    labels = [f"{stage['stage']} {kind}" for stage in run.stages for kind in ("target", "realised")]
    tasks = sorted({task for stage in run.stages for task in stage["by_task"]})
    left = np.zeros(len(labels))
    for number, task in enumerate(tasks):
        widths = np.array(
            [
                100 * stage["by_task"].get(task, {}).get(kind, 0.0)
                for stage in run.stages
                for kind in ("target", "realised")
            ]
        )
        axes.barh(range(len(labels)), widths, left=left, color=f"C{number}", label=task)
        left += widths
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="% of tokens trained on", title="blend")
    axes.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)


def draw_spectrogram(axes: Axes, path: Path, title: str, longest: float) -> None:
    """Spectrogram of a recording over seconds and kHz; all of a picture reach to `longest` seconds."""
    audio = read_audio(path, SAMPLE_RATE_HZ, allow_silence=True)
    image = spectrogram(audio, SAMPLE_RATE_HZ)
    extent = (0.0, len(audio) / SAMPLE_RATE_HZ, 0.0, SAMPLE_RATE_HZ / 2000)
    axes.imshow(image, origin="lower", aspect="auto", cmap="magma", extent=extent)
    axes.set_xlim(0, longest)
    axes.set_title(title, fontsize=8)
    axes.set_xlabel("s", fontsize=7, labelpad=1)
    axes.set_ylabel("kHz", fontsize=7, labelpad=1)
    axes.tick_params(labelsize=6)


def choose(items: list[dict[str, Any]], originals: dict[str, Path | None]) -> list[dict[str, Any]]:
    """A few utterances that have an original, from every language in turn; of each canary the first one."""
    usable = {item["canary"]: item for item in reversed(items) if originals.get(item["canary"]) is not None}
    ordered = [item for item in items if usable.get(item["canary"]) is item]
    languages = sorted({item["language"] for item in ordered})
    queues = [[item for item in ordered if item["language"] == language] for language in languages]
    in_turn = [queue[turn] for turn in range(COLUMNS) for queue in queues if turn < len(queue)]
    return in_turn[:COLUMNS]


@command
def main() -> int:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=Path, help="run directory")
    parser.add_argument("--report", required=True, type=Path, help="output directory of `megatron-speech evaluate`")
    parser.add_argument("--canaries", required=True, type=Path, help="the canary file of that evaluation")
    parser.add_argument("--output", required=True, type=Path, help="the PNG to write")
    args = parser.parse_args()
    run = read_run(args.run)
    report = read_json(args.report / "report.json", "evaluation report")
    originals = {item.id: item.original_audio for item in load_canaries(args.canaries).items}
    chosen = choose(report["items"], originals)
    if not chosen:
        raise InputError(f"{args.canaries}: no item has original_audio; a picture sets generated speech beside it")

    # Glyphs of scripts that the default font lacks are looked for in whatever fonts this machine has.
    plt.rcParams["font.family"] = ["DejaVu Sans"]
    figure = plt.figure(figsize=(11, 6.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1))
    left, right = top.subplots(1, 2, width_ratios=(1.4, 1))
    draw_losses(left, run)
    draw_blend(right, run)
    grid = np.atleast_2d(bottom.subplots(2, len(chosen), squeeze=False))
    for column, item in enumerate(chosen):
        original = originals[item["canary"]]
        assert original is not None
        files = {f"{item['canary']}: recording": original, "generated from its text": args.report / item["wav_path"]}
        longest = max(soundfile.info(path).duration for path in files.values())
        for row, (title, path) in enumerate(files.items()):
            draw_spectrogram(grid[row, column], path, title, longest)
    with atomic_write(args.output) as handle:
        figure.savefig(handle, dpi=110, format="png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
