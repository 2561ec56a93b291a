"""Node-local staging: a run's datasets copied once to a disk of the node, checked, and read from there.

    CACHE/datasets/<key>/         data.bin, data.idx, data.docs.parquet, data.manifest.json and entry.json
    CACHE/datasets/.<key>.partial an entry under way: a killed copy is continued from here
    CACHE/datasets/<key>.used     locked, shared, by every process that uses the entry
    CACHE/datasets/<key>.making   locked while a process looks for the entry, makes or removes it
    CACHE/datasets/.lock          locked while room is counted, and made

The key is the SHA-256 of the manifest, which holds the hashes of the other files: another content is another
entry, and the same dataset under two names is one. Of a node's processes the first to come copies and the others
wait. A copy is hashed as it is written and appears under its name by one rename. Entries that no process uses make
room for new ones, the longest unused first, where `data.cache_gib` says how much there may be.

    srun --ntasks-per-node=1 python -m megatron_speech.data.dataset.staging RECIPE.yaml

stages a recipe's datasets on every node of a job before it trains.

An entry is trusted while its files have the size and modification time that the copy left, and their hashes are
read again once after every boot of the node: a crash is when disks lose what was written.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_speech.console import Progress
from megatron_speech.data.dataset.indexed import file_of
from megatron_speech.data.dataset.manifest import Manifest, read_manifest
from megatron_speech.errors import InputError
from megatron_speech.files import fsync_path, prepare_output_directory, read_json, sha256_file, sha256_hex, write_json
from megatron_speech.remote import is_url

logger = logging.getLogger(__name__)

_CHUNK = 1 << 23
_MANIFEST = ".manifest.json"
_ENTRY = "entry.json"
# Never fill a disk to its last byte.
_SPARE_BYTES = 1 << 26


@dataclass(frozen=True)
class _Source:
    """One dataset to be staged: its manifest's bytes, and size and SHA-256 of each file by suffix."""

    prefix: str
    key: str
    manifest: bytes
    files: dict[str, tuple[int, str]]

    @property
    def bytes(self) -> int:
        return len(self.manifest) + sum(size for size, _ in self.files.values())


def stage_datasets(
    prefixes: Mapping[str, str], cache_dir: str | os.PathLike[str], cache_gib: float | None
) -> dict[str, str]:
    """Prefixes of node-local copies of these datasets, made where they are not there yet.

    The copies stay this process's until it ends (or :func:`release`): they are not evicted.

    Args:
        prefixes: name → prefix, a path or an fsspec URL.
        cache_dir: `data.cache_dir`; its folder `datasets` is used.
        cache_gib: `data.cache_gib`: entries that no process uses are removed to stay below it; None: never.

    Raises:
        InputError: a dataset without a manifest, a copy that has another hash than its manifest says, a limit or a
            disk that is too small for what the run needs, or a folder without file locks.
    """
    if not prefixes:
        return {}
    folder = Path(cache_dir) / "datasets"
    prepare_output_directory(folder)
    sources = {name: _find(prefix) for name, prefix in prefixes.items()}
    wanted = {source.key: source for source in sources.values()}
    limit = None if cache_gib is None else int(cache_gib * 2**30)
    needed = sum(source.bytes for source in wanted.values())
    if limit is not None and needed > limit:
        raise InputError(
            f"data.cache_gib is {cache_gib:g}, but the run's {len(wanted)} datasets are {_gib(needed)}; raise it, or "
            "set data.stage_datasets: false"
        )
    for source in wanted.values():
        _hold(folder, source, limit, set(wanted))
    return {name: str(folder / source.key / "data") for name, source in sources.items()}


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _find(prefix: str) -> _Source:
    """What there is to copy."""
    if is_url(prefix):
        data, manifest = _fetch_manifest(f"{prefix}{_MANIFEST}")
    else:
        path = file_of(prefix, _MANIFEST)
        manifest = read_manifest(path)
        data = path.read_bytes()
    files = {suffix: (entry.bytes, entry.sha256) for suffix, entry in manifest.files.items()}
    return _Source(prefix, sha256_hex(data), data, files)


def _fetch_manifest(url: str) -> tuple[bytes, Manifest]:
    try:
        with _open_source(url) as handle:
            data = handle.read()
    except (OSError, ImportError, ValueError) as error:
        raise InputError(f"{url} cannot be read ({error}); name the prefix of a dataset that can") from error
    with tempfile.TemporaryDirectory(prefix="megatron-speech-manifest-") as folder:
        path = Path(folder) / "manifest.json"
        path.write_bytes(data)
        try:
            return data, read_manifest(path)
        except InputError as error:
            raise InputError(str(error).replace(str(path), url)) from error


# ---- locks


# Locks of the entries that this process uses, by path: held until it ends.
_held: dict[Path, int] = {}


def release() -> None:
    """Let go of all entries that this process uses; their mapped files stay readable, but may be evicted."""
    while _held:
        os.close(_held.popitem()[1])


@contextlib.contextmanager
def _lock(path: Path, how: int = fcntl.LOCK_EX) -> Iterator[int | None]:
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


def _hold(folder: Path, source: _Source, limit: int | None, wanted: set[str]) -> None:
    """Make sure of an entry and keep it locked, shared, until this process ends."""
    path = folder / f"{source.key}.used"
    entry = folder / source.key
    if path in _held:
        if _is_sound(entry):
            return
        os.close(_held.pop(path))
    # Waiting for this lock means waiting for one copy; its holder waits for no other entry.
    with _lock(folder / f"{source.key}.making"):
        if not _is_sound(entry):
            with _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB) as unused:
                if unused is None:
                    raise InputError(
                        f"{entry} is damaged and another run is using it; end that run, or name another data.cache_dir"
                    )
                _make(folder, entry, source, limit, wanted)
        with _lock(path, fcntl.LOCK_SH) as descriptor:
            assert descriptor is not None
            os.utime(path)  # when it was last used
            _held[path] = os.dup(descriptor)  # the lock lives as long as any descriptor of it


# ---- what is there


def _boot() -> str:
    """A name of this boot of the node."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return "unknown"


def _stat(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _unchanged(entry: Path) -> bool:
    """Whether the files of an entry are those that the copy left, by size and modification time."""
    if not (entry / _ENTRY).is_file():
        return False  # an entry without a record was never finished
    files = read_json(entry / _ENTRY, "staged dataset")["files"]
    try:
        return all(_stat(entry / name) == [entered["bytes"], entered["mtime_ns"]] for name, entered in files.items())
    except FileNotFoundError:
        return False


def _is_sound(entry: Path) -> bool:
    """Whether an entry can be used as it is: unchanged, and its hashes read since the node was started."""
    return _unchanged(entry) and read_json(entry / _ENTRY, "staged dataset")["boot"] == _boot()


def _still_right(entry: Path, source: _Source) -> bool:
    """Read the hashes of an entry again, after a boot."""
    if not _unchanged(entry):
        return False
    logger.info("checking the staged copy of %s once after the start of this node", source.prefix)
    return all(sha256_file(entry / f"data{suffix}") == sha256 for suffix, (_, sha256) in source.files.items())


def _record(entry: Path, source: _Source) -> None:
    files = {}
    for suffix in (_MANIFEST, *source.files):
        size, mtime_ns = _stat(entry / f"data{suffix}")
        files[f"data{suffix}"] = {"bytes": size, "mtime_ns": mtime_ns}
    write_json(entry / _ENTRY, {"source": source.prefix, "boot": _boot(), "bytes": source.bytes, "files": files})


# ---- making an entry


def _make(folder: Path, entry: Path, source: _Source, limit: int | None, wanted: set[str]) -> None:
    """Make an entry, its exclusive lock being held."""
    if entry.exists():
        if _still_right(entry, source):
            _record(entry, source)
            return
        logger.warning("the staged copy of %s in %s is damaged: it is copied again", source.prefix, entry)
        _remove(entry)
    partial = folder / f".{source.key}.partial"
    with _lock(folder / ".lock"):
        _make_room(folder, source, limit, wanted)
        # Counted as used from here on.
        partial.mkdir(exist_ok=True)
        write_json(partial / "reserved.json", {"bytes": source.bytes})
    try:
        _copy(partial, source)
        (partial / "reserved.json").unlink()
        _record(partial, source)
        fsync_path(partial)
        partial.rename(entry)
        fsync_path(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)  # the disk is shared
        raise InputError(
            f"cannot stage {source.prefix} in {folder}: {error.strerror or error}; free some space there, or name "
            "another data.cache_dir"
        ) from error


def _make_room(folder: Path, source: _Source, limit: int | None, wanted: set[str]) -> None:
    """Remove what no process uses, the longest unused first, until `source` fits under the limit and on the disk."""
    others = {path: _reserved(path) for path in folder.iterdir() if path.is_dir() and _key(path) != source.key}
    used = sum(others.values()) + source.bytes
    done = sum(_size(path) for path in folder.glob(f".{source.key}.partial/data*"))
    free = shutil.disk_usage(folder).free - _SPARE_BYTES + done
    if limit is not None:
        for path in sorted(others, key=_last_used):
            if used <= limit and source.bytes <= free:
                break
            if _key(path) not in wanted and _removed(path):
                logger.info("evicted the staged dataset %s (%s)", path, _gib(others[path]))
                used -= others[path]
                free = shutil.disk_usage(folder).free - _SPARE_BYTES + done
        if used > limit:
            raise InputError(
                f"{folder}: staging {source.prefix} ({_gib(source.bytes)}) would come to {_gib(used)} with what "
                f"this and other runs are using, above data.cache_gib {limit / 2**30:g}; raise it, or wait"
            )
    if source.bytes > free:
        why = "" if limit is not None else " (data.cache_gib is not set, so nothing is ever removed)"
        raise InputError(
            f"{folder}: {source.prefix} needs {_gib(source.bytes)} and the disk has {_gib(max(0, free))} free{why}; "
            "free some space, or name another data.cache_dir"
        )


def _key(path: Path) -> str:
    """The key of an entry, or of one under way."""
    return path.name.lstrip(".").partition(".")[0]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _reserved(path: Path) -> int:
    """Bytes that an entry, or one under way, takes or will take."""
    for name in (_ENTRY, "reserved.json"):
        if (path / name).is_file():
            return int(read_json(path / name, "staged dataset")["bytes"])
    return sum(_size(file) for file in path.iterdir())


def _last_used(path: Path) -> float:
    """When an entry was last opened; one under way, when its copy began."""
    used = path.with_name(f"{_key(path)}.used")
    return used.stat().st_mtime if used.exists() and not path.name.startswith(".") else path.stat().st_mtime


def _removed(path: Path) -> bool:
    """Remove an entry, or what a killed copy left, unless a process uses or makes it."""
    now = fcntl.LOCK_EX | fcntl.LOCK_NB
    with _lock(path.with_name(f"{_key(path)}.making"), now) as making:
        if making is None:
            return False
        with _lock(path.with_name(f"{_key(path)}.used"), now) as using:
            if using is None:
                return False
            _remove(path)
            return True


def _remove(path: Path) -> None:
    # Under another name first: a removal that is cut short leaves no half entry.
    doomed = path.with_name(f".{_key(path)}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _copy(partial: Path, source: _Source) -> None:
    """Copy and hash every file of `source`, resuming an earlier copy that was stopped."""
    began = time.monotonic()
    logger.info("staging %s (%s) in %s", source.prefix, _gib(source.bytes), partial.parent)
    (partial / f"data{_MANIFEST}").write_bytes(source.manifest)
    with Progress(f"staging {source.prefix}", total=source.bytes, unit="B") as progress:
        for suffix, (size, sha256) in source.files.items():
            target = partial / f"data{suffix}"
            resumed = _size(target) > 0
            found = _copy_file(f"{source.prefix}{suffix}", target, size, progress)
            if found != sha256 and resumed:
                # What a killed copy left may have been lost by the disk: once more, from the start.
                target.unlink()
                found = _copy_file(f"{source.prefix}{suffix}", target, size, progress)
            if found != sha256:
                shutil.rmtree(partial, ignore_errors=True)
                raise InputError(
                    f"{source.prefix}{suffix}: SHA-256 of what was read is {found}, needed {sha256} by its manifest: "
                    "the file is damaged or was changed; restore it, or recreate the dataset"
                )
    seconds = time.monotonic() - began
    logger.info("staged %s: %s in %.0f s", source.prefix, _gib(source.bytes), seconds)


def _copy_file(name: str, target: Path, size: int, progress: Any) -> str:
    """Copy one file, from the end of what is there on; SHA-256 of the whole."""
    digest = hashlib.sha256()
    with open(target, "ab+") as out:
        out.seek(0)
        while chunk := out.read(_CHUNK):
            digest.update(chunk)
            progress.update(len(chunk))
        at = out.tell()
        try:
            source = _open_source(name)
        except (OSError, ImportError, ValueError) as error:
            raise InputError(f"{name} cannot be read ({error}); restore it, or recreate the dataset") from error
        with source:
            source.seek(at)
            while at <= size and (chunk := _read(source, name)):
                out.write(chunk)
                out.flush()  # what a kill leaves is whole chunks
                digest.update(chunk)
                at += len(chunk)
                progress.update(len(chunk))
                _copied(target, at)
        out.flush()
        os.fsync(out.fileno())
    return digest.hexdigest()


def _open_source(name: str) -> IO[bytes]:
    if is_url(name):
        import fsspec

        opened: IO[bytes] = fsspec.open(name, "rb").open()
        return opened
    return open(name, "rb")


def _read(source: IO[bytes], name: str) -> bytes:
    try:
        return source.read(_CHUNK)
    except OSError as error:
        raise InputError(f"{name} cannot be read ({error.strerror or error}); try again when it can") from error


def _copied(target: Path, size: int) -> None:
    """Called after every chunk: where tests interrupt."""
