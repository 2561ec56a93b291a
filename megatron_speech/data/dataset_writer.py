"""Write a whole dataset: ids, index, documents table, rejected rows and manifest, all of them or none.

Everything is first written into a folder `.P.partial` beside P, which a lock guards. The files are then renamed
into place, the manifest last; a dataset without its manifest is refused by the reader. What a killed run left in
the folder is removed by the next one.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_speech.data.documents_table import DocumentsTableWriter
from megatron_speech.data.indexed import IndexedDatasetWriter, file_of
from megatron_speech.data.manifest import FileEntry, Manifest, write_manifest
from megatron_speech.errors import InputError
from megatron_speech.files import fsync_path, prepare_output_directory, sha256_file

BIN, IDX, DOCUMENTS, MANIFEST, REJECTED = ".bin", ".idx", ".docs.parquet", ".manifest.json", ".rejected.jsonl"


class DatasetWriter:
    """Collect documents and put the finished dataset in place.

    A context manager. Making one checks that the output can be written; :meth:`finish` puts it in place; leaving
    the block without `finish` removes all traces.

    Args:
        prefix: P of the files to write. What lies there is replaced at the end, not before.
        dtype: dtype of the ids on disk.

    Raises:
        InputError: the output cannot be written, or another process is writing it.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: Any) -> None:
        self.prefix = Path(prefix)
        if os.fspath(prefix).endswith("/") or not self.prefix.name:
            raise InputError(f"output prefix {prefix} names a folder; name a prefix in it, such as {prefix}/train")
        prepare_output_directory(self.prefix.parent)
        for suffix in (BIN, IDX, DOCUMENTS, MANIFEST, REJECTED):
            if file_of(prefix, suffix).is_dir():
                raise InputError(f"cannot write {file_of(prefix, suffix)}: a folder of that name exists; remove it")
        self.folder = self.prefix.parent / f".{self.prefix.name}.partial"
        self._lock = _claim(self.folder, self.prefix)
        self._ids = IndexedDatasetWriter(self.folder / "ids", dtype)
        self._table = DocumentsTableWriter(self.folder / "docs.parquet")
        self._rejected = open(self.folder / "rejected.jsonl", "w", encoding="utf-8")
        self._rejected_rows = 0

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ids.discard()
        self._rejected.close()
        with suppress(OSError, pa.ArrowException):  # its file is about to go
            self._table.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)

    def add(self, flat: np.ndarray, lengths: np.ndarray, table: pa.RecordBatch) -> None:
        """Append documents: ids end to end, ids per document, and one row each of the documents table."""
        self._ids.add_many(flat, lengths)
        self.add_rows(table)

    def add_raw(self, data: bytes | memoryview) -> None:
        """Append ids in their form on disk; lengths and rows follow by :meth:`add_lengths` and :meth:`add_rows`."""
        self._ids.add_raw(data)

    def add_lengths(self, lengths: np.ndarray) -> None:
        """Lengths of documents appended by :meth:`add_raw`."""
        self._ids.add_lengths(lengths)

    def add_rows(self, table: pa.RecordBatch) -> None:
        """Rows of the documents table, one per document."""
        try:
            self._table.add(table)
        except OSError as error:
            raise self._write_error(error) from error

    def add_rejected(self, rows: Iterable[dict[str, Any]]) -> None:
        """Rows for `P.rejected.jsonl`."""
        for row in rows:
            self._rejected.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._rejected_rows += 1

    def add_rejected_lines(self, path: Path) -> None:
        """All lines of another dataset's rejected rows."""
        with open(path, encoding="utf-8") as handle:
            for line in handle:
                self._rejected.write(line)
                self._rejected_rows += 1

    @property
    def documents(self) -> int:
        """Documents added so far."""
        return self._ids.documents

    @property
    def tokens(self) -> int:
        """Ids added so far."""
        return self._ids.tokens

    def finish(self, manifest: Manifest) -> Manifest:
        """Put the dataset in place, with `manifest` completed by what was written (documents, tokens, files)."""
        try:
            self._table.close()
            self._rejected.flush()
            os.fsync(self._rejected.fileno())
        except OSError as error:
            raise self._write_error(error) from error
        written = self._ids.finalize()
        if written.documents != self._table.rows:
            raise ValueError(f"{written.documents} documents, but {self._table.rows} rows of the documents table")
        table_path = self.folder / "docs.parquet"
        fsync_path(table_path)
        entry = FileEntry(bytes=table_path.stat().st_size, sha256=sha256_file(table_path))
        manifest = manifest.model_copy(
            update={
                "documents": written.documents,
                "tokens": written.tokens,
                "files": {BIN: written.bin, IDX: written.idx, DOCUMENTS: entry},
            }
        )
        write_manifest(self.folder / "manifest.json", manifest)
        self._put_in_place()
        return manifest

    def _put_in_place(self) -> None:
        # Without its manifest a dataset is none: an interruption between two renames cannot pass for a whole one.
        file_of(self.prefix, MANIFEST).unlink(missing_ok=True)
        moves = [("ids.bin", BIN), ("ids.idx", IDX), ("docs.parquet", DOCUMENTS)]
        if self._rejected_rows:
            moves.append(("rejected.jsonl", REJECTED))
        else:
            file_of(self.prefix, REJECTED).unlink(missing_ok=True)
        for name, suffix in [*moves, ("manifest.json", MANIFEST)]:
            os.replace(self.folder / name, file_of(self.prefix, suffix))
        fsync_path(self.prefix.parent)

    def _write_error(self, error: OSError) -> InputError:
        return InputError(f"cannot write {self.prefix}: {error.strerror or error}; nothing was kept of it")


def _claim(folder: Path, prefix: Path) -> int:
    """Make `folder` empty and ours; returns the descriptor that holds the lock."""
    folder.mkdir(exist_ok=True)
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            os.close(lock)
            raise InputError(
                f"another process is writing {prefix} (it holds {folder / 'lock'}); wait for it, or name another output"
            ) from error
        # A file system without locks (some network ones): nothing tells two writers apart, the renames still do.
    if os.fstat(lock).st_nlink == 0:  # it finished, and took the folder with it, while we were looking
        os.close(lock)
        return _claim(folder, prefix)
    for name in os.listdir(folder):
        if name != "lock":
            (folder / name).unlink() if not (folder / name).is_dir() else shutil.rmtree(folder / name)
    return lock
