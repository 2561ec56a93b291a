"""JSON arrays of objects: `[{…}, {…}]`, and `{"data": [{…}, {…}]}`. Read in pieces, as lines of JSON are.

An array is cut into its elements, and each is then parsed as a line of JSON lines is, so that what is refused there is
refused here. Rows are numbered by their place in the array, from 1.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import BinaryIO

from megatron_speech.errors import InputError
from megatron_speech.preprocess.readers import source
from megatron_speech.preprocess.readers.base import BATCH_BYTES, BATCH_ROWS, StreamReader
from megatron_speech.preprocess.readers.compression import DamagedInput
from megatron_speech.preprocess.readers.jsonl import MAX_LINE_BYTES, JsonlBytes

_BLOCK_BYTES = 1 << 20
_ARRAY = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[\s*(?:\{|\]|$)")
_WRAPPED = re.compile(rb'(?:\xef\xbb\xbf)?\s*\{\s*"data"\s*:\s*\[')
_BEGIN = re.compile(r'\ufeff?\s*(?:(\{)\s*"data"\s*:\s*)?\[')
_SPACE = re.compile(r"\s*")
_DECODER = json.JSONDecoder()


def is_array(head: bytes) -> bool:
    """Whether a JSON file that begins with `head` is an array of objects, or an object with one called data."""
    return _ARRAY.match(head) is not None or _WRAPPED.match(head) is not None


class _Elements:
    """The elements of an array as texts, from a file read in pieces."""

    def __init__(self, handle: BinaryIO, path: str) -> None:
        self._handle, self._path = handle, path
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._text, self._at, self._ended = "", 0, False
        self._piece = _BLOCK_BYTES
        self.done = 0

    def _more(self) -> bool:
        """Read on; whether there was more. Pieces grow while one element is read, so that it is looked at few times."""
        if self._ended:
            return False
        data = self._handle.read(self._piece)
        self._ended = not data
        self._text = self._text[self._at :] + self._decode(data, final=self._ended)
        self._at = 0
        if len(self._text) > MAX_LINE_BYTES:
            raise self._refusal(f"holds an element longer than {MAX_LINE_BYTES >> 20} MiB, or is damaged there")
        self._piece *= 2
        return True

    def _refusal(self, what: str, remedy: str = "recreate it") -> InputError:
        return InputError(f"input {self._path} {what} (after {self.done:,} rows); {remedy}")

    def _next_sign(self) -> str:
        """The next sign that is no blank; empty at the end of the file."""
        while True:
            match = _SPACE.match(self._text, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def __iter__(self) -> Iterator[str]:
        while (match := _BEGIN.match(self._text)) is None:
            if not self._more():
                raise self._refusal("is no JSON array")
        self._at = match.end()
        if self._next_sign() == "]":
            self._at += 1
        else:
            yield from self._all()
        if match[1]:
            sign = self._next_sign()
            if sign == ",":
                remedy = "write the list alone: jq -c '.data[]' X.json > X.jsonl"
                raise self._refusal("has other keys beside data, whose meaning is not known", remedy)
            if sign != "}":
                raise self._refusal("is cut off: its object does not end")
            self._at += 1
        if sign := self._next_sign():
            raise self._refusal(f"goes on after its end with {sign!r}")

    def _all(self) -> Iterator[str]:
        while True:
            if not self._next_sign():
                raise self._refusal("is cut off: its array does not end")
            yield self._element()
            self.done += 1
            sign = self._next_sign()
            self._at += 1
            if sign == "]":
                return
            if sign != ",":
                raise self._refusal("is cut off: its array does not end" if not sign else f"has {sign!r} between rows")

    def _element(self) -> str:
        while True:
            try:
                _, end = _DECODER.raw_decode(self._text, self._at)
                # A number or word at the end of what was read so far may go on.
                if end < len(self._text) or self._text[end - 1] in "}]" or not self._more():
                    break
            except (ValueError, RecursionError) as error:
                if isinstance(error, RecursionError) or not self._more():
                    raise self._refusal(f"is not JSON: {error}") from error
        text = self._text[self._at : end]
        self._at = end
        self._piece = _BLOCK_BYTES
        return text


class JsonArrayReader(StreamReader):
    """A JSON array, read from its beginning for every pass."""

    def _stream(self) -> Iterator[JsonlBytes]:
        first, size = 1, 0
        lines: list[bytes] = []
        with source.open_binary(self.path, sequential=True) as handle:
            elements = _Elements(handle, self.path)
            try:
                for text in elements:
                    # Line ends are blanks between the parts of an element: none stands inside a string.
                    line = text.encode("utf-8", "surrogateescape").replace(b"\n", b" ")
                    lines.append(line)
                    size += len(line)
                    if len(lines) == BATCH_ROWS or size >= BATCH_BYTES:
                        yield JsonlBytes(self.path, b"\n".join(lines), first, 0, len(lines))
                        first, size, lines = first + len(lines), 0, []
            except DamagedInput as error:
                raise InputError(f"{error}; {elements.done:,} rows were read before that; restore the file") from error
        if lines:
            yield JsonlBytes(self.path, b"\n".join(lines), first, 0, len(lines))
        elif first == 1:
            raise InputError(f"input {self.path} holds no rows; recreate it, or leave it out")
