"""Claims about reading recordings."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import soundfile

from megatron_speech.codecs.audio import AudioError, read_audio, write_audio, write_wav
from megatron_speech.errors import InputError


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


def test_one_channel_is_read_where_one_is_named(tmp_path: Path) -> None:
    left, right = tone(8000), np.random.default_rng(0).uniform(-0.5, 0.5, 8000).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), 8000, subtype="FLOAT")
    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav", 8000, channel=0), left)
    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav", 8000, channel=1, start_time=0.5), right[4000:])
    soundfile.write(tmp_path / "one.wav", left, 8000, subtype="FLOAT")
    np.testing.assert_array_equal(read_audio(tmp_path / "one.wav", 8000, channel=0), left)
    for name, needed in (("a.wav", "2 channels, 0 to 1"), ("one.wav", "one channel, 0")):
        with pytest.raises(AudioError, match=needed) as caught:
            read_audio(tmp_path / name, 8000, channel=2)
        assert caught.value.reason == "bad_channel"


@pytest.mark.parametrize("level", [-1.0, -0.9])
@pytest.mark.parametrize("offset", [0.0, 0.25])
def test_channels_that_cancel_each_other_out_are_refused_and_one_of_them_is_read(
    tmp_path: Path, level: float, offset: float
) -> None:
    left = tone(8000)
    soundfile.write(tmp_path / "a.wav", np.stack([left, level * left], axis=1) + offset, 8000, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"antiphase.*`channel`") as caught:
        read_audio(tmp_path / "a.wav", 8000)
    assert caught.value.reason == "antiphase"
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav", 8000, channel=0), left + offset, atol=1e-6)


def test_channels_that_only_differ_are_averaged(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    left, right = draw.uniform(-0.5, 0.5, (2, 8000)).astype(np.float32)
    for other in (right, np.roll(left, 40), -0.5 * left, np.zeros_like(left)):
        soundfile.write(tmp_path / "a.wav", np.stack([left, other], axis=1), 8000, subtype="FLOAT")
        np.testing.assert_allclose(read_audio(tmp_path / "a.wav", 8000), (left + other) / 2, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.25])
@pytest.mark.parametrize("channels", [1, 2])
def test_digital_silence_is_refused(tmp_path: Path, value: float, channels: int) -> None:
    audio = np.concatenate([tone(8000), np.full(8000, value, np.float32)])
    soundfile.write(tmp_path / "a.wav", np.stack([audio] * channels, axis=1), 8000)
    assert len(read_audio(tmp_path / "a.wav", 8000)) == 16000
    with pytest.raises(AudioError, match=r"digital silence.* 1\.000 to 2\.000 s") as caught:
        read_audio(tmp_path / "a.wav", 8000, start_time=1.0)
    assert caught.value.reason == "silence"
    assert len(read_audio(tmp_path / "a.wav", 8000, start_time=1.0, allow_silence=True)) == 8000
    # The softest noise of 16-bit audio is none.
    soundfile.write(tmp_path / "soft.wav", np.array([0, 1] * 4000, np.int16), 8000)
    assert len(read_audio(tmp_path / "soft.wav", 8000)) == 8000


@pytest.mark.parametrize(
    ("ending", "found"),
    [
        (".wav", ("WAV", "PCM_16")),
        (".flac", ("FLAC", "PCM_16")),
        (".mp3", ("MP3", "MPEG_LAYER_III")),
        (".ogg", ("OGG", "VORBIS")),
        (".opus", ("OGG", "OPUS")),
        (".OPUS", ("OGG", "OPUS")),
        (".aiff", ("AIFF", "PCM_16")),
    ],
)
@pytest.mark.parametrize("rate", [8000, 22050])
def test_the_ending_of_a_file_decides_what_is_written(
    tmp_path: Path, ending: str, found: tuple[str, str], rate: int
) -> None:
    write_audio(tmp_path / f"a{ending}", tone(rate), rate)
    info = soundfile.info(tmp_path / f"a{ending}")
    assert (info.format, info.subtype) == found
    audio = read_audio(tmp_path / f"a{ending}", rate)
    assert len(audio) == pytest.approx(rate, abs=2)
    middle = slice(rate // 4, rate // 4 + rate // 2)
    assert np.abs(np.fft.rfft(audio[middle])).argmax() == 220


@pytest.mark.parametrize(
    ("name", "message"), [("a.m4a", "ends in .m4a"), ("a.xyz", "ends in .xyz"), ("a", "no ending")]
)
def test_an_ending_that_cannot_be_written_is_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=f"{message}.*use .wav, .flac, .mp3"):
        write_audio(tmp_path / name, tone(8000), 8000)
    assert list(tmp_path.iterdir()) == []
