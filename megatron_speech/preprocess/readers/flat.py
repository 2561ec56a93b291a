"""Arrays that lie in files: `.npy`, or numbers without a header. They are read by range, never mapped or as a whole.

Reading costs one copy of the rows; a mapping would leave the pages of the whole file with the process, and
end it by a signal where a file becomes shorter.
"""

from __future__ import annotations

import ast
import functools
import math
import re
from dataclasses import dataclass

import numpy as np

from megatron_speech.errors import InputError
from megatron_speech.preprocess.readers import source
from megatron_speech.preprocess.readers.recognise import recognised

_MAGIC = b"\x93NUMPY"
_HEADER_BYTES = 1 << 16  # more than any header of an array of numbers
_SIMPLE_HEADER = re.compile(
    rb"^\{'descr': '([<|>][iu][1248])', 'fortran_order': (False|True), 'shape': \((\d+), ?(\d+)?\), *\} *\n$"
)


@dataclass(frozen=True)
class FlatFile:
    """An array in a file, [length, *row_shape], from byte `start` on.

    `by_column`: it lies there in Fortran order, each column [length] after the other.
    """

    path: str
    dtype: np.dtype
    start: int
    length: int
    row_shape: tuple[int, ...] = ()
    by_column: bool = False

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.dtype.itemsize * math.prod(self.row_shape)

    @property
    def is_local(self) -> bool:
        """Whether every process of this machine can read it."""
        return source.local_path(self.path) is not None

    def read_bytes(self, first: int, last: int) -> bytes:
        """Rows `first` to `last`, row by row whatever their order in the file."""
        if self.by_column:
            columns = [self._read_column(column, first, last) for column in range(math.prod(self.row_shape))]
            return np.stack(columns, axis=1).tobytes()
        begin = self.start + first * self.row_bytes
        return source.read_range(self.path, begin, begin + (last - first) * self.row_bytes)

    def _read_column(self, column: int, first: int, last: int) -> np.ndarray:
        begin = self.start + (column * self.length + first) * self.dtype.itemsize
        data = source.read_range(self.path, begin, begin + (last - first) * self.dtype.itemsize)
        return np.frombuffer(data, self.dtype)

    def view(self, data: bytes) -> np.ndarray:
        """The rows in `data`."""
        return np.frombuffer(data, self.dtype).reshape(-1, *self.row_shape)

    def read(self, first: int, last: int) -> np.ndarray:
        """Rows `first` to `last`."""
        return self.view(self.read_bytes(first, last))


def open_npy(path: str, what: str) -> FlatFile:
    """The array in a `.npy` file; `what` it is, for the errors.

    Raises:
        InputError: it is no `.npy` file of integers, or its size is not what its header says.
    """
    size = source.size_bytes(path)
    with source.open_binary(path, decompress=False) as handle:
        head = handle.read(_HEADER_BYTES)
    try:
        dtype, start, shape, by_column = parse_header(head)
    except ValueError as error:
        reason = recognised(head) or str(error)
        raise InputError(f"input {path} is not a readable .npy file ({reason}); {what} was needed") from error
    if not shape or not np.issubdtype(dtype, np.integer) or (by_column and len(shape) > 2):
        order = " in Fortran order" if by_column else ""
        raise InputError(f"input {path} holds {dtype} of shape {list(shape)}{order}; needed integers: {what}")
    file = FlatFile(path, dtype, start, shape[0], shape[1:], by_column)
    _check_size(file, size)
    return file


def open_headerless(path: str, dtype: np.dtype, row_shape: tuple[int, ...] = (), length: int | None = None) -> FlatFile:
    """Numbers without a header: as many rows as the file has bytes for, or `length`.

    Raises:
        InputError: the size is no multiple of a row, or not `length` rows.
    """
    size = source.size_bytes(path)
    if size is None:
        raise InputError(f"input {path}: its server does not say how large it is; copy it to a disk first")
    file = FlatFile(path, np.dtype(dtype), 0, 0, row_shape)
    if length is None and size % file.row_bytes:
        raise InputError(f"input {path} holds {size:,} bytes, needed a multiple of {file.row_bytes}; it is cut off")
    file = FlatFile(path, file.dtype, 0, size // file.row_bytes if length is None else length, row_shape)
    _check_size(file, size)
    return file


def is_npy(path: str) -> bool:
    """Whether the file begins as a `.npy` does, whatever its name."""
    with source.open_binary(path, decompress=False) as handle:
        return handle.read(len(_MAGIC)) == _MAGIC


def _check_size(file: FlatFile, size: int | None) -> None:
    needed = file.start + file.length * file.row_bytes
    if size is not None and size != needed:
        shape = [file.length, *file.row_shape]
        raise InputError(
            f"input {file.path} holds {size:,} bytes, needed {needed:,} for {file.dtype} of shape {shape}; "
            "it is cut off or damaged"
        )


@functools.lru_cache(maxsize=4096)
def _parse_simple(header: bytes) -> tuple[np.dtype, tuple[int, ...], bool] | None:
    match = _SIMPLE_HEADER.match(header)
    if match is None:
        return None
    shape = tuple(int(part) for part in match.groups()[2:] if part is not None)
    return np.dtype(match[1].decode()), shape, match[2] == b"True" and len(shape) > 1


def parse_header(data: bytes) -> tuple[np.dtype, int, tuple[int, ...], bool]:
    """(dtype, where the numbers begin, shape, whether in Fortran order) of a `.npy` file that begins with `data`.

    Raises:
        ValueError: it is none, or holds Python objects.
    """
    if data[:8] == _MAGIC + b"\x01\x00":  # version 1: what numpy writes for arrays of numbers
        start = 10 + int.from_bytes(data[8:10], "little")
        simple = _parse_simple(data[10:start])
        if simple is not None:
            return simple[0], start, *simple[1:]
    if data[:6] != _MAGIC or data[6:8] not in (b"\x01\x00", b"\x02\x00", b"\x03\x00"):
        raise ValueError("it does not begin as one")
    begin = 10 if data[6] == 1 else 12
    start = begin + int.from_bytes(data[8:begin], "little")
    try:  # numpy's own parser lets errors of the tokenizer through
        header = ast.literal_eval(data[begin:start].decode("utf-8").strip())
        dtype, fortran_order, shape = np.dtype(header["descr"]), header["fortran_order"], header["shape"]
    except (SyntaxError, TypeError, KeyError, MemoryError, RecursionError) as error:
        raise ValueError(f"its header is damaged: {error}") from error
    if not isinstance(shape, tuple) or not all(type(side) is int and side >= 0 for side in shape):
        raise ValueError(f"its header is damaged: shape {shape!r}")
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    return dtype, start, shape, bool(fortran_order) and len(shape) > 1


def npy_from_bytes(data: bytes) -> np.ndarray:
    """The array in the bytes of a `.npy` file, without a copy.

    Raises:
        ValueError: it is none, or not all of it.
    """
    dtype, start, shape, by_column = parse_header(data)
    count = math.prod(shape)
    if len(data) - start != count * dtype.itemsize:
        raise ValueError(f"{len(data) - start:,} bytes of numbers, needed {count * dtype.itemsize:,}")
    return np.frombuffer(data, dtype, count, start).reshape(shape, order="F" if by_column else "C")
