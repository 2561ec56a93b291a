"""Parquet files. Columns of codes stay numpy: they never become Python integers.

Codes are a column `codes` of lists of integers [T], or of lists of lists [T, K], or a binary column that names what
it holds: `codes_int16`, `codes_uint16` or `codes_int32`, little endian, frame by frame. Pretokenised text is a column
`text_ids` of lists of integers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megatron_speech.errors import InputError
from megatron_speech.preprocess.readers import source
from megatron_speech.preprocess.readers.base import BATCH_ROWS, Row, RowBatch, RowRejected

CODES = "codes"
TEXT_IDS = "text_ids"
BINARY_CODES: dict[str, np.dtype[Any]] = {
    "codes_int16": np.dtype("<i2"),
    "codes_uint16": np.dtype("<u2"),
    "codes_int32": np.dtype("<i4"),
}


@dataclass(frozen=True)
class ParquetBatch:
    """Rows that were decoded already; `first` is the number of the first one, from 1."""

    path: str
    first: int
    table: pa.RecordBatch

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.table.num_rows

    def read(self) -> list[Row]:
        """The rows as dicts; an empty cell is a field that is not there."""
        names = self.table.schema.names
        columns: dict[str, list[Any]] = {}
        problems: dict[int, RowRejected] = {}
        for name, column in zip(names, self.table.columns, strict=True):
            if name in (CODES, TEXT_IDS):
                columns[name] = list_arrays(column)
            elif name not in BINARY_CODES:
                columns[name] = column.to_pylist()
                _find_not_finite(name, column, problems)
        for name in BINARY_CODES:
            if name in names:
                lengths = columns.get("code_len", [None] * self.rows)
                columns[CODES] = _binary_arrays(name, self.table.column(name), lengths, problems)
        keys = list(columns)
        result = []
        for i, cells in enumerate(zip(*columns.values(), strict=True)):
            fields = {key: cell for key, cell in zip(keys, cells, strict=True) if cell is not None}
            result.append(Row(self.first + i, fields, problems.get(i)))
        return result


def _find_not_finite(name: str, column: pa.Array, problems: dict[int, RowRejected]) -> None:
    if not pa.types.is_floating(column.type):
        return
    finite = pc.is_finite(column)
    if pc.all(finite, skip_nulls=True, min_count=0).as_py():
        return
    for i in np.flatnonzero(pc.invert(finite).fill_null(False).to_numpy(zero_copy_only=False)).tolist():
        problems.setdefault(i, RowRejected("not_finite", f"field {name} is {column[i].as_py()}; leave it empty"))


def list_arrays(column: pa.Array) -> list[np.ndarray | None]:
    """Each row's integers: [T] of a list column, [T, K] of a list of lists with equal lengths, else an object array."""
    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary_decode()
    if not _is_list(column.type):
        # Not codes: the code checks refuse it row by row, with its own name.
        return [None if not cell.is_valid else np.asarray(cell.as_py(), dtype=object) for cell in column]
    if pa.types.is_integer(column.type.value_type) and not pa.types.is_fixed_size_list(column.type):
        values = column.values
        if not values.null_count:
            return _slices(values.to_numpy(), column.offsets.to_numpy(), column)
    result: list[np.ndarray | None] = []
    for cell in column:
        if not cell.is_valid:
            result.append(None)
        elif _is_list(column.type.value_type):
            result.append(_grid(cell.values))
        else:
            result.append(cell.values.to_numpy(zero_copy_only=False))
    return result


def _slices(values: np.ndarray, offsets: np.ndarray, column: pa.Array) -> list[np.ndarray | None]:
    arrays: list[np.ndarray | None] = [values[a:b] for a, b in itertools.pairwise(offsets.tolist())]
    if column.null_count:
        for i in np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False)).tolist():
            arrays[i] = None
    return arrays


def _binary_arrays(
    name: str, column: pa.Array, lengths: list[Any], problems: dict[int, RowRejected]
) -> list[np.ndarray | None]:
    """Little-endian integers of a binary column: [T], or [code_len, K] where code_len says how many frames they are."""
    dtype = BINARY_CODES[name]
    result: list[np.ndarray | None] = []
    for i, (cell, frames) in enumerate(zip(column, lengths, strict=True)):
        buffer = cell.as_buffer() if cell.is_valid else None
        if buffer is None:
            result.append(None)
            continue
        if buffer.size % dtype.itemsize:
            reason = f"field {name} holds {buffer.size:,} bytes, needed a multiple of {dtype.itemsize}"
            problems.setdefault(i, RowRejected("codes_shape", reason))
            result.append(None)
            continue
        codes = np.frombuffer(buffer, dtype)
        if isinstance(frames, int) and frames > 0 and len(codes) > frames and len(codes) % frames == 0:
            codes = codes.reshape(frames, -1)
        result.append(codes)
    return result


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _grid(frames: pa.Array) -> np.ndarray:
    """[T, K] of a list of frames; an array of objects, which no check lets pass, if they differ in length."""
    if not len(frames):
        return np.zeros((0, 0), np.int32)
    lengths = pc.list_value_length(frames)
    if frames.null_count or pc.min(lengths) != pc.max(lengths):
        return np.empty(len(frames), dtype=object)
    return frames.flatten().to_numpy(zero_copy_only=False).reshape(len(frames), lengths[0].as_py())


class ParquetReader:
    """A `.parquet` file, decoded batch by batch by the parent."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.files: tuple[str, ...] = (path,)
        self._rows: int | None = None

    @property
    def known_rows(self) -> int | None:
        """Number of rows; of a remote file only once it was opened."""
        return self._rows if self._rows is not None or source.local_path(self.path) is None else self.rows

    @property
    def rows(self) -> int:
        """Number of rows, as the end of the file says."""
        if self._rows is None:
            with self._open() as file:
                self._rows = file.metadata.num_rows
        return self._rows

    @contextmanager
    def _open(self) -> Iterator[pq.ParquetFile]:
        with source.open_binary(self.path) as handle:
            try:
                file = pq.ParquetFile(handle, page_checksum_verification=True)
                schema = file.schema_arrow
                names = schema.names
            except ConnectionError:
                raise
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                raise InputError(f"input {self.path} is not a readable parquet file: {error}") from error
            if CODES in names and _is_binary(schema.field(CODES).type):
                raise InputError(
                    f"input {self.path}: column codes holds bytes of unknown meaning; "
                    f"rename it to what they are: {', '.join(BINARY_CODES)}"
                )
            given = [name for name in (CODES, *BINARY_CODES) if name in names]
            if len(given) > 1:
                raise InputError(f"input {self.path} has the columns {' and '.join(given)}; needed one column of codes")
            yield file

    def batches(self, start: int, stop: int | None = None) -> Iterator[RowBatch]:
        """Rows `start` to `stop` (from 0), in order; row groups outside are not read."""
        with self._open() as file:
            self._rows = file.metadata.num_rows
            stop = self._rows if stop is None else stop
            position = 0
            # Group by group: reading several at once, Arrow holds more than one of them.
            for group in range(file.metadata.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if position < stop and position + size > start:
                    yield from self._group(file, group, position, start, stop)
                position += size
            if position != self._rows:
                raise InputError(
                    f"input {self.path} has row groups of {position:,} rows in all, but states {self._rows:,}"
                )

    def _group(self, file: pq.ParquetFile, group: int, position: int, start: int, stop: int) -> Iterator[ParquetBatch]:
        """Rows of a row group whose first one is row `position`, as far as they lie between `start` and `stop`."""
        end = position + file.metadata.row_group(group).num_rows
        try:
            for batch in file.iter_batches(batch_size=BATCH_ROWS, row_groups=[group]):
                first, last = max(start - position, 0), min(stop - position, batch.num_rows)
                if first < last:
                    yield ParquetBatch(self.path, position + first + 1, batch.slice(first, last - first))
                position += batch.num_rows
        except ConnectionError:
            raise
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"input {self.path} cannot be read after row {position:,}: {error}") from error
        if position != end:  # Arrow ends without a word where it finds no page
            raise InputError(f"input {self.path} cannot be read after row {position:,}: its row group ends at {end:,}")


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
