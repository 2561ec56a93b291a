#!/usr/bin/env python3
"""Connected words out of recordings of single ones: several by one speaker, joined with pauses.

    python examples/digits/join.py --samples samples.jsonl --output-dir joined

Writes, with `wavs/`:

    samples.jsonl     what a model trains on
    exercises.jsonl   the same made easy: every word of a speaker in one take (dataset_source one-take), and those takes
                      four times as fast (fast): from them a model learns where in the text it is
    evaluation.jsonl  sequences that neither of these has
    references.jsonl  short utterances that show a voice

Of the latter two every piece is a recording that the judge of `classifier.py` holds out too: neither the model nor the
judge has heard it.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from classifier import read_recordings
from pipeline import write_jsonl

from megatron_speech.codecs.codec2 import FRAME_SAMPLES, Codec2
from megatron_speech.errors import InputError, command
from megatron_speech.files import prepare_output_directory

SAMPLE_RATE_HZ = Codec2.sample_rate_hz
# How long a speaker pauses between two words: someone who reads a number out for another to write it down.
PAUSE_SECONDS, FAST_PAUSE_SECONDS = (0.16, 0.32), (0.04, 0.08)
FAST = 4
FADE_SECONDS = 0.01
# How many words an utterance of the training set has, and how often; exercises begin with the short ones.
TRAINING_WORDS = {1: 0.2, 2: 0.15, 3: 0.15, 4: 0.14, 5: 0.12, 6: 0.12, 7: 0.12}
EXERCISE_WORDS = {1: 0.35, 2: 0.2, 3: 0.15, 4: 0.1, 5: 0.08, 6: 0.06, 7: 0.06}
EVALUATION_WORDS, REFERENCE_WORDS = dict.fromkeys(range(3, 8), 1.0), dict.fromkeys((3, 4), 1.0)
REFERENCES_PER_SPEAKER = 10
PEAK = 0.5


class Pieces:
    """Recordings of single words by speaker, each drawn as often as the others of its word."""

    def __init__(
        self,
        clips: dict[tuple[str, str], list[np.ndarray]],
        generator: random.Random,
        pause_seconds: tuple[float, float] = PAUSE_SECONDS,
    ) -> None:
        self._clips, self._generator, self._pause_seconds = clips, generator, pause_seconds
        self._left: dict[tuple[str, str], list[np.ndarray]] = defaultdict(list)
        self.words: dict[str, list[str]] = defaultdict(list)
        for speaker, word in sorted(clips):
            self.words[speaker].append(word)

    def one_take(self) -> Pieces:
        """Of every word of every speaker the recording of middling length alone."""
        return Pieces(
            {key: [sorted(takes, key=len)[len(takes) // 2]] for key, takes in self._clips.items()}, self._generator
        )

    def fast(self) -> Pieces:
        """The same, of every four frames one."""
        clips = {
            key: [
                np.pad(take, (0, -len(take) % FRAME_SAMPLES)).reshape(-1, FRAME_SAMPLES)[::FAST].reshape(-1)
                for take in takes
            ]
            for key, takes in self._clips.items()
        }
        return Pieces(clips, self._generator, FAST_PAUSE_SECONDS)

    def draw(self, speaker: str, word: str) -> np.ndarray:
        """The next recording of a word, float [n]."""
        left = self._left[speaker, word]
        if not left:
            left += self._clips[speaker, word]
            self._generator.shuffle(left)
        return left.pop()

    def join(self, speaker: str, words: Sequence[str]) -> np.ndarray:
        """An utterance, int16 [n]: each word at the same peak, faded in and out, with a pause before the next."""
        fade = np.linspace(0.0, 1.0, round(FADE_SECONDS * SAMPLE_RATE_HZ))
        parts: list[np.ndarray] = []
        for word in words:
            if parts:
                pause = round(self._generator.uniform(*self._pause_seconds) * SAMPLE_RATE_HZ)
                # Every word begins with a frame of the codec, as a recording of its own does.
                spoken = sum(map(len, parts)) + pause
                parts.append(np.zeros(pause + -spoken % FRAME_SAMPLES))
            clip = self.draw(speaker, word).astype(np.float64)
            clip = (clip - clip.mean()) * (PEAK / max(float(np.abs(clip - clip.mean()).max()), 1e-6))
            clip[: len(fade)] *= fade[: len(clip)]
            clip[-len(fade) :] *= fade[: len(clip)][::-1]
            parts.append(clip)
        return np.rint(np.concatenate(parts) * 32767).astype(np.int16)


def sequences(pieces: Pieces, lengths: dict[int, float], generator: random.Random) -> Iterator[tuple[str, list[str]]]:
    """Endless (speaker, words): speakers in turn, words evenly, as many of them as `lengths` says how often."""
    speakers = sorted(pieces.words)
    while True:
        for speaker in speakers:
            (count,) = generator.choices(list(lengths), list(lengths.values()))
            yield speaker, [generator.choice(pieces.words[speaker]) for _ in range(count)]


def write_utterances(
    folder: Path, name: str, pieces: Pieces, chosen: Sequence[tuple[str, list[str]]]
) -> list[dict[str, Any]]:
    """Write wavs/NAME/NNNNN.wav of each sequence; their rows."""
    (folder / "wavs" / name).mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (speaker, words) in enumerate(chosen):
        path = f"wavs/{name}/{number:05d}.wav"
        audio = pieces.join(speaker, words)
        soundfile.write(folder / path, audio, SAMPLE_RATE_HZ, subtype="PCM_16")
        rows.append(
            {
                "sample_id": f"{name}-{number:05d}",
                "source_id": f"{name}-{number:05d}",
                "wav_path": path,
                "transcript": " ".join(words),
                "speaker_id": speaker,
                "dataset_source": name,
                "words": len(words),
                "duration": round(len(audio) / SAMPLE_RATE_HZ, 6),
            }
        )
    return rows


@command
def main() -> int:
    """Read the recordings, join them, write the three lists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", required=True, type=Path, help="recordings: wav_path, transcript, speaker_id")
    parser.add_argument("--output-dir", required=True, type=Path, help="made if it is not there")
    parser.add_argument("--utterances", type=int, default=7000, help="to train on (7000)")
    parser.add_argument("--exercises", type=int, default=16000, help="in one take, a fifth of them at speed 1 (16000)")
    parser.add_argument("--evaluation", type=int, default=300, help="to say, unseen in training (300)")
    parser.add_argument("--seed", type=int, default=0, help="(0)")
    args = parser.parse_args()
    for name in ("utterances", "exercises", "evaluation"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} is {getattr(args, name)}; needed: 1 or more")
    recordings, clips, _ = read_recordings(args.samples, SAMPLE_RATE_HZ)
    generator = random.Random(args.seed)
    by_part: dict[bool, dict[tuple[str, str], list[np.ndarray]]] = {True: defaultdict(list), False: defaultdict(list)}
    for recording, clip in zip(recordings, clips, strict=True):
        by_part[recording.held_out][recording.speaker, recording.word].append(clip)
    training, held_out = (Pieces(by_part[part], generator) for part in (False, True))
    for speaker in sorted(training.words):
        if len(held_out.words.get(speaker, ())) < 2:
            raise InputError(
                f"{args.samples}: fewer than two words of speaker {speaker!r} are held out to show and to judge the "
                "voice; give more recordings of them (a tenth is held out)"
            )
    prepare_output_directory(args.output_dir)
    vocabulary = min(len(words) for words in held_out.words.values())
    # Where there are few words, at least half of their sequences are left to train on.
    wanted = min(args.evaluation, sum(vocabulary**count for count in EVALUATION_WORDS) // 2)
    spoken: list[tuple[str, list[str]]] = []
    unseen: set[tuple[str, ...]] = set()
    for speaker, words in sequences(held_out, EVALUATION_WORDS, generator):
        if tuple(words) not in unseen:
            unseen.add(tuple(words))
            spoken.append((speaker, words))
        if len(spoken) == wanted:
            break
    endless, easy = (
        (pair for pair in sequences(training, lengths, generator) if tuple(pair[1]) not in unseen)
        for lengths in (TRAINING_WORDS, EXERCISE_WORDS)
    )
    shown = sequences(held_out, REFERENCE_WORDS, generator)
    one_take = training.one_take()
    slow = -(-args.exercises // 5)

    def take(of: Iterator[tuple[str, list[str]]], count: int) -> list[tuple[str, list[str]]]:
        return list(itertools.islice(of, count))

    # samples.jsonl comes last: with it the folder is whole.
    for name, parts in {
        "evaluation": [("evaluation", held_out, spoken)],
        "references": [("references", held_out, take(shown, REFERENCES_PER_SPEAKER * len(held_out.words)))],
        "exercises": [
            ("fast", one_take.fast(), take(easy, args.exercises - slow)),
            ("one-take", one_take, take(easy, slow)),
        ],
        "samples": [("samples", training, take(endless, args.utterances))],
    }.items():
        rows = [
            row for part, pieces, chosen in parts for row in write_utterances(args.output_dir, part, pieces, chosen)
        ]
        write_jsonl(args.output_dir / f"{name}.jsonl", rows)
        print(f"{args.output_dir / name}.jsonl: {len(rows):,} utterances, {sum(r['duration'] for r in rows):,.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
