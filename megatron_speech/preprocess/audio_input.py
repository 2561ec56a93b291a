"""What encode_audio.py reads: rows that name recordings, of any format that has a reader.

A plain local samples.jsonl is read where it lies. Of anything else (compressed, at a URL, several lists, archives,
tables) the list of rows is first written out as JSON lines in the work folder; the recordings stay where they are.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO, NoReturn

import numpy as np

from megatron_speech.errors import InputError
from megatron_speech.preprocess.fields import OUTSIDE, FieldError, FieldNames, local_name, recording_name
from megatron_speech.preprocess.readers import source
from megatron_speech.preprocess.readers.base import ReadOptions, Row, RowRejected
from megatron_speech.preprocess.readers.jsonl import JsonlReader, JsonlStream
from megatron_speech.preprocess.readers.open import InputFiles
from megatron_speech.preprocess.readers.parquet import recording
from megatron_speech.preprocess.readers.recognise import other_spelling, recognised, why_missing
from megatron_speech.preprocess.readers.webdataset import SampleBatch
from megatron_speech.remote import is_url

# 16 bytes a row: the duplicate search holds at most this many rows in memory at a time.
DUPLICATE_ROWS_IN_MEMORY = 1 << 22

_LISTING = "input.jsonl"
_ABOUT = "\0about"  # what a listed line holds beside the row's own fields: no field is called so


_POINTER_BYTES = 1024  # more than a git-lfs pointer has


class RowError(Exception):
    """A row that cannot be used: `reason` to count by, the message for people."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


# ---------------------------------------------------------------------------------------------------- rows


@dataclass
class InputRow:
    """What one input line says.

    Attributes:
        fields: by their names here; empty where there is an error.
        sample_id: what the row is called.
        source_id: what it is a part of: the same for all variants of a recording, so that no split parts them.
        error: why it cannot be used.
        notices: counted for the report.
        place: (input, number of the row in it), where the line does not stand in the input itself.
        own_name: a name that no other row has, where `sample_id` is the key of an archive, which another may repeat.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    sample_id: str = ""
    source_id: Any = None
    error: RowError | None = None
    notices: list[str] = field(default_factory=list)
    place: tuple[str, int] | None = None
    own_name: str | None = None


@dataclass(frozen=True)
class RowParser:
    """How lines of a listing become rows."""

    base: str  # what relative paths are relative to
    names: FieldNames
    augment: int = 1
    listed: bool = False  # the lines were written by `list_rows`, names are applied, and more is known of each row

    def parse(self, line: bytes) -> InputRow:
        """The row of one line. Errors: bad_json, missing_wav_path, bad_sample_id, and those of names and readers.

        Without `sample_id`, a row is called by its wav_path, `@start-end` where it names a segment, and `/channel`
        where it names one; without `source_id`, it is a part of that recording.
        """
        result = InputRow()
        try:
            fields = self._load(line, result)
            if not self.listed:
                fields, renamed = self.names.of_row(fields)
                result.notices += renamed
            result.sample_id = self._sample_id(fields)
            result.source_id = self._source_id(fields, result)
            result.fields = fields
        except FieldError as error:
            result.error = RowError(error.rule, error.reason)
        except RowError as error:
            result.error = error
        return result

    def _load(self, line: bytes, result: InputRow) -> dict[str, Any]:
        try:
            fields = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
            # A lone surrogate and 1e400 are JSON, but cannot be written again.
            json.dumps(fields, ensure_ascii=False, allow_nan=False).encode("utf-8")
        except (ValueError, RecursionError) as error:
            raise RowError("bad_json", f"the line is not one JSON object in UTF-8: {error}") from error
        if not isinstance(fields, dict):
            raise RowError("bad_json", f"the line is a JSON {type(fields).__name__}, needed is an object")
        about = fields.pop(_ABOUT, None) if self.listed else None
        if about is not None:
            result.place = (about["input"], about["row"])
            result.notices += about.get("notices", ())
            result.own_name = about.get("own_name")
            if "rejected" in about:
                raise RowError(*about["rejected"])
        return fields

    def _sample_id(self, fields: dict[str, Any]) -> str:
        wav_path = fields.get("wav_path")
        if wav_path is None:
            found = ", ".join(sorted(fields)[:12]) or "none"
            raise RowError(
                "missing_wav_path",
                f"no field names a recording (fields: {found}); needed is wav_path, or --map wav_path=FIELD",
            )
        if not isinstance(wav_path, str) or not wav_path:
            raise RowError("missing_wav_path", f"wav_path is {wav_path!r}, needed is the path of a recording")
        sample_id = fields.get("sample_id")
        if sample_id is None:
            start, end = fields.get("start_time"), fields.get("end_time")
            segment = "" if start is None and end is None else f"@{start or 0}-{'' if end is None else end}"
            channel = fields.get("channel")  # the two speakers of a telephone call are two samples
            sample_id = self._recording(fields) + segment + ("" if channel is None else f"/{channel}")
        elif isinstance(sample_id, int) and not isinstance(sample_id, bool):
            sample_id = str(sample_id)
        elif not isinstance(sample_id, str) or not sample_id:
            raise RowError("bad_sample_id", f"sample_id is {sample_id!r}, needed is a string or an integer")
        if self.augment > 1 and re.search(r"#v\d+$", sample_id):
            raise RowError("bad_sample_id", f"sample_id {sample_id!r} ends like the name of an augmented variant (#v1)")
        return sample_id

    def _recording(self, fields: dict[str, Any]) -> str:
        """What the row's recording is called: by its file, and by its place there where the file holds several."""
        name = recording_name(fields["wav_path"], self.base)
        place = next((fields[at] for at in ("wav_row", "wav_offset") if fields.get(at) is not None), None)
        return name if place is None else f"{name}/{place}"

    def _source_id(self, fields: dict[str, Any], result: InputRow) -> Any:
        given = fields.get("source_id")
        if given in (None, ""):
            given = self._recording(fields)
        if not isinstance(given, str):
            return given
        name = local_name(given, self.base)
        if name.startswith("/"):
            result.notices.append(OUTSIDE)
        return name


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def seconds_of(row: dict[str, Any], name: str) -> float | None:
    """A time of the row in seconds; None if it has none.

    Raises:
        RowError: bad_segment.
    """
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowError("bad_segment", f"{name} is {value!r}, needed are seconds as a number")
    return float(value)


def read_lines(path: Path, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, bytes]]:
    """(byte offset, line) of every line that begins in [start, stop) of a file; blank lines too."""
    with open(path, "rb") as handle:
        if start > 0:
            # A line that began before `start` belongs to the reader of the bytes before.
            handle.seek(start - 1)
            handle.readline()
        offset = handle.tell()
        for line in handle:
            if stop is not None and offset >= stop:
                return
            yield offset, line.removeprefix(b"\xef\xbb\xbf") if offset == 0 else line
            offset += len(line)


# ---------------------------------------------------------------------------------------------------- input


@dataclass(frozen=True)
class Scan:
    """What one pass over the input finds before any audio is read."""

    sha256: str
    rows: int  # of the whole input
    shard_rows: int
    start: int  # the shard's bytes of the input
    stop: int
    first_line: int  # lines before the shard
    duplicates: np.ndarray  # int64, sorted: offsets of rows whose sample_id an earlier row has


def scan_input(path: Path, shard: tuple[int, int], parser: RowParser, scratch: Path) -> Scan:
    """Count, hash and search the whole input for repeated sample_ids; memory does not grow with its rows."""
    digest = hashlib.sha256()
    rows = shard_rows = first_line = 0
    size = path.stat().st_size
    start, stop = (size * index // shard[1] for index in (shard[0], shard[0] + 1))
    with tempfile.TemporaryFile(dir=scratch) as seen:
        for offset, line in read_lines(path):
            digest.update(line)
            first_line += offset < start
            if not line.strip():
                continue
            rows += 1
            shard_rows += start <= offset < stop
            row = parser.parse(line)
            if row.error is None:  # which is reported when the row's turn comes
                digest_of_name = hashlib.blake2b(row.sample_id.encode(), digest_size=8).digest()
                seen.write(digest_of_name + offset.to_bytes(8, "little"))
        duplicates = _find_duplicates(seen)
    return Scan(digest.hexdigest(), rows, shard_rows, start, stop, first_line, duplicates)


def _find_duplicates(seen: IO[bytes]) -> np.ndarray:
    """Offsets, sorted int64, of all but the first record of each hash in a file of (hash u8, offset i8)."""
    record = np.dtype([("hash", "<u8"), ("offset", "<i8")])
    total = seen.seek(0, os.SEEK_END) // record.itemsize
    parts = -(-total // DUPLICATE_ROWS_IN_MEMORY)
    found = [np.zeros(0, dtype=np.int64)]
    for part in range(parts):
        seen.seek(0)
        chosen = []
        while len(block := np.frombuffer(seen.read(DUPLICATE_ROWS_IN_MEMORY * record.itemsize), dtype=record)):
            chosen.append(block[block["hash"] % parts == part])
        records = np.concatenate(chosen)
        records = records[np.argsort(records["hash"], kind="stable")]
        repeated = records["hash"][1:] == records["hash"][:-1]
        found.append(records["offset"][1:][repeated].astype(np.int64))
    return np.sort(np.concatenate(found))


# ---------------------------------------------------------------------------------------------------- other inputs


@dataclass(frozen=True)
class Listing:
    """The rows as a local file of JSON lines, and what relative paths in them are relative to."""

    path: Path
    parser: RowParser


def list_rows(inputs: Sequence[str], work: Path, names: FieldNames, augment: int) -> Listing:
    """Find the rows of `inputs`, whatever their format: as they lie, or listed in the folder `work`.

    A row of a reader names its recording by `wav_path`, and where that file holds several by `wav_offset` and
    `wav_bytes`, or by `wav_row` and `wav_column`.

    Args:
        inputs: paths, URLs, globs or brace ranges.
        work: folder for the list, where one is written.
        names: how fields are called.
        augment: variants of each row.

    Raises:
        InputError: no such file, an ending that is not read, or an input that is named twice.
    """
    files = InputFiles(inputs, ReadOptions(recordings=True))
    for path, count in Counter(reader.path for reader in files.readers).items():
        if count > 1:
            raise InputError(f"--input names {path} {count} times; name it once")
    if len(files.readers) == 1:
        path = files.readers[0].path
        local = source.local_path(path)
        if type(files.readers[0]) is JsonlReader and local is not None:
            return Listing(Path(local), RowParser(os.path.dirname(local), names, augment))
        if type(files.readers[0]) is JsonlStream:
            with source.open_binary(path) as remote, source.sentences(path), open(work / _LISTING, "wb") as copy:
                shutil.copyfileobj(remote, copy, 1 << 20)
            return Listing(work / _LISTING, RowParser(source.folder(path), names, augment))
    base = _common_folder([source.folder(reader.path) for reader in files.readers])
    with open(work / _LISTING, "wb") as handle:
        for batch in files.batches(0):
            rows = list(batch.read())
            of_archive = batch.found if isinstance(batch, SampleBatch) else [None] * len(rows)
            for row, sample in zip(rows, of_archive, strict=True):
                own_name = f"{batch.archive.name}/{sample.key}" if isinstance(batch, SampleBatch) and sample else None
                if sample is not None and row.fields.get("sample_id") != sample.key:
                    own_name = None
                handle.write(_listed(row, names, batch.path, base, own_name) + b"\n")
    return Listing(work / _LISTING, RowParser(base, names, augment, listed=True))


def _common_folder(folders: Sequence[str]) -> str:
    """The folder under which all of some folders lie; the working directory where there is none."""
    if len(set(folders)) == 1:
        return folders[0]
    if any(map(is_url, folders)):
        return os.getcwd()
    return os.path.commonpath([os.path.abspath(folder or ".") for folder in folders])


def _listed(row: Row, names: FieldNames, path: str, base: str, own_name: str | None) -> bytes:
    """A row as a line: its fields by their names here, where it stands, and what its reader found."""
    about: dict[str, Any] = {"input": path, "row": row.number}
    notices = list(row.notices)
    try:
        if row.rejected is not None:
            raise row.rejected
        fields, renamed = names.of_row(row.fields)
        notices += renamed
        where, folder = fields.get("wav_path"), source.folder(path)
        if folder != base and isinstance(where, str) and where and not is_url(where) and not os.path.isabs(where):
            moved = source.join(folder, where)
            fields = fields | {"wav_path": moved if is_url(moved) else os.path.relpath(os.path.abspath(moved), base)}
        about |= {"notices": notices} if notices else {}
        about |= {"own_name": own_name} if own_name else {}
        try:
            return _json(fields | {_ABOUT: about})
        except (ValueError, RecursionError) as error:
            raise RowRejected("bad_field", f"the row cannot be written as JSON: {error}") from error
    except (RowRejected, FieldError) as error:
        about |= {"notices": notices, "rejected": [error.rule, error.reason]}
        return _json({_ABOUT: about})


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain).encode("utf-8")


def _plain(value: Any) -> Any:
    """A cell of a table as JSON can hold it."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, bytes | bytearray | memoryview):
        raise ValueError("a field holds bytes")
    return str(value)


def open_recording(row: dict[str, Any], path: str) -> BinaryIO | None:
    """The recording's bytes where it is no local file of its own; None where it is.

    Raises:
        RowError: it cannot be read.
    """
    offset, size = row.get("wav_offset"), row.get("wav_bytes")
    local = source.local_path(path)
    try:
        if row.get("wav_row") is not None:
            return io.BytesIO(_in_table(row, path))
        if offset is not None or size is not None:
            if not (isinstance(offset, int) and isinstance(size, int) and offset >= 0 and size >= 0):
                raise RowError("bad_segment", f"wav_offset {offset!r} and wav_bytes {size!r}: needed are two numbers")
            return io.BytesIO(source.read_range(path, offset, offset + size))
        if local is None:
            with source.open_binary(path, decompress=False) as handle, source.sentences(path):
                return io.BytesIO(handle.read())
    except InputError as error:
        raise RowError("missing_file", str(error)) from error
    if not os.path.exists(local):
        spelled = other_spelling(local)
        if spelled is None:
            raise RowError("missing_file", f"{path} does not exist; check wav_path{why_missing(local)}")
        return open(spelled, "rb")
    if os.path.isfile(local) and os.stat(local).st_size <= _POINTER_BYTES:
        with open(local, "rb") as handle:
            reason = recognised(handle.read(_POINTER_BYTES))
        if reason is not None:
            raise RowError("unreadable", f"{path} is no recording: {reason}")
    return None


def _in_table(row: dict[str, Any], path: str) -> bytes:
    """The bytes of a recording inside a parquet file."""
    number, column = row["wav_row"], row.get("wav_column")
    if type(number) is not int or not isinstance(column, str | None):
        raise RowError("bad_segment", f"wav_row {number!r} and wav_column {column!r}: needed are a number and a name")
    return recording(path, number, column)
