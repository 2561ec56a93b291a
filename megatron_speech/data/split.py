"""Which documents are held out for validation: a stable hash of their source, the same in every dataset.

A source (a recording, a book, a web page) is held out whole: its other segments, and the same segments in another
task's dataset, fall on the same side. The hash depends on the source's name and the seed only, so adding data
never moves a document from one side to the other.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_CHUNK = 1 << 20  # names hashed at a time: bounds the temporary arrays
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


def hash_strings(names: pa.Array, seed: int) -> np.ndarray:
    """A 64-bit hash of each string, uint64 [N]: a polynomial in its UTF-8 bytes modulo 2^64, mixed with `seed`.

    It is a function of the bytes and the seed alone: no Python hash, no library version takes part. Null hashes
    like the empty string.
    """
    names = names.cast(pa.large_string())
    seed_word = splitmix64(np.array([seed & _MASK], dtype=np.uint64))[0]
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
            mixed = splitmix64(sums ^ seed_word)
            out[first : first + len(chunk)] = splitmix64(mixed + lengths.astype(np.uint64))
    return out


def split_names(columns: pa.Table) -> pa.Array:
    """The name that decides a document's side: `source_id`, or `sample_id` where that is null or empty."""
    source = columns["source_id"].combine_chunks().cast(pa.large_string())
    sample = columns["sample_id"].combine_chunks().cast(pa.large_string())
    missing = pc.equal(pc.utf8_length(source).fill_null(0), 0)
    return pc.if_else(missing, sample, source)


def quotes_held_out(columns: pa.Table, fraction: float, seed: int) -> np.ndarray:
    """Which documents quote a held-out source as their reference or prompt.

    Trained on, such a document would show the model a recording that validation promises it never saw.

    Args:
        columns: table with the string column `reference_source_id`, null for documents that quote nothing.
        fraction, seed: as for :func:`held_out`.

    Returns:
        bool [D].
    """
    names = columns["reference_source_id"].combine_chunks().cast(pa.large_string())
    if fraction <= 0.0 or names.null_count == len(names):
        return np.zeros(columns.num_rows, dtype=bool)
    limit = np.uint64(min(int(fraction * 2.0**64), _MASK))
    quoted = names.is_valid().to_numpy(zero_copy_only=False)
    return (hash_strings(names, seed) < limit) & quoted


def held_out(columns: pa.Table, fraction: float, seed: int) -> np.ndarray:
    """Which documents are validation documents.

    Args:
        columns: table with the string columns `source_id` and `sample_id`, one row per document.
        fraction: expected share of the sources that is held out, 0 <= fraction < 1.
        seed: `data.split_seed`.

    Returns:
        bool [D].
    """
    if fraction <= 0.0:
        return np.zeros(columns.num_rows, dtype=bool)
    limit = np.uint64(min(int(fraction * 2.0**64), _MASK))
    return hash_strings(split_names(columns), seed) < limit
