"""The digits recipe, step by step: recordings → codes → datasets → PT → SFT → 300 utterances → scores."""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pipeline import (
    Pipeline,
    batch_overrides,
    cores,
    held_out_recordings,
    launched,
    megatron_speech,
    precision_override,
    read_jsonl,
    say,
    script,
    write_jsonl,
)

from megatron_speech.errors import InputError, command
from megatron_speech.files import prepare_output_directory
from megatron_speech.recipe.load import load_recipe

HERE = Path(__file__).resolve().parent
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
# Recordings of each speaker that should be held out, to be references of generation.
REFERENCES_PER_SPEAKER = 5
STAGES = ("pt", "sft")


def check_samples(path: Path) -> list[dict[str, Any]]:
    """Rows of samples.jsonl, each with the fields that this recipe needs.

    Raises:
        InputError: the file or a line cannot be used; named.
    """
    rows = read_jsonl(path)
    for number, row in enumerate(rows, 1):
        for field in ("wav_path", "transcript", "speaker_id"):
            if not row.get(field):
                raise InputError(f"{path} record {number}: field {field} is missing or empty; this recipe needs it")
    return rows


def held_out_share(rows: list[dict[str, Any]]) -> float:
    """Share of the recordings to hold out: 3 %, and more where that would leave a speaker without references."""
    fewest = min(Counter(row["speaker_id"] for row in rows).values())
    return min(0.3, max(0.03, REFERENCES_PER_SPEAKER / fewest))


def choose_prompts(samples: list[dict[str, Any]], held_out: list[dict[str, Any]], count: int, seeds: int) -> list[dict]:
    """What is spoken: every word by every speaker with `seeds` seeds, or an even choice of `count` among them.

    A reference is a recording of the speaker that training never saw, saying another word where there is one.

    Raises:
        InputError: no recording of some speaker was held out.
    """
    references: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in held_out:
        references[row["speaker_id"]].append(row)
    speakers = sorted({row["speaker_id"] for row in samples})
    for speaker in speakers:
        if speaker not in references:
            raise InputError(
                f"no recording of speaker {speaker!r} was held out to be a reference; give more recordings of them"
            )
    pairs = [(word, speaker) for word in sorted({row["transcript"] for row in samples}) for speaker in speakers]
    wanted = max(1, min(len(pairs), count // seeds))
    pairs = [pairs[index * len(pairs) // wanted] for index in range(wanted)]
    prompts = []
    for number, (word, speaker) in enumerate(pairs):
        others = [row for row in references[speaker] if row["transcript"] != word] or references[speaker]
        for seed in range(seeds):
            reference = others[(number * seeds + seed) % len(others)]
            prompts.append(
                {
                    "id": f"{number:04d}_{seed}",
                    "text": word,
                    "speaker_id": speaker,
                    "seed": number * seeds + seed,
                    "reference_audio": reference["wav_path"],
                    "reference_text": reference["transcript"],
                }
            )
    return prompts


def encode(road: Pipeline, samples: Path, codes: Path, variants: int) -> None:
    """Recordings (wav_path, transcript, speaker_id) → codes, each in some variants: start offsets and levels."""
    road.step(
        f"{samples.stem} → codes, {variants} of each",
        script(
            "preprocess/encode_audio.py",
            *("--input", samples, "--codec", "codec2", "--output-dir", codes),
            *("--augment", str(variants), "--workers", str(cores()), "--resume"),
        ),
    )


def make_documents(road: Pipeline, title: str, task: str, codes: Path, prefix: Path, space: Path, *more: str) -> None:
    """Codes → the dataset `prefix`."""
    road.step(
        title,
        script(
            "preprocess/preprocess_data.py",
            *("--task", task, "--input", codes / "samples.jsonl", "--token-space", space, "--output-prefix", prefix),
            *("--workers", str(cores()), "--language", "und", *more),
        ),
    )


def road_overrides(out: Path, *datasets: str) -> list[str]:
    """Where a recipe finds what was made under `out`, where its run goes, and what this machine computes in."""
    return [
        f"token_space={out / 'token_space.json'}",
        *(f"data.datasets.{name}={out / 'data' / name}" for name in datasets),
        f"run_dir={out / 'run'}",
        precision_override(out / "run"),
    ]


def train_and_speak(road: Pipeline, recipe: Path, overrides: list[str], out: Path, temperature: float) -> None:
    """Train the stages, then say `out/prompts.jsonl`."""
    road.step("Train: pretraining, then SFT", launched("train", recipe, *overrides), **ONE_THREAD)
    road.step(
        "Speak in voices given by recordings that training never saw",
        megatron_speech(
            *("generate", "--checkpoint", out / "run", "--input", out / "prompts.jsonl", "--output-dir", out),
            *("--temperature", str(temperature)),
        ),
    )


@command
def main() -> int:
    """Walk the whole road; a second call continues where the first one ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", required=True, type=Path, help="samples.jsonl: wav_path, transcript, speaker_id")
    parser.add_argument("--output-dir", required=True, type=Path, help="everything goes here")
    parser.add_argument("--utterances", type=int, default=300, help="to generate, at most (300)")
    parser.add_argument("--seeds", type=int, default=5, help="utterances per word and speaker (5)")
    parser.add_argument("--temperature", type=float, default=0.6, help="of sampling (0.6)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to examples/digits/recipe.yaml")
    args = parser.parse_args()
    for name, value in (("--utterances", args.utterances), ("--seeds", args.seeds)):
        if value <= 0:
            raise InputError(f"{name} is {value:g}; needed: more than 0")

    samples, out = args.samples.resolve(), args.output_dir.resolve()
    rows = check_samples(samples)
    prepare_output_directory(out)
    recipe, road = HERE / "recipe.yaml", Pipeline()

    space = out / "token_space.json"
    road.step(
        "Id space: bytes, specials, Codec2's four codebooks",
        megatron_speech("token-space", "--text-tokenizer", "bytes", "--codec", "codec2", "--output", space),
    )
    encode(road, samples, out / "codes", variants=8)
    make_documents(road, "Codes → speech documents", "speech_lm", out / "codes", out / "data/speech", space)
    make_documents(
        road,
        "Codes + words → cloning documents, three references for each",
        *("tts", out / "codes", out / "data/tts", space, "--cloning", "same-speaker", "--references", "3"),
    )
    overrides = [
        *road_overrides(out, "speech", "tts"),
        f"data.validation_fraction={held_out_share(rows)}",
        *batch_overrides(STAGES, seq_length=512, global_batch_tokens=2048),
        *args.overrides,
    ]
    data = load_recipe(recipe, overrides).data
    held_out = held_out_recordings(out / "codes", out / "data/speech", data)
    prompts = choose_prompts(rows, held_out, args.utterances, args.seeds)
    write_jsonl(out / "prompts.jsonl", prompts)
    train_and_speak(road, recipe, overrides, out, args.temperature)
    road.step(
        "Score",
        script(
            "examples/digits/score.py",
            *("--samples", samples, "--codes", out / "codes", "--generated", out / "generated.jsonl"),
            *("--token-space", space, "--output", out / "report.json"),
        ),
    )
    say(f"\n{road.elapsed() / 60:.1f} minutes. Speech: {out / 'generated.jsonl'}; scores: {out / 'report.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
