"""Reading the segments of a batch out of memory-mapped datasets: a C++ kernel (csrc/gather.cpp) and its slow equal.

Pages of a mapped file that were touched count as this process's memory until they are given back; they stay in the
page cache either way. :class:`Gatherer` gives them back every so often, so that a run over terabytes stays small.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megatron_speech.data.dataset.indexed import TokenDataset, file_of
from megatron_speech.errors import InputError
from megatron_speech.ops.extension import extension

# Bytes gathered between two give-backs: rare enough to cost nothing, small beside the memory of any node.
_DROP_AFTER_BYTES = 1 << 28


class Segments(NamedTuple):
    """The segments of some rows: int32 [n] each, and int32 [rows + 1]: row r holds row_pointers[r]:row_pointers[r+1].

    start, length and columns of a row count steps: what is read are whole steps, with all of their streams.
    strides: int32 [rows] where segment k of a row begins at column k · stride of the row; None where they lie end
    to end.
    """

    dataset: np.ndarray
    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    row_pointers: np.ndarray
    strides: np.ndarray | None


class Gatherer:
    """Reads segments of `datasets` (numbered in this order). One may serve several threads.

    Attributes:
        streams: K of the datasets.

    Raises:
        InputError: datasets of different K.
    """

    def __init__(self, datasets: Sequence[TokenDataset]) -> None:
        self._datasets = list(datasets)
        by_streams = {dataset.streams: dataset.prefix for dataset in self._datasets}
        if len(by_streams) > 1:
            found = ", ".join(f"{streams} in {prefix}" for streams, prefix in sorted(by_streams.items()))
            raise InputError(f"datasets of different numbers of streams cannot be read together: {found}; use one")
        self.streams = next(iter(by_streams), 1)
        self._lock = threading.Lock()
        self._bytes = 0
        compiled = extension()
        self._sources = None
        if compiled is not None:
            # A plain view of the ids; the mapping itself is kept by it.
            self._sources = compiled.TokenSources(
                [
                    (
                        np.asarray(d.tokens),
                        np.asarray(d.pointers),
                        np.asarray(d.lengths),
                        isinstance(d.tokens, np.memmap),
                    )
                    for d in self._datasets
                ],
                self.streams,
            )

    def gather(self, segments: Segments, seq_length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids of some rows.

        Returns:
            tokens int64 [rows, seq_length + 1, streams], [rows, seq_length + 1] for one stream, padded with `pad_id`: a
            segment that ends at column seq_length inside its document is followed by the document's next step, the
            look-ahead; and uint8 [n], 1 for those segments.

        Raises:
            InputError: a segment that is not there: the index and the datasets do not belong together.
        """
        shape = (len(segments.row_pointers) - 1, seq_length + 1)
        tokens = np.empty(shape if self.streams == 1 else (*shape, self.streams), dtype=np.int64)
        goes_on = np.empty(len(segments.dataset), dtype=np.uint8)
        if self._sources is not None:
            wrong = self._sources.gather(*segments, pad_id, tokens, goes_on)
            if wrong >= 0:
                raise self._no_segment(segments, wrong)
            self._count(tokens.size)
        else:
            self._gather_numpy(segments, pad_id, tokens, goes_on)
        return tokens, goes_on

    def will_need(self, segments: Segments) -> None:
        """Let the kernel read the segments from the disk in the background; returns at once."""
        if self._sources is not None:
            self._sources.will_need(*segments[:4])

    def _count(self, tokens: int) -> None:
        with self._lock:
            self._bytes += tokens * max(dataset.dtype.itemsize for dataset in self._datasets)
            due = self._bytes >= _DROP_AFTER_BYTES
            if due:
                self._bytes = 0
        if due:
            assert self._sources is not None
            self._sources.drop_pages()

    def _no_segment(self, segments: Segments, k: int) -> InputError:
        dataset, document = int(segments.dataset[k]), int(segments.document[k])
        start, length = int(segments.start[k]), int(segments.length[k])
        where = (
            file_of(self._datasets[dataset].prefix, ".idx")
            if 0 <= dataset < len(self._datasets)
            else f"dataset {dataset}"
        )
        return InputError(
            f"{where}: steps {start} to {start + length} of document {document} are asked for by the sequence index, "
            "but they are not there; the index and the dataset do not belong together: remove the folder of built "
            "indices and start again"
        )

    def _gather_numpy(self, segments: Segments, pad_id: int, tokens: np.ndarray, goes_on: np.ndarray) -> None:
        width = tokens.shape[1] - 1
        tokens.fill(pad_id)
        columns = zip(*(column.tolist() for column in segments[:4]), strict=True)
        rows = np.repeat(np.arange(len(tokens)), np.diff(segments.row_pointers)).tolist()
        row_before, used = -1, 0
        for k, ((dataset, document, start, length), row) in enumerate(zip(columns, rows, strict=True)):
            if row != row_before:
                row_before, used = row, 0
            column = used
            if segments.strides is not None:
                column = (k - int(segments.row_pointers[row])) * int(segments.strides[row])
            source = self._datasets[dataset] if 0 <= dataset < len(self._datasets) else None
            whole = int(source.lengths[document]) if source is not None and 0 <= document < len(source) else -1
            fits = used <= column and column + length <= width
            if source is None or whole < 0 or start < 0 or length < 0 or start + length > whole or not fits:
                raise self._no_segment(segments, k)
            goes_on[k] = column + length == width and start + length < whole
            take = length + int(goes_on[k])
            tokens[row, column : column + take] = source.document(document, start, take)
            used = column + take
