"""WebDataset archives, of codes or of recordings: `.tar`, `.tar.gz` (`.tgz`), `.tar.zst`.

A sample is a run of members with one key. The key is the name up to the first dot of its last part, folders included
(`train/0001.npy`: key `train/0001`, ending `npy`). What the endings mean:

    npy, codes.npy, npz, codes.npz   codes [frames] or [frames, codebooks]; in an npz the array `codes`, or its only one
    text_ids.npy                     ids of the token space's text tokenizer
    wav, flac, mp3, ogg, opus, …     a recording, in place of codes, where the rows are to be encoded
    json                             an object with the sample's fields
    txt, transcript.txt              the transcript
    cls                              a number, kept as the field `cls`

Other members are counted by ending and not read. A plain local archive is scanned once for where samples begin, and
read by the workers; of others the parent ships what is read of each sample. A recording is not read at all: its row
says where in the archive it lies.

The `source_id` of a sample that names none is `ARCHIVE.tar/KEY`: the same wherever the archive lies.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import zipfile
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from megatron_speech.errors import InputError
from megatron_speech.preprocess.fields import SOURCE_NAMES, distinct_names
from megatron_speech.preprocess.readers import source
from megatron_speech.preprocess.readers.base import (
    BATCH_BYTES,
    BATCH_ROWS,
    Row,
    RowReader,
    RowRejected,
    RunReader,
    StreamReader,
)
from megatron_speech.preprocess.readers.compression import DamagedInput
from megatron_speech.preprocess.readers.flat import npy_from_bytes
from megatron_speech.preprocess.readers.jsonl import parse_row
from megatron_speech.preprocess.readers.tar import Member, TarStream
from megatron_speech.remote import is_url

_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")
_CODES = ("npy", "codes.npy", "npz", "codes.npz")
_TEXTS = ("json", "txt", "transcript.txt", "cls")
_RECORDINGS = (
    "wav", "flac", "mp3", "ogg", "opus", "oga", "m4a", "mp4", "aac", "aif", "aiff", "au", "caf", "w64", "rf64", "sph",
)  # fmt: skip
_KNOWN = frozenset((*_CODES, "text_ids.npy", *_TEXTS))
_KNOWN_OF_RECORDINGS = frozenset((*_RECORDINGS, *_TEXTS))
# What the archive itself says of a recording.
_PLACE = ("wav_path", "wav_offset", "wav_bytes")
_MAX_MEMBER_BYTES = 1 << 30
_SCAN_BUFFER_BYTES = 64 << 10  # of a scan that skips the data: small, so that skipping reads little


@dataclass(frozen=True)
class Archive:
    """What the samples of an archive have in common."""

    path: str
    name: str  # which its samples' sources are called by
    recordings: bool = False  # samples are recordings, and not codes

    @property
    def known(self) -> frozenset[str]:
        """Endings that are read."""
        return _KNOWN_OF_RECORDINGS if self.recordings else _KNOWN

    @property
    def place(self) -> str:
        """The archive, wherever the row will be read."""
        return self.path if is_url(self.path) else os.path.abspath(self.path)


@dataclass(slots=True)
class Part:
    """A member of a sample: what is read of it."""

    ending: str
    kind: str
    data: bytes
    offset: int = 0  # of its bytes in the archive
    size: int = 0


@dataclass(slots=True)
class TarSample:
    """The members of one key, in order."""

    key: str
    begin: int
    end: int = 0
    parts: list[Part] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    size: int = 0  # of the data of its parts


def split_name(name: str) -> tuple[str, str] | None:
    """(key, ending) of a member's name; None if it has no ending or begins with a dot."""
    match = _KEY.fullmatch(name.removeprefix("./"))
    return (match[1], match[2].lower()) if match else None


def samples(stream: TarStream, archive: Archive, end: int | None = None, *, load: bool = True) -> Iterator[TarSample]:
    """The samples of an archive. A member without a key counts with the sample before it."""
    sample: TarSample | None = None
    orphans: list[str] = []
    for member in stream.members(end):
        if member.kind == "folder":
            continue
        named = split_name(member.name)
        if named is None or member.kind in ("device", "other"):
            notice = f"tar_member:{member.kind if member.kind != 'file' else 'without key'}"
            (orphans if sample is None else sample.notices).append(notice)
            continue
        key, ending = named
        if sample is None or key != sample.key:
            if sample is not None:
                sample.end = member.begin
                yield sample
            sample = TarSample(key, member.begin, notices=orphans)
            orphans = []
        _add(sample, stream, archive, member, ending, load)
    if sample is not None:
        sample.end = stream.position
        yield sample


def _add(sample: TarSample, stream: TarStream, archive: Archive, member: Member, ending: str, load: bool) -> None:
    if ending not in archive.known:
        sample.notices.append(f"tar_member:.{ending}")
        return
    if archive.recordings and ending in _RECORDINGS:
        if load:
            sample.parts.append(Part(ending, member.kind, b"", member.offset, member.size))
        return
    if member.size > _MAX_MEMBER_BYTES:
        raise InputError(f"input {stream.path}: member {member.name!r} holds {member.size:,} bytes, which is no sample")
    sample.size += member.size
    if load:
        sample.parts.append(Part(ending, member.kind, stream.read(member) if member.kind == "file" else b""))


def row_of(sample: TarSample, archive: Archive, number: int, *, again: bool = False) -> Row:
    """The row that a sample is."""
    row = Row(number, {}, notices=tuple(sample.notices))
    try:
        if again:
            reason = f"members of key {sample.key!r} came before, and others between: they are not adjacent"
            raise RowRejected("tar_key_again", reason)
        row.fields, more = _fields(sample, archive, number)
        row.notices += more
    except RowRejected as error:
        row.rejected = error
    return row


def _fields(sample: TarSample, archive: Archive, number: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A sample's fields, and notices of those that are not taken."""
    fields: dict[str, Any] = {}
    given: dict[str, str] = {}
    recording: Part | None = None
    notices: list[str] = []
    for part in sample.parts:
        if part.kind != "file":
            raise RowRejected(f"tar_{part.kind}", f"{sample.key}.{part.ending} is a {part.kind}, needed a file")
        if archive.recordings and part.ending in _RECORDINGS:
            if recording is not None:
                reason = f"key {sample.key!r}: a recording is in .{recording.ending} and again in .{part.ending}"
                raise RowRejected("tar_duplicate_member", reason)
            recording = part
            continue
        for name, value in _read(sample, part, number).items():
            if archive.recordings and name in _PLACE:
                notices.append(f"tar_field:{name}")
            elif name not in given:
                fields[name], given[name] = value, part.ending
            elif given[name] == part.ending or not _same(fields[name], value):
                reason = f"key {sample.key!r}: field {name} is in .{given[name]} and again in .{part.ending}"
                raise RowRejected("tar_duplicate_member", reason)
    try:
        sample.key.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowRejected("bad_text", f"key {sample.key!r} is not UTF-8") from error
    if archive.recordings:
        if recording is None:
            raise RowRejected("missing_wav_path", f"key {sample.key!r} has no recording{_unread(sample)}")
        fields |= zip(_PLACE, (archive.place, recording.offset, recording.size), strict=True)
    if fields.get("sample_id") in (None, ""):
        fields["sample_id"] = sample.key
    if all(fields.get(name) in (None, "") for name in SOURCE_NAMES):
        fields["source_id"] = f"{archive.name}/{sample.key}"
    return fields, tuple(notices)


def _unread(sample: TarSample) -> str:
    """What lies beside a recording that is missing; a key ends at the first dot of a name, which is easily missed."""
    endings = [notice.removeprefix("tar_member:") for notice in sample.notices if notice.startswith("tar_member:.")]
    if not endings:
        return "; put one beside its .json or .txt"
    some = ", ".join(dict.fromkeys(endings[:3]))
    dotted = any("." in ending[1:] for ending in endings)
    return f"; not read are its {some}{' (a key ends at the first dot: take dots out of the names)' if dotted else ''}"


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and not isinstance(one, np.ndarray) and one == other


def _read(sample: TarSample, part: Part, number: int) -> dict[str, Any]:
    """The fields in one member.

    Raises:
        RowRejected: it is not what its ending says.
    """
    if part.ending == "json":
        row = parse_row(number, part.data)
        if row.rejected is not None:
            raise row.rejected
        return row.fields
    if part.ending in ("txt", "transcript.txt", "cls"):
        try:
            text = part.data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RowRejected("bad_text", f"{sample.key}.{part.ending} is not UTF-8: {error}") from error
        if part.ending != "cls":
            return {"transcript": text}
        if re.fullmatch(r"-?\d{1,18}", text.strip()) is None:
            raise RowRejected("bad_field", f"{sample.key}.cls is {text[:40]!r}, needed a number")
        return {"cls": int(text)}
    name = "text_ids" if part.ending == "text_ids.npy" else "codes"
    try:
        return {name: _from_npz(part.data) if part.ending.endswith("npz") else npy_from_bytes(part.data)}
    except (ValueError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise RowRejected("codes_unreadable", f"{sample.key}.{part.ending} is not readable: {error}") from error


def _from_npz(data: bytes) -> np.ndarray:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = [name for name in archive.namelist() if name.endswith(".npy")]
        if "codes.npy" in names:
            names = ["codes.npy"]
        if len(names) != 1:
            raise ValueError(f"it holds {len(names)} arrays and none is named codes")
        return npy_from_bytes(archive.read(names[0]))


class SeenKeys:
    """The keys of an archive so far, as 64-bit hashes: 8 bytes per key."""

    def __init__(self) -> None:
        self._blocks: list[np.ndarray] = []  # sorted; each at least twice as long as the next

    def add(self, keys: Sequence[str]) -> list[int]:
        """Which of `keys`, in order, were there before; from now on all were."""
        digests = [hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest() for key in keys]
        values = np.frombuffer(b"".join(digests), np.uint64)
        block, first = np.unique(values, return_index=True)
        seen = np.ones(len(values), bool)
        seen[first] = False
        for older in self._blocks:
            at = np.minimum(np.searchsorted(older, values), len(older) - 1)
            seen |= older[at] == values
        while self._blocks and len(self._blocks[-1]) < 2 * len(block):
            block = np.union1d(self._blocks.pop(), block)
        self._blocks.append(block)
        return np.flatnonzero(seen).tolist()


@dataclass(frozen=True)
class TarBatch:
    """Samples in bytes `begin` to `end` of a local archive."""

    archive: Archive
    begin: int
    end: int
    first: int  # number of the first sample of those bytes, from 1
    skip: int  # samples before the first one needed
    rows: int
    again: frozenset[int]  # numbers of samples whose key came before

    @property
    def path(self) -> str:
        """The archive."""
        return self.archive.path

    def read(self) -> list[Row]:
        """Read the samples."""
        with source.open_binary(self.path, self.begin, decompress=False) as handle, source.sentences(self.path):
            stream = TarStream(handle, self.path, self.begin, can_seek=True)
            found = list(samples(stream, self.archive, self.end))[self.skip : self.skip + self.rows]
        first = self.first + self.skip
        return [row_of(s, self.archive, first + i, again=first + i in self.again) for i, s in enumerate(found)]

    def part(self, first: int, last: int) -> TarBatch:
        """Samples `first` to `last` of the run."""
        return replace(self, skip=self.skip + first, rows=last - first)


@dataclass(frozen=True)
class SampleBatch:
    """Samples of a stream, as they are."""

    archive: Archive
    first: int
    found: list[TarSample]
    again: frozenset[int]

    @property
    def path(self) -> str:
        """The archive."""
        return self.archive.path

    @property
    def rows(self) -> int:
        """Number of samples."""
        return len(self.found)

    def read(self) -> list[Row]:
        """Read the members."""
        numbered = enumerate(self.found, start=self.first)
        return [row_of(sample, self.archive, i, again=i in self.again) for i, sample in numbered]

    def part(self, first: int, last: int) -> SampleBatch:
        """Samples `first` to `last` of the run."""
        return replace(self, first=self.first + first, found=self.found[first:last])


def _runs(stream: TarStream, archive: Archive, *, load: bool) -> Iterator[SampleBatch]:
    """The samples of an archive in runs: at most `BATCH_ROWS`, of about `BATCH_BYTES`."""
    keys = SeenKeys()
    first = 1
    size = 0
    found: list[TarSample] = []

    def run() -> SampleBatch:
        again = frozenset(first + i for i in keys.add([sample.key for sample in found]))
        return SampleBatch(archive, first, found, again)

    try:
        for sample in samples(stream, archive, load=load):
            found.append(sample)
            size += sample.size
            if len(found) == BATCH_ROWS or size >= BATCH_BYTES:
                yield run()
                first += len(found)
                size, found = 0, []
    except InputError as error:
        hint = "; restore the file" if isinstance(error, DamagedInput) else ""
        raise InputError(f"{error}; {first - 1 + len(found):,} samples were read before that{hint}") from error
    if found:
        yield run()
    elif first == 1:
        reason = "no member is named KEY.ENDING; recreate it, or leave it out"
        raise InputError(f"input {stream.path} holds no rows: {reason}")


class TarReader(RunReader):
    """A plain local archive: the parent reads the headers, once, and the workers read between them."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.archive = Archive(path, distinct_names([path])[path])
        self._index: tuple[array, array, frozenset[int]] | None = None

    @property
    def known_rows(self) -> int | None:
        """Number of samples, once the headers were read."""
        return None if self._index is None else self.rows

    @property
    def rows(self) -> int:
        """Number of samples; the headers are read for it."""
        if self._index is None:
            for _ in self._scan():
                pass
        assert self._index is not None
        return self._index[1][-1]

    def _runs(self) -> Iterator[TarBatch]:
        """All runs of samples: from the index, or from the archive while the index is made."""
        if self._index is None:
            yield from self._scan()
            return
        begins, rows, again = self._index
        for i in range(len(rows) - 1):
            numbers = frozenset(number for number in again if rows[i] < number <= rows[i + 1]) if again else again
            yield TarBatch(self.archive, begins[i], begins[i + 1], rows[i] + 1, 0, rows[i + 1] - rows[i], numbers)

    def _scan(self) -> Iterator[TarBatch]:
        """Read the headers. The index holds of each run its first byte and the samples before it: 16 bytes."""
        begins, rows = array("q", [0]), array("q", [0])
        again: set[int] = set()
        if not source.size_bytes(self.path):
            raise InputError(f"input {self.path} is empty (0 bytes); recreate it, or leave it out")
        with source.open_binary(self.path, decompress=False, buffer_bytes=_SCAN_BUFFER_BYTES) as handle:
            for run in _runs(TarStream(handle, self.path, can_seek=True), self.archive, load=False):
                end = run.found[-1].end
                yield TarBatch(self.archive, begins[-1], end, run.first, 0, len(run.found), run.again)
                begins.append(end)
                rows.append(rows[-1] + len(run.found))
                again |= run.again
        self._index = begins, rows, frozenset(again)


class TarStreamReader(StreamReader):
    """A compressed or remote archive, or one of recordings: what is read of each sample is shipped to the workers."""

    def __init__(self, path: str, *, recordings: bool = False) -> None:
        super().__init__(path)
        self.archive = Archive(path, distinct_names([path])[path], recordings)

    def _stream(self) -> Iterator[SampleBatch]:
        if self.archive.recordings:
            if source.is_compressed(self.path):
                raise InputError(
                    f"input {self.path}: recordings in a compressed archive cannot be found again; decompress it"
                )
            # What lies between the texts is skipped, and of a remote archive not fetched.
            with source.open_binary(self.path, decompress=False) as handle, source.sentences(self.path):
                yield from _runs(TarStream(handle, self.path, can_seek=True), self.archive, load=True)
            return
        with source.open_binary(self.path, sequential=True) as handle:
            yield from _runs(TarStream(handle, self.path), self.archive, load=True)


def name_archives(readers: Sequence[RowReader]) -> None:
    """Tell archives of one name apart, so that their samples' sources are: by the folders before the name."""
    archives = [reader for reader in readers if isinstance(reader, TarReader | TarStreamReader)]
    names = distinct_names([reader.path for reader in archives])
    for reader in archives:
        reader.archive = replace(reader.archive, name=names[reader.path])
