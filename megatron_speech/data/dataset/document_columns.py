"""What the blend knows of a dataset's documents: a few columns of the documents table, as arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from megatron_speech.data.dataset.documents_table import document_batches
from megatron_speech.data.dataset.indexed import TokenDataset, file_of
from megatron_speech.data.dataset.split import SplitCount, SplitSides, is_held_out, quotes_held_out, split_hashes
from megatron_speech.errors import InputError
from megatron_speech.recipe.data import DataConfig
from megatron_speech.recipe.stage import StageDataConfig

UNKNOWN_LANGUAGE = "und"  # BCP-47 for "undetermined"
UNKNOWN_SOURCE = "unknown"
MAX_NAMES = 10_000  # distinct languages or sources: names that many documents share
_ROWS = 1 << 20  # documents handled at a time: bounds the temporary arrays


@dataclass(frozen=True)
class DocumentTable:
    """One dataset's documents as the blend sees them: arrays of D elements.

    lengths, targets: int32 steps, and steps after the prompt (empty where the stage does not count them); seconds:
    float32 of audio; language, source: uint16 codes into `languages`, `sources`; held_out: bool, True for validation
    documents; quotes_held_out: bool, True where the reference is held out (never trained on; validated on if itself
    held out); sides: sums over both sides of the split.
    """

    name: str
    task: str
    lengths: np.ndarray
    targets: np.ndarray
    seconds: np.ndarray
    language: np.ndarray
    source: np.ndarray
    languages: list[str]
    sources: list[str]
    held_out: np.ndarray
    quotes_held_out: np.ndarray
    marks: np.ndarray | None = dataclasses.field(default=None, kw_only=True)
    sides: SplitSides | None = dataclasses.field(default=None, kw_only=True)

    def counted(self, stage: StageDataConfig) -> np.ndarray:
        """Steps that a document counts for in the proportions of `stage`, int32 [D]."""
        return self.targets if stage.is_sft and self.task != "text_lm" else self.lengths


class _Codes:
    """A string column as uint16 codes, filled batch by batch; null and "" become `unknown`."""

    def __init__(self, column: str, rows: int, unknown: str) -> None:
        self.column, self.unknown = column, unknown
        self.codes = np.zeros(rows, dtype=np.uint16)
        self._known: dict[str, int] = {}

    def put(self, at: int, batch: pa.RecordBatch, path: Path) -> None:
        column = batch.column(self.column)
        # One more for rows without a value, whose index is null.
        values = [*column.dictionary.to_pylist(), None] if column.null_count else column.dictionary.to_pylist()
        of_value = [self._known.setdefault(value or self.unknown, len(self._known)) for value in values]
        if len(self._known) > MAX_NAMES:
            raise InputError(
                f"{path}: column {self.column} has more than {MAX_NAMES} distinct values; {self.column} is a name "
                "that many documents share, not one of a recording: preprocess with fewer values"
            )
        recode = np.array(of_value, dtype=np.uint16)
        self.codes[at : at + batch.num_rows] = recode[column.indices.fill_null(len(values) - 1).to_numpy()]

    def finish(self) -> tuple[np.ndarray, list[str]]:
        """The codes, renumbered so that they do not depend on the order of the rows, and their sorted names."""
        names = sorted(self._known)
        rank = np.array([names.index(name) for name in self._known] or [0], dtype=np.uint16)
        for first in range(0, len(self.codes), _ROWS):
            self.codes[first : first + _ROWS] = rank[self.codes[first : first + _ROWS]]
        return self.codes, names


def read_documents(
    name: str, task: str, dataset: TokenDataset, data: DataConfig, *, targets: bool = True
) -> DocumentTable:
    """Read what the blend needs of `dataset`, which holds documents of `task`, from its table and its index.

    The table is read in batches of rows and kept as 10 bytes a document, 14 with `targets`; the lengths stay in
    the mapped index.

    Args:
        targets: whether the stage counts the tokens after the prompt; False leaves the column empty.
    """
    path, rows = file_of(dataset.prefix, ".docs.parquet"), len(dataset)
    language = _Codes("language", rows, UNKNOWN_LANGUAGE)
    source = _Codes("dataset_source", rows, UNKNOWN_SOURCE)
    seconds = np.zeros(rows, dtype=np.float32)
    target_tokens = np.zeros(rows if targets else 0, dtype=np.int32)
    held = np.zeros(rows, dtype=bool)
    quotes = np.zeros(rows, dtype=bool)
    names = ["language", "dataset_source", "duration_seconds", "split_hash", "reference_split_hash"]
    count = SplitCount()
    at = 0
    wanted = [*names, "target_tokens"] if targets else names
    for batch in document_batches(path, wanted, rows, dictionary=names[:2]):
        part = slice(at, at + batch.num_rows)
        language.put(at, batch, path)
        source.put(at, batch, path)
        seconds[part] = batch.column("duration_seconds").fill_null(0).to_numpy(zero_copy_only=False)
        if targets:
            target_tokens[part] = batch.column("target_tokens").fill_null(0).to_numpy(zero_copy_only=False)
        columns = pa.Table.from_batches([batch])
        hashes = split_hashes(columns)
        held[part] = is_held_out(hashes, data.validation_fraction, data.split_seed)
        count.add(hashes, np.asarray(dataset.lengths[part]), held[part])
        quotes[part] = quotes_held_out(columns, data.validation_fraction, data.split_seed)
        at += batch.num_rows

    def again() -> Iterator[tuple[np.ndarray, np.ndarray, pa.Table]]:
        first = 0
        for batch in document_batches(path, ["split_hash", "source_id", "sample_id"], rows):
            columns = pa.Table.from_batches([batch])
            yield split_hashes(columns), np.asarray(dataset.lengths[first : first + batch.num_rows]), columns
            first += batch.num_rows

    language_codes, languages = language.finish()
    source_codes, sources = source.finish()
    if dataset.streams > 1:  # the table counts ids
        target_tokens //= dataset.streams
    return DocumentTable(
        name=name,
        task=task,
        lengths=np.asarray(dataset.lengths, dtype=np.int32),
        targets=target_tokens,
        seconds=seconds,
        language=language_codes,
        source=source_codes,
        languages=languages,
        sources=sources,
        held_out=held,
        quotes_held_out=quotes,
        sides=count.finish(again),
    )
