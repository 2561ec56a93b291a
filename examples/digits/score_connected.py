#!/usr/bin/env python3
"""How well does it say sequences of words? The error rate per word, and whose voice it is.

    classifier    the CNN of classifier.py on each stretch between two pauses; the voice is what all of them say
                  together
    pocketsphinx  a recogniser that was trained on other people: any number of the words in any order

Each stands beside the same listener's result on joined recordings that neither the model nor the CNN has heard, as they
are (`original`) and after the codec (`round_trip`), and beside chance: the same transcripts against other texts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from classifier import Judge, read_recordings, train
from score import cell, copies, read_codes, read_generated, share

from megatron_speech.codecs import get_codec
from megatron_speech.codecs.audio import read_audio
from megatron_speech.errors import InputError, command
from megatron_speech.evaluation.scorers import PocketSphinx, chance_rates, error_rates, is_loop
from megatron_speech.files import prepare_output_directory, write_json
from megatron_speech.generation.prompts import read_json_lines
from megatron_speech.tokens.normalization import normalize_transcript
from megatron_speech.tokens.space import TokenSpace

HOP_SECONDS = 0.01
# Quieter than this below the loudest part is a pause, and so long must it be to part two words: a stop consonant
# (“six”, “eight”) closes for less.
PAUSE_DB, PAUSE_SECONDS = 30.0, 0.11
# A shorter stretch is no word: a click, or the release of a stop.
WORD_SECONDS = 0.08
MARGIN_SECONDS = 0.02


def stretches(audio: np.ndarray, sample_rate_hz: int) -> list[np.ndarray]:
    """What lies between the pauses of an utterance, float [n]: one stretch for each word, if it was said clearly."""
    hop = round(HOP_SECONDS * sample_rate_hz)
    frames = len(audio) // hop
    if not frames:
        return []
    energy = np.square(audio[: frames * hop].reshape(frames, hop).astype(np.float64)).mean(1)
    energy = np.convolve(energy, np.ones(3) / 3, mode="same")
    loud = np.flatnonzero(energy > energy.max() * 10 ** (-PAUSE_DB / 10))
    if not len(loud) or energy.max() <= 0:
        return []
    breaks = np.flatnonzero(np.diff(loud) > PAUSE_SECONDS / HOP_SECONDS)
    starts, ends = loud[np.r_[0, breaks + 1]], loud[np.r_[breaks, len(loud) - 1]] + 1
    margin = round(MARGIN_SECONDS * sample_rate_hz)
    return [
        audio[max(start * hop - margin, 0) : end * hop + margin]
        for start, end in zip(starts, ends, strict=True)
        if (end - start) * HOP_SECONDS >= WORD_SECONDS
    ]


def listen(judge: Judge, clips: Sequence[np.ndarray]) -> tuple[list[str], list[str]]:
    """(words, speaker) of each utterance, by the CNN."""
    texts, speakers = [], []
    for clip in clips:
        words, voices = judge.log_probabilities(stretches(clip, judge.sample_rate_hz))
        texts.append(" ".join(judge.words[i] for i in words.argmax(1)))
        speakers.append(judge.speakers[int(voices.sum(0).argmax())] if len(voices) else "")
    return texts, speakers


def rates(texts: Sequence[str], heard: Sequence[str]) -> dict[str, Any]:
    """Error rate per word (`wer`) and share of whole sequences that are right (`exact`)."""
    found = error_rates(texts, heard)
    assert found is not None
    return {"utterances": found.items, "word_error_rate": found.wer, "exact": found.exact}


@command
def main() -> int:
    """Train the judge, listen, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", required=True, type=Path, help="samples.jsonl of the single real recordings")
    parser.add_argument("--joined", required=True, type=Path, help="output directory of join.py")
    parser.add_argument("--codes", required=True, type=Path, help="folder that encode_audio.py wrote of it")
    parser.add_argument("--generated", required=True, type=Path, help="generated.jsonl of `megatron-speech generate`")
    parser.add_argument("--token-space", required=True, type=Path, help="the run's token space: it names the codec")
    parser.add_argument("--output", required=True, type=Path, help="report.json")
    parser.add_argument("--epochs", type=int, default=20, help="the judge's passes over the recordings (20)")
    args = parser.parse_args()
    if args.epochs < 1:
        raise InputError(f"--epochs is {args.epochs}; it must be 1 or more")
    codec = get_codec(TokenSpace.load(args.token_space).codec.name)
    rate = codec.sample_rate_hz
    recordings, clips, unusable = read_recordings(args.samples, rate)
    rows = read_generated(args.generated)
    generated_codes = read_codes(rows, args.generated.parent, args.generated)
    encoded = args.codes / "samples.jsonl"
    training = read_codes([row for _, row in read_json_lines(encoded, "codes")], args.codes, encoded)
    real = [row for _, row in read_json_lines(args.joined / "evaluation.jsonl", "joined recordings")]
    originals = [read_audio(args.joined / row["wav_path"], rate) for row in real]
    prepare_output_directory(args.output.absolute().parent)

    judge = train(recordings, clips, rate, epochs=args.epochs)
    recogniser = PocketSphinx(judge.words, repeated=True)
    real_texts = [normalize_transcript(row["transcript"]).lower() for row in real]
    real_speakers = [str(row["speaker_id"]) for row in real]
    sets = {
        "generated": (
            [read_audio(args.generated.parent / row["wav_path"], rate, allow_silence=True) for row in rows],
            [row["text"] for row in rows],
            [row["speaker_id"] for row in rows],
        ),
        "round_trip": ([codec.decode(codec.encode(clip)) for clip in originals], real_texts, real_speakers),
        "original": (originals, real_texts, real_speakers),
    }
    report: dict[str, Any] = {"utterances": len(rows), "classifier": {}, "pocketsphinx": {}, "speaker": {}}
    for name, (audio, texts, speakers) in sets.items():
        heard, voices = listen(judge, audio)
        recognised = [recogniser.transcribe(clip, rate) for clip in audio]
        report["classifier"][name] = rates(texts, heard)
        report["pocketsphinx"][name] = rates(texts, recognised)
        report["speaker"][name] = share([a == b for a, b in zip(speakers, voices, strict=True)])
        if name == "generated":
            for listener, said in (("classifier", heard), ("pocketsphinx", recognised)):
                chance = chance_rates(texts, said)
                report[listener]["chance"] = asdict(chance) if chance else None
            by_length: dict[int, list[int]] = {}
            for number, text in enumerate(texts):
                by_length.setdefault(len(text.split()), []).append(number)
            report["by_words"] = {
                str(count): rates([texts[i] for i in chosen], [heard[i] for i in chosen])
                for count, chosen in sorted(by_length.items())
            }
            report["per_speaker"] = {
                speaker: {
                    **rates([texts[i] for i in mine], [heard[i] for i in mine]),
                    "speaker": share([voices[i] == speaker for i in mine]),
                }
                for speaker in sorted(set(speakers))
                if (mine := [i for i, own in enumerate(speakers) if own == speaker])
            }
            report["items"] = [
                {"id": row.get("id"), "text": row["text"], "speaker_id": row["speaker_id"], "classifier": a,
                 "pocketsphinx": b, "voice": c, "ended": bool(row.get("ended"))}
                for row, a, b, c in zip(rows, heard, recognised, voices, strict=True)
            ]  # fmt: skip
    report["speaker"]["chance"] = 1 / len(judge.speakers)
    report["stop_failures"] = sum(not row.get("ended") for row in rows) / len(rows)
    report["loop_rate"] = share([is_loop(codes, codec.frame_rate_hz) for codes in generated_codes])
    trained_texts = {
        row["transcript"] for _, row in read_json_lines(args.joined / "samples.jsonl", "joined recordings")
    }
    report["texts_seen_in_training"] = sum(row["text"] in trained_texts for row in rows)
    report["copies"] = copies(generated_codes, training)
    report["judge"] = {"trained_on": sum(not r.held_out for r in recordings), "unusable": unusable}
    write_json(args.output, report)
    print("\n".join(console(report)))
    return 0


def console(report: dict[str, Any]) -> list[str]:
    """The report as a table for people."""
    columns = ("generated", "round_trip", "original", "chance")
    lines = [f"{'':34}{'generated':>10}{'codec':>10}{'original':>10}{'chance':>10}"]
    for listener in ("classifier", "pocketsphinx"):
        part = report[listener]
        values = [part[c]["word_error_rate"] if c != "chance" else part[c]["wer"] for c in columns]
        lines.append(f"{'errors per word, ' + listener:34}" + "".join(f"{cell(value):>10}" for value in values))
    lines.append(f"{'speaker, classifier':34}" + "".join(f"{cell(report['speaker'][c]):>10}" for c in columns))
    lines.append(
        f"{report['utterances']} utterances, {report['texts_seen_in_training']} of a text seen in training; "
        f"{cell(report['stop_failures']).strip()} did not end by themselves, {cell(report['loop_rate']).strip()} loop; "
        f"copies of a training sequence: {report['copies']['exact']}"
    )
    return lines


if __name__ == "__main__":
    sys.exit(main())
