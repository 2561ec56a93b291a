"""The order of documents: strata with shares → one deterministic interleaving.

The strata are interleaved by WF²Q (Bennett & Zhang, "WF²Q: Worst-case Fair Weighted Fair Queueing", 1996),
with documents as packets and tokens as bits: of the strata that are not ahead of their share, the one whose next
document would be through first goes next. After any prefix of T tokens a stratum k of share w_k has had

    w_k·T - (longest document)  <=  tokens of k  <=  w_k·T + (1 - w_k)·(longest document of k).

Shuffles are sorts by a hash of the document's index, so the order depends on the seed, the stage, the stratum and
the epoch, and on nothing else: not on the other strata, the token budget, the library versions or the number of
ranks.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_speech.data.config import StageDataConfig
from megatron_speech.data.split import splitmix64
from megatron_speech.data.strata import Blend, DocumentTable, Stratum
from megatron_speech.files import canonical_json, sha256_hex
from megatron_speech.ops.extension import extension


def shuffled(count: int, *words: object) -> np.ndarray:
    """A permutation of 0..count-1, int32, that depends on `words` (JSON-able) alone.

    Indices are sorted by a 64-bit hash of themselves: no library's random generator takes part.
    """
    seed = np.uint64(int(sha256_hex(canonical_json(list(words)))[:16], 16))
    with np.errstate(over="ignore"):
        keys = splitmix64(splitmix64(np.arange(count, dtype=np.uint64)) + seed)
    return np.argsort(keys, kind="stable").astype(np.int32)


def _schedule_python(costs: np.ndarray, ptr: np.ndarray, shares: np.ndarray, stop: int) -> np.ndarray:
    """Reference of :func:`schedule`, one document at a time."""
    position, ends = ptr[:-1].tolist(), ptr[1:].tolist()
    weights, cost_of = shares.tolist(), costs.tolist()
    served = [0] * len(weights)
    waiting = [(0.0, k) for k in range(len(weights))]  # by the time at which the next document may start
    ready: list[tuple[float, int]] = []  # by the time at which it would be through
    order: list[int] = []
    total = 0
    while total < stop:
        # The second condition only ever holds by rounding: somebody is always at or behind its share.
        while waiting and (waiting[0][0] <= total or not ready):
            _, k = heapq.heappop(waiting)
            if position[k] == ends[k]:
                raise ValueError(f"stratum {k} ran out of documents after {total} of {stop} tokens")
            heapq.heappush(ready, ((served[k] + cost_of[position[k]]) / weights[k], k))
        _, k = heapq.heappop(ready)
        order.append(position[k])
        total += cost_of[position[k]]
        served[k] += cost_of[position[k]]
        position[k] += 1
        heapq.heappush(waiting, (served[k] / weights[k], k))
    return np.array(order, dtype=np.int64)


def schedule(costs: np.ndarray, ptr: np.ndarray, shares: np.ndarray, stop: int) -> np.ndarray:
    """Interleave strata by WF²Q until `stop` tokens are through.

    Args:
        costs: int32 [N], counted tokens of the strata's documents, one stratum after the other.
        ptr: int64 [K + 1], stratum k holds costs[ptr[k]:ptr[k + 1]], to be taken in this order.
        shares: float64 [K], positive, sum 1.
        stop: tokens after which no further document is taken.

    Returns:
        int64 [M], indices into `costs` in order. A larger `stop` prolongs the order and changes nothing in it.

    Raises:
        ValueError: a stratum has fewer documents than its share of `stop` needs.
    """
    costs = np.ascontiguousarray(costs, dtype=np.int32)
    ptr = np.ascontiguousarray(ptr, dtype=np.int64)
    shares = np.ascontiguousarray(shares, dtype=np.float64)
    compiled = extension()
    if compiled is not None:
        order: np.ndarray = compiled.blend_order(costs, ptr, shares, int(stop))
        return order
    return _schedule_python(costs, ptr, shares, int(stop))


@dataclass(frozen=True)
class Order:
    """Documents in the order of training: stratum int32 [N], document int32 [N] (in the stratum's dataset)."""

    stratum: np.ndarray
    document: np.ndarray


def _repeated(stratum: Stratum, costs: np.ndarray, needed: float, seed_words: Callable[[int], tuple]) -> np.ndarray:
    """Documents of one stratum, epoch after epoch, until they hold `needed` counted tokens: int32 [n]."""
    epochs = max(1, int(np.ceil(needed / stratum.counted)))
    parts = [
        stratum.documents[shuffled(len(stratum.documents), *seed_words(epoch))] for epoch in range(epochs)
    ]  # fmt: skip
    # Of the last epoch only the beginning is needed.
    ends = np.cumsum(costs[parts[-1]], dtype=np.int64)
    last = int(np.searchsorted(ends, needed - (epochs - 1) * stratum.counted)) + 1
    parts[-1] = parts[-1][:last]
    return np.concatenate(parts)


def draw(stage: StageDataConfig, blend: Blend, tables: Sequence[DocumentTable], *, tokens: int, seed: int) -> Order:
    """Just enough documents, in order, to hold `tokens` tokens (all tokens, not only the counted ones).

    Raises:
        InputError: the order would hold more documents than can be numbered.
    """
    strata = blend.strata
    shares = np.array([stratum.share for stratum in strata], dtype=np.float64)
    counted = [tables[stratum.dataset].counted(stage) for stratum in strata]
    # Tokens per counted token, to guess how many counted tokens the budget comes to; the loop corrects the guess.
    ratio = np.array([stratum.tokens / stratum.counted for stratum in strata])
    longest = max(int(costs[stratum.documents].max()) for costs, stratum in zip(counted, strata, strict=True))
    goal = int(tokens / float(shares @ ratio) * 1.01) + longest
    while True:
        lists = [
            _repeated(
                stratum,
                costs,
                share * (goal + longest) + 2 * longest,
                lambda epoch, name=stratum.name: (seed, stage.name, name, epoch),  # type: ignore[misc]
            )
            for stratum, costs, share in zip(strata, counted, shares, strict=True)
        ]
        ptr = np.concatenate([[0], np.cumsum([len(part) for part in lists])]).astype(np.int64)
        costs = np.concatenate([costs[part] for costs, part in zip(counted, lists, strict=True)])
        picked = schedule(costs, ptr, shares, goal)
        document = np.concatenate(lists)[picked]
        which = (np.searchsorted(ptr, picked, side="right") - 1).astype(np.int32)
        lengths = np.concatenate(
            [tables[stratum.dataset].lengths[part] for stratum, part in zip(strata, lists, strict=True)]
        )[picked]
        ends = np.cumsum(lengths, dtype=np.int64)
        if ends[-1] >= tokens:
            count = int(np.searchsorted(ends, tokens)) + 1
            return Order(which[:count], document[:count])
        goal += int((tokens - int(ends[-1])) / float(shares @ ratio) * 1.1) + longest


def fixed_order(blend: Blend, seed: int) -> Order:
    """Every document once, shuffled over all strata: the order of validation, of which any prefix is a sample."""
    if not blend.strata:
        return Order(np.zeros(0, np.int32), np.zeros(0, np.int32))
    stratum = np.repeat(np.arange(len(blend.strata), dtype=np.int32), [len(s.documents) for s in blend.strata])
    document = np.concatenate([s.documents for s in blend.strata]).astype(np.int32)
    order = shuffled(len(stratum), seed, "validation")
    return Order(stratum[order], document[order])
