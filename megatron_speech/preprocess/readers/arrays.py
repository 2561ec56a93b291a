"""Many samples' codes in one array, and where each begins.

A code array with offsets is three files with one name, in one folder:

    X.codes.npy      integers [frames] or [frames, codebooks]
    X.offsets.npy    integers [N + 1]: sample i is frames offsets[i] to offsets[i + 1]; from 0 to the last frame
    X.jsonl          N rows with the samples' fields in the same order; or X.jsonl.gz, .jsonl.zst, .parquet; or none

A vectorised folder, as Inworld's tools write it, has such three files for each split (`train`, `val`), or for each
split and rank:

    S_codes.npy        int32 without a header, end to end
    S_codes_index.npy  integers [N]: where each sample begins
    S_samples.jsonl    N rows
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_speech.errors import InputError
from megatron_speech.preprocess.readers import source
from megatron_speech.preprocess.readers.base import BATCH_ROWS, Row, RowBatch, RowReader
from megatron_speech.preprocess.readers.flat import FlatFile, is_npy, open_headerless, open_npy
from megatron_speech.preprocess.readers.jsonl import JsonlReader, JsonlStream
from megatron_speech.preprocess.readers.parquet import ParquetReader
from megatron_speech.preprocess.readers.pretraining import CODES_ENDING

# Rows are handed out in smaller batches where their arrays are longer than this together.
ARRAY_BATCH_BYTES = 32 << 20

METADATA = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")

_BOUNDARIES_AT_A_TIME = 1 << 20

# Inworld's names of what has another name here; a name of ours that is there wins.
_INWORLD_FIELDS = (("id", "sample_id"), ("dataset_name", "dataset_source"))
_VECTORISED = re.compile(r"(?P<split>.+)_codes(?P<rank>_\d+)?\.npy")


@dataclass(frozen=True)
class NumberedRows:
    """Rows without fields; `first` is the number of the first one, from 1."""

    path: str
    first: int
    rows: int

    def read(self) -> list[Row]:
        """The rows."""
        return [Row(self.first + i, {}) for i in range(self.rows)]


@dataclass(frozen=True)
class ArrayBatch:
    """Rows of another batch, each with its part of an array as the field `field`."""

    inner: RowBatch
    skip: int  # rows of `inner` before the first one
    file: FlatFile
    bounds: np.ndarray  # int64 [rows + 1]: frames of the array
    data: bytes | None = None  # the frames, where a worker could not read them itself
    field: str = "codes"
    eod: int | None = None  # a last id that is taken off
    inworld: bool = False

    @property
    def path(self) -> str:
        """The file of the rows' other fields."""
        return self.inner.path

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.bounds) - 1

    def read(self) -> list[Row]:
        """Read both."""
        first, last = int(self.bounds[0]), int(self.bounds[-1])
        block = self.file.view(self.data) if self.data is not None else self.file.read(first, last)
        if self.field == "text_ids" and self.file.dtype.itemsize < 4:
            block = block.astype(np.int32)
        ends = (self.bounds - first).tolist()
        if self.eod is not None:
            ends_at_eod = block[np.maximum(self.bounds[1:] - first - 1, 0)] == self.eod if len(block) else None
        rows = list(self.inner.read())[self.skip : self.skip + self.rows]
        for i, (row, (begin, end)) in enumerate(zip(rows, itertools.pairwise(ends), strict=True)):
            if self.eod is not None:
                if end > begin and ends_at_eod is not None and ends_at_eod[i]:
                    end -= 1
                else:
                    row.notices = ("text_ids_without_eod",)
            if self.inworld:
                _translate(row)
            # The array is what counts: a path beside it would be a second, possibly other, answer.
            row.fields.pop("codes_path", None)
            row.fields.pop("code_offset", None)
            row.fields[self.field] = block[begin:end]
        return rows


def _translate(row: Row) -> None:
    for theirs, ours in _INWORLD_FIELDS:
        if theirs in row.fields and row.fields.get(ours) is None:
            row.fields[ours] = row.fields.pop(theirs)
    if row.fields.get("language") == "unknown":  # their value for a language that is not given
        del row.fields["language"]


class Bounds:
    """Where each row's frames lie in an array of `frames`: row i from bound i to bound i + 1."""

    def __init__(self, file: FlatFile, rows: int, frames: int) -> None:
        self.file, self.rows, self.frames = file, rows, frames
        self._first = 0
        self._known = np.zeros(0, np.int64)

    def between(self, first: int, last: int) -> np.ndarray:
        """Bounds of rows `first` to `last`, int64 [last - first + 1]."""
        if first < self._first or last + 1 > self._first + len(self._known):
            end = max(min(first + _BOUNDARIES_AT_A_TIME, self.rows) + 1, last + 1)
            self._known = self._read(first, end)
            self._first = first
        return self._known[first - self._first : last + 1 - self._first]

    def _read(self, first: int, end: int) -> np.ndarray:
        values = self.file.read(first, min(end, self.file.length)).astype(np.int64)
        return values if end <= self.file.length else np.append(values, self.frames)

    def check(self) -> None:
        """Look at all of them.

        Raises:
            InputError: they do not begin at 0, run backwards, or do not end where the array ends.
        """
        previous = 0
        for first in range(0, self.rows + 1, _BOUNDARIES_AT_A_TIME):
            values = self._read(first, min(first + _BOUNDARIES_AT_A_TIME, self.rows + 1))
            if first == 0 and values[0] != 0:
                raise InputError(
                    f"input {self.file.path} begins at frame {values[0]:,}, needed 0: the frames before have no sample"
                )
            steps = np.diff(values, prepend=previous)
            if (steps < 0).any():
                at = int(np.argmax(steps < 0))
                raise InputError(
                    f"input {self.file.path} runs backwards at row {first + at + 1:,} (from frame "
                    f"{values[at] - steps[at]:,} to {values[at]:,}), so that samples overlap; recreate it"
                )
            previous = int(values[-1])
        if previous != self.frames:
            raise InputError(
                f"input {self.file.path} ends at frame {previous:,}, but the array has {self.frames:,}; "
                "they are not of one conversion, or one of them is cut off"
            )


class ArrayReader:
    """Rows of a reader, each with its part of an array. The files are checked when rows are first read."""

    def __init__(
        self,
        codes: str,
        bounds: str,
        metadata: str | None,
        *,
        headerless: bool = False,
        inworld: bool = False,
    ) -> None:
        self.path = metadata or bounds
        self.files: tuple[str, ...] = tuple(path for path in (codes, bounds, metadata) if path is not None)
        self._codes, self._bounds, self._headerless, self._inworld = codes, bounds, headerless, inworld
        self._inner: RowReader | None = None if metadata is None else _metadata_reader(metadata)
        self._open: tuple[FlatFile, Bounds] | None = None

    def _opened(self) -> tuple[FlatFile, Bounds]:
        if self._open is None:
            headerless = self._headerless and not is_npy(self._codes)
            file = open_headerless(self._codes, np.dtype("<i4")) if headerless else open_npy(self._codes, "codes")
            if len(file.row_shape) > 1:
                shape = [file.length, *file.row_shape]
                raise InputError(f"input {self._codes} is of shape {shape}, needed [frames] or [frames, codebooks]")
            index = open_npy(self._bounds, "the frame at which each sample begins")
            if index.row_shape:
                raise InputError(f"input {self._bounds} has {1 + len(index.row_shape)} dimensions, needed 1")
            rows = index.length if self._inworld else index.length - 1
            if rows < 1:
                raise InputError(f"input {self._bounds} holds no rows; recreate it, or leave it out")
            bounds = Bounds(index, rows, file.length)
            bounds.check()
            if self._inner is not None and self._inner.known_rows is not None:
                self._compare(rows, self._inner.known_rows)
            self._open = file, bounds
        return self._open

    def _compare(self, rows: int, found: int) -> None:
        if rows != found:
            raise InputError(
                f"input {self.path} holds {found:,} rows, but {self._bounds} is of {rows:,}; "
                "they must be of the same samples in the same order"
            )

    @property
    def known_rows(self) -> int:
        """Number of rows."""
        return self._opened()[1].rows

    rows = known_rows

    def batches(self, start: int, stop: int | None = None) -> Iterator[RowBatch]:
        """Rows `start` to `stop` (from 0), in order."""
        file, bounds = self._opened()
        last = bounds.rows if stop is None else min(stop, bounds.rows)
        # Read beyond the last row too: there must be none.
        inner = self._numbered(start, last) if self._inner is None else self._inner.batches(start, stop)
        position = start
        for batch in inner:
            if position + batch.rows > bounds.rows:
                self._compare(bounds.rows, position + batch.rows)
            for skip, part in cut(bounds.between(position, position + batch.rows), file.row_bytes):
                data = None if file.is_local else file.read_bytes(int(part[0]), int(part[-1]))
                yield ArrayBatch(batch, skip, file, part, data, inworld=self._inworld)
            position += batch.rows
        if position < last:
            self._compare(bounds.rows, position)

    def _numbered(self, start: int, stop: int) -> Iterator[RowBatch]:
        for first in range(start, stop, BATCH_ROWS):
            yield NumberedRows(self.path, first + 1, min(BATCH_ROWS, stop - first))


def cut(bounds: np.ndarray, row_bytes: int) -> Iterator[tuple[int, np.ndarray]]:
    """(rows before, bounds) of groups of rows whose arrays are small together; a long one is alone."""
    limit = max(ARRAY_BATCH_BYTES // row_bytes, 1)
    if bounds[-1] - bounds[0] <= limit:
        yield 0, bounds
        return
    first, rows = 0, len(bounds) - 1
    while first < rows:
        last = int(np.searchsorted(bounds, bounds[first] + limit, side="right")) - 1
        last = min(max(last, first + 1), rows)
        yield first, bounds[first : last + 1]
        first = last


def _metadata_reader(path: str) -> RowReader:
    if path.endswith(".parquet"):
        return ParquetReader(path)
    if source.local_path(path) is None or source.is_compressed(path):
        return JsonlStream(path)
    return JsonlReader(path)


def offsets_reader(path: str) -> ArrayReader:
    """The reader of `X.offsets.npy` (or `X.codes.npy`) and the files beside it.

    Raises:
        InputError: one of the files is missing, or the rows are there twice.
    """
    base = path.removesuffix(".npy").removesuffix(".offsets").removesuffix(".codes")
    codes, offsets = f"{base}.codes.npy", f"{base}.offsets.npy"
    for needed in (codes, offsets):
        if not source.exists(needed):
            raise InputError(f"input {path} needs {needed} beside it, which does not exist")
    found = [base + ending for ending in METADATA if source.exists(base + ending)]
    if len(found) > 1:
        raise InputError(f"input {path} has its rows twice ({' and '.join(found)}); leave one of them")
    return ArrayReader(codes, offsets, found[0] if found else None)


def vectorised_readers(folder: str, names: list[str], only: str | None = None) -> list[RowReader]:
    """The readers of a vectorised folder with the files `names`, split by split; `only` names one codes file.

    Where a split's shards were merged, the merged files are read and the shards are not: they hold the same.

    Raises:
        InputError: a codes file has no index or no rows.
    """
    there = set(names)
    if only is None:  # pretraining streams have no samples; one that is wanted is named
        names = [name for name in names if not name.endswith(CODES_ENDING)]
    splits: dict[str, list[tuple[int, str]]] = {}
    for name in names if only is None else [only]:
        match = _VECTORISED.fullmatch(name)
        if match is not None:
            rank = match["rank"]
            splits.setdefault(match["split"], []).append((-1 if rank is None else int(rank[1:]), rank or ""))
    readers: list[RowReader] = []
    for split, ranks in sorted(splits.items()):
        ranks.sort()
        for _, rank in ranks[:1] if ranks[0][0] < 0 else ranks:
            files = [f"{split}_codes{rank}.npy", f"{split}_codes_index{rank}.npy", f"{split}_samples{rank}.jsonl"]
            missing = [name for name in files if name not in there]
            if missing:
                raise InputError(
                    f"input {folder}: {files[0]} needs {' and '.join(missing)} beside it; "
                    f"restore them, or name the codes files to read, such as {source.join(folder, 'train_codes.npy')}"
                )
            codes, index, samples = (source.join(folder, name) for name in files)
            readers.append(ArrayReader(codes, index, samples, headerless=True, inworld=True))
    return readers


def is_vectorised(names: list[str]) -> bool:
    """Whether a folder with these files is a vectorised one."""
    return any(re.fullmatch(r".+_codes_index(_\d+)?\.npy", name) for name in names)
