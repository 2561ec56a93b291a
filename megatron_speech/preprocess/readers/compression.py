"""Decompression by the standard library (for zstd, by the backport of Python 3.14's), with its errors as sentences."""

from __future__ import annotations

import gzip
import io
import sys
import zlib
from typing import Any

from megatron_speech.errors import InputError

COMPRESSED = (".gz", ".zst")

_ZSTD_WINDOW_LOG = 31  # as `zstd --long=31` writes


class DamagedInput(InputError):
    """A file that is not what its ending says, or not all of it. Readers add how far they came."""


def _gzip(raw: io.BufferedReader) -> tuple[Any, tuple[type[Exception], ...]]:
    return gzip.GzipFile(fileobj=raw, mode="rb"), (gzip.BadGzipFile, zlib.error)


def _zstd(raw: io.BufferedReader) -> tuple[Any, tuple[type[Exception], ...]]:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd

    # Not fsspec's own, which keeps to the smaller default window.
    plain = zstd.ZstdFile(raw, options={zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW_LOG})
    return plain, (zstd.ZstdError,)


class Inflated(io.RawIOBase):
    """The decompressed bytes of `raw`: one or more gzip members or zstd frames, end to end.

    Reading raises :class:`DamagedInput` where the stream is cut off, damaged, or followed by bytes that are no stream
    (zeros after gzip members are padding, as gzip itself has it).
    """

    def __init__(self, raw: io.BufferedReader, url: str, name: str) -> None:
        self._raw, self._url = raw, url
        self._format = "zstd" if name.endswith(".zst") else "gzip"
        self._plain, self._errors = (_zstd if self._format == "zstd" else _gzip)(raw)
        self._begun = False

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` as far as decoded bytes are at hand; 0 at the end."""
        if not self._begun and not self._raw.peek(1):
            raise DamagedInput(f"input {self._url} is empty (0 bytes), needed a {self._format} stream")
        try:
            count = int(self._plain.readinto(buffer))
        except EOFError as error:
            raise DamagedInput(f"input {self._url} is cut off: its {self._format} stream does not end") from error
        except self._errors as error:
            what = (
                f"is damaged, or holds something else after the end of its {self._format} stream"
                if self._begun
                else f"is damaged, or is not a {self._format} stream, though its name says so"
            )
            raise DamagedInput(f"input {self._url} {what} ({error})") from error
        self._begun = True
        return count

    def close(self) -> None:
        """Close the compressed file too."""
        if not self.closed:
            self._plain.close()
            self._raw.close()
        super().close()
