"""Loader: sequences of a segment table as batches, prepared in the background.

    sequence numbers ─ gather ─► tokens [B, S+1, K] + document lengths ─ ops.loss_mask ─► MicroBatch ─► GlobalBatch

Sequence i is a pure function of the segment table and i. The global batch g of a stage is sequences
g·G … (g+1)·G - 1 whatever the layout; data-parallel rank r takes, as its micro-batch j, the
`micro_batch_size` sequences from (j·dp_size + r)·micro_batch_size on. B rows, S = seq_length columns, K streams: a
column is a step of a document, with one id of each stream. Arrays of one stream have no axis for it: [B, S], not
[B, S, 1]. What counts tokens counts steps, but for the learned ones, which are labels.

A few micro-batches at a time are made in one go, a chunk: the steps of one are then long enough for their overhead
not to count, and short enough to stay in the cache. Several threads may each make a chunk; they are handed out in
order, and what is in them does not depend on the number of threads.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from megatron_speech.data.dataset.indexed import TokenDataset
from megatron_speech.data.loading.gathering import Gatherer, KeptRanges, Segments
from megatron_speech.data.loading.lookahead import Lookahead, Shard
from megatron_speech.data.sequences.packing import SegmentTable
from megatron_speech.errors import InputError
from megatron_speech.modalities import MODALITIES
from megatron_speech.ops.loss_mask import UNLEARNED, LossPolicy, MaskedBatch, loss_mask

# Ids of a chunk, at most (one micro-batch may be more): its arrays, 40 bytes an id, fit a core's cache.
_CHUNK_IDS = 1 << 16
_MODALITIES = len(MODALITIES)


@dataclass
class MicroBatch:
    """One micro-batch of one data-parallel rank.

    tokens, labels (-100 where nothing is learned): int64 [B, S], [B, S, K] for K > 1 streams; loss_weights: float32 and
    group_ids: int32 of the same shape, the latter document group * 3 + modality of the label, -1 where nothing is
    learned; position_ids: int64 [B, S];
    cu_seqlens: int32, ends of the documents in the flattened [B * S]; max_seqlen: the longest of them, in steps;
    row_pointers: int32 [B + 1], row b holds documents row_pointers[b] to row_pointers[b + 1];
    counts: int64 [3], steps of documents, steps of padding and learned labels; sequences: int64 [B], numbers in the
    stage, those at or above the stage's `n_sequences` are padding; documents: int32 [segments, 2], (dataset, document)
    of each segment.

    A stitched chain is one document here; in `documents` each of its parts is a segment. In a rectangle the gaps
    between documents are documents of padding, of which nothing is learned.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_weights: torch.Tensor
    position_ids: torch.Tensor
    group_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    row_pointers: torch.Tensor
    max_seqlen: int
    counts: torch.Tensor
    sequences: np.ndarray
    documents: np.ndarray


@dataclass
class GlobalBatch:
    """What one data-parallel rank trains on in one optimizer step.

    loss_totals: float64 [2, 1 or 3], Σ loss weight and number of learned labels of this rank's micro-batches, of all
    labels or by modality (see `RowSource.normalizers`): what `LossConfig.scales` takes, once summed over the ranks;
    tokens, pad_tokens: this rank's steps of documents and of padding; consumed_sequences: the stage's position after
    this batch, over all ranks.
    """

    micro_batches: list[MicroBatch]
    loss_totals: np.ndarray
    tokens: int
    pad_tokens: int
    consumed_sequences: int


class Chunk(NamedTuple):
    """Micro-batches that were made together, with the sums that a global batch is made of."""

    micro_batches: list[MicroBatch]
    loss_totals: np.ndarray
    tokens: int
    pad_tokens: int


class _Rows(NamedTuple):
    """Where the tokens of some rows come from, and what they are made into.

    segments: as the gatherer reads them; stratum: int [segments]; joined: bool [segments] or None.
    """

    segments: Segments
    stratum: np.ndarray
    joined: np.ndarray | None


class _MaskDocuments(NamedTuple):
    """The documents that the loss mask is given: length and stratum int32 [n], row_pointers int32 [rows + 1].

    gap: bool [n], documents that are the padding between those of a rectangle; None where there are none.
    """

    length: np.ndarray
    stratum: np.ndarray
    row_pointers: np.ndarray
    gap: np.ndarray | None


@dataclass(frozen=True)
class RowSource:
    """Everything that turns sequence numbers into micro-batches; shared by the threads, never changed.

    stratum_label: int32 [strata], the document group of each stratum; document_flags: uint8 [strata], `PROMPTLESS`
    where documents have no prompt (text: all of their tokens are learned whatever `policy.prompt` says), `TEXT_TARGET`
    where the target is text (asr); normalizers: 1 for
    the totals of all labels of a batch, 3 for those by modality; rectangular: the documents of a row lie at
    multiples of the longest of them (packing mode bucket); pin_memory: make tensors that the GPU can fetch by itself;
    kept: where documents of datasets that are staged by the shard are read without their shards, and kept.
    """

    table: SegmentTable
    datasets: Sequence[TokenDataset]
    stratum_label: np.ndarray
    document_flags: np.ndarray
    seq_length: int
    pad_id: int
    modality_table: torch.Tensor
    policy: LossPolicy
    normalizers: int = 1
    rectangular: bool = False
    pin_memory: bool = False
    kept: KeptRanges | None = None

    @functools.cached_property
    def gatherer(self) -> Gatherer:
        """What reads the datasets."""
        return Gatherer(self.datasets, self.kept)

    def _rows(self, sequences: np.ndarray) -> _Rows:
        """Segments of some sequences, int64 [rows]; a number beyond the table gives a row of padding."""
        table = self.table
        # A number beyond the end clips to an empty run of segments.
        first, last = (np.asarray(table.seq_ptr[np.minimum(sequences + k, table.n_sequences)]) for k in (0, 1))
        count = last - first
        ends = np.concatenate([[0], np.cumsum(count)])
        chosen: np.ndarray | slice
        if len(sequences) and ends[-1] == last[-1] - first[0] and (first[1:] == last[:-1]).all():
            chosen = slice(int(first[0]), int(last[-1]))  # one run, as where a rank takes all of a batch
        else:
            chosen = np.arange(ends[-1]) + np.repeat(first - ends[:-1], count)
        length = np.ascontiguousarray(table.length[chosen])
        segments = Segments(
            dataset=np.ascontiguousarray(table.dataset_of(chosen), dtype=np.int32),
            document=np.ascontiguousarray(table.document[chosen]),
            start=np.ascontiguousarray(table.start[chosen]),
            length=length,
            row_pointers=ends.astype(np.int32),
            strides=_longest(length, ends) if self.rectangular else None,
        )
        joined = None if table.joined is None else np.asarray(table.joined[chosen]).astype(bool)
        return _Rows(segments, np.asarray(table.stratum[chosen]), joined)

    def _document_flags(self, documents: _MaskDocuments) -> torch.Tensor | None:
        """What the loss mask has to know of each document, uint8 [documents]; None where there is nothing."""
        flags = None
        if self.policy.prompt_end_id >= 0:
            flags = self.document_flags[documents.stratum]
        if documents.gap is not None:
            gap = documents.gap * np.uint8(UNLEARNED)
            flags = gap if flags is None else flags | gap
        return None if flags is None else torch.from_numpy(flags)

    def _documents(self, rows: _Rows, goes_on: np.ndarray) -> _MaskDocuments:
        """Documents as the loss mask sees them; one that goes on beyond its row is longer than lies in it."""
        segments, stratum = rows.segments, rows.stratum
        length, pointers = segments.length + goes_on, segments.row_pointers
        if rows.joined is not None and rows.joined.any():
            heads = ~rows.joined
            heads[pointers[:-1][np.diff(pointers) > 0]] = True  # what a chain began in the row before is out of sight
            before = np.concatenate([[0], np.cumsum(heads)]).astype(np.int32)
            begins = np.flatnonzero(heads)
            length = np.add.reduceat(length, begins).astype(np.int32)
            return _MaskDocuments(length, stratum[begins], before[pointers], None)
        if segments.strides is None:
            return _MaskDocuments(length, stratum, pointers, None)
        # After each document a gap up to the stride, but for the last of a row: what follows it is the row's end.
        gap = np.repeat(segments.strides, np.diff(pointers)) - length
        gap[pointers[1:][np.diff(pointers) > 0] - 1] = 0
        both = np.empty(2 * len(length), dtype=np.int32)
        both[0::2], both[1::2] = length, gap
        is_gap = np.zeros(len(both), dtype=bool)
        is_gap[1::2] = True
        return _MaskDocuments(both, np.repeat(stratum, 2), pointers * 2, is_gap)

    def will_need(self, rows: np.ndarray) -> None:
        """Ask for what :meth:`chunk` of these sequences will read."""
        self.gatherer.will_need(self._rows(rows.ravel()).segments)

    def shards_needed(self, rows: np.ndarray) -> list[Shard]:
        """The shards that :meth:`chunk` of these sequences will read."""
        return self.gatherer.shards_needed(self._rows(rows.ravel()).segments)

    def chunk(self, rows: np.ndarray) -> Chunk:
        """The micro-batches of these sequences, int64 [micro-batches, B]. Their tensors share memory."""
        found = self._rows(rows.ravel())
        ids, goes_on = self.gatherer.gather(found.segments, self.seq_length, self.pad_id)
        documents = self._documents(found, goes_on)
        arguments = (
            torch.from_numpy(ids),
            torch.from_numpy(documents.length),
            torch.from_numpy(documents.row_pointers),
            torch.from_numpy(self.stratum_label[documents.stratum]),
            self.modality_table,
        )
        rows_and_steps = rows.size, self.seq_length
        streams = None if self.gatherer.streams == 1 else self.gatherer.streams
        out = MaskedBatch.allocate(*rows_and_steps, len(documents.length), streams=streams, pin_memory=self.pin_memory)
        masked = loss_mask(*arguments, self.policy, self._document_flags(documents), out=out)
        tokens = torch.empty(masked.labels.shape, dtype=torch.int64, pin_memory=self.pin_memory)
        tokens.numpy()[:] = ids[:, :-1]
        return _split(masked, tokens, rows, found, documents, self.normalizers)

    def micro_batch(self, sequences: np.ndarray) -> MicroBatch:
        """The micro-batch of these sequences, int64 [B]."""
        return self.chunk(sequences[None]).micro_batches[0]


def _longest(length: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The longest segment of each row, int32 [rows], 0 for an empty one."""
    longest = np.zeros(len(ends) - 1, dtype=np.int32)
    filled = np.flatnonzero(np.diff(ends))
    if len(filled):
        longest[filled] = np.maximum.reduceat(length, ends[filled])
    return longest


def _loss_totals(masked: MaskedBatch, normalizers: int, learned: int) -> np.ndarray:
    """Σ loss weight and number of labels, float64 [2, normalizers]: of all labels, or by their modality."""
    weights = masked.loss_weights.numpy()
    if normalizers == 1:
        # NumPy, not torch: each of our threads would start its own pool of them.
        return np.array([[weights.sum(dtype=np.float64)], [learned]], dtype=np.float64)
    # Slot 0 takes the positions that are not learned: their group is -1.
    slots = masked.group_ids.numpy().ravel() + 1
    return np.stack([_by_modality(np.bincount(slots, weights=weights.ravel())), _by_modality(np.bincount(slots))])


def _by_modality(by_slot: np.ndarray) -> np.ndarray:
    """Sums over the groups of each modality, float64 [3], without slot 0."""
    by_group = by_slot[1:]
    whole = np.zeros(-(-len(by_group) // _MODALITIES) * _MODALITIES)
    whole[: len(by_group)] = by_group
    return whole.reshape(-1, _MODALITIES).sum(axis=0)


def _split(
    masked: MaskedBatch,
    tokens: torch.Tensor,
    rows: np.ndarray,
    found: _Rows,
    documents: _MaskDocuments,
    normalizers: int,
) -> Chunk:
    """The micro-batches of a chunk."""
    count, size = rows.shape
    seq_length = tokens.shape[1]
    bounds = masked.cu_seqlens.numpy()
    pointers, segment_pointers = documents.row_pointers, found.segments.row_pointers
    names = np.stack([found.segments.dataset, found.segments.document], axis=1)
    lengths = np.diff(bounds)
    # Of each row the last segment is its padding, and in a rectangle every second one.
    is_pad = np.insert(
        documents.gap if documents.gap is not None else np.zeros(len(documents.length), dtype=bool), pointers[1:], True
    )
    edges = pointers[::size] + np.arange(count + 1) * size  # of the micro-batches, in segments; none is empty
    longest = np.maximum.reduceat(lengths, edges[:-1]).tolist()
    counts = np.empty((count, 3), dtype=np.int64)
    counts[:, 0] = np.add.reduceat(np.where(is_pad, 0, lengths), edges[:-1])
    counts[:, 1] = size * seq_length - counts[:, 0]
    counts[:, 2] = np.count_nonzero(masked.loss_weights.numpy().reshape(count, -1), axis=1)
    made = []
    for k, (first, begin, end) in enumerate(zip(range(0, count * size, size), edges[:-1], edges[1:], strict=True)):
        last = first + size
        made.append(
            MicroBatch(
                tokens=tokens[first:last],
                labels=masked.labels[first:last],
                loss_weights=masked.loss_weights[first:last],
                position_ids=masked.position_ids[first:last],
                group_ids=masked.group_ids[first:last],
                cu_seqlens=torch.from_numpy(bounds[begin : end + 1] - bounds[begin]),
                row_pointers=torch.from_numpy(pointers[first : last + 1] - pointers[first]),
                max_seqlen=longest[k],
                counts=torch.from_numpy(counts[k]),
                sequences=rows[k],
                documents=names[segment_pointers[first] : segment_pointers[last]],
            )
        )
    document_steps, pad_steps, learned = counts.sum(axis=0).tolist()
    return Chunk(made, _loss_totals(masked, normalizers, learned), document_steps, pad_steps)


def check_layout(where: str, micro_batch_size: int, global_batch_sequences: int, dp_rank: int, dp_size: int) -> None:
    """Refuse a global batch that the ranks cannot share evenly.

    Raises:
        InputError: sizes that are not positive or do not divide; the nearest values that do are named.
    """
    if micro_batch_size < 1 or global_batch_sequences < 1 or not 0 <= dp_rank < dp_size:
        raise InputError(
            f"{where}: micro_batch_size {micro_batch_size}, global batch of {global_batch_sequences} sequences, "
            f"data-parallel rank {dp_rank} of {dp_size}: sizes are at least 1 and ranks below the size"
        )
    together = micro_batch_size * dp_size
    if global_batch_sequences % together:
        lower = global_batch_sequences // together * together
        near = f"{lower} or {lower + together}" if lower else f"{together}"
        raise InputError(
            f"{where}: the global batch of {global_batch_sequences} sequences does not divide into micro-batches of "
            f"{micro_batch_size} on {dp_size} data-parallel ranks; nearest global batches: {near} sequences"
        )


def rank_sequences(
    first: int, micro_batch_size: int, global_batch_sequences: int, dp_rank: int, dp_size: int
) -> np.ndarray:
    """Sequence numbers of one rank's share of the global batch that begins at `first`: int64 [micro-batches, B]."""
    grid = np.arange(global_batch_sequences, dtype=np.int64).reshape(-1, dp_size, micro_batch_size)
    return first + grid[:, dp_rank]


class _Buffer:
    """A bounded queue between one producing thread and one consumer; both sides learn when the other is gone."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._items: deque[GlobalBatch] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._finished = False
        self._error: BaseException | None = None

    def put(self, item: GlobalBatch) -> bool:
        """Wait for room and add `item`; False when the consumer has gone."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._items) < self._size)
            if self._closed:
                return False
            self._items.append(item)
            self._changed.notify_all()
            return True

    def finish(self, error: BaseException | None) -> None:
        """No more items will come: the end, or `error` for the consumer."""
        with self._changed:
            self._finished, self._error = True, error
            self._changed.notify_all()

    def get(self) -> GlobalBatch:
        """The next item; StopIteration at the end, or the producer's error."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._finished or self._closed)
            if self._items:
                item = self._items.popleft()
                self._changed.notify_all()
                return item
            if self._error is not None:
                raise self._error
            raise StopIteration

    def close(self) -> None:
        """The consumer is gone: drop what is there and wake the producer."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()


def _produce(buffer: _Buffer, batches: Iterator[GlobalBatch]) -> None:
    try:
        for batch in batches:
            if not buffer.put(batch):
                if isinstance(batches, Generator):
                    batches.close()  # ends its threads
                return
    # Whatever goes wrong here belongs to the thread that consumes: it is raised there, with its traceback.
    except BaseException as error:
        buffer.finish(error)
    else:
        buffer.finish(None)


def _shut_down(buffer: _Buffer, thread: threading.Thread) -> None:
    buffer.close()
    if thread is not threading.current_thread():
        thread.join()


class StageLoader:
    """Iterator of :class:`GlobalBatch`, prepared ahead in the background by one thread and those that it starts.

    `close()` (or leaving a `with` block, exhausting it, or dropping it) ends the thread. An error in the thread is
    raised by `next`.

    Args:
        make_batches: makes the iterator that the thread runs through.
        prefetch: global batches held ready.
    """

    def __init__(self, make_batches: Callable[[], Iterator[GlobalBatch]], prefetch: int) -> None:
        self._buffer = _Buffer(prefetch)
        # The thread knows the buffer, not the loader: a loader that nobody holds any more is collected, and its
        # finalizer ends the thread.
        self._thread = threading.Thread(
            target=_produce, args=(self._buffer, make_batches()), name="megatron-speech-loader", daemon=True
        )
        self._finalizer = weakref.finalize(self, _shut_down, self._buffer, self._thread)
        self._thread.start()

    def __iter__(self) -> StageLoader:
        return self

    def __next__(self) -> GlobalBatch:
        try:
            return self._buffer.get()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the background thread; further `next` raises StopIteration. Harmless when repeated."""
        self._finalizer()

    def __enter__(self) -> StageLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _chunks(rows: np.ndarray, row_ids: int) -> list[np.ndarray]:
    """A rank's share of a global batch, [micro-batches, B], cut into chunks of a bounded number of ids."""
    together = max(1, _CHUNK_IDS // (rows.shape[1] * row_ids))
    return [rows[first : first + together] for first in range(0, len(rows), together)]


def global_batches(
    source: RowSource,
    *,
    first_sequence: int,
    n_batches: int,
    micro_batch_size: int,
    global_batch_sequences: int,
    dp_rank: int,
    dp_size: int,
    workers: int = 1,
) -> Iterator[GlobalBatch]:
    """This rank's share of `n_batches` global batches from sequence `first_sequence` on, one after the other.

    `workers` threads make chunks of them; at most two chunks a worker are under way or waiting beyond the batch
    that is put together. What a chunk will read is asked for when it is put in line; shards of datasets are fetched
    further ahead, by a thread of their own.
    """

    def share(index: int) -> tuple[int, list[np.ndarray]]:
        first = first_sequence + index * global_batch_sequences
        rows = rank_sequences(first, micro_batch_size, global_batch_sequences, dp_rank, dp_size)
        return first, _chunks(rows, source.seq_length * source.gatherer.streams)

    @functools.lru_cache(maxsize=1)
    def chunks_of(index: int) -> list[np.ndarray]:
        return share(index)[1]

    per_batch = len(share(0)[1])

    def shards_of(number: int) -> list[Shard]:
        return source.shards_needed(chunks_of(number // per_batch)[number % per_batch])

    waiting: deque[Future[Chunk]] = deque()
    ahead = (chunk for index in range(n_batches) for chunk in share(index)[1])
    with (
        contextlib.ExitStack() as at_end,
        ThreadPoolExecutor(workers, thread_name_prefix="megatron-speech-loader-worker") as pool,
        Lookahead(n_batches * per_batch, shards_of, source.gatherer.wants_room, source.gatherer.ahead_bytes)
        if source.gatherer.looks_ahead
        else contextlib.nullcontext() as lookahead,
    ):
        at_end.callback(source.gatherer.log_statistics)

        def put_in_line() -> None:
            for chunk in ahead:
                source.will_need(chunk)
                waiting.append(pool.submit(source.chunk, chunk))
                if len(waiting) >= 2 * workers:
                    return

        try:
            for index in range(n_batches):
                first, chunks = share(index)
                parts = []
                for _ in chunks:
                    put_in_line()
                    parts.append(waiting.popleft().result())
                    if lookahead is not None:
                        lookahead.passed()
                yield GlobalBatch(
                    micro_batches=[batch for part in parts for batch in part.micro_batches],
                    loss_totals=np.sum([part.loss_totals for part in parts], axis=0),
                    tokens=sum(part.tokens for part in parts),
                    pad_tokens=sum(part.pad_tokens for part in parts),
                    consumed_sequences=first + global_batch_sequences,
                )
        finally:
            for future in waiting:
                future.cancel()


def group_name(labels: Sequence[tuple[str, str, str]], group: int) -> tuple[str, str, str, str]:
    """(task, language, source, modality) of a value of `group_ids`."""
    label, modality = divmod(group, _MODALITIES)
    return (*labels[label], MODALITIES[modality])
