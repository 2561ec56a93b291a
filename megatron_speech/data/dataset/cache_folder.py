"""The folder of a node's staged datasets: its locks, what lies there, and making room in it.

<key>/           an entry: a whole dataset, or one whose `.bin` is there by the shard
.<key>.partial   an entry under way
<key>.used       locked, shared, by every process that uses the entry
<key>.making     locked while a process looks for the entry, makes or removes it
.lock            locked while room is counted, and made
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_speech.data.dataset.shard_table import ShardTable, free_shard
from megatron_speech.errors import InputError

logger = logging.getLogger(__name__)

ENTRY = "entry.json"
RESERVED = "reserved.json"
# Never fill a disk to its last byte.
SPARE_BYTES = 1 << 26


def gib(size: float) -> str:
    """A number of bytes, as people read it."""
    return f"{size / 2**30:.2f} GiB"


@contextlib.contextmanager
def locked(path: Path, how: int = fcntl.LOCK_EX) -> Iterator[int | None]:
    """A locked file's descriptor, closed at the end; None where `how` does not wait and the lock is taken."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, how)
        except BlockingIOError:
            yield None
            return
        except OSError as error:
            raise InputError(
                f"{path} cannot be locked ({error.strerror or error}); data.cache_dir must lie on a disk of this node"
            ) from error
        yield descriptor
    finally:
        os.close(descriptor)


def key_of(path: Path) -> str:
    """The key of an entry, or of one under way."""
    return path.name.lstrip(".").partition(".")[0]


def file_size(path: Path) -> int:
    """Bytes of a file, 0 where there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _table(path: Path) -> ShardTable | None:
    """The shards of an entry, where it has any; it may be removed by another process at any time."""
    try:
        return ShardTable(path)
    except (FileNotFoundError, ValueError):
        return None


def taken(path: Path) -> int:
    """Bytes that an entry, or one under way, takes or will take."""
    for name in (ENTRY, RESERVED):
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            whole = int(json.loads((path / name).read_text(encoding="utf-8"))["bytes"])
            table = _table(path)
            return whole + (0 if table is None else table.bytes_taken())
    with contextlib.suppress(FileNotFoundError):
        return sum(file.stat().st_blocks * 512 for file in path.iterdir())
    return 0  # it has just been removed, or given its name


def remove(path: Path) -> None:
    """Remove an entry."""
    # Under another name first: a removal that is cut short leaves no half entry.
    doomed = path.with_name(f".{key_of(path)}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _last_used(path: Path) -> float:
    """When an entry was last opened; one under way, when its copy began."""
    used = path.with_name(f"{key_of(path)}.used")
    try:
        opened = used.stat().st_mtime if used.exists() and not path.name.startswith(".") else path.stat().st_mtime
    except FileNotFoundError:
        return 0.0  # it has just been removed
    table = _table(path)
    return opened if table is None else max(opened, float(table.records["used"].max(initial=0)) / 1e9)


def _removed(path: Path) -> bool:
    """Remove an entry, or what a killed copy left, unless a process uses or makes it."""
    now = fcntl.LOCK_EX | fcntl.LOCK_NB
    with locked(path.with_name(f"{key_of(path)}.making"), now) as making:
        if making is None:
            return False
        with locked(path.with_name(f"{key_of(path)}.used"), now) as using:
            if using is None:
                return False
            remove(path)
            return True


@dataclass(frozen=True)
class _Candidate:
    """What could go: an entry, or one shard of it."""

    last_used: float
    entry: Path
    shard: int | None

    def evict(self) -> int:
        """Remove it unless a process uses it; the bytes that it took, 0 where it stays."""
        if self.shard is not None:
            if size := free_shard(self.entry, self.shard):
                logger.debug("evicted shard %d of %s (%d bytes)", self.shard, self.entry, size)
            return size
        size = taken(self.entry) if self.entry.is_dir() else 0
        if not size or not _removed(self.entry):
            return 0
        logger.info("evicted the staged dataset %s (%s)", self.entry, gib(size))
        return size


def _candidates(entries: Collection[Path], keep: Collection[str]) -> list[_Candidate]:
    """What could go, the longest unused first."""
    found = [_Candidate(_last_used(path), path, None) for path in entries if key_of(path) not in keep]
    for path in entries:
        if (table := _table(path)) is not None:
            found += [
                _Candidate(float(table.records["used"][shard]) / 1e9, path, shard) for shard in table.taken().tolist()
            ]
    return sorted(found, key=lambda candidate: candidate.last_used)


@dataclass(frozen=True)
class Room:
    """What lies in the folder, and what the disk has left: bytes."""

    used: int
    free: int

    def fits(self, needed: int, limit: int | None) -> bool:
        """Whether so many bytes may be added."""
        return needed <= self.free and (limit is None or self.used + needed <= limit)


def make_room(
    folder: Path, needed: int, limit: int | None, *, own: str = "", keep: Collection[str] = (), done: int = 0
) -> Room:
    """Evict what no process uses, the longest unused first, until `needed` bytes fit; under the lock of the folder.

    Args:
        needed: bytes to be added.
        limit: of all that lies there; None: nothing is evicted.
        own: key of the entry that they are for, where it is not to be counted.
        keep: keys of entries that stay, used or not; shards of them go.
        done: bytes of `needed` that lie on the disk already.

    Returns:
        What lies there now: it may not be enough.
    """
    entries = {path: taken(path) for path in folder.iterdir() if path.is_dir() and key_of(path) != own}

    def room(used: int) -> Room:
        return Room(used, shutil.disk_usage(folder).free - SPARE_BYTES + done)

    found = room(sum(entries.values()))
    if limit is None or found.fits(needed, limit):
        return found
    for candidate in _candidates(entries, keep):
        if freed := candidate.evict():
            found = room(found.used - freed)
        if found.fits(needed, limit):
            break
    return found
