"""Which other sample a document refers to: the reference of a cloning document, the prompt of a continuation.

Both are chosen over the whole input from a few numbers per row, with numpy and without reading codes, and depend
on nothing but the rows and the seed: not on workers, shards or the order of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa

from megatron_speech.data.dataset.split import name_hash
from megatron_speech.preprocess.columns import Samples, to_arrow

# Candidates beyond those requested: a candidate may turn out to be unusable only when its codes are read.
SPARE_CANDIDATES = 2

NO_ORDER = np.iinfo(np.int64).min


@dataclass(frozen=True)
class Keys:
    """What the choice needs of each row: 64-bit hashes of its names, 0 where the row has none."""

    usable: np.ndarray  # bool [rows]
    sample: np.ndarray  # uint64 [rows]
    source: np.ndarray  # uint64 [rows]
    speaker: np.ndarray  # uint64 [rows]
    language: np.ndarray  # uint64 [rows]
    order: np.ndarray  # int64 [rows], NO_ORDER where the row has no segment_order
    content_low: np.ndarray  # uint64 [rows]: half of a hash of codes or text, 0 where no rule needs it
    content_high: np.ndarray  # uint64 [rows]: the other half

    def __len__(self) -> int:
        return len(self.usable)

    @classmethod
    def of(cls, samples: Samples, alive: Sequence[int], content: tuple[np.ndarray, np.ndarray] | None = None) -> Keys:
        """Keys of a batch of rows.

        Args:
            samples: of the rows.
            alive: rows that can be used.
            content: two halves of a hash of each row's content, uint64 [rows]; 0: the row takes no part.
        """
        count = len(samples)
        usable = np.zeros(count, dtype=bool)
        usable[list(alive)] = True
        # A name means something only within its data set.
        within = _hashes(samples.dataset_source, usable)

        def hashes(names: Sequence[str | None]) -> np.ndarray:
            found = _hashes(names, usable)
            return np.where(found == 0, found, mix(found, 11) ^ within)

        nothing = np.zeros(count, dtype=np.uint64)
        return cls(
            usable=usable,
            sample=hashes(samples.sample_id),
            source=hashes(samples.source_id),
            speaker=hashes(samples.speaker_id),
            language=_hashes(samples.language, usable),
            order=np.array([NO_ORDER if order is None else order for order in samples.segment_order], dtype=np.int64),
            content_low=content[0] if content else nothing,
            content_high=content[1] if content else nothing,
        )

    @classmethod
    def join(cls, parts: list[Keys]) -> Keys:
        """Keys of all rows from those of batches."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


def _hashes(names: Sequence[str | None], usable: np.ndarray) -> np.ndarray:
    """A hash of each name, 0 where there is none or the row is not usable."""
    column = to_arrow(names, pa.string())
    there = column.is_valid().to_numpy(zero_copy_only=False) & usable
    return np.where(there, np.maximum(name_hash(column), np.uint64(1)), np.uint64(0))


def mix(values: np.ndarray, *numbers: int) -> np.ndarray:
    """A uniform uint64 per value that depends on the value and all `numbers` (splitmix64, Steele et al. 2014)."""
    result = values.astype(np.uint64)
    with np.errstate(over="ignore"):
        for number in numbers:
            result = result + np.uint64(number % 2**64) * np.uint64(0xD1342543DE82EF95) + np.uint64(0x9E3779B97F4A7C15)
            result = (result ^ (result >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            result = (result ^ (result >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            result = result ^ (result >> np.uint64(31))
    return result


def fraction_of(keys: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Draw about `fraction` of the rows by their keys: bool [rows]."""
    return (mix(keys, seed, 7) >> np.uint64(11)).astype(np.float64) * 2.0**-53 < fraction


def same_speaker(keys: Keys, count: int, seed: int) -> np.ndarray:
    """Candidates for the reference of every row, best first.

    A candidate is another utterance of the same speaker of the same data set, and never of the same `source_id`:
    neither another segment of the recording nor a variant of it. Those of the row's own language come first, and
    each candidate is of another source than the ones before it.

    Returns:
        int64 [rows, count + SPARE_CANDIDATES]: row numbers, -1 after the last candidate.
    """
    width = count + SPARE_CANDIDATES
    result = np.full((len(keys), width), -1, dtype=np.int64)
    rows = np.flatnonzero(keys.usable & (keys.speaker != 0))
    if not len(rows):
        return result
    # Within a speaker and language, sources lie in the order of a hash: neighbours have nothing in common.
    shuffled = mix(keys.source[rows], seed, 1)
    rows = rows[np.lexsort((keys.sample[rows], shuffled, keys.language[rows], keys.speaker[rows]))]
    speaker, language, source = keys.speaker[rows], keys.language[rows], keys.source[rows]

    unit_start = _run_starts(speaker, language, source)  # a unit: one source of one speaker in one language
    unit_size = np.diff(unit_start, append=len(rows))
    unit_of = np.repeat(np.arange(len(unit_start)), unit_size)
    block_first, block_size = _groups(speaker[unit_start], language[unit_start])
    speaker_first, speaker_size = _groups(speaker[unit_start])

    unit = unit_of
    same = block_size[unit] - 1
    other = speaker_size[unit] - block_size[unit]
    start = mix(keys.sample[rows], seed, 2)
    for k in range(width):
        in_language = block_first[unit] + _pick(start, k, same)
        in_language += in_language >= unit
        elsewhere = speaker_first[unit] + _pick(start, k - same, other)
        elsewhere += np.where(elsewhere >= block_first[unit], block_size[unit], 0)
        chosen = np.where(k < same, in_language, np.where(k < same + other, elsewhere, -1))
        found = chosen >= 0
        at = chosen[found]
        inside = mix(keys.sample[rows][found], seed, 3, k) % unit_size[at].astype(np.uint64)
        candidate = rows[unit_start[at] + inside.astype(np.int64)]
        # A recording in two languages is still one recording.
        candidate[keys.source[candidate] == source[found]] = -1
        result[rows[found], k] = candidate
    return _pack_left(result)


def previous_segment(keys: Keys, count: int, seed: int) -> np.ndarray:
    """Candidates for the prompt of every row: the segment just before it, by the same speaker in the same source.

    Just before: `segment_order` is one less. Several candidates are variants of that one segment.

    Returns:
        int64 [rows, count + SPARE_CANDIDATES]: row numbers, -1 after the last candidate.
    """
    width = count + SPARE_CANDIDATES
    result = np.full((len(keys), width), -1, dtype=np.int64)
    rows = np.flatnonzero(keys.usable & (keys.order != NO_ORDER))
    if not len(rows):
        return result
    rows = rows[np.lexsort((keys.sample[rows], keys.order[rows], keys.speaker[rows], keys.source[rows]))]
    source, speaker, order = keys.source[rows], keys.speaker[rows], keys.order[rows]
    unit_start = _run_starts(source, speaker, order)
    unit_size = np.diff(unit_start, append=len(rows))
    follows = np.zeros(len(unit_start), dtype=bool)
    here, before = unit_start[1:], unit_start[:-1]
    follows[1:] = (
        (source[here] == source[before]) & (speaker[here] == speaker[before]) & (order[here] == order[before] + 1)
    )
    unit = np.repeat(np.arange(len(unit_start)), unit_size)
    found = follows[unit]
    at = unit[found] - 1
    start = mix(keys.sample[rows][found], seed, 4)
    for k in range(width):
        there = k < unit_size[at]
        candidate = rows[unit_start[at] + _pick(start, np.full(len(at), k), unit_size[at])]
        result[rows[found], k] = np.where(there, candidate, -1)
    return result


# Of a row that is part of another row's document, in the first column of :func:`following_segments`.
COVERED = -2


def following_segments(keys: Keys, count: int) -> np.ndarray:
    """Which segments of a recording are one document: of its first row the rows that follow.

    Segments follow each other where they are of one source and `segment_order` rises by one. A recording is cut into
    documents of `count` segments; a last segment that would be left alone joins the document before it. Variants of a
    segment go with the variants of its neighbours that have their place among them.

    Returns:
        int64 [rows, count]: of the first row of a document the numbers of the others, then -1; of those
        :data:`COVERED`, then -1; of a row without a neighbour, and of one that is not usable, -1 alone.
    """
    result = np.full((len(keys), count), -1, dtype=np.int64)
    rows = np.flatnonzero(keys.usable & (keys.order != NO_ORDER) & (keys.source != 0))
    if not len(rows):
        return result
    rows = rows[np.lexsort((keys.sample[rows], keys.order[rows], keys.source[rows]))]
    source, order = keys.source[rows], keys.order[rows]
    unit_start = _run_starts(source, order)  # a unit: the variants of one segment
    unit_size = np.diff(unit_start, append=len(rows))
    begins = np.ones(len(unit_start), dtype=bool)
    here, before = unit_start[1:], unit_start[:-1]
    begins[1:] = (source[here] != source[before]) | (order[here] != order[before] + 1)
    chain_start = np.flatnonzero(begins)
    chain_size = np.diff(chain_start, append=len(unit_start))
    place = np.arange(len(unit_start)) - np.repeat(chain_start, chain_size)  # in its chain
    size = np.repeat(chain_size, chain_size)
    window = place // count
    window -= (size % count == 1) & (place == size - 1) & (size > 1)
    first = np.concatenate([[True], (window[1:] != window[:-1]) | begins[1:]])
    window_start = np.flatnonzero(first)
    window_size = np.diff(window_start, append=len(unit_start))
    unit = np.repeat(np.arange(len(unit_start)), unit_size)
    variant = np.arange(len(rows)) - unit_start[unit]
    of_window = np.repeat(window_start, window_size)[unit]
    members = np.repeat(window_size, window_size)[unit]
    heads = np.flatnonzero((of_window == unit) & (members > 1))
    for k in range(count):
        found = heads[members[heads] > k + 1]
        there = unit[found] + k + 1
        result[rows[found], k] = rows[unit_start[there] + variant[found] % unit_size[there]]
    result[np.unique(result[result >= 0]), 0] = COVERED
    return result


def _run_starts(*columns: np.ndarray) -> np.ndarray:
    """Positions at which any of the sorted columns changes."""
    changed = np.ones(len(columns[0]), dtype=bool)
    changed[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return np.flatnonzero(changed)


def _groups(*columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each element: the first position of its run of equal values, and the run's length."""
    starts = _run_starts(*columns)
    sizes = np.diff(starts, append=len(columns[0]))
    return np.repeat(starts, sizes), np.repeat(sizes, sizes)


def _pick(start: np.ndarray, k: np.ndarray | int, size: np.ndarray) -> np.ndarray:
    """The k-th of `size` places, going round from a start of each row; 0 where size is 0."""
    modulus = np.maximum(size, 1)
    return ((start % modulus.astype(np.uint64)).astype(np.int64) + k) % modulus


def _pack_left(candidates: np.ndarray) -> np.ndarray:
    """Move the -1 of each row to its end, keeping the order of the others."""
    order = np.argsort(candidates < 0, axis=1, kind="stable")
    return np.take_along_axis(candidates, order, axis=1)
