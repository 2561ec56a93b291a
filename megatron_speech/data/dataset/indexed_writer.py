"""Bytes of `.bin` and `.idx`, as :mod:`megatron_speech.data.dataset.indexed` describes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from megatron_speech.data.dataset.indexed import CODE_OF_DTYPE, DTYPE_CODES, HEADER, MAGIC, VERSION
from megatron_speech.errors import InputError

_CHUNK = 1 << 20  # documents at a time: 80 M of them are 1.6 GB of index


def disk_dtype(dtype: Any) -> np.dtype:
    """`dtype` as it lies in `.bin`: little endian.

    Raises:
        InputError: megatron-core's format has no such dtype.
    """
    found = np.dtype(dtype).newbyteorder("<")
    if found not in CODE_OF_DTYPE:
        names = ", ".join(str(known) for known in DTYPE_CODES.values())
        raise InputError(f"dtype {found} cannot be stored in an .idx; needed: one of {names}")
    return found


def ids_on_disk(flat: np.ndarray, lengths: np.ndarray, dtype: np.dtype) -> memoryview:
    """The bytes of documents given end to end.

    Args:
        flat: ids [sum of lengths], any integer dtype whose values fit `dtype`.
        lengths: ids per document, int [documents]; 0 is a length.
        dtype: of :func:`disk_dtype`.

    Raises:
        ValueError: lengths that do not add up to `flat`, or an id that does not fit the dtype on disk.
    """
    flat, lengths = np.asarray(flat), np.asarray(lengths)
    if flat.ndim != 1 or lengths.ndim != 1 or (lengths < 0).any() or int(lengths.sum(dtype=np.int64)) != len(flat):
        raise ValueError(f"lengths {lengths.shape} do not cut ids of shape {flat.shape} into documents")
    if flat.dtype != dtype and flat.size and dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if flat.min() < limits.min or flat.max() > limits.max:
            raise ValueError(f"ids {flat.min()}..{flat.max()} do not fit {dtype}")
    return np.ascontiguousarray(flat, dtype=dtype).view(np.uint8).data


def write_index(write: Callable[[bytes], Any], dtype: np.dtype, lengths: np.ndarray) -> None:
    """Write a whole `.idx`, one sequence per document.

    Args:
        write: takes the bytes, in order.
        dtype: of the ids.
        lengths: int32 [documents], ids per document; read twice, a chunk at a time, so it may be a mapped file.
    """
    documents = len(lengths)
    chunks = range(0, documents, _CHUNK)
    write(HEADER.pack(MAGIC, VERSION, CODE_OF_DTYPE[dtype], documents, documents + 1))
    for start in chunks:
        write(lengths[start : start + _CHUNK].astype("<i4").tobytes())
    position = 0
    for start in chunks:
        ends = position + np.cumsum(lengths[start : start + _CHUNK], dtype=np.int64) * dtype.itemsize
        write(np.concatenate([[position], ends[:-1]]).astype("<i8").tobytes())
        position = int(ends[-1])
    for start in range(0, documents + 1, _CHUNK):
        write(np.arange(start, min(start + _CHUNK, documents + 1), dtype="<i8").tobytes())
