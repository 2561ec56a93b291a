"""Write a whole dataset: ids, index, documents table, rejected rows and manifest, all of them or none.

Everything is first written into a folder `.P.partial` beside P, which a lock guards. The files are then renamed
into place, the manifest last; a dataset without its manifest is refused by the reader.

The folder holds files that only grow (ids, lengths, rows of the documents table, rejected rows) and a journal of how
far they are whole. Work that was stopped, however it was, resumes from there when the same command is run again:

    writing     batches are added; the journal holds the caller's state
    converted   everything is added; what is left is to encode the table, to write the index and the manifest
    placing     the files are whole under their temporary names; what is left are renames
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_speech.data.dataset.documents_table import SCHEMA, DocumentsTableWriter
from megatron_speech.data.dataset.indexed import file_of
from megatron_speech.data.dataset.indexed_writer import disk_dtype, ids_on_disk, write_index
from megatron_speech.data.dataset.journal import (
    JOURNAL,
    AppendFile,
    Commits,
    JournalError,
    difference,
    output_error,
    plain_json,
    read_journal,
    write_journal,
)
from megatron_speech.data.dataset.manifest import FileEntry, Manifest, write_manifest
from megatron_speech.errors import InputError, OutputError
from megatron_speech.files import fsync_path, prepare_output_directory

logger = logging.getLogger(__name__)

BIN, IDX, DOCUMENTS, MANIFEST, REJECTED = ".bin", ".idx", ".docs.parquet", ".manifest.json", ".rejected.jsonl"

# The files that grow, and what becomes of all files at the end.
GROWING = ("ids.bin", "lengths", "rows.arrow", "rejected.jsonl")
MOVES = {BIN: "ids.bin", IDX: "ids.idx", DOCUMENTS: "docs.parquet", REJECTED: "rejected.jsonl"}

JOURNAL_VERSION = 1
_PENDING_ROWS = 1 << 13  # rows of the table that are written as one piece


class DatasetWriter:
    """Collect documents and put the finished dataset in place.

    A context manager. Making one checks that the output can be written; :meth:`finish` puts it in place; leaving
    the block without `finish` removes all traces, unless the work can be resumed: it has a fingerprint, and it was not
    the input that was refused.

    Args:
        prefix: P of the files to write. What lies there is replaced at the end, not before.
        dtype: dtype of the ids on disk.
        fingerprint: everything that decides the output, JSON-able. With one, unfinished work of the same fingerprint
            is resumed; without one, every run starts over.
        restart: start over all the same.

    Attributes:
        folder: where the unfinished files lie.
        state: what the last :meth:`commit` of the unfinished work was given; None where the work starts over.
        complete: all was added before; only :meth:`finish` is left.
        restart_reason: why unfinished work that was found is not resumed, as a clause; None if there was none.

    Raises:
        InputError: the output cannot be written, or another process is writing it.
    """

    def __init__(
        self,
        prefix: str | os.PathLike[str],
        dtype: Any,
        *,
        fingerprint: Mapping[str, Any] | None = None,
        restart: bool = False,
    ) -> None:
        self.prefix = Path(prefix)
        if os.fspath(prefix).endswith("/") or not self.prefix.name:
            raise InputError(f"output prefix {prefix} names a folder; name a prefix in it, such as {prefix}/train")
        self.dtype = disk_dtype(dtype)
        prepare_output_directory(self.prefix.parent)
        for suffix in (BIN, IDX, DOCUMENTS, MANIFEST, REJECTED):
            if file_of(prefix, suffix).is_dir():
                raise InputError(f"cannot write {file_of(prefix, suffix)}: a folder of that name exists; remove it")
        self.folder = self.prefix.parent / f".{self.prefix.name}.partial"
        self._lock = _claim(self.folder, self.prefix)
        self._fingerprint = None if fingerprint is None else plain_json({**fingerprint, "dtype": self.dtype.name})
        self._files: dict[str, AppendFile] = {}
        self._done = False
        try:
            self._open(restart)
        except BaseException:
            self._abandon()
            if not (self.folder / JOURNAL).exists():
                shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._lock)
            raise

    def _open(self, restart: bool) -> None:
        self.state: Any = None
        self.restart_reason: str | None = None
        self._manifest: Manifest | None = None
        self.documents = self.tokens = self.rows = self.rejected_rows = 0
        self._pending: list[pa.RecordBatch] = []
        self._pending_rows = 0
        self._arrow: pa.RecordBatchStreamWriter | None = None
        self._commits = Commits()
        self.phase = "writing"
        if restart:
            self.restart_reason = "a restart was requested"
        elif self._fingerprint is not None:
            try:
                self._go_on()
                return
            except JournalError as error:
                self.restart_reason = str(error) or None
        self._abandon()
        _clear(self.folder)
        self.phase = "writing"
        self._files = {name: AppendFile(self.folder / name) for name in GROWING}
        if self._fingerprint is not None:
            self._write_journal(None)

    def _go_on(self) -> None:
        """Take up the unfinished work.

        Raises:
            JournalError: there is none (without a message), or it is not of this work, or it is damaged.
        """
        saved = read_journal(self.folder)
        if saved is None:
            raise JournalError
        if saved.get("version") != JOURNAL_VERSION:
            raise JournalError("it was written by another version")
        changed = difference(saved["fingerprint"], self._fingerprint)
        if changed is not None:
            raise JournalError(changed)
        entries = {name: FileEntry(**entry) for name, entry in saved["files"].items()}
        self.phase = saved["phase"]
        self._manifest = None if saved["manifest"] is None else Manifest.model_validate(saved["manifest"])
        if self.phase == "placing":
            self._check_placed()
        else:
            for name in GROWING:  # one by one: those that are open already must be closed if another is damaged
                self._files[name] = AppendFile(self.folder / name, entries[name])
        self.documents, self.tokens, self.rows, self.rejected_rows = (
            saved[name] for name in ("documents", "tokens", "rows", "rejected_rows")
        )
        self.state = saved["state"]

    def _check_placed(self) -> None:
        """All files are there, under the one name or the other."""
        assert self._manifest is not None
        moved = not (self.folder / "manifest.json").exists()
        for suffix, entry in self._manifest.files.items():
            here = self.folder / MOVES[suffix]
            path = file_of(self.prefix, suffix) if moved or not here.exists() else here
            if not path.exists() or path.stat().st_size != entry.bytes:
                raise JournalError(f"{path.name} is missing or of another size")

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._abandon()
        if self._done or not self._worth_keeping(value):
            shutil.rmtree(self.folder, ignore_errors=True)
        elif not isinstance(value, OutputError):
            logger.info("what is done so far is kept in %s; %s", self.folder, _AGAIN)
        os.close(self._lock)
        if isinstance(value, OutputError) and self._fingerprint is not None and not self._done:
            raise OutputError(
                f"{value}; what is done so far is kept in {self.folder}: free some space and run the same command "
                "again, which resumes from there"
            ) from value

    def _worth_keeping(self, value: BaseException | None) -> bool:
        if self._fingerprint is None or value is None:
            return False
        if not isinstance(value, InputError):
            return True
        # Input that is bad stays bad; a disk or network that failed under way need not.
        begun = self.documents > 0 or any(self.folder.glob(f"*/{JOURNAL}"))
        return begun and isinstance(value.__cause__, OSError)

    def _abandon(self) -> None:
        for file in self._files.values():
            file.abandon()
        self._files = {}

    @property
    def complete(self) -> bool:
        """Whether all was added before."""
        return self.phase != "writing"

    # ---- adding

    def add(self, flat: np.ndarray, lengths: np.ndarray, table: pa.RecordBatch) -> None:
        """Append documents: ids end to end, ids per document, and one row each of the documents table.

        A grid of several streams lies row by row: the ids of a step side by side, steps × streams ids in all.

        Raises:
            OutputError: the disk is full, or fails.
        """
        self.add_raw(ids_on_disk(flat, lengths, self.dtype))
        self.add_lengths(lengths)
        self.add_rows(table)

    def add_raw(self, data: bytes | memoryview) -> None:
        """Append ids in their form on disk; lengths and rows follow by :meth:`add_lengths` and :meth:`add_rows`."""
        self.tokens += self._files["ids.bin"].write(data) // self.dtype.itemsize

    def add_lengths(self, lengths: np.ndarray) -> None:
        """Lengths of documents appended by :meth:`add_raw`."""
        self._files["lengths"].write(np.ascontiguousarray(lengths, dtype="<i4"))
        self.documents += len(lengths)

    def add_rows(self, table: pa.RecordBatch) -> None:
        """Rows of the documents table, one per document."""
        self.rows += table.num_rows
        self._pending.append(table)
        self._pending_rows += table.num_rows
        if self._pending_rows >= _PENDING_ROWS:
            self._write_rows()

    def _write_rows(self) -> None:
        if not self._pending_rows:
            return
        if self._arrow is None:  # a schema message begins what every run adds; the reader takes any number of them
            options = pa.ipc.IpcWriteOptions(compression="lz4")
            self._arrow = pa.ipc.new_stream(self._files["rows.arrow"], SCHEMA, options=options)
        self._arrow.write_table(pa.Table.from_batches(self._pending, SCHEMA).combine_chunks())
        self._pending, self._pending_rows = [], 0

    def add_rejected(self, rows: Iterable[dict[str, Any]]) -> None:
        """Rows for `P.rejected.jsonl`."""
        for row in rows:
            self._files["rejected.jsonl"].write((json.dumps(row, ensure_ascii=False) + "\n").encode())
            self.rejected_rows += 1

    def add_rejected_lines(self, path: Path) -> None:
        """All lines of another dataset's rejected rows."""
        with open(path, "rb") as handle:
            for line in handle:
                self._files["rejected.jsonl"].write(line)
                self.rejected_rows += 1

    # ---- the journal

    @property
    def due(self) -> bool:
        """Whether it is time for a :meth:`commit`."""
        return self._fingerprint is not None and self._commits.due()

    def commit(self, state: Any) -> None:
        """Make everything added so far survive a kill, together with `state` of the caller, JSON-able.

        Raises:
            OutputError: the disk is full, or fails.
        """
        if self._fingerprint is not None:
            self._write_journal(state)

    def _write_journal(self, state: Any) -> None:
        self._write_rows()
        files = {name: file.sync().model_dump() for name, file in self._files.items()}
        value = {
            "version": JOURNAL_VERSION,
            "fingerprint": self._fingerprint,
            "phase": self.phase,
            "files": files,
            "documents": self.documents,
            "tokens": self.tokens,
            "rows": self.rows,
            "rejected_rows": self.rejected_rows,
            "manifest": None if self._manifest is None else self._manifest.model_dump(),
            "state": state,
        }
        write_journal(self.folder, value)
        self._commits.done()

    # ---- finishing

    def finish(self, manifest: Manifest | None = None) -> Manifest:
        """Put the dataset in place, with `manifest` completed by what was written (documents, tokens, files).

        Args:
            manifest: of what was added; None where the work is :attr:`complete`: it is the one given before.

        Raises:
            OutputError: the disk is full, or fails.
        """
        if self.phase == "writing":
            if manifest is None:
                raise ValueError("the first finish needs a manifest")
            self._manifest = manifest.model_copy(update={"documents": self.documents, "tokens": self.tokens})
            self._check_steps(manifest.streams)
            if self.documents != self.rows:
                raise ValueError(f"{self.documents} documents, but {self.rows} rows of the documents table")
            self.phase = "converted"
            self.commit(None)
        if self.phase == "converted":
            self._complete_files()
        assert self._manifest is not None
        try:
            self._put_in_place(self._manifest)
        except OSError as error:
            raise output_error(self.prefix, error) from error
        self._done = True
        return self._manifest

    def _check_steps(self, streams: int) -> None:
        if streams == 1 or not self.documents:
            return
        self._files["lengths"].sync()
        left = np.memmap(self.folder / "lengths", dtype="<i4", mode="r") % streams
        if left.any():
            document = int(np.argmax(left != 0))
            raise ValueError(f"document {document} has {left[document]} ids beyond whole steps of {streams} streams")

    def _complete_files(self) -> None:
        assert self._manifest is not None
        self._write_rows()
        entries = {BIN: self._files["ids.bin"].sync(), DOCUMENTS: self._encode_table(), IDX: self._make_index()}
        if self.rejected_rows:
            entries[REJECTED] = self._files["rejected.jsonl"].sync()
        self._manifest = self._manifest.model_copy(
            update={"files": {suffix: entries[suffix] for suffix in sorted(entries)}}
        )
        try:
            write_manifest(self.folder / "manifest.json", self._manifest)
        except OSError as error:
            raise output_error(self.folder / "manifest.json", error) from error
        self.phase = "placing"
        self.commit(None)
        self._abandon()

    def _encode_table(self) -> FileEntry:
        self._files["rows.arrow"].sync()
        file = AppendFile(self.folder / "docs.parquet")
        try:
            table = DocumentsTableWriter(file)
            with pa.memory_map(str(self.folder / "rows.arrow")) as source:
                for batch in _stored_batches(source):
                    table.add(batch)
                table.close()
            if table.rows != self.rows:
                raise ValueError(f"{self.rows} rows were added, but {table.rows} were stored")
            return file.sync()
        finally:
            file.abandon()

    def _make_index(self) -> FileEntry:
        self._files["lengths"].sync()
        file = AppendFile(self.folder / "ids.idx")
        try:
            path = self.folder / "lengths"
            lengths = np.memmap(path, "<i4", "r") if self.documents else np.zeros(0, "<i4")
            total = int(lengths.sum(dtype=np.int64))
            if len(lengths) != self.documents or total != self.tokens:
                raise ValueError(
                    f"{self.tokens} ids of {self.documents} documents were added, but the lengths say {total} of "
                    f"{len(lengths)}"
                )
            write_index(file.write, self.dtype, lengths)
            return file.sync()
        finally:
            file.abandon()

    def _put_in_place(self, manifest: Manifest) -> None:
        """Rename what is not renamed yet. Can be repeated from any point at which it was stopped."""
        if (self.folder / "manifest.json").exists():
            # Without its manifest a dataset is none: an interruption between two renames cannot pass for a whole one.
            file_of(self.prefix, MANIFEST).unlink(missing_ok=True)
            fsync_path(self.prefix.parent)
            for suffix in manifest.files:
                with suppress(FileNotFoundError):  # renamed by a run that was stopped just after
                    os.replace(self.folder / MOVES[suffix], file_of(self.prefix, suffix))
            if REJECTED not in manifest.files:
                file_of(self.prefix, REJECTED).unlink(missing_ok=True)
            fsync_path(self.prefix.parent)
            os.replace(self.folder / "manifest.json", file_of(self.prefix, MANIFEST))
            fsync_path(self.prefix.parent)


_AGAIN = "the same command resumes from there"


def _stored_batches(source: pa.NativeFile) -> Iterable[pa.RecordBatch]:
    """The pieces of the documents table that :meth:`DatasetWriter.add_rows` stored, one at a time."""
    if not source.size():
        return
    reader = pa.ipc.MessageReader.open_stream(source)
    while True:
        try:
            message = reader.read_next_message()
        except StopIteration:
            return
        if message.type == "record batch":
            yield pa.ipc.read_record_batch(message, SCHEMA)


def _claim(folder: Path, prefix: Path) -> int:
    """Make `folder` ours; returns the descriptor that holds the lock."""
    try:
        folder.mkdir(exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise output_error(folder, error) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            os.close(lock)
            raise InputError(
                f"another process is writing {prefix} (it holds {folder / 'lock'}); wait for it, or name another output"
            ) from error
        # A file system without locks (some network ones): two writers are not told apart before the renames.
    if os.fstat(lock).st_nlink == 0:  # it finished, and took the folder with it, while we were looking
        os.close(lock)
        return _claim(folder, prefix)
    return lock


def _clear(folder: Path) -> None:
    """Remove everything but the lock; the journal first, so that half of a clearing is not taken for work."""
    for name in sorted(os.listdir(folder), key=lambda name: name != JOURNAL):
        if name != "lock":
            (folder / name).unlink() if not (folder / name).is_dir() else shutil.rmtree(folder / name)
