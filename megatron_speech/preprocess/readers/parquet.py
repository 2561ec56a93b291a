"""Parquet files. Columns of codes stay numpy: they never become Python integers.

Codes are a column `codes` of lists of integers [T], or of lists of lists [T, K], or a binary column that names what
it holds: `codes_int16`, `codes_uint16` or `codes_int32`, little endian, frame by frame. Pretokenised text is a column
`text_ids` of lists of integers.

Other bytes are not read from the disk, wherever in a column they lie, nor are the samples of decoded recordings; a
notice counts them (`parquet_column:audio.bytes`). Recordings inside the file, as `datasets` of Hugging Face writes them
(`audio`: bytes and path), are named by the row: `wav_path` is the parquet file, `wav_row` the row from 0, `wav_column`
the column; :func:`recording` reads one.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
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
# Columns that hold recordings, as bytes or as a struct of bytes and path, where the file's metadata do not say it.
AUDIO_COLUMNS = ("audio", "wav", "flac", "mp3", "ogg", "opus", "m4a", "speech", "recording", "audio_bytes")

# Columns of text: as bytes they are refused, not left out.
_TEXTS = frozenset(
    "text transcript transcript_native transcript_romanized transcript_code_mixed transcript_tagged sentence "
    "transcription sample_id source_id speaker_id language dataset_source wav_path codes_path codec_hash "
    "checksum".split()
)

_EXACT_DIGITS = 15  # of decimals that a float holds

# Rows of recordings that are read at a time: what a process keeps of them.
_RECORDINGS_AT_A_TIME = 16
_RECORDINGS_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class ColumnPlan:
    """What is read of a file's columns.

    Attributes:
        leaves: paths of the leaf columns that are read.
        notices: of the leaf columns that are not.
        audio: columns of recordings; more than one: nobody says which.
        bytes_leaf: index of the leaf column with the recordings' bytes, where there is one.
        labels: of columns of class labels their names.
    """

    leaves: list[str]
    notices: tuple[str, ...]
    audio: tuple[str, ...] = ()
    bytes_leaf: int | None = None
    labels: dict[str, list[str]] = field(default_factory=dict)


def _leaf_columns(name: str, kind: pa.DataType) -> Iterator[tuple[str, bool]]:
    """(path, whether it is left out) of a column's leaves, in the order in which they lie in the file."""
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if pa.types.is_struct(kind):
        decoded = {"array", "sampling_rate"} <= {child.name for child in kind}
        for child in kind:
            for path, left_out in _leaf_columns(f"{name}.{child.name}", child.type):
                yield path, left_out or (decoded and child.name == "array")
    elif _is_list(kind):
        yield from _leaf_columns(name, kind.value_type)
    elif pa.types.is_map(kind):  # a map has keys and values, or is no map
        entries = [*_leaf_columns(name, kind.key_type), *_leaf_columns(name, kind.item_type)]
        left_out = any(bad for _, bad in entries)
        yield from ((path, left_out) for path, _ in entries)
    elif pa.types.is_dictionary(kind):
        yield name, _is_binary(kind.value_type)
    else:
        yield name, _is_binary(kind)


def _features(schema: pa.Schema) -> dict[str, Any]:
    """What `datasets` of Hugging Face says of the columns; nothing where another tool wrote the file."""
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: value for name, value in features.items() if isinstance(value, dict)}
    return {}


def _holds_recordings(kind: pa.DataType) -> bool:
    """Whether a column can hold them: bytes, a struct with bytes, or one with samples as numbers."""
    if pa.types.is_struct(kind):
        names = {child.name for child in kind}
        return ("bytes" in names and _is_binary(kind.field("bytes").type)) or {"array", "sampling_rate"} <= names
    return _is_binary(kind)


def plan_columns(file: pq.ParquetFile, path: str) -> ColumnPlan:
    """What is read of a file's columns."""
    schema = file.schema_arrow
    features = _features(schema)
    leaves: list[str] = []
    notices: dict[str, None] = {}
    index = 0
    bytes_leaves: dict[str, int] = {}
    for column in schema:
        paths = list(_leaf_columns(column.name, column.type))
        for path, left_out in paths:
            if left_out and column.name not in BINARY_CODES:
                notices[f"parquet_column:{path}"] = None
                if path in (column.name, f"{column.name}.bytes"):
                    bytes_leaves[column.name] = index
            else:
                leaves.append(file.schema.column(index).path)
            index += 1
    if index != file.metadata.num_columns:
        raise InputError(f"input {path} has {file.metadata.num_columns} leaf columns, but its schema tells of {index}")
    can = [column.name for column in schema if _holds_recordings(column.type) and column.name not in BINARY_CODES]
    audio = [name for name in can if features.get(name, {}).get("_type") == "Audio"]
    audio = audio or [name for name in can if name in AUDIO_COLUMNS]
    audio = ["audio"] if "audio" in audio else audio
    labels = {
        name: value["names"]
        for name, value in features.items()
        if value.get("_type") == "ClassLabel" and isinstance(value.get("names"), list)
    }
    bytes_leaf = bytes_leaves.get(audio[0]) if len(audio) == 1 else None
    return ColumnPlan(leaves, tuple(notices), tuple(audio), bytes_leaf, labels)


@dataclass(frozen=True)
class ParquetBatch:
    """Rows that were decoded already; `first` is the number of the first one, from 1.

    Attributes:
        rows: number of rows, which a table without columns does not keep on its way to a worker.
        notices: of columns that are not read.
        labels: names of class labels, by column.
        audio: columns of recordings, where rows are to say where theirs are.
        embedded: whether the recordings' bytes lie in the file.
    """

    path: str
    first: int
    table: pa.RecordBatch
    rows: int
    notices: tuple[str, ...] = ()
    labels: dict[str, list[str]] = field(default_factory=dict)
    audio: tuple[str, ...] = ()
    embedded: bool = False

    def read(self) -> list[Row]:
        """The rows as dicts; an empty cell is a field that is not there."""
        names = self.table.schema.names
        columns: dict[str, list[Any]] = {}
        problems: dict[int, RowRejected] = {}
        for name, column in zip(names, self.table.columns, strict=True):
            if name == TEXT_IDS or (name == CODES and not _is_text(column.type)):
                columns[name] = list_arrays(column)
            elif name in self.labels and pa.types.is_integer(column.type):
                columns[name] = _label_names(column, self.labels[name])
            elif name not in BINARY_CODES and not _is_binary(column.type):
                if pa.types.is_decimal(column.type) and column.type.precision <= _EXACT_DIGITS:
                    column = column.cast(pa.float64())
                columns[name] = column.to_pylist()
                _find_not_finite(name, column, problems)
        for name in BINARY_CODES:
            if name in names:
                lengths = columns.get("code_len", [None] * self.rows)
                columns[CODES] = _binary_arrays(name, self.table.column(name), lengths, problems)
        keys = list(columns)
        result = []
        rows = zip(*columns.values(), strict=True) if columns else itertools.repeat((), self.rows)
        for i, cells in enumerate(rows):
            fields = {key: cell for key, cell in zip(keys, cells, strict=True) if cell is not None}
            result.append(Row(self.first + i, fields, problems.get(i), self.notices))
        if self.audio and "wav_path" not in names:
            self._name_recordings(result)
        return result

    def _name_recordings(self, rows: list[Row]) -> None:
        """Say where each row's recording is: in this file, or beside it."""
        folder = source.folder(self.path)
        file_name = self.path[len(folder) :].removeprefix("/")
        column = self.audio[0] if len(self.audio) == 1 else None
        for row in rows:
            cell = row.fields.get(column) if column is not None else None
            if self.embedded or column is None:
                row.fields |= {"wav_path": file_name, "wav_row": row.number - 1}
                if column is not None:
                    row.fields["wav_column"] = column
            elif isinstance(cell, dict) and isinstance(cell.get("path"), str):
                row.fields["wav_path"] = cell["path"]


def _label_names(column: pa.Array, names: list[str]) -> list[str | None]:
    """Names of class labels; -1 stands for none."""
    labels = column.to_pylist()
    return [None if i is None or not 0 <= i < len(names) else names[i] for i in labels]


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
    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary_decode()
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
    """A `.parquet` file, decoded batch by batch by the parent.

    `recordings`: rows say where in the file, or beside it, their recordings lie.
    """

    def __init__(self, path: str, *, recordings: bool = False) -> None:
        self.path = path
        self.files: tuple[str, ...] = (path,)
        self._recordings = recordings
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
                reason = source.what_is(self.path) or error
                raise InputError(f"input {self.path} is not a readable parquet file: {reason}") from error
            for name in names:
                if name in _TEXTS and _is_binary(schema.field(name).type):
                    raise InputError(
                        f"input {self.path}: column {name} holds bytes, needed text; write it as a string column, "
                        f"table.set_column(i, {name!r}, table[{name!r}].cast('string'))"
                    )
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
            plan = plan_columns(file, self.path)
            position = 0
            # Group by group: reading several at once, Arrow holds more than one of them.
            for group in range(file.metadata.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if position < stop and position + size > start:
                    yield from self._group(file, plan, group, position, start, stop)
                position += size
            if position != self._rows:
                raise InputError(
                    f"input {self.path} has row groups of {position:,} rows in all, but states {self._rows:,}"
                )

    def _group(
        self, file: pq.ParquetFile, plan: ColumnPlan, group: int, position: int, start: int, stop: int
    ) -> Iterator[ParquetBatch]:
        """Rows of a row group whose first one is row `position`, as far as they lie between `start` and `stop`."""
        end = position + file.metadata.row_group(group).num_rows
        audio = plan.audio if self._recordings else ()
        embedded = bool(audio) and not _without_bytes(file, plan, group)
        # Where rows say where their recordings lie, those are not left out.
        notices = tuple(notice for notice in plan.notices if notice.partition(":")[2].split(".")[0] not in audio)
        try:
            for batch in file.iter_batches(batch_size=BATCH_ROWS, row_groups=[group], columns=plan.leaves):
                first, last = max(start - position, 0), min(stop - position, batch.num_rows)
                if first < last:
                    part = batch.slice(first, last - first)
                    number = position + first + 1
                    yield ParquetBatch(self.path, number, part, last - first, notices, plan.labels, audio, embedded)
                position += batch.num_rows
        except ConnectionError:
            raise
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"input {self.path} cannot be read after row {position:,}: {error}") from error
        if position != end:  # Arrow ends without a word where it finds no page
            raise InputError(f"input {self.path} cannot be read after row {position:,}: its row group ends at {end:,}")


def _without_bytes(file: pq.ParquetFile, plan: ColumnPlan, group: int) -> bool:
    """Whether no row of a row group has a recording in the file: all are named by their paths."""
    if plan.bytes_leaf is None:
        return False
    column = file.metadata.row_group(group).column(plan.bytes_leaf)
    found = column.statistics if column.is_stats_set else None
    return found is not None and found.has_null_count and found.null_count == file.metadata.row_group(group).num_rows


def _is_binary(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return (
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or str(kind) == "binary_view"
    )


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or str(kind) == "string_view"


# ---- recordings inside a file


class _Recordings:
    """The recordings of one column of one file, read forwards, a few rows at a time."""

    def __init__(self, path: str, column: str | None) -> None:
        self.path, self.column = path, column
        with source.sentences(path):
            self._handle = source.open_binary(path)
        try:
            self._file = pq.ParquetFile(
                self._handle, page_checksum_verification=True, buffer_size=_RECORDINGS_BUFFER_BYTES
            )
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            reason = source.what_is(path) or error
            raise InputError(f"input {path} is not a readable parquet file: {reason}") from error
        if column is None or column not in self._file.schema_arrow.names:
            found = plan_columns(self._file, path).audio
            several = f"several columns of recordings ({', '.join(found)})" if found else "no column of recordings"
            raise InputError(f"input {path} has {several}; rename the one to read to audio")
        groups = (self._file.metadata.row_group(i).num_rows for i in range(self._file.metadata.num_row_groups))
        self._edges = np.cumsum([0, *groups])
        self._batches: Iterator[pa.RecordBatch] | None = None
        self._first = 0  # row of the file that `_batch` begins with
        self._batch: pa.RecordBatch | None = None

    def close(self) -> None:
        self._batches = self._batch = None
        self._handle.close()

    def cell(self, row: int) -> Any:
        """What the column holds in a row (from 0): bytes, a struct as a dict, or None."""
        if not 0 <= row < self._edges[-1]:
            raise InputError(f"input {self.path} has {self._edges[-1]:,} rows, needed row {row:,}; it was replaced")
        try:
            if self._batch is None or row < self._first or row >= self._edges[self._group_of(self._first) + 1]:
                self._start(row)
            while self._batch is None or row >= self._first + self._batch.num_rows:
                self._next()
            return self._batch.column(0)[row - self._first].as_py()
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            if isinstance(error, ConnectionError):
                raise
            raise InputError(f"input {self.path} cannot be read at row {row:,}: {error}") from error

    def _group_of(self, row: int) -> int:
        return int(np.searchsorted(self._edges, row, side="right")) - 1

    def _start(self, row: int) -> None:
        group = self._group_of(row)
        self._first, self._batch = int(self._edges[group]), None
        self._batches = self._file.iter_batches(
            batch_size=_RECORDINGS_AT_A_TIME, row_groups=[group], columns=[self.column]
        )

    def _next(self) -> None:
        assert self._batches is not None
        done = 0 if self._batch is None else self._batch.num_rows
        batch = next(self._batches, None)
        if batch is None:
            raise InputError(f"input {self.path} cannot be read after row {self._first + done:,}; it is damaged")
        self._first, self._batch = self._first + done, batch


_open_recordings: list[_Recordings] = []  # of this process, one: rows come in the order of the file


def recording(path: str, row: int, column: str | None) -> bytes:
    """The bytes of a recording inside a parquet file.

    The last file stays open and is read forwards: rows in the order of the file are decoded once, and a few of them are
    held at a time. A recording of which only the path is there is read from that path, relative to the file; one that
    is there as numbers (`array`, `sampling_rate`) becomes a wav of floats.

    Args:
        path: the file, or its URL.
        row: from 0.
        column: as the row's field `wav_column` says; None where the file has several columns of recordings.

    Raises:
        InputError: the row has no recording, or the file cannot be read.
    """
    if not _open_recordings or (_open_recordings[0].path, _open_recordings[0].column) != (path, column):
        while _open_recordings:
            _open_recordings.pop().close()
        _open_recordings.append(_Recordings(path, column))
    cell = _open_recordings[0].cell(row)
    if isinstance(cell, dict):
        if cell.get("bytes") is not None:
            cell = cell["bytes"]
        elif cell.get("array") is not None and isinstance(cell.get("sampling_rate"), int):
            return _wav(np.asarray(cell["array"], dtype=np.float32), cell["sampling_rate"])
        elif isinstance(cell.get("path"), str):
            with source.open_binary(source.join(source.folder(path), cell["path"]), decompress=False) as handle:
                return handle.read()
    if not isinstance(cell, bytes):
        raise InputError(f"input {path}: column {column} of row {row:,} (from 0) holds no recording")
    return cell


def _wav(samples: np.ndarray, sample_rate_hz: int) -> bytes:
    """Samples [n] or [channels, n] as a wav of 32-bit floats."""
    import soundfile

    handle = io.BytesIO()
    soundfile.write(handle, samples.T if samples.ndim == 2 else samples, sample_rate_hz, "FLOAT", format="WAV")
    return handle.getvalue()
