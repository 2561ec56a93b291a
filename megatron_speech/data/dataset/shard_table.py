"""What a node knows of the shards of one staged `.bin`, and how its processes lock, free and account for them.

    data.bin.sparse   a file of the size of `.bin`, of which only some shards are there; the rest are holes
    data.bin.shards   one record a shard (:data:`RECORD`), mapped by every process
    data.bin.locks    byte s is the lock of shard s: shared by whoever reads it, exclusive to whoever changes it

The name is not `.bin`: what does not know of shards finds no file, instead of the zeros of a hole.

    ABSENT    a hole
    PARTIAL   being fetched, or being freed, or left by a process that was killed while it did so
    WHOLE     all of its bytes are there
    UNCHECKED whole before the node was started again: its hash is to be read first

A shard is read under its shared lock and while it is WHOLE, and leaves that state under the exclusive one alone: before
its first byte is punched out, not after. It becomes WHOLE after its last byte was written. So whatever is killed where,
a hole is never read. Locks are those of open files (F_OFD_SETLK): they end with the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_speech.errors import InputError

ABSENT, PARTIAL, WHOLE, UNCHECKED = range(4)

RECORD = np.dtype(
    [("state", "u1"), ("known", "u1"), ("pad", "u1", 2), ("crc", "<u4"), ("used", "<i8"), ("bytes", "<i8"),
     ("sha256", "u1", 32)]
)  # fmt: skip
"""used: when it was last used, ns since 1970; known: sha256 is that of its first fetch; crc: CRC-32 of sha256."""

SPARSE, TABLE, LOCKS = "data.bin.sparse", "data.bin.shards", "data.bin.locks"

_FLOCK = struct.Struct("hhqqi0q")  # struct flock of 64-bit Linux: type, whence, start, length, pid (0 of an open file)
_KEEP_SIZE_PUNCH_HOLE = 0x01 | 0x02


def _fallocate(descriptor: int, mode: int, begin: int, size: int) -> int:
    """Linux's fallocate; the number of the error, or 0."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if call is None:
        return errno.ENOSYS
    offset = ctypes.c_longlong
    return 0 if call(descriptor, mode, offset(begin), offset(size)) == 0 else ctypes.get_errno()


def punch(descriptor: int, begin: int, size: int, path: Path) -> None:
    """Give the bytes of a range back to the file system: they read as zeros from then on.

    Raises:
        InputError: the file system cannot.
    """
    failed = _fallocate(descriptor, _KEEP_SIZE_PUNCH_HOLE, begin, size) if size else 0
    if failed:
        raise InputError(
            f"{path}: the file system of data.cache_dir cannot free a part of a file ({os.strerror(failed)}), which "
            "data.stage_datasets: shards needs; name a folder on ext4, XFS, Btrfs or tmpfs, or set "
            "data.stage_datasets: true"
        )


def check_can_punch(folder: Path) -> None:
    """Refuse a folder whose file system cannot free a part of a file.

    Raises:
        InputError: it cannot.
    """
    path = folder / "punched"
    with open(path, "wb") as handle:
        handle.write(b"x" * 8192)
        handle.flush()
        punch(handle.fileno(), 0, 4096, path)
    path.unlink()


class ShardLocks:
    """The locks of an entry's shards, of one open file: what is held by another one (of any process) excludes."""

    def __init__(self, entry: Path) -> None:
        self.path = entry / LOCKS
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)

    def _set(self, kind: int, shard: int, *, wait: bool) -> bool:
        command = getattr(fcntl, "F_OFD_SETLKW" if wait else "F_OFD_SETLK", None)
        if command is None:
            raise InputError("data.stage_datasets: shards needs Linux's locks of open files; set it to true")
        try:
            fcntl.fcntl(self._descriptor, command, _FLOCK.pack(kind, os.SEEK_SET, shard, 1, 0))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES) and not wait:
                return False
            raise InputError(
                f"{self.path} cannot be locked ({error.strerror or error}); data.cache_dir must lie on a disk of this "
                "node"
            ) from error
        return True

    def share(self, shard: int, *, wait: bool = True) -> bool:
        """Take the shared lock, also in place of the exclusive one; False where that would have to wait."""
        return self._set(fcntl.F_RDLCK, shard, wait=wait)

    def exclude(self, shard: int) -> bool:
        """Take the exclusive lock; False where anybody holds one. It is never waited for: shared ones are held long."""
        return self._set(fcntl.F_WRLCK, shard, wait=False)

    def release(self, shard: int) -> None:
        """Let go of the lock."""
        self._set(fcntl.F_UNLCK, shard, wait=False)

    def is_of(self, entry: Path) -> bool:
        """Whether these are the locks of the entry that has this name now."""
        mine, there = os.fstat(self._descriptor), (entry / LOCKS).stat()
        return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)

    def close(self) -> None:
        """Let go of all of them."""
        os.close(self._descriptor)


class ShardTable:
    """The records of an entry's shards: reads and writes go to a file that all processes of the node map."""

    def __init__(self, entry: Path) -> None:
        self.path = entry / TABLE
        self.records = np.memmap(self.path, dtype=RECORD, mode="r+")

    @staticmethod
    def create(entry: Path, bounds: np.ndarray) -> None:
        """The files of an entry whose shards, all absent, have the bytes bounds[s] … bounds[s + 1] - 1."""
        records = np.zeros(len(bounds) - 1, dtype=RECORD)
        records["bytes"] = np.diff(bounds)
        (entry / TABLE).write_bytes(records.tobytes())
        (entry / LOCKS).write_bytes(b"")
        with open(entry / SPARSE, "wb") as sparse:
            sparse.truncate(int(bounds[-1]))

    def state(self, shard: int) -> int:
        """Of the states above."""
        return int(self.records["state"][shard])

    def set_state(self, shard: int, state: int) -> None:
        """Under the exclusive lock."""
        self.records["state"][shard] = state

    def touch(self, shard: int, now: int) -> None:
        """Note that a shard was used."""
        self.records["used"][shard] = now

    def sha256(self, shard: int) -> bytes | None:
        """The hash that a shard had when it was first fetched; None where that is not known."""
        record = self.records[shard]
        found = record["sha256"].tobytes()
        # A crash of the node may leave half a record.
        return found if record["known"] and zlib.crc32(found) == record["crc"] else None

    def set_sha256(self, shard: int, sha256: bytes) -> None:
        """Under the exclusive lock."""
        self.records["sha256"][shard] = np.frombuffer(sha256, np.uint8)
        self.records["crc"][shard] = zlib.crc32(sha256)
        self.records["known"][shard] = 1

    def taken(self) -> np.ndarray:
        """Shards that take room on the disk, or are about to."""
        return np.flatnonzero(self.records["state"] != ABSENT)

    def bytes_taken(self) -> int:
        """Bytes of those."""
        return int(self.records["bytes"][self.taken()].sum())

    def distrust(self) -> None:
        """After the node was started again: whole shards are to be checked before they are read."""
        state = self.records["state"]
        state[state == WHOLE] = UNCHECKED


@contextlib.contextmanager
def _excluded(entry: Path, shard: int) -> Iterator[ShardLocks | None]:
    """The exclusive lock of a shard, by a file opened for it: None while any thread of the node reads or changes it."""
    locks = ShardLocks(entry)
    try:
        yield locks if locks.exclude(shard) else None
    finally:
        locks.close()


def free_shard(entry: Path, shard: int) -> int:
    """Punch a shard out unless a process uses it; the bytes that it took, 0 where it stays.

    Raises:
        InputError: the file system cannot punch holes.
    """
    try:
        with _excluded(entry, shard) as mine:
            if mine is None:
                return 0
            table = ShardTable(entry)
            descriptor = os.open(entry / SPARSE, os.O_RDWR | os.O_CLOEXEC)
            try:
                # Another entry may have taken the place of this one since its lock was taken: then not its files.
                if not mine.is_of(entry) or table.state(shard) == ABSENT:
                    return 0
                size = int(table.records["bytes"][shard])
                begin = int(table.records["bytes"][:shard].sum())
                # Not whole any more before the first byte goes, so that a kill here leaves nothing that looks whole.
                table.set_state(shard, PARTIAL)
                punch(descriptor, begin, size, entry / SPARSE)
                table.set_state(shard, ABSENT)
                return size
            finally:
                os.close(descriptor)
    except FileNotFoundError:
        return 0  # the entry itself has just been removed
