"""Reading files of a dataset where they lie: a path, or a URL that fsspec opens."""

from __future__ import annotations

import os
from typing import IO, Any

from megatron_speech.errors import InputError
from megatron_speech.remote import is_url


def open_source(name: str) -> IO[bytes]:
    """A file open for reading, from its first byte on."""
    if is_url(name):
        import fsspec

        opened: IO[bytes] = fsspec.open(name, "rb").open()
        return opened
    return open(name, "rb")


class RangeReader:
    """Reads ranges of one file, each by itself. One may serve several threads."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._system: Any = None
        self._path = name
        if is_url(name):
            import fsspec

            try:
                self._system, self._path = fsspec.core.url_to_fs(name)
            except (ImportError, ValueError) as error:
                raise InputError(f"{name} cannot be read ({error}); name the prefix of a dataset that can") from error

    def size(self) -> int:
        """Bytes of the file.

        Raises:
            InputError: it cannot be read.
        """
        try:
            return os.stat(self._path).st_size if self._system is None else int(self._system.info(self._path)["size"])
        except Exception as error:  # the libraries behind fsspec have no error in common
            raise InputError(f"{self.name} cannot be read ({error}); restore it, or recreate the dataset") from error

    def read(self, begin: int, size: int) -> bytes:
        """The bytes `begin` … `begin + size - 1`.

        Raises:
            InputError: they cannot be read, or other than `size` bytes came.
        """
        try:
            if self._system is None:
                with open(self._path, "rb", buffering=0) as handle:
                    data = os.pread(handle.fileno(), size, begin)
                    while len(data) < size and (more := os.pread(handle.fileno(), size - len(data), begin + len(data))):
                        data += more
            else:
                data = self._system.cat_file(self._path, start=begin, end=begin + size)
        except Exception as error:  # as above
            raise InputError(f"{self.name} cannot be read ({error}); try again when it can") from error
        if len(data) < size:
            raise InputError(
                f"{self.name}: of the {size:,} bytes from {begin:,} on, {len(data):,} are there: the file is shorter "
                "than its manifest says; restore it, or recreate the dataset"
            )
        if len(data) > size:
            raise InputError(
                f"{self.name}: {len(data):,} bytes came in answer to a range of {size:,}: the server does not serve "
                "ranges; name another one, or set data.stage_datasets: true, which copies whole files"
            )
        return data
