"""Reading the segments of a batch out of memory-mapped datasets: a C++ kernel (csrc/gather.cpp) and its slow equal.

What is staged by the shard is read out of its file first, under the locks of its shards, and gathered from there.

Pages of a mapped file that were touched count as this process's memory until they are given back; they stay in the
page cache either way. :class:`Gatherer` gives them back every so often, so that a run over terabytes stays small.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from megatron_speech.data.dataset.indexed import TokenDataset, file_of
from megatron_speech.data.dataset.sharded import ShardedTokenDataset
from megatron_speech.data.loading.lookahead import Shard, shards_needed
from megatron_speech.errors import InputError
from megatron_speech.ops.extension import extension

# Bytes gathered between two give-backs: rare enough to cost nothing, small beside the memory of any node.
_DROP_AFTER_BYTES = 1 << 28
_KEEP_BYTES = 1 << 28  # of what is read in place: validation's share of a recipe's default is some 4 MB


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


@dataclass(frozen=True)
class _Excerpt:
    """Parts of a dataset's documents, end to end; a part of one is a document of the excerpt.

    tokens: ids; pointers: int64 [n], bytes; lengths: int32 [n], steps.
    """

    tokens: np.ndarray
    pointers: np.ndarray
    lengths: np.ndarray
    streams: int

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, i: int, start: int, length: int) -> np.ndarray:
        """Steps of a document, as of :meth:`TokenDataset.document`."""
        first = int(self.pointers[i]) // self.tokens.itemsize + start * self.streams
        ids = self.tokens[first : first + length * self.streams]
        return ids if self.streams == 1 else ids.reshape(length, self.streams)


class KeptRanges:
    """Ranges of `.bin` that are read again and again from all over a dataset (held-out documents), kept in memory.

    They are read from where the dataset lies: to fetch whole shards for them would cost more than all of training.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[int, int, int], bytes] = {}
        self._bytes = 0

    def read(self, number: int, dataset: TokenDataset, begin: int, size: int) -> bytes:
        """`size` bytes of dataset `number` from `begin` on."""
        key = (number, begin, size)
        data = self._found.get(key)
        if data is None:
            data = dataset.read_bin(begin, size)
            if self._bytes + size <= _KEEP_BYTES:
                self._bytes += size
                self._found[key] = data
        return data


class Gatherer:
    """Reads segments of `datasets` (numbered in this order). One may serve several threads.

    Args:
        datasets: what segments number.
        kept: where datasets are staged by the shard, of what is to be read without them; None: by their shards.

    Attributes:
        streams: K of the datasets.

    Raises:
        InputError: datasets of different K.
    """

    def __init__(self, datasets: Sequence[TokenDataset], kept: KeptRanges | None = None) -> None:
        self._datasets = list(datasets)
        self._kept = kept
        self._stores = {
            number: (dataset.shards, np.asarray(dataset.pointers))
            for number, dataset in enumerate(self._datasets)
            if isinstance(dataset, ShardedTokenDataset)
        }
        by_streams = {dataset.streams: dataset.prefix for dataset in self._datasets}
        if len(by_streams) > 1:
            found = ", ".join(f"{streams} in {prefix}" for streams, prefix in sorted(by_streams.items()))
            raise InputError(f"datasets of different numbers of streams cannot be read together: {found}; use one")
        self.streams = next(iter(by_streams), 1)
        self._lock = threading.Lock()
        self._bytes = 0
        # Where shards are read, the sources are made of what was read, batch by batch.
        self._sources = None if self._stores else self._sources_of(self._datasets)

    def _sources_of(self, datasets: Sequence[TokenDataset | _Excerpt]) -> Any:
        """The datasets as the kernel reads them, or None where there is none."""
        compiled = extension()
        if compiled is None:
            return None
        # A plain view of the ids; the mapping itself is kept by it.
        return compiled.TokenSources(
            [
                (
                    np.asarray(dataset.tokens),
                    np.asarray(dataset.pointers),
                    np.asarray(dataset.lengths),
                    isinstance(dataset.tokens, np.memmap),
                )
                for dataset in datasets
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
        datasets: Sequence[TokenDataset | _Excerpt] = self._datasets
        sources, places = self._sources, segments
        if self._stores:
            datasets, places = self._excerpts(segments)
            sources = self._sources_of(datasets)
        if sources is not None:
            wrong = sources.gather(*places, pad_id, tokens, goes_on)
            if wrong >= 0:
                raise self._no_segment(segments, wrong)
            self._count(tokens.size, sources)
        else:
            wrong = _gather_numpy(datasets, places, pad_id, tokens, goes_on)
            if wrong >= 0:
                raise self._no_segment(segments, wrong)
        return tokens, goes_on

    def _excerpts(self, segments: Segments) -> tuple[list[TokenDataset | _Excerpt], Segments]:
        """Read the segments of datasets that are staged by the shard; where they then are."""
        datasets: list[TokenDataset | _Excerpt] = list(self._datasets)
        document, start = segments.document.copy(), segments.start.copy()
        for number, dataset in enumerate(self._datasets):
            if isinstance(dataset, ShardedTokenDataset):
                mine = np.flatnonzero(segments.dataset == number)
                datasets[number] = self._excerpt(number, dataset, segments, mine)
                document[mine], start[mine] = np.arange(len(mine)), 0
        return datasets, segments._replace(document=document, start=start)

    def _excerpt(self, number: int, dataset: ShardedTokenDataset, segments: Segments, mine: np.ndarray) -> _Excerpt:
        """The segments `mine` of a dataset, each with the step after it, where its document has one."""
        document, start = segments.document[mine], segments.start[mine].astype(np.int64)
        length = segments.length[mine]
        there = (document >= 0) & (document < len(dataset)) & (start >= 0) & (length >= 0)
        whole = np.zeros(len(mine), dtype=np.int64)
        whole[there] = dataset.lengths[document[there]]
        there &= start + length <= whole
        if not there.all():
            raise self._no_segment(segments, int(mine[np.argmin(there)]))
        steps = np.minimum(length + 1, whole - start)
        step = dataset.streams * dataset.dtype.itemsize  # bytes
        ends = np.cumsum(steps * step)
        begin, size, at = dataset.pointers[document] + start * step, steps * step, ends - steps * step
        ids = np.empty(int(ends[-1]) // dataset.dtype.itemsize if len(mine) else 0, dtype=dataset.dtype)
        data = ids.view(np.uint8)
        if self._kept is None:
            dataset.shards.read_into(data, begin, size, at)
        else:
            for first, count, place in zip(begin.tolist(), size.tolist(), at.tolist(), strict=True):
                data[place : place + count] = np.frombuffer(self._kept.read(number, dataset, first, count), np.uint8)
        return _Excerpt(ids, at, steps.astype(np.int32), dataset.streams)

    @property
    def looks_ahead(self) -> bool:
        """Whether there are shards to be fetched before they are read."""
        return bool(self._stores) and self._kept is None

    @property
    def ahead_bytes(self) -> int:
        """How much may be held ahead of its use: not all of the node's, or nothing else would find room."""
        return max((store.limit * 3 // 4 for store, _ in self._stores.values()), default=0)

    def log_statistics(self) -> None:
        """Say what was fetched, and waited for, of datasets that are staged by the shard."""
        for store, _ in self._stores.values():
            store.log_statistics()

    def wants_room(self) -> int:
        """When a process of the node last found no room for a shard."""
        return max((store.wants_room() for store, _ in self._stores.values()), default=0)

    def shards_needed(self, segments: Segments) -> list[Shard]:
        """The shards that :meth:`gather` of these segments will read, the first needed first."""
        return shards_needed(self._stores, segments.dataset, segments.document)

    def will_need(self, segments: Segments) -> None:
        """Let the kernel read the segments from the disk in the background; returns at once."""
        if self._sources is not None:
            self._sources.will_need(*segments[:4])

    def _count(self, tokens: int, sources: Any) -> None:
        with self._lock:
            self._bytes += tokens * max(dataset.dtype.itemsize for dataset in self._datasets)
            due = self._bytes >= _DROP_AFTER_BYTES
            if due:
                self._bytes = 0
        if due:
            sources.drop_pages()

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


def _gather_numpy(
    datasets: Sequence[TokenDataset | _Excerpt],
    segments: Segments,
    pad_id: int,
    tokens: np.ndarray,
    goes_on: np.ndarray,
) -> int:
    """As the kernel: fills tokens and goes_on; -1, or the first segment that does not exist."""
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
        source = datasets[dataset] if 0 <= dataset < len(datasets) else None
        whole = int(source.lengths[document]) if source is not None and 0 <= document < len(source) else -1
        fits = used <= column and column + length <= width
        if source is None or whole < 0 or start < 0 or length < 0 or start + length > whole or not fits:
            return k
        goes_on[k] = column + length == width and start + length < whole
        take = length + int(goes_on[k])
        tokens[row, column : column + take] = source.document(document, start, take)
        used = column + take
    return -1
