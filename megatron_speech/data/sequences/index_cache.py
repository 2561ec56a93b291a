"""The segment table on disk: a folder of columns, built once per content, memory-mapped by everyone.

    <cache_dir>/<key>/index.json       key, sizes, SHA-256 of each column, what was asked for and what came out
                      seq_ptr.npy, stratum.npy, document.npy, start.npy, length.npy (joined.npy where stitched)

`key` is a hash of everything that the table is a function of, and the bytes are a function of the key: nodes that
build their own copies have the same ones. A folder appears by one rename when it is complete and on the disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_speech.data.sequences.packing import SegmentTable
from megatron_speech.errors import InputError
from megatron_speech.files import (
    canonical_json,
    fsync_path,
    prepare_output_directory,
    read_json,
    sha256_hex,
    write_json,
)

logger = logging.getLogger(__name__)

# Part of every cache key: raise it whenever the same inputs give another table.
INDEX_VERSION = 2

_COLUMNS: dict[str, type[np.generic]] = {
    "seq_ptr": np.int64,
    "stratum": np.uint16,
    "document": np.int32,
    "start": np.int32,
    "length": np.int32,
    "joined": np.uint8,
}
_OPTIONAL = ("joined",)
_HEADER = 128  # bytes of an .npy file before its data: NumPy pads to a multiple of 64, with room for any length


class _Column:
    """One `.npy` file that grows at its end."""

    def __init__(self, path: Path, dtype: type[np.generic]) -> None:
        self.path, self.dtype, self.size = path, np.dtype(dtype), 0
        self._digest = hashlib.sha256()
        self._handle = open(path, "wb", buffering=0)
        self._handle.write(b"\0" * _HEADER)

    def append(self, values: np.ndarray) -> None:
        data = np.ascontiguousarray(values, dtype=self.dtype).view(np.uint8).data
        self._digest.update(data)
        while data.nbytes:
            data = data[self._handle.write(data) :]
        self.size += len(values)

    def finish(self) -> str:
        """Write the header, flush to the disk, and return the data's SHA-256."""
        self._handle.seek(0)
        np.lib.format.write_array_header_1_0(
            self._handle, {"descr": self.dtype.str, "fortran_order": False, "shape": (self.size,)}
        )
        assert self._handle.tell() == _HEADER
        os.fsync(self._handle.fileno())
        self.close()
        return self._digest.hexdigest()

    def close(self) -> None:
        self._handle.close()


class TableWriter:
    """The columns of a table under construction.

    Args:
        folder: where the files go.
        joined: whether the table has that column.
    """

    def __init__(self, folder: Path, *, joined: bool) -> None:
        names = [name for name in _COLUMNS if joined or name not in _OPTIONAL]
        self._columns = {name: _Column(folder / f"{name}.npy", _COLUMNS[name]) for name in names}
        self._columns["seq_ptr"].append(np.zeros(1, dtype=np.int64))

    @property
    def n_sequences(self) -> int:
        """Sequences written so far."""
        return self._columns["seq_ptr"].size - 1

    def append(self, seq_ends: np.ndarray, **columns: np.ndarray) -> None:
        """Append segments, and of each sequence that ends among them how many of these segments lie before its end."""
        self._columns["seq_ptr"].append(seq_ends + self._columns["length"].size)
        for name in self._columns.keys() - {"seq_ptr"}:
            self._columns[name].append(columns[name])

    def finish(self) -> dict[str, Any]:
        """Put the files on the disk; returns their sizes and checksums."""
        checksums = {name: column.finish() for name, column in self._columns.items()}
        return {"sizes": {name: column.size for name, column in self._columns.items()}, "sha256": checksums}

    def close(self) -> None:
        """Close the files, whatever is in them."""
        for column in self._columns.values():
            column.close()


@contextlib.contextmanager
def _one_builder(cache_dir: Path) -> Iterator[None]:
    """Hold a lock file, so that of the processes of one machine one builds and the others wait for it.

    What killed builders of this machine have left is removed: with the lock held, nobody writes it any more.
    """
    path = cache_dir / ".lock"
    with open(path, "ab") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            # Some network file systems have no locks. Two builders then build the same thing: harmless.
            logger.info("no lock on %s (%s): every process builds its own index", path, error.strerror)
        else:
            for left in cache_dir.glob(f".*{_unfinished()}"):
                shutil.rmtree(left, ignore_errors=True)
        yield


def _unfinished() -> str:
    """How the names of this machine's unfinished indices end."""
    return f".{sha256_hex(os.uname().nodename.encode())[:8]}.tmp"


def _remedy(folder: Path) -> str:
    return f"remove the folder {folder}; it is rebuilt"


def _open_column(folder: Path, name: str, size: int) -> np.ndarray:
    path = folder / f"{name}.npy"
    try:
        # An empty array cannot be memory-mapped.
        mode: Literal["r"] | None = "r" if size else None
        array: np.ndarray = np.load(path, mmap_mode=mode, allow_pickle=False)
        held = path.stat().st_size
    except (OSError, ValueError) as error:
        raise InputError(f"sequence index {path} cannot be read ({error}); {_remedy(folder)}") from error
    dtype = np.dtype(_COLUMNS[name])
    needed = _HEADER + size * dtype.itemsize
    if array.dtype != dtype or array.shape != (size,) or held != needed:
        raise InputError(
            f"sequence index {path} holds {array.dtype} {list(array.shape)} in {held} bytes, needed {dtype} "
            f"[{size}] in {needed}; {_remedy(folder)}"
        )
    return array


def _read_description(folder: Path) -> dict[str, Any]:
    """index.json, as it was written: it holds a checksum of itself."""
    path = folder / "index.json"
    description = read_json(path, "sequence index")
    needed = description.pop("checksum", None) if isinstance(description, dict) else None
    if needed is None or sha256_hex(canonical_json(description)) != needed:
        raise InputError(f"{path}: is not what was written with the index: it is damaged; {_remedy(folder)}")
    result: dict[str, Any] = description
    return result


def open_table(folder: Path, key: str) -> tuple[SegmentTable, dict[str, Any]]:
    """Map the table in `folder`: headers, sizes and ends are checked, the columns themselves are not read.

    Raises:
        InputError: another key or version, or a file that is missing, truncated or of another form.
    """
    description = _read_description(folder)
    remedy = _remedy(folder)
    for field, needed in (("key", key), ("version", INDEX_VERSION)):
        if description.get(field) != needed:
            raise InputError(f"{folder}/index.json: {field} is {description.get(field)}, needed {needed}; {remedy}")
    try:
        sizes = {name: int(size) for name, size in description["sizes"].items() if name in _COLUMNS}
        stratum_dataset = np.array(description["stratum_dataset"], dtype=np.int32)
        content = description["content"]
        segments = sizes["length"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder}/index.json: is not a description of an index ({error!r}); {remedy}") from error
    columns = {name: _open_column(folder, name, size) for name, size in sizes.items()}
    missing = [name for name in _COLUMNS if name not in columns and name not in _OPTIONAL]
    ragged = [name for name, size in sizes.items() if name != "seq_ptr" and size != segments]
    if missing or ragged or not sizes["seq_ptr"]:
        raise InputError(f"{folder}/index.json: sizes {sizes} are not those of a table; {remedy}")
    ends = columns["seq_ptr"]
    if int(ends[0]) != 0 or int(ends[-1]) != segments:
        raise InputError(
            f"sequence index {folder}/seq_ptr.npy runs from {ends[0]} to {ends[-1]}, needed 0 to {segments}; {remedy}"
        )
    return SegmentTable(**columns, stratum_dataset=stratum_dataset), content


def verify_table(folder: Path) -> dict[str, str]:
    """Read every byte of a table and compare with the checksums in its index.json; returns those, by column.

    Raises:
        InputError: a column is not what was built.
    """
    description = _read_description(folder)
    for name, needed in description["sha256"].items():
        path = folder / f"{name}.npy"
        digest = hashlib.sha256()
        try:
            with open(path, "rb") as handle:
                handle.seek(_HEADER)
                while block := handle.read(1 << 22):
                    digest.update(block)
        except OSError as error:
            raise InputError(f"sequence index {path} cannot be read ({error}); {_remedy(folder)}") from error
        if digest.hexdigest() != needed:
            raise InputError(
                f"sequence index {path}: SHA-256 of its data is {digest.hexdigest()}, needed {needed}: it is damaged; "
                f"{_remedy(folder)}"
            )
    checksums: dict[str, str] = description["sha256"]
    return checksums


Build = Callable[[TableWriter], tuple[list[int], dict[str, Any]]]
"""Fills a table; returns the dataset of each stratum, and the JSON-able content to be stored beside it."""


def cached_table(cache_dir: Path, key: str, build: Build, *, joined: bool = False) -> tuple[SegmentTable, Any]:
    """The segment table named `key`, memory-mapped, with the content stored beside it; built if not there.

    The folder `cache_dir/<key>` appears by one rename when it is complete, so a killed build leaves nothing to be
    taken for an index, and of two builders the later one throws its copy away.

    Args:
        cache_dir: folder of indices; made if needed.
        key: hash of everything the table is a function of.
        build: fills the table.
        joined: whether the table has the column `joined`.

    Raises:
        InputError: the folder cannot be written, or a stored index is damaged.
    """
    folder = cache_dir / key
    if not folder.is_dir():
        prepare_output_directory(cache_dir)
        with _one_builder(cache_dir):
            if not folder.is_dir():
                _write_table(cache_dir, folder, key, build, joined)
    return open_table(folder, key)


def _write_table(cache_dir: Path, folder: Path, key: str, build: Build, joined: bool) -> None:
    temporary = Path(tempfile.mkdtemp(dir=cache_dir, prefix=f".{key[:16]}.", suffix=_unfinished()))
    try:
        writer = TableWriter(temporary, joined=joined)
        with contextlib.closing(writer):
            stratum_dataset, content = build(writer)
            files = writer.finish()
        description = {
            "version": INDEX_VERSION, "key": key, **files, "stratum_dataset": stratum_dataset, "content": content,
        }  # fmt: skip
        write_json(temporary / "index.json", {**description, "checksum": sha256_hex(canonical_json(description))})
        fsync_path(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        try:
            temporary.rename(folder)
        except OSError:
            # Another machine's builder was first: its folder is the same, so ours is not needed.
            if not folder.is_dir():
                raise
        fsync_path(cache_dir)
    except OSError as error:
        raise InputError(
            f"cannot write the sequence index {folder}: {error.strerror or error}; name a data.cache_dir with room"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
