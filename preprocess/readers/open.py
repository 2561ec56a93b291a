"""Which reader reads which file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_speech.errors import InputError
from preprocess.readers.base import RowBatch, RowReader
from preprocess.readers.jsonl import JsonlReader
from preprocess.readers.parquet import ParquetReader


def open_reader(path: str | os.PathLike[str]) -> RowReader:
    """The reader of `path`, chosen by its ending.

    Raises:
        InputError: no such file, or an ending that no reader reads.
    """
    path = os.fspath(path)
    name = Path(path).name.lower()
    if not os.path.exists(path):
        raise InputError(f"input {path} does not exist; check the path")
    if os.path.isdir(path):
        raise InputError(f"input {path} is a folder; name its files, such as {os.path.join(path, 'samples.jsonl')}")
    if name.endswith((".jsonl", ".json", ".ndjson")):
        return JsonlReader(path)
    if name.endswith((".parquet", ".pq")):
        return ParquetReader(path)
    if name.endswith((".tar", ".tar.gz", ".tgz")):
        raise InputError(
            f"input {path}: .tar shards of codes are not read by this version; unpack them and name a samples.jsonl "
            "with codes_path, or a .parquet with a column codes"
        )
    if name.endswith((".gz", ".zst", ".xz", ".bz2")):
        raise InputError(f"input {path} is compressed, which is not read by this version; decompress it first")
    raise InputError(f"input {path}: ending {Path(path).suffix!r} is unknown; needed .jsonl or .parquet")


class Inputs:
    """Several files, their rows numbered through."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.readers = [open_reader(path) for path in paths]
        self.rows = sum(reader.rows for reader in self.readers)
        if not self.rows:
            raise InputError(f"input {', '.join(paths)} holds no rows; needed at least one")

    def batches(self, start: int, stop: int) -> Iterator[RowBatch]:
        """Rows `start` to `stop` (from 0) of all files, in order."""
        position = 0
        for reader in self.readers:
            first, last = max(start - position, 0), min(stop - position, reader.rows)
            position += reader.rows
            if first < last:
                yield from reader.batches(first, last)
