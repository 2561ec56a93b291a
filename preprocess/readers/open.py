"""Which reader reads which input."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_speech.errors import InputError
from preprocess.readers import source
from preprocess.readers.base import ReadOptions, RowBatch, RowReader
from preprocess.readers.jsonl import JsonlReader, JsonlStream
from preprocess.readers.parquet import ParquetReader

JSONL = (".jsonl", ".json", ".ndjson")
PARQUET = (".parquet", ".pq")


def open_readers(path: str, options: ReadOptions) -> list[RowReader]:
    """The readers of what `path` names: a file, a URL, a glob, a brace range or a folder of a known layout.

    Raises:
        InputError: nothing is there, or no reader reads it.
    """
    return [reader for file in source.expand(path) for reader in _readers(file, options)]


def _readers(path: str, options: ReadOptions) -> list[RowReader]:
    name = source.ending_name(path)
    plain = name.removesuffix(".gz").removesuffix(".zst")
    if plain.endswith(JSONL):
        remote = source.local_path(path) is None or plain != name
        return [JsonlStream(path) if remote else JsonlReader(path)]
    if name.endswith(PARQUET):
        return [ParquetReader(path)]
    if source.is_folder(path):
        raise InputError(f"input {path} is a folder; name its files, such as {source.join(path, 'samples.jsonl')}")
    raise InputError(f"input {path}: ending {os.path.splitext(name)[1]!r} is unknown; needed .jsonl or .parquet")


class Inputs:
    """Several inputs, their rows numbered through. Files are opened when their turn comes, one after the other."""

    def __init__(self, paths: Sequence[str], options: ReadOptions | None = None) -> None:
        self.paths = list(paths)
        self.readers: list[RowReader] = []
        for path in paths:
            self.readers += open_readers(os.fspath(path), options or ReadOptions())

    @property
    def known_rows(self) -> int | None:
        """Number of rows, or None where counting them would mean to read the data."""
        total = 0
        for reader in self.readers:
            rows = reader.known_rows
            if rows is None:
                return None
            total += rows
        return total

    @property
    def rows(self) -> int:
        """Number of rows, counted if need be.

        Raises:
            InputError: there are none, or an input cannot be read.
        """
        rows = sum(reader.rows for reader in self.readers)
        if not rows:
            self._refuse_empty()
        return rows

    def _refuse_empty(self) -> None:
        raise InputError(f"input {', '.join(self.paths)} holds no rows; needed at least one")

    def fingerprints(self) -> list[dict[str, Any]]:
        """What tells this state of every file from another: see :func:`source.fingerprint`."""
        return [source.fingerprint(file) for reader in self.readers for file in reader.files]

    def batches(self, start: int, stop: int | None = None) -> Iterator[RowBatch]:
        """Rows `start` to `stop` (from 0; None: the end) of all files, in order.

        Raises:
            InputError: an input cannot be read, or there are no rows at all.
        """
        position = 0
        for reader in self.readers:
            if stop is not None and position >= stop:
                return
            rows = reader.known_rows
            if rows is None or position + rows > start:
                yield from reader.batches(max(start - position, 0), None if stop is None else stop - position)
                rows = reader.known_rows
            if rows is None:  # it stopped before its end, because `stop` was reached
                return
            position += rows
        if not position:
            self._refuse_empty()


def input_entries(inputs: Inputs) -> Iterator[tuple[str, int, int]]:
    """Of every input its path, size of all its files in bytes, and rows."""
    for reader in inputs.readers:
        yield reader.path, sum(source.size_bytes(file) or 0 for file in reader.files), reader.rows
