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
from megatron_speech.preprocess.readers.json_array import JsonArrayReader, is_array
from megatron_speech.preprocess.readers.jsonl import JsonlReader, JsonlStream
from megatron_speech.preprocess.readers.kaldi import KaldiReader, is_kaldi
from megatron_speech.preprocess.readers.lhotse import CutsReader, holds_cuts, other_manifest
from megatron_speech.preprocess.readers.lines import LinesReader, is_common_voice, is_ljspeech
from megatron_speech.preprocess.readers.llasa import LlasaReader, is_llasa, llasa_readers
from megatron_speech.preprocess.readers.megatron import MegatronReader
from megatron_speech.preprocess.readers.parquet import ParquetReader
from megatron_speech.preprocess.readers.pretraining import CODES_ENDING, TOKENS_ENDING, PretrainingReader
from megatron_speech.preprocess.readers.recognise import recognised
from megatron_speech.preprocess.readers.webdataset import TarReader, TarStreamReader, name_archives

JSONL = (".jsonl", ".json", ".ndjson")
PARQUET = (".parquet", ".pq")
TAR = (".tar", ".tar.gz", ".tgz", ".tar.zst")
FORMATS = (
    ".jsonl or .json(.gz, .zst), .parquet, .tar(.gz, .zst), X.offsets.npy, a megatron .idx, S_input_ids.memmap, "
    "Common Voice's .tsv, LJSpeech's metadata.csv, or a folder: vectorised, or Kaldi's"
)
# A git-lfs pointer is smaller; larger files are what they are.
_POINTER_BYTES = 1024


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
    _refuse_pointer(path)
    if plain.endswith(JSONL):
        return [_json_reader(path, in_place)]
    if plain.endswith((".tsv", ".csv")):
        return [_lines_reader(path, plain)]
    if name.endswith(PARQUET):
        return [ParquetReader(path, recordings=options.recordings)]
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
    if name.endswith(TOKENS_ENDING) or (
        name.endswith(CODES_ENDING) and not source.exists(f"{path.removesuffix('.npy')}_index.npy")
    ):
        return [PretrainingReader(path, options.tokenizer, options.eod)]
    if name == "wav.scp":
        folder = source.folder(path) or "."
        return [KaldiReader(folder, source.list_folder(folder))]
    if re.search(r"_codes(_\d+)?\.npy$", name):
        folder = source.folder(path)
        return vectorised_readers(folder or ".", source.list_folder(folder or "."), only=path[-len(name) :])
    raise InputError(f"input {path}{_what_else(path, name)}")


def _refuse_pointer(path: str) -> None:
    """Refuse a file that git-lfs left a pointer of, whatever its format."""
    local = source.local_path(path)
    if local is None or (source.size_bytes(path) or 0) > _POINTER_BYTES:
        return
    with source.open_binary(path, decompress=False) as handle:
        reason = recognised(handle.read(64))
    if reason is not None and "git-lfs" in reason:
        raise InputError(f"input {path}: {reason}")


def _json_reader(path: str, in_place: bool) -> RowReader:
    """The reader of JSON lines, of an array, or of Lhotse's cuts in one of the two, by how the file begins."""
    # Looking at a remote file is a request, and there may be ten thousand: only at those whose name leaves it open.
    name = source.ending_name(path)
    is_json = name.removesuffix(".gz").removesuffix(".zst").endswith(".json")  # as lines, or as an array
    look = source.local_path(path) is not None or is_json or "cuts" in name
    head = source.head_of(path) if look else b""
    reason = recognised(head)
    if reason is not None:
        raise InputError(f"input {path} is not JSON in UTF-8: {reason}")
    other = other_manifest(head)
    if other is not None:
        raise InputError(
            f"input {path} is a list of Lhotse with {other}; needed are cuts: "
            "CutSet.from_manifests(recordings, supervisions).trim_to_supervisions().to_file('cuts.jsonl.gz')"
        )
    array = is_json and is_array(head)
    if is_json and not array and re.match(rb"\s*\{\s*\n", head):
        raise InputError(
            f"input {path} is one JSON object over several lines; needed is one object in each line, an array of "
            "objects, or {\"data\": [...]}; write it as one: jq -c . X.json > X.jsonl, or jq -c '.KEY[]' for a list "
            "in it"
        )
    reader: RowReader = JsonArrayReader(path) if array else JsonlReader(path) if in_place else JsonlStream(path)
    return CutsReader(reader) if holds_cuts(head) else reader


def _lines_reader(path: str, plain: str) -> RowReader:
    """The reader of Common Voice's or LJSpeech's list."""
    head = source.head_of(path)
    reason = recognised(head)
    if reason is not None:
        raise InputError(f"input {path} is not a list in UTF-8: {reason}")
    if plain.endswith(".tsv") and is_common_voice(head):
        return LinesReader(path, has_header=True)
    if plain == "metadata.csv" and is_ljspeech(head):
        return LinesReader(path, has_header=False)
    if plain.endswith(".tsv"):
        kind, sign, read = "tsv", "\\t", "lists of Common Voice (columns path and sentence) are"
    else:
        kind, sign, read = "csv", ",", "LJSpeech's metadata.csv (ID|text) is"
    raise InputError(
        f"input {path}: of .{kind} only {read} read, since others do not say what their columns mean; write it as "
        'JSON lines with wav_path, transcript, language, …: python -c "import csv, json, sys; [print(json.dumps(row)) '
        f"for row in csv.DictReader(sys.stdin, delimiter='{sign}')]\" < X.{kind} > X.jsonl"
    )


def _folder_readers(path: str, options: ReadOptions) -> list[RowReader]:
    path = path.rstrip("/") or "/"
    names = source.list_folder(path)
    if is_vectorised(names):
        return vectorised_readers(path, names)
    if is_llasa(names):
        return llasa_readers(path, names, options.tokenizer)
    if is_kaldi(names):
        return [KaldiReader(path, names)]
    known: tuple[str, ...] = (
        *JSONL,
        *PARQUET,
        *TAR,
        ".jsonl.gz",
        ".jsonl.zst",
        ".offsets.npy",
        ".idx",
        ".tsv",
        "metadata.csv",
    )
    known += (CODES_ENDING, TOKENS_ENDING)
    files = [name for name in names if name.endswith(known)]
    some = " or ".join(source.join(path, name) for name in files[:2]) or source.join(path, "samples.jsonl")
    raise InputError(
        f"input {path} is a folder with neither S_codes_index.npy nor S_input_ids.memmap nor wav.scp; "
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
    if name.endswith((".npz", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")):
        return (
            " is of a format that is not read (torch's and pickles can run code); write each sample's codes with "
            "numpy.save('codes/ID.npy', codes) and a samples.jsonl that names them: "
            '{"codes_path": "codes/ID.npy", "transcript": …, "language": …}'
        )
    if name.endswith((".arrow", ".feather")):
        return (
            " is of a format that is not read; write it as parquet: "
            "datasets.load_from_disk('FOLDER').to_parquet('X.parquet')"
        )
    if name.endswith((".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a")):
        return ' is a recording; name a samples.jsonl with rows such as {"wav_path": "X.wav", "transcript": …}'
    if name.endswith((".txt", ".xls", ".xlsx", ".h5", ".hdf5", ".yaml", ".yml", ".xml")):
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
