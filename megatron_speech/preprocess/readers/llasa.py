"""LLaSA's memmaps: rows of token ids of one length, padded, of a LLaMA tokenizer extended by special tokens and codes.

    S_input_ids.memmap      int32 [N, L] without a header
    S_input_ids_shape.npy   (N, L)

A row is `<|TEXT_UNDERSTANDING_START|>` text `<|TEXT_UNDERSTANDING_END|>` `<|SPEECH_GENERATION_START|>` codes
`<|SPEECH_GENERATION_END|>`, then padding. It becomes `transcript`, decoded by the tokenizer, and `codes`. A code's id
is that of `<|s_0|>` plus the code; where the tokenizer has no such token, the number of its tokens plus the code,
which is how the memmaps are made.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_speech.errors import InputError
from megatron_speech.preprocess.readers import source
from megatron_speech.preprocess.readers.base import BATCH_ROWS, Row, RowBatch, RowReader, RowRejected
from megatron_speech.preprocess.readers.flat import FlatFile, open_headerless, open_npy
from megatron_speech.tokens.layouts import LAYOUTS

# In the order in which LLaSA's tools append them to a tokenizer that has none of them.
SPECIALS = LAYOUTS["llasa"].marks
_FIRST_CODE = "<|s_0|>"
_MEMMAP = re.compile(r".+_input_ids\.memmap")


@dataclass(frozen=True)
class LlasaIds:
    """The ids that give a row its shape."""

    text_start: int
    text_end: int
    speech_start: int
    speech_end: int
    first_code: int


@functools.lru_cache(maxsize=4)
def load_tokenizer(folder: str) -> Any:
    """The tokenizer in `folder`, once per process.

    Raises:
        InputError: there is none.
    """
    import tokenizers

    path = os.path.join(folder, "tokenizer.json") if os.path.isdir(folder) else folder
    if not os.path.exists(path):
        raise InputError(f"--input-tokenizer {folder} holds no tokenizer.json; name the folder of the tokenizer")
    try:
        return tokenizers.Tokenizer.from_file(path)
    except Exception as error:  # what the library raises for a file it cannot read is of no narrower class
        raise InputError(f"--input-tokenizer {path} is not a tokenizer that can be read: {error}") from error


def llasa_ids(folder: str) -> LlasaIds:
    """The special ids of LLaSA in the tokenizer of `folder`.

    Raises:
        InputError: it has some of the special tokens and lacks others.
    """
    tokenizer = load_tokenizer(folder)
    ids = [tokenizer.token_to_id(token) for token in SPECIALS]
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    if all(i is None for i in ids):
        ids = list(range(size, size + len(SPECIALS)))
        size += len(SPECIALS)
    missing = [token for token, i in zip(SPECIALS, ids, strict=True) if i is None]
    if missing:
        raise InputError(f"--input-tokenizer {folder} lacks {', '.join(missing)}; name LLaSA's tokenizer")
    first_code = tokenizer.token_to_id(_FIRST_CODE)
    return LlasaIds(ids[2], ids[3], ids[4], ids[5], size if first_code is None else first_code)


@dataclass(frozen=True)
class LlasaBatch:
    """Rows `first` to `first + rows` (from 0) of a memmap."""

    path: str
    file: FlatFile
    tokenizer: str
    ids: LlasaIds
    first: int
    rows: int
    data: bytes | None = None

    def read(self) -> list[Row]:
        """Find the parts of each row, decode its text and count its codes from 0."""
        if self.data is not None:
            block = self.file.view(self.data)
        else:
            block = self.file.read(self.first, self.first + self.rows)
        ids = self.ids
        marks = (ids.text_start, ids.text_end, ids.speech_start, ids.speech_end)
        counts = np.stack([(block == mark).sum(axis=1) for mark in marks], axis=1)
        places = np.stack([(block == mark).argmax(axis=1) for mark in marks], axis=1)
        # What follows the speech is one id, repeated.
        width = block.shape[1]
        padding = block != block[:, -1:]
        padding_ok = width - 1 - padding[:, ::-1].argmax(axis=1) <= places[:, 3]
        codes = block - np.int32(ids.first_code)
        rows: list[Row] = []
        texts: list[list[int]] = []
        for i, (count, place) in enumerate(zip(counts.tolist(), places.tolist(), strict=True)):
            row = Row(self.first + i + 1, {})
            rows.append(row)
            text_start, text_end, speech_start, speech_end = place
            ends = speech_end == width - 1 or padding_ok[i]
            if count == [1, 1, 1, 0]:
                reason = f"its {width} ids hold no {SPECIALS[5]}: the speech was cut off when the row was made"
                row.rejected = RowRejected("llasa_truncated", reason)
            elif count != [1, 1, 1, 1] or not text_start == 0 < text_end == speech_start - 1 < speech_end or not ends:
                reason = "its ids are not text, then speech, then padding, each between its marks"
                row.rejected = RowRejected("llasa_shape", reason)
            else:
                row.fields["codes"] = codes[i, speech_start + 1 : speech_end]
                texts.append(block[i, 1:text_end].tolist())
        decoded = iter(load_tokenizer(self.tokenizer).decode_batch(texts, skip_special_tokens=False))
        for row in rows:
            if row.rejected is None:
                row.fields["transcript"] = next(decoded)
        return rows


class LlasaReader:
    """One `S_input_ids.memmap`."""

    def __init__(self, path: str, tokenizer: str | None) -> None:
        self.path = path
        self._shape = path.removesuffix(".memmap") + "_shape.npy"
        self.files: tuple[str, ...] = (path, self._shape)
        if tokenizer is None:
            raise InputError(
                f"input {path} holds ids of LLaSA's tokenizer; name its folder with --input-tokenizer, "
                "so that its text can be decoded"
            )
        self._tokenizer = tokenizer
        self._open: tuple[FlatFile, LlasaIds] | None = None

    def _opened(self) -> tuple[FlatFile, LlasaIds]:
        if self._open is None:
            if not source.exists(self._shape):
                raise InputError(f"input {self.path} needs {self._shape} beside it, which does not exist")
            array = open_npy(self._shape, "the shape (rows, length)")
            shape = array.read(0, array.length).tolist()
            if len(shape) != 2 or array.row_shape or min(shape) < 1:
                raise InputError(f"input {self._shape} holds {shape}, needed (rows, length), both at least 1")
            rows, length = shape
            self._open = open_headerless(self.path, np.dtype("<i4"), (length,), rows), llasa_ids(self._tokenizer)
        return self._open

    @property
    def known_rows(self) -> int:
        """Number of rows."""
        return self._opened()[0].length

    rows = known_rows

    def batches(self, start: int, stop: int | None = None) -> Iterator[RowBatch]:
        """Rows `start` to `stop` (from 0), in order."""
        file, ids = self._opened()
        stop = file.length if stop is None else min(stop, file.length)
        for first in range(start, stop, BATCH_ROWS):
            rows = min(BATCH_ROWS, stop - first)
            data = None if file.is_local else file.read_bytes(first, first + rows)
            yield LlasaBatch(self.path, file, self._tokenizer, ids, first, rows, data)


def is_llasa(names: list[str]) -> bool:
    """Whether a folder with these files holds LLaSA's memmaps."""
    return any(_MEMMAP.fullmatch(name) for name in names)


def llasa_readers(folder: str, names: list[str], tokenizer: str | None) -> list[RowReader]:
    """The readers of all memmaps in a folder."""
    return [LlasaReader(source.join(folder, name), tokenizer) for name in names if _MEMMAP.fullmatch(name)]
