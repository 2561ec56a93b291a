"""JSON lines: one object per line, UTF-8."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_speech.errors import InputError
from preprocess.readers.base import BATCH_BYTES, BATCH_ROWS, Row, RowRejected


def _refuse_constant(name: str) -> Any:
    raise RowRejected("not_finite", f"{name} is not JSON; leave the field out")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


@dataclass(frozen=True)
class JsonlBatch:
    """A run of lines: bytes `offset` to `offset + size`, the first of them line `line`."""

    path: str
    offset: int
    size: int
    line: int
    skip: int  # rows of the run before the first and after the last one wanted
    rows: int

    def read(self) -> list[Row]:
        """Parse the lines; blank ones are no rows."""
        with open(self.path, "rb") as handle:
            handle.seek(self.offset)
            lines = handle.read(self.size).split(b"\n")
        numbered = [(self.line + i, line) for i, line in enumerate(lines) if line and not line.isspace()]
        return [_parse(number, line) for number, line in numbered[self.skip : self.skip + self.rows]]


def _parse(number: int, line: bytes) -> Row:
    try:
        fields = _DECODER.decode(line.decode("utf-8"))
        if b"\\ud" in line or b"\\uD" in line:  # half of a surrogate pair is no text, though JSON can spell it
            json.dumps(fields, ensure_ascii=False).encode("utf-8")
    except RowRejected as error:
        return Row(number, {}, error)
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError and UnicodeEncodeError
        return Row(number, {}, RowRejected("bad_json", f"not a line of JSON: {error}"))
    except RecursionError:
        return Row(number, {}, RowRejected("bad_json", "not a line of JSON: nested too deeply"))
    if not isinstance(fields, dict):
        return Row(number, {}, RowRejected("bad_json", f"holds a {type(fields).__name__}, needed an object"))
    return Row(number, fields)


class JsonlReader:
    """A `.jsonl` file. Opening it scans it once for line ends."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._runs: list[JsonlBatch] = []
        try:
            self._scan()
        except OSError as error:
            raise InputError(f"input {path} cannot be read: {error.strerror or error}") from error
        self.rows = sum(run.rows for run in self._runs)

    def _scan(self) -> None:
        offset = start = rows = 0
        number = first = 1
        with open(self.path, "rb", buffering=1 << 20) as handle:
            if handle.read(3) != b"\xef\xbb\xbf":  # a byte-order mark is no part of the first line
                handle.seek(0)
            offset = start = handle.tell()
            for line in handle:
                offset += len(line)
                number += 1
                rows += not line.isspace()
                if rows == BATCH_ROWS or offset - start >= BATCH_BYTES:
                    self._runs.append(JsonlBatch(self.path, start, offset - start, first, 0, rows))
                    start, first, rows = offset, number, 0
            size = os.fstat(handle.fileno()).st_size
        if rows:
            self._runs.append(JsonlBatch(self.path, start, size - start, first, 0, rows))

    def batches(self, start: int, stop: int) -> Iterator[JsonlBatch]:
        """Rows `start` to `stop` (from 0), in order."""
        position = 0
        for run in self._runs:
            first, last = max(start - position, 0), min(stop - position, run.rows)
            position += run.rows
            if first < last:
                yield JsonlBatch(run.path, run.offset, run.size, run.line, first, last - first)
