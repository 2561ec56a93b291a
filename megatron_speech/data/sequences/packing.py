"""Packing: from an order of documents to sequences of `seq_length` tokens, piece by piece.

A segment is a run of tokens of one document inside one sequence. Sequence i holds segments
seq_ptr[i]:seq_ptr[i+1], end to end from its first token on; what is left of it is padding. Neither the order nor
the table is ever held whole: documents are taken from the order a million at a time, and what they are packed to
goes to the table's files (`data.sequences.index_cache`).

Of documents with several streams a token is a step here: its ids count as one, and no segment begins or ends within it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_speech.data.blend.order import DocumentStream, OrderedDocuments
from megatron_speech.data.sequences.bucketing import pack_bucket
from megatron_speech.data.sequences.packing_kernels import PackedSegments, pack_cut, pack_fit

# Documents taken from the order at a time. The table does not depend on it.
PIECE = 1 << 20
_FIRST_PIECE = 1 << 14
# Windows of fit and bucket, in sequences: the first ones, and the share of what lies before a later one.
_FIRST_WINDOW = 16
_WINDOW_SHARE = 8


@dataclass(frozen=True)
class SegmentTable:
    """Where every token of every sequence comes from.

    seq_ptr: int64 [sequences + 1]; per segment, [segments]: stratum uint16; document int32, in its dataset; start
    int32, first step of the segment in its document; length int32, steps. joined: uint8, 1 where a segment
    continues the attention document of the segment before it, or None where nothing is stitched. stratum_dataset:
    int32 [strata], the dataset of each stratum.
    """

    seq_ptr: np.ndarray
    stratum: np.ndarray
    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    stratum_dataset: np.ndarray
    joined: np.ndarray | None = None

    @property
    def n_sequences(self) -> int:
        """Number of sequences."""
        return len(self.seq_ptr) - 1

    def dataset_of(self, segments: np.ndarray | slice | int) -> np.ndarray:
        """The dataset of each of some segments (indices, or a slice), int32."""
        datasets: np.ndarray = self.stratum_dataset[self.stratum[segments]]
        return datasets


@dataclass(frozen=True)
class PackedRun:
    """A run of segments of the table to be.

    seq_ends: int64, how many segments of the run lie before the end of each sequence that ends in it; documents:
    those that were packed; position: int64 [n], which of them a segment is of; start, length: int32 [n].
    """

    seq_ends: np.ndarray
    documents: OrderedDocuments
    position: np.ndarray
    start: np.ndarray
    length: np.ndarray

    def first(self, sequences: int) -> PackedRun:
        """The run up to the end of its `sequences`-th sequence."""
        end = int(self.seq_ends[sequences - 1]) if sequences else 0
        return PackedRun(
            self.seq_ends[:sequences], self.documents, self.position[:end], self.start[:end], self.length[:end]
        )


# ---- documents, a piece ahead


def _pieces(order: DocumentStream, tokens: int | None, piece: int) -> Iterator[OrderedDocuments]:
    """Documents of `order`, the next piece being made in a thread while one is packed.

    Where about `tokens` are needed, pieces get smaller towards them; more follow as long as they are asked for.
    """
    size = min(piece, _FIRST_PIECE) if tokens is not None else piece
    with ThreadPoolExecutor(1, thread_name_prefix="megatron-speech-order") as worker:
        coming = worker.submit(order.take, size)
        documents_done, tokens_done = 0, 0
        while True:
            documents = coming.result()
            if not len(documents.length):
                return
            documents_done += len(documents.length)
            tokens_done += int(documents.length.sum(dtype=np.int64))
            if tokens is not None:
                left = max(0, tokens - tokens_done) * documents_done // tokens_done
                size = min(piece, left + left // 100 + _FIRST_PIECE)
            coming = worker.submit(order.take, size)
            yield documents


def _concatenated(pieces: list[OrderedDocuments]) -> OrderedDocuments:
    if len(pieces) == 1:
        return pieces[0]
    return OrderedDocuments(*(np.concatenate(columns) for columns in zip(*pieces, strict=True)))


# ---- the three ways


def _cut(pieces: Iterator[OrderedDocuments], seq_length: int) -> Iterator[PackedRun]:
    filled = 0  # tokens of the sequence that is under way
    for documents in pieces:
        # The tokens before belong to a document in front, which is taken away again.
        lengths = np.concatenate([np.array([filled], dtype=np.int32), documents.length])
        packed = pack_cut(lengths, seq_length)
        skip = 1 if filled else 0
        tokens = filled + int(documents.length.sum(dtype=np.int64))
        filled = tokens % seq_length
        ends = packed.seq_ptr[1:-1] if filled else packed.seq_ptr[1:]
        yield PackedRun(ends - skip, documents, packed.position[skip:] - 1, packed.start[skip:], packed.length[skip:])
    if filled:
        nothing = np.zeros(0, dtype=np.int32)
        none = OrderedDocuments(nothing.astype(np.uint16), nothing, nothing, nothing, nothing.astype(np.float32))
        yield PackedRun(np.zeros(1, np.int64), none, nothing.astype(np.int64), nothing, nothing)


def _full_windows(lengths: np.ndarray, before: int, room: int, largest: int) -> Iterator[tuple[int, int]]:
    """Runs of documents, (begin, end), that make up full windows: the document after each did not fit any more.

    A window grows with its distance from the beginning, to at most `largest` sequences of `room` tokens: however
    short the stage, what a window moves about is a small part of what lies before it. Windows of the largest size
    that follow each other are one run.

    Args:
        lengths: int32 [n], tokens of the documents; the first begins a window.
        before: tokens of the order before them.
        room: tokens of a sequence.
        largest: sequences of a window, at most.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    begin = end = 0
    while True:
        passed = int(ends[end - 1]) if end else 0
        size = min(largest, max(_FIRST_WINDOW, (before + passed) // room // _WINDOW_SHARE))
        found = int(np.searchsorted(ends, passed + size * room, side="right"))
        full = found < len(lengths)
        if begin < end and not (full and size == largest):
            yield begin, end
            begin = end
        if not full:
            return
        end = found
        if size < largest:
            yield begin, end
            begin = end


def _in_windows(
    pieces: Iterator[OrderedDocuments], room: int, largest: int, pack: Callable[[OrderedDocuments], PackedSegments]
) -> Iterator[PackedRun]:
    """Pack whole windows; what is left of a piece waits for the next one, and is packed when no more comes."""

    def run(documents: OrderedDocuments) -> PackedRun:
        packed = pack(documents)
        return PackedRun(packed.seq_ptr[1:], documents, packed.position, packed.start, packed.length)

    waiting: list[OrderedDocuments] = []
    before = 0
    for piece in pieces:
        documents = _concatenated([*waiting, piece])
        done = 0
        for begin, end in _full_windows(documents.length, before, room, largest):
            yield run(OrderedDocuments(*(column[begin:end] for column in documents)))
            done = end
        before += int(documents.length[:done].sum(dtype=np.int64))
        waiting = [OrderedDocuments(*(column[done:] for column in documents))]
    if waiting and len(waiting[0].length):
        yield run(waiting[0])


def _whole(packed: PackedSegments, oversize: np.ndarray, room: int) -> PackedSegments:
    if len(oversize):
        raise ValueError(f"{len(oversize)} documents of the order are longer than {room} tokens")
    return packed


def _fit(pieces: Iterator[OrderedDocuments], seq_length: int, open_sequences: int) -> Iterator[PackedRun]:
    def pack(documents: OrderedDocuments) -> PackedSegments:
        # The kernel draws the same windows of the largest size from the first document on.
        return _whole(*pack_fit(documents.length, seq_length, open_bins=open_sequences), seq_length)

    return _in_windows(pieces, seq_length, open_sequences, pack)


def _bucket(
    pieces: Iterator[OrderedDocuments],
    max_tokens: int,
    open_sequences: int,
    targets_of: Callable[[OrderedDocuments], np.ndarray],
) -> Iterator[PackedRun]:
    def pack(documents: OrderedDocuments) -> PackedSegments:
        # As above; and the order inside a window depends on its documents alone.
        found = pack_bucket(documents.length, targets_of(documents), max_tokens=max_tokens, window=open_sequences)
        return _whole(*found, max_tokens)

    return _in_windows(pieces, max_tokens, open_sequences, pack)


def pack(
    order: DocumentStream,
    *,
    mode: Literal["cut", "fit", "bucket"],
    seq_length: int,
    open_sequences: int,
    max_tokens: int | None = None,
    n_sequences: int | None = None,
    targets_of: Callable[[OrderedDocuments], np.ndarray] | None = None,
    piece: int = PIECE,
) -> Iterator[PackedRun]:
    """Lay an order of documents into sequences, run after run.

    The runs do not depend on `piece` but in where one ends and the next begins, and a larger `n_sequences` prolongs
    them and changes nothing: `fit` and `bucket` always pack whole windows of the order.

    Args:
        order: the documents, of at least one token; none longer than a sequence holds where they are not cut (the
            blend has left those out). An order that ends is packed to its end.
        mode: "cut" (documents run on over the edges, no padding but at the very end), "fit" (never cut) or "bucket"
            (rectangles of whole documents of similar target length).
        seq_length: tokens of a sequence.
        open_sequences: look-ahead of fit and bucket, in sequences; less at the beginning of the order.
        max_tokens: bucket only: documents × longest of them; None: seq_length.
        n_sequences: sequences to make; None: until the order ends.
        targets_of: bucket only: int32 target tokens of a run of documents.
        piece: documents taken from the order at a time, at most.

    Raises:
        ValueError: a document that does not fit: the caller's mistake.
    """
    room = max_tokens or seq_length if mode == "bucket" else seq_length
    pieces = _pieces(order, None if n_sequences is None else n_sequences * seq_length, piece)
    if mode == "cut":
        runs = _cut(pieces, seq_length)
    elif mode == "fit":
        runs = _fit(pieces, seq_length, open_sequences)
    else:
        assert targets_of is not None
        runs = _bucket(pieces, room, open_sequences, targets_of)
    done = 0
    for run in runs:
        if n_sequences is not None and done + len(run.seq_ends) >= n_sequences:
            yield run.first(n_sequences - done)
            return
        done += len(run.seq_ends)
        yield run
