"""Checkpoints at a URL: put there, listed, removed and fetched through fsspec, complete or invisible.

    URL/step_00000100/checkpoint.json    written last, removed first: a folder without it is no checkpoint
                      common.pt …

Light to import: no torch, and fsspec only when it is used.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_speech.console import Progress
from megatron_speech.errors import InputError
from megatron_speech.files import sha256_file
from megatron_speech.wording import nearest

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*(::|://)", re.IGNORECASE)
_NAME = re.compile(r"step_[0-9]{8,}")
_DESCRIPTION = "checkpoint.json"
_MARK = "copying"  # beside an incomplete copy: the hash of the description that its files belong to
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory"}  # which have no folders to be made


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether it names a scheme (`s3://…`, `simplecache::http://…`), which fsspec opens, rather than a path."""
    return _SCHEME.match(os.fspath(path)) is not None


def check_protocol(url: str, protocol: str) -> None:
    """Refuse a URL of a protocol that fsspec does not know.

    Raises:
        InputError: names the nearest protocol that it knows.
    """
    import fsspec

    known = {*fsspec.available_protocols(), *fsspec.registry}
    if protocol not in known:
        near = nearest(protocol, known)
        raise InputError(
            f"{url} names the protocol {protocol}, which is unknown{f' (did you mean {near!r}?)' if near else ''}; "
            "known are http, https, s3, gs, az, hf, file and the others of fsspec"
        )


def open_url(url: str, options: Mapping[str, Any] | None = None) -> tuple[Any, str]:
    """(fsspec file system, path on it) of a URL.

    Raises:
        InputError: an unknown protocol, or its package is not installed.
    """
    import fsspec

    check_protocol(url, url.partition("://")[0])
    try:
        system, path = fsspec.core.url_to_fs(url, **(options or {}))
    except ImportError as error:
        raise InputError(
            f"{url} needs a package that is not installed: {error}; install megatron-speech[remote]"
        ) from error
    return system, path.rstrip("/")


def check_writable(url: str, options: Mapping[str, Any] | None = None, *, seconds: float = 60.0) -> None:
    """Write a small file at `url`, list it and remove it again.

    Args:
        url: a folder, which need not be there yet.
        options: fsspec's, such as endpoint_url.
        seconds: to wait for an answer.

    Raises:
        InputError: an unknown protocol, a package that is not installed, or what the storage said.
    """
    system, root = open_url(url, options)
    probe = f"{root}/.probe-{uuid.uuid4().hex}"
    failed: list[BaseException] = []

    def write() -> None:
        try:
            folder_is_new = not _is_object_store(system) and not system.exists(root)
            if folder_is_new:
                system.makedirs(root, exist_ok=True)
            system.pipe_file(probe, b"probe")
            system.invalidate_cache()
            if probe.rpartition("/")[2] not in {path.rpartition("/")[2] for path in system.ls(root, detail=False)}:
                raise OSError("what was written is not listed")
            system.rm_file(probe)
            if folder_is_new:
                system.rmdir(root)
        except BaseException as error:  # the libraries behind fsspec have no error in common
            failed.append(error)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    thread.join(seconds)
    remedy = "check the URL, its options and the credentials in the environment"
    if thread.is_alive():
        raise InputError(f"{url} did not answer within {seconds:g} s; {remedy}")
    if failed:
        text = str(failed[0]).strip()
        said = f"{type(failed[0]).__name__}{f': {text.splitlines()[0]}' if text else ''}"
        raise InputError(f"{url} cannot be written to ({said}); {remedy}") from failed[0]


def _is_object_store(system: Any) -> bool:
    protocols = {system.protocol} if isinstance(system.protocol, str) else set(system.protocol)
    return bool(protocols & _OBJECT_STORES)


def put_checkpoint(system: Any, root: str, local: Path) -> bool:
    """Copy the checkpoint `local` to `root`; False when its copy was there already.

    Resumes what an earlier attempt has copied of the same checkpoint.

    Raises:
        InputError: a file of it is damaged.
        Exception: whatever the file system raises.
    """
    system.invalidate_cache()
    description = (local / _DESCRIPTION).read_bytes()
    target, mark = f"{root}/{local.name}", hashlib.sha256(description).hexdigest().encode()
    if _read(system, f"{target}/{_DESCRIPTION}") == description:
        return False
    if system.exists(f"{target}/{_DESCRIPTION}"):  # another one of the same name, as after a rollback
        system.rm_file(f"{target}/{_DESCRIPTION}")
    if not _is_object_store(system):
        system.makedirs(target, exist_ok=True)
    going_on = _read(system, f"{target}/{_MARK}") == mark
    if not going_on:
        if system.exists(target):  # of another one: its files may have the sizes of this one's
            for path in system.ls(target, detail=False):
                system.rm_file(path)
        system.pipe_file(f"{target}/{_MARK}", mark)
    files: dict[str, dict[str, Any]] = json.loads(description)["files"]
    with Progress(f"upload {local.name}", total=sum(entry["bytes"] for entry in files.values()), unit="B") as copied:
        for name, entry in files.items():
            if going_on and _size(system, f"{target}/{name}") == entry["bytes"]:
                copied.skip(entry["bytes"])
                continue
            if sha256_file(local / name) != entry["sha256"]:
                raise InputError(f"checkpoint {local}: {name} does not have the SHA-256 that was recorded")
            _copy(system.put_file, str(local / name), f"{target}/{name}", entry["bytes"], copied)
    system.invalidate_cache()
    for name, entry in files.items():
        if (size := _size(system, f"{target}/{name}")) != entry["bytes"]:
            raise OSError(f"{target}/{name} has {size} bytes there instead of {entry['bytes']}")
    system.pipe_file(f"{target}/{_DESCRIPTION}", description)
    system.rm_file(f"{target}/{_MARK}")
    return True


def list_copies(system: Any, root: str) -> dict[str, dict[str, Any]]:
    """Names and descriptions of the complete copies at `root`, newest first."""
    system.invalidate_cache()
    if not system.exists(root):
        return {}
    names = {path.rstrip("/").rpartition("/")[2] for path in system.ls(root, detail=False)}
    found = {}
    for name in sorted(filter(_NAME.fullmatch, names), key=lambda name: int(name[5:]), reverse=True):
        description = _read(system, f"{root}/{name}/{_DESCRIPTION}")
        if description is not None:
            found[name] = json.loads(description)
    return found


def remove_copy(system: Any, root: str, name: str) -> None:
    """Remove a copy, its description first."""
    system.rm_file(f"{root}/{name}/{_DESCRIPTION}")
    system.rm(f"{root}/{name}", recursive=True)


def cache_folder() -> Path:
    """$MEGATRON_SPEECH_CACHE, else ~/.cache/megatron-speech: what was fetched from URLs."""
    return Path(os.environ.get("MEGATRON_SPEECH_CACHE") or Path.home() / ".cache" / "megatron-speech")


def fetch_checkpoint(url: str, options: Mapping[str, Any] | None = None) -> Path:
    """A local copy of the checkpoint at `url`, checked; fetched when it is not in the cache yet.

    The cache is $MEGATRON_SPEECH_CACHE, else ~/.cache/megatron-speech. Processes of one machine that need the same
    one wait for the first.

    Args:
        url: of a checkpoint, or of the folder that a run copies its checkpoints to (the newest complete one is taken).
        options: fsspec's, such as endpoint_url.

    Raises:
        InputError: there is no complete checkpoint, or what came is damaged.
    """
    root, _, name = url.rstrip("/").rpartition("/")
    if not _NAME.fullmatch(name):
        root, name = url.rstrip("/"), ""
    system, path = open_url(root, options)
    copies = list_copies(system, path)
    if not name:
        name = next(iter(copies), "")
    if name not in copies:
        raise InputError(f"{url} holds no complete checkpoint; name a checkpoint's folder there, or the one above it")
    fields = copies[name]
    folder = cache_folder() / "checkpoints" / hashlib.sha256(root.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    local = folder / name
    with open(folder / f".{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if local.is_dir() and json.loads((local / _DESCRIPTION).read_text(encoding="utf-8")) == fields:
            return local
        building = folder / f".{name}.tmp"
        for old in (building, local):
            shutil.rmtree(old, ignore_errors=True)
        building.mkdir()
        with Progress(
            f"fetch {name}", total=sum(entry["bytes"] for entry in fields["files"].values()), unit="B"
        ) as got:
            for file, entry in fields["files"].items():
                _copy(system.get_file, f"{path}/{name}/{file}", str(building / file), entry["bytes"], got)
                if sha256_file(building / file) != entry["sha256"]:
                    raise InputError(
                        f"{url}: {file} does not have the SHA-256 that was recorded; take another checkpoint"
                    )
        (building / _DESCRIPTION).write_text(json.dumps(fields), encoding="utf-8")
        os.rename(building, local)
    return local


def _copy(copy: Callable[..., Any], source: str, target: str, size: int, progress: Progress) -> None:
    """Copy one file of `size` bytes by fsspec's `put_file` or `get_file`, counting the parts that it reports."""
    from fsspec.callbacks import Callback

    counted = 0

    def count(total: int | None, value: int, **_: Any) -> None:
        nonlocal counted
        progress.update(value - counted)
        counted = value

    copy(source, target, callback=Callback(hooks={"count": count}))
    progress.update(size - counted)


def _read(system: Any, path: str) -> bytes | None:
    try:
        data: bytes = system.cat_file(path)
    except FileNotFoundError:
        return None
    return data


def _size(system: Any, path: str) -> int | None:
    try:
        return int(system.info(path)["size"])
    except FileNotFoundError:
        return None
