"""The look over the whole input that some choices need: kept on disk as it goes, so that a killed one goes on.

Every row leaves its keys (a few numbers, one file per kind) and a record (the row as a reference is made of it) in the
work folder. The choices themselves are made from the keys at the end, in seconds, and need not be kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_speech.data.dataset.journal import AppendFile, Commits, JournalError, read_journal, write_journal
from megatron_speech.data.dataset.manifest import FileEntry
from megatron_speech.preprocess.documents import IndexedRows, Records
from megatron_speech.preprocess.references import Keys


@dataclass(frozen=True)
class Looked:
    """What the pre-pass found: keys of all rows, and where their records lie."""

    keys: Keys
    records: Records


def look_over(
    folder: Path, index: Callable[[int], Generator[IndexedRows, None, None]], rows: int | None, description: str
) -> Looked:
    """Look over the input, or go on with it, or take what a finished look left.

    Args:
        folder: of the unfinished work; whoever owns it has made sure that what lies there is of the same work.
        index: gives the keys and records of all rows from a given one on.
        rows: of the input, for the progress bar; None if not known.
        description: of what is done, for the progress bar.

    Raises:
        OutputError: the disk is full, or fails.
    """
    folder.mkdir(exist_ok=True)
    look = _Look(folder)
    try:
        if not look.done:
            # closing: an error here must end the workers now, not when the generator is collected
            with (
                contextlib.closing(index(look.rows)) as parts,
                tqdm(total=rows, initial=look.rows, unit="row", desc=description, disable=None) as progress,
            ):
                for part in parts:
                    look.add(part)
                    progress.update(len(part.keys))
                    if look.commits.due():
                        look.commit(done=False)
            look.commit(done=True)
        return look.result()
    finally:
        look.close()


class _Look:
    """The files of a pre-pass."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows = 0
        self.done = False
        self.commits = Commits()
        self._dtypes: dict[str, str] = {}
        self._files: dict[str, AppendFile] = {}
        names = ["records", "sizes", *(f"keys.{field.name}" for field in fields(Keys))]
        saved = None
        with contextlib.suppress(JournalError):  # anything amiss: it is cheaper than the conversion, and begins anew
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

    def result(self) -> Looked:
        offsets = self.folder / "offsets.npy"
        sizes = np.fromfile(self.folder / "sizes", dtype=np.int64)
        np.save(offsets, np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)]))
        keys = Keys(
            **{
                field.name: np.fromfile(self.folder / f"keys.{field.name}", dtype=self._dtypes[field.name])
                for field in fields(Keys)
            }
        )
        return Looked(keys, Records(self.folder / "records", offsets))

    def close(self) -> None:
        for file in self._files.values():
            file.abandon()
