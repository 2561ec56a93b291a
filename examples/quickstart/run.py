"""The quickstart: from nothing, or from your own recordings, to a model that talks and a report on what it says.

    make quickstart                          a small multilingual corpus is synthesised
    make quickstart DATA=samples.jsonl       your recordings: wav_path, transcript, language, speaker_id per line

Recordings → codes → three streams of documents → pretraining → SFT → speech → report.html.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import defaultdict
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

from megatron_speech.data.dataset.indexed import TokenDataset
from megatron_speech.errors import InputError, command
from megatron_speech.files import prepare_output_directory, write_text
from megatron_speech.recipe.load import load_recipe

HERE = Path(__file__).resolve().parent
STAGES = ("pt", "sft")
# Longer sequences than this are out of reach of a model that trains in minutes.
LONGEST_SEQUENCE = 4096


def check_samples(path: Path) -> list[dict[str, Any]]:
    """Rows of the user's samples.jsonl.

    Raises:
        InputError: the file cannot be used; a line or field is named.
    """
    rows = read_jsonl(path)
    for number, row in enumerate(rows, 1):
        for field in ("wav_path", "transcript"):
            if not row.get(field):
                raise InputError(
                    f"{path} record {number}: field {field} is missing or empty; the quickstart trains a model that "
                    "speaks, so every recording needs its transcript"
                )
    return rows


def choose_canaries(recordings: list[dict[str, Any]], per_language: int, takes: int = 1) -> list[dict[str, Any]]:
    """What the evaluation says: held-out recordings' transcripts, in voices given by other held-out recordings.

    Words are taken in turn, so that a few canaries cover as many transcripts as they can. Each is said `takes` times.
    """
    by_language: dict[str, list[dict[str, Any]]] = defaultdict(list)
    by_speaker: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in recordings:
        language = row.get("language") or "und"
        by_language[language].append(row)
        by_speaker[language, str(row.get("speaker_id"))].append(row)
    canaries = []
    for language, rows in sorted(by_language.items()):
        by_text: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in rows:
            by_text[row["transcript"]].append(row)
        in_turn = [row for turn in itertools.zip_longest(*by_text.values()) for row in turn if row is not None]
        for number, row in enumerate(in_turn[:per_language]):
            others = [
                other
                for other in by_speaker[language, str(row.get("speaker_id"))]
                if other["source_id"] != row["source_id"]
            ]
            item: dict[str, Any] = {
                "id": f"{language}-{number:02d}",
                "text": row["transcript"],
                "language": language,
                "category": str(row.get("dataset_source") or "general"),
                "seeds": [number + 1000 * take for take in range(takes)],
                "original_audio": row["wav_path"],
            }
            if others and row.get("speaker_id"):
                reference = others[number % len(others)]
                item |= {"reference_audio": reference["wav_path"], "reference_text": reference["transcript"]}
            canaries.append(item)
    return canaries


def sequence_length(prefixes: list[Path]) -> int:
    """The power of two, 256 to `LONGEST_SEQUENCE`, that holds the longest document of the datasets."""
    longest = max(int(TokenDataset(prefix).lengths.max()) for prefix in prefixes)
    return min(max(256, 1 << (longest - 1).bit_length()), LONGEST_SEQUENCE)


@command
def main() -> int:
    """Walk the whole road; a second call continues where the first one ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", required=True, type=Path, help="everything goes here")
    parser.add_argument("--data", type=Path, help="your samples.jsonl; without it a corpus is synthesised")
    parser.add_argument("--utterances", type=int, default=4500, help="to synthesise (4500)")
    parser.add_argument("--canaries", type=int, default=40, help="held-out texts per language in the report (40)")
    parser.add_argument("--takes", type=int, default=3, help="times that each is spoken, with other seeds (3)")
    parser.add_argument("--seed", type=int, default=1, help="of the corpus and of the run (1)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to examples/quickstart/recipe.yaml")
    args = parser.parse_args()
    for name in ("canaries", "takes"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} is {getattr(args, name)}; needed: 1 or more")
    if args.data is not None:
        check_samples(args.data)
    out = args.output_dir.resolve()
    prepare_output_directory(out)
    recipe, space, workers, road = HERE / "recipe.yaml", out / "token_space.json", str(cores()), Pipeline()

    if args.data is None:
        samples, text = out / "corpus/samples.jsonl", out / "corpus/text.jsonl"
        if not text.exists():
            road.step(
                "A corpus: numbers and phrases in three languages, three voices each",
                script(
                    "examples/quickstart/make_corpus.py",
                    *("--output-dir", out / "corpus", "--utterances", str(args.utterances), "--workers", workers),
                    *("--languages", "en,hi,am", "--speakers", "3", "--min-words", "2", "--max-words", "3"),
                    *("--seed", str(args.seed)),
                ),
            )
    else:
        samples, text = args.data.resolve(), out / "text.jsonl"
        # The transcripts are the only text there is; as a third stream they teach what is said, not how.
        fields = ("language", "dataset_source")
        write_jsonl(
            text,
            (
                {"text": row["transcript"], **{f: row[f] for f in fields if row.get(f)}}
                for row in check_samples(samples)
            ),
        )
    road.step(
        "Id space: bytes, specials, Codec2's four codebooks",
        megatron_speech("token-space", "--text-tokenizer", "bytes", "--codec", "codec2", "--output", space),
    )
    road.step(
        "Recordings → codes, 4 variants of each",
        script(
            "preprocess/encode_audio.py",
            *("--input", samples, "--codec", "codec2", "--output-dir", out / "codes"),
            *("--augment", "4", "--workers", workers, "--resume"),
        ),
    )
    speech, tts, words = out / "data/speech", out / "data/tts", out / "data/text"
    for title, task, source, prefix, more in (
        ("Codes → speech", "speech_lm", out / "codes/samples.jsonl", speech, ()),
        ("Codes + transcripts → voice cloning", "tts", out / "codes/samples.jsonl", tts, CLONING),
        ("Text → text", "text_lm", text, words, ()),
    ):
        road.step(
            title,
            script(
                "preprocess/preprocess_data.py",
                *("--task", task, "--input", source, "--token-space", space, "--output-prefix", prefix),
                *("--workers", workers, "--language", "und", *more),
            ),
        )

    length = sequence_length([speech, tts])
    overrides = [
        f"token_space={space}",
        *(f"data.datasets.{name}={prefix}" for name, prefix in (("speech", speech), ("tts", tts), ("text", words))),
        f"run_dir={out / 'run'}",
        f"seed={args.seed}",
        precision_override(out / "run"),
        *batch_overrides(STAGES, length, max(2048, length)),
    ]
    if length == LONGEST_SEQUENCE:
        overrides.append("stages.sft.packing.oversize=drop")
    overrides += args.overrides
    data = load_recipe(recipe, overrides).data
    canaries = choose_canaries(held_out_recordings(out / "codes", speech, data), args.canaries, args.takes)
    if not canaries:
        raise InputError(
            f"none of the recordings of {samples} was held out for evaluation ({data.validation_fraction:.0%} of them "
            "are); give at least a hundred recordings"
        )
    write_canaries(out / "canaries.yaml", canaries)

    road.step("Proportions: what the stages will train on", megatron_speech("blend", recipe, *overrides))
    road.step(
        "Train: pretraining, then SFT",
        launched("train", recipe, *overrides),
        OMP_NUM_THREADS="1",
    )
    road.step(
        f"Speak and listen: {len(canaries)} canaries × {args.takes}",
        megatron_speech(
            *("evaluate", "--checkpoint", out / "run", "--canaries", out / "canaries.yaml"),
            *("--run", out / "run", "--output-dir", out / "report"),
        ),
    )
    road.step(
        "Draw",
        script(
            "examples/quickstart/picture.py",
            *("--run", out / "run", "--report", out / "report", "--canaries", out / "canaries.yaml"),
            *("--output", out / "picture.png"),
        ),
    )
    say(
        f"\n{road.elapsed() / 60:.1f} minutes in all.\n"
        f"  picture {out / 'picture.png'}\n"
        f"  report  {out / 'report/report.html'}\n"
        f"  speech  {out / 'report/wavs'}\n"
        f"  run     {out / 'run'}\n"
        "Say something else:\n"
        f"  {sys.executable} -m megatron_speech.cli generate --checkpoint {out / 'run'} "
        f"--text {canaries[0]['text']!r} --output out.wav"
    )
    return 0


CLONING = ("--cloning", "same-speaker", "--references", "2")


def write_canaries(path: Path, items: list[dict[str, Any]]) -> None:
    """The canary file of `megatron-speech evaluate`: what is said, how it is sampled, and who listens."""
    import yaml

    sentences = sorted({item["text"] for item in items if item["language"].split("-")[0] == "en"})
    value: dict[str, Any] = {"name": "quickstart", "decoding": {"temperature": 0.6, "max_seconds": 6.0}, "items": items}
    if sentences:
        value["scorer"] = {"kind": "pocketsphinx", "grammar": sentences}
    write_text(path, yaml.safe_dump(value, allow_unicode=True, sort_keys=False))


if __name__ == "__main__":
    sys.exit(main())
