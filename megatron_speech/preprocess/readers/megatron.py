"""Datasets that megatron's `tools/preprocess_data.py` wrote: `P.bin` and `P.idx`. A document is a row with `text_ids`.

Layout of `.idx`: see `megatron_speech.data.dataset.indexed`. A document of several sequences is one row.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron_speech.data.dataset.indexed import DTYPE_CODES, HEADER, MAGIC, VERSION
from megatron_speech.errors import InputError
from megatron_speech.preprocess.readers import source
from megatron_speech.preprocess.readers.arrays import ArrayBatch, NumberedRows, cut
from megatron_speech.preprocess.readers.base import BATCH_ROWS, RowBatch
from megatron_speech.preprocess.readers.flat import FlatFile, open_headerless

_SEQUENCES_AT_A_TIME = 1 << 20


class MegatronReader:
    """The documents of `P.bin` and `P.idx`. `eod` is taken off the end of a document, once, if it is there."""

    def __init__(self, path: str, eod: int | None) -> None:
        prefix = path.removesuffix(".idx").removesuffix(".bin")
        self.path = f"{prefix}.idx"
        self.files: tuple[str, ...] = (f"{prefix}.bin", f"{prefix}.idx")
        self._eod = eod
        self._open: tuple[FlatFile, FlatFile, FlatFile] | None = None

    def _opened(self) -> tuple[FlatFile, FlatFile, FlatFile]:
        """(ids, byte offset of each sequence, first sequence of each document and the number of sequences)."""
        if self._open is None:
            with source.open_binary(self.path, decompress=False) as handle:
                head = handle.read(HEADER.size)
            if len(head) < HEADER.size or head[: len(MAGIC)] != MAGIC:
                raise InputError(f"input {self.path} is no .idx of a megatron dataset, or not all of one")
            _, version, code, sequences, bounds = HEADER.unpack(head)
            dtype = DTYPE_CODES.get(code)
            if version != VERSION or dtype is None or not np.issubdtype(dtype, np.integer):
                raise InputError(
                    f"input {self.path} has version {version} and dtype code {code}; "
                    f"needed version {VERSION} and integers"
                )
            if bounds < 2 or not sequences:
                raise InputError(f"input {self.path} holds no documents; recreate it, or leave it out")
            size = HEADER.size + 12 * sequences + 8 * bounds
            found = source.size_bytes(self.path)
            if found == size + sequences:
                raise InputError(f"input {self.path} is of several modalities, which are not read")
            if found is not None and found != size:
                raise InputError(f"input {self.path} holds {found:,} bytes, needed {size:,}; it is cut off or damaged")
            ids = open_headerless(self.files[0], dtype)
            lengths = FlatFile(self.path, np.dtype("<i4"), HEADER.size, sequences)
            offsets = FlatFile(self.path, np.dtype("<i8"), HEADER.size + 4 * sequences, sequences)
            documents = FlatFile(self.path, np.dtype("<i8"), HEADER.size + 12 * sequences, bounds)
            self._check(ids, lengths, offsets, documents)
            self._open = ids, offsets, documents
        return self._open

    def _check(self, ids: FlatFile, lengths: FlatFile, offsets: FlatFile, documents: FlatFile) -> None:
        """Sequences lie end to end in `.bin`, and documents are runs of sequences."""
        end = 0
        for first in range(0, lengths.length, _SEQUENCES_AT_A_TIME):
            last = min(first + _SEQUENCES_AT_A_TIME, lengths.length)
            sizes = lengths.read(first, last).astype(np.int64) * ids.dtype.itemsize
            begins = offsets.read(first, last)
            expected = end + np.cumsum(sizes) - sizes
            if (sizes < 0).any() or (begins != expected).any():
                row = first + int(np.argmax((sizes < 0) | (begins != expected)))
                raise InputError(f"input {self.path}: sequence {row:,} does not begin where the one before it ends")
            end += int(sizes.sum())
        size = ids.length * ids.dtype.itemsize
        if end != size:
            raise InputError(
                f"input {self.files[0]} holds {size:,} bytes, but {self.path} is of {end:,}; "
                "they are not of one conversion, or one of them is cut off"
            )
        previous = 0
        for first in range(0, documents.length, _SEQUENCES_AT_A_TIME):
            values = documents.read(first, min(first + _SEQUENCES_AT_A_TIME, documents.length))
            if (first == 0 and values[0] != 0) or (np.diff(values, prepend=previous) < 0).any():
                raise InputError(f"input {self.path}: its documents are no runs of sequences; it is damaged")
            previous = int(values[-1])
        if previous != lengths.length:
            raise InputError(f"input {self.path}: its documents end at sequence {previous:,} of {lengths.length:,}")

    @property
    def known_rows(self) -> int:
        """Number of documents."""
        return self._opened()[2].length - 1

    rows = known_rows

    def batches(self, start: int, stop: int | None = None) -> Iterator[RowBatch]:
        """Documents `start` to `stop` (from 0), in order."""
        ids, offsets, documents = self._opened()
        stop = self.known_rows if stop is None else min(stop, self.known_rows)
        for first in range(start, stop, BATCH_ROWS):
            last = min(first + BATCH_ROWS, stop)
            sequences = documents.read(first, last + 1)
            begins = offsets.read(int(sequences[0]), min(int(sequences[-1]) + 1, offsets.length))
            begins = np.append(begins, ids.length * ids.dtype.itemsize)  # where a sequence after the last would begin
            bounds = begins[sequences - sequences[0]] // ids.dtype.itemsize
            batch = NumberedRows(self.path, first + 1, last - first)
            for skip, part in cut(bounds, ids.row_bytes):
                data = None if ids.is_local else ids.read_bytes(int(part[0]), int(part[-1]))
                yield ArrayBatch(batch, skip, ids, part, data, field="text_ids", eod=self._eod)
