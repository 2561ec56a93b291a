"""`P.docs.parquet`: one row per document, in the order of the documents."""

from __future__ import annotations

import contextlib
import itertools
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_speech.data.dataset.journal import AppendFile
from megatron_speech.data.dataset.split import name_hash, split_names
from megatron_speech.errors import InputError

SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("source_id", pa.string()),
        ("segment_order", pa.int64()),
        ("start_time", pa.float64()),  # seconds within the source
        ("end_time", pa.float64()),
        ("speaker_id", pa.string()),
        ("language", pa.string()),
        ("dataset_source", pa.string()),
        ("task", pa.string()),
        ("transcript_native", pa.string()),
        ("transcript_romanized", pa.string()),
        ("code_len", pa.int32()),  # frames of the target
        ("audio_tokens", pa.int32()),  # all of the document's, a reference included
        ("text_tokens", pa.int32()),
        ("tokens", pa.int32()),
        ("target_tokens", pa.int32()),  # after the SFT prompt
        ("duration_seconds", pa.float64()),  # of the target
        ("reference_sample_id", pa.string()),  # the reference of a cloning document, the prompt of a continuation
        ("reference_source_id", pa.string()),  # its source: a held-out one keeps the document out of training
        ("codec_hash", pa.string()),
        ("tokenizer_version", pa.string()),
        ("normalization_version", pa.string()),
        ("checksum", pa.string()),  # of the target's codes: `code_checksum`
        ("extra", pa.string()),  # fields of the input row that have no column of their own, as a JSON object
        ("split_hash", pa.uint64()),  # `split.name_hash` of source_id, or of sample_id where that is empty
        ("reference_split_hash", pa.uint64()),  # of reference_source_id; null where nothing is quoted
        ("crc32", pa.uint32()),  # of the document's bytes in `.bin`
    ]
)

# Fixed, so that the bytes depend neither on how rows arrive nor on how a dataset was put together from shards.
ROWS_PER_GROUP = 1 << 16


def reference_split_hashes(source_id: pa.Array) -> pa.Array:
    """uint64 [D]: `split.name_hash` of the quoted source, null where nothing is quoted."""
    if source_id.null_count == len(source_id):
        return pa.nulls(len(source_id), pa.uint64())
    return pa.array(name_hash(source_id), mask=source_id.is_null().to_numpy(zero_copy_only=False))


def document_checksums(data: bytes | memoryview, lengths: np.ndarray, itemsize: int) -> list[int]:
    """CRC-32 of each document's bytes as they lie in `.bin`: shows which document is damaged.

    Args:
        data: the documents end to end, little endian.
        lengths: int [D], ids per document.
        itemsize: bytes per id.
    """
    view = memoryview(data).cast("B")
    edges = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)]) * itemsize
    ends = edges.tolist()
    return [zlib.crc32(view[start:end]) for start, end in itertools.pairwise(ends)]


def derive_columns(table: pa.RecordBatch, ids: np.ndarray, lengths: np.ndarray) -> pa.RecordBatch:
    """`table` with the columns that follow from its names and from the documents' ids (in the dtype on disk)."""
    derived = {
        "split_hash": pa.array(name_hash(split_names(pa.Table.from_batches([table])))),
        "reference_split_hash": reference_split_hashes(table["reference_source_id"]),
        "crc32": pa.array(document_checksums(ids.data, lengths, ids.dtype.itemsize), pa.uint32()),
    }
    columns = [derived.get(field.name, table[field.name]) for field in SCHEMA]
    return pa.record_batch(columns, schema=SCHEMA)


class DocumentsTableWriter:
    """Write the table in row groups of a fixed size; holds at most one row group in memory."""

    def __init__(self, path: Path | AppendFile) -> None:
        self.rows = 0
        self._pending: list[pa.RecordBatch] = []
        self._pending_rows = 0
        self._writer = pq.ParquetWriter(path, SCHEMA, compression="zstd")

    def add(self, batch: pa.RecordBatch) -> None:
        """Append rows of `SCHEMA`."""
        self.rows += batch.num_rows
        while batch.num_rows:
            piece = batch.slice(0, ROWS_PER_GROUP - self._pending_rows)
            self._pending.append(piece)
            self._pending_rows += piece.num_rows
            batch = batch.slice(piece.num_rows)
            if self._pending_rows == ROWS_PER_GROUP:
                self._flush()

    def _flush(self) -> None:
        if self._pending_rows:
            # One chunk per column: the encoder's pages would otherwise follow the chunks' borders.
            table = pa.Table.from_batches(self._pending, SCHEMA).combine_chunks()
            self._writer.write_table(table, row_group_size=ROWS_PER_GROUP)
        self._pending, self._pending_rows = [], 0

    def close(self) -> None:
        """Write what is left and the footer."""
        self._flush()
        self._writer.close()


_REMEDY = "recreate the dataset with preprocess/preprocess_data.py"


def _open_table(path: Path, columns: Sequence[str], rows: int, **options: Any) -> pq.ParquetFile:
    file = pq.ParquetFile(path, **options)
    known = file.schema_arrow.names
    for name in columns:
        if name not in known:
            raise InputError(f"{path}: column {name} is missing; found {', '.join(known)}; {_REMEDY}")
    if file.metadata.num_rows != rows:
        found = file.metadata.num_rows
        raise InputError(f"{path}: holds {found:,} rows, needed {rows:,}, one a document; {_REMEDY}")
    return file


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn pyarrow's error about a damaged table into a sentence."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; restore it, or {_REMEDY}") from error
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a readable parquet file: {error}; {_REMEDY}") from error


def document_batches(
    path: Path, columns: Sequence[str], rows: int, *, dictionary: Sequence[str] = (), batch_rows: int = 1 << 19
) -> Iterator[pa.RecordBatch]:
    """Stream `columns` of the table at `path`, whose rows are the `rows` documents, `batch_rows` at a time.

    String columns named in `dictionary` come as dictionary arrays, so that a name costs its index.

    Raises:
        InputError: as :func:`read_documents_table`.
    """
    with (
        _readable(path),
        _open_table(path, columns, rows, read_dictionary=list(dictionary), pre_buffer=False) as file,
    ):
        yield from file.iter_batches(batch_size=batch_rows, columns=list(columns))


def read_documents_table(path: Path, columns: Sequence[str], rows: int) -> pa.Table:
    """Read `columns` (all if empty) of the table at `path`, which has one row for each of `rows` documents.

    Raises:
        InputError: missing, damaged, without such a column, or of another number of rows.
    """
    with _readable(path):
        return _open_table(path, columns, rows, memory_map=True).read(list(columns) or None)
