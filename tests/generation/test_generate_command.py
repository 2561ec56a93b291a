"""`megatron-speech generate`: what it writes, and what it refuses before it writes anything."""

from __future__ import annotations

import argparse
import dataclasses
import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from megatron_speech.cli import main
from megatron_speech.codecs.audio import write_wav
from megatron_speech.codecs.codec2 import Codec2
from megatron_speech.commands.generate import add_arguments
from megatron_speech.errors import InputError
from megatron_speech.generation.engine import DEFAULT_BATCH_SIZE, SpeechGenerator
from megatron_speech.generation.sampling import SamplingConfig


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    path = tmp_path / "voice.wav"
    time = np.arange(8000) / 16_000
    write_wav(path, 0.3 * np.sin(2 * np.pi * 220 * time).astype(np.float32), 16_000)
    return path


def prompts(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_text_becomes_a_wav_and_the_seed_decides_which(checkpoint: Path, tmp_path: Path) -> None:
    codes = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        out = tmp_path / f"{name}.wav"
        words = ["--checkpoint", checkpoint, "--text", "hello", "--seed", seed, "--max-seconds", 0.4, "--output", out]
        assert main(["generate", *map(str, words)]) == 0
        with wave.open(str(out)) as sound:
            assert (sound.getframerate(), sound.getnchannels(), sound.getsampwidth()) == (8000, 1, 2)
            codes.append(sound.getnframes())
            assert 0 < sound.getnframes() <= 3200
    assert codes[0] == codes[1]


def test_the_ending_of_the_output_decides_its_format(checkpoint: Path, tmp_path: Path) -> None:
    for ending, format_ in ((".mp3", "MP3"), (".flac", "FLAC"), (".opus", "OGG")):
        out = tmp_path / f"a{ending}"
        words = ["--checkpoint", checkpoint, "--text", "hello", "--seed", 1, "--max-seconds", 0.4, "--output", out]
        assert main(["generate", *map(str, words)]) == 0
        info = soundfile.info(out)
        assert (info.format, info.samplerate) == (format_, 8000)


@pytest.mark.parametrize(("name", "found"), [("a.m4a", "ends in .m4a"), ("a.txt", "ends in .txt"), ("a", "no ending")])
def test_an_output_that_cannot_be_written_is_refused_before_a_model_is_loaded(
    tmp_path: Path, name: str, found: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(SpeechGenerator, "from_checkpoint", classmethod(lambda cls, *_, **__: pytest.fail("loaded")))
    words = ["--checkpoint", str(tmp_path), "--text", "hello", "--output", str(tmp_path / name)]
    assert main(["generate", *words]) == 2
    assert f"{found}" in (error := capsys.readouterr().err) and "use .wav, .flac, .mp3" in error
    assert not (tmp_path / name).exists()


def test_what_are_no_codes_of_the_codec_is_refused_where_it_enters(
    codec2_generator: SpeechGenerator, recording: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert codec2_generator.encode_audio(recording).shape[1] == 4
    with pytest.raises(InputError, match="code -1 at frame 0 is outside codebook 'vq1'"):
        codec2_generator.decode_audio(np.full((3, 4), -1))
    monkeypatch.setattr(Codec2, "encode", lambda self, audio, *, gain=1.0: np.zeros((3, 5), np.int32))
    with pytest.raises(InputError, match=r"codec 'codec2' are an array of shape \[3, 5\]"):
        codec2_generator.encode_audio(recording)


def test_many_prompts_become_wavs_codes_and_a_table(checkpoint: Path, recording: Path, tmp_path: Path) -> None:
    rows = [
        {"text": "one", "speaker_id": "anna", "language": "en"},
        {"text": "two", "id": "second", "seed": 9, "reference_audio": "voice.wav", "reference_text": "la"},
    ]
    out = tmp_path / "out"
    words = ["--checkpoint", checkpoint, "--input", prompts(tmp_path / "p.jsonl", *rows), "--output-dir", out]
    assert main(["generate", *map(str, words), "--seed", "5", "--max-seconds", "0.4"]) == 0
    table = [json.loads(line) for line in (out / "generated.jsonl").read_text().splitlines()]
    codes = np.load(out / "codes.npy")
    assert [(row["id"], row["text"], row["seed"]) for row in table] == [("00000", "one", 5), ("second", "two", 9)]
    assert table[0]["speaker_id"] == "anna"
    assert table[1]["reference_audio"] == str(recording)
    assert table[1]["prompt_tokens"] > table[0]["prompt_tokens"]
    for row in table:
        assert codes[row["code_offset"] :][: row["code_len"]].shape == (row["code_len"], 4)
        with wave.open(str(out / row["wav_path"])) as sound:
            assert sound.getnframes() == row["code_len"] * 320
            assert row["duration"] == row["code_len"] / 25
        assert row["ended"] == (row["stop_reason"] == "end")
        assert 0 <= row["invalid_token_rate"] <= 1
    # The codes become the same audio without the model.
    listing = ["--codec", "codec2", "--input", str(out / "generated.jsonl"), "--output-dir", str(out / "decoded")]
    assert main(["decode", *listing]) == 0
    decoded = [json.loads(line) for line in (out / "decoded" / "decoded.jsonl").read_text().splitlines()]
    assert [(row["sample_id"], row["duration"]) for row in decoded] == [(row["id"], row["duration"]) for row in table]
    arguments = ["--codec", "codec2", "--input", str(out / "codes.npy"), "--output", str(out / "all.flac")]
    assert main(["decode", *arguments]) == 0
    assert soundfile.info(out / "all.flac").frames == len(codes) * 320


def test_the_flags_default_to_the_library_s_settings() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(["--checkpoint", "c", "--text", "t"])
    for field in dataclasses.fields(SamplingConfig):
        assert getattr(args, field.name) == field.default
    assert args.batch_size == DEFAULT_BATCH_SIZE


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", " "], "text is empty"),
        (["--text", "a", "--reference-text", "b"], "reference_text was given without reference_audio"),
        (["--text", "a", "--reference-audio", "voice.wav"], "reference_audio was given without reference_text"),
        (["--text", "a", "--reference-audio", "none.wav", "--reference-text", "b"], "none.wav does not exist"),
        (["--text", "a", "--reference-audio", "noise.wav", "--reference-text", "b"], "cannot be read as audio"),
        (["--text", "a", "--temperature", "-1"], "temperature is -1"),
        (["--text", "a", "--top-p", "0"], "top_p is 0"),
        (["--text", "a", "--output-dir", "d"], "--output-dir does not go with --text"),
        (["--text", "a", "--checkpoint", "nowhere"], "checkpoint nowhere does not exist"),
        (["--text", "a", "--batch-size", "0"], "--batch-size is 0"),
        (["--text", "a", "--output", "voice.wav/out.wav"], "cannot write to"),
    ],
)
def test_a_text_that_cannot_be_spoken_is_refused_in_a_sentence(
    checkpoint: Path, recording: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any, words: Any, message: str
) -> None:
    monkeypatch.chdir(recording.parent)
    Path("noise.wav").write_bytes(b"RIFF not really")
    arguments = ["generate", "--checkpoint", str(checkpoint), "--output", "out.wav", *words]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not Path("out.wav").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has no line"),
        (["{"], "line 1 is not JSON"),
        (["[1]"], "line 1 is a JSON list"),
        ([{"id": "a"}], "line 1: field text is missing"),
        ([{"text": "a", "seed": "x"}], "line 1: seed is 'x', needed: a whole number"),
        ([{"text": "a", "id": "../a"}], "line 1: id '../a' cannot name a file"),
        ([{"text": "a", "id": "x"}, {"text": "b", "id": "x"}], "line 2: id 'x' is also that of line 1"),
        ([{"text": "a"}, {"text": "b", "reference_audio": "gone.wav", "reference_text": "c"}], "line 2: "),
    ],
)
def test_a_bad_prompts_file_is_refused_by_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: Any, message: str
) -> None:
    path, out = prompts(tmp_path / "p.jsonl", *rows), tmp_path / "out"
    words = ["--checkpoint", str(checkpoint), "--input", str(path), "--output-dir", str(out)]
    assert main(["generate", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {'prompts file ' if not rows else ''}{path}") and message in error
    assert not (out / "generated.jsonl").exists()
