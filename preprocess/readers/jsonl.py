"""JSON lines: one object per line, UTF-8. Plain local files are read in the workers, others by the parent."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import orjson

from megatron_speech.errors import InputError
from preprocess.readers import source
from preprocess.readers.base import BATCH_BYTES, BATCH_ROWS, Row, RowRejected, RunReader, StreamReader
from preprocess.readers.compression import DamagedInput

# A line longer than this is no row but a file without line ends; reading it would take the memory.
MAX_LINE_BYTES = 256 << 20

# A larger file is not counted before it is converted: that would be a pass over the data that nobody sees.
COUNTED_BYTES = 256 << 20

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LONG_NUMBER = b"0" * 19  # the shortest that may not fit into 64 bits
_DIGITS_TO_ZERO = bytes(ord("0") if 0x30 <= i <= 0x39 else 0x20 for i in range(256))


def _refuse_constant(name: str) -> Any:
    raise RowRejected("not_finite", f"{name} is not JSON; leave the field out")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def parse_lines(lines: list[bytes], first: int, skip: int, rows: int) -> list[Row]:
    """Rows `skip` to `skip + rows` of `lines`, the first of which is line `first`; blank ones are no rows."""
    numbered = [(first + i, line) for i, line in enumerate(lines) if line and not line.isspace()]
    return [parse_row(number, line) for number, line in numbered[skip : skip + rows]]


def parse_row(number: int, text: bytes) -> Row:
    """One JSON object as a row.

    orjson parses. What it refuses, or would round (integers beyond 64 bits), the standard library looks at again.
    """
    try:
        if _LONG_NUMBER not in text.translate(_DIGITS_TO_ZERO):
            fields = orjson.loads(text)
            return Row(number, fields) if type(fields) is dict else _no_object(number, fields)
    except ValueError:
        pass
    return _parse_exactly(number, text)


def _parse_exactly(number: int, text: bytes) -> Row:
    try:
        fields = _DECODER.decode(text.decode("utf-8"))
        if b"\\ud" in text or b"\\uD" in text:  # half of a surrogate pair is no text, though JSON can spell it
            json.dumps(fields, ensure_ascii=False).encode("utf-8")
    except RowRejected as error:
        return Row(number, {}, error)
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError and UnicodeEncodeError
        return Row(number, {}, RowRejected("bad_json", f"not a line of JSON: {error}"))
    except RecursionError:
        return Row(number, {}, RowRejected("bad_json", "not a line of JSON: nested too deeply"))
    return Row(number, fields) if isinstance(fields, dict) else _no_object(number, fields)


def _no_object(number: int, value: Any) -> Row:
    return Row(number, {}, RowRejected("bad_json", f"holds a {type(value).__name__}, needed an object"))


@dataclass(frozen=True)
class JsonlBatch:
    """A run of lines of a local file: bytes `offset` to `offset + size`, the first of them line `line`."""

    path: str
    offset: int
    size: int
    line: int
    skip: int  # rows of the run before the first one wanted
    rows: int

    def read(self) -> list[Row]:
        """Read and parse the lines."""
        with source.sentences(self.path), open(source.local_path(self.path) or "", "rb", buffering=0) as handle:
            handle.seek(self.offset)
            data = handle.read(self.size)
        if len(data) != self.size:
            raise InputError(f"input {self.path} became shorter while it was read; leave it alone and start again")
        return parse_lines(data.split(b"\n"), self.line, self.skip, self.rows)

    def part(self, first: int, last: int) -> JsonlBatch:
        """Rows `first` to `last` of the run."""
        return replace(self, skip=self.skip + first, rows=last - first)


@dataclass(frozen=True)
class JsonlBytes:
    """A run of lines of a stream, as they are."""

    path: str
    lines: list[bytes]
    line: int
    skip: int
    rows: int

    def read(self) -> list[Row]:
        """Parse the lines."""
        return parse_lines(self.lines, self.line, self.skip, self.rows)

    def part(self, first: int, last: int) -> JsonlBytes:
        """Rows `first` to `last` of the run."""
        return replace(self, skip=self.skip + first, rows=last - first)


def _runs(handle: BinaryIO, path: str) -> Iterator[JsonlBytes]:
    """The lines of a file in runs; a byte-order mark is left on the first one."""
    lines: list[bytes] = []
    number = first = 1
    rows = size = done = 0
    try:
        while line := handle.readline(MAX_LINE_BYTES):
            if len(line) == MAX_LINE_BYTES:
                raise InputError(
                    f"input {path} line {number} is longer than {MAX_LINE_BYTES >> 20} MiB; needed one object per line"
                )
            text = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
            lines.append(line)
            number += 1
            size += len(line)
            rows += bool(text) and not text.isspace()
            if rows == BATCH_ROWS or size >= BATCH_BYTES:
                yield JsonlBytes(path, lines, first, 0, rows)
                done += rows
                first, rows, size, lines = number, 0, 0, []
    except DamagedInput as error:
        raise InputError(f"{error}; {done + rows:,} rows were read before that; restore the file") from error
    if lines:
        yield JsonlBytes(path, lines, first, 0, rows)


def _without_mark(lines: list[bytes]) -> int:
    """Bytes of a byte-order mark, which is no part of the first line."""
    return len(_BYTE_ORDER_MARK) if lines[0].startswith(_BYTE_ORDER_MARK) else 0


def _refuse_empty(path: str) -> None:
    raise InputError(f"input {path} holds no rows; make it anew, or leave it out")


class JsonlReader(RunReader):
    """A plain local file: the parent looks for line ends, once, and the workers read between them."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._index: tuple[array, array, array] | None = None

    @property
    def known_rows(self) -> int | None:
        """Number of rows; of a large file only once it was read."""
        if self._index is None and (source.size_bytes(self.path) or 0) > COUNTED_BYTES:
            return None
        return self.rows

    @property
    def rows(self) -> int:
        """Number of rows; the file is read for it."""
        if self._index is None:
            for _ in self._scan():
                pass
        assert self._index is not None
        return self._index[2][-1]

    def _runs(self) -> Iterator[JsonlBatch]:
        """All runs of lines: from the index, or from the file while the index is made."""
        if self._index is None:
            yield from self._scan()
            return
        offsets, numbers, rows = self._index
        for i in range(len(rows) - 1):
            size = offsets[i + 1] - offsets[i]
            yield JsonlBatch(self.path, offsets[i], size, numbers[i], 0, rows[i + 1] - rows[i])

    def _scan(self) -> Iterator[JsonlBatch]:
        """Read the file. The index holds of each run its byte offset, first line and the rows before it: 24 bytes."""
        offsets, numbers, rows = array("q", [0]), array("q", [1]), array("q", [0])
        with source.open_binary(self.path) as handle:
            for run in _runs(handle, self.path):
                size = sum(map(len, run.lines))
                if run.line == 1:
                    offsets[0] = _without_mark(run.lines)
                    size -= offsets[0]
                yield JsonlBatch(self.path, offsets[-1], size, run.line, 0, run.rows)
                offsets.append(offsets[-1] + size)
                numbers.append(run.line + len(run.lines))
                rows.append(rows[-1] + run.rows)
        if not rows[-1]:
            _refuse_empty(self.path)
        self._index = offsets, numbers, rows


class JsonlStream(StreamReader):
    """A compressed or remote file: the lines are shipped to the workers."""

    def _stream(self) -> Iterator[JsonlBytes]:
        empty = True
        with source.open_binary(self.path, sequential=True) as handle:
            for run in _runs(handle, self.path):
                if run.line == 1:
                    run.lines[0] = run.lines[0][_without_mark(run.lines) :]
                empty = empty and not run.rows
                yield run
        if empty:
            _refuse_empty(self.path)
