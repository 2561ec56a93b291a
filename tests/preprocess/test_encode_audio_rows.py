"""Claims about what a row says of its recording: the channel, and how long it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from megatron_speech.codecs.codec2 import Codec2
from megatron_speech.preprocess import encode_audio

RATE = 8000


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.3, 0.3, round(RATE * seconds)).astype(np.float32)


@pytest.fixture
def encode(tmp_path: Path) -> Callable[..., tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """Encode rows; (the rows written, the rows rejected)."""

    def run(*rows: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        source = tmp_path / "samples.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        arguments = ["--input", str(source), "--codec", "codec2", "--output-dir", str(tmp_path / "out")]
        assert encode_audio.main([*arguments, "--workers", "1", "--max-rejected", "1"]) == 0
        written, rejected = (
            [json.loads(line) for line in (tmp_path / "out" / name).read_text().splitlines()]
            for name in ("samples.jsonl", "rejected.jsonl")
        )
        return written, rejected

    return run


def codes_of(directory: Path, row: dict[str, Any]) -> np.ndarray:
    return np.load(directory / row["codes_path"])[row["code_offset"] : row["code_offset"] + row["code_len"]]


def test_a_row_names_one_channel_and_both_speakers_of_a_call_are_samples(
    tmp_path: Path, encode: Callable[..., Any]
) -> None:
    left, right = noise(1), noise(1, seed=1)
    soundfile.write(tmp_path / "call.wav", np.stack([left, right], axis=1), RATE, subtype="FLOAT")
    good = [{"wav_path": "call.wav"}, {"wav_path": "call.wav", "channel": 0}, {"wav_path": "call.wav", "channel": 1}]
    bad = [{"wav_path": "call.wav", "channel": value} for value in (2, -1, True, "left", [0, 1], 0.5, 1 << 20)]
    good.append({"wav_path": "call.wav", "channel": 1, "start_time": 0.5, "end_time": 0.9})
    written, rejected = encode(*good, *({**row, "sample_id": f"bad{i}"} for i, row in enumerate(bad)))
    assert [row["sample_id"] for row in written] == ["call.wav", "call.wav/0", "call.wav/1", "call.wav@0.5-0.9/1"]
    assert {row["source_id"] for row in written} == {"call.wav"}
    for row, audio in zip(written, [(left + right) / 2, left, right, right[4000:7200]], strict=True):
        np.testing.assert_array_equal(codes_of(tmp_path / "out", row), Codec2().encode(audio))
    assert [row["reason"] for row in rejected] == ["bad_channel", *["unsupported_field"] * 5, "bad_channel"]
    assert "2 channels, 0 to 1" in rejected[0]["detail"]


def test_a_duration_that_is_not_that_of_the_recording_is_rejected_with_both_numbers(
    tmp_path: Path, encode: Callable[..., Any]
) -> None:
    soundfile.write(tmp_path / "a.wav", noise(3), RATE)
    rows = [
        {"duration": 3.0},
        {"duration": 2.91},
        {"duration": 3},
        {"duration": 4},  # a whole number is a rounded one
        {"duration": None},
        {"duration": 1.5, "start_time": 1.0, "end_time": 2.5},
        {"duration": 3.0, "start_time": 1.0, "end_time": 2.5},  # of the whole file
        {"duration": 5.0},
        {"duration": 2.8},
        {"duration": 5},
        {"duration": 2.0, "start_time": 1.0, "end_time": 2.5},
        {"duration": "3.0"},
        {"duration": -1},
        {"duration": 10**400},
    ]
    written, rejected = encode(*({"wav_path": "a.wav", "sample_id": str(i), **row} for i, row in enumerate(rows)))
    assert [row["sample_id"] for row in written] == [str(i) for i in range(7)]
    assert {row["duration"] for row in written} == {3.0, 1.5}
    assert [row["reason"] for row in rejected] == ["duration_mismatch"] * 4 + ["bad_duration"] * 3
    assert "duration is 5 s, but 3.000 s were read from a.wav" in rejected[0]["detail"]
    assert "duration is 2 s, but 1.500 s were read of a file of 3.000 s" in rejected[3]["detail"]


def test_what_a_codec_pads_is_no_mismatch_and_what_a_cut_takes_is_one(
    tmp_path: Path, encode: Callable[..., Any]
) -> None:
    """An MP3 without a tag is longer than what was recorded, by up to 0.2 s at 8 kHz; cut at a frame it is an MP3."""
    from megatron_speech.codecs import mpeg

    soundfile.write(tmp_path / "a.mp3", noise(3), RATE, format="MP3", bitrate_mode="VARIABLE")
    data = (tmp_path / "a.mp3").read_bytes()
    frames = mpeg.split_parts(data, "a.mp3")[0].frames
    (tmp_path / "untagged.mp3").write_bytes(data[frames[0] :])
    (tmp_path / "cut.mp3").write_bytes(data[frames[0] : frames[len(frames) * 6 // 10]])
    names = ("a.mp3", "untagged.mp3", "cut.mp3")
    written, rejected = encode(*({"wav_path": name, "duration": 3.0} for name in names))
    assert [row["wav_path"] for row in written] == ["../a.mp3", "../untagged.mp3"]
    assert written[0]["duration"] == pytest.approx(3.0, abs=0.01) and 3.0 < written[1]["duration"] < 3.25
    assert [(row["reason"], row["row"]["wav_path"]) for row in rejected] == [("duration_mismatch", "cut.mp3")]


def test_silence_and_channels_in_antiphase_are_rejected_with_their_reason(
    tmp_path: Path, encode: Callable[..., Any]
) -> None:
    audio = noise(1)
    soundfile.write(tmp_path / "anti.wav", np.stack([audio, -audio], axis=1), RATE)
    soundfile.write(tmp_path / "silent.wav", np.zeros(RATE, np.float32), RATE)
    written, rejected = encode(
        {"wav_path": "anti.wav"}, {"wav_path": "silent.wav"}, {"wav_path": "anti.wav", "channel": 0}
    )
    assert [row["reason"] for row in rejected] == ["antiphase", "silence"]
    assert [row["sample_id"] for row in written] == ["anti.wav/0"]
