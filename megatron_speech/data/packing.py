"""Packing: from an order of documents to sequences of `seq_length` tokens, as a memory-mapped segment table.

A segment is a run of tokens of one document inside one sequence. Sequence i holds segments
seq_ptr[i]:seq_ptr[i+1], end to end from its first token on; what is left of it is padding. The table is built once
per content: its folder is named by a hash of everything that it is a function of, written whole and renamed.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_speech.data.order import Order
from megatron_speech.data.packing_kernels import pack_cut, pack_fit
from megatron_speech.errors import InputError
from megatron_speech.files import fsync_path, prepare_output_directory, read_json, write_json

logger = logging.getLogger(__name__)

# Part of every cache key: raise it whenever the same inputs give another table.
INDEX_VERSION = 1

_COLUMNS: dict[str, type[np.generic]] = {
    "seq_ptr": np.int64,
    "stratum": np.int32,
    "dataset": np.int32,
    "document": np.int32,
    "start": np.int32,
    "length": np.int32,
}


@dataclass(frozen=True)
class SegmentTable:
    """Where every token of every sequence comes from.

    seq_ptr: int64 [sequences + 1]; the others int32 [segments]: stratum and dataset by index, document in its
    dataset, first token of the segment in its document, number of tokens.
    """

    seq_ptr: np.ndarray
    stratum: np.ndarray
    dataset: np.ndarray
    document: np.ndarray
    start: np.ndarray
    length: np.ndarray

    @property
    def n_sequences(self) -> int:
        """Number of sequences."""
        return len(self.seq_ptr) - 1

    def first(self, n_sequences: int) -> SegmentTable:
        """The table of the first `n_sequences` sequences (all of them if there are fewer)."""
        seq_ptr = self.seq_ptr[: n_sequences + 1]
        end = int(seq_ptr[-1])
        columns = (self.stratum, self.dataset, self.document, self.start, self.length)
        return SegmentTable(seq_ptr, *(column[:end] for column in columns))


def pack(
    order: Order,
    stratum_dataset: np.ndarray,
    lengths: np.ndarray,
    *,
    mode: Literal["cut", "fit"],
    seq_length: int,
    open_sequences: int,
) -> SegmentTable:
    """Lay an order of documents into sequences.

    Args:
        order: the documents; in fit mode none longer than `seq_length` (the blend has left those out).
        stratum_dataset: int [strata], the dataset of each stratum.
        lengths: int32 [documents of the order], tokens.
        mode: "cut" (documents run on over the edges, no padding but at the very end) or "fit" (never cut).
        seq_length: tokens of a sequence.
        open_sequences: look-ahead of the fit.

    Raises:
        ValueError: a document that does not fit: the caller's mistake.
    """
    if mode == "cut":
        packed = pack_cut(lengths, seq_length)
    else:
        packed, oversize = pack_fit(lengths, seq_length, open_bins=open_sequences)
        if len(oversize):
            raise ValueError(f"{len(oversize)} documents of the order are longer than {seq_length} tokens")
    stratum = order.stratum[packed.position]
    return SegmentTable(
        seq_ptr=packed.seq_ptr,
        stratum=stratum,
        dataset=np.asarray(stratum_dataset, dtype=np.int32)[stratum],
        document=order.document[packed.position],
        start=packed.start,
        length=packed.length,
    )


# ---- the cache


@contextlib.contextmanager
def _one_builder(path: Path) -> Iterator[None]:
    """Hold a lock file, so that of the processes of one machine one builds and the others wait for it."""
    with open(path, "ab") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            # Some network file systems have no locks. Two builders then build the same thing: harmless.
            logger.info("no lock on %s (%s): every process builds its own index", path, error.strerror)
        yield


def _open_table(folder: Path, key: str) -> tuple[SegmentTable, dict[str, Any]]:
    description = read_json(folder / "index.json", "sequence index")
    remedy = f"remove the folder {folder}; it is built anew"
    if description.get("key") != key:
        raise InputError(f"{folder}/index.json: key is {description.get('key')}, needed {key}; {remedy}")
    arrays = {}
    for name, dtype in _COLUMNS.items():
        path = folder / f"{name}.npy"
        try:
            # An empty array cannot be memory-mapped.
            mode: Literal["r"] | None = "r" if description["sizes"][name] else None
            array = np.load(path, mmap_mode=mode, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(f"sequence index {path} cannot be read ({error}); {remedy}") from error
        if array.dtype != dtype or array.shape != (description["sizes"][name],):
            raise InputError(
                f"sequence index {path} holds {array.dtype} {list(array.shape)}, needed {np.dtype(dtype)} "
                f"[{description['sizes'][name]}]; {remedy}"
            )
        arrays[name] = array
    return SegmentTable(**arrays), description["content"]


def cached_table(
    cache_dir: Path, key: str, build: Callable[[], tuple[SegmentTable, dict[str, Any]]]
) -> tuple[SegmentTable, dict[str, Any]]:
    """The segment table named `key`, memory-mapped, with the JSON content stored beside it; built if not there.

    The folder `cache_dir/<key>` appears by one rename when it is complete, so a killed build leaves nothing to be
    taken for an index, and of two builders the later one throws its copy away.

    Args:
        cache_dir: folder of indices; made if needed.
        key: hash of everything the table is a function of.
        build: makes the table and the JSON-able content.

    Raises:
        InputError: the folder cannot be written, or a stored index is damaged.
    """
    folder = cache_dir / key
    if not folder.is_dir():
        prepare_output_directory(cache_dir)
        with _one_builder(cache_dir / ".lock"):
            if not folder.is_dir():
                _write_table(cache_dir, folder, key, build)
    return _open_table(folder, key)


def _write_table(
    cache_dir: Path, folder: Path, key: str, build: Callable[[], tuple[SegmentTable, dict[str, Any]]]
) -> None:
    table, content = build()
    temporary = Path(tempfile.mkdtemp(dir=cache_dir, prefix=f".{key[:16]}.", suffix=".tmp"))
    try:
        sizes = {}
        for name, dtype in _COLUMNS.items():
            array = np.ascontiguousarray(getattr(table, name), dtype=dtype)
            sizes[name] = len(array)
            with open(temporary / f"{name}.npy", "wb") as handle:
                np.save(handle, array, allow_pickle=False)
                handle.flush()
                os.fsync(handle.fileno())
        write_json(temporary / "index.json", {"key": key, "sizes": sizes, "content": content})
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
