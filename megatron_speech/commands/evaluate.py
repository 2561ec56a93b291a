"""`megatron-speech evaluate`: a checkpoint on fixed canaries, generated and scored."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_speech.commands.generate import share_cores
from megatron_speech.console import Progress, output
from megatron_speech.errors import InputError
from megatron_speech.files import prepare_output_directory, write_json, write_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `megatron-speech evaluate`."""
    parser.add_argument(
        "--checkpoint", required=True, type=Path, help="a checkpoint, or a run directory (its newest checkpoint)"
    )
    parser.add_argument("--ema", action="store_true", help="judge the moving average of the weights")
    parser.add_argument(
        "--canaries",
        required=True,
        type=Path,
        metavar="C.yaml",
        help="the canary file: decoding, scorer, items (text, language, reference_audio, …)",
    )
    parser.add_argument(
        "--output-dir", required=True, type=Path, metavar="DIR", help="report.json, report.html and wavs/ go here"
    )
    parser.add_argument("--run", type=Path, metavar="RUN", help="adds this run's loss curves and blend to the report")
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="utterances in flight at once (128)")
    parser.add_argument(
        "--players", type=int, default=400, metavar="N", help="utterances whose sound is embedded in report.html (400)"
    )


def run(args: argparse.Namespace) -> int:
    """Generate, listen, report; returns the exit status."""
    for flag, value, least in (("--batch-size", args.batch_size, 1), ("--players", args.players, 0)):
        if value < least:
            raise InputError(f"{flag} is {value}; it must be {least} or more")
    share_cores()
    # Slow to import; --help and a misspelt flag need none of it.
    from megatron_speech.evaluation.canaries import load_canaries
    from megatron_speech.evaluation.run_files import read_run

    canaries = load_canaries(args.canaries)
    run_files = None if args.run is None else read_run(args.run)
    if not args.checkpoint.exists():
        raise InputError(f"checkpoint {args.checkpoint} does not exist; name a run directory or one of its checkpoints")
    prepare_output_directory(args.output_dir)

    from megatron_speech.evaluation.report import build_html
    from megatron_speech.evaluation.runner import evaluate
    from megatron_speech.generation.engine import SpeechGenerator

    generator = SpeechGenerator.from_checkpoint(args.checkpoint, ema=args.ema)
    count = sum(len(item.seeds or canaries.seeds) for item in canaries.items)
    real = sum(item.original_audio is not None for item in canaries.items)
    with Progress("evaluate", total=2 * count + real, unit="utterances") as bar:

        def progress(done: int, what: str) -> None:
            bar.describe(what)
            bar.update(done)

        evaluation = evaluate(
            generator, canaries, str(args.canaries), args.output_dir, batch_size=args.batch_size, progress=progress
        )
    page = build_html(evaluation, run_files, players=args.players)
    write_json(args.output_dir / "report.json", evaluation.report)
    write_text(args.output_dir / "report.html", page)
    output("\n".join(console_lines(evaluation.report)))
    output(f"report: {args.output_dir / 'report.html'}")
    return 0


def console_lines(report: dict[str, Any]) -> list[str]:
    """The figures that matter, one line per language."""

    def percent(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.1f} %"

    lines = []
    for name, group in {**report["by_language"], "all": report["overall"]}.items():
        line = (
            f"{name}: {group['utterances']} utterances, ended {percent(group['eos_rate'])}, loops "
            f"{percent(group['loop_rate'])}, invalid tokens {percent(group['invalid_token_rate'])}, "
            f"{group['duration_seconds']['mean']:.2f} s on average"
        )
        if group["speech"] is not None:
            wer = {
                part: (group["speech"][part] or {}).get("wer")
                for part in ("generated", "round_trip", "original", "chance")
            }
            line += (
                f"; WER {percent(wer['generated'])} (codec round trip {percent(wer['round_trip'])}, originals "
                f"{percent(wer['original'])}, chance {percent(wer['chance'])})"
            )
        lines.append(line)
    return [*lines, *(f"note: {note}" for note in report["notes"])]
