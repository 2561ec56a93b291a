"""Connected digits, step by step: recordings → joined utterances → PT → SFT → unseen sequences, spoken and scored."""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pipeline import Pipeline, batch_overrides, megatron_speech, read_jsonl, say, script, write_jsonl
from run import HERE, check_samples, encode, make_documents, road_overrides, train_and_speak

from megatron_speech.errors import InputError, command
from megatron_speech.files import prepare_output_directory

STAGES = ("fast", "one_take", "pt", "sft")
# Holds nearly every document: two utterances of up to seven words.
SEQ_LENGTH, BATCH_TOKENS = 1024, 2048
CLONING = ("--cloning", "same-speaker", "--references", "1")


def choose_prompts(joined: Path) -> list[dict[str, Any]]:
    """The sequences of `evaluation.jsonl`, each in the voice of an utterance of `references.jsonl`."""
    references: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in read_jsonl(joined / "references.jsonl"):
        references[row["speaker_id"]].append(row)
    prompts = []
    for number, row in enumerate(read_jsonl(joined / "evaluation.jsonl")):
        own = references[row["speaker_id"]]
        others = [other for other in own if other["transcript"] != row["transcript"]] or own
        reference = others[number // len(references) % len(others)]
        prompts.append(
            {
                "id": row["sample_id"],
                "text": row["transcript"],
                "speaker_id": row["speaker_id"],
                "seed": number,
                "reference_audio": str((joined / reference["wav_path"]).resolve()),
                "reference_text": reference["transcript"],
            }
        )
    return prompts


@command
def main() -> int:
    """Walk the whole road; a second call continues where the first one ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", required=True, type=Path, help="samples.jsonl: wav_path, transcript, speaker_id")
    parser.add_argument("--output-dir", required=True, type=Path, help="everything goes here")
    parser.add_argument("--utterances", type=int, default=7000, help="to train on (7000)")
    parser.add_argument("--exercises", type=int, default=16000, help="easy ones, to begin with (16000)")
    parser.add_argument("--evaluation", type=int, default=300, help="to say, at most (300)")
    parser.add_argument("--temperature", type=float, default=0.6, help="of sampling (0.6)")
    parser.add_argument("--seed", type=int, default=1, help="of the joined utterances and of the run (1)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to examples/digits/connected.yaml")
    args = parser.parse_args()
    for name in ("utterances", "exercises", "evaluation"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} is {getattr(args, name)}; needed: 1 or more")
    samples, out = args.samples.resolve(), args.output_dir.resolve()
    check_samples(samples)
    prepare_output_directory(out)
    recipe, joined, road = HERE / "connected.yaml", out / "joined", Pipeline()

    if not (joined / "samples.jsonl").exists():
        road.step(
            "Recordings → utterances of several words",
            script(
                "examples/digits/join.py",
                *("--samples", samples, "--output-dir", joined, "--seed", str(args.seed)),
                *("--utterances", str(args.utterances), "--exercises", str(args.exercises)),
                *("--evaluation", str(args.evaluation)),
            ),
        )
    space, text = out / "token_space.json", out / "text.model"
    road.step(
        "A text tokenizer with a piece for each word",
        megatron_speech(
            *("tokenizer", "train", "--input", joined / "samples.jsonl", "--json-keys", "transcript", "--model", "bpe"),
            *("--vocab-size", "400", "--up-to", "--output", text),
        ),
    )
    road.step(
        "Id space: text pieces, specials, Codec2's four codebooks",
        megatron_speech("token-space", "--text-tokenizer", text, "--codec", "codec2", "--output", space),
    )
    encode(road, joined / "exercises.jsonl", out / "easy_codes", variants=1)
    encode(road, joined / "samples.jsonl", out / "codes", variants=2)
    for title, codes, name, more in (
        ("Exercises → TTS documents", out / "easy_codes", "exercises", ()),
        ("Codes + words → TTS documents", out / "codes", "plain", ()),
        ("Codes + words → cloning documents", out / "codes", "tts", CLONING),
    ):
        make_documents(road, title, "tts", codes, out / "data" / name, space, *more)
    overrides = [
        *road_overrides(out, "exercises", "plain", "tts"),
        f"seed={args.seed}",
        *batch_overrides(STAGES, SEQ_LENGTH, BATCH_TOKENS),
        *args.overrides,
    ]
    write_jsonl(out / "prompts.jsonl", choose_prompts(joined))
    train_and_speak(road, recipe, overrides, out, args.temperature)
    road.step(
        "Score",
        script(
            "examples/digits/score_connected.py",
            *("--samples", samples, "--joined", joined, "--codes", out / "codes"),
            *("--generated", out / "generated.jsonl", "--token-space", out / "token_space.json"),
            *("--output", out / "report.json"),
        ),
    )
    say(f"\n{road.elapsed() / 60:.1f} minutes. Speech: {out / 'generated.jsonl'}; scores: {out / 'report.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
