"""Which reader reads which input."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_speech.errors import InputError
from megatron_speech.preprocess.fields import distinct_names
from megatron_speech.preprocess.readers import source
from megatron_speech.preprocess.readers.arrays import is_vectorised, offsets_reader, vectorised_readers
from megatron_speech.preprocess.readers.base import ReadOptions, RowBatch, RowReader
from megatron_speech.preprocess.readers.jsonl import JsonlReader, JsonlStream
from megatron_speech.preprocess.readers.llasa import LlasaReader, is_llasa, llasa_readers
from megatron_speech.preprocess.readers.megatron import MegatronReader
from megatron_speech.preprocess.readers.parquet import ParquetReader
from megatron_speech.preprocess.readers.webdataset import TarReader, TarStreamReader, name_archives

JSONL = (".jsonl", ".json", ".ndjson")
PARQUET = (".parquet", ".pq")
TAR = (".tar", ".tar.gz", ".tgz", ".tar.zst")
FORMATS = (
    ".jsonl(.gz, .zst), .parquet, .tar(.gz, .zst), X.offsets.npy, a megatron .idx, S_input_ids.memmap, "
    "or a vectorised folder"
)


def open_readers(path: str, options: ReadOptions) -> list[RowReader]:
    """The readers of what `path` names: a file, a URL, a glob, a brace range or a folder of a known layout.

    Raises:
        InputError: nothing is there, or no reader reads it.
    """
    return [reader for file in source.expand(path) for reader in _readers(file, options)]


def _readers(path: str, options: ReadOptions) -> list[RowReader]:
    name = source.ending_name(path)
    plain = name.removesuffix(".gz").removesuffix(".zst")
    in_place = source.local_path(path) is not None and plain == name
    # A local folder may be called anything; asking a server costs a request, so there only a path without an ending is.
    if source.is_folder(path) if source.local_path(path) is not None else "." not in name:
        return _folder_readers(path, options)
    if plain.endswith(JSONL):
        return [JsonlReader(path) if in_place else JsonlStream(path)]
    if name.endswith(PARQUET):
        return [ParquetReader(path)]
    if name.endswith(TAR) and options.recordings:
        return [TarStreamReader(path, recordings=True)]
    if name.endswith(TAR):
        return [TarReader(path) if in_place and not name.endswith(".tgz") else TarStreamReader(path)]
    if name.endswith((".offsets.npy", ".codes.npy")):
        return [offsets_reader(path)]
    if name.endswith((".idx", ".bin")):
        prefix = path.removesuffix(".idx").removesuffix(".bin")
        if source.exists(f"{prefix}.manifest.json"):
            raise InputError(
                f"input {path} is a dataset of this project already; join datasets with preprocess/merge_datasets.py"
            )
        return [MegatronReader(path, options.eod)]
    if name.endswith("_input_ids.memmap"):
        return [LlasaReader(path, options.tokenizer)]
    if re.search(r"_codes(_\d+)?\.npy$", name):
        folder = source.folder(path)
        return vectorised_readers(folder or ".", source.list_folder(folder or "."), only=path[-len(name) :])
    raise InputError(f"input {path}{_what_else(path, name)}")


def _folder_readers(path: str, options: ReadOptions) -> list[RowReader]:
    path = path.rstrip("/") or "/"
    names = source.list_folder(path)
    if is_vectorised(names):
        return vectorised_readers(path, names)
    if is_llasa(names):
        return llasa_readers(path, names, options.tokenizer)
    known = (*JSONL, *PARQUET, *TAR, ".jsonl.gz", ".jsonl.zst", ".offsets.npy", ".idx")
    files = [name for name in names if name.endswith(known)]
    some = " or ".join(source.join(path, name) for name in files[:2]) or source.join(path, "samples.jsonl")
    raise InputError(
        f"input {path} is a folder with neither S_codes_index.npy nor S_input_ids.memmap; "
        f"name its files, such as {some}"
    )


def _what_else(path: str, name: str) -> str:
    """What to do about a name that no reader reads."""
    folder = source.folder(path)
    if name.endswith((".xz", ".bz2", ".zip", ".7z", ".lz4")):
        return ": this compression is not read; recompress it with gzip or zstd"
    if name.endswith(".npy"):
        if source.exists(path) and source.exists(source.join(folder, "samples.jsonl")):
            return f" is codes without the samples' fields; name {source.join(folder, 'samples.jsonl')}"
        stem = path.removesuffix(".npy")
        return (
            f" is codes without the samples' bounds; name a samples.jsonl with codes_path, code_offset and code_len, "
            f"or make {stem}.offsets.npy and {stem}.codes.npy of it"
        )
    if name.endswith((".txt", ".csv", ".tsv", ".arrow", ".feather", ".h5", ".hdf5", ".pt", ".pkl")):
        return f" is of a format that is not read; write it as .jsonl or .parquet. Read are: {FORMATS}"
    return f": ending {os.path.splitext(name)[1]!r} is unknown; needed {FORMATS}"


class InputFiles:
    """Several inputs, their rows numbered through. Files are opened when their turn comes, one after the other."""

    def __init__(self, paths: Sequence[str], options: ReadOptions | None = None) -> None:
        self.paths = list(paths)
        self.readers: list[RowReader] = []
        for path in paths:
            self.readers += open_readers(os.fspath(path), options or ReadOptions())
        name_archives(self.readers)

    def stems(self) -> dict[str, str]:
        """What rows without a sample_id are called by, of those files whose name another one has too."""
        paths = list(dict.fromkeys(reader.path for reader in self.readers))
        count = Counter(map(source.stem, paths))
        return distinct_names([path for path in paths if count[source.stem(path)] > 1])

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
        """Identifies the version of every file: see :func:`source.fingerprint`."""
        return source.fingerprints([file for reader in self.readers for file in reader.files])

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


def input_entries(inputs: InputFiles) -> Iterator[tuple[str, int, int]]:
    """Of every input its path, size of all its files in bytes, and rows."""
    for reader in inputs.readers:
        yield reader.path, sum(source.size_bytes(file) or 0 for file in reader.files), reader.rows
