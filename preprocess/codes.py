"""Codes of samples: found, read, checked against the codebooks and turned into ids."""

from __future__ import annotations

import itertools
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_speech.errors import InputError
from megatron_speech.files import sha256_hex
from megatron_speech.token_space import TokenSpace
from preprocess.readers.base import RowRejected
from preprocess.samples import CodesAt

_OPEN_FILES = 128


@dataclass(frozen=True)
class EncodedCodes:
    """A sample's codes as ids, int32 [frames * codebooks], and the checksum of the codes."""

    ids: np.ndarray
    frames: int
    checksum: str


def code_checksum(codes: np.ndarray) -> str:
    """SHA-256 of a code array [frames, codebooks] as little-endian int32, row by row."""
    return sha256_hex(np.ascontiguousarray(codes, dtype="<i4").tobytes())


class CodesLoader:
    """Reads code arrays. A file of many samples' codes is mapped once and kept open."""

    def __init__(self, space: TokenSpace) -> None:
        self.space = space
        self._mapped: OrderedDict[str, np.ndarray] = OrderedDict()

    def encode(self, places: Sequence[CodesAt]) -> list[EncodedCodes | RowRejected]:
        """Ids of each sample's codes, or why there are none. The range check and the encoding are done at once."""
        results: list[np.ndarray | RowRejected] = []
        for place in places:
            try:
                results.append(self._load(place))
            except RowRejected as error:
                results.append(error)
        good = [codes for codes in results if isinstance(codes, np.ndarray)]
        try:
            flat = self.space.encode_codes(np.concatenate(good)) if good else np.zeros(0, np.int32)
        except InputError:  # one of them is outside: find out which
            return [self._encode_one(place, codes) for place, codes in zip(places, results, strict=True)]
        edges = np.cumsum([0, *(codes.size for codes in good)])
        pieces = iter([flat[a:b] for a, b in itertools.pairwise(edges)])
        return [
            codes if isinstance(codes, RowRejected) else _finish(place, codes, next(pieces))
            for place, codes in zip(places, results, strict=True)
        ]

    def _encode_one(self, place: CodesAt, codes: np.ndarray | RowRejected) -> EncodedCodes | RowRejected:
        if isinstance(codes, RowRejected):
            return codes
        try:
            return _finish(place, codes, self.space.encode_codes(codes))
        except InputError as error:
            return RowRejected("code_outside_codebook", str(error))

    def _load(self, place: CodesAt) -> np.ndarray:
        """Integer codes [frames, codebooks], at least one frame."""
        if place.path is None:
            codes = self._inline(place.inline)
        elif place.offset is None:
            codes = _read_npy(place.path, mapped=False)
        else:
            codes = self._slice(place)
        where = "field codes" if place.path is None else place.path
        if codes.ndim == 1 and self.space.codebook_count == 1:
            codes = codes[:, None]
        count = self.space.codebook_count
        if codes.ndim != 2 or codes.shape[1] != count or not np.issubdtype(codes.dtype, np.integer):
            raise RowRejected(
                "codes_shape",
                f"{where} holds {codes.dtype} of shape {list(codes.shape)}, needed integers [frames, {count}]",
            )
        if not len(codes):
            raise RowRejected("codes_empty", f"{where} holds no frames")
        if place.length is not None and len(codes) != place.length:
            raise RowRejected("codes_length", f"{where} holds {len(codes)} frames, but code_len is {place.length}")
        return codes

    def _inline(self, value: Any) -> np.ndarray:
        try:
            codes = np.asarray(value)
        except ValueError as error:  # rows of unequal length
            raise RowRejected("codes_shape", "field codes is no grid: its frames differ in length") from error
        if not codes.size:
            raise RowRejected("codes_empty", "field codes holds no frames")
        return codes

    def _slice(self, place: CodesAt) -> np.ndarray:
        assert place.path is not None and place.offset is not None and place.length is not None
        whole = self._mapped.get(place.path)
        if whole is None:
            whole = self._mapped[place.path] = _read_npy(place.path, mapped=True)
            if len(self._mapped) > _OPEN_FILES:
                self._mapped.popitem(last=False)
        else:
            self._mapped.move_to_end(place.path)
        end = place.offset + place.length
        if whole.ndim == 0 or end > len(whole):
            raise RowRejected(
                "codes_length",
                f"{place.path} holds {whole.shape[0] if whole.ndim else 0} frames, needed {place.offset} to {end}",
            )
        return whole[place.offset : end]


def _read_npy(path: str, *, mapped: bool) -> np.ndarray:
    try:
        # asarray: slicing an ndarray is several times faster than slicing a memmap
        return np.asarray(np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False))
    except FileNotFoundError as error:
        raise RowRejected("codes_missing", f"{path} does not exist") from error
    except (OSError, ValueError, EOFError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise RowRejected("codes_unreadable", f"{path} is not a readable .npy file: {reason}") from error


def _finish(place: CodesAt, codes: np.ndarray, ids: np.ndarray) -> EncodedCodes | RowRejected:
    checksum = code_checksum(codes)
    if place.checksum is not None and place.checksum != checksum:
        return RowRejected(
            "checksum",
            f"{place.path or 'field codes'}: checksum of the codes is {checksum}, but the row says {place.checksum}",
        )
    return EncodedCodes(ids, len(codes), checksum)
