"""Long-context stitching: adjacent segments of one recording become one long document.

    documents ─ stitch ─► units (chains of adjacent documents) ─ order, packing ─► segments of units
                                                                   ─ expand ─► segments of documents, joined flags

Two documents are adjacent when they have the same `dataset_source`, `source_id`, speaker and language, consecutive
`segment_order`, and the second starts no earlier than `max_overlap_seconds` before and no later than
`max_gap_seconds` after the end of the first. A chain is one attention document: its positions run on over the
parts and every token sees all before it; the ids of the parts are unchanged, each with its own <bos> and
<speech_end>. A chain that would be longer than a sequence is cut between documents.

Documents that quote another segment (cloning, continuation) stay alone: the segment that they quote is as a rule
the one before, and a chain would hold it twice, the second time as something to copy.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megatron_speech.data.dataset.document_columns import DocumentTable
from megatron_speech.data.dataset.indexed import TokenDataset, file_of
from megatron_speech.data.dataset.split import name_hash, splitmix64
from megatron_speech.errors import InputError
from megatron_speech.recipe.packing import StitchConfig

logger = logging.getLogger(__name__)

COLUMNS = ("source_id", "speaker_id", "segment_order", "start_time", "end_time", "reference_sample_id")
"""Columns of the documents table that say which documents are adjacent."""

_NEEDED = COLUMNS[:5]
_TASKS = ("speech_lm", "tts")
_SUMMED = ("lengths", "targets", "seconds")
_MAX_UNIT_TOKENS = np.iinfo(np.int32).max


@dataclass(frozen=True)
class Adjacency:
    """What identifies adjacent documents, as arrays of D elements: no strings.

    source, speaker: uint64, hashes of the names; order: int64 segment_order; start, end: float64 seconds; quotes:
    bool, documents that quote another segment; missing: how many documents that quote nothing have no value, by
    column; complete: bool, documents that have a value in every column.
    """

    source: np.ndarray
    speaker: np.ndarray
    order: np.ndarray
    start: np.ndarray
    end: np.ndarray
    quotes: np.ndarray
    complete: np.ndarray
    missing: dict[str, int]

    @classmethod
    def of(cls, columns: pa.Table) -> Adjacency:
        """From the columns :data:`COLUMNS` of a documents table, one row per document."""
        return cls._joined([_piece(columns)])

    @classmethod
    def read(cls, dataset: TokenDataset) -> Adjacency:
        """From a dataset's documents table, one row group after the other: the names are never held together.

        Raises:
            InputError: no documents table, a damaged one, no such column, or another number of rows.
        """
        dataset.columns("segment_order")  # refuses a table that does not go with the dataset
        file = pq.ParquetFile(file_of(dataset.prefix, ".docs.parquet"), memory_map=True)
        groups = range(file.num_row_groups)
        pieces = [_piece(file.read_row_group(k, list(COLUMNS))) for k in groups]
        return cls._joined(pieces or [_piece(file.read(list(COLUMNS)))])

    @classmethod
    def _joined(cls, pieces: Sequence[Adjacency]) -> Adjacency:
        arrays = {
            field.name: np.concatenate([getattr(piece, field.name) for piece in pieces])
            for field in dataclasses.fields(cls)
            if field.name != "missing"
        }
        missing = {name: sum(piece.missing[name] for piece in pieces) for name in _NEEDED}
        return cls(**arrays, missing=missing)


def _piece(columns: pa.Table) -> Adjacency:
    def numbers(name: str, dtype: type[np.generic]) -> np.ndarray:
        return columns[name].combine_chunks().fill_null(0).to_numpy(zero_copy_only=False).astype(dtype)

    def present(name: str) -> np.ndarray:
        column = columns[name].combine_chunks()
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            valid = pc.greater(pc.utf8_length(column).fill_null(0), 0)
        elif pa.types.is_floating(column.type):
            valid = pc.is_finite(column).fill_null(False)
        else:
            valid = column.is_valid()
        return np.asarray(valid.to_numpy(zero_copy_only=False), dtype=bool)

    quotes = present("reference_sample_id")
    has = {name: present(name) for name in _NEEDED}
    return Adjacency(
        source=name_hash(columns["source_id"].combine_chunks()),
        speaker=name_hash(columns["speaker_id"].combine_chunks()),
        order=numbers("segment_order", np.int64),
        start=numbers("start_time", np.float64),
        end=numbers("end_time", np.float64),
        quotes=quotes,
        complete=np.logical_and.reduce(list(has.values())),
        missing={name: int((~valid & ~quotes).sum()) for name, valid in has.items()},
    )


@dataclass(frozen=True)
class StitchedTable(DocumentTable):
    """A table of documents whose rows are units, chains of adjacent documents; arrays of U elements.

    lengths, targets, seconds are sums over a unit's parts, all else is what its parts share. `unit_ptr`: int64
    [U + 1]; unit u is made of the documents `unit_documents[unit_ptr[u]:unit_ptr[u + 1]]` (int32) of the dataset, in
    this order; `part_ends`: int64 [parts], end of each part when all units are laid end to end; `dropped`: documents
    left out for want of a neighbour.
    """

    unit_ptr: np.ndarray
    unit_documents: np.ndarray
    part_ends: np.ndarray
    dropped: int


def stitch(
    table: DocumentTable, columns: pa.Table | Adjacency, config: StitchConfig, *, max_tokens: int
) -> StitchedTable:
    """Join adjacent documents of a dataset to chains of at most `max_tokens` tokens.

    Each document lies in exactly one unit (or in none: a document without a neighbour where `singles` is drop). A
    chain begins at its first document and takes the next ones while they fit; the rest begins another chain.
    Documents of text stay alone and are always kept. Units stand in the order of their first documents. Several
    documents of one segment are not adjacent to each other. Array operations throughout, O(D log D).

    Args:
        table: the documents, with every array of D elements that decides a document's stratum or side of the split.
        columns: the columns :data:`COLUMNS`, or what was made of them.
        config: bounds of the gap, and what becomes of documents without a neighbour.
        max_tokens: of a unit; longer documents stay alone.

    Raises:
        InputError: the metadata does not say which documents are adjacent.
    """
    adjacency = columns if isinstance(columns, Adjacency) else Adjacency.of(columns)
    documents = len(table.lengths)
    if len(adjacency.source) != documents:
        raise ValueError(f"{len(adjacency.source)} rows of metadata for {documents} documents")
    if not 1 <= max_tokens <= _MAX_UNIT_TOKENS:
        raise ValueError(f"max_tokens is {max_tokens}")
    if table.task not in _TASKS:
        units = np.arange(documents, dtype=np.int32)
        return _table_of(table, np.arange(documents + 1, dtype=np.int64), units, 0)
    _refuse_missing(table, adjacency, config)
    order, linked = _chains(table, adjacency, config)
    # `begins`: places in `order` where a unit begins.
    begins = _unit_begins(table.lengths[order].astype(np.int64), linked, max_tokens)
    sizes = np.diff(np.append(begins, documents))
    dropped = 0
    if config.singles == "drop":
        kept = sizes > 1
        dropped = int((~kept).sum())
        order = order[np.repeat(kept, sizes)]
        sizes = sizes[kept]
        begins = np.cumsum(sizes) - sizes
    # Units in the order of their first documents.
    rank = np.argsort(order[begins], kind="stable")
    ptr = np.concatenate([[0], np.cumsum(sizes[rank], dtype=np.int64)])
    inside = np.arange(len(order), dtype=np.int64) - np.repeat(ptr[:-1], sizes[rank])
    return _table_of(table, ptr, order[np.repeat(begins[rank], sizes[rank]) + inside], dropped)


def _refuse_missing(table: DocumentTable, adjacency: Adjacency, config: StitchConfig) -> None:
    """Refuse metadata that are not there."""
    eligible = int((~adjacency.quotes).sum())
    incomplete = int((~adjacency.complete & ~adjacency.quotes).sum())
    without = {name: count for name, count in adjacency.missing.items() if count}
    columns = ", ".join(f"{name} (in {count:,})" for name, count in without.items())
    if eligible and incomplete == eligible:
        raise InputError(
            f"dataset {table.name}: its segments cannot be stitched: of {eligible:,} documents none has all of "
            f"source_id, speaker_id, segment_order, start_time and end_time; missing: {columns}; preprocess from rows "
            "that have them, or take `stitch` out of the stage"
        )
    if incomplete and config.missing == "refuse":
        raise InputError(
            f"dataset {table.name}: {incomplete:,} of {eligible:,} documents cannot be stitched for want of metadata; "
            f"missing: {columns}; preprocess from rows that have them, or say stitch.missing: single to leave those "
            "documents apart"
        )
    if incomplete:
        logger.info("dataset %s: %d documents stay alone for want of metadata (%s)", table.name, incomplete, columns)


def _chains(table: DocumentTable, found: Adjacency, config: StitchConfig) -> tuple[np.ndarray, np.ndarray]:
    """Documents sorted by source and place in it, int32 [D], and whether each is adjacent to the one before it."""
    documents = len(table.lengths)
    order = _by_place(table.source, found)
    linked = np.zeros(documents, dtype=bool)
    if documents < 2:
        return order, linked
    before, after = order[:-1], order[1:]
    single = found.quotes | ~found.complete | (np.asarray(table.lengths) == 0)
    gap = found.start[after] - found.end[before]
    adjacent = (gap >= -config.max_overlap_seconds) & (gap <= config.max_gap_seconds)
    adjacent &= ~single[before] & ~single[after]
    adjacent &= found.order[after] - found.order[before] == 1
    for key in (found.source, found.speaker, *_shared(table).values()):
        adjacent &= key[before] == key[after]
    linked[1:] = adjacent
    return order, linked


def _by_place(corpus: np.ndarray, found: Adjacency) -> np.ndarray:
    """Documents sorted by corpus, source and segment_order, those of one segment as they come: int32 [D].

    Where every source's documents already lie together and in order, which is how most datasets are made, they are
    left where they are: only the runs are sorted then.
    """
    documents = len(found.source)
    in_order = np.arange(documents, dtype=np.int32)
    if documents < 2:
        return in_order
    same = (found.source[1:] == found.source[:-1]) & (corpus[1:] == corpus[:-1])
    if ((found.order[1:] >= found.order[:-1]) | ~same).all():
        heads = np.concatenate([[0], np.flatnonzero(~same) + 1])
        with np.errstate(over="ignore"):
            names = splitmix64(found.source[heads]) + corpus[heads].astype(np.uint64)
        if len(np.unique(names)) == len(heads):
            return in_order
    # One stable sort after the other instead of a lexsort: the keys need not all be there at once.
    order = np.argsort(found.order, kind="stable").astype(np.int32)
    for key in (found.source, corpus):
        order = order[np.argsort(key[order], kind="stable")]
    return order


def _shared(table: DocumentTable) -> dict[str, np.ndarray]:
    """The arrays of D elements that the parts of a chain have in common: what decides stratum and side of split."""
    return {
        field.name: value
        for field in dataclasses.fields(table)
        if field.name not in _SUMMED
        and isinstance(value := getattr(table, field.name), np.ndarray)
        and len(value) == len(table.lengths)
    }


def _unit_begins(lengths: np.ndarray, linked: np.ndarray, max_tokens: int) -> np.ndarray:
    """Places where units begin, int64 [U]: at every chain, and inside one wherever the next document does not fit.

    All chains are walked at once, one unit of each per round.
    """
    documents = len(lengths)
    if not documents:
        return np.zeros(0, dtype=np.int64)
    heads = np.flatnonzero(~linked)
    ends = np.append(heads[1:], documents)  # of the chains
    totals = np.concatenate([[0], np.cumsum(lengths)])
    found = [heads]
    at = heads
    while True:
        # The first document that no longer fits; a unit takes at least one.
        reach = np.searchsorted(totals, totals[at] + max_tokens, side="right") - 1
        at = np.maximum(reach, at + 1)
        going = at < ends
        if not going.any():
            return np.sort(np.concatenate(found))
        at, ends = at[going], ends[going]
        found.append(at)


def _table_of(table: DocumentTable, ptr: np.ndarray, documents: np.ndarray, dropped: int) -> StitchedTable:
    """The table whose unit u is made of documents[ptr[u]:ptr[u + 1]]."""
    lengths = np.asarray(table.lengths)[documents]
    starts = ptr[:-1]
    fields = {field.name: getattr(table, field.name) for field in dataclasses.fields(DocumentTable)}
    for name in _SUMMED:
        if name != "lengths" and not len(fields[name]):
            continue  # not read: the stage does not need it
        values = lengths if name == "lengths" else np.asarray(fields[name])[documents]
        wide = np.float64 if values.dtype.kind == "f" else np.int64
        sums = np.add.reduceat(values.astype(wide), starts) if len(starts) else np.zeros(0, wide)
        fields[name] = sums.astype(values.dtype)
    for name, values in _shared(table).items():
        fields[name] = values[documents[starts]]
    return StitchedTable(
        **fields,
        unit_ptr=ptr,
        unit_documents=documents,
        part_ends=np.cumsum(lengths, dtype=np.int64),
        dropped=dropped,
    )


class ExpandedSegments(NamedTuple):
    """Segments of documents, made of segments of units.

    seq_ptr: int64 [sequences + 1]; segment: int64 [n], the segment of a unit that each was a part of; document,
    start, length: int32 [n], as in a segment table; joined: uint8 [n], 1 where a segment continues the attention
    document of the segment before it in its sequence.
    """

    seq_ptr: np.ndarray
    segment: np.ndarray
    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    joined: np.ndarray


def expand(
    seq_ptr: np.ndarray,
    table_of_segment: np.ndarray,
    unit: np.ndarray,
    start: np.ndarray,
    length: np.ndarray,
    tables: Sequence[DocumentTable],
) -> ExpandedSegments:
    """Turn packed segments of units into segments of documents.

    Works on any run of whole sequences, so that a long index can be expanded piece by piece.

    Args:
        seq_ptr: int64 [sequences + 1], from 0 to n.
        table_of_segment: int [n], index into `tables`.
        unit: int [n], row of that table.
        start, length: int [n], first token and tokens of the segment in its unit; lengths are at least 1.
        tables: stitched tables; those that are not have documents for units.
    """
    count = np.ones(len(unit), dtype=np.int64)
    first_part = np.asarray(unit, dtype=np.int64).copy()
    for index, table in enumerate(tables):
        if isinstance(table, StitchedTable):
            chosen = np.flatnonzero(table_of_segment == index)
            begin = _unit_starts(table, unit[chosen]) + start[chosen]
            first_part[chosen] = np.searchsorted(table.part_ends, begin, side="right")
            count[chosen] = np.searchsorted(table.part_ends, begin + length[chosen]) - first_part[chosen] + 1
    segment = np.repeat(np.arange(len(unit), dtype=np.int64), count)
    within = np.arange(len(segment), dtype=np.int64) - np.repeat(np.cumsum(count) - count, count)
    part = first_part[segment] + within
    out_document = part.astype(np.int32)
    out_start = np.asarray(start, dtype=np.int64)[segment]
    out_length = np.asarray(length, dtype=np.int64)[segment]
    for index, table in enumerate(tables):
        if isinstance(table, StitchedTable):
            chosen = np.flatnonzero(np.asarray(table_of_segment)[segment] == index)
            parts, owner = part[chosen], segment[chosen]
            begin = _unit_starts(table, unit[owner]) + start[owner]  # of the segment, units laid end to end
            end = begin + length[owner]
            part_begin = np.where(parts > 0, table.part_ends[parts - 1], 0)
            out_document[chosen] = table.unit_documents[parts]
            out_start[chosen] = np.maximum(begin, part_begin) - part_begin
            out_length[chosen] = np.minimum(end, table.part_ends[parts]) - np.maximum(begin, part_begin)
    ends = np.concatenate([[0], np.cumsum(count)])
    return ExpandedSegments(
        seq_ptr=ends[np.asarray(seq_ptr)],
        segment=segment,
        document=out_document,
        start=out_start.astype(np.int32),
        length=out_length.astype(np.int32),
        joined=(within > 0).astype(np.uint8),
    )


def _unit_starts(table: StitchedTable, units: np.ndarray) -> np.ndarray:
    """int64: where each of these units starts when all are laid end to end; a unit has at least one part."""
    return np.asarray(table.part_ends[table.unit_ptr[units + 1] - 1] - table.lengths[units])
