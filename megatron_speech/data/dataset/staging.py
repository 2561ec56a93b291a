"""Node-local staging: a run's datasets copied once to a disk of the node, checked, and read from there.

    CACHE/datasets/<key>/         data.bin, data.idx, data.docs.parquet, data.manifest.json and entry.json
    CACHE/datasets/.<key>.partial an entry under way: a killed copy is continued from here
    CACHE/datasets/<key>.used     locked, shared, by every process that uses the entry
    CACHE/datasets/<key>.making   locked while a process looks for the entry, makes or removes it
    CACHE/datasets/.lock          locked while room is counted, and made

With `data.stage_datasets: shards` (:func:`stage_shards`) the entry `<key>-shards` holds `.bin` by the shard (see
`shard_table`) and the other files whole; what follows is of those.

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

import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_speech.console import Progress
from megatron_speech.data.dataset.cache_folder import ENTRY, RESERVED, file_size, gib, locked, make_room, remove
from megatron_speech.data.dataset.indexed import TokenDataset, file_of, read_index
from megatron_speech.data.dataset.manifest import Manifest, read_manifest
from megatron_speech.data.dataset.shard_store import ShardStore
from megatron_speech.data.dataset.shard_table import LOCKS, SPARSE, TABLE, ShardTable, check_can_punch
from megatron_speech.data.dataset.shards import shard_edges
from megatron_speech.data.dataset.source import RangeReader, open_source
from megatron_speech.errors import InputError
from megatron_speech.files import fsync_path, prepare_output_directory, read_json, sha256_file, sha256_hex, write_json
from megatron_speech.recipe.data import DataConfig
from megatron_speech.recipe.stage import StageDataConfig
from megatron_speech.remote import is_url

logger = logging.getLogger(__name__)

_CHUNK = 1 << 23
_MANIFEST = ".manifest.json"
_BESIDE_SHARDS = (".idx", ".docs.parquet")  # copied whole: what training reads beside `.bin`
_SHARD_BYTES, _LARGEST_SHARD_BYTES, _MOST_SHARDS = 1 << 26, 1 << 30, 1 << 14


@dataclass(frozen=True)
class _Shards:
    """What is staged by the shard: bytes of `.bin`, and of a shard."""

    bin_bytes: int
    shard_bytes: int


@dataclass(frozen=True)
class _Source:
    """One dataset to be staged: its manifest's bytes, and size and SHA-256 of each file that is copied, by suffix."""

    prefix: str
    key: str
    manifest: bytes
    files: dict[str, tuple[int, str]]
    shards: _Shards | None = None

    @property
    def bytes(self) -> int:
        """What is copied whole."""
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
            f"data.cache_gib is {cache_gib:g}, but the run's {len(wanted)} datasets are {gib(needed)}; raise it, or "
            "set data.stage_datasets: false"
        )
    for source in wanted.values():
        _hold(folder, source, limit, set(wanted))
    return {name: str(folder / source.key / "data") for name, source in sources.items()}


def shard_bytes_of(bin_bytes: int) -> int:
    """Size of the shards of a `.bin`: 64 MiB, doubled while it has more than 16,384 of them; at most 1 GiB."""
    size = _SHARD_BYTES
    while size < _LARGEST_SHARD_BYTES and bin_bytes > size * _MOST_SHARDS:
        size *= 2
    return size


def stage_shards(
    prefixes: Mapping[str, str],
    cache_dir: str | os.PathLike[str],
    cache_gib: float,
    *,
    shard_bytes: int | None = None,
) -> dict[str, ShardStore]:
    """The `.bin` files of these datasets by the shard, their other files copied whole where they are not there yet.

    The entries stay this process's until it ends (or :func:`release`). Of `.bin` nothing is fetched here.

    Args:
        prefixes, cache_dir: see :func:`stage_datasets`.
        cache_gib: `data.cache_gib`: shards and entries that no process uses are freed to stay below it.
        shard_bytes: of a shard; None: :func:`shard_bytes_of`. An entry that is there keeps its own.

    Raises:
        InputError: as :func:`stage_datasets`; a `.bin` that has not the size that its manifest says, or a file system
            that cannot free parts of a file.
    """
    folder = Path(cache_dir) / "datasets"
    prepare_output_directory(folder)
    sources = {name: _by_shard(_find(prefix), shard_bytes) for name, prefix in prefixes.items()}
    wanted = {source.key: source for source in sources.values()}
    limit = int(cache_gib * 2**30)
    whole = sum(source.bytes for source in wanted.values())
    for source in wanted.values():
        _hold(folder, source, limit, set(wanted))
    stores = {key: ShardStore(folder / key, f"{source.prefix}.bin", limit) for key, source in wanted.items()}
    # One that is read, and one that is fetched meanwhile.
    two = 2 * max((int(np.diff(store.bounds).max(initial=0)) for store in stores.values()), default=0)
    if whole + two > limit:
        raise InputError(
            f"data.cache_gib is {cache_gib:g}, but the indices and document tables of the run's {len(wanted)} datasets "
            f"are {gib(whole)}, and two of their largest shards {gib(two)}; raise it"
        )
    return {name: stores[source.key] for name, source in sources.items()}


def check_windows(
    stage: StageDataConfig, data: DataConfig, datasets: Mapping[str, TokenDataset], strata: Sequence[str]
) -> None:
    """Refuse a stage whose documents come from more shards at a time than `data.cache_gib` holds.

    Args:
        stage, data: sections of the recipe; nothing is refused where datasets are not staged by the shard.
        datasets: name → dataset.
        strata: of each stratum, the name of its dataset.

    Raises:
        InputError: names both sizes, and what would fit.
    """
    if data.stage_datasets != "shards":
        return
    assert data.cache_gib is not None  # checked by DataConfig
    manifests = {name: dataset.manifest for name, dataset in datasets.items() if dataset.manifest is not None}
    sizes = {name: manifest.files[".bin"].bytes for name, manifest in manifests.items()}
    beside = sum(manifest.files[s].bytes for manifest in manifests.values() for s in _BESIDE_SHARDS)
    # What the threads of the node's processes read at the moment may be none of it.
    readers = data.workers * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    spare = readers * max(min(size, shard_bytes_of(size)) for size in sizes.values())
    room = int(data.cache_gib * 2**30) - beside - spare

    window = stage.shuffle_window

    def needed(shards: int) -> int:
        """Bytes of what is mixed with one another, with so many shards to a window; of all, where there is none."""
        return sum(
            size if window is None else min(size, strata.count(name) * shards * window.shard_bytes)
            for name, size in sizes.items()
            if name in strata
        )

    shards = 1 if window is None else window.shards
    if needed(shards) <= room:
        return
    have = (
        f"and of data.cache_gib {data.cache_gib:g}, {gib(max(0, room))} are left for them beside {gib(beside)} of "
        f"indices and document tables and {gib(spare)} for what {readers} threads of this node read"
    )
    if window is None:
        raise InputError(
            f"stage {stage.name!r} takes its documents from all of its datasets at once, {gib(needed(1))}, {have}; "
            f"set stages.{stage.name}.shuffle_window, or raise data.cache_gib"
        )
    fits = max((fewer for fewer in range(1, shards) if needed(fewer) <= room), default=0)
    lower = f", or lower stages.{stage.name}.shuffle_window.shards to {fits}" if fits else ""
    raise InputError(
        f"stage {stage.name!r}: the windows of its {len(strata)} strata, {shards} shards of {window.shard_mib:g} MiB "
        f"each, are {gib(needed(shards))}, {have}; raise data.cache_gib{lower}"
    )


def _by_shard(source: _Source, shard_bytes: int | None) -> _Source:
    """The same dataset, with `.bin` by the shard and only what training reads beside it."""
    size = source.files[".bin"][0]
    return _Source(
        prefix=source.prefix,
        key=f"{source.key}-shards",
        manifest=source.manifest,
        files={suffix: entry for suffix, entry in source.files.items() if suffix in _BESIDE_SHARDS},
        shards=_Shards(size, shard_bytes or shard_bytes_of(size)),
    )


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
        with open_source(url) as handle:
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


def _hold(folder: Path, source: _Source, limit: int | None, wanted: set[str]) -> None:
    """Make sure of an entry and keep it locked, shared, until this process ends."""
    path = folder / f"{source.key}.used"
    entry = folder / source.key
    if path in _held:
        if _is_sound(entry):
            return
        os.close(_held.pop(path))
    # Waiting for this lock means waiting for one copy; its holder waits for no other entry.
    with locked(folder / f"{source.key}.making"):
        if not _is_sound(entry):
            with locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB) as unused:
                if unused is None:
                    raise InputError(
                        f"{entry} is damaged and another run is using it; end that run, or name another data.cache_dir"
                    )
                _make(folder, entry, source, limit, wanted)
        with locked(path, fcntl.LOCK_SH) as descriptor:
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
    if not (entry / ENTRY).is_file():
        return False  # an entry without a record was never finished
    files = read_json(entry / ENTRY, "staged dataset")["files"]
    try:
        found = {name: _stat(entry / name) for name in files}
    except FileNotFoundError:
        return False
    # Without a time: a file that is changed while it is used.
    return all(
        found[name][0] == entered["bytes"] and entered["mtime_ns"] in (None, found[name][1])
        for name, entered in files.items()
    )


def _is_sound(entry: Path) -> bool:
    """Whether an entry can be used as it is: unchanged, and its hashes read since the node was started."""
    return _unchanged(entry) and read_json(entry / ENTRY, "staged dataset")["boot"] == _boot()


def _still_right(entry: Path, source: _Source) -> bool:
    """Read the hashes of an entry again, after a boot."""
    if not _unchanged(entry):
        return False
    logger.info("checking the staged copy of %s once after the start of this node", source.prefix)
    right = all(sha256_file(entry / f"data{suffix}") == sha256 for suffix, (_, sha256) in source.files.items())
    if right and source.shards is not None:
        ShardTable(entry).distrust()
    return right


def _record(entry: Path, source: _Source) -> None:
    files: dict[str, dict[str, int | None]] = {}
    for suffix in (_MANIFEST, *source.files):
        size, mtime_ns = _stat(entry / f"data{suffix}")
        files[f"data{suffix}"] = {"bytes": size, "mtime_ns": mtime_ns}
    for name in () if source.shards is None else (SPARSE, TABLE, LOCKS):
        files[name] = {"bytes": file_size(entry / name), "mtime_ns": None}
    write_json(entry / ENTRY, {"source": source.prefix, "boot": _boot(), "bytes": source.bytes, "files": files})


# ---- making an entry


def _make(folder: Path, entry: Path, source: _Source, limit: int | None, wanted: set[str]) -> None:
    """Make an entry, its exclusive lock being held."""
    if entry.exists():
        if _still_right(entry, source):
            _record(entry, source)
            return
        logger.warning("the staged copy of %s in %s is damaged: it is copied again", source.prefix, entry)
        remove(entry)
    partial = folder / f".{source.key}.partial"
    with locked(folder / ".lock"):
        _make_room(folder, source, limit, wanted)
        # Counted as used from here on.
        partial.mkdir(exist_ok=True)
        write_json(partial / RESERVED, {"bytes": source.bytes})
    try:
        _copy(partial, source)
        _record(partial, source)
        (partial / RESERVED).unlink()
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
    done = sum(file_size(path) for path in folder.glob(f".{source.key}.partial/data*"))
    room = make_room(folder, source.bytes, limit, own=source.key, keep=wanted, done=done)
    if limit is not None and room.used + source.bytes > limit:
        raise InputError(
            f"{folder}: staging {source.prefix} ({gib(source.bytes)}) would come to {gib(room.used + source.bytes)} "
            f"with what this and other runs are using, above data.cache_gib {limit / 2**30:g}; raise it, or wait"
        )
    if source.bytes > room.free:
        why = "" if limit is not None else " (data.cache_gib is not set, so nothing is ever removed)"
        raise InputError(
            f"{folder}: {source.prefix} needs {gib(source.bytes)} and the disk has {gib(max(0, room.free))} free{why}; "
            "free some space, or name another data.cache_dir"
        )


def _copy(partial: Path, source: _Source) -> None:
    """Copy and hash every file of `source`, resuming an earlier copy that was stopped."""
    began = time.monotonic()
    logger.info("staging %s (%s) in %s", source.prefix, gib(source.bytes), partial.parent)
    (partial / f"data{_MANIFEST}").write_bytes(source.manifest)
    with Progress(f"staging {source.prefix}", total=source.bytes, unit="B") as progress:
        for suffix, (size, sha256) in source.files.items():
            target = partial / f"data{suffix}"
            resumed = file_size(target) > 0
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
    if source.shards is not None:
        _lay_out_shards(partial, source, source.shards)
    seconds = time.monotonic() - began
    logger.info("staged %s: %s in %.0f s", source.prefix, gib(source.bytes), seconds)


def _lay_out_shards(partial: Path, source: _Source, shards: _Shards) -> None:
    """The files of a `.bin` of which nothing is there yet."""
    reader = RangeReader(f"{source.prefix}.bin")
    if (found := reader.size()) != shards.bin_bytes:
        raise InputError(
            f"{reader.name}: holds {found:,} bytes, needed {shards.bin_bytes:,} by its manifest: the file is damaged "
            "or was changed; restore it, or recreate the dataset"
        )
    check_can_punch(partial)
    places = read_index(partial / "data.idx").pointers
    edges = shard_edges(places, shards.shard_bytes)
    inside = edges < len(places)
    bounds = np.full(len(edges), shards.bin_bytes, dtype=np.int64)
    bounds[inside] = places[edges[inside]]
    ShardTable.create(partial, bounds)


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
            source = open_source(name)
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


def _read(source: IO[bytes], name: str) -> bytes:
    try:
        return source.read(_CHUNK)
    except OSError as error:
        raise InputError(f"{name} cannot be read ({error.strerror or error}); try again when it can") from error


def _copied(target: Path, size: int) -> None:
    """Called after every chunk: where tests interrupt."""
