"""The indexed dataset on disk: megatron-core's `.bin` and `.idx`, with a manifest and a documents table beside them.

    P.bin            every document's ids, end to end, little endian, uint16 or int32
    P.idx            where each document lies in P.bin (layout below)
    P.docs.parquet   one row per document: speaker, language, source, tokens
    P.manifest.json  what the dataset is, with the size and SHA-256 of the other three; written last

`.idx`, little endian, as megatron-core 0.16 reads and writes it (`megatron/core/datasets/indexed_dataset.py`):

    9 bytes   "MMIDIDX\\0\\0"
    u64       version, 1
    u8        dtype code of the ids
    u64       S, number of sequences
    u64       D + 1, number of document boundaries
    int32 [S] length of each sequence, in ids
    int64 [S] byte offset of each sequence in .bin
    int64 [D + 1] sequence index at which each document starts, and S
    int8  [S] modes (optional; other projects' multimodal data)

This project writes one sequence per document, since upstream's splits are made by sequence.

A document is a grid of T steps x K streams. Its ids lie step by step, the K ids of a step side by side, and K stands in
the manifest (`streams`). The files count ids, as upstream's reader does: lengths in `.idx` and `tokens` and
`target_tokens` of the documents table are T·K. From :attr:`TokenDataset.lengths` on, everything counts steps: strata,
budgets, packing, segments, batches. With K = 1 the two are the same.
"""

from __future__ import annotations

import functools
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_speech.data.dataset.documents_table import read_documents_table
from megatron_speech.data.dataset.manifest import Manifest, read_manifest
from megatron_speech.errors import InputError
from megatron_speech.tokens.space import TokenSpace

if TYPE_CHECKING:
    import pyarrow as pa


MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document boundaries: 34 bytes

DTYPE_CODES: dict[int, np.dtype] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
CODE_OF_DTYPE = {dtype: code for code, dtype in DTYPE_CODES.items()}

REMAKE = "recreate the dataset with preprocess/preprocess_data.py"

_INDEX_CHUNK = 1 << 20


def file_of(prefix: str | os.PathLike[str], suffix: str) -> Path:
    """`P` + `.bin`: the prefix may itself hold dots, so it is never split."""
    return Path(f"{os.fspath(prefix)}{suffix}")


@dataclass(frozen=True)
class TokenIndex:
    """Views into a memory-mapped `.idx`."""

    dtype: np.dtype
    lengths: np.ndarray  # int32 [S]
    pointers: np.ndarray  # int64 [S], bytes
    documents: np.ndarray  # int64 [D + 1], sequence indices


def read_index(path: Path) -> TokenIndex:
    """Map an `.idx` and check its header and size; the arrays themselves are not read.

    Raises:
        InputError: missing, truncated, or not an index of this format.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as handle:
            header = handle.read(HEADER.size)
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; check the dataset prefix, or {REMAKE}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    if header[:9] != MAGIC[: len(header)] or not header:
        raise InputError(f"{path}: magic is {header[:9]!r}, needed {MAGIC!r}: not an .idx of megatron-core; {REMAKE}")
    if len(header) < HEADER.size:
        raise InputError(f"{path}: holds {size} bytes, needed a header of {HEADER.size}: it is truncated; {REMAKE}")
    _, version, code, sequences, boundaries = HEADER.unpack(header)
    if version != VERSION:
        raise InputError(f"{path}: version is {version}, needed {VERSION}; {REMAKE}")
    if code not in DTYPE_CODES:
        raise InputError(
            f"{path}: dtype code is {code}, needed one of "
            f"{', '.join(f'{number} ({dtype})' for number, dtype in DTYPE_CODES.items())}; {REMAKE}"
        )
    needed = HEADER.size + 12 * sequences + 8 * boundaries
    if size not in (needed, needed + sequences):  # the latter with modes
        state = "truncated" if size < needed else "longer than its header says"
        raise InputError(
            f"{path}: holds {size:,} bytes, needed {needed:,} for {sequences:,} sequences and {boundaries:,} document "
            f"boundaries: it is {state}; {REMAKE}"
        )
    if boundaries < 1:
        raise InputError(f"{path}: holds 0 document boundaries, needed at least 1; {REMAKE}")
    buffer = np.memmap(path, dtype=np.uint8, mode="r")
    at_pointers = HEADER.size + 4 * sequences
    at_documents = at_pointers + 8 * sequences
    return TokenIndex(
        dtype=DTYPE_CODES[code],
        lengths=np.frombuffer(buffer, "<i4", sequences, HEADER.size),
        pointers=np.frombuffer(buffer, "<i8", sequences, at_pointers),
        documents=np.frombuffer(buffer, "<i8", boundaries, at_documents),
    )


class TokenDataset:
    """A dataset of token documents, memory-mapped. Opening it reads a few hundred bytes, however large it is.

    Args:
        prefix: P of `P.bin`, `P.idx`, `P.manifest.json`, `P.docs.parquet`.
        require_manifest: refuse a dataset without a manifest, such as one that upstream's builder made. Without
            one there is no documents table either, and it is not known which token space the ids belong to.

    Attributes:
        streams: K, ids per step; 1 without a manifest.
        lengths: int32 [documents], steps per document; of one stream, with a manifest, a read-only view of the mapped
            file.
        id_counts: int32 [documents], ids per document: `lengths` times `streams`, as `.idx` has them.
        pointers: int64 [documents], byte offset of each document in `.bin`; likewise.
        dtype: dtype of the ids on disk.
        manifest: the manifest, or None.

    Raises:
        InputError: a file is missing, truncated, of another format, or disagrees with another one.
    """

    def __init__(self, prefix: str | os.PathLike[str], *, require_manifest: bool = True) -> None:
        self.prefix = os.fspath(prefix)
        self.manifest: Manifest | None = None
        manifest_path = file_of(prefix, ".manifest.json")
        if require_manifest or manifest_path.exists():
            self.manifest = _find_manifest(self.prefix, manifest_path)
        index = read_index(self.file(".idx"))
        self._index = index
        self.dtype = index.dtype
        if self.manifest is not None:  # one sequence per document: nothing to compute, nothing to read
            self.id_counts, self.pointers = index.lengths, index.pointers
        else:
            self.id_counts, self.pointers = _document_index(index, file_of(prefix, ".idx"))
        self._check_bin()
        self.streams = 1 if self.manifest is None else self.manifest.streams
        self.lengths = self.id_counts if self.streams == 1 else self._count_steps()
        if self.manifest is not None:
            self._check_manifest(self.manifest, index)

    def file(self, suffix: str) -> Path:
        """Where the file of this suffix lies."""
        return file_of(self.prefix, suffix)

    def _check_bin(self) -> None:
        path = self.file(".bin")
        try:
            size = path.stat().st_size
        except FileNotFoundError as error:
            raise InputError(f"{path} does not exist, though its .idx does; restore it, or {REMAKE}") from error
        needed = 0
        if len(self.id_counts):
            needed = int(self.pointers[-1]) + int(self.id_counts[-1]) * self.dtype.itemsize
        if size != needed:
            state = "truncated" if size < needed else "longer than its index says"
            raise InputError(
                f"{path}: holds {size:,} bytes, needed {needed:,} by {Path(self.prefix).name}.idx: it is {state}; "
                f"{REMAKE}"
            )
        self.total_tokens = size // self.dtype.itemsize

    def _count_steps(self) -> np.ndarray:
        steps, left = np.divmod(self.id_counts, np.int32(self.streams))
        if left.any():
            first = int(np.argmax(left != 0))
            raise InputError(
                f"{file_of(self.prefix, '.idx')}: document {first} has {int(self.id_counts[first])} ids, which are no "
                f"whole steps of the {self.streams} streams that its manifest states: the files do not belong "
                f"together; {REMAKE}"
            )
        return steps

    def _check_manifest(self, manifest: Manifest, index: TokenIndex) -> None:
        path = file_of(self.prefix, ".manifest.json")
        for suffix in (".bin", ".idx", ".docs.parquet"):
            if suffix not in manifest.files:
                raise InputError(f"manifest {path}: field files names no {suffix}; {REMAKE}")
        for field, found, needed in (
            ("documents", len(self), manifest.documents),
            ("document boundaries", len(index.documents), manifest.documents + 1),
            ("tokens", self.total_tokens, manifest.tokens),
            ("dtype", self.dtype.name, manifest.dtype),
        ):
            if found != needed:
                raise InputError(
                    f"{file_of(self.prefix, '.idx')}: {field} is {found}, but {path} says {needed}: the files do not "
                    f"belong together; {REMAKE}"
                )
        for suffix, entry in manifest.files.items():
            if suffix == ".rejected.jsonl":
                continue  # nothing that trains reads it; `inspect --verify` does
            file = self.file(suffix)
            try:
                size = file.stat().st_size
            except FileNotFoundError as error:
                raise InputError(f"{file} does not exist, but {path} names it; restore it, or {REMAKE}") from error
            if size != entry.bytes:
                raise InputError(f"{file}: holds {size:,} bytes, needed {entry.bytes:,} by {path}; {REMAKE}")

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process maps the files itself: the arrays do not travel.
        return _open, (self.prefix, self.manifest is not None)

    def __len__(self) -> int:
        return len(self.lengths)

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """All ids end to end, [total_tokens], memory-mapped, read-only."""
        path = file_of(self.prefix, ".bin")
        if not self.total_tokens:
            return np.zeros(0, self.dtype)
        return np.memmap(path, dtype=self.dtype, mode="r")

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """int64 [documents]: index of each document's first id in :attr:`tokens`. Computed once, 8 bytes a document."""
        return self.pointers // self.dtype.itemsize

    def document(self, i: int, start: int = 0, length: int | None = None) -> np.ndarray:
        """A copy of steps `start` to `start + length` (by default to the end) of document `i`, in the on-disk dtype.

        Returns:
            [length] for one stream, else [length, streams].

        Raises:
            IndexError: no such document, or a range outside it.
        """
        begin, size = self._range(i, start, length)
        first = begin // self.dtype.itemsize
        ids = np.array(self.tokens[first : first + size // self.dtype.itemsize])
        return ids if self.streams == 1 else ids.reshape(-1, self.streams)

    def _range(self, i: int, start: int, length: int | None) -> tuple[int, int]:
        """(first byte, bytes) of steps of a document."""
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)} in {self.prefix}")
        whole = int(self.lengths[i])
        length = whole - start if length is None else length
        if start < 0 or length < 0 or start + length > whole:
            raise IndexError(f"steps {start} to {start + length} of document {i}, which has {whole}, in {self.prefix}")
        step = self.streams * self.dtype.itemsize
        return int(self.pointers[i]) + start * step, length * step

    def read_bin(self, begin: int, size: int) -> bytes:
        """The bytes `begin` … `begin + size - 1` of `.bin`, fewer at its end.

        Raises:
            InputError: the file cannot be read.
        """
        path = self.file(".bin")
        try:
            with open(path, "rb") as handle:
                handle.seek(begin)
                return handle.read(size)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}; check the path and its rights") from error

    def columns(self, *names: str) -> pa.Table:
        """These columns of the documents table, one row per document; all of them if none is named.

        Raises:
            InputError: no documents table, a damaged one, no such column, or another number of rows.
        """
        return read_documents_table(file_of(self.prefix, ".docs.parquet"), names, rows=len(self))

    def check(self, space: TokenSpace) -> None:
        """Refuse a dataset that was not made with `space`.

        Raises:
            InputError: another number of streams, token-space hash or codec hash, or no manifest to check against.
        """
        if self.manifest is None:
            raise InputError(f"dataset {self.prefix} has no manifest, which names its token space; {REMAKE}")
        path = file_of(self.prefix, ".manifest.json")
        if self.streams != space.streams:
            raise InputError(
                f"{path}: streams is {self.streams}, but the token space has {space.streams}; ids of {self.streams} "
                f"stream(s) cannot be read as {space.streams}: use the token space that the dataset was made with"
            )
        # The codec before the hash: it is the more telling of the two, and is part of the other.
        if self.manifest.codec.hash != space.codec.hash:
            raise InputError(
                f"{path}: codec hash is {self.manifest.codec.hash} ({self.manifest.codec.name}), needed "
                f"{space.codec.hash} ({space.codec.name}) of the token space; codes of two codecs cannot be mixed: "
                "encode the audio with one codec"
            )
        if self.manifest.token_space_hash != space.hash:
            raise InputError(
                f"{path}: token_space_hash is {self.manifest.token_space_hash}, needed {space.hash}; "
                "use the token space that the dataset was made with, or recreate the dataset with this one"
            )


def _open(prefix: str, require_manifest: bool) -> TokenDataset:
    return TokenDataset(prefix, require_manifest=require_manifest)


def _find_manifest(prefix: str, path: Path) -> Manifest:
    if not path.exists():
        if not file_of(prefix, ".idx").exists():
            raise InputError(
                f"dataset {prefix} does not exist (no {path}, no {prefix}.idx); name the prefix of the files, "
                "without .bin or .idx"
            )
        raise InputError(
            f"{path} does not exist, which says what the ids of {prefix}.bin mean, or a conversion was "
            f"interrupted; {REMAKE}"
        )
    return read_manifest(path)


def _document_index(index: TokenIndex, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Lengths int32 [D] and byte pointers int64 [D] of documents, from those of sequences.

    Upstream's builder may put several sequences into a document; they follow one another in `.bin`.
    """
    sequences = len(index.lengths)
    documents = np.asarray(index.documents)
    if documents[0] != 0 or documents[-1] != sequences or (np.diff(documents) < 0).any():
        raise InputError(f"{path}: document boundaries do not run from 0 to {sequences}; {REMAKE}")
    tokens = np.concatenate([[0], np.cumsum(index.lengths, dtype=np.int64)])[documents]
    return np.diff(tokens).astype(np.int32), tokens[:-1] * index.dtype.itemsize
