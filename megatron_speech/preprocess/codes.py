"""Codes of samples: found, read, checked against the codebooks and turned into ids, a batch at a time."""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import orjson

from megatron_speech.errors import InputError
from megatron_speech.preprocess.readers import source
from megatron_speech.preprocess.readers.base import RowRejected
from megatron_speech.preprocess.readers.recognise import other_spelling, why_missing
from megatron_speech.preprocess.samples import CodesAt
from megatron_speech.tokens.space import TokenSpace

_OPEN_FILES = 128
_KNOWN_HEADERS = 4096
_NPY_MAGIC = b"\x93NUMPY"


@dataclass
class EncodedCodes:
    """Codes of several samples; one that has none is in `rejected` with its index.

    Attributes:
        ids: of each sample, int32 [frames * codebooks]; None for a rejected one.
        frames: of each sample; 0 for a rejected one.
        checksums: SHA-256 of each sample's codes [frames, codebooks] as little-endian int32, row by row.
        rejected: why there are none.
    """

    ids: list[np.ndarray | None]
    frames: list[int]
    checksums: list[str | None]
    rejected: dict[int, RowRejected] = field(default_factory=dict)


class _Header(NamedTuple):
    """The header of a `.npy` file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    order: Literal["C", "F"]


class CodesLoader:
    """Reads code arrays. A file of many samples' codes is mapped once and kept open."""

    def __init__(self, space: TokenSpace) -> None:
        self.space = space
        self._count = space.codebook_count
        self._sizes = np.array([book.size for book in space.codebooks], dtype=np.int64)
        self._mapped: OrderedDict[str, np.ndarray] = OrderedDict()
        self._headers: dict[bytes, _Header | None] = {}

    def encode(self, places: Sequence[CodesAt]) -> EncodedCodes:
        """Ids of each sample's codes, or why there are none. Checks, ids and checksums are made of all at once."""
        count = len(places)
        result = EncodedCodes([None] * count, [0] * count, [None] * count)
        good: list[int] = []
        arrays: list[np.ndarray] = []
        for i, place in enumerate(places):
            try:
                arrays.append(self._load(place))
                good.append(i)
            except RowRejected as error:
                result.rejected[i] = error
        if not arrays:
            return result
        # Arrays of different types are joined in one that holds them all, but not in a float (int64 with uint64).
        kinds = {codes.dtype for codes in arrays}
        if len(kinds) > 1 and not np.issubdtype(np.result_type(*kinds), np.integer):
            limit = np.uint64(2**62)  # beyond any codebook
            arrays = [
                np.minimum(codes, limit).astype(np.int64) if codes.dtype == np.uint64 else codes for codes in arrays
            ]
        flat = np.concatenate(arrays)
        edges = np.cumsum([0, *map(len, arrays)]).tolist()
        for i in self._outside(flat, edges):
            result.rejected[good[i]] = self._why_outside(arrays[i])
        plain = np.ascontiguousarray(flat, dtype="<i4")
        ids = self.space.place_codes(plain)
        view, width = plain.data.cast("B"), 4 * self._count
        for i, (begin, end) in zip(good, itertools.pairwise(edges), strict=True):
            if i in result.rejected:
                continue
            checksum = hashlib.sha256(view[begin * width : end * width]).hexdigest()
            place = places[i]
            if place.checksum is not None and place.checksum != checksum:
                where = place.path or "field codes"
                reason = f"{where}: checksum of the codes is {checksum}, but the row says {place.checksum}"
                result.rejected[i] = RowRejected("checksum", reason)
                continue
            result.ids[i] = ids[begin * self._count : end * self._count]
            result.frames[i] = end - begin
            result.checksums[i] = checksum
        return result

    def _outside(self, flat: np.ndarray, edges: list[int]) -> list[int]:
        """Samples with a code outside its codebook."""
        if self._count == 1:  # the usual case, without the overhead of columns
            outside = flat.min() < 0 or flat.max() >= self._sizes[0]
        else:
            outside = bool(((flat.min(axis=0) < 0) | (flat.max(axis=0) >= self._sizes)).any())
        if not outside:
            return []
        bad = ((flat < 0) | (flat >= self._sizes)).any(axis=1)
        return np.flatnonzero(np.logical_or.reduceat(bad, edges[:-1])).tolist()

    def _why_outside(self, codes: np.ndarray) -> RowRejected:
        try:
            self.space.encode_codes(codes)
        except InputError as error:
            return RowRejected("code_outside_codebook", str(error))
        raise AssertionError("the token space takes codes that are outside its codebooks")

    def _load(self, place: CodesAt) -> np.ndarray:
        """Integer codes [frames, codebooks], at least one frame."""
        if place.path is None:
            codes = self._grid(self._framed(self._inline(place.inline), place), "field codes")
        elif place.offset is None:
            codes = self._grid(self._framed(self._read(place.path), place), place.path)
        else:
            codes = self._slice(place)
        if not len(codes):
            raise RowRejected("codes_empty", f"{place.path or 'field codes'} holds no frames")
        if place.length is not None and len(codes) != place.length:
            where = place.path or "field codes"
            raise RowRejected("codes_length", f"{where} holds {len(codes)} frames, but code_len is {place.length}")
        return codes

    def _framed(self, codes: np.ndarray, place: CodesAt) -> np.ndarray:
        """Codes of several codebooks that are one run, frame by frame, as [code_len, codebooks]."""
        if codes.ndim == 1 and self._count > 1 and place.length and len(codes) == place.length * self._count:
            return codes.reshape(place.length, self._count)
        return codes

    def _grid(self, codes: np.ndarray, where: str) -> np.ndarray:
        """Codes as [frames, codebooks]."""
        count = self._count
        if codes.ndim == 1 and count == 1:
            codes = codes[:, None]
        if codes.ndim != 2 or codes.shape[1] != count or codes.dtype.kind not in "iu":
            remedy = ""
            if codes.ndim == 1 and codes.dtype.kind in "iu":
                remedy = "; codes of all codebooks in one run, frame by frame, need code_len (frames) beside them"
            elif codes.ndim == 2 and codes.shape[0] == count:
                remedy = "; it is [codebooks, frames]: transpose it"
            raise RowRejected(
                "codes_shape",
                f"{where} holds {codes.dtype} of shape {list(codes.shape)}, needed integers [frames, {count}]{remedy}",
            )
        return codes

    def _inline(self, value: Any) -> np.ndarray:
        if isinstance(value, str):
            value = _numbers(value)
        try:
            codes = np.asarray(value)
        except ValueError as error:  # rows of unequal length
            raise RowRejected("codes_shape", "field codes is no grid: its frames differ in length") from error
        if not codes.size:
            raise RowRejected("codes_empty", "field codes holds no frames")
        return codes

    def _slice(self, place: CodesAt) -> np.ndarray:
        path, begin, length = place.path, place.offset, place.length
        assert path is not None and begin is not None and length is not None
        whole = self._mapped.get(path)
        if whole is None:
            whole = self._mapped[path] = self._grid(_read_npy(path, mapped=True), path)
            if len(self._mapped) > _OPEN_FILES:
                self._mapped.popitem(last=False)
        elif len(self._mapped) > 1:
            self._mapped.move_to_end(path)
        end = begin + length
        if end > len(whole):
            raise RowRejected("codes_length", f"{path} holds {len(whole)} frames, needed {begin} to {end}")
        return whole[begin:end]

    def _read(self, path: str) -> np.ndarray:
        """A small `.npy` file: read in one go, its header parsed once for all files with the same one."""
        if "://" in path:
            return _read_npy(path, mapped=False)
        try:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                data = os.read(descriptor, os.fstat(descriptor).st_size)
            finally:
                os.close(descriptor)
        except OSError:
            return _read_npy(path, mapped=False)  # raises what is wrong
        if data[:8] != _NPY_MAGIC + b"\x01\x00":
            return _read_npy(path, mapped=False)
        begin = 10 + int.from_bytes(data[8:10], "little")
        key = data[:begin]
        if key not in self._headers:
            if len(self._headers) > _KNOWN_HEADERS:
                self._headers.clear()
            self._headers[key] = _parse_header(key)
        header = self._headers[key]
        if header is None or len(data) != begin + header.dtype.itemsize * math.prod(header.shape):
            return _read_npy(path, mapped=False)
        return np.frombuffer(data, header.dtype, offset=begin).reshape(header.shape, order=header.order)


def _numbers(text: str) -> list[Any]:
    """The numbers of a text: `12 5 99`, `12,5,99`, or a list as JSON has it, `[[12, 5], [99, 1]]`."""
    try:
        if text.lstrip()[:1] == "[":
            numbers = orjson.loads(text)
        else:
            numbers = orjson.loads(f"[{','.join(text.replace(',', ' ').split())}]")
    except ValueError as error:
        found = text if len(text) <= 40 else text[:37] + "..."
        needed = "needed numbers with blanks or commas between them"
        raise RowRejected("codes_shape", f"field codes is the text {found!r}, {needed}") from error
    return numbers


def _parse_header(data: bytes) -> _Header | None:
    """The header of a plain array; None for any other, which `np.load` has to look at."""
    handle = io.BytesIO(data)
    try:
        np.lib.format.read_magic(handle)
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(handle)
    except ValueError:
        return None
    return None if dtype.hasobject or not shape else _Header(dtype, shape, "F" if fortran_order else "C")


def _read_npy(path: str, *, mapped: bool) -> np.ndarray:
    try:
        local = source.local_path(path)
        if local is None:
            with source.open_binary(path) as handle:
                array = np.load(io.BytesIO(handle.read()), allow_pickle=False)
        else:
            array = np.load(local, mmap_mode="r" if mapped else None, allow_pickle=False)
    except InputError as error:  # a remote file: already a sentence
        missing = isinstance(error.__cause__, FileNotFoundError)
        raise RowRejected("codes_missing" if missing else "codes_unreadable", str(error)) from error
    except FileNotFoundError as error:
        spelled = other_spelling(path)
        if spelled is not None:
            return _read_npy(spelled, mapped=mapped)
        raise RowRejected("codes_missing", f"{path} does not exist{why_missing(path)}") from error
    except (OSError, ValueError, EOFError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else source.what_is(path)
        raise RowRejected("codes_unreadable", f"{path} is not a readable .npy file: {reason or error}") from error
    if not isinstance(array, np.ndarray):  # np.load opens a zip archive of arrays, too
        reason = source.what_is(path)
        array.close()
        raise RowRejected("codes_unreadable", f"{path} is not a readable .npy file: {reason}")
    # asarray: slicing an ndarray is several times faster than slicing a memmap
    return np.asarray(array)
