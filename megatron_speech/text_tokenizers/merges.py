"""Byte-pair merges that go on where a tokenizer's own merges end.

A tokenizer that merges by rank applies new merges, ranked after its own, to what its own have left. So new merges are
learnt on words as the base tokenizer leaves them, and text in which no new merge can happen keeps its ids.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

MIN_COUNT = 2  # a pair seen once says nothing about the language


@dataclass(frozen=True)
class Merge:
    """Two adjacent symbols become one; `new` where that symbol did not exist before."""

    left: str
    right: str
    new: bool

    @property
    def piece(self) -> str:
        """The merged symbol."""
        return self.left + self.right


def learn_merges(
    words: Mapping[tuple[str, ...], int], pieces: int, allowed: Callable[[str], bool], known: set[str]
) -> list[Merge]:
    """Learn merges until `pieces` new symbols exist, or no allowed pair occurs twice.

    The most frequent pair first (Sennrich, Haddow & Birch 2016); ties go to the smaller symbol, so that the result
    is a function of the counts alone. A merge whose symbol is known already costs no piece.

    Args:
        words: symbols of a word → how often it occurs.
        pieces: number of new symbols wanted.
        allowed: whether a symbol may come into being.
        known: symbols of the base tokenizer.
    """
    symbols = [list(word) for word in words]
    counts = list(words.values())
    pairs: Counter[tuple[str, str]] = Counter()
    places: dict[tuple[str, str], set[int]] = defaultdict(set)
    for i, word in enumerate(symbols):
        for pair in itertools.pairwise(word):
            pairs[pair] += counts[i]
            places[pair].add(i)
    known = set(known)
    verdicts: dict[tuple[str, str], bool] = {}

    def is_allowed(pair: tuple[str, str]) -> bool:
        if pair not in verdicts:
            verdicts[pair] = allowed(pair[0] + pair[1])
        return verdicts[pair]

    heap = [(-count, pair[0] + pair[1], pair) for pair, count in pairs.items() if is_allowed(pair)]
    heapq.heapify(heap)
    merges: list[Merge] = []
    made = 0
    while heap and made < pieces:
        count, piece, pair = heapq.heappop(heap)
        if -count != pairs[pair]:  # outdated: the pair is in the heap again with its present count
            continue
        if -count < MIN_COUNT:
            break
        new = piece not in known
        merges.append(Merge(*pair, new))
        made += new
        known.add(piece)
        changed: set[tuple[str, str]] = set()
        for i in sorted(places.pop(pair)):
            before = symbols[i]
            after = _merged(before, pair, piece)
            for old in itertools.pairwise(before):
                pairs[old] -= counts[i]
                changed.add(old)
            for fresh in itertools.pairwise(after):
                pairs[fresh] += counts[i]
                places[fresh].add(i)
                changed.add(fresh)
            symbols[i] = after
        for other in changed:
            if other != pair and pairs[other] > 0 and is_allowed(other):
                heapq.heappush(heap, (-pairs[other], other[0] + other[1], other))
        del pairs[pair]
    return merges


def _merged(word: list[str], pair: tuple[str, str], piece: str) -> list[str]:
    result = []
    i = 0
    while i < len(word):
        if i + 1 < len(word) and word[i] == pair[0] and word[i + 1] == pair[1]:
            result.append(piece)
            i += 2
        else:
            result.append(word[i])
            i += 1
    return result
