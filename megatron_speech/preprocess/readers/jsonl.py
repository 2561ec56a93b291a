"""JSON lines: one object per line, UTF-8. Plain local files are read in the workers, others by the parent."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import orjson

from megatron_speech.errors import InputError
from megatron_speech.preprocess.readers import source
from megatron_speech.preprocess.readers.base import (
    BATCH_BYTES,
    BATCH_ROWS,
    Row,
    RowRejected,
    Rows,
    RunReader,
    StreamReader,
)
from megatron_speech.preprocess.readers.compression import DamagedInput

# A line longer than this is no row but a file without line ends; reading it would take the memory.
MAX_LINE_BYTES = 256 << 20

# A larger file is not counted before it is converted: that would be a silent pass over the data.
COUNTED_BYTES = 256 << 20

_BLOCK_BYTES = 1 << 20  # looked through for line ends at a time

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LONG_NUMBER = b"0" * 19  # the shortest that may not fit into 64 bits
_DIGITS_TO_ZERO = bytes(ord("0") if 0x30 <= i <= 0x39 else 0x20 for i in range(256))


def _refuse_constant(name: str) -> Any:
    raise RowRejected("not_finite", f"{name} is not JSON; leave the field out")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def parse_lines(data: bytes, first: int, skip: int, rows: int) -> Rows:
    """Rows `skip` to `skip + rows` of the lines in `data`, the first of which is line `first`; blank ones are no rows.

    All are parsed as :func:`parse_row` does, but what it looks for in a line is looked for in all of them at once.
    """
    lines = data.split(b"\n")
    number: Sequence[int] = range(first, first + len(lines))
    if not all(lines) or any(map(bytes.isspace, lines)):
        number = [i for i, line in zip(number, lines, strict=True) if line and not line.isspace()]
        lines = [lines[i - first] for i in number]
    number, lines = number[skip : skip + rows], lines[skip : skip + rows]
    try:
        if _LONG_NUMBER not in data.translate(_DIGITS_TO_ZERO):
            fields = list(map(orjson.loads, lines))
            if set(map(type, fields)) <= {dict}:
                return Rows(number, fields)
    except ValueError:
        pass
    return Rows.of(list(map(parse_row, number, lines)))


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
    skip: int  # rows of the run before the first one needed
    rows: int

    def read(self) -> Rows:
        """Read and parse the lines."""
        with source.sentences(self.path), open(source.local_path(self.path) or "", "rb", buffering=0) as handle:
            handle.seek(self.offset)
            data = handle.read(self.size)
        if len(data) != self.size:
            raise InputError(f"input {self.path} became shorter while it was read; leave it alone and start again")
        return parse_lines(data, self.line, self.skip, self.rows)

    def part(self, first: int, last: int) -> JsonlBatch:
        """Rows `first` to `last` of the run."""
        return replace(self, skip=self.skip + first, rows=last - first)


@dataclass(frozen=True)
class JsonlBytes:
    """A run of lines of a stream, as they are."""

    path: str
    data: bytes
    line: int
    skip: int
    rows: int

    def read(self) -> Rows:
        """Parse the lines."""
        return parse_lines(self.data, self.line, self.skip, self.rows)

    def part(self, first: int, last: int) -> JsonlBytes:
        """Rows `first` to `last` of the run."""
        return replace(self, skip=self.skip + first, rows=last - first)


class _Run(NamedTuple):
    """Whole lines of a file."""

    offset: int  # of the first byte
    data: bytes
    line: int  # the first one's number
    lines: int
    rows: int


def _runs(handle: BinaryIO, path: str) -> Iterator[_Run]:
    """The lines of a file in runs that end with the row that makes `BATCH_ROWS` or the line that makes `BATCH_BYTES`.

    A byte-order mark is no part of the first one.
    """
    offset, line, done = 0, 1, 0
    parts: list[bytes] = []  # of the run in the making, and how much that is
    size = lines = rows = 0
    try:
        for block in _blocks(handle):
            if line == 1 and not lines and block.startswith(_BYTE_ORDER_MARK):
                offset, block = len(_BYTE_ORDER_MARK), block.removeprefix(_BYTE_ORDER_MARK)
            ends = _line_ends(block)
            starts = np.concatenate([[0], ends])[:-1]
            longest = np.flatnonzero(ends - starts >= MAX_LINE_BYTES)
            if len(longest):
                raise InputError(
                    f"input {path} line {line + lines + longest[0]} is longer than {MAX_LINE_BYTES >> 20} MiB; "
                    "needed one object per line"
                )
            so_far = np.cumsum(_is_row(block, starts, ends))  # rows up to and with each line
            begin = first = counted = 0  # of the block: byte, line and rows that are in a run already
            while True:
                by_rows = np.searchsorted(so_far, counted + BATCH_ROWS - rows)
                last = int(min(by_rows, np.searchsorted(ends, begin + BATCH_BYTES - size)))
                if last >= len(ends):
                    break
                end = int(ends[last])
                parts.append(block[begin:end])
                rows += int(so_far[last]) - counted
                run = _Run(offset, b"".join(parts), line, lines + last + 1 - first, rows)
                yield run
                offset, line, done = offset + len(run.data), line + run.lines, done + rows
                begin, first, counted = end, last + 1, int(so_far[last])
                parts, size, lines, rows = [], 0, 0, 0
            if first < len(ends):
                parts.append(block[begin:])
                size += len(block) - begin
                lines += len(ends) - first
                rows += int(so_far[-1]) - counted
    except DamagedInput as error:
        raise InputError(f"{error}; {done + rows:,} rows were read before that; restore the file") from error
    if lines:
        yield _Run(offset, b"".join(parts), line, lines, rows)


def _blocks(handle: BinaryIO) -> Iterator[bytes]:
    """A file in pieces that end where a line does, but for the last one, and one that is too long for a line."""
    parts: list[bytes] = []
    while piece := handle.read1(_BLOCK_BYTES):  # type: ignore[attr-defined]  # a buffered reader, which has it
        end = piece.rfind(b"\n") + 1
        parts.append(piece[:end] if end else piece)
        if end or sum(map(len, parts)) >= MAX_LINE_BYTES:
            yield b"".join(parts)
            parts = [piece[end:]] if end else []
    if any(parts):
        yield b"".join(parts)


def _line_ends(block: bytes) -> np.ndarray:
    """Where each line ends, behind its line end if it has one, int64 [lines]."""
    ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + 1
    return ends if block.endswith(b"\n") or not block else np.append(ends, len(block))


def _is_row(block: bytes, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Which lines are not blank, bool [lines]."""
    result = np.frombuffer(block, np.uint8)[starts] > ord(" ")  # no blank begins otherwise
    for i in np.flatnonzero(~result).tolist():
        result[i] = not block[starts[i] : ends[i]].isspace()
    return result


def _refuse_empty(path: str) -> None:
    raise InputError(f"input {path} holds no rows; recreate it, or leave it out")


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
        offsets, lines, rows = self._index
        for i in range(len(lines)):
            size = offsets[i + 1] - offsets[i]
            yield JsonlBatch(self.path, offsets[i], size, lines[i], 0, rows[i + 1] - rows[i])

    def _scan(self) -> Iterator[JsonlBatch]:
        """Read the file. The index holds of each run its byte offset, first line and the rows before it: 24 bytes."""
        offsets, lines, rows = array("q"), array("q"), array("q", [0])
        end = 0
        with source.open_binary(self.path) as handle:
            for run in _runs(handle, self.path):
                yield JsonlBatch(self.path, run.offset, len(run.data), run.line, 0, run.rows)
                offsets.append(run.offset)
                lines.append(run.line)
                rows.append(rows[-1] + run.rows)
                end = run.offset + len(run.data)
        if not rows[-1]:
            _refuse_empty(self.path)
        offsets.append(end)
        self._index = offsets, lines, rows


class JsonlStream(StreamReader):
    """A compressed or remote file: the lines are shipped to the workers."""

    def _stream(self) -> Iterator[JsonlBytes]:
        empty = True
        with source.open_binary(self.path, sequential=True) as handle:
            for run in _runs(handle, self.path):
                empty = empty and not run.rows
                yield JsonlBytes(self.path, run.data, run.line, 0, run.rows)
        if empty:
            _refuse_empty(self.path)
