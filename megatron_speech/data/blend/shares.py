"""Target shares: masses and temperature first, then the bounds of sources (caps) and of strata (epoch limits).

Natural share of a leaf: mass of its group × (tokens of its language)^T, normalised over the group's languages ×
its part of the language's tokens. Bounds then move mass as little as can be: the shares are the Kullback-Leibler
projection of the natural ones onto what the bounds allow (Csiszár, "I-divergence geometry of probability
distributions and minimization problems", 1975), found by iterative scaling. What a bound takes away stays in its
group and language if the language has room elsewhere, else in its group, else the recipe is refused.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np

_ROUNDS = 2000
_EXACT = 1e-13
_MOVED = 1e-12  # less than this is not worth moving
_MISSING = 1e-9  # more than this without a place is an infeasible recipe


def natural_shares(
    masses: Sequence[float], keys: Sequence[tuple[int, str, str]], counted: np.ndarray, temperature: float
) -> np.ndarray:
    """Shares without bounds, float64 [K], sum 1.

    Args:
        masses: mass of each group, any scale.
        keys: (group, language, source) of each leaf; every group has a leaf.
        counted: tokens of each leaf that proportions are of, positive, float64 [K].
        temperature: T.
    """
    groups = np.array([key[0] for key in keys])
    cells = _numbered([key[:2] for key in keys])
    of_cell = np.bincount(cells, counted)
    weight = of_cell**temperature
    group_of_cell = np.zeros(len(of_cell), dtype=np.int64)
    group_of_cell[cells] = groups
    weight /= np.bincount(group_of_cell, weight, minlength=len(masses))[group_of_cell]
    mass = np.asarray(masses, dtype=np.float64) / sum(masses)
    shares: np.ndarray = mass[groups] * weight[cells] * counted / of_cell[cells]
    return shares


def _numbered(values: Sequence[object]) -> np.ndarray:
    """Equal values get equal numbers from 0 on, int64 [K]."""
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values], dtype=np.int64)


def bounded_shares(
    shares: np.ndarray, keys: Sequence[tuple[int, str, str]], caps: Mapping[str, float], limits: np.ndarray
) -> tuple[np.ndarray, dict[int, float]]:
    """The shares nearest to `shares` that keep every group's mass and obey caps and limits.

    Args:
        shares: natural shares, float64 [K], positive.
        keys: (group, language, source) of each leaf.
        caps: source → greatest sum of its leaves' shares.
        limits: greatest share of each leaf, float64 [K], inf where there is none.

    Returns:
        Shares, float64 [K], and the mass of each group that no leaf has room for (empty: all is placed).
        `shares` itself where nothing is out of bounds.
    """
    names = sorted({key[2] for key in keys})
    source = np.array([names.index(key[2]) for key in keys])
    bound = np.array([caps.get(name, np.inf) for name in names])
    if (shares <= limits).all() and (np.bincount(source, shares) <= bound * (1 + 1e-12)).all():
        return shares, {}
    # In an order of their own, so that the result does not depend, not by a bit, on how leaves are listed.
    order = np.array(sorted(range(len(keys)), key=lambda k: (keys[k], shares[k], limits[k])))
    sorted_keys = [keys[k] for k in order]
    natural, source, limits = shares[order], source[order], limits[order]
    group = np.array([key[0] for key in sorted_keys])
    mass = np.bincount(group, natural)
    result, missing = natural, {}
    for block in (_numbered([key[:2] for key in sorted_keys]), group):
        wanted = np.bincount(block, natural)
        result = _scaled(result, block, wanted, source, bound, limits)
        result = _routed(result, block, wanted, source, bound, limits)
        short = mass - np.bincount(group, result)
        missing = {int(k): float(short[k]) for k in np.flatnonzero(short > _MISSING)}
        if short.max() <= _MOVED:
            break
    unsorted = np.empty_like(result)
    unsorted[order] = result
    return unsorted, missing


def _divided(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Quotients part / whole, inf where nothing is divided."""
    return np.divide(part, whole, out=np.full(len(whole), np.inf), where=whole > 0)


def _scaled(
    base: np.ndarray, block: np.ndarray, mass: np.ndarray, source: np.ndarray, bound: np.ndarray, limits: np.ndarray
) -> np.ndarray:
    """Scale: base × a[block] × b[source] × c with b, c <= 1,
    such that blocks have their masses as far as bounds let them.
    """
    of_source, of_leaf = np.ones(len(bound)), np.ones(len(base))
    result = base
    for _ in range(_ROUNDS):
        sums = np.bincount(block, base * of_source[source] * of_leaf, minlength=len(mass))
        of_block = np.minimum(_divided(mass, sums), 1e100)[block]
        sums = np.bincount(source, base * of_block * of_leaf, minlength=len(bound))
        of_source = np.minimum(1.0, _divided(bound, sums))
        of_leaf = np.minimum(1.0, _divided(limits, base * of_block * of_source[source]))
        result = base * of_block * of_source[source] * of_leaf
        if np.abs(np.bincount(block, result, minlength=len(mass)) - mass).max() < _EXACT:
            break
    # The factors of one kind were found with the old ones of the others: bounds hold exactly, masses nearly.
    result = result * np.minimum(1.0, _divided(bound, np.bincount(source, result, minlength=len(bound))))[source]
    return result * np.minimum(1.0, _divided(mass, np.bincount(block, result, minlength=len(mass))))[block]


def _routed(
    shares: np.ndarray, block: np.ndarray, mass: np.ndarray, source: np.ndarray, bound: np.ndarray, limits: np.ndarray
) -> np.ndarray:
    """Place what is missing to the masses wherever it can be, by shortest augmenting paths (Edmonds & Karp 1972).

    After scaling this is a rest of rounding, unless bounds press so hard that hardly one solution is left.
    """
    shares = shares.copy()
    leaves_of_block: dict[int, list[int]] = {}
    leaves_of_source: dict[int, list[int]] = {}
    for leaf, (b, s) in enumerate(zip(block.tolist(), source.tolist(), strict=True)):
        leaves_of_block.setdefault(b, []).append(leaf)
        leaves_of_source.setdefault(s, []).append(leaf)
    room = bound - np.bincount(source, shares, minlength=len(bound))
    short = mass - np.bincount(block, shares, minlength=len(mass))

    def path_from(start: int) -> list[int] | None:
        """Leaves to raise and lower in turn, from a block to a source with room."""
        reached: dict[int, list[int]] = {start: []}
        seen_sources: set[int] = set()
        queue = deque([start])
        while queue:
            b = queue.popleft()
            for up in leaves_of_block[b]:
                s = int(source[up])
                if s in seen_sources or limits[up] - shares[up] <= _MOVED:
                    continue
                seen_sources.add(s)
                if room[s] > _MOVED:
                    return [*reached[b], up]
                for down in leaves_of_source[s]:
                    if int(block[down]) not in reached and shares[down] > _MOVED:
                        reached[int(block[down])] = [*reached[b], up, down]
                        queue.append(int(block[down]))
        return None

    for b in np.flatnonzero(short > _MOVED).tolist():
        while short[b] > _MOVED and (path := path_from(b)) is not None:
            raised, lowered = path[::2], path[1::2]
            last = int(source[path[-1]])
            moved = min(
                float(short[b]),
                float(room[last]),
                float((limits[raised] - shares[raised]).min()),
                float(shares[lowered].min(initial=np.inf)),
            )
            shares[raised] += moved
            shares[lowered] -= moved
            room[last] -= moved
            short[b] -= moved
    return shares
