"""What encode_audio.py reads: rows that name recordings, from JSON lines or from tar archives of recordings.

A plain local samples.jsonl is read where it lies. Of anything else (compressed, at a URL, archives) the list of rows
is first written out as JSON lines in the work folder; the recordings themselves stay where they are.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, NoReturn

import numpy as np

from megatron_speech.errors import InputError
from megatron_speech.preprocess.readers import source
from megatron_speech.preprocess.readers.jsonl import parse_row as parse_json
from megatron_speech.preprocess.readers.tar import Member, TarStream
from megatron_speech.preprocess.readers.webdataset import split_name
from megatron_speech.remote import is_url

# 16 bytes a row: the duplicate search holds at most this many rows in memory at a time.
DUPLICATE_ROWS_IN_MEMORY = 1 << 22

# Endings of recordings in an archive; others that soundfile reads can be added.
AUDIO_ENDINGS = ("wav", "flac", "mp3", "ogg", "opus", "m4a", "aac", "aiff", "aif", "au", "caf", "w64", "sph")


class RowError(Exception):
    """A row that cannot be used: `reason` to count by, the message for people."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


# ---------------------------------------------------------------------------------------------------- rows


def parse_row(line: bytes, augment: int) -> tuple[dict[str, Any], str]:
    """The object of one input line and its sample_id.

    Without `sample_id`, it is the wav_path as written, `@start-end` where the row names a segment, and `/channel` where
    it names one: the two speakers of a telephone call are two samples.

    Raises:
        RowError: bad_json, missing_wav_path, bad_sample_id.
    """
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
        # A lone surrogate and 1e400 are JSON, but cannot be written again.
        json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise RowError("bad_json", f"the line is not one JSON object in UTF-8: {error}") from error
    if not isinstance(row, dict):
        raise RowError("bad_json", f"the line is a JSON {type(row).__name__}, needed is an object")
    wav_path = row.get("wav_path")
    if not isinstance(wav_path, str) or not wav_path:
        raise RowError("missing_wav_path", f"wav_path is {wav_path!r}, needed is the path of a recording")
    sample_id = row.get("sample_id")
    if sample_id is None:
        start, end = row.get("start_time"), row.get("end_time")
        segment = "" if start is None and end is None else f"@{start or 0}-{'' if end is None else end}"
        channel = row.get("channel")
        sample_id = wav_path + segment + ("" if channel is None else f"/{channel}")
    elif isinstance(sample_id, int) and not isinstance(sample_id, bool):
        sample_id = str(sample_id)
    elif not isinstance(sample_id, str) or not sample_id:
        raise RowError("bad_sample_id", f"sample_id is {sample_id!r}, needed is a string or an integer")
    if augment > 1 and re.search(r"#v\d+$", sample_id):
        raise RowError("bad_sample_id", f"sample_id {sample_id!r} ends like the name of an augmented variant (#v1)")
    return row, sample_id


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


def scan_input(path: Path, shard: tuple[int, int], augment: int, scratch: Path) -> Scan:
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
            with contextlib.suppress(RowError):  # reported when the row's turn comes
                _, sample_id = parse_row(line, augment)
                seen.write(hashlib.blake2b(sample_id.encode(), digest_size=8).digest() + offset.to_bytes(8, "little"))
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
    base: str


def list_rows(inputs: Sequence[str], work: Path) -> Listing:
    """Find the rows of `inputs`: one samples.jsonl (local, compressed or at a URL), or tar archives of recordings.

    Raises:
        InputError: no such file, several files that are not archives, or an ending that is not read.
    """
    paths = [path for pattern in inputs for path in source.expand(pattern)]
    names = [source.ending_name(path) for path in paths]
    if all(name.endswith(".tar") for name in names):
        return Listing(_list_archives(paths, work / "input.jsonl"), os.getcwd())
    for path, name in zip(paths, names, strict=True):
        if name.endswith((".tar.gz", ".tgz", ".tar.zst")):
            raise InputError(f"--input {path}: recordings in a compressed archive cannot be found again; decompress it")
    if len(paths) > 1:
        raise InputError(f"--input names {len(paths)} files; needed is one samples.jsonl, or archives that end in .tar")
    path = paths[0]
    if source.is_folder(path):
        raise InputError(f"--input {path} is a folder; needed is a samples.jsonl or .tar archives")
    local = source.local_path(path)
    if local is not None and not source.is_compressed(path):
        return Listing(Path(local), os.path.dirname(local))
    with source.open_binary(path) as remote, source.sentences(path), open(work / "input.jsonl", "wb") as copy:
        shutil.copyfileobj(remote, copy, 1 << 20)
    return Listing(work / "input.jsonl", source.folder(path))


def _list_archives(paths: Sequence[str], listing: Path) -> Path:
    """Write a row per recording: the fields of its sample, and where in which archive its bytes lie."""
    with open(listing, "wb") as handle:
        for path in paths:
            where = path if is_url(path) else os.path.abspath(path)
            with source.open_binary(path, decompress=False) as archive, source.sentences(path):
                for row in _recordings(TarStream(archive, path, can_seek=True), where):
                    handle.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n")
    return listing


def _recordings(stream: TarStream, where: str) -> Iterator[dict[str, Any]]:
    """The samples of an archive: members of one key that follow each other.

    One without a recording is a row too, which is then rejected by name: nothing disappears here.
    """
    key: str | None = None
    fields: dict[str, Any] = {}
    for member in stream.members():
        named = split_name(member.name) if member.kind == "file" else None
        if named is None:
            continue
        if named[0] != key:
            if key is not None:
                yield {"sample_id": key} | fields
            key, fields = named[0], {}
        fields |= _fields_of(stream, member, named[1], where)
    if key is not None:
        yield {"sample_id": key} | fields


def _fields_of(stream: TarStream, member: Member, ending: str, where: str) -> dict[str, Any]:
    if ending in AUDIO_ENDINGS:
        return {"wav_path": where, "wav_offset": member.offset, "wav_bytes": member.size}
    if ending == "json":
        row = parse_json(1, stream.read(member))
        if row.rejected is not None:
            raise InputError(f"input {where}: member {member.name}: {row.rejected.reason}; repair it or take it out")
        return {name: value for name, value in row.fields.items() if name not in ("wav_path", "wav_offset")}
    if ending in ("txt", "transcript.txt"):
        try:
            return {"transcript": stream.read(member).decode("utf-8")}
        except UnicodeDecodeError as error:
            raise InputError(f"input {where}: member {member.name} is not UTF-8: {error}; repair it") from error
    return {}


def open_recording(row: dict[str, Any], path: str) -> BinaryIO | None:
    """The recording's bytes where it is no local file of its own; None where it is.

    Raises:
        RowError: it cannot be read.
    """
    offset, size = row.get("wav_offset"), row.get("wav_bytes")
    try:
        if offset is not None or size is not None:
            if not (isinstance(offset, int) and isinstance(size, int) and offset >= 0 and size >= 0):
                raise RowError("bad_segment", f"wav_offset {offset!r} and wav_bytes {size!r}: needed are two numbers")
            return io.BytesIO(source.read_range(path, offset, offset + size))
        if source.local_path(path) is None:
            with source.open_binary(path, decompress=False) as handle, source.sentences(path):
                return io.BytesIO(handle.read())
    except InputError as error:
        raise RowError("missing_file", str(error)) from error
    return None
