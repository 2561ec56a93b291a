"""Recordings that libsndfile does not read (AAC in m4a and others), through PyAV, which brings FFmpeg's decoders.

Only the one demuxer that fits the file's first bytes is opened: FFmpeg's own guess would also follow playlists, which
name other files and addresses.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from megatron_speech.codecs.containers import AudioError, breaks_off

# Container, as `containers.kind_of` names it → FFmpeg's demuxer and what people call such a file.
DEMUXERS = {
    "mp4": ("mov", "an MP4 file (AAC, ALAC)"),
    "aac": ("aac", "AAC"),
    "matroska": ("matroska", "WebM or Matroska"),
    "asf": ("asf", "WMA"),
    "ogg": ("ogg", "Ogg"),
    "wav": ("wav", "wav"),
    "aiff": ("aiff", "AIFF"),
    "caf": ("caf", "CAF"),
}


@functools.cache
def _library() -> Any:
    try:
        import av
    except ImportError:
        return None
    av.logging.set_level(av.logging.PANIC)
    return av


class MediaPart:
    """The only stream of sound of a file, decoded whole. See :class:`megatron_speech.codecs.audio.AudioPart`."""

    # AAC's encoders put up to 2,112 samples in front and fill the last frame of 1,024; not all files say so.
    padding = 4096

    def __init__(self, file: BinaryIO, kind: str, path: object, reason: str | None = None) -> None:
        """Decode the recording.

        Args:
            file: the recording.
            kind: a key of `DEMUXERS`.
            path: its name, for errors.
            reason: why libsndfile does not read it, where it usually reads such files.

        Raises:
            AudioError: unreadable: PyAV is not installed or cannot read it, it breaks off, or it has no or several
                streams of sound.
        """
        demuxer, called = DEMUXERS[kind]
        av = _library()
        if av is None:
            what = (
                f"is {called}, which needs PyAV to be read"
                if reason is None
                else (f"cannot be read as audio: {reason}; it may be of a codec for which PyAV is needed")
            )
            raise AudioError("unreadable", f"{path} {what}: pip install 'megatron-speech[m4a]', or convert it to flac")
        file.seek(0)
        try:
            with av.open(file, format=demuxer, metadata_errors="replace") as container:
                streams = container.streams.audio
                if len(streams) != 1:
                    raise AudioError(
                        "unreadable",
                        f"{path} has {len(streams)} streams of sound, needed is one; extract the one that is meant",
                    )
                stream = streams[0]
                if getattr(stream, "codec_context", None) is None or not stream.rate:
                    raise AudioError("unreadable", f"{path} is {called}, of a codec that PyAV does not decode")
                seconds = float(stream.duration * stream.time_base) if stream.duration else None
                if seconds is None and container.duration and kind in ("mp4", "matroska", "asf"):
                    seconds = container.duration / av.time_base
                self.rate = int(stream.rate)
                self.channels = int(stream.codec_context.channels)
                self._blocks = [self._samples(av, frame, path) for frame in container.decode(stream)]
        except AudioError:
            raise
        except (av.FFmpegError, EOFError, ValueError) as error:  # ValueError: a damaged file names places before it
            raise AudioError(
                "unreadable", f"{path} cannot be read as {called}: {getattr(error, 'strerror', None) or error}"
            ) from error
        self.length = sum(map(len, self._blocks))
        if kind in ("mp4", "matroska", "asf") and seconds is not None:
            # Their clocks are rounded to milliseconds, and their lengths to frames.
            if seconds - self.length / self.rate > 0.1:
                raise breaks_off(path, f"{self.length / self.rate:.3f} s", f"{seconds:.3f} s")

    def _samples(self, av: Any, frame: Any, path: object) -> np.ndarray:
        """Float32 [n, channels] of a frame."""
        if frame.sample_rate != self.rate or len(frame.layout.channels) != self.channels:
            raise AudioError("unreadable", f"{path} changes its sample rate or channels on the way; convert it to flac")
        values = frame.to_ndarray()
        if not frame.format.is_planar:
            values = values.reshape(-1, self.channels).T
        if values.dtype == np.uint8:
            values = (values.astype(np.float32) - 128) / 128
        elif np.issubdtype(values.dtype, np.signedinteger):
            values = values.astype(np.float32) / (1 << 8 * values.dtype.itemsize - 1)
        return np.ascontiguousarray(values.T, dtype=np.float32)

    def read(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Samples `start` to `stop`, float32 [n, channels], in blocks."""
        position = 0
        for block in self._blocks:
            chosen = block[max(start - position, 0) : max(stop - position, 0)]
            if len(chosen):
                yield chosen
            position += len(block)


def adts_is_whole(data: bytes) -> bool:
    """Whether the frames of a raw AAC file (ADTS) end where the file ends; a tag behind them counts as the end."""
    position = 0
    while position + 7 <= len(data) and data[position] == 0xFF and data[position + 1] & 0xF6 == 0xF0:
        length = (data[position + 3] & 3) << 11 | data[position + 4] << 3 | data[position + 5] >> 5
        if length < 7:
            return False
        position += length
    return position == len(data) or data[position : position + 3] in (b"TAG", b"ID3", b"APE")
