"""Inworld's pretraining streams (github.com/inworld-ai/tts, tts/data/datasets/pretraining.py): int32 without a header.

    S_pretraining_codes.npy     codes end to end; a number that is no code is an id of the tokenizer
    S_pretraining_tokens.npy    ids of text end to end

The trainer there cuts such a stream at multiples of its sequence length, so the files need not say where a sample ends.
Here they must: codes between the ids of `<|speech_start|>` and `<|speech_end|>` are a row, and ids up to the end id
(`--input-eod`) are one. A stream without them is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from megatron_speech.errors import InputError
from megatron_speech.preprocess.readers.base import BATCH_ROWS, Row, RowRejected, StreamReader
from megatron_speech.preprocess.readers.flat import FlatFile, is_npy, open_headerless, open_npy
from megatron_speech.preprocess.readers.llasa import load_tokenizer
from megatron_speech.tokens.layouts import CODE_TOKEN

CODES_ENDING = "_pretraining_codes.npy"
TOKENS_ENDING = "_pretraining_tokens.npy"

_START, _END = "<|speech_start|>", "<|speech_end|>"
_SCANNED = 1 << 22  # numbers looked through at a time


@dataclass(frozen=True)
class StreamBatch:
    """Rows of a stream.

    Attributes:
        path, file: the stream.
        first: number of the first row, from 1.
        bounds: int64 [rows, 2]: numbers of the stream that are each row's.
        ended: bool [rows]: whether a mark stands where it must.
        field: what the numbers are.
        data: the numbers from the first bound to the last, where a worker could not read them itself.
    """

    path: str
    file: FlatFile
    first: int
    bounds: np.ndarray
    ended: np.ndarray
    field: str
    data: bytes | None = None

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.bounds)

    def part(self, first: int, last: int) -> StreamBatch:
        """Rows `first` to `last` of the batch."""
        bounds = self.bounds[first:last]
        data = None if self.file.is_local else self.file.read_bytes(int(bounds[0, 0]), int(bounds[-1, 1]))
        return replace(self, first=self.first + first, bounds=bounds, ended=self.ended[first:last], data=data)

    def read(self) -> list[Row]:
        """Read the numbers."""
        begin, end = int(self.bounds[0, 0]), int(self.bounds[-1, 1])
        block = self.file.read(begin, end) if self.data is None else self.file.view(self.data)
        rows = []
        for i, ((first, last), ended) in enumerate(zip(self.bounds.tolist(), self.ended.tolist(), strict=True)):
            row = Row(self.first + i, {self.field: block[first - begin : last - begin]})
            if not ended and self.field == "codes":
                reason = f"numbers {first:,} to {last:,} of the stream are not between {_START} and {_END}"
                row.rejected = RowRejected("stream_without_marks", reason)
            elif not ended:
                row.notices = ("text_ids_without_eod",)
            rows.append(row)
        return rows


class PretrainingReader(StreamReader):
    """One stream. `tokenizer`: folder of the tokenizer that wrote the ids; `eod`: the id that ends a text."""

    def __init__(self, path: str, tokenizer: str | None, eod: int | None) -> None:
        super().__init__(path)
        self._speech = path.endswith(CODES_ENDING)
        self._eod = eod
        if self._speech and tokenizer is None:
            raise InputError(
                f"input {path} holds codes end to end; name the folder of Inworld's tokenizer with --input-tokenizer, "
                f"so that {_START} and {_END} are found between samples (or read its vectorised folder in place of it)"
            )
        if not self._speech and eod is None:
            raise InputError(
                f"input {path} holds ids of text end to end; name the id that ends a text with --input-eod"
            )
        self._tokenizer = tokenizer

    def _stream(self) -> Iterator[StreamBatch]:
        plain = np.dtype("<i4")
        file = open_npy(self.path, "ids") if is_npy(self.path) else open_headerless(self.path, plain)
        if file.row_shape or not file.length:
            raise InputError(f"input {self.path} holds no stream of numbers [n]; recreate it, or leave it out")
        rows = 0
        for bounds, ended in self._speech_spans(file) if self._speech else self._texts(file):
            for first in range(0, len(bounds), BATCH_ROWS):
                part = slice(first, first + BATCH_ROWS)
                yield StreamBatch(
                    self.path, file, rows + 1, bounds[part], ended[part], "codes" if self._speech else "text_ids"
                )
                rows += len(bounds[part])

    def _marks(self) -> tuple[int, int]:
        assert self._tokenizer is not None
        tokenizer = load_tokenizer(self._tokenizer)
        start, end = (tokenizer.token_to_id(token) for token in (_START, _END))
        if start is None or end is None:
            raise InputError(f"--input-tokenizer {self._tokenizer} lacks {_START} or {_END}; name Inworld's tokenizer")
        for mark in (start, end):
            if tokenizer.token_to_id(CODE_TOKEN.format(mark)) is not None:
                raise InputError(
                    f"--input-tokenizer {self._tokenizer} has a token {CODE_TOKEN.format(mark)}, so that {mark} in "
                    f"{self.path} may be a code or a mark; name Inworld's tokenizer"
                )
        return start, end

    def _places(self, file: FlatFile, marks: tuple[int, ...]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(place, value) of the marks in the stream, piece by piece."""
        for first in range(0, file.length, _SCANNED):
            block = file.read(first, min(first + _SCANNED, file.length))
            found = np.flatnonzero(np.isin(block, marks))
            yield found + first, block[found]

    def _speech_spans(self, file: FlatFile) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Numbers between marks: a row where they are a start and an end, else a rejected one unless it is empty."""
        start, end = self._marks()
        place, value = -1, end  # the last mark; before the stream as if a sample had just ended
        any_start = False
        for places, values in self._places(file, (start, end)):
            any_start = any_start or bool((values == start).any())
            places, values = np.concatenate([[place], places]), np.concatenate([[value], values])
            yield self._between(places, values, start, end)
            place, value = int(places[-1]), int(values[-1])
        if not any_start:
            raise InputError(
                f"input {self.path} holds no {_START} (id {start}): where a sample ends cannot be told; read the "
                "vectorised folder that it was made of (S_codes.npy, S_codes_index.npy, S_samples.jsonl)"
            )
        places, values = np.array([place, file.length]), np.array([value, -1])
        yield self._between(places, values, start, end)

    def _between(self, places: np.ndarray, values: np.ndarray, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        bounds = np.stack([places[:-1] + 1, places[1:]], axis=1).astype(np.int64)
        good = (values[:-1] == start) & (values[1:] == end)
        kept = good | (bounds[:, 1] > bounds[:, 0]) | (values[:-1] == start)
        return bounds[kept], good[kept]

    def _texts(self, file: FlatFile) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        assert self._eod is not None
        begin = 0
        for places, _ in self._places(file, (self._eod,)):
            begins = np.concatenate([[begin], places + 1])
            yield np.stack([begins[:-1], places], axis=1).astype(np.int64), np.ones(len(places), bool)
            begin = int(begins[-1])
        if not begin:
            raise InputError(
                f"input {self.path} holds no id {self._eod}: where a text ends cannot be told; name the id that ends "
                "one with --input-eod, or convert the texts themselves"
            )
        if begin < file.length:
            yield np.array([[begin, file.length]], np.int64), np.zeros(1, bool)
