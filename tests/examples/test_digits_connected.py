"""Claims about joined utterances and about how errors in them are counted."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "examples" / "digits"))

import classifier
import join
import score_connected

from megatron_speech.codecs.audio import read_audio
from megatron_speech.evaluation.scorers import PocketSphinx

RATE = 8000
TONES_HZ = {"low": 300.0, "middle": 700.0, "high": 1500.0}


def tone(word: str, seconds: float) -> np.ndarray:
    return np.sin(2 * np.pi * TONES_HZ[word] * np.arange(round(seconds * RATE)) / RATE).astype(np.float32)


class ToneJudge:
    """Hears which of three tones a clip is; the voice is its level."""

    words, speakers, sample_rate_hz = list(TONES_HZ), ["loud", "soft"], RATE

    def log_probabilities(self, clips: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        heard, voices = torch.full((len(clips), 3), -9.0), torch.full((len(clips), 2), -9.0)
        for row, clip in enumerate(clips):
            peak = np.abs(np.fft.rfft(clip)).argmax() * RATE / len(clip)
            heard[row, int(np.argmin([abs(peak - hz) for hz in TONES_HZ.values()]))] = 0.0
            voices[row, int(np.abs(clip).max() < 0.5)] = 0.0
        return heard, voices


def utterance(words: list[str], pause: float = 0.2) -> np.ndarray:
    silence = np.zeros(round(pause * RATE), dtype=np.float32)
    return np.concatenate([part for word in words for part in (tone(word, 0.3), silence)])


def test_each_error_counts_once_and_no_other() -> None:
    wanted = ["low", "high", "middle", "middle"]
    text = " ".join(wanted)
    said = {
        0.0: wanted,
        0.25: ["low", "high", "low", "middle"],  # one word is another
        0.5: ["low", "high"],  # two are missing
        0.75: [*wanted, "low", "low", "low"],  # three too many
        1.0: [],
    }
    for errors, words in said.items():
        audio = utterance(words) if words else np.zeros(4000, dtype=np.float32)
        heard, _ = score_connected.listen(ToneJudge(), [audio])  # type: ignore[arg-type]
        assert heard == [" ".join(words)]
        found = score_connected.rates([text], heard)
        assert found["word_error_rate"] == pytest.approx(errors) and found["exact"] == float(errors == 0)


def test_the_voice_is_what_most_stretches_say() -> None:
    audio = utterance(["low"] * 5)
    audio[: round(0.4 * RATE)] *= 0.3
    _, voices = score_connected.listen(ToneJudge(), [audio, audio * 0.3])  # type: ignore[arg-type]
    assert voices == ["loud", "soft"]


def test_a_stop_within_a_word_parts_nothing_and_a_click_is_no_word() -> None:
    stop = np.zeros(round(0.07 * RATE), dtype=np.float32)
    word = np.concatenate([tone("low", 0.15), stop, tone("low", 0.1)])
    silence, click = np.zeros(2000, dtype=np.float32), tone("high", 0.02)
    found = score_connected.stretches(np.concatenate([silence, word, silence, click, silence, word]), RATE)
    assert len(found) == 2
    assert all(len(clip) == pytest.approx(len(word), abs=0.08 * RATE) for clip in found)
    assert score_connected.stretches(np.zeros(8000, dtype=np.float32), RATE) == []
    assert score_connected.stretches(np.zeros(3, dtype=np.float32), RATE) == []


def test_pieces_are_used_evenly_and_keep_their_order_and_pauses() -> None:
    clips = {("a", word): [tone(word, 0.2 + 0.01 * take) for take in range(4)] for word in TONES_HZ}
    pieces = join.Pieces(clips, random.Random(0))
    drawn = Counter(len(pieces.draw("a", "low")) for _ in range(40))
    assert set(drawn.values()) == {10}
    audio = pieces.join("a", ["low", "high", "high", "middle"]).astype(np.float32) / 32768
    heard, _ = score_connected.listen(ToneJudge(), [audio])  # type: ignore[arg-type]
    assert heard == ["low high high middle"]
    quiet = np.flatnonzero(np.diff(np.flatnonzero(np.abs(audio) > 1e-3)) > 0.1 * RATE)
    assert len(quiet) == 3
    assert float(np.abs(audio).max()) == pytest.approx(join.PEAK, abs=0.01)


def test_an_exercise_says_each_word_in_one_take_at_two_speeds() -> None:
    clips = {("a", word): [tone(word, 0.16 + 0.08 * take) for take in range(5)] for word in TONES_HZ}
    one = join.Pieces(clips, random.Random(0)).one_take()
    fast = one.fast()
    for word in TONES_HZ:
        assert {len(one.draw("a", word)) for _ in range(10)} == {round(0.32 * RATE)}
        assert {len(fast.draw("a", word)) for _ in range(10)} == {round(0.08 * RATE)}
    # Every word begins with a frame of the codec: its codes are the same wherever it stands.
    starts = [start for start in range(0, 16000, join.FRAME_SAMPLES)]
    audio = one.join("a", ["low", "high", "low"]).astype(np.float64)
    loud = np.flatnonzero(np.abs(audio) > 1000)
    begins = loud[np.r_[0, np.flatnonzero(np.diff(loud) > 800) + 1]]
    assert len(begins) == 3 and all(min(abs(begin - np.array(starts))) < 80 for begin in begins)


@pytest.fixture(scope="module")
def joined(fsdd: Path, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("joined")
    flags = ["--utterances", "400", "--exercises", "200", "--evaluation", "60"]
    script = repository / "examples/digits/join.py"
    subprocess.run([sys.executable, script, "--samples", fsdd, "--output-dir", folder, *flags], check=True)
    return folder


def rows_of(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_no_sequence_that_is_evaluated_is_trained_on_nor_any_recording_in_it(joined: Path, fsdd: Path) -> None:
    trained, evaluated, shown = (rows_of(joined, name) for name in ("samples", "evaluation", "references"))
    exercises = rows_of(joined, "exercises")
    assert (len(trained), len(evaluated), len(shown)) == (400, 60, 60)
    assert Counter(row["dataset_source"] for row in exercises) == {"fast": 160, "one-take": 40}
    texts = {row["transcript"] for row in evaluated}
    assert len(texts) == 60 and not texts & {row["transcript"] for row in trained + exercises}
    assert {len(row["transcript"].split()) for row in evaluated} == set(range(3, 8))
    assert {len(row["transcript"].split()) for row in trained} == set(range(1, 8))
    # Held-out recordings are found again in the evaluation, and none of them in the training set.
    recordings, clips, _ = classifier.read_recordings(fsdd, RATE)
    for speaker in ("theo", "lucas"):
        held = [
            normalised(clip)
            for recording, clip in zip(recordings, clips, strict=True)
            if recording.held_out and recording.speaker == speaker
        ]
        said = {
            name: [read_audio(joined / row["wav_path"], RATE) for row in rows if row["speaker_id"] == speaker]
            for name, rows in (("new", evaluated), ("known", trained[:120]))
        }
        inside = {name: sum(contains(audio, clip) for audio in of for clip in held) for name, of in said.items()}
        words = sum(len(row["transcript"].split()) for row in evaluated if row["speaker_id"] == speaker)
        assert inside["known"] == 0
        assert inside["new"] >= 0.9 * words  # a recording that comes twice in an utterance is counted once


def normalised(clip: np.ndarray) -> np.ndarray:
    clip = clip - clip.mean()
    return clip * (join.PEAK / np.abs(clip).max())


def contains(audio: np.ndarray, clip: np.ndarray) -> bool:
    """Whether what surrounds the peak of a clip lies in an utterance, sample by sample."""
    at = min(max(int(np.abs(clip).argmax()), 200), len(clip) - 200)
    loudest = clip[at - 200 : at + 200]
    if len(audio) < 400:
        return False
    windows = np.lib.stride_tricks.sliding_window_view(audio, len(loudest))[:, ::25]
    return bool((np.abs(windows - loudest[::25]).max(1) < 2e-3).any())


def test_pocketsphinx_hears_phrases_one_after_another(fsdd: Path) -> None:
    pytest.importorskip("pocketsphinx", reason="pocketsphinx is not installed")
    rows = [json.loads(line) for line in fsdd.read_text().splitlines()]
    own = {row["transcript"]: row for row in rows if row["speaker_id"] == "jackson"}
    recogniser = PocketSphinx(sorted(own), repeated=True)
    silence = np.zeros(2000, dtype=np.float32)
    audio = [
        part
        for word in ("three", "seven", "zero")
        for part in (normalised(read_audio(fsdd.parent / own[word]["wav_path"], RATE)), silence)
    ]
    heard = recogniser.transcribe(np.concatenate(audio), RATE).split()
    assert 2 <= len(heard) <= 4 and set(heard) <= set(own)
    assert len(set(heard) & {"three", "seven", "zero"}) >= 2


def test_too_few_held_out_words_are_refused(fsdd: Path, repository: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in fsdd.read_text().splitlines()][:3]
    samples = tmp_path / "samples.jsonl"
    samples.write_text("".join(json.dumps({**r, "wav_path": str(fsdd.parent / r["wav_path"])}) + "\n" for r in rows))
    script = repository / "examples/digits/join.py"
    done = subprocess.run(
        [sys.executable, script, "--samples", samples, "--output-dir", tmp_path / "out"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "fewer than two words of speaker" in done.stderr
    assert not (tmp_path / "out").exists()
