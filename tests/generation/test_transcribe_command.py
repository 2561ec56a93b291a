"""`megatron-speech transcribe`: what it writes, and what it refuses before a model is opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_speech.cli import main
from megatron_speech.codecs.audio import write_wav
from megatron_speech.commands.transcribe import comparable


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    time = np.arange(8000) / 16_000
    rows: list[dict[str, Any]] = []
    for number, pitch in enumerate((200, 300)):
        write_wav(tmp_path / f"{number}.wav", 0.3 * np.sin(2 * np.pi * pitch * time).astype(np.float32), 16_000)
        rows.append({"wav_path": f"{number}.wav", "transcript": "Hello, world!", "speaker_id": "s"})
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_recordings_become_lines_of_text(
    checkpoint: Path, samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "heard.jsonl"
    words = ["--checkpoint", checkpoint, "--input", samples, "--output", out, "--max-tokens", 5]
    assert main(["transcribe", *map(str, words)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["wav_path"], row["speaker_id"]) for row in rows] == [("0.wav", "s"), ("1.wav", "s")]
    assert all(isinstance(row["text"], str) and 1 <= row["generated_tokens"] <= 5 for row in rows)
    assert "2 texts of 1.0 s of speech" in (printed := capsys.readouterr().out)
    assert "against 2 transcripts: " in printed
    assert (
        main(["transcribe", "--checkpoint", str(checkpoint), "--audio", str(tmp_path / "0.wav"), "--max-tokens", "5"])
        == 0
    )
    assert json.loads(capsys.readouterr().out)["text"] == rows[0]["text"]


def test_what_cannot_be_read_is_named(checkpoint: Path, samples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for row, sentence in (
        ({"transcript": "a"}, "line 1: wav_path is None"),
        ({"wav_path": "none.wav"}, "samples.jsonl line 1: "),
        ({"wav_path": "0.wav", "transcript": 3}, "line 1: transcript is 3"),
    ):
        samples.write_text(json.dumps(row) + "\n")
        assert main(["transcribe", "--checkpoint", str(checkpoint), "--input", str(samples)]) == 2
        assert sentence in capsys.readouterr().err
    assert main(["transcribe", "--checkpoint", str(checkpoint), "--audio", "x.wav", "--max-tokens", "0"]) == 2


def test_error_rates_do_not_count_case_and_punctuation() -> None:
    assert comparable("  Hello,  WORLD! ") == "hello world"
    assert comparable("नमस्ते, दुनिया।") == "नमस्ते दुनिया"
    assert comparable("...") == ""
