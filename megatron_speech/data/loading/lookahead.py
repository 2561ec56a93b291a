"""Fetching shards ahead of the step that reads them, where datasets are staged by the shard.

A thread goes through the sequences ahead of the loader, pins every shard that they need and so has it fetched. It holds
them until the loader has passed the last sequence that it has seen to need them. It never waits for another process:
where there is no room it tries again later, and where some process has found none it lets all of its shards go.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable

import numpy as np

from megatron_speech.data.dataset.shard_store import ShardStore
from megatron_speech.errors import InputError

logger = logging.getLogger(__name__)

_MOST_CHUNKS = 4096  # looked ahead: bounds how long a shard is held that is needed again and again
_POLL_SECONDS = 0.1

Shard = tuple[ShardStore, int]


class Lookahead:
    """Holds the shards of the chunks to come. `with` ends its thread and lets go of them.

    Args:
        count: chunks that the loader will read, one after the other.
        shards_of: number of a chunk → the shards that it needs.
        wants_room: when a process of the node last found no room.
        limit_bytes: of the shards held, but for a single one.
    """

    def __init__(
        self, count: int, shards_of: Callable[[int], Iterable[Shard]], wants_room: Callable[[], int], limit_bytes: int
    ) -> None:
        self._count, self._shards_of, self._wants_room, self._limit = count, shards_of, wants_room, limit_bytes
        self._changed = threading.Condition()
        self._held: dict[Shard, int] = {}  # → the last chunk seen to need it
        self._bytes = 0
        self._passed = 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="megatron-speech-lookahead", daemon=True)

    def __enter__(self) -> Lookahead:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        self._let_go(self._count)

    def passed(self) -> None:
        """The loader has read another chunk."""
        with self._changed:
            self._passed += 1
            self._let_go(self._passed)
            self._changed.notify_all()

    def _let_go(self, before: int) -> None:
        """Unpin what only chunks before this one need."""
        for shard in [shard for shard, last in self._held.items() if last < before]:
            store, number = shard
            store.unpin(number)
            self._bytes -= store.shard_bytes(number)
            del self._held[shard]

    def _run(self) -> None:
        at, asked, paused_at = 0, self._wants_room(), -1
        try:
            while True:
                with self._changed:
                    if self._closed:
                        return
                    if (now := self._wants_room()) != asked:
                        self._let_go(self._count)
                        asked, at, paused_at = now, self._passed, self._passed
                    at = max(at, self._passed)
                    idle = at >= self._count or at - self._passed >= _MOST_CHUNKS or paused_at == self._passed
                    if idle:
                        self._changed.wait(_POLL_SECONDS)
                        continue
                if self._take(at):
                    at += 1
                    continue
                with self._changed:
                    if not self._closed:
                        self._changed.wait(_POLL_SECONDS)
        except InputError as error:
            logger.debug("looking ahead ends: %s", error)  # the loader meets it, and raises it
        finally:
            with self._changed:
                self._let_go(self._count)  # nobody would do so when room is wanted
                self._changed.notify_all()

    def _take(self, chunk: int) -> bool:
        """Pin the shards of a chunk; False where that has to wait."""
        for shard in self._shards_of(chunk):
            store, number = shard
            with self._changed:
                if shard in self._held:
                    self._held[shard] = chunk
                    continue
                if self._held and self._bytes + store.shard_bytes(number) > self._limit:
                    return False
            if not store.try_pin(number):
                return False
            with self._changed:
                self._held[shard] = chunk
                self._bytes += store.shard_bytes(number)
                self._changed.notify_all()
        return True


def shards_needed(
    stores: dict[int, tuple[ShardStore, np.ndarray]], dataset: np.ndarray, document: np.ndarray
) -> list[Shard]:
    """The shards that segments need, in the order in which they are first needed.

    Args:
        stores: number of a dataset → its shards, and int64 byte pointers of its documents; the others are all there.
        dataset, document: int [n], of each segment.
    """
    needed: dict[Shard, None] = {}
    for number, (store, pointers) in stores.items():
        found = document[dataset == number]
        found = found[(found >= 0) & (found < len(pointers))]  # others are refused where they are read
        shards = store.shards_at(pointers[found])
        needed |= dict.fromkeys((store, shard) for shard in dict.fromkeys(shards.tolist()))
    return list(needed)
