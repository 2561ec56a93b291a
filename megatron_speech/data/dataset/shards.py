"""Shards of a dataset: runs of documents that lie together in `.bin`, of about the same number of bytes.

Shard s of size B holds the documents whose first byte lies in s·B … (s+1)·B - 1. Its bytes run from the first byte of
its first document to that of the next shard's, so no document lies in two shards: what reads a document needs one.
Sizes that are multiples of one another have edges in common. A shard in which no document begins is empty.
"""

from __future__ import annotations

import bisect

import numpy as np


def shard_edges(places: np.ndarray, shard_bytes: int) -> np.ndarray:
    """Which rows begin in which shard: int64 [shards + 1], rows edges[s] to edges[s + 1] are those of shard s.

    Args:
        places: int64 [rows], ascending: the byte that each row begins at. It may be a mapped column at an odd address:
            a few of its elements are looked at, and no copy is made.
        shard_bytes: the size of a shard, at least 1.
    """
    shards = int(places[-1]) // shard_bytes + 1 if len(places) else 0
    edges = np.zeros(shards + 1, dtype=np.int64)
    for shard in range(1, shards):
        edges[shard] = bisect.bisect_left(places, shard * shard_bytes, lo=int(edges[shard - 1]))
    edges[-1] = len(places)
    return edges


def rows_by_shard(chosen: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Where in `chosen` (ascending rows) another shard begins: int64, from 0 to len(chosen), without empty shards."""
    return np.unique(np.searchsorted(chosen, edges)).astype(np.int64)
