"""Claims about the quickstart's synthetic corpus."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

pytest.importorskip("espeakng_loader", reason="the corpus maker needs the extra quickstart")


def run(repository: Path, cwd: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    script = repository / "examples" / "quickstart" / "make_corpus.py"
    return subprocess.run([sys.executable, str(script), *flags], cwd=cwd, capture_output=True, text=True, check=False)


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def corpus(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six languages, two speakers each, five utterances each."""
    base = tmp_path_factory.mktemp("corpus")
    done = run(repository, base, "--output-dir", "one", "--utterances", "60", "--speakers", "2", "--workers", "2")
    assert done.returncode == 0, done.stderr
    return base / "one"


@pytest.mark.slow
def test_six_languages_and_their_speakers_are_there(corpus: Path) -> None:
    rows = read_rows(corpus / "samples.jsonl")
    assert len(rows) == 60
    assert Counter(row["language"] for row in rows) == dict.fromkeys(("en", "hi", "am", "ta", "sw", "bn"), 10)
    assert len({row["speaker_id"] for row in rows}) == 12
    assert len({row["sample_id"] for row in rows}) == 60
    for row in rows:
        assert row["dataset_source"] == "espeak-ng" and row["source_id"] == row["sample_id"]
        assert 1 <= len(row["transcript"].split()) <= 3
        if row["language"] in ("en", "sw"):
            assert row["transcript"].isascii() and "transcript_romanized" not in row
        else:
            assert not row["transcript"].isascii() and row["transcript_romanized"].isascii()


@pytest.mark.slow
def test_every_recording_is_audible_and_as_long_as_it_says(corpus: Path) -> None:
    for row in read_rows(corpus / "samples.jsonl"):
        audio, rate = soundfile.read(corpus / row["wav_path"], dtype="int16")
        assert rate == row["sample_rate"] == 22050 and audio.ndim == 1
        assert len(audio) / rate == pytest.approx(row["duration"], abs=1e-6)
        assert 0.1 <= row["duration"] <= 5.0
        assert np.abs(audio.astype(int)).max() > 1000
        assert np.sqrt(np.mean(audio.astype(float) ** 2)) > 300


@pytest.mark.slow
def test_speakers_of_a_language_have_pitches_of_their_own(corpus: Path) -> None:
    pitches: dict[str, list[float]] = {}
    for row in read_rows(corpus / "samples.jsonl"):
        audio, rate = soundfile.read(corpus / row["wav_path"])
        pitches.setdefault(row["speaker_id"], []).append(_fundamental_hz(audio, rate))
    for language in ("en", "hi", "am", "ta", "sw", "bn"):
        ada, ben = (np.median(pitches[f"{language}-{name}"]) for name in ("ada", "ben"))
        assert ada > 1.3 * ben, language


def _fundamental_hz(audio: np.ndarray, rate: int) -> float:
    """Peak of the autocorrelation between 60 and 280 Hz of what lies below 900 Hz in the loudest 100 ms."""
    window = rate // 10
    energy = np.convolve(audio**2, np.ones(window), mode="valid")
    start = int(energy[: len(audio) - window].argmax())
    power = np.abs(np.fft.rfft(audio[start : start + window] * np.hanning(window), 2 * window)) ** 2
    power[900 * 2 * window // rate :] = 0
    shortest = rate // 280
    return rate / (shortest + int(np.fft.irfft(power)[shortest : rate // 60].argmax()))


@pytest.mark.slow
def test_text_and_vocabulary_are_of_the_same_words(corpus: Path) -> None:
    vocabulary = json.loads((corpus / "vocabulary.json").read_text(encoding="utf-8"))
    text = read_rows(corpus / "text.jsonl")
    assert len(text) == 2000 and set(text[0]) == {"text", "language", "dataset_source"}
    assert {row["language"] for row in text} == set(vocabulary) == {"en", "hi", "am", "ta", "sw", "bn"}
    for row in text:
        known = {*vocabulary[row["language"]]["numbers"], *vocabulary[row["language"]]["phrases"]}
        assert set(row["text"].split(", ")) <= known
    for row in read_rows(corpus / "samples.jsonl"):
        known = {*vocabulary[row["language"]]["numbers"], *vocabulary[row["language"]]["phrases"]}
        assert row["transcript"] in known or set(row["transcript"].split()) <= known


@pytest.mark.slow
def test_the_same_arguments_give_the_same_bytes_whatever_the_workers_and_was_there_before(
    corpus: Path, repository: Path
) -> None:
    other = ["--output-dir", "two", "--utterances", "4", "--languages", "en", "--speakers", "1", "--seed", "1"]
    assert run(repository, corpus.parent, *other).returncode == 0
    before, expected = contents(corpus.parent / "two"), contents(corpus)
    assert len(before) == 4 + 3
    assert all(data != expected.get(name) for name, data in before.items())
    same = ["--output-dir", "two", "--utterances", "60", "--speakers", "2", "--workers", "1"]
    assert run(repository, corpus.parent, *same).returncode == 0
    assert contents(corpus.parent / "two") == expected


@pytest.mark.slow
def test_every_voice_is_the_same_from_run_to_run(repository: Path, tmp_path: Path) -> None:
    """Some of espeak-ng's variants breathe differently each time; none of those is among the speakers."""
    for output in ("one", "two"):
        flags = ["--output-dir", output, "--utterances", "12", "--languages", "en", "--speakers", "6"]
        assert run(repository, tmp_path, *flags).returncode == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.slow
def test_hours_are_filled_and_barely_exceeded(repository: Path, tmp_path: Path) -> None:
    flags = ["--output-dir", "out", "--hours", "0.005", "--languages", "en,hi", "--speakers", "1"]
    assert run(repository, tmp_path, *flags).returncode == 0
    seconds = sum(row["duration"] for row in read_rows(tmp_path / "out" / "samples.jsonl"))
    assert 18 <= seconds < 18 + 2 * 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--languages", "en,xx"], "names 'xx'"),
        (["--speakers", "7"], "--speakers is 7"),
        (["--utterances", "0"], "--utterances is 0"),
        (["--hours", "-1"], "--hours is -1"),
        (["--output-dir", "/proc/out"], "cannot write to /proc/out"),
    ],
)
def test_bad_flags_exit_2_with_one_sentence(repository: Path, tmp_path: Path, flags: list[str], message: str) -> None:
    done = run(repository, tmp_path, "--output-dir", "out", *flags)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_very_long_path_to_the_voices_is_no_obstacle(repository: Path, tmp_path: Path) -> None:
    """libespeak-ng has room for 160 characters; a virtual environment may lie deeper than that."""
    import espeakng_loader

    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    (deep / "espeak-ng-data").symlink_to(espeakng_loader.get_data_path())
    script = f"""
import sys, espeakng_loader
sys.path.insert(0, {str(repository / "examples" / "quickstart")!r})
import make_corpus
espeakng_loader.get_data_path = lambda: {str(deep / "espeak-ng-data")!r}
with make_corpus.voice_data() as data:
    assert len(data) < 120
    print(len(make_corpus.Espeak("en-us+m3", data).say("one", pitch=50, rate=150)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and int(done.stdout) > 2000, done.stderr


def test_the_package_never_imports_espeak(repository: Path) -> None:
    sources = [*(repository / "megatron_speech").rglob("*.py"), *(repository / "preprocess").rglob("*.py")]
    assert sources
    assert not [path for path in sources if "espeakng_loader" in path.read_text(encoding="utf-8")]
