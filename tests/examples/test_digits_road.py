"""The digits script on other words and other speakers than digits: its contract, on a short run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def samples(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("espeakng_loader", reason="the corpus is synthesised with espeak-ng")
    folder = tmp_path_factory.mktemp("corpus")
    flags = ["--utterances", "160", "--languages", "en", "--speakers", "2", "--max-words", "1"]
    script = repository / "examples/quickstart/make_corpus.py"
    subprocess.run([sys.executable, script, "--output-dir", folder, *flags], check=True, capture_output=True)
    return folder / "samples.jsonl"


@pytest.mark.xdist_group("quickstart")
def test_any_words_by_any_speakers_are_spoken_and_scored(repository: Path, samples: Path, tmp_path: Path) -> None:
    if not (repository / ".venv" / "bin" / "python").exists():
        pytest.skip("run.sh uses the checkout's .venv, and there is none: run `make venv` first")
    out = tmp_path / "out"
    short = ["stages.pt.tokens=20k", "stages.sft.tokens=30k"]
    done = subprocess.run(
        ["bash", repository / "examples/digits/run.sh", samples, out, *short], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    rows = [json.loads(line) for line in (out / "generated.jsonl").read_text().splitlines()]
    recordings = [json.loads(line) for line in samples.read_text().splitlines()]
    words = {row["transcript"] for row in recordings}
    assert {row["text"] for row in rows} == words
    assert {row["speaker_id"] for row in rows} == {row["speaker_id"] for row in recordings}
    assert len(rows) == min(300, len(words) * 2 * 5)
    assert len({(row["text"], row["speaker_id"], row["seed"]) for row in rows}) == len(rows)
    assert all((out / row["wav_path"]).is_file() for row in rows)
    # The reference of a prompt is a recording of the speaker that training never saw, of another word.
    prompts = [json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines()]
    assert all(prompt["reference_text"] != prompt["text"] for prompt in prompts)
    report = json.loads((out / "report.json").read_text())
    assert report["utterances"] == len(rows)
    assert report["word"]["chance"] == pytest.approx(1 / len(words))
    assert report["copies"]["exact"] == 0
    assert (out / "run/status.json").is_file() and list((out / "run/checkpoints").glob("step_*"))


@pytest.mark.xdist_group("quickstart")
def test_sequences_of_words_are_spoken_and_scored(repository: Path, samples: Path, tmp_path: Path) -> None:
    if not (repository / ".venv" / "bin" / "python").exists():
        pytest.skip("run.sh uses the checkout's .venv, and there is none: run `make venv` first")
    out = tmp_path / "out"
    flags = ["--utterances", "120", "--exercises", "100", "--evaluation", "6"]
    short = [f"stages.{stage}.tokens=8k" for stage in ("fast", "one_take", "pt", "sft")]
    done = subprocess.run(
        ["bash", repository / "examples/digits/run.sh", "--connected", samples, out, *flags, *short],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    rows = [json.loads(line) for line in (out / "generated.jsonl").read_text().splitlines()]
    spoken = [json.loads(line) for line in (out / "joined/evaluation.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == [row["transcript"] for row in spoken]
    report = json.loads((out / "report.json").read_text())
    assert report["utterances"] == 6 and report["texts_seen_in_training"] == 0
    # A model of a few thousand tokens says nothing; what it is measured with hears the recordings.
    assert report["classifier"]["original"]["word_error_rate"] < report["classifier"]["generated"]["word_error_rate"]
    assert report["speaker"]["chance"] == 0.5


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"wav_path": "a.wav", "transcript": "one"}', "record 1: field speaker_id"),
        ("not json", "line 1 is not JSON"),
        ("", "has no line"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_before_any_work(
    repository: Path, tmp_path: Path, line: str, words: str
) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(line)
    script = repository / "examples/digits/run.py"
    done = subprocess.run(
        [sys.executable, script, "--samples", path, "--output-dir", tmp_path / "out"], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and words in done.stderr
    assert not (tmp_path / "out").exists()
