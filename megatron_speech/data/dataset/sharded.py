"""A dataset whose `.bin` is on the node by the shard: read range by range, through the locks of the shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from megatron_speech.data.dataset.indexed import TokenDataset, file_of
from megatron_speech.data.dataset.shard_store import ShardStore
from megatron_speech.data.dataset.shard_table import SPARSE


class ShardedTokenDataset(TokenDataset):
    """As :class:`TokenDataset`, but without :attr:`tokens`: there is no file that holds all of them.

    Args:
        shards: of its `.bin`; the other files lie beside them.
    """

    def __init__(self, shards: ShardStore) -> None:
        self.shards = shards
        super().__init__(shards.prefix)

    def file(self, suffix: str) -> Path:
        """Where the file of this suffix lies: that of `.bin` is a sparse one, of the same size."""
        return self.shards.entry / SPARSE if suffix == ".bin" else file_of(self.prefix, suffix)

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process opens the files, and their locks, itself.
        return _open, (self.shards.entry, self.shards.source.name, self.shards.limit)

    @property
    def tokens(self) -> NoReturn:  # type: ignore[override]
        """Not to be had."""
        raise RuntimeError(f"the ids of {self.shards.source.name} are staged by the shard: read them by document()")

    def document(self, i: int, start: int = 0, length: int | None = None) -> np.ndarray:
        """See :meth:`TokenDataset.document`; waits until the document is there."""
        begin, size = self._range(i, start, length)
        ids = np.empty(size // self.dtype.itemsize, dtype=self.dtype)
        if size:
            self.shards.read_into(ids.view(np.uint8), *(np.array([value]) for value in (begin, size, 0)))
        return ids if self.streams == 1 else ids.reshape(-1, self.streams)

    def read_bin(self, begin: int, size: int) -> bytes:
        """See :meth:`TokenDataset.read_bin`; what is not there is read from the source, and not kept."""
        return self.shards.read_in_place(begin, max(0, min(size, self.shards.size - begin)))


def _open(entry: Path, source: str, limit: int) -> ShardedTokenDataset:
    return ShardedTokenDataset(ShardStore(entry, source, limit))
