"""Arrays of different lengths end to end: one array and its borders in place of a list of small arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Ragged(Sequence[np.ndarray]):
    """Arrays end to end; as a sequence (of which no slices are made) it is views of them.

    Attributes:
        flat: all elements [sum of lengths].
        bounds: int64 [N + 1]: array i is flat[bounds[i]:bounds[i + 1]]; from 0 to the length of `flat`.
    """

    flat: np.ndarray
    bounds: np.ndarray

    @classmethod
    def of(cls, arrays: Sequence[np.ndarray], dtype: type = np.int32) -> Ragged:
        """Arrays in a row; they are copied, unless they are ragged already."""
        if isinstance(arrays, Ragged):
            return arrays
        flat: np.ndarray = np.concatenate(arrays, dtype=dtype, casting="unsafe") if len(arrays) else np.zeros(0, dtype)
        return cls(flat, edges(np.fromiter(map(len, arrays), np.int64, len(arrays))))

    @property
    def lengths(self) -> np.ndarray:
        """Of each array, int64 [N]."""
        return np.diff(self.bounds)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: Any) -> Any:
        at = range(len(self))[index]
        return self.flat[self.bounds[at] : self.bounds[at + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        begin, *ends = self.bounds.tolist()
        for end in ends:
            yield self.flat[begin:end]
            begin = end

    def take(self, chosen: np.ndarray) -> Ragged:
        """Arrays number `chosen`, int64 [M], in that order."""
        if len(chosen) == len(self) and (chosen == np.arange(len(self))).all():
            return self
        begins, lengths = self.bounds[:-1][chosen], self.lengths[chosen]
        return Ragged(self.flat[runs(begins, lengths)], edges(lengths))


def edges(lengths: np.ndarray) -> np.ndarray:
    """Where things of these lengths begin when they lie end to end, and where the last one ends, int64 [N + 1]."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def runs(begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Indices begins[i] to begins[i] + lengths[i], of all i end to end, int64 [sum of lengths]."""
    ends = np.cumsum(lengths)
    return np.repeat(begins - ends + lengths, lengths) + np.arange(ends[-1] if len(ends) else 0)
