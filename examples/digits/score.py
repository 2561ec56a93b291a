#!/usr/bin/env python3
"""How well does it speak? Scores of generated words, each beside its ceilings and chance.

Three listeners, none of which has heard codec audio or generated speech in training:
    word       a CNN trained on the real recordings (classifier.py)
    speaker    the same CNN's second head: is it the voice of the reference?
    pocketsphinx  a recogniser that was trained on other people, with the words of the file as its grammar

Ceilings are the same listeners' scores on recordings that the CNN was not trained on: as they are (`original`) and
after the codec (`round_trip`, what a perfect model of the codes could reach). Copies of training sequences are
looked for among all codes that the model could have seen.
"""

from __future__ import annotations

import argparse
import bisect
import importlib.util
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from classifier import Judge, Recording, read_recordings, train

from megatron_speech.codecs import Codec, get_codec
from megatron_speech.codecs.audio import read_audio
from megatron_speech.errors import InputError, command
from megatron_speech.evaluation.scorers import (
    PocketSphinx,
    can_score,
    is_loop,
    missing_packages,
    normalise_text,
)
from megatron_speech.files import prepare_output_directory, write_json
from megatron_speech.generation.prompts import read_json_lines
from megatron_speech.tokens.normalization import normalize_transcript
from megatron_speech.tokens.space import TokenSpace

# A word head that saw fewer recordings of a word than this, on average, judges nothing.
RECORDINGS_PER_CLASS = 5


# ------------------------------------------------------------------------------------------- reading


def read_codes(rows: Sequence[dict[str, Any]], folder: Path, what: Path) -> list[np.ndarray]:
    """Codes [T, K] of rows with codes_path (relative to `folder`) and, in shared files, code_offset and code_len.

    Raises:
        InputError: a row names no codes, or a file of codes cannot be read.
    """
    files: dict[Path, np.ndarray] = {}
    codes = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("codes_path"), str):
            raise InputError(f"{what} row {number}: field codes_path is missing; the check for copies needs the codes")
        path = folder / row["codes_path"]
        if path not in files:
            try:
                files[path] = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise InputError(f"codes {path} cannot be read: {error}; encode the recordings again") from error
        offset = int(row.get("code_offset", 0))
        length = int(row.get("code_len", len(files[path]) - offset))
        codes.append(np.ascontiguousarray(files[path][offset : offset + length], dtype=np.int32))
    return codes


def read_generated(path: Path) -> list[dict[str, Any]]:
    """Rows of generated.jsonl.

    Raises:
        InputError: a field that is judged is missing, or the file has no line.
    """
    rows = []
    for number, row in read_json_lines(path, "generated speech"):
        for field in ("wav_path", "text", "speaker_id"):
            if row.get(field) in (None, ""):
                raise InputError(f"{path} line {number}: field {field} is missing; it is needed to judge the utterance")
        rows.append({**row, "text": normalize_transcript(row["text"]).lower(), "speaker_id": str(row["speaker_id"])})
    if not rows:
        raise InputError(f"{path} has no line; generate first")
    return rows


# ------------------------------------------------------------------------------------------- copies


def frames_as_bytes(codes: np.ndarray) -> list[bytes]:
    """One bytes object per frame."""
    rows = np.ascontiguousarray(codes, dtype=">i4")
    return [row.tobytes() for row in rows]


def copies(generated: Sequence[np.ndarray], training: Sequence[np.ndarray]) -> dict[str, Any]:
    """How close generated sequences come to training ones.

    `exact` counts generated sequences that equal a whole training sequence. `longest_common_prefix_frames` is how many
    frames a generated sequence shares with the start of some training sequence. `nearest_edit_distance` is the
    Levenshtein distance in frames to the nearest training sequence, divided by the longer length: 0 is a copy, 1 shares
    nothing.
    """
    known = sorted({codes.astype(">i4").tobytes() for codes in training})
    members = set(known)
    exact, prefixes = 0, []
    for codes in generated:
        key, size = codes.astype(">i4").tobytes(), 4 * codes.shape[1]
        exact += key in members
        # In sorted order the sequences that share the longest prefix with `key` are next to its place.
        place = bisect.bisect_left(known, key)
        longest = 0
        for other in known[max(place - 1, 0) : place + 1]:
            limit = min(len(other), len(key)) // size
            longest = max(
                longest, next((i for i in range(limit) if other[i * size :][:size] != key[i * size :][:size]), limit)
            )
        prefixes.append(longest)
    return {
        "training_sequences": len(training),
        "exact": int(exact),
        "longest_common_prefix_frames": {"max": int(max(prefixes)), "mean": float(np.mean(prefixes))},
        "nearest_edit_distance": nearest_distances(generated, training),
    }


def nearest_distances(generated: Sequence[np.ndarray], training: Sequence[np.ndarray]) -> dict[str, float] | None:
    """Smallest and mean normalised edit distance to the nearest training sequence; None without rapidfuzz."""
    if importlib.util.find_spec("rapidfuzz") is None:
        return None
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    # Frames become characters: each frame that was generated one of its own, all others one more.
    letters: dict[bytes, str] = {}
    texts = [
        "".join(letters.setdefault(frame, chr(0xE001 + len(letters))) for frame in frames_as_bytes(codes))
        for codes in generated
    ]
    others = ["".join(letters.get(frame, "\ue000") for frame in frames_as_bytes(codes)) for codes in training]
    nearest = np.ones(len(texts))
    for start in range(0, len(others), 8192):  # bounded memory for large corpora
        part = cdist(texts, others[start : start + 8192], scorer=Levenshtein.normalized_distance, dtype=np.float32)
        nearest = np.minimum(nearest, part.min(1))
    return {"min": float(nearest.min()), "mean": float(nearest.mean())}


# ------------------------------------------------------------------------------------------- scores


def share(hits: Sequence[bool]) -> float | None:
    """Share of hits; None where there is nothing to count."""
    return float(np.mean(hits)) if len(hits) else None


def open_pocketsphinx(samples: Path, words: Sequence[str]) -> tuple[PocketSphinx | None, str | None]:
    """(the recogniser with the words as its grammar, None) or (None, why it does not apply)."""
    missing = missing_packages()
    if missing:
        return None, f"{' and '.join(missing)} not installed (pip install 'megatron-speech[evaluation]')"
    languages = {row.get("language") or "en" for _, row in read_json_lines(samples, "samples file")}
    foreign = sorted(language for language in languages if not can_score(str(language)))
    if foreign:
        return None, f"it hears English only, the recordings are in {', '.join(foreign)}"
    try:
        return PocketSphinx(words), None
    except InputError as error:
        return None, str(error)


def listen(
    clips: Sequence[np.ndarray], judge: Judge, recogniser: PocketSphinx | None, sample_rate_hz: int
) -> dict[str, list[str]]:
    """What each listener says about each clip: word, speaker, pocketsphinx."""
    words, speakers = judge.judge(clips)
    heard = {"word": words, "speaker": speakers}
    if recogniser is not None:
        heard["pocketsphinx"] = [recogniser.transcribe(clip, sample_rate_hz) for clip in clips]
    return heard


def score(
    recordings: Sequence[Recording],
    clips: Sequence[np.ndarray],
    rows: Sequence[dict[str, Any]],
    generated: Sequence[np.ndarray],
    judge: Judge,
    recogniser: PocketSphinx | None,
    codec: Codec,
) -> dict[str, Any]:
    """Every listener on generated speech, on held-out originals and on their codec round trip.

    Args:
        recordings, clips: the real recordings and their audio.
        rows, generated: rows of generated.jsonl and their audio.
        judge, recogniser: the listeners.
        codec: for the round trip; its rate is that of all audio.
    """
    rate = codec.sample_rate_hz
    held = [i for i, recording in enumerate(recordings) if recording.held_out]
    originals = [clips[i] for i in held]
    real = [(recordings[i].word, recordings[i].speaker) for i in held]
    round_trips = [codec.decode(codec.encode(clip)) for clip in originals]
    sets: dict[str, Heard] = {
        "generated": (listen(generated, judge, recogniser, rate), [(row["text"], row["speaker_id"]) for row in rows]),
        "round_trip": (listen(round_trips, judge, recogniser, rate), real),
        "original": (listen(originals, judge, recogniser, rate), real),
    }
    chance = {"word": 1 / len(judge.words), "speaker": 1 / len(judge.speakers), "pocketsphinx": 1 / len(judge.words)}
    report: dict[str, Any] = {
        listener: {
            "chance": chance[listener],
            **{
                name: share(
                    [said == wanted(listener, label) for said, label in zip(heard[listener], labels, strict=True)]
                )
                if listener in heard
                else None
                for name, (heard, labels) in sets.items()
            },
        }
        for listener in ("word", "speaker", "pocketsphinx")
    }
    per_train = sum(not recording.held_out for recording in recordings)
    for head, classes in (("word", judge.words), ("speaker", judge.speakers)):
        report[head]["applicable"] = len(classes) > 1 and per_train >= RECORDINGS_PER_CLASS * len(classes)
        if not report[head]["applicable"]:
            report[head] |= dict.fromkeys(sets)
            report[head]["reason"] = (
                f"{per_train} recordings of {len(classes)} {head}s: too few of each to learn to tell them apart"
            )
    report["per_word"] = breakdown(sets, judge.words, 0, "word")
    report["per_speaker"] = breakdown(sets, judge.speakers, 1, "speaker")
    return report


Heard = tuple[dict[str, list[str]], list[tuple[str, str]]]


def breakdown(sets: dict[str, Heard], classes: Sequence[str], label: int, head: str) -> dict[str, Any]:
    """Scores of each word (label 0) or speaker (label 1), with what the CNN's `head` took generated speech for."""
    table: dict[str, Any] = {}
    for name in classes:
        row: dict[str, Any] = {}
        for part, (heard, labels) in sets.items():
            mine = [i for i, pair in enumerate(labels) if pair[label] == name]
            row[part] = {"utterances": len(mine)} | {
                listener: share([said[i] == wanted(listener, labels[i]) for i in mine])
                for listener, said in heard.items()
            }
            if part == "generated":
                row["heard_as"] = dict(Counter(heard[head][i] for i in mine).most_common())
        table[name] = row
    return table


def wanted(listener: str, label: tuple[str, str]) -> str:
    """What a listener should have said for (word, speaker)."""
    return {"word": label[0], "speaker": label[1], "pocketsphinx": normalise_text(label[0])}[listener]


def cell(value: float | None) -> str:
    """A share as per cent; a dash for none."""
    return f"{'–':>8}" if value is None else f"{100 * value:6.1f} %"


def console(report: dict[str, Any]) -> list[str]:
    """The report as a table for people."""
    lines = [f"{'':34}{'generated':>10}{'codec':>10}{'original':>10}{'chance':>10}"]
    for key, name in (
        ("word", "word, CNN trained on recordings"),
        ("speaker", "speaker, CNN trained on recordings"),
        ("pocketsphinx", "word, pocketsphinx"),
    ):
        part = report[key]
        lines.append(
            f"{name:34}" + "".join(f"{cell(part[c]):>10}" for c in ("generated", "round_trip", "original", "chance"))
        )
        if part.get("reason"):
            lines.append(f"  not applicable: {part['reason']}")
    found = report["copies"]
    distance = found["nearest_edit_distance"]
    lines += [
        f"{report['utterances']} utterances: {cell(report['eos_rate']).strip()} ended by themselves, "
        f"{cell(report['loop_rate']).strip()} loops, invalid-token rate {cell(report['invalid_token_rate']).strip()}",
        f"copies of the {found['training_sequences']:,} training sequences: {found['exact']}; longest common start "
        f"{found['longest_common_prefix_frames']['max']} frames"
        + ("" if distance is None else f"; nearest edit distance {distance['min']:.2f}, mean {distance['mean']:.2f}"),
    ]
    return lines


@command
def main() -> int:
    """Train the judge, listen, write report.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", required=True, type=Path, help="samples.jsonl of the real recordings")
    parser.add_argument(
        "--codes", required=True, type=Path, help="folder that encode_audio.py wrote: what was trained on"
    )
    parser.add_argument("--generated", required=True, type=Path, help="generated.jsonl of `megatron-speech generate`")
    parser.add_argument("--token-space", required=True, type=Path, help="the run's token space: it names the codec")
    parser.add_argument("--output", required=True, type=Path, help="report.json")
    parser.add_argument("--epochs", type=int, default=20, help="the judge's passes over the recordings (20)")
    args = parser.parse_args()
    if args.epochs < 1:
        raise InputError(f"--epochs is {args.epochs}; it must be 1 or more")
    space = TokenSpace.load(args.token_space)
    codec = get_codec(space.codec.name)
    if codec.hash != space.codec.hash:
        raise InputError(
            f"{args.token_space}: codec {codec.name} is another version here; round trips would not compare"
        )
    recordings, clips, unusable = read_recordings(args.samples, codec.sample_rate_hz)
    rows = read_generated(args.generated)
    encoded = args.codes / "samples.jsonl"
    training = read_codes([row for _, row in read_json_lines(encoded, "codes")], args.codes, encoded)
    generated_codes = read_codes(rows, args.generated.parent, args.generated)
    prepare_output_directory(args.output.absolute().parent)
    generated = [
        read_audio(args.generated.parent / row["wav_path"], codec.sample_rate_hz, allow_silence=True) for row in rows
    ]

    started = time.monotonic()
    judge = train(recordings, clips, codec.sample_rate_hz, epochs=args.epochs)
    seconds = time.monotonic() - started
    recogniser, reason = open_pocketsphinx(args.samples, judge.words)
    report = score(recordings, clips, rows, generated, judge, recogniser, codec)
    report["pocketsphinx"]["applicable"] = recogniser is not None
    report["pocketsphinx"]["reason"] = reason
    frame_rate = codec.frame_rate_hz
    real_codes = [codec.encode(clips[i]) for i, recording in enumerate(recordings) if recording.held_out]
    report = {
        "utterances": len(rows),
        **report,
        "eos_rate": share([bool(row.get("ended")) for row in rows]),
        "loop_rate": share([is_loop(codes, frame_rate) for codes in generated_codes]),
        "loop_rate_original": share([is_loop(codes, frame_rate) for codes in real_codes]),
        "invalid_token_rate": float(np.mean([row.get("invalid_token_rate", 0.0) for row in rows])),
        "duration_seconds": {
            "generated": float(np.mean([len(clip) for clip in generated]) / codec.sample_rate_hz),
            "original": float(np.mean([len(clip) for clip in clips]) / codec.sample_rate_hz),
        },
        "copies": copies(generated_codes, training),
        "judge": {
            "trained_on": sum(not recording.held_out for recording in recordings),
            "held_out": sum(recording.held_out for recording in recordings),
            "unusable": unusable,
            "words": judge.words,
            "speakers": judge.speakers,
            "epochs": args.epochs,
            "train_seconds": seconds,
        },
    }
    write_json(args.output, report)
    print("\n".join(console(report)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
