"""The two ways to lay documents into sequences of `seq_length` tokens: cut them, or fit them whole.

Each has a C++ kernel (csrc/sequence_index.cpp) and a NumPy/Python fallback here that gives the same arrays,
element for element. A segment is a run of tokens of one document inside one sequence.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from megatron_speech.errors import InputError
from megatron_speech.ops.extension import extension

_MAX_SEQ_LENGTH = 2**24  # pack_fit keeps a table by room left
_MAX_OPEN_BINS = 2**30


class PackedSegments(NamedTuple):
    """Sequence i holds the segments `seq_ptr[i]:seq_ptr[i + 1]`, in this order, from its first token on.

    seq_ptr: int64 [sequences + 1]; position: int64 [segments], index into the `lengths` that were packed;
    start: int32 [segments], first token of the segment inside its document; length: int32 [segments], tokens.
    """

    seq_ptr: np.ndarray
    position: np.ndarray
    start: np.ndarray
    length: np.ndarray


def _checked(lengths: np.ndarray, seq_length: int) -> np.ndarray:
    given = np.asarray(lengths)
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise InputError(f"document lengths are {given.dtype} of shape {given.shape}; a row of integers is needed")
    if given.size and int(given.max()) > np.iinfo(np.int32).max:
        raise InputError(f"a document has {int(given.max())} tokens; documents hold at most 2^31 - 1")
    array = np.ascontiguousarray(given, dtype=np.int32)
    if not 1 <= seq_length <= _MAX_SEQ_LENGTH:
        raise InputError(f"seq_length is {seq_length}; it must lie between 1 and {_MAX_SEQ_LENGTH} tokens")
    if array.size and int(array.min()) < 0:
        first = int(np.argmax(array < 0))
        raise InputError(f"document {first} has length {int(array[first])}; lengths are token counts of at least 0")
    return array


def pack_cut(lengths: np.ndarray, seq_length: int) -> PackedSegments:
    """Cut the stream of documents, laid end to end, into sequences of exactly `seq_length` tokens.

    Documents of length 0 are skipped. Only the last sequence may be shorter (the loader pads it). Segments of
    one document follow each other; every token lies in exactly one segment.

    Args:
        lengths: int32 [N], tokens of each document in the order of training.
        seq_length: tokens of a sequence.

    Raises:
        InputError: a negative length, or a seq_length outside 1..2^24.
    """
    lengths = _checked(lengths, seq_length)
    compiled = extension()
    if compiled is not None:
        return PackedSegments(*compiled.pack_cut(lengths, seq_length))
    return _pack_cut_numpy(lengths, seq_length)


def pack_fit(lengths: np.ndarray, seq_length: int, *, open_bins: int) -> tuple[PackedSegments, np.ndarray]:
    """Lay whole documents into sequences of at most `seq_length` tokens: best fit decreasing, window by window.

    A window is the next run of documents with at most `open_bins * seq_length` tokens. Its
    documents go, longest first, each into the sequence of this window that it fills best (least room left;
    of equals the one that has had that much room the longest), or open a new one. So a sequence holds
    documents that lie near each other, every window of the order is packed before the next begins (short
    documents are not put off to the end of the run), and the result is a pure function of the arguments.
    Sequences of a window stand in the order of the documents that opened them, their longest: that order does
    not depend on how many documents a sequence holds. Segments in a sequence stand in document order.
    Best fit decreasing: Johnson, Demers, Ullman, Garey, Graham, SIAM J. Comput. 3 (1974).

    Args:
        lengths: int32 [N], tokens of each document in the order of training; documents of length 0 are skipped.
        seq_length: tokens of a sequence.
        open_bins: the look-ahead, in sequences, at least 1. On lengths like those of speech, 512 leave less
            than 1 % of the tokens empty.

    Returns:
        The segments (each a whole document, start 0), and the positions, int64 [M], of the documents that are
        longer than `seq_length` and lie in no sequence: the caller has to refuse or report them.

    Raises:
        InputError: a negative length, a seq_length outside 1..2^24, or open_bins outside 1..2^30.
    """
    lengths = _checked(lengths, seq_length)
    if not 1 <= open_bins <= _MAX_OPEN_BINS:
        raise InputError(f"open_bins is {open_bins}; it must lie between 1 and {_MAX_OPEN_BINS} sequences")
    compiled = extension()
    if compiled is not None:
        *segments, oversize = compiled.pack_fit(lengths, seq_length, open_bins)
        return PackedSegments(*segments), oversize
    return _pack_fit_python(lengths, seq_length, open_bins)


def _pack_cut_numpy(lengths: np.ndarray, seq_length: int) -> PackedSegments:
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if ends.size else 0
    sequences = -(-total // seq_length)
    # Segment borders are the union of document ends and sequence ends.
    cuts = np.arange(1, sequences, dtype=np.int64) * seq_length
    borders = np.union1d(ends[lengths > 0], cuts)
    begins = np.concatenate([np.zeros(min(1, total), np.int64), borders[:-1]])
    position = np.searchsorted(ends, begins, side="right")
    sequence_begins = np.arange(sequences, dtype=np.int64) * seq_length
    return PackedSegments(
        seq_ptr=np.append(np.searchsorted(begins, sequence_begins), begins.size).astype(np.int64),
        position=position.astype(np.int64),
        start=(begins - (ends - lengths)[position]).astype(np.int32),
        length=(borders - begins).astype(np.int32),
    )


def _pack_fit_python(lengths: np.ndarray, seq_length: int, open_bins: int) -> tuple[PackedSegments, np.ndarray]:
    def pack(window: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        bin_of = _best_fit_decreasing(lengths[window], seq_length)
        return window[np.argsort(bin_of, kind="stable")], np.bincount(bin_of)

    return pack_windows(lengths, seq_length, open_bins, pack)


def pack_windows(
    lengths: np.ndarray,
    seq_length: int,
    sequences: int,
    pack: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
) -> tuple[PackedSegments, np.ndarray]:
    """Pack whole documents window by window: runs of at most `sequences * seq_length` tokens of those that fit.

    Args:
        lengths: int32 [N], checked; documents of length 0 are skipped.
        seq_length: tokens of a sequence.
        sequences: the look-ahead, in sequences.
        pack: positions int64 [n] of a window's documents → the same in the order of the segments, and the number of
            documents of each sequence.

    Returns:
        As :func:`pack_fit`.
    """
    fitting = np.flatnonzero((lengths > 0) & (lengths <= seq_length))
    ends = np.cumsum(lengths[fitting], dtype=np.int64)
    positions: list[np.ndarray] = []
    counts: list[np.ndarray] = []
    begin = 0
    while begin < fitting.size:
        limit = (int(ends[begin - 1]) if begin else 0) + sequences * seq_length
        end = int(np.searchsorted(ends, limit, side="right"))  # beyond `begin`: each document fits
        members, sizes = pack(fitting[begin:end])
        positions.append(members)
        counts.append(sizes)
        begin = end
    position = np.concatenate([np.zeros(0, np.int64), *positions]).astype(np.int64)
    seq_ptr = np.cumsum(np.concatenate([np.zeros(1, np.int64), *counts]), dtype=np.int64)
    segments = PackedSegments(seq_ptr, position, np.zeros(position.size, np.int32), lengths[position])
    return segments, np.flatnonzero(lengths > seq_length).astype(np.int64)


def _best_fit_decreasing(lengths: np.ndarray, seq_length: int) -> np.ndarray:
    """The sequence, int64 [n], of each document of a window; numbered in the order of their longest documents."""
    bin_of = np.zeros(lengths.size, np.int64)
    openers: list[int] = []
    waiting: dict[int, deque[int]] = {}  # room left -> sequences with that much room, longest waiting first
    rooms: list[int] = []  # the keys of `waiting`, sorted
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        index = bisect.bisect_left(rooms, length)
        if index == len(rooms):
            room, chosen = seq_length, len(openers)
            openers.append(document)
        else:
            room = rooms[index]
            chosen = waiting[room].popleft()
            if not waiting[room]:
                del waiting[room], rooms[index]
        bin_of[document] = chosen
        room -= length
        if room not in waiting:
            waiting[room] = deque()
            bisect.insort(rooms, room)
        waiting[room].append(chosen)
    rank = np.empty(len(openers), np.int64)
    rank[np.argsort(openers)] = np.arange(len(openers))
    return rank[bin_of]
