"""Decompression that knows where a stream must end: one that is cut off, or followed by something else, is an error."""

from __future__ import annotations

import io
import zlib
from typing import Any, BinaryIO, Protocol

from megatron_speech.errors import InputError

COMPRESSED = (".gz", ".zst")

# Of compressed input at a time; less where it turns out to expand a lot, since a step's output is in memory as a whole.
_PIECE_BYTES = 16 << 10
_FIRST_PIECE_BYTES = 1 << 10
_LEAST_PIECE_BYTES = 64
_LARGE_STEP_BYTES, _SMALL_STEP_BYTES = 2 << 20, 256 << 10


class DamagedInput(InputError):
    """A file that is not what its ending says, or not all of it. Readers add how far they came."""


class _Decoder(Protocol):
    """One gzip member or zstd frame: the interface that zlib and zstandard share."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes) -> bytes: ...


def _gzip_member() -> Any:
    return zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)


def _zstd_frame() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()  # as `zstd --long=31` writes


def _zstd_error() -> type[Exception]:
    import zstandard

    return zstandard.ZstdError


def _is_gzip(start: bytes) -> bool:
    return start.startswith(b"\x1f\x8b")


def _is_zstd(start: bytes) -> bool:
    skippable = start[1:4] == b"\x2a\x4d\x18" and 0x50 <= start[0] <= 0x5F
    return start.startswith(b"\x28\xb5\x2f\xfd") or skippable


class Inflated(io.RawIOBase):
    """The decompressed bytes of `raw`: one or more gzip members or zstd frames, end to end.

    Reading raises :class:`DamagedInput` where the stream is cut off, damaged, or followed by bytes that are no stream
    (zeros after gzip members are padding, as gzip itself has it).
    """

    def __init__(self, raw: BinaryIO, url: str, name: str) -> None:
        self._raw, self._url = raw, url
        zstd = name.endswith(".zst")
        self._format = "zstd" if zstd else "gzip"
        self._make, self._is_start = (_zstd_frame, _is_zstd) if zstd else (_gzip_member, _is_gzip)
        self._error: type[Exception] = _zstd_error() if zstd else zlib.error
        self._decoder: _Decoder | None = None
        self._input = b""
        self._output = memoryview(b"")
        self._members = 0
        self._piece = _FIRST_PIECE_BYTES

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` as far as decoded bytes are at hand; 0 at the end."""
        while not self._output:
            if not self._step():
                return 0
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def close(self) -> None:
        """Close the compressed file too."""
        if not self.closed:
            self._raw.close()
        super().close()

    def _step(self) -> bool:
        """Decode one piece; False at the end."""
        if len(self._input) < 4:  # enough to know what begins
            self._input += self._raw.read(_PIECE_BYTES)
        if self._decoder is None:
            if self._members and self._format == "gzip":
                self._input = self._input.lstrip(b"\0")
                if len(self._input) < 4:
                    more = self._raw.read(_PIECE_BYTES)
                    self._input += more
                    if more or not self._input:
                        return bool(more)
            if not self._input and self._members:
                return False
            self._begin()
        assert self._decoder is not None
        if not self._input:
            raise DamagedInput(f"input {self._url} is cut off: its {self._format} stream does not end")
        piece, self._input = self._input[: self._piece], self._input[self._piece :]
        try:
            self._output = memoryview(self._decoder.decompress(piece))
        except self._error as error:
            raise DamagedInput(f"input {self._url} is damaged: its {self._format} stream: {error}") from error
        if len(self._output) > _LARGE_STEP_BYTES:
            self._piece = max(self._piece // 4, _LEAST_PIECE_BYTES)
        elif len(self._output) < _SMALL_STEP_BYTES:
            self._piece = min(self._piece * 2, _PIECE_BYTES)
        if self._decoder.eof:
            self._input = self._decoder.unused_data + self._input
            self._decoder = None
            self._members += 1
        return True

    def _begin(self) -> None:
        if self._is_start(self._input):
            self._decoder = self._make()
            return
        if self._members:
            raise DamagedInput(f"input {self._url} holds something else after the end of its {self._format} stream")
        if not self._input:
            raise DamagedInput(f"input {self._url} is empty (0 bytes), needed a {self._format} stream")
        raise DamagedInput(f"input {self._url} is not a {self._format} stream, though its name says so")
