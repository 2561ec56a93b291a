"""Read every byte of a dataset and compare everything with everything: files, documents, totals.

All disagreements are reported, not the first: what is damaged decides what can be saved. The memory taken does not
grow with the dataset.
"""

from __future__ import annotations

import json
import os
import zlib
from collections import Counter
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_speech.console import Progress
from megatron_speech.data.dataset.documents_table import document_batches, document_checksums
from megatron_speech.data.dataset.indexed import TokenIndex, file_of, read_index
from megatron_speech.data.dataset.manifest import COUNTED, Manifest, Totals, manifest_bytes, read_manifest, sum_totals
from megatron_speech.errors import InputError
from megatron_speech.files import sha256_file
from megatron_speech.tokens.space import TokenSpace

NAMED = 10  # documents that a finding names
_READ_BYTES = 8 << 20
_CHUNK = 1 << 20  # documents at a time

# Columns of the table whose sums the manifest states, by the name they have there.
SUMS = {
    "frames": "code_len",
    "tokens": "tokens",
    "audio_tokens": "audio_tokens",
    "text_tokens": "text_tokens",
    "target_tokens": "target_tokens",
}


@dataclass(frozen=True)
class Finding:
    """A disagreement: the file it is in, and a sentence."""

    file: str
    problem: str


@dataclass
class Verification:
    """What was found.

    Attributes:
        findings: every disagreement; empty for a whole dataset.
        damaged: the documents whose ids are not those that were written, as `document` and `sample_id`; the first
            `NAMED` of them.
        damaged_documents: how many there are.
    """

    prefix: str
    findings: list[Finding] = field(default_factory=list)
    damaged: list[dict[str, Any]] = field(default_factory=list)
    damaged_documents: int = 0

    def add(self, suffix: str, problem: str) -> None:
        """Note a disagreement of the file with that suffix."""
        path = str(file_of(self.prefix, suffix))
        for name in (f"manifest {path}", path):  # a sentence of another part that names the file already
            problem = problem.removeprefix(name).removeprefix(": ").lstrip()
        self.findings.append(Finding(path, problem))

    def require(self) -> None:
        """Do nothing for a whole dataset.

        Raises:
            InputError: with every disagreement.
        """
        if self.findings:
            problems = "; ".join(f"{finding.file}: {finding.problem}" for finding in self.findings)
            raise InputError(f"{problems}; recreate the dataset, or restore these files")


def verify_dataset(
    prefix: str | os.PathLike[str], space: TokenSpace | None = None, *, require_manifest: bool = True
) -> Verification:
    """Compare everything that can be compared in spite of damage.

    Args:
        prefix: P of the dataset's files.
        space: its token space: then every id must be one of it.
        require_manifest: without it, another project's `.bin` and `.idx` may stand alone; only they are compared.
    """
    result = Verification(os.fspath(prefix))
    manifest = None
    if require_manifest or file_of(prefix, ".manifest.json").exists():
        manifest = _manifest(result)
    index = _index(result, manifest)
    if manifest is None:
        return result
    if space is not None and space.hash != manifest.token_space_hash:
        space = None  # that is another error, and nothing that is damaged
    whole_table = _file(result, manifest, ".docs.parquet")
    _file(result, manifest, ".idx")
    _rejected(result, manifest)
    _sums(result, manifest, whole_table)
    _documents(result, manifest, index, whole_table, space)
    return result


def _manifest(result: Verification) -> Manifest | None:
    path = file_of(result.prefix, ".manifest.json")
    try:
        manifest = read_manifest(path)
    except InputError as error:
        result.add(".manifest.json", str(error))
        found = _fields(path)
        if found is None:
            return None
        manifest = found
    if not result.findings and path.read_bytes() != manifest_bytes(manifest):
        result.add(".manifest.json", "has the values that were written, but not the bytes: it was edited")
    for suffix in (".bin", ".idx", ".docs.parquet"):
        if suffix not in manifest.files:
            result.add(".manifest.json", f"field files names no {suffix}")
            return None
    return manifest


def _fields(path: Path) -> Manifest | None:
    """The fields of a damaged manifest that can still be read."""
    try:
        value = json.loads(path.read_bytes())
        value.pop("sha256", None)
        return Manifest.model_validate(value)
    except (OSError, ValueError, AttributeError):  # ValidationError is a ValueError
        return None


def _file(result: Verification, manifest: Manifest, suffix: str) -> bool:
    """Compare a file's size and hash; whether it is as it was written."""
    entry, path = manifest.files[suffix], file_of(result.prefix, suffix)
    try:
        size, found = path.stat().st_size, sha256_file(path)
    except OSError as error:
        result.add(suffix, f"cannot be read: {error.strerror or error}")
        return False
    return _compare_file(result, suffix, size, found, entry.bytes, entry.sha256)


def _compare_file(result: Verification, suffix: str, size: int, found: str, needed_size: int, needed: str) -> bool:
    if size != needed_size:
        state = "truncated" if size < needed_size else "longer than it was"
        result.add(suffix, f"holds {size:,} bytes, needed {needed_size:,}: it is {state}")
    elif found != needed:
        result.add(suffix, f"SHA-256 is {found}, needed {needed}: it is damaged")
    return found == needed


# ---- the index


def _index(result: Verification, manifest: Manifest | None) -> TokenIndex | None:
    try:
        index = read_index(file_of(result.prefix, ".idx"))
    except InputError as error:
        result.add(".idx", str(error))
        return None
    wrong = {"length": _Documents(), "byte offset": _Documents(), "first sequence": _Documents()}
    documents = len(index.lengths)
    position = 0
    for start in range(0, documents, _CHUNK):
        lengths = index.lengths[start : start + _CHUNK]
        ends = position + np.cumsum(lengths, dtype=np.int64) * index.dtype.itemsize
        needed = np.concatenate([[position], ends[:-1]])
        for name, bad in (
            ("length", lengths < 0),
            ("byte offset", index.pointers[start : start + _CHUNK] != needed),
            ("first sequence", _differ(index.documents[start : start + len(lengths)], start)),
        ):
            wrong[name].add(start + np.flatnonzero(bad))
        position = int(ends[-1])
    if manifest is None:
        del wrong["first sequence"]  # another project's documents may have several sequences
    for name, found in wrong.items():
        if found.count:
            result.add(".idx", f"{name} of document {found} does not follow from the lengths before")
    if index.documents[-1] != documents:
        result.add(".idx", f"the last document boundary is {index.documents[-1]}, needed {documents}")
    if manifest is not None:
        for name, value, needed_value in (
            ("documents", documents, manifest.documents),
            ("document boundaries", len(index.documents), manifest.documents + 1),
            ("tokens", position // index.dtype.itemsize, manifest.tokens),
            ("dtype", index.dtype.name, manifest.dtype),
        ):
            if value != needed_value:
                result.add(".idx", f"{name} is {value}, but the manifest says {needed_value}")
    return index


def _differ(found: np.ndarray, first: int) -> np.ndarray:
    """Where boundaries are not those of documents of one sequence each."""
    return found != np.arange(first, first + len(found))


class _Documents:
    """Numbers of documents: the first few, and how many."""

    def __init__(self) -> None:
        self.first: list[int] = []
        self.count = 0

    def add(self, numbers: np.ndarray) -> None:
        self.first += numbers[: NAMED - len(self.first)].tolist()
        self.count += len(numbers)

    def __str__(self) -> str:
        more = self.count - len(self.first)
        return ", ".join(map(str, self.first)) + (f" and {more:,} more" if more else "")


# ---- rows that were dropped


def _rejected(result: Verification, manifest: Manifest) -> None:
    suffix = ".rejected.jsonl"
    rules: Counter[str] = Counter()
    if suffix in manifest.files and _file(result, manifest, suffix):
        with open(file_of(result.prefix, suffix), "rb") as handle:
            for line in handle:
                rules[json.loads(line)["rule"]] += 1
    elif suffix in manifest.files:
        return
    elif file_of(result.prefix, suffix).exists():
        result.add(suffix, "is there, but the manifest names none: it is of another dataset")
        return
    # Earlier versions counted samples without a reference and did not list them.
    unlisted = set() if rules["no_reference"] else {"no_reference"}
    for rule in sorted({*rules, *manifest.filters.dropped} - unlisted):
        stated = manifest.filters.dropped.get(rule, 0)
        if rules[rule] != stated:
            result.add(suffix, f"holds {rules[rule]:,} rows of rule {rule}, but the manifest says {stated:,}")
    filters = manifest.filters
    if filters.rows != filters.kept + sum(filters.dropped.values()):
        result.add(
            ".manifest.json",
            f"filters.rows is {filters.rows:,}, but {filters.kept:,} were kept and {sum(filters.dropped.values()):,} "
            "dropped",
        )


# ---- totals


def _sums(result: Verification, manifest: Manifest, whole_table: bool) -> None:
    """The manifest's totals agree with each other, and with the documents table."""
    rate = manifest.codec.frame_rate_hz
    for name, groups in (("languages", manifest.languages), ("sources", manifest.sources)):
        _compare_totals(result, f"sum of {name}", sum_totals(groups.values(), rate), manifest.totals, COUNTED)
    for name, stated in (("documents", manifest.totals.documents), ("forms", sum(manifest.forms.values()))):
        if stated != manifest.documents:
            result.add(".manifest.json", f"{name} add up to {stated:,}, needed {manifest.documents:,}")
    if not whole_table:
        return  # its columns cannot be compared
    try:
        found = _table_sums(result.prefix, manifest)
    except InputError as error:
        result.add(".docs.parquet", str(error))
        return
    fields = ("documents", *SUMS)
    for part, groups in ((0, manifest.languages), (1, manifest.sources)):
        kind = ("language", "source")[part]
        names = {key[part] for key in found}
        for name in sorted({*names, *groups}):
            mine = sum_totals([totals for key, totals in found.items() if key[part] == name], rate)
            _compare_totals(result, f"{kind} {name} of the documents table", mine, groups.get(name, Totals()), fields)
    _compare_totals(result, "documents table", sum_totals(found.values(), rate), manifest.totals, fields)


def _compare_totals(result: Verification, what: str, found: Totals, stated: Totals, fields: tuple[str, ...]) -> None:
    for name in fields:
        if getattr(found, name) != getattr(stated, name):
            result.add(
                ".manifest.json",
                f"{name} is {getattr(stated, name):,}, but the {what} adds up to {getattr(found, name):,}",
            )
    if found.frames == stated.frames and found.seconds != stated.seconds:
        result.add(".manifest.json", f"seconds is {stated.seconds}, but the {what} adds up to {found.seconds}")


def _table_sums(prefix: str, manifest: Manifest) -> dict[tuple[str, str], Totals]:
    """Totals by (language, source), as the table's columns have them."""
    names = ("language", "dataset_source")
    result: dict[tuple[str, str], Totals] = {}
    path = file_of(prefix, ".docs.parquet")
    for batch in document_batches(path, [*names, *SUMS.values()], manifest.documents, dictionary=names):
        codes, labels = [], []
        for name in names:
            column = batch[name].dictionary_encode()
            labels.append([*column.dictionary.to_pylist(), ""])
            codes.append(column.indices.fill_null(len(labels[-1]) - 1).to_numpy().astype(np.int64))
        keys, group = np.unique(codes[0] * len(labels[1]) + codes[1], return_inverse=True)
        sums = {"documents": np.bincount(group)}
        for field_name, column_name in SUMS.items():
            # Exact: every sum is far below 2^53.
            values = batch[column_name].fill_null(0).to_numpy().astype(np.float64)
            sums[field_name] = np.bincount(group, values).astype(np.int64)
        for i, key in enumerate(keys.tolist()):
            totals = result.setdefault((labels[0][key // len(labels[1])], labels[1][key % len(labels[1])]), Totals())
            for field_name, values in sums.items():
                setattr(totals, field_name, getattr(totals, field_name) + int(values[i]))
    return result


# ---- documents


def _documents(
    result: Verification, manifest: Manifest, index: TokenIndex | None, whole_table: bool, space: TokenSpace | None
) -> None:
    """Read `.bin` once: its hash, and every document's checksum."""
    entry, path = manifest.files[".bin"], file_of(result.prefix, ".bin")
    reader = _BinReader(np.dtype(manifest.dtype), space)
    try:
        with (
            open(path, "rb", buffering=0) as handle,
            Progress("verify", total=entry.bytes, unit="B") as progress,
        ):
            if whole_table:
                _check_documents(result, manifest, index, reader, handle, progress)
            while reader.feed(handle, _READ_BYTES):
                progress.update(reader.size_bytes - progress.done)
    except OSError as error:
        result.add(".bin", f"cannot be read: {error.strerror or error}")
        return
    _compare_file(result, ".bin", reader.size_bytes, reader.digest.hexdigest(), entry.bytes, entry.sha256)
    if result.damaged_documents:
        numbers = [entry["document"] for entry in result.damaged]
        names = dict(zip(numbers, _sample_ids(result.prefix, manifest, numbers), strict=True))
        for entry_of in result.damaged:
            entry_of["sample_id"] = names[entry_of["document"]]
        listed = ", ".join(f"{entry['document']} ({entry['sample_id']})" for entry in result.damaged)
        more = result.damaged_documents - len(result.damaged)
        result.add(
            ".bin",
            f"{result.damaged_documents:,} of {manifest.documents:,} documents are not those that were written: "
            f"{listed}{f' and {more:,} more' if more else ''}",
        )
    if reader.outside:
        assert space is not None
        result.add(".bin", f"{reader.outside:,} ids are outside the token space (0 to {space.size - 1})")


def _check_documents(
    result: Verification,
    manifest: Manifest,
    index: TokenIndex | None,
    reader: _BinReader,
    handle: IO[bytes],
    progress: Progress,
) -> None:
    path = file_of(result.prefix, ".docs.parquet")
    first = 0
    unlike = _Documents()
    unchecked = 0
    for batch in document_batches(path, ["tokens", "crc32"], manifest.documents, batch_rows=1 << 16):
        lengths = batch["tokens"].fill_null(0).to_numpy()
        stated = batch["crc32"]
        unchecked += stated.null_count
        if index is not None:
            there = index.lengths[first : first + len(lengths)]
            unlike.add(first + np.flatnonzero(there != lengths[: len(there)]))
        found = reader.checksums(handle, lengths, progress)
        differs = np.array(found, dtype=np.int64) != stated.fill_null(0).to_numpy().astype(np.int64)
        wrong = np.flatnonzero(differs & stated.is_valid().to_numpy(zero_copy_only=False))
        result.damaged += [{"document": first + i} for i in wrong[: NAMED - len(result.damaged)].tolist()]
        result.damaged_documents += len(wrong)
        first += len(lengths)
    if unlike.count:
        result.add(".docs.parquet", f"column tokens of document {unlike} is not the length in the index")
    if unchecked:
        result.add(".docs.parquet", f"column crc32 is empty for {unchecked:,} documents")


def _sample_ids(prefix: str, manifest: Manifest, documents: list[int]) -> list[str | None]:
    names: list[str | None] = []
    first = 0
    for batch in document_batches(file_of(prefix, ".docs.parquet"), ["sample_id"], manifest.documents):
        names += [batch["sample_id"][i - first].as_py() for i in documents if first <= i < first + batch.num_rows]
        first += batch.num_rows
    return names


class _BinReader:
    """Reads `.bin` from front to end, once."""

    def __init__(self, dtype: np.dtype, space: TokenSpace | None) -> None:
        self.digest = sha256()
        self.size_bytes = 0
        self.outside = 0
        self._dtype = dtype
        self._space = space
        self._buffer = bytearray(_READ_BYTES)

    def feed(self, handle: IO[bytes], count: int) -> memoryview:
        """The next `count` bytes, at most `_READ_BYTES`; fewer at the end of the file."""
        view = memoryview(self._buffer)[:count]
        filled = 0
        while filled < count and (read := handle.readinto(view[filled:])):  # type: ignore[attr-defined]
            filled += read
        view = view[:filled]
        self.digest.update(view)
        self.size_bytes += filled
        if self._space is not None:
            ids = np.frombuffer(view[: filled - filled % self._dtype.itemsize], self._dtype)
            self.outside += int(np.count_nonzero((ids < 0) | (ids >= self._space.size)))
        return view

    def checksums(self, handle: IO[bytes], lengths: np.ndarray, progress: Progress) -> list[int]:
        """CRC-32 of each of the next documents; -1 for those that the file does not hold whole."""
        edges = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)]) * self._dtype.itemsize
        result: list[int] = []
        i = 0
        while i < len(lengths):
            end = int(np.searchsorted(edges, edges[i] + _READ_BYTES, side="right")) - 1
            if end > i:
                data = self.feed(handle, int(edges[end] - edges[i]))
                whole = int(np.searchsorted(edges, edges[i] + len(data), side="right")) - 1
                whole = min(whole, end)
                result += document_checksums(
                    data[: int(edges[whole] - edges[i])], lengths[i:whole], self._dtype.itemsize
                )
                result += [-1] * (end - whole)
                i = end
            else:
                result.append(self._long(handle, int(edges[i + 1] - edges[i])))
                i += 1
            progress.update(self.size_bytes - progress.done)
        return result

    def _long(self, handle: IO[bytes], size: int) -> int:
        """CRC-32 of a document that is longer than the buffer."""
        crc = 0
        while size:
            data = self.feed(handle, min(size, _READ_BYTES))
            if not data:
                return -1
            crc = zlib.crc32(data, crc)
            size -= len(data)
        return crc
