"""Which documents are held out for validation: a stable hash of their source, the same in every dataset.

A source (a recording, a book, a web page) is held out whole: its other segments, and the same segments in another
task's dataset, fall on the same side. The hash depends on the source's name and the seed only, so adding data
never moves a document from one side to the other.

    name ─ name_hash ─► uint64, in the documents table ─ with the seed ─► is_held_out

Names are hashed once, when a dataset is written; training reads eight bytes a document and no strings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_CHUNK = 1 << 16  # names hashed at a time: bounds the temporary arrays
_BASE = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def splitmix64(values: np.ndarray) -> np.ndarray:
    """Finaliser of SplitMix64 (Steele, Lea & Flood 2014): uint64 → well-mixed uint64, a bijection."""
    with np.errstate(over="ignore"):
        mixed = values + np.uint64(_BASE)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))


def _powers(count: int) -> np.ndarray:
    """BASE^1 … BASE^count modulo 2^64."""
    factors = np.full(count, _BASE, dtype=np.uint64)
    with np.errstate(over="ignore"):
        return np.multiply.accumulate(factors)


def name_hash(names: pa.Array) -> np.ndarray:
    """A 64-bit hash of each name, uint64 [N]: a polynomial in its UTF-8 bytes modulo 2^64, mixed with its length.

    It is a function of the bytes alone: no seed, no Python hash, no library version takes part. Null hashes like
    the empty string.
    """
    names = names.cast(pa.large_string())
    out = np.empty(len(names), dtype=np.uint64)
    for first in range(0, len(names), _CHUNK):
        chunk = names.slice(first, _CHUNK).fill_null("")
        _, offset_buffer, byte_buffer = chunk.buffers()
        offsets = np.frombuffer(offset_buffer, dtype=np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
        lengths = np.diff(offsets)
        sums = np.zeros(len(chunk), dtype=np.uint64)
        if offsets[-1] > offsets[0]:
            flat = np.frombuffer(byte_buffer, dtype=np.uint8)[offsets[0] : offsets[-1]]
            inside = np.arange(len(flat), dtype=np.int64) - np.repeat(offsets[:-1] - offsets[0], lengths)
            with np.errstate(over="ignore"):
                terms = (flat.astype(np.uint64) + np.uint64(1)) * _powers(int(lengths.max()))[inside]
                full = np.flatnonzero(lengths)
                sums[full] = np.add.reduceat(terms, offsets[:-1][full] - offsets[0])
        with np.errstate(over="ignore"):
            out[first : first + len(chunk)] = splitmix64(splitmix64(sums) + lengths.astype(np.uint64))
    return out


def is_held_out(hashes: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Which name hashes belong to validation: splitmix64(hash ^ word of the seed) < fraction · 2^64.

    Args:
        hashes: uint64 [N], of :func:`name_hash`.
        fraction: expected share of the names that is held out, 0 <= fraction < 1. A larger one holds out all that
            a smaller one does, and more.
        seed: `data.split_seed`.

    Returns:
        bool [N].
    """
    if fraction <= 0.0:
        return np.zeros(len(hashes), dtype=bool)
    limit = np.uint64(min(int(fraction * 2.0**64), _MASK))
    seed_word = splitmix64(np.array([seed & _MASK], dtype=np.uint64))[0]
    out = np.empty(len(hashes), dtype=bool)
    for first in range(0, len(hashes), _CHUNK):
        out[first : first + _CHUNK] = splitmix64(hashes[first : first + _CHUNK] ^ seed_word) < limit
    return out


def split_names(columns: pa.Table) -> pa.Array:
    """The name that decides a document's side: `source_id`, or `sample_id` where that is null or empty."""
    source = columns["source_id"].combine_chunks().cast(pa.large_string())
    sample = columns["sample_id"].combine_chunks().cast(pa.large_string())
    missing = pc.equal(pc.utf8_length(source).fill_null(0), 0)
    return pc.if_else(missing, sample, source)


def split_hashes(columns: pa.Table) -> np.ndarray:
    """:func:`name_hash` of each document's split name, uint64 [D]: column `split_hash`, or made of the names."""
    if "split_hash" in columns.column_names:
        return np.asarray(columns["split_hash"].to_numpy(), dtype=np.uint64)
    return name_hash(split_names(columns))


def held_out(columns: pa.Table, fraction: float, seed: int) -> np.ndarray:
    """Which documents are validation documents.

    Args:
        columns: one row per document, with the column `split_hash` or the string columns `source_id`, `sample_id`.
        fraction, seed: as for :func:`is_held_out`.

    Returns:
        bool [D].
    """
    if fraction <= 0.0:
        return np.zeros(columns.num_rows, dtype=bool)
    return is_held_out(split_hashes(columns), fraction, seed)


def quotes_held_out(columns: pa.Table, fraction: float, seed: int) -> np.ndarray:
    """Which documents quote a held-out source as their reference or prompt.

    Trained on, such a document would show the model a recording that validation promises it never saw.

    Args:
        columns: table with the column `reference_split_hash` or the string column `reference_source_id`, null for
            documents that quote nothing.
        fraction, seed: as for :func:`is_held_out`.

    Returns:
        bool [D].
    """
    hashed = "reference_split_hash" in columns.column_names
    quoted = columns["reference_split_hash" if hashed else "reference_source_id"].combine_chunks()
    if fraction <= 0.0 or quoted.null_count == len(quoted):
        return np.zeros(columns.num_rows, dtype=bool)
    hashes = quoted.fill_null(0).to_numpy(zero_copy_only=False) if hashed else name_hash(quoted)
    return is_held_out(hashes, fraction, seed) & quoted.is_valid().to_numpy(zero_copy_only=False)


# Above this share of a dataset's tokens a source decides alone how much of it is held out.
HEAVY_SHARE = 0.5

_BIN_BITS = 16  # of a hash: tokens are summed by them first, in half a megabyte


@dataclass(frozen=True)
class SplitSides:
    """How much of a dataset is on which side of the split.

    Attributes:
        documents, tokens: in all.
        held_out_documents, held_out_tokens: of them on the side of validation.
        heavy_source: name of the source that holds more than half of the tokens; None: there is none.
        heavy_tokens: of that source.
    """

    documents: int
    tokens: int
    held_out_documents: int
    held_out_tokens: int
    heavy_source: str | None = None
    heavy_tokens: int = 0

    def findings(self, where: str, fraction: float) -> list[str]:
        """Sentences on a split that leaves nothing on one side, or that one source decides.

        Args:
            where: names the dataset.
            fraction: `data.validation_fraction`.
        """
        if fraction <= 0.0 or self.documents < 2:
            return []
        sides = (
            f"{self.held_out_documents:,} of its {self.documents:,} documents "
            f"({self.held_out_tokens / max(1, self.tokens):.1%} of the tokens) are held out, for "
            f"data.validation_fraction {fraction:g}"
        )
        advice = "a source is held out whole: give rows the source_id of the recording that they are cut from"
        if self.heavy_source is not None:
            share = self.heavy_tokens / max(1, self.tokens)
            return [f"{where}: source {self.heavy_source!r} holds {share:.0%} of the tokens; {sides}; {advice}"]
        if self.held_out_documents == self.documents:
            return [f"{where}: nothing is left to train on; {sides}; {advice}"]
        if not self.held_out_documents:
            return [f"{where}: nothing is held out to validate on; {sides}; it has too few sources for that"]
        return []


class SplitCount:
    """Adds up the sides of the split, batch by batch, in memory that does not grow with the documents."""

    def __init__(self) -> None:
        self._documents = self._held_documents = self._held_tokens = 0
        self._mass = np.zeros(1 << _BIN_BITS, dtype=np.float64)

    def add(self, hashes: np.ndarray, tokens: np.ndarray, held: np.ndarray) -> None:
        """Count documents: name hashes uint64 [n], tokens int [n], held out bool [n]."""
        self._documents += len(hashes)
        self._held_documents += int(np.count_nonzero(held))
        self._held_tokens += int(tokens[held].sum(dtype=np.int64))
        bins = (hashes >> np.uint64(64 - _BIN_BITS)).astype(np.int64)
        self._mass += np.bincount(bins, tokens, minlength=len(self._mass))

    def finish(self, again: Callable[[], Iterable[tuple[np.ndarray, np.ndarray, pa.Table]]]) -> SplitSides:
        """The sums.

        Args:
            again: passes once more over hashes, tokens and names (columns `source_id`, `sample_id`); called only where
                one source may hold most of the tokens.
        """
        total = int(self._mass.sum())
        sides = SplitSides(self._documents, total, self._held_documents, self._held_tokens)
        heaviest = int(np.argmax(self._mass))
        if self._mass[heaviest] <= HEAVY_SHARE * total:
            return sides
        of_source: dict[int, int] = {}  # few: those of one bin of 65,536
        names: dict[int, str] = {}
        for hashes, tokens, columns in again():
            chosen = np.flatnonzero((hashes >> np.uint64(64 - _BIN_BITS)).astype(np.int64) == heaviest)
            found, first, index = np.unique(hashes[chosen], return_index=True, return_inverse=True)
            sums = np.bincount(index, tokens[chosen], minlength=len(found)).tolist()
            for value, at, count in zip(found.tolist(), chosen[first].tolist(), sums, strict=True):
                of_source[value] = of_source.get(value, 0) + int(count)
                if value not in names:
                    names[value] = split_names(columns.slice(at, 1))[0].as_py() or ""
        source, tokens_of_it = max(of_source.items(), key=lambda item: item[1])
        if tokens_of_it <= HEAVY_SHARE * total:
            return sides
        return replace(sides, heavy_source=names[source], heavy_tokens=tokens_of_it)
