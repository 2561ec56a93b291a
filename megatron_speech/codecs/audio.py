"""Recordings as mono float32 at the rate that a codec needs, and back to a file."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import soundfile
import soxr

from megatron_speech.codecs import media, mpeg, ogg
from megatron_speech.codecs.containers import AudioError, breaks_off, complete, id3_size, kind_of, samples_of
from megatron_speech.errors import InputError
from megatron_speech.files import atomic_write

__all__ = [
    "AudioError",
    "DecodedAudio",
    "check_output_format",
    "read_audio",
    "read_recording",
    "write_audio",
    "write_wav",
]

# How far a segment's times may miss the file's end, or a cut file its own times: metadata is rounded and resampled.
TIME_TOLERANCE_SECONDS = 0.1
# Channels whose average has less than this share of their power (-20 dB) cancel each other out.
ANTIPHASE_SHARE = 0.01
# Samples that all lie within one step of 16-bit audio are digital silence.
SILENCE_RANGE = 1 / 32768

_BLOCK_FRAMES = 1 << 18


class AudioPart(Protocol):
    """One recording of a file; most files hold one.

    Attributes:
        rate: Hz.
        channels: how many.
        length: samples of each channel, counted and not estimated.
        padding: samples that the format's encoders may have added to what was recorded.
    """

    rate: int
    channels: int
    length: int
    padding: int

    def read(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Samples `start` to `stop`, float32 [n, channels], in blocks."""
        ...


@dataclass(frozen=True)
class DecodedAudio:
    """What was read.

    Attributes:
        audio: mono float32 [n] at the rate that was asked for.
        file_seconds: length of the whole file.
        padding_seconds: how much of that the file's codec (MP3, AAC) may have added.
    """

    audio: np.ndarray
    file_seconds: float
    padding_seconds: float


def read_audio(
    path: str | os.PathLike[str],
    sample_rate_hz: int,
    *,
    start_time: float | None = None,
    end_time: float | None = None,
    channel: int | None = None,
    content: BinaryIO | None = None,
    allow_silence: bool = False,
) -> np.ndarray:
    """The audio of :func:`read_recording`, mono float32 [n]. Takes and raises the same."""
    return read_recording(
        path,
        sample_rate_hz,
        start_time=start_time,
        end_time=end_time,
        channel=channel,
        content=content,
        allow_silence=allow_silence,
    ).audio


def read_recording(
    path: str | os.PathLike[str],
    sample_rate_hz: int,
    *,
    start_time: float | None = None,
    end_time: float | None = None,
    channel: int | None = None,
    content: BinaryIO | None = None,
    allow_silence: bool = False,
) -> DecodedAudio:
    """Read a recording of any rate and channel count as mono float32 at `sample_rate_hz`.

    Reads what libsndfile does (wav, flac, mp3, Ogg Vorbis and Opus, AIFF, AU, CAF, W64, NIST, …), and m4a/AAC, WebM
    and WMA where PyAV is installed. A file is decoded to its end, all parts of it where files were joined (MP3, Ogg);
    one that is shorter than its container announces is refused.

    Channels are averaged, or `channel` is taken; resampling is soxr's high quality.

    `start_time` and `end_time` (seconds) name a segment of the file. A file that is itself as long as the segment
    (within 0.1 s) was cut at those times from a longer recording and is read whole. A segment that reaches up to
    0.1 s past the end is taken to the end.

    `content` holds the file's bytes where they do not lie in a local file of their own; `path` then only names them.
    `allow_silence` takes digital silence for what it is, as where generated speech is judged.

    Raises:
        AudioError: with `reason` missing_file, unreadable, empty_audio, non_finite, bad_segment, bad_channel (the file
            has no such channel), antiphase (the average of the channels is next to nothing of them) or silence (all
            samples of the segment are the same).
    """
    path = Path(path)
    try:
        if content is None and not path.is_file():
            raise AudioError("missing_file", f"{path} does not exist or is not a file; check the path")
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(open(path, "rb")) if content is None else content
            parts = _open_parts(path, file, is_local=content is None)
            return _read_parts(path, parts, sample_rate_hz, start_time, end_time, channel, allow_silence)
    except soundfile.LibsndfileError as error:
        raise AudioError("unreadable", f"{path} cannot be read as audio: {error.error_string}") from error
    except OSError as error:
        raise AudioError("unreadable", f"{path} cannot be read: {error.strerror or error}") from error


# ---------------------------------------------------------------------------------------------------- parts


def _open_parts(path: Path, file: BinaryIO, *, is_local: bool) -> Sequence[AudioPart]:
    """The recordings that a file holds, in order; nothing is decoded yet, but by PyAV."""
    head = file.read(64)
    if not head:
        raise AudioError("empty_audio", f"{path} has no bytes; record or copy it again")
    kind = kind_of(head)
    if size := id3_size(head):
        file.seek(size)
        kind = kind_of(file.read(64)) or "mpeg"
        if kind != "mpeg":  # where nobody expects such a tag
            file, is_local = io.BytesIO(_bytes_of(file)[size:]), False
    if kind == "mpeg":
        if is_local:
            found = os.fstat(file.fileno())
            return [_MpegPart(path, *part) for part in _split_file(path, found.st_size, found.st_mtime_ns)]
        return _mpeg_parts(path, _bytes_of(file))
    if kind == "ogg":
        data = _bytes_of(file)
        links = ogg.split_links(data, path)
        try:
            return [_SoundPart(path, data[start:stop] if len(links) > 1 else data) for start, stop in links]
        except soundfile.LibsndfileError as error:
            return [media.MediaPart(file, kind, path, error.error_string)]
    patched = complete(file, kind, path) if kind is not None else None
    if kind == "aac" and not media.adts_is_whole(_bytes_of(file)):
        raise AudioError("unreadable", f"{path} breaks off within a frame of AAC; copy it again")
    if kind in ("mp4", "aac", "matroska", "asf"):
        return [media.MediaPart(file, kind, path)]
    if patched is None and (not is_local or path.suffix.lower() == ".raw"):
        # soundfile takes the name, not the bytes, for what says that samples have no header.
        patched = _bytes_of(file)
    try:
        part = _SoundPart(path, patched)
    except soundfile.LibsndfileError as error:
        if kind in media.DEMUXERS:
            return [media.MediaPart(file, kind, path, error.error_string)]
        if kind is None and path.suffix.lower() in (".mp3", ".mp2"):
            return _mpeg_parts(path, _bytes_of(file))
        raise
    if part.subtype.startswith("MPEG_"):  # junk in front of the frames, or frames within a wav
        return _mpeg_parts(path, samples_of(file, kind) if kind == "wav" else _bytes_of(file))
    return [part]


def _bytes_of(file: BinaryIO) -> bytes:
    if isinstance(file, io.BytesIO):
        return file.getvalue()
    file.seek(0)
    return file.read()


class _SoundPart:
    """What libsndfile reads, from a local file or from bytes. It is read once."""

    padding = 0

    def __init__(self, path: Path, data: bytes | None = None) -> None:
        self._path = path
        self._sound = sound = soundfile.SoundFile(path if data is None else io.BytesIO(data))
        self.rate, self.channels, self.length = sound.samplerate, sound.channels, sound.frames
        self.subtype = sound.subtype
        # The samples that fill the last block of GSM 6.10, and the byte that makes its size even, are no audio.
        if sound.subtype == "GSM610" and (fact := _FACT.search(sound.extra_info)):
            self.length -= max(self.length - int(fact[1]), 0) if self.length - int(fact[1]) < 640 else 0

    def read(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Samples `start` to `stop`, float32 [n, channels], in blocks."""
        with self._sound as sound:
            can_seek = sound.seekable() and sound.subtype in _EXACT_SEEKS
            # In these formats, soundfile's search for its place behind every block is more than an addition.
            is_packed = sound.format in ("OGG", "FLAC", "MPEG") or not can_seek
            position = sound.seek(start) if start and can_seek else 0
            while position < stop:
                count = min(stop - position, stop if is_packed else _BLOCK_FRAMES)
                block = sound.read(count, dtype="float32", always_2d=True)
                if not len(block):
                    raise breaks_off(self._path, f"{position / self.rate:.3f} s", f"{self.length / self.rate:.3f} s")
                if position + len(block) > start:
                    yield block[max(start - position, 0) :]
                position += len(block)


_FACT = re.compile(r"^fact : 4\n  frames  : (\d+)$", re.MULTILINE)
# Sample types from the middle of which decoding goes on as it would from the start; others keep a state (ADPCM, GSM,
# Opus, MPEG).
_EXACT_SEEKS = frozenset(
    "PCM_S8 PCM_U8 PCM_16 PCM_24 PCM_32 FLOAT DOUBLE ULAW ALAW ALAC_16 ALAC_20 ALAC_24 ALAC_32 VORBIS".split()
)


def _mpeg_parts(path: Path, data: bytes) -> Sequence[AudioPart]:
    return [_MpegPart(path, part, data) for part in mpeg.split_parts(data, path)]


@functools.lru_cache(maxsize=1)
def _split_file(path: Path, size: int, modified: int) -> list[tuple[mpeg.MpegPart, bytes]]:
    """The parts of the last local file: rows that are segments of one recording usually follow each other."""
    data = path.read_bytes()
    return [(part, data) for part in mpeg.split_parts(data, path)]


class _MpegPart:
    """A part of an MPEG audio file, given to libsndfile with the number of its frames put in front of it."""

    # LAME puts 1,105 samples in front, and fills the last frame but one of at most 1,152.
    padding = 4096

    def __init__(self, path: Path, part: mpeg.MpegPart, data: bytes) -> None:
        self._path, self._part, self._data = path, part, data
        self.rate, self.channels = part.kind.sample_rate_hz, part.kind.channels
        self._is_tagged = part.kind.layer == 3
        self.length = part.frame_count * part.kind.samples - (sum(part.skipped) if self._is_tagged else 0)

    def read(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Samples `start` to `stop`, float32 [n, channels], in blocks."""
        is_whole = (start, stop) == (0, self.length)
        if is_whole or not self._is_tagged:
            content, before = self._part.content(self._data), start
        else:
            content, before = self._part.content_of(self._data, start, stop)
        part = _SoundPart(self._path, content)
        if part.length != self.length if is_whole else part.length < before + stop - start:
            raise AudioError(
                "unreadable",
                f"{self._path} has {self._part.frame_count} frames of MPEG audio, which are {self.length} samples, "
                f"but {part.length} would be read; convert it to flac",
            )
        yield from part.read(before, before + stop - start)


# ---------------------------------------------------------------------------------------------------- reading


def _read_parts(
    path: Path,
    parts: Sequence[AudioPart],
    sample_rate_hz: int,
    start_time: float | None,
    end_time: float | None,
    channel: int | None,
    allow_silence: bool,
) -> DecodedAudio:
    rates = {part.rate for part in parts}
    rate = rates.pop() if len(rates) == 1 else sample_rate_hz
    lengths = [part.length if part.rate == rate else round(part.length * rate / part.rate) for part in parts]
    total = sum(lengths)
    start, stop = _segment(path, total / rate, start_time, end_time)
    begin = min(round(start * rate), total)
    end = total if stop is None else min(max(round(stop * rate), begin), total)
    mixer = _Mixer(path, channel)
    pieces: list[np.ndarray] = []
    offset = 0
    for part, length in zip(parts, lengths, strict=True):
        first, last = max(begin - offset, 0), min(end - offset, length)
        if first < last and part.rate == rate:
            pieces.extend(mixer.mix(block) for block in part.read(first, last))
        elif first < last:
            whole = np.concatenate([mixer.mix(block) for block in part.read(0, part.length)])
            pieces.append(soxr.resample(whole, part.rate, rate, quality="HQ")[first:last])
        offset += length
    audio = pieces[0] if len(pieces) == 1 else np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
    if not len(audio):
        raise AudioError("empty_audio", f"{path} has no samples in the requested part; leave it out")
    low, high = float(audio.min()), float(audio.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise AudioError("non_finite", f"{path} holds NaN or infinite samples; repair it or leave it out")
    mixer.refuse_antiphase()
    if high - low < SILENCE_RANGE and not allow_silence:
        where = "" if channel is None else f" in channel {channel}"
        part_of = "" if (begin, end) == (0, total) else f" from {begin / rate:.3f} to {end / rate:.3f} s"
        raise AudioError(
            "silence",
            f"{path} holds only digital silence{where}{part_of}: all samples are {low:g}; leave it out",
        )
    if rate != sample_rate_hz:
        audio = soxr.resample(audio, rate, sample_rate_hz, quality="HQ")
    return DecodedAudio(
        np.ascontiguousarray(audio, dtype=np.float32),
        total / rate,
        sum(part.padding / part.rate for part in parts),
    )


class _Mixer:
    """Channels to one, and a watch on channels that cancel each other out."""

    def __init__(self, path: Path, channel: int | None) -> None:
        self._path, self._channel = path, channel
        self._samples = 0
        self._sums = np.zeros(1)  # of each channel
        self._power = self._mixed_power = 0.0  # sums of squares, of all channels and of their average

    def mix(self, block: np.ndarray) -> np.ndarray:
        """The average (or the one channel) of float32 [n, channels], float32 [n]."""
        channels = block.shape[1]
        if self._channel is not None:
            if self._channel >= channels:
                raise AudioError(
                    "bad_channel",
                    f"channel {self._channel} of {self._path} does not exist: the file has "
                    + ("one channel, 0" if channels == 1 else f"{channels} channels, 0 to {channels - 1}"),
                )
            return np.ascontiguousarray(block[:, self._channel])
        if channels == 1:
            return block[:, 0]
        mono = block[:, 0] + block[:, 1]  # several times faster than a mean over the short axis, and the same
        for column in range(2, channels):
            mono += block[:, column]
        mono /= channels
        if not self._samples:
            self._sums = np.zeros(channels)
        if channels == len(self._sums):
            self._samples += len(block)
            self._sums += [float(block[:, column].sum()) for column in range(channels)]
            flat = block.reshape(-1)
            self._power += float(np.dot(flat, flat))
            self._mixed_power += float(np.dot(mono, mono))
        return mono

    def refuse_antiphase(self) -> None:
        """Raise AudioError where next to nothing is left of the channels in their average."""
        if not self._samples:
            return
        channels, means = len(self._sums), self._sums / self._samples
        single = self._power / self._samples / channels - float(np.mean(means**2))
        mixed = self._mixed_power / self._samples - float(np.mean(means)) ** 2
        if mixed < ANTIPHASE_SHARE * single and single > SILENCE_RANGE**2:
            raise AudioError(
                "antiphase",
                f"the {channels} channels of {self._path} cancel each other out (in antiphase): "
                f"{100 * max(mixed, 0) / single:.2g} % of their power is left in the average; name one by "
                "`channel` (from 0)",
            )


def _segment(
    path: Path, file_seconds: float, start_time: float | None, end_time: float | None
) -> tuple[float, float | None]:
    """(start, stop) seconds to read of a file; stop None: to its end."""
    for name, value in (("start_time", start_time), ("end_time", end_time)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise AudioError("bad_segment", f"{name} {value} of {path} is not a time; needed are seconds from 0 up")
    start = start_time or 0.0
    if end_time is not None:
        if end_time <= start:
            raise AudioError("bad_segment", f"end_time {end_time} of {path} is not after start_time {start}")
        if start > 0 and abs(file_seconds - (end_time - start)) <= TIME_TOLERANCE_SECONDS:
            return 0.0, None
    if start >= file_seconds > 0 or (end_time or 0.0) > file_seconds + TIME_TOLERANCE_SECONDS:
        raise AudioError(
            "bad_segment",
            f"the segment {start}..{end_time if end_time is not None else 'end'} s is outside {path}, "
            f"which lasts {file_seconds:.3f} s",
        )
    return start, None if end_time is None or end_time >= file_seconds else end_time


# ---------------------------------------------------------------------------------------------------- writing

# Ending → libsndfile's format and sample type.
_WRITTEN = {
    ".wav": ("WAV", "PCM_16"),
    ".flac": ("FLAC", "PCM_16"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
    ".ogg": ("OGG", "VORBIS"),
    ".opus": ("OGG", "OPUS"),
    ".aiff": ("AIFF", "PCM_16"),
    ".au": ("AU", "PCM_16"),
    ".caf": ("CAF", "PCM_16"),
}
# What encoders take; other rates are raised to the next.
_RATES = {
    "MPEG_LAYER_III": (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000),
    "OPUS": (8000, 12000, 16000, 24000, 48000),
}


def check_output_format(path: str | os.PathLike[str], flag: str = "--output") -> None:
    """Refuse a file for audio whose ending names a format that cannot be written here.

    Raises:
        InputError: naming the endings that can be written.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in _WRITTEN or not soundfile.check_format(*_WRITTEN[suffix]):
        known = [ending for ending, kind in _WRITTEN.items() if soundfile.check_format(*kind)]
        found = f"ends in {suffix}" if suffix else "has no ending"
        raise InputError(f"{flag} {path} {found}, which names no format that can be written; use {', '.join(known)}")


def write_audio(path: str | os.PathLike[str], audio: np.ndarray, sample_rate_hz: int) -> None:
    """Write mono float `audio` [n] in the format that the ending of `path` names, whole or not at all.

    Samples beyond ±1 are clipped. A rate that the format does not know is raised to the next that it knows.

    Raises:
        InputError: the ending names no format that can be written.
    """
    check_output_format(path, "the file")
    kind, subtype = _WRITTEN[Path(path).suffix.lower()]
    rates = _RATES.get(subtype, (sample_rate_hz,))
    if sample_rate_hz not in rates:
        target = min((rate for rate in rates if rate > sample_rate_hz), default=max(rates))
        audio, sample_rate_hz = soxr.resample(audio, sample_rate_hz, target, quality="HQ"), target
    with atomic_write(path) as handle:
        soundfile.write(handle, np.clip(audio, -1.0, 1.0), sample_rate_hz, format=kind, subtype=subtype)


def write_wav(path: str | os.PathLike[str], audio: np.ndarray, sample_rate_hz: int) -> None:
    """Write mono float `audio` [n] as 16-bit wav, whole or not at all; samples beyond ±1 are clipped."""
    with atomic_write(path) as handle:
        soundfile.write(handle, np.clip(audio, -1.0, 1.0), sample_rate_hz, format="WAV", subtype="PCM_16")
