"""A dataset's `.bin` that is on the node by the shard: fetched before it is read, evicted when it is needed least.

What is read is pinned first: its shared lock is held, and its bytes are there. Nobody waits for a shard while it holds
another one but for those that are pinned ahead of their use, and those are let go when a process of the node asks for
room (:meth:`ShardStore.wants_room`): so processes that share the room never wait for one another in a circle.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import mmap
import os
import random
import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_speech.data.dataset.cache_folder import gib, locked, make_room
from megatron_speech.data.dataset.shard_table import (
    ABSENT,
    PARTIAL,
    SPARSE,
    UNCHECKED,
    WHOLE,
    ShardLocks,
    ShardTable,
    punch,
)
from megatron_speech.data.dataset.source import RangeReader
from megatron_speech.errors import InputError

logger = logging.getLogger(__name__)

_CHUNK = 1 << 23  # bytes fetched at a time
_ASKED = ".room"  # in the folder: when a process last asked the others for room
_WAIT_SECONDS = 0.02  # between two looks for room
_TRY_AGAIN_SECONDS = 0.002  # at most, where several find a shard not there at once
_SAY_AFTER_SECONDS = 30.0
_GIVE_UP_AFTER_SECONDS = 1800.0


@dataclass
class ShardStatistics:
    """What this process did with the shards of one dataset: numbers of shards, bytes, and seconds of its threads."""

    fetched: int = 0
    fetched_bytes: int = 0
    waited_seconds: float = 0.0


class ShardStore:
    """The shards of one staged `.bin`, as one process uses them. One may serve several threads.

    Args:
        entry: the folder of its files, which this process keeps locked.
        source: the file that it is made of, a path or an fsspec URL.
        limit: bytes that the folder of all entries may hold.

    Attributes:
        bounds: int64 [shards + 1], the bytes bounds[s] … bounds[s + 1] - 1 are those of shard s.
        statistics: what was fetched, and waited for.
    """

    def __init__(self, entry: Path, source: str, limit: int) -> None:
        self.entry, self.limit = entry, limit
        self.source = RangeReader(source)
        self.statistics, self._said = ShardStatistics(), ShardStatistics()
        self._table, self._locks = ShardTable(entry), ShardLocks(entry)
        self._path = entry / SPARSE
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        self.bounds = np.concatenate([[0], np.cumsum(self._table.records["bytes"])])
        # Of the locks of one open file only one is held of a shard: by how many pins, and who is changing it.
        self._changed = threading.Condition()
        self._pins: dict[int, int] = {}
        self._busy: set[int] = set()
        self._asked = _mapped_number(entry.parent / _ASKED)
        weakref.finalize(self, _close, self._descriptor, self._locks)

    @property
    def prefix(self) -> str:
        """Of the files that were copied whole."""
        return str(self.entry / "data")

    @property
    def size(self) -> int:
        """Bytes of `.bin`."""
        return int(self.bounds[-1])

    def shard_bytes(self, shard: int) -> int:
        """Bytes of a shard."""
        return int(self.bounds[shard + 1] - self.bounds[shard])

    def shards_at(self, places: np.ndarray) -> np.ndarray:
        """The shard of each of these bytes, int64."""
        return np.searchsorted(self.bounds, places, side="right") - 1

    def log_statistics(self) -> None:
        """Say what was fetched and waited for since this was said last."""
        now, before = dataclasses.replace(self.statistics), self._said
        if now.fetched > before.fetched:
            logger.info(
                "%s: %d shards fetched (%s); threads that read it waited %.1f s",
                self.source.name,
                now.fetched - before.fetched,
                gib(now.fetched_bytes - before.fetched_bytes),
                now.waited_seconds - before.waited_seconds,
            )
            self._said = now

    # ---- pins

    def pin(self, shard: int) -> None:
        """Have a shard there, and keep it until :meth:`unpin`; waits for its bytes and for room.

        Raises:
            InputError: its source cannot be read or has changed, or there is no room for it.
        """
        if not self._pin_if_there(shard):
            began = time.monotonic()
            self._pin(shard, wait=True)
            self.statistics.waited_seconds += time.monotonic() - began

    def try_pin(self, shard: int) -> bool:
        """As :meth:`pin`, but False where another is fetching it, or room could only be made of what somebody uses.

        It waits for nothing but the source: who pins ahead can always let go of what it holds.
        """
        return self._pin_if_there(shard) or self._pin(shard, wait=False)

    def unpin(self, shard: int) -> None:
        """Let one pin of a shard go."""
        with self._changed:
            self._pins[shard] -= 1
            if not self._pins[shard]:
                del self._pins[shard]
                self._table.touch(shard, time.time_ns())
                self._locks.release(shard)
                self._changed.notify_all()

    def _pin_if_there(self, shard: int) -> bool:
        with self._changed:
            if shard in self._pins:
                self._pins[shard] += 1
                return True
            if shard in self._busy or not self._locks.share(shard, wait=False):
                return False
            if self._table.state(shard) != WHOLE:
                self._locks.release(shard)
                return False
            self._table.touch(shard, time.time_ns())
            self._pins[shard] = 1
            return True

    def _pin(self, shard: int, *, wait: bool) -> bool:
        with self._changed:
            while shard in self._busy:
                if not wait:
                    return False
                self._changed.wait()
            if shard in self._pins:
                self._pins[shard] += 1
                return True
            self._busy.add(shard)
        pinned = False
        try:
            pinned = self._obtain(shard, wait=wait)
        finally:
            with self._changed:
                if not pinned:
                    self._locks.release(shard)
                else:
                    self._pins[shard] = 1
                self._busy.discard(shard)
                self._changed.notify_all()
        return pinned

    def _obtain(self, shard: int, *, wait: bool) -> bool:
        """Take a shard's shared lock with all of its bytes there."""
        while True:
            # Waits for who fetches it or frees it, and for no more: who has fetched it may hold it for long.
            if not self._locks.share(shard, wait=wait):
                return False
            if self._table.state(shard) == WHOLE:
                self._table.touch(shard, time.time_ns())
                return True
            self._locks.release(shard)
            if self._locks.exclude(shard):
                break
            if not wait:
                return False
            time.sleep(random.uniform(0.1, 1.0) * _TRY_AGAIN_SECONDS)  # apart from others that find it not there
        state = self._table.state(shard)
        if state == UNCHECKED:
            state = self._check(shard)
        if state != WHOLE:
            if not self._reserve(shard, wait=wait):
                return False
            self._fetch(shard)
        self._table.touch(shard, time.time_ns())
        return self._locks.share(shard)

    # ---- fetching, under the exclusive lock

    def _check(self, shard: int) -> int:
        """Read a shard's hash, once after the node was started again; the state that it is then in."""
        begin, size = int(self.bounds[shard]), self.shard_bytes(shard)
        digest = hashlib.sha256()
        for at in range(begin, begin + size, _CHUNK):
            digest.update(os.pread(self._descriptor, min(_CHUNK, begin + size - at), at))
        state = WHOLE if digest.digest() == self._table.sha256(shard) else PARTIAL
        self._table.set_state(shard, state)
        return state

    def _reserve(self, shard: int, *, wait: bool) -> bool:
        """Make room for a shard, and count it from here on."""
        size, began, said = self.shard_bytes(shard), time.monotonic(), False
        while True:
            if self._table.state(shard) != ABSENT:
                return True  # what a killed process left: counted already
            with locked(self.entry.parent / ".lock"):
                room = make_room(self.entry.parent, size, self.limit)
                if room.fits(size, self.limit):
                    self._table.set_state(shard, PARTIAL)
                    return True
            if not wait:
                return False
            self._asked[0] = time.time_ns()  # others let go of what they hold ahead of its use
            waited = time.monotonic() - began
            why = (
                f"{self.entry.parent}: a shard of {gib(size)} of {self.source.name} finds no room: {gib(room.used)} "
                f"are in use by this and other runs, data.cache_gib is {self.limit / 2**30:g} and the disk has "
                f"{gib(max(0, room.free))} free"
            )
            if waited > _GIVE_UP_AFTER_SECONDS:
                raise InputError(f"{why}; raise data.cache_gib, free some space, or end the other runs")
            if waited > _SAY_AFTER_SECONDS and not said:
                said = True
                logger.warning("%s; waiting for it", why)
            time.sleep(_WAIT_SECONDS)

    def _fetch(self, shard: int) -> None:
        begin, size, began = int(self.bounds[shard]), self.shard_bytes(shard), time.monotonic()
        digest = hashlib.sha256()
        try:
            for at in range(begin, begin + size, _CHUNK):
                data = self.source.read(at, min(_CHUNK, begin + size - at))
                digest.update(data)
                self._write(data, at)
                _fetched(self, shard, at)
        except InputError:
            self._forget(shard)
            raise
        known = self._table.sha256(shard)
        if known is not None and known != digest.digest():
            self._forget(shard)
            raise InputError(
                f"{self.source.name}: bytes {begin:,} to {begin + size:,} have SHA-256 {digest.hexdigest()}, needed "
                f"{known.hex()}, which they had when they were first read: the file was changed; restore it, or "
                "recreate the dataset"
            )
        self._table.set_sha256(shard, digest.digest())
        self._table.set_state(shard, WHOLE)
        self.statistics.fetched += 1
        self.statistics.fetched_bytes += size
        logger.debug(
            "fetched shard %d of %s (%d bytes in %.2f s)", shard, self.source.name, size, time.monotonic() - began
        )

    def _write(self, data: bytes, at: int) -> None:
        view = memoryview(data)
        try:
            while view:
                written = os.pwrite(self._descriptor, view, at)
                view, at = view[written:], at + written
        except OSError as error:
            raise InputError(
                f"cannot stage {self.source.name} in {self.entry.parent}: {error.strerror or error}; free some space "
                "there, lower data.cache_gib, or name another data.cache_dir"
            ) from error

    def _forget(self, shard: int) -> None:
        """Free what a fetch that failed has written."""
        punch(self._descriptor, int(self.bounds[shard]), self.shard_bytes(shard), self._path)
        self._table.set_state(shard, ABSENT)

    # ---- reading

    def read_into(self, out: np.ndarray, begin: np.ndarray, size: np.ndarray, at: np.ndarray) -> None:
        """Read ranges of `.bin`, each of which lies in one shard; one shard at a time is pinned.

        Args:
            out: uint8; range k fills out[at[k] : at[k] + size[k]].
            begin, size, at: int64 [n].

        Raises:
            InputError: see :meth:`pin`.
        """
        filled = np.flatnonzero(size)
        shards = self.shards_at(begin[filled])
        view = out.data
        for shard in np.unique(shards).tolist():
            self.pin(shard)
            try:
                for k in filled[shards == shard].tolist():
                    place, length = int(at[k]), int(size[k])
                    if os.preadv(self._descriptor, [view[place : place + length]], int(begin[k])) != length:
                        raise RuntimeError(f"{self._path} is shorter than its shards")
                if self._table.state(shard) != WHOLE:
                    raise RuntimeError(f"shard {shard} of {self._path} was freed while it was locked")
            finally:
                self.unpin(shard)

    def read_in_place(self, begin: int, size: int) -> bytes:
        """A range of `.bin`, from the source unless it is all there: what is read once is not worth a shard.

        Raises:
            InputError: the source cannot be read, or is shorter.
        """
        if not size:
            return b""
        first, last = self.shards_at(np.array([begin, begin + size - 1])).tolist()
        pinned: list[int] = []
        try:
            for shard in range(first, last + 1):
                if not self._pin_if_there(shard):
                    return self.source.read(begin, size)
                pinned.append(shard)
            return os.pread(self._descriptor, size, begin)
        finally:
            for shard in pinned:
                self.unpin(shard)

    def wants_room(self) -> int:
        """When a process of the node last found no room (ns since 1970): what is pinned ahead is then to be let go."""
        return int(self._asked[0])


def _mapped_number(path: Path) -> np.ndarray:
    """An int64 [1] that all processes see."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        os.ftruncate(descriptor, 8)
        return np.frombuffer(mmap.mmap(descriptor, 8), dtype=np.int64)
    finally:
        os.close(descriptor)


def _close(descriptor: int, locks: ShardLocks) -> None:
    os.close(descriptor)
    locks.close()


def _fetched(store: ShardStore, shard: int, at: int) -> None:
    """Called after every chunk: where tests interrupt."""
