"""Loader: sequences of a segment table as batches, prepared in the background.

    sequence numbers ─ gather ─► tokens [B, S+1] + document lengths ─ ops.loss_mask ─► MicroBatch ─► GlobalBatch

Sequence i is a pure function of the segment table and i. The global batch g of a stage is sequences
g·G … (g+1)·G - 1 whatever the layout; data-parallel rank r takes, as its micro-batch j, the
`micro_batch_size` sequences from (j·dp_size + r)·micro_batch_size on. B rows, S = seq_length columns.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from megatron_speech.data.packing import SegmentTable
from megatron_speech.errors import InputError
from megatron_speech.ops.loss_mask import LossPolicy, MaskedBatch, loss_mask
from megatron_speech.token_space import MODALITIES

if TYPE_CHECKING:
    from megatron_speech.data.indexed import TokenDataset


@dataclass
class MicroBatch:
    """One micro-batch of one data-parallel rank.

    tokens, labels (-100 where nothing is learned), position_ids: int64 [B, S]; loss_weights: float32 [B, S];
    group_ids: int32 [B, S], document group * 3 + modality of the label, -1 where nothing is learned;
    cu_seqlens: int32, ends of the documents in the flattened [B * S]; max_seqlen: the longest of them, in tokens;
    row_pointers: int32 [B + 1], row b holds documents row_pointers[b] to row_pointers[b + 1];
    counts: int64 [4], document, pad, learned and prompt tokens; sequences: int64 [B], numbers in the stage, those
    at or above the stage's `n_sequences` are padding; documents: int32 [segments, 2], (dataset, document) of each.
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

    loss_weight_sum: Σ loss weight over this rank's micro-batches; tokens, pad_tokens: this rank's document tokens
    and padding; consumed_sequences: the stage's position after this batch, over all ranks; wait_seconds: filled by
    the consumer.
    """

    micro_batches: list[MicroBatch]
    loss_weight_sum: float
    tokens: int
    pad_tokens: int
    consumed_sequences: int
    wait_seconds: float = 0.0


@dataclass(frozen=True)
class RowSource:
    """Everything that turns sequence numbers into micro-batches; shared by the threads, never changed.

    stratum_label: int32 [strata], the document group of each stratum; promptless: bool [strata], strata whose
    documents have no prompt (text): all of their tokens are learned whatever `policy.prompt` says.
    """

    table: SegmentTable
    datasets: Sequence[TokenDataset]
    stratum_label: np.ndarray
    promptless: np.ndarray
    seq_length: int
    pad_id: int
    modality_table: torch.Tensor
    policy: LossPolicy

    def gather(self, sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Tokens and documents of some sequences; a number beyond the table gives a row of padding.

        Returns:
            tokens int64 [B, S + 1] (the last column is the look-ahead: the next token of a document that goes on
            beyond the edge, else padding), document lengths int32 [segments] (one more than lie in the row where
            the document goes on), row pointers int32 [B + 1], and the segments' indices in the table int64.
        """
        table, width = self.table, self.seq_length
        tokens = np.full((len(sequences), width + 1), self.pad_id, dtype=np.int64)
        # A number beyond the end clips to an empty run of segments.
        first, last = (table.seq_ptr[np.minimum(sequences + k, table.n_sequences)] for k in (0, 1))
        count = last - first
        row_pointers = np.concatenate([[0], np.cumsum(count)]).astype(np.int32)
        rows = np.repeat(np.arange(len(sequences)), count)
        segments = np.arange(len(rows)) - np.repeat(row_pointers[:-1], count) + np.repeat(first, count)
        lengths = table.length[segments].astype(np.int64)
        ends = np.cumsum(lengths)
        column = ends - lengths - np.repeat(np.concatenate([[0], ends])[row_pointers[:-1]], count)
        dataset, document = table.dataset_of(segments), table.document[segments]
        start = table.start[segments].astype(np.int64)
        goes_on = np.zeros(len(segments), dtype=np.int64)
        for index in np.unique(dataset):
            source = self.datasets[index]
            of_dataset = np.flatnonzero(dataset == index)
            documents = document[of_dataset]
            at = source.pointers[documents] // source.dtype.itemsize + start[of_dataset]
            at_edge = column[of_dataset] + lengths[of_dataset] == width
            unfinished = start[of_dataset] + lengths[of_dataset] < source.lengths[documents]
            goes_on[of_dataset] = at_edge & unfinished
            ids = np.asarray(source.tokens)  # a plain view: slices of a memmap object cost more
            take = lengths[of_dataset] + goes_on[of_dataset]
            for row, to, begin, size in zip(
                rows[of_dataset].tolist(), column[of_dataset].tolist(), at.tolist(), take.tolist(), strict=True
            ):
                tokens[row, to : to + size] = ids[begin : begin + size]
        return tokens, (lengths + goes_on).astype(np.int32), row_pointers, segments

    def micro_batch(self, sequences: np.ndarray) -> MicroBatch:
        """The micro-batch of these sequences, int64 [B]."""
        tokens, lengths, row_pointers, segments = self.gather(sequences)
        stratum = self.table.stratum[segments]
        ids = torch.from_numpy(tokens)
        arguments = (
            ids,
            torch.from_numpy(lengths),
            torch.from_numpy(row_pointers),
            torch.from_numpy(self.stratum_label[stratum]),
            self.modality_table,
        )
        masked = loss_mask(*arguments, self.policy)
        promptless = self.promptless[stratum]
        if promptless.any() and self.policy.prompt_end_id >= 0:
            policy = LossPolicy(self.policy.text, self.policy.audio, self.policy.special)
            masked = _merge(masked, loss_mask(*arguments, policy), promptless, row_pointers)
        documents = np.stack([self.table.dataset_of(segments), self.table.document[segments]], axis=1)
        return MicroBatch(
            tokens=ids[:, :-1].contiguous(),
            labels=masked.labels,
            loss_weights=masked.loss_weights,
            position_ids=masked.position_ids,
            group_ids=masked.group_ids,
            cu_seqlens=masked.cu_seqlens,
            row_pointers=arguments[2],
            max_seqlen=int(masked.cu_seqlens.diff().max()),
            counts=masked.counts,
            sequences=sequences,
            documents=documents,
        )


def _merge(prompted: MaskedBatch, whole: MaskedBatch, promptless: np.ndarray, row_pointers: np.ndarray) -> MaskedBatch:
    """Take the positions of the promptless documents from `whole` and all others from `prompted`."""
    # cu_seqlens has one segment more per row than there are documents: the padding.
    per_segment = np.insert(promptless, row_pointers[1:], False)
    position = torch.from_numpy(np.repeat(per_segment, np.diff(prompted.cu_seqlens.numpy())))
    position = position.view(prompted.labels.shape)
    labels = torch.where(position, whole.labels, prompted.labels)
    counts = prompted.counts.clone()
    counts[2] = (labels != -100).sum()
    counts[3] -= position.sum()
    return MaskedBatch(
        labels=labels,
        loss_weights=torch.where(position, whole.loss_weights, prompted.loss_weights),
        position_ids=prompted.position_ids,
        group_ids=torch.where(position, whole.group_ids, prompted.group_ids),
        cu_seqlens=prompted.cu_seqlens,
        counts=counts,
        invalid=prompted.invalid,
    )


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
    """Iterator of :class:`GlobalBatch`, prepared ahead by one background thread.

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


def _pinned(batch: MicroBatch) -> MicroBatch:
    for name in ("tokens", "labels", "loss_weights", "position_ids", "group_ids", "cu_seqlens"):
        setattr(batch, name, getattr(batch, name).pin_memory())
    return batch


def global_batches(
    source: RowSource,
    *,
    first_sequence: int,
    n_batches: int,
    micro_batch_size: int,
    global_batch_sequences: int,
    dp_rank: int,
    dp_size: int,
) -> Iterator[GlobalBatch]:
    """This rank's share of `n_batches` global batches from sequence `first_sequence` on, one after the other."""
    pin = torch.cuda.is_available()
    for index in range(n_batches):
        first = first_sequence + index * global_batch_sequences
        rows = rank_sequences(first, micro_batch_size, global_batch_sequences, dp_rank, dp_size)
        micro_batches = [source.micro_batch(sequences) for sequences in rows]
        weight = sum(float(batch.loss_weights.sum(dtype=torch.float64)) for batch in micro_batches)
        counts = torch.stack([batch.counts for batch in micro_batches]).sum(dim=0)
        yield GlobalBatch(
            micro_batches=[_pinned(batch) for batch in micro_batches] if pin else micro_batches,
            loss_weight_sum=weight,
            tokens=int(counts[0]),
            pad_tokens=int(counts[1]),
            consumed_sequences=first + global_batch_sequences,
        )


def group_name(labels: Sequence[tuple[str, str, str]], group: int) -> tuple[str, str, str, str]:
    """(task, language, source, modality) of a value of `group_ids`."""
    label, modality = divmod(group, len(MODALITIES))
    return (*labels[label], MODALITIES[modality])
