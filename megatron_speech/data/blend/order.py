"""The order of documents: strata with shares → one deterministic interleaving, produced piece by piece.

The strata are interleaved by WF²Q (Bennett & Zhang, "WF²Q: Worst-case Fair Weighted Fair Queueing", 1996),
with documents as packets and tokens as bits: of the strata that are not ahead of their share, the one whose next
document would be through first goes next. After any prefix of T tokens a stratum k of share w_k has had

    w_k·T - (longest document)  <=  tokens of k  <=  w_k·T + (1 - w_k)·(longest document of k).

The documents of a stratum come epoch after epoch, each epoch in its own order: a keyed permutation that is
computed document by document (:func:`permuted`), so that nothing is sorted and no epoch is held. It depends on the
seed, the stage, the stratum and the epoch, and on nothing else: not on the other strata, the token budget, the
library versions or the number of ranks. The order has no end; a budget takes a prefix of it.

With `shuffle_window` an epoch is local (:func:`windowed`): the shards of a dataset come in an order of their own, a few
of them at a time, and only those few are mixed.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from megatron_speech.data.blend.strata import Blend, Stratum
from megatron_speech.data.dataset.document_columns import DocumentTable
from megatron_speech.data.dataset.shards import rows_by_shard, shard_edges
from megatron_speech.data.dataset.split import splitmix64
from megatron_speech.files import canonical_json, sha256_hex
from megatron_speech.ops.extension import extension
from megatron_speech.recipe.packing import ShuffleWindowConfig
from megatron_speech.recipe.stage import StageDataConfig

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_ROUNDS = 8
_AHEAD = 4096  # documents of a stratum that the Python reference looks up at a time
NO_DOCUMENTS = np.zeros(0, dtype=np.int32)
_NO_BOUNDS = np.zeros(0, dtype=np.int64)


class OrderedDocuments(NamedTuple):
    """A run of documents in the order of training, [n] each.

    stratum: uint16; document: int32, in the stratum's dataset; length, counted: int32, all tokens and those that the
    proportions are of; seconds: float32 of audio.
    """

    stratum: np.ndarray
    document: np.ndarray
    length: np.ndarray
    counted: np.ndarray
    seconds: np.ndarray


class DocumentStream(Protocol):
    """Documents in order, piece by piece."""

    def take(self, count: int) -> OrderedDocuments:
        """The next `count` documents; fewer where the stream ends."""
        ...


# ---- permutations


def seed_of(*words: object) -> int:
    """A 64-bit key that depends on `words` (JSON-able) alone."""
    return int(sha256_hex(canonical_json(list(words)))[:16], 16)


def _mixed(value: int) -> int:
    return int(splitmix64(np.array([value & _MASK], dtype=np.uint64))[0])


def epoch_key(key: int, epoch: int) -> int:
    """The key of a stratum's permutation in one epoch."""
    return _mixed(key ^ _mixed(epoch))


def _drawn(words: np.ndarray, bound: int) -> np.ndarray:
    """A hash of each word in 0 … bound - 1; bound is below 2^32."""
    words = words * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(32))) * np.uint64(0x94D049BB133111EB)
    return (words >> np.uint64(32)) * np.uint64(bound) >> np.uint64(32)


def _permuted_numpy(count: int, key: int, first: int, stop: int) -> np.ndarray:
    left = math.isqrt(count - 1) + 1 if count > 1 else 1
    right = -(-count // left)
    steps = np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    keys = splitmix64(steps + np.uint64(key))
    index = np.arange(first, stop, dtype=np.uint64)
    todo = np.arange(stop - first)
    walking = index
    while len(todo):
        high, low = np.divmod(walking, np.uint64(right))
        for number in range(0, _ROUNDS, 2):
            high = high + _drawn(low ^ keys[number], left)
            high = np.where(high >= left, high - np.uint64(left), high)
            low = low + _drawn(high ^ keys[number + 1], right)
            low = np.where(low >= right, low - np.uint64(right), low)
        walking = high * np.uint64(right) + low
        index[todo] = walking
        outside = walking >= count
        todo, walking = todo[outside], walking[outside]
    return index.astype(np.int32)


def permuted(count: int, key: int, first: int = 0, stop: int | None = None) -> np.ndarray:
    """Elements `first` … `stop` - 1 of a permutation of 0 … count - 1 that `key` names, int32 [stop - first].

    A Feistel network of 8 rounds over pairs (i div b, i mod b), a·b >= count, with a, b about sqrt(count), and
    cycle walking: a result outside 0 … count - 1, which is rare, goes through the network again. Black & Rogaway,
    "Ciphers with arbitrary finite domains", 2002. Any element costs the same, so no array of the size of an epoch
    is made, and no library's random generator takes part.

    Raises:
        ValueError: a run outside 0 … count.
    """
    stop = count if stop is None else stop
    if not (1 <= count <= np.iinfo(np.int32).max and 0 <= first <= stop <= count):
        raise ValueError(f"elements {first} to {stop} of a permutation of {count}")
    compiled = extension()
    if compiled is not None:
        run: np.ndarray = compiled.permutation(count, key, first, stop)
        return run
    with np.errstate(over="ignore"):
        return _permuted_numpy(count, key, first, stop)


def windowed(bounds: np.ndarray, shards: int, key: int, first: int = 0, stop: int | None = None) -> np.ndarray:
    """Elements `first` … `stop` - 1 of a local permutation that `key` names, int32 [stop - first].

    The S runs bounds[s] … bounds[s + 1] - 1 are permuted, those at places w·S div W … (w + 1)·S div W - 1 of the W =
    ⌈S / shards⌉ windows make window w, and the elements of a window are permuted among one another. Each permutation is
    :func:`permuted`, of the runs by epoch_key(key, 0), of window w by epoch_key(key, w + 1). Every element occurs once.
    What is held is two numbers for each run of a window.

    Args:
        bounds: int64 [S + 1], strictly ascending from 0.
        shards: runs of a window, at most.

    Raises:
        ValueError: bounds that do not ascend from 0, no shards in a window, or a run outside of 0 … bounds[S].
    """
    count = int(bounds[-1]) if len(bounds) else 0
    stop = count if stop is None else stop
    ascending = len(bounds) > 1 and bounds[0] == 0 and (np.diff(bounds) > 0).all() and count <= np.iinfo(np.int32).max
    if not ascending or shards < 1 or not 0 <= first <= stop <= count:
        raise ValueError(f"elements {first} to {stop} of {len(bounds) - 1} runs with {count}, {shards} to a window")
    compiled = extension()
    if compiled is not None:
        run: np.ndarray = compiled.windowed_permutation(
            np.ascontiguousarray(bounds, np.int64), shards, key, first, stop
        )
        return run
    return _windowed_numpy(bounds, shards, key, first, stop)


def _windowed_numpy(bounds: np.ndarray, shards: int, key: int, first: int, stop: int) -> np.ndarray:
    total = len(bounds) - 1
    windows = -(-total // shards)
    pieces, start = [NO_DOCUMENTS], 0
    with np.errstate(over="ignore"):
        for window in range(windows):
            begin, end = window * total // windows, (window + 1) * total // windows
            chosen = _permuted_numpy(total, epoch_key(key, 0), begin, end)
            before = np.concatenate([[0], np.cumsum(bounds[chosen + 1] - bounds[chosen])])
            count = int(before[-1])
            low, high = max(0, first - start), min(count, stop - start)
            if low < high:
                inside = _permuted_numpy(count, epoch_key(key, window + 1), low, high)
                run = np.searchsorted(before, inside, side="right") - 1
                pieces.append((bounds[chosen[run]] + inside - before[run]).astype(np.int32))
            start += count
            if start >= stop:
                break
    return np.concatenate(pieces)


# ---- the order of a stage


@dataclass(frozen=True)
class StratumDocuments:
    """What the order reads of one stratum.

    documents: int32 [n >= 1], taken in every epoch, each once; lengths, counted: int32, seconds: float32, columns of
    the dataset that `documents` index; share: above 0; key: of its permutations; first_epoch: number of the epoch to
    begin with; first_documents: int32, the documents of that epoch where it is not all of them (what is still due of
    an epoch that another order has begun); window_shards: shards of a window, 0: epochs are uniform permutations;
    bounds, first_bounds: int64, where in the documents, and in the first ones, another shard begins (see
    :func:`windowed`).
    """

    documents: np.ndarray
    lengths: np.ndarray
    counted: np.ndarray
    seconds: np.ndarray
    share: float
    key: int
    first_epoch: int = 0
    first_documents: np.ndarray = field(default_factory=lambda: NO_DOCUMENTS)
    window_shards: int = 0
    bounds: np.ndarray = field(default_factory=lambda: _NO_BOUNDS)
    first_bounds: np.ndarray = field(default_factory=lambda: _NO_BOUNDS)


@dataclass(frozen=True)
class EpochPosition:
    """Where a stratum continues: in epoch `epoch`, of which the documents `due` (int32) have not been taken yet."""

    epoch: int
    due: np.ndarray


class _Lookup:
    """The documents of one stratum, epoch after epoch, a block looked up at a time (Python reference)."""

    def __init__(self, number: int, given: StratumDocuments) -> None:
        self.number, self.given = number, given
        self.epoch = given.first_epoch
        self._begin_epoch(partly=bool(len(given.first_documents)))

    def _begin_epoch(self, *, partly: bool) -> None:
        self.documents = self.given.first_documents if partly else self.given.documents
        self.bounds = self.given.first_bounds if partly else self.given.bounds
        self.at = 0

    def block(self) -> Iterator[tuple[int, int, int, float]]:
        if self.at == len(self.documents):
            self.epoch += 1
            self._begin_epoch(partly=False)
        stop = min(self.at + _AHEAD, len(self.documents))
        key = epoch_key(self.given.key, self.epoch)
        if self.given.window_shards:
            chosen = self.documents[windowed(self.bounds, self.given.window_shards, key, self.at, stop)]
        else:
            chosen = self.documents[permuted(len(self.documents), key, self.at, stop)]
        self.at = stop
        length, counted = self.given.lengths[chosen], self.given.counted[chosen]
        if (length < 1).any() or (counted < 1).any():
            document = int(chosen[np.argmax((length < 1) | (counted < 1))])
            raise ValueError(f"document {document} of stratum {self.number} counts for nothing")
        seconds = self.given.seconds[chosen]
        return zip(chosen.tolist(), length.tolist(), counted.tolist(), seconds.tolist(), strict=True)


class _PythonOrder:
    """Reference of the compiled `BlendOrder`, one document at a time."""

    def __init__(self, strata: Sequence[StratumDocuments]) -> None:
        self._lookups = [_Lookup(k, stratum) for k, stratum in enumerate(strata)]
        self._blocks: list[Iterator[tuple[int, int, int, float]]] = [iter(()) for _ in strata]
        self._next: list[tuple[int, int, int, float]] = [(0, 0, 0, 0.0)] * len(strata)
        self._shares = [float(stratum.share) for stratum in strata]
        self._served = [0] * len(strata)
        self._total = 0
        # By the time at which the next document may start, and at which it would be through.
        self._waiting = [(0.0, k) for k in range(len(strata))]
        self._ready: list[tuple[float, int]] = []

    def take(self, count: int) -> tuple[np.ndarray, ...]:
        waiting, ready, served, shares = self._waiting, self._ready, self._served, self._shares
        following, blocks, total = self._next, self._blocks, self._total
        rows = []
        for _ in range(count):
            # The second condition only ever holds by rounding: one stratum is always at or behind its share.
            while waiting and (waiting[0][0] <= total or not ready):
                _, k = heapq.heappop(waiting)
                document = next(blocks[k], None)
                if document is None:
                    blocks[k] = self._lookups[k].block()
                    document = next(blocks[k])
                following[k] = document
                heapq.heappush(ready, ((served[k] + document[2]) / shares[k], k))
            _, k = heapq.heappop(ready)
            rows.append((k, *following[k]))
            total += following[k][2]
            served[k] += following[k][2]
            heapq.heappush(waiting, (served[k] / shares[k], k))
        self._total = total
        dtypes = (np.uint16, np.int32, np.int32, np.int32, np.float32)
        columns = zip(*rows, strict=True) if rows else ((),) * len(dtypes)
        return tuple(np.array(column, dtype=dtype) for column, dtype in zip(columns, dtypes, strict=True))


class BlendOrder:
    """The endless order of the documents of some strata: :meth:`take` continues where the last one ended.

    What it holds beside the arrays given is a few kilobytes a stratum. The documents do not depend on the sizes of
    the pieces.

    Args:
        strata: of which order and proportions are made; shares sum to 1.
    """

    def __init__(self, strata: Sequence[StratumDocuments]) -> None:
        compiled = extension()
        self._order = _PythonOrder(strata) if compiled is None else compiled.BlendOrder([_row(s) for s in strata])

    def take(self, count: int) -> OrderedDocuments:
        """The next `count` documents.

        Raises:
            ValueError: a document has no tokens that count.
        """
        return OrderedDocuments(*self._order.take(count))


def _row(stratum: StratumDocuments) -> tuple[object, ...]:
    first = np.ascontiguousarray(stratum.first_documents, dtype=np.int32)
    return (
        np.ascontiguousarray(stratum.documents, dtype=np.int32), first, stratum.first_epoch, stratum.lengths,
        stratum.counted, stratum.seconds, float(stratum.share), stratum.key, stratum.window_shards,
        np.ascontiguousarray(stratum.bounds, dtype=np.int64),
        np.ascontiguousarray(stratum.first_bounds, dtype=np.int64),
    )  # fmt: skip


def stage_order(
    stage: StageDataConfig,
    blend: Blend,
    tables: Sequence[DocumentTable],
    *,
    seed: int,
    begin: Mapping[str, EpochPosition] | None = None,
    places: Sequence[np.ndarray] = (),
) -> BlendOrder:
    """The order of a stage's documents.

    Args:
        stage, blend, tables: the stage, its resolved strata, and the tables that they index.
        seed: the run's seed.
        begin: by name of the stratum, where it continues (default: at the beginning of epoch 0). An epoch of which
            nothing is due is over: the next one begins.
        places: of each table, int64 [rows], ascending: the byte of `.bin` at which a row begins. Read where the stage
            has a `shuffle_window`.
    """
    window = stage.shuffle_window
    edges = {
        number: shard_edges(places[number], window.shard_bytes)
        for number in {stratum.dataset for stratum in blend.strata}
        if window is not None
    }

    def documents_of(stratum: Stratum) -> StratumDocuments:
        table = tables[stratum.dataset]
        position = (begin or {}).get(stratum.name, EpochPosition(0, NO_DOCUMENTS))
        over = stratum.name in (begin or {}) and not len(position.due)
        return StratumDocuments(
            documents=stratum.documents,
            lengths=table.lengths,
            counted=table.counted(stage),
            seconds=table.seconds,
            share=stratum.share,
            key=seed_of(seed, stage.name, stratum.name),
            first_epoch=position.epoch + over,
            first_documents=position.due,
            **_windows(window, stratum.documents, position.due, edges.get(stratum.dataset)),
        )

    return BlendOrder([documents_of(stratum) for stratum in blend.strata])


def _windows(
    window: ShuffleWindowConfig | None, documents: np.ndarray, due: np.ndarray, edges: np.ndarray | None
) -> dict[str, Any]:
    """Fields of :class:`StratumDocuments` that make its epochs local."""
    if window is None or edges is None:
        return {}
    return {
        "window_shards": window.shards,
        "bounds": rows_by_shard(documents, edges),
        "first_bounds": rows_by_shard(due, edges),
    }


class FixedOrder:
    """Every document once, shuffled over all strata: the order of validation, of which any prefix is a sample."""

    def __init__(self, stage: StageDataConfig, blend: Blend, tables: Sequence[DocumentTable], *, seed: int) -> None:
        self._stage, self._blend, self._tables = stage, blend, tables
        self._ptr = np.cumsum([0, *(len(stratum.documents) for stratum in blend.strata)])
        self._key = seed_of(seed, "validation")
        self._at = 0

    def take(self, count: int) -> OrderedDocuments:
        """The next `count` documents, fewer at the end."""
        total = int(self._ptr[-1])
        stop = min(self._at + count, total)
        chosen = permuted(total, self._key, self._at, stop) if stop > self._at else NO_DOCUMENTS
        self._at = stop
        which = np.searchsorted(self._ptr, chosen, side="right") - 1
        document, length, counted = (np.empty(len(chosen), np.int32) for _ in range(3))
        out = OrderedDocuments(which.astype(np.uint16), document, length, counted, np.empty(len(chosen), np.float32))
        for k in np.unique(which).tolist():
            stratum = self._blend.strata[k]
            table = self._tables[stratum.dataset]
            at = np.flatnonzero(which == k)
            documents = stratum.documents[chosen[at] - self._ptr[k]]
            out.document[at] = documents
            out.length[at] = table.lengths[documents]
            out.counted[at] = table.counted(self._stage)[documents]
            out.seconds[at] = table.seconds[documents]
        return out
