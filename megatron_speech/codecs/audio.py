"""Recordings as mono float32 at the rate that a codec needs, and back to wav."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from megatron_speech.errors import InputError
from megatron_speech.files import atomic_write

# How far a segment's times may miss the file's end, or a cut file its own times: metadata is rounded and resampled.
TIME_TOLERANCE_SECONDS = 0.1


class AudioError(InputError):
    """A recording that cannot be used; `reason` is a short name to count by."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[AudioError], tuple[str, str]]:
        """Both arguments, so that the error survives the way back from a worker process."""
        return type(self), (self.reason, str(self))


def read_audio(
    path: str | os.PathLike[str],
    sample_rate_hz: int,
    *,
    start_time: float | None = None,
    end_time: float | None = None,
    content: BinaryIO | None = None,
) -> np.ndarray:
    """Read wav, flac, mp3 or ogg of any rate and channel count as mono float32 [n] at `sample_rate_hz`.

    Channels are averaged; resampling is soxr's high quality.

    `start_time` and `end_time` (seconds) name a segment of the file. A file that is itself as long as the segment
    (within 0.1 s) was cut at those times from a longer recording and is read whole. A segment that reaches up to
    0.1 s past the end is taken to the end.

    `content` holds the file's bytes where they do not lie in a local file of their own; `path` then only names them.

    Raises:
        AudioError: with `reason` missing_file, unreadable, empty_audio, non_finite or bad_segment.
    """
    path = Path(path)
    try:
        if content is None and not path.is_file():
            raise AudioError("missing_file", f"{path} does not exist or is not a file; check wav_path")
        with soundfile.SoundFile(path if content is None else content) as sound:
            rate = sound.samplerate
            start, stop = _segment(path, sound.frames / rate, start_time, end_time)
            if start > 0:
                sound.seek(min(round(start * rate), sound.frames))
            frames = -1 if stop is None else max(round(stop * rate) - round(start * rate), 0)
            announced = sound.frames - sound.tell() if stop is None else frames
            if cut := _CUT_WAV.search(sound.extra_info):
                _refuse_cut_wav(path, int(cut[1]), int(cut[2]))
            channels = sound.read(frames, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        if (path.stat().st_size if content is None else content.seek(0, os.SEEK_END)) == 0:
            raise AudioError("empty_audio", f"{path} has no bytes; record or copy it again") from error
        raise AudioError("unreadable", f"{path} cannot be read as audio: {error.error_string}") from error
    except OSError as error:
        raise AudioError("unreadable", f"{path} cannot be read: {error.strerror or error}") from error
    if announced - len(channels) > TIME_TOLERANCE_SECONDS * rate:
        raise AudioError(
            "unreadable",
            f"{path} breaks off after {len(channels) / rate:.3f} s of {announced / rate:.3f} s; copy it again",
        )
    if not len(channels):
        raise AudioError("empty_audio", f"{path} has no samples in the requested part; leave it out")
    audio = channels.mean(axis=1, dtype=np.float32) if channels.shape[1] > 1 else channels[:, 0]
    if not np.isfinite(audio).all():
        raise AudioError("non_finite", f"{path} holds NaN or infinite samples; repair it or leave it out")
    if rate != sample_rate_hz:
        audio = soxr.resample(audio, rate, sample_rate_hz, quality="HQ")
    return np.ascontiguousarray(audio, dtype=np.float32)


# libsndfile reads what is there of a wav that breaks off, and says so only in its log.
_CUT_WAV = re.compile(r"^data : (\d+) \(should be (\d+)\)$", re.MULTILINE)
# Programs that write a wav into a pipe do not know its size, and put the largest that they can.
_STREAMED_WAV_BYTES = 0x7FFF_0000


def _refuse_cut_wav(path: Path, announced_bytes: int, found_bytes: int) -> None:
    if found_bytes < announced_bytes < _STREAMED_WAV_BYTES:
        raise AudioError(
            "unreadable", f"{path} breaks off after {found_bytes} bytes of audio of {announced_bytes}; copy it again"
        )


def write_wav(path: str | os.PathLike[str], audio: np.ndarray, sample_rate_hz: int) -> None:
    """Write mono float `audio` [n] as 16-bit wav, whole or not at all; samples beyond ±1 are clipped."""
    with atomic_write(path) as handle:
        soundfile.write(handle, np.clip(audio, -1.0, 1.0), sample_rate_hz, format="WAV", subtype="PCM_16")


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
