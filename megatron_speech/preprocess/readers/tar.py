"""Headers of tar archives (ustar, GNU, pax), read in order from anything that can be read.

The standard library's `tarfile` keeps every member it has seen, takes an archive that is cut off between two members
for a whole one, and needs a multiple of the time.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from megatron_speech.errors import InputError
from megatron_speech.preprocess.readers import source

BLOCK_BYTES = 512

_ZEROS = bytes(BLOCK_BYTES)
_SKIP_BYTES = 1 << 20
_MAX_HEADER_BYTES = 1 << 20  # of a long name or of pax records
_PAX_RECORD = re.compile(rb"(\d+) ")

EXTENSIONS = b"LKxg"
FILE_TYPES = b"0\x007"  # regular; old regular; contiguous
KINDS = {b"1": "link", b"2": "link", b"3": "device", b"4": "device", b"5": "folder", b"6": "device", b"S": "sparse"}


@dataclass(slots=True)
class Member:
    """One member: where its header begins, and its data."""

    name: str
    kind: str  # file, link, folder, device, sparse or other
    begin: int  # of its first header block, long names included
    offset: int
    size: int

    @property
    def end(self) -> int:
        """Where the next header begins."""
        return self.offset + -(-self.size // BLOCK_BYTES) * BLOCK_BYTES


class TarStream:
    """Reads an archive from its beginning or from a header on. Skips by seeking where it can."""

    def __init__(self, handle: BinaryIO, path: str, position: int = 0, *, can_seek: bool = False) -> None:
        self._handle, self.path, self.position, self._can_seek = handle, path, position, can_seek
        self._last = "its beginning"

    def members(self, end: int | None = None) -> Iterator[Member]:
        """Members up to byte `end` (None: the archive's end, which is checked).

        Read a member's data with :meth:`read` before the next one is yielded.

        Raises:
            InputError: the archive is cut off or damaged.
        """
        while end is None or self.position < end:
            member = self._next()
            if member is None:
                self._check_end()
                return
            yield member
            if self.position != member.end:
                self._skip_to(member.end)

    def read(self, member: Member) -> bytes:
        """The member's data."""
        if self.position != member.offset:
            self._skip_to(member.offset)
        return self._read(member.size)

    def _cut_off(self, where: str) -> InputError:
        return InputError(f"input {self.path} is cut off at byte {self.position:,} ({where}); restore the archive")

    def _read(self, count: int) -> bytes:
        data = self._handle.read(count)
        self.position += len(data)
        if len(data) != count:
            raise self._cut_off(f"in {self._last!r}")
        return data

    def _skip_to(self, position: int) -> None:
        if position > self.position and self._can_seek:
            # The last byte is read, since a seek past the end of a file is no error.
            with source.sentences(self.path):
                self._handle.seek(position - 1)
            self.position = position - 1
            self._read(1)
        while self.position < position:
            self._read(min(position - self.position, _SKIP_BYTES))

    def _next(self) -> Member | None:
        """The next member that is one, extension headers applied; None at the end block."""
        begin = self.position
        name: bytes | None = None
        size: int | None = None
        sparse = False
        while True:
            header = self._handle.read(BLOCK_BYTES)
            self.position += len(header)
            if len(header) < BLOCK_BYTES:
                what = "no end-of-archive block" if not header else "inside a header"
                raise self._cut_off(f"{what} after {self._last!r}")
            if header == _ZEROS:
                return None
            kind, length = header[156:157], self._length(header)
            if kind in EXTENSIONS:
                data = self._extension(length)
                if kind == b"L":
                    name = data.rstrip(b"\0")
                elif kind in (b"x", b"g"):
                    records = self._pax(data)
                    if kind == b"g" and {b"path", b"size"} & set(records):
                        raise InputError(f"input {self.path} has a global header with a path or size; recreate it")
                    if kind == b"x":
                        name = records.get(b"GNU.sparse.name", records.get(b"path", name))
                        size = self._decimal(records[b"size"]) if b"size" in records else size
                        sparse = sparse or any(key.startswith(b"GNU.sparse.") for key in records)
                continue
            break
        if name is None:
            name = header[:100].partition(b"\0")[0]
            if header[257:262] == b"ustar" and header[257:265] != b"ustar  \0":
                prefix = header[345:500].partition(b"\0")[0]
                name = prefix + b"/" + name if prefix else name
        if kind == b"S":
            self._sparse_map(header)
        text = name.decode("utf-8", "surrogateescape")
        self._last = text
        what = "file" if kind in FILE_TYPES else KINDS.get(kind, "other")
        if what == "file" and text.endswith("/"):  # as archives of the seventies have folders
            what = "folder"
        elif sparse:
            what = "sparse"
        length = 0 if what in ("link", "device", "folder") else length if size is None else size
        return Member(text, what, begin, self.position, length)

    def _extension(self, length: int) -> bytes:
        if length > _MAX_HEADER_BYTES:
            raise InputError(f"input {self.path} is damaged: a header of {length:,} bytes at byte {self.position:,}")
        self._last = "an extended header"
        data = self._read(length)
        self._read(-length % BLOCK_BYTES)
        return data

    def _pax(self, data: bytes) -> dict[bytes, bytes]:
        records: dict[bytes, bytes] = {}
        position = 0
        while position < len(data):
            match = _PAX_RECORD.match(data, position)
            if match is None or int(match[1]) < len(match[0]) + 2:
                raise InputError(f"input {self.path} is damaged: no pax record at byte {self.position:,}")
            key, _, value = data[match.end() : position + int(match[1]) - 1].partition(b"=")
            records[key] = value
            position += int(match[1])
        return records

    def _decimal(self, text: bytes) -> int:
        if not text.isdigit() or len(text) > 18:
            raise InputError(f"input {self.path} is damaged: a pax record before byte {self.position:,} has no size")
        return int(text)

    def _sparse_map(self, header: bytes) -> None:
        more = header[482]
        while more:
            more = self._read(BLOCK_BYTES)[504]

    def _number(self, field: bytes) -> int:
        if field[0] == 0x80:  # base 256: sizes of 8 GiB and more
            return int.from_bytes(field[4:], "big") & (2**62 - 1)
        try:
            return int(field.strip(b" \0") or b"0", 8)
        except ValueError as error:
            where = f"in a header before byte {self.position:,}"
            raise InputError(f"input {self.path} is no tar archive, or damaged: no number {where}") from error

    def _length(self, header: bytes) -> int:
        """The size that a header states, its checksum checked."""
        try:  # digits and their end, as nearly all are written
            length, stored = int(header[124:135], 8), int(header[148:154], 8)
            if header[135] not in b"\0 ":
                raise ValueError
        except ValueError:
            length, stored = self._number(header[124:136]), self._number(header[148:156])
        # The lower half of Adler-32 is the sum of the bytes plus one, modulo 65521: a tenth of the time of sum().
        if zlib.adler32(header) & 0xFFFF != (1 + stored - 8 * 0x20 + sum(header[148:156])) % 65521:
            raise InputError(
                f"input {self.path} is no tar archive, or damaged: no header at byte {self.position - BLOCK_BYTES:,} "
                f"(after {self._last!r})"
            )
        return length

    def _check_end(self) -> None:
        """After the end block there is padding and nothing else."""
        while data := self._handle.read(_SKIP_BYTES):
            self.position += len(data)
            if data.count(0) != len(data):
                raise InputError(
                    f"input {self.path} goes on after its end-of-archive block, near byte {self.position:,}: "
                    "archives were joined by cat; name them one by one, or join them with tar --concatenate"
                )
