"""Claims about reading recordings."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import soundfile

from megatron_speech.codecs.audio import AudioError, read_audio, write_wav


def tone(rate: int, seconds: float = 1.0) -> np.ndarray:
    """A 440 Hz tone of amplitude 0.5, float32 [n]."""
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("rate", [8000, 44100])
@pytest.mark.parametrize("channels", [1, 2])
def test_any_format_rate_and_channel_count_gives_the_same_tone(
    tmp_path: Path, suffix: str, rate: int, channels: int
) -> None:
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, np.stack([tone(rate)] * channels, axis=1), rate)
    audio = read_audio(path, 8000)
    assert audio.dtype == np.float32 and audio.flags.c_contiguous
    assert abs(len(audio) - 8000) <= 8
    middle = slice(1000, 7000)
    expected = tone(8000)
    # Lossy codecs may shift the phase a little: compare what a Fourier transform says of frequency and level.
    spectrum = np.abs(np.fft.rfft(audio[middle] * np.hanning(6000)))
    assert spectrum.argmax() == np.abs(np.fft.rfft(expected[middle] * np.hanning(6000))).argmax()
    assert np.sqrt(np.mean(audio[middle] ** 2)) == pytest.approx(0.5 / np.sqrt(2), rel=0.05)


def test_channels_are_averaged(tmp_path: Path) -> None:
    left, right = tone(8000), np.zeros(8000, np.float32)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), 8000, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav", 8000), left / 2, atol=1e-7)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "FLOAT", "DOUBLE"])
def test_every_sample_type_is_scaled_to_one(tmp_path: Path, subtype: str) -> None:
    soundfile.write(tmp_path / "a.wav", tone(8000), 8000, subtype=subtype)
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav", 8000), tone(8000), atol=0.01)


def test_a_segment_is_the_same_samples_as_in_the_whole(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 24000).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", noise, 8000, subtype="FLOAT")
    path = tmp_path / "a.wav"
    np.testing.assert_array_equal(read_audio(path, 8000, start_time=1.0, end_time=1.5), noise[8000:12000])
    np.testing.assert_array_equal(read_audio(path, 8000, start_time=2.5), noise[20000:])
    np.testing.assert_array_equal(read_audio(path, 8000, end_time=0.25), noise[:2000])
    np.testing.assert_array_equal(read_audio(path, 8000, start_time=2.0, end_time=3.05), noise[16000:])


def test_a_file_that_is_the_segment_already_is_read_whole(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "cut.wav", tone(8000), 8000)
    assert len(read_audio(tmp_path / "cut.wav", 8000, start_time=125.0, end_time=126.02)) == 8000


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [
        (5.0, None, "outside"),
        (0.5, 2.0, "outside"),
        (None, 9.0, "outside"),
        (0.8, 0.2, "not after"),
        (-1.0, 0.5, "start_time -1.0"),
        (0.0, float("nan"), "end_time nan"),
    ],
)
def test_a_segment_outside_the_file_is_refused_not_cut(
    tmp_path: Path, start: float | None, end: float | None, message: str
) -> None:
    soundfile.write(tmp_path / "a.wav", tone(8000), 8000)
    with pytest.raises(AudioError, match=message) as caught:
        read_audio(tmp_path / "a.wav", 8000, start_time=start, end_time=end)
    assert caught.value.reason == "bad_segment"


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3"])
def test_a_recording_that_breaks_off_is_refused_not_shortened(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.1, 0.1, 3 * 44100), 44100)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(AudioError) as caught:
        read_audio(path, 8000)
    assert caught.value.reason == "unreadable"


def test_a_wav_written_into_a_pipe_is_read_whole(tmp_path: Path) -> None:
    """Its header holds the largest size there is in place of its own."""
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(8000), 8000)
    data = path.read_bytes()
    path.write_bytes(data[:4] + b"\xff" * 4 + data[8:40] + b"\xff" * 4 + data[44:])
    assert len(read_audio(path, 8000)) == 8000


def test_every_unusable_recording_has_its_reason(tmp_path: Path) -> None:
    (tmp_path / "nothing.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("this is not audio")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, np.float32), 8000)
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan] * 500, np.float32), 8000, subtype="FLOAT")
    expected = {
        "absent.wav": "missing_file",
        ".": "missing_file",
        "a" * 300 + ".wav": "unreadable",
        "nothing.wav": "empty_audio",
        "text.wav": "unreadable",
        "empty.wav": "empty_audio",
        "nan.wav": "non_finite",
    }
    for name, reason in expected.items():
        with pytest.raises(AudioError) as caught:
            read_audio(tmp_path / name, 8000)
        assert caught.value.reason == reason, name
        assert pickle.loads(pickle.dumps(caught.value)).reason == reason


def test_a_written_wav_reads_back_and_is_clipped(tmp_path: Path) -> None:
    audio = np.array([0.0, 0.5, -0.5, 2.0, -2.0], np.float32)
    write_wav(tmp_path / "a.wav", audio, 8000)
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav", 8000), np.clip(audio, -1, 1), atol=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]
