"""Parquet files. A column `codes` of lists (of lists) of integers stays numpy: it never becomes Python integers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megatron_speech.errors import InputError
from preprocess.readers.base import BATCH_ROWS, Row, RowRejected

CODES = "codes"


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
        codes = _code_arrays(self.table.column(CODES)) if CODES in names else None
        plain = self.table.select([name for name in names if name != CODES]).to_pylist()
        result = []
        for i, cells in enumerate(plain):
            fields = {name: cell for name, cell in cells.items() if cell is not None}
            if codes is not None and codes[i] is not None:
                fields[CODES] = codes[i]
            result.append(Row(self.first + i, fields, _not_finite(fields)))
        return result


def _not_finite(fields: dict[str, Any]) -> RowRejected | None:
    for name, cell in fields.items():
        if isinstance(cell, float) and not math.isfinite(cell):
            return RowRejected("not_finite", f"field {name} is {cell}; leave it empty")
    return None


def _code_arrays(column: pa.Array) -> list[np.ndarray | None]:
    """Each row's codes: [T] of a list column, [T, K] of a list of lists with equal lengths, else an object array."""
    if not _is_list(column.type):
        # Not codes: the code checks refuse it row by row, with its own name.
        return [None if not cell.is_valid else np.asarray(cell.as_py(), dtype=object) for cell in column]
    result: list[np.ndarray | None] = []
    for cell in column:
        if not cell.is_valid:
            result.append(None)
        elif _is_list(column.type.value_type):
            result.append(_grid(cell.values))
        else:
            result.append(cell.values.to_numpy(zero_copy_only=False))
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
    """A `.parquet` file, decoded batch by batch."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self.rows = pq.ParquetFile(path).metadata.num_rows
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"input {path} is not a readable parquet file: {error}") from error

    def batches(self, start: int, stop: int) -> Iterator[ParquetBatch]:
        """Rows `start` to `stop` (from 0), in order; row groups outside are not read."""
        file = pq.ParquetFile(self.path)
        position = 0
        groups: list[int] = []
        first_row = 0
        for group in range(file.metadata.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if position < stop and position + size > start:
                if not groups:
                    first_row = position
                groups.append(group)
            position += size
        try:
            for batch in file.iter_batches(batch_size=BATCH_ROWS, row_groups=groups):
                first, last = max(start - first_row, 0), min(stop - first_row, batch.num_rows)
                if first < last:
                    yield ParquetBatch(self.path, first_row + first + 1, batch.slice(first, last - first))
                first_row += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"input {self.path} cannot be read after row {first_row:,}: {error}") from error
