"""An index of the whole input, which some choices need: kept on disk as it grows, so that a killed one resumes.

Every row leaves its keys (a few numbers, one file per kind) and a record (what a reference to the row needs of it) in
the work folder. The choices themselves are made from the keys at the end, in seconds, and need not be kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from megatron_speech.console import Progress
from megatron_speech.data.dataset.journal import AppendFile, Commits, JournalError, read_journal, write_journal
from megatron_speech.data.dataset.manifest import FileEntry
from megatron_speech.preprocess.documents import IndexedRows, Records
from megatron_speech.preprocess.references import Keys


@dataclass(frozen=True)
class IndexedInput:
    """Keys of all rows, and where their records lie."""

    keys: Keys
    records: Records


def index_input(
    folder: Path, index: Callable[[int], Generator[IndexedRows, None, None]], rows: int | None, description: str
) -> IndexedInput:
    """Index the input, or resume it, or read the index that is finished already.

    Args:
        folder: of the unfinished work; the caller has checked that its files belong to the same work.
        index: yields the keys and records of all rows from a given one on.
        rows: of the input, for the progress bar; None if not known.
        description: of what is done, for the progress bar.

    Raises:
        OutputError: the disk is full, or fails.
    """
    folder.mkdir(exist_ok=True)
    work = _InputIndex(folder)
    try:
        if not work.done:
            # closing: an error here must end the workers now, not when the generator is collected
            with (
                contextlib.closing(index(work.rows)) as parts,
                Progress(description, total=rows, unit="row", initial=work.rows) as progress,
            ):
                for part in parts:
                    work.add(part)
                    progress.update(len(part.keys))
                    if work.commits.due():
                        work.commit(done=False)
            work.commit(done=True)
        return work.result()
    finally:
        work.close()


class _InputIndex:
    """The files of an index that is being built."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows = 0
        self.done = False
        self.commits = Commits()
        self._dtypes: dict[str, str] = {}
        self._files: dict[str, AppendFile] = {}
        names = ["records", "sizes", *(f"keys.{field.name}" for field in fields(Keys))]
        saved = None
        with contextlib.suppress(JournalError):  # damaged: started again, which costs less than the conversion
            saved = read_journal(folder)
            self._open(names, saved)
        if not self._files:
            saved = None
            self._open(names, None)
        if saved is not None:
            self.rows, self.done, self._dtypes = saved["rows"], saved["done"], saved["dtypes"]

    def _open(self, names: Iterable[str], saved: dict[str, Any] | None) -> None:
        opened: dict[str, AppendFile] = {}
        try:
            for name in names:
                kept = FileEntry(**saved["files"][name]) if saved is not None else None
                opened[name] = AppendFile(self.folder / name, kept)
        except BaseException:
            for file in opened.values():
                file.abandon()
            raise
        self._files = opened

    def add(self, part: IndexedRows) -> None:
        for field in fields(Keys):
            values = getattr(part.keys, field.name)
            self._dtypes[field.name] = values.dtype.str
            self._files[f"keys.{field.name}"].write(np.ascontiguousarray(values))
        self._files["records"].write(b"".join(part.records))
        self._files["sizes"].write(np.array([len(record) for record in part.records], dtype=np.int64))
        self.rows += len(part.keys)

    def commit(self, *, done: bool) -> None:
        if done and not self.done:
            self._files["records"].write(b"\0")  # an empty file cannot be mapped
        files = {name: file.sync().model_dump() for name, file in self._files.items()}
        write_journal(self.folder, {"rows": self.rows, "done": done, "dtypes": self._dtypes, "files": files})
        self.done = done
        self.commits.done()

    def result(self) -> IndexedInput:
        offsets = self.folder / "offsets.npy"
        sizes = np.fromfile(self.folder / "sizes", dtype=np.int64)
        np.save(offsets, np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)]))
        keys = Keys(
            **{
                field.name: np.fromfile(self.folder / f"keys.{field.name}", dtype=self._dtypes[field.name])
                for field in fields(Keys)
            }
        )
        return IndexedInput(keys, Records(self.folder / "records", offsets))

    def close(self) -> None:
        for file in self._files.values():
            file.abandon()
