"""Claims about recordings being read to their end, and about those that are not whole being refused."""

from __future__ import annotations

import io
import random
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from megatron_speech.codecs import media, mpeg
from megatron_speech.codecs.audio import AudioError, read_audio, read_recording

FILES = Path(__file__).parent / "files"
RATE = 16000


def noise(seconds: float, rate: int = RATE, seed: int = 0) -> np.ndarray:
    """White noise of amplitude 0.3, float32 [n]."""
    return np.random.default_rng(seed).uniform(-0.3, 0.3, round(rate * seconds)).astype(np.float32)


def bytes_of(samples: np.ndarray, rate: int = RATE, **options: object) -> bytes:
    """A file of `samples` in the format that soundfile's `options` name."""
    handle = io.BytesIO()
    soundfile.write(handle, samples, rate, **options)
    return handle.getvalue()


def read(data: bytes, name: str = "a", rate: int = RATE, **options: object) -> np.ndarray:
    return read_audio(name, rate, content=io.BytesIO(data), **options)


def refused(data: bytes, **options: object) -> AudioError:
    with pytest.raises(AudioError) as caught:
        read(data, **options)
    assert caught.value.reason == "unreadable"
    return caught.value


# ---------------------------------------------------------------------------------------------------- MPEG


def untagged(data: bytes) -> bytes:
    """An MP3 without its first frame, which holds the encoder's tag."""
    part = mpeg.split_parts(data, "a")[0]
    assert part.tag is not None
    return data[part.frames[0] :]


def vbr_mp3(samples: np.ndarray, rate: int = RATE) -> bytes:
    return bytes_of(
        samples, rate, format="MP3", subtype="MPEG_LAYER_III", bitrate_mode="VARIABLE", compression_level=0.5
    )


def test_an_mp3_of_lame_without_a_tag_is_decoded_to_its_end() -> None:
    """0.3 s of noise and 1.7 s of a tone: the bit rate of the first frame says that there are 0.5 s."""
    path = FILES / "lame_vbr_untagged.mp3"
    assert soundfile.info(path).duration == pytest.approx(0.5, abs=0.05), "libsndfile's estimate"
    audio = read_audio(path, RATE)
    # 2 s, and what the encoder put in front (1,105 samples less the decoder's delay) and behind.
    assert 2.0 * RATE <= len(audio) <= 2.0 * RATE + 1152 + 576
    tone = audio[RATE : RATE + 14000]
    spectrum = np.abs(np.fft.rfft(tone * np.hanning(len(tone))))
    assert spectrum.argmax() * RATE / len(tone) == pytest.approx(440, abs=2)


def test_frames_are_counted_whatever_the_tag_says() -> None:
    samples = np.concatenate([noise(0.3), np.zeros(RATE, np.float32), noise(0.3)])
    data = vbr_mp3(samples)
    assert len(read(data)) == len(samples)
    frames = mpeg.split_parts(data, "a")[0].frame_count
    assert len(read(untagged(data))) == frames * 576 - mpeg.DECODER_DELAY
    # The tag's own count, one too low.
    at = data.index(b"Xing" if b"Xing" in data else b"Info") + 8
    fewer = data[:at] + (frames - 1).to_bytes(4, "big") + data[at + 4 :]
    assert len(read(fewer)) == len(samples)


@pytest.mark.parametrize("flags", [15, 1, 3, 5, 7])
def test_a_tag_without_the_encoder_s_delays_is_read(flags: int) -> None:
    """Its fields follow each other as the flags say; what comes behind them is LAME's only where it has a name."""
    data = bytearray(vbr_mp3(noise(1)))
    at = data.index(b"Xing" if b"Xing" in data else b"Info")
    behind = at + 12 + sum(size for bit, size in ((2, 4), (4, 100), (8, 4)) if flags & bit)
    data[at + 7] = flags
    data[behind : behind + 24] = bytes(24)
    frames = mpeg.split_parts(bytes(data), "a")[0].frame_count
    whole = read(bytes(data))
    assert len(whole) == frames * 576 - mpeg.DECODER_DELAY
    np.testing.assert_array_equal(read(bytes(data), start_time=0.5), whole[RATE // 2 :])


def test_joined_mp3_files_are_read_one_after_the_other() -> None:
    first, second = vbr_mp3(noise(0.5)), vbr_mp3(noise(0.7, seed=1))
    id3v2, id3v1 = b"ID3\4\0\0\0\0\0\x0a" + bytes(10), b"TAG" + b"x" * 125
    joined = read(id3v2 + first + id3v1 + id3v2 + second + id3v1)
    np.testing.assert_array_equal(joined, np.concatenate([read(first), read(second)]))
    # A part without a tag behind one that has one, which says how long it is itself.
    np.testing.assert_array_equal(read(first + untagged(second)), np.concatenate([read(first), read(untagged(second))]))


def test_joined_mp3_files_of_other_rates_and_channels_are_read() -> None:
    stereo = np.stack([noise(0.5), noise(0.5, seed=1)], axis=1)
    parts = [vbr_mp3(noise(0.5)), vbr_mp3(stereo), vbr_mp3(noise(0.5, 44100), 44100)]
    joined = read(b"".join(parts))
    assert len(joined) == 3 * RATE // 2
    np.testing.assert_allclose(joined[RATE:], read(parts[2]), atol=1e-6)


@pytest.mark.parametrize(("rate", "level"), [(44100, 0.99), (16000, 0.6), (8000, 0.99)])
@pytest.mark.parametrize("mode", ["VARIABLE", "CONSTANT"])
def test_a_segment_of_an_mp3_is_the_slice_of_the_whole(rate: int, level: float, mode: str) -> None:
    """Where the bit rate is low, libsndfile's own search gives silence or noise behind it."""
    data = bytes_of(
        noise(3, rate), rate, format="MP3", subtype="MPEG_LAYER_III", bitrate_mode=mode, compression_level=level
    )
    whole = read(data, rate=rate)
    for start in (0.0, 0.01, 0.5, 1.234, 2.0, 2.7):
        part = read(data, rate=rate, start_time=start, end_time=start + 0.2)
        first = round(start * rate)
        np.testing.assert_array_equal(part, whole[first : first + len(part)])
        assert len(part) == round((start + 0.2) * rate) - first


@pytest.mark.parametrize("kind", ["OGG-VORBIS", "OGG-OPUS", "FLAC-PCM_16", "WAV-GSM610", "WAV-IMA_ADPCM", "WAV-PCM_24"])
def test_a_segment_of_any_codec_is_the_slice_of_the_whole(kind: str) -> None:
    name, subtype = kind.split("-")
    rate = 8000
    data = bytes_of(noise(2, rate), rate, format=name, subtype=subtype)
    whole = read(data, rate=rate)
    for start in (0.1, 0.777, 1.5):
        part = read(data, rate=rate, start_time=start, end_time=start + 0.3)
        np.testing.assert_array_equal(part, whole[round(start * rate) :][: len(part)])


def test_what_is_no_frame_between_the_frames_of_an_mp3_is_refused() -> None:
    data = vbr_mp3(noise(1))
    frames = mpeg.split_parts(data, "a")[0].frames
    assert "is damaged" in str(refused(data[: frames[9]] + b"\1\2\3\4" * 50 + data[frames[9] :]))
    np.testing.assert_array_equal(read(b"\0" * 500 + data, "a.mp3"), read(data))
    np.testing.assert_array_equal(read(data[frames[3] + 9 : frames[4]] + data, "a.mp3"), read(data))


# ---------------------------------------------------------------------------------------------------- Ogg


def ogg(samples: np.ndarray, subtype: str = "VORBIS", rate: int = RATE) -> bytes:
    return bytes_of(samples, rate, format="OGG", subtype=subtype)


def pages(data: bytes) -> list[bytes]:
    """The pages of an Ogg file."""
    found, position = [], 0
    while position < len(data):
        segments = data[position + 26]
        end = position + 27 + segments + sum(data[position + 27 : position + 27 + segments])
        found.append(data[position:end])
        position = end
    return found


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_chained_ogg_is_read_link_by_link(subtype: str) -> None:
    links = [ogg(noise(0.5, seed=seed), subtype) for seed in range(3)]
    np.testing.assert_array_equal(read(b"".join(links)), np.concatenate([read(link) for link in links]))
    assert len(read(b"".join(links))) == 3 * RATE // 2


def test_links_of_other_codecs_and_rates_are_resampled() -> None:
    joined = read(ogg(noise(0.5)) + ogg(noise(0.5), "OPUS") + ogg(noise(0.5, 44100), rate=44100))
    assert len(joined) == 3 * RATE // 2


def test_an_ogg_without_its_last_page_or_with_a_damaged_one_is_refused() -> None:
    data = ogg(noise(3))
    whole = pages(data)
    assert len(whole) > 5
    for count in (3, len(whole) - 1):
        assert "last page" in str(refused(b"".join(whole[:count])))
    assert "lacks the pages" in str(refused(b"".join([*whole[:4], *whole[5:]])))
    for position in (len(data) // 3, len(data) - 5):
        damaged = bytearray(data)
        damaged[position] ^= 1
        assert "is damaged" in str(refused(bytes(damaged)))
    assert "middle of a stream" in str(refused(b"".join(whole[1:])))


# ---------------------------------------------------------------------------------------------------- truncation

CONTAINERS = {
    "wav": {"format": "WAV"},
    "rifx": {"format": "WAV", "endian": "BIG"},
    "rf64": {"format": "RF64"},
    "w64": {"format": "W64"},
    "aiff": {"format": "AIFF"},
    "aifc": {"format": "AIFF", "subtype": "ULAW"},
    "au": {"format": "AU"},
    "au-little": {"format": "AU", "endian": "LITTLE"},
    "caf": {"format": "CAF"},
    "nist": {"format": "NIST"},
    "flac": {"format": "FLAC"},
    "vorbis": {"format": "OGG", "subtype": "VORBIS"},
    "opus": {"format": "OGG", "subtype": "OPUS"},
    "mp3": {"format": "MP3", "subtype": "MPEG_LAYER_III"},
    "gsm": {"format": "WAV", "subtype": "GSM610"},
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_recording_that_breaks_off_anywhere_is_refused_in_every_container(name: str) -> None:
    rate = 8000
    data = bytes_of(noise(2, rate), rate, **CONTAINERS[name])
    assert len(read(data, rate=rate)) == pytest.approx(2 * rate, abs=320)
    for percent in (1, 20, 60, 95):
        error = refused(data[: len(data) * percent // 100], rate=rate)
        assert "breaks off" in str(error) or "cannot be read as audio" in str(error)
    assert "breaks off" in str(refused(data[: len(data) * 6 // 10])) or name == "flac"


def patched(data: bytes, marker: bytes, offset: int, value: bytes) -> bytes:
    """`data` with `value` at `offset` from where `marker` is."""
    at = data.index(marker) + offset
    return data[:at] + value + data[at + len(value) :]


STREAMED: dict[str, Callable[[], bytes]] = {
    "wav of ffmpeg": lambda: patched(bytes_of(noise(1), format="WAV"), b"data", 4, b"\xff" * 4),
    "wav of lame": lambda: patched(bytes_of(noise(1), format="WAV"), b"data", 4, b"\xff\xff\xff\x7f"),
    "wav of sox": lambda: patched(bytes_of(noise(1), format="WAV"), b"data", 4, b"\x00\xf0\xff\x7f"),
    "wav of a recorder that was killed": lambda: patched(bytes_of(noise(1), format="WAV"), b"data", 4, bytes(4)),
    "rifx": lambda: patched(bytes_of(noise(1), format="WAV", endian="BIG"), b"data", 4, bytes(4)),
    "rf64 of ffmpeg": lambda: patched(
        patched(bytes_of(noise(1), format="RF64"), b"ds64", 8, bytes(24)), b"data", 4, b"\xff" * 4
    ),
    "w64 of ffmpeg": lambda: patched(
        bytes_of(noise(1), format="W64"), b"data\xf3", 16, b"\xff\xff\xff\xff\xff\xff\xff\x7f"
    ),
    "w64, size 0": lambda: patched(bytes_of(noise(1), format="W64"), b"data\xf3", 16, bytes(8)),
    "aiff of ffmpeg": lambda: patched(
        patched(bytes_of(noise(1), format="AIFF"), b"SSND", 4, bytes(4)), b"COMM", 10, bytes(4)
    ),
    "au of ffmpeg": lambda: patched(bytes_of(noise(1), format="AU"), b".snd", 8, b"\xff" * 4),
    "au, size 0": lambda: patched(bytes_of(noise(1), format="AU"), b".snd", 8, bytes(4)),
    "caf of ffmpeg": lambda: patched(bytes_of(noise(1), format="CAF"), b"data", 4, b"\xff" * 8),
}


@pytest.mark.parametrize("name", STREAMED)
def test_a_recording_that_was_written_into_a_pipe_is_read_to_the_end_of_the_file(name: str, tmp_path: Path) -> None:
    data = STREAMED[name]()
    audio = read(data)
    expected = np.frombuffer(bytes_of(noise(1), format="RAW", subtype="PCM_16"), "<i2") / np.float32(32768)
    np.testing.assert_array_equal(audio[:RATE], expected)
    assert len(audio) - RATE in range(9), "no more than what pads the end"
    (tmp_path / "a").write_bytes(data)
    np.testing.assert_array_equal(read_audio(tmp_path / "a", RATE), audio)


def test_a_wav_of_no_samples_is_not_filled_with_the_chunk_behind_them() -> None:
    data = bytes_of(np.zeros(0, np.float32), format="WAV")
    data = data[: data.index(b"data") + 8] + b"LIST" + struct.pack("<I", 12) + b"INFOISFT" + bytes(4)
    with pytest.raises(AudioError) as caught:
        read(data)
    assert caught.value.reason == "empty_audio"


@pytest.mark.parametrize("name", ["wav", "flac", "vorbis", "mp3"])
def test_a_tag_in_front_of_a_recording_is_skipped(name: str, tmp_path: Path) -> None:
    data = bytes_of(noise(0.5), **CONTAINERS[name])
    tagged = b"ID3\3\0\0\0\0\1\x0a" + bytes(138) + data
    np.testing.assert_array_equal(read(tagged), read(data))
    (tmp_path / "a").write_bytes(tagged)
    np.testing.assert_array_equal(read_audio(tmp_path / "a", RATE), read(data))


@pytest.mark.parametrize("seconds", [0.05, 1.0, 1.3])
def test_a_flac_that_does_not_say_its_length_is_read_whole_and_a_cut_one_refused(seconds: float) -> None:
    """As ffmpeg and flac write it into a pipe: the count of samples is 0."""
    data = bytes_of(noise(seconds), format="FLAC")
    streamed = data[:21] + bytes([data[21] & 0xF0]) + bytes(4) + data[26:]
    assert streamed != data
    np.testing.assert_array_equal(read(streamed), read(data))
    for percent in (30, 60, 99):
        assert "breaks off" in str(refused(streamed[: len(data) * percent // 100]))


@pytest.mark.parametrize("options", [{"format": "WAV"}, {"format": "AIFF"}, {"format": "AU"}])
def test_files_that_were_joined_byte_by_byte_are_refused_where_only_the_first_would_be_read(
    options: dict[str, str],
) -> None:
    data = bytes_of(noise(0.5), **options)
    assert "joined byte by byte" in str(refused(data + data))


def test_gsm_610_of_sox_is_read_with_the_length_that_its_header_says() -> None:
    audio = read_audio(FILES / "sox_gsm610.wav", 8000)
    assert len(audio) == 16000
    tone = audio[4000:]
    assert np.abs(np.fft.rfft(tone * np.hanning(len(tone)))).argmax() * 8000 / len(tone) == pytest.approx(440, abs=2)


def test_whatever_is_cut_or_damaged_is_audio_or_refused_in_a_sentence() -> None:
    draw = random.Random(0)
    for name, options in CONTAINERS.items():
        data = bytes_of(noise(0.2, 8000), 8000, **options)
        for trial in range(24):
            damaged = bytearray(data)
            for _ in range(3):
                damaged[draw.randrange(len(data) if trial % 2 else min(120, len(data)))] = draw.randrange(256)
            try:
                read(bytes(damaged[: draw.randrange(1, len(data)) if trial % 3 else len(data)]), rate=8000)
            except AudioError as error:
                assert str(error).startswith(("a ", "the segment")), name


# ---------------------------------------------------------------------------------------------------- PyAV


def test_without_pyav_an_m4a_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "_library", lambda: None)
    with pytest.raises(AudioError, match=r"MP4 file \(AAC, ALAC\).*pip install 'megatron-speech\[m4a\]'"):
        read_audio(FILES / "ffmpeg_aac.m4a", RATE)


def test_an_m4a_that_breaks_off_is_refused_whether_it_can_be_decoded_or_not() -> None:
    data = (FILES / "ffmpeg_aac.m4a").read_bytes()
    for percent in (20, 60, 90):
        assert "breaks off" in str(refused(data[: len(data) * percent // 100]))


def test_an_m4a_of_ffmpeg_is_decoded_with_pyav() -> None:
    pytest.importorskip("av", reason="PyAV is not installed")
    recording = read_recording(FILES / "ffmpeg_aac.m4a", RATE)
    assert recording.file_seconds == pytest.approx(0.5, abs=0.02)
    tone = recording.audio[round(0.35 * RATE) : round(0.48 * RATE)]
    assert np.abs(np.fft.rfft(tone * np.hanning(len(tone)))).argmax() * RATE / len(tone) == pytest.approx(440, abs=10)
    part = read_audio(FILES / "ffmpeg_aac.m4a", RATE, start_time=0.1, end_time=0.3)
    np.testing.assert_array_equal(part, recording.audio[1600:4800])


@pytest.mark.parametrize(
    ("container", "codec"),
    [("adts", "aac"), ("webm", "libopus"), ("asf", "wmav2"), ("ogg", "libspeex"), ("ogg", "flac"), ("ipod", "alac")],
)
def test_what_libsndfile_does_not_read_is_decoded_with_pyav(container: str, codec: str, tmp_path: Path) -> None:
    pytest.importorskip("av", reason="PyAV is not installed")
    if shutil.which("ffmpeg") is None:
        pytest.skip("ffmpeg is not installed")
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(2 * RATE) / RATE)
    soundfile.write(tmp_path / "source.wav", tone, RATE)
    command = f"ffmpeg -loglevel error -i {tmp_path}/source.wav -c:a {codec} -f {container} {tmp_path}/a"
    subprocess.run(command.split(), check=True)
    recording = read_recording(tmp_path / "a", RATE)
    assert abs(recording.file_seconds - 2.0) < 0.1 + recording.padding_seconds
    middle = recording.audio[RATE // 2 : 3 * RATE // 2]
    assert np.abs(np.fft.rfft(middle * np.hanning(RATE))).argmax() == 440
    data = (tmp_path / "a").read_bytes()
    refused(data[: len(data) * 6 // 10])


# ---------------------------------------------------------------------------------------------------- other people's

FFMPEG = "ffmpeg -loglevel error -i {} -f "
PIPED = {
    "ffmpeg wav": FFMPEG + "wav -",
    "ffmpeg rf64": FFMPEG + "wav -rf64 always -",
    "ffmpeg w64": FFMPEG + "w64 -",
    "ffmpeg aiff": FFMPEG + "aiff -",
    "ffmpeg au": FFMPEG + "au -",
    "ffmpeg caf": FFMPEG + "caf -",
    "ffmpeg flac": FFMPEG + "flac -",
    "ffmpeg vorbis": FFMPEG + "ogg -",
    "ffmpeg opus": FFMPEG + "ogg -c:a libopus -",
    "ffmpeg mp3": FFMPEG + "mp3 -",
    "ffmpeg mp3 in wav": FFMPEG + "wav -c:a libmp3lame -",
    "ffmpeg mp2": FFMPEG + "mp2 -",
    "sox wav": "sox {} -t wav -",
    "sox aiff": "sox {} -t aiff -",
    "sox au": "sox {} -t au -",
    "sox nist": "sox {} -t sph -",
    "sox w64": "sox {} -t w64 -",
    "lame vbr": "lame --quiet -V5 {} -",
    "lame abr": "lame --quiet --abr 40 -t {} -",
    "lame cbr": "lame --quiet -b 32 -t {} -",
}


@pytest.mark.parametrize("name", PIPED)
def test_what_other_programs_write_into_a_pipe_is_read_whole(name: str, tmp_path: Path) -> None:
    command = PIPED[name].format(tmp_path / "source.wav").split()
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    quiet = np.concatenate([noise(0.5), 0.02 * noise(2.5, seed=1), noise(0.5, seed=2)])
    soundfile.write(tmp_path / "source.wav", quiet, RATE)
    written = subprocess.run(command, check=True, capture_output=True).stdout
    audio = read(written)
    assert -16 <= len(audio) - len(quiet) <= 2400, "beside what the codec pads"
    # Both loud ends are there: what is cut off at the end is what estimates lose.
    loud = np.abs(audio) > 0.1
    assert loud[: RATE // 2].mean() > 0.3 and loud[-RATE // 2 - 2400 :].mean() > 0.3
    assert np.abs(audio[RATE : 2 * RATE]).max() < 0.1
