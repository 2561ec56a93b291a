"""Stitching: chains are those of a naive walk through each recording, and expanding them loses no token."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_speech.data.dataset.document_columns import DocumentTable
from megatron_speech.data.dataset.documents_table import SCHEMA
from megatron_speech.data.sequences.packing_kernels import pack_cut, pack_fit
from megatron_speech.data.sequences.stitching import COLUMNS, Adjacency, StitchedTable, expand, stitch
from megatron_speech.errors import InputError
from megatron_speech.recipe.packing import StitchConfig

Row = dict[str, Any]


def columns_of(rows: list[Row]) -> pa.Table:
    schema = pa.schema([SCHEMA.field(name) for name in COLUMNS])
    return pa.Table.from_pylist([{name: row.get(name) for name in COLUMNS} for row in rows], schema=schema)


def table_of(rows: list[Row], task: str = "speech_lm") -> DocumentTable:
    def integers(name: str, default: int = 0) -> np.ndarray:
        return np.array([row.get(name, default) for row in rows], dtype=np.int32)

    lengths = integers("length", 10)
    return DocumentTable(
        name="talks",
        task=task,
        lengths=lengths,
        targets=lengths - 2,
        seconds=lengths.astype(np.float32) / 25,
        language=integers("language"),
        source=integers("source"),
        languages=["en", "hi"],
        sources=["a", "b"],
        held_out=np.array([row.get("held_out", False) for row in rows], dtype=bool),
        quotes_held_out=np.zeros(len(rows), dtype=bool),
    )


def talk(count: int, source_id: str = "talk", **fields: Any) -> list[Row]:
    """Segments of two seconds, one after the other."""
    return [
        {"source_id": source_id, "speaker_id": "s", "segment_order": k, "start_time": 2.0 * k, "end_time": 2.0 * k + 2}
        | fields
        for k in range(count)
    ]


def units_of(table: StitchedTable) -> list[list[int]]:
    return [
        table.unit_documents[a:b].tolist()
        for a, b in zip(table.unit_ptr[:-1].tolist(), table.unit_ptr[1:].tolist(), strict=True)
    ]


def joined(rows: list[Row], *, max_tokens: int = 1000, task: str = "speech_lm", **config: Any) -> list[list[int]]:
    return units_of(stitch(table_of(rows, task), columns_of(rows), StitchConfig(**config), max_tokens=max_tokens))


def naive(rows: list[Row], config: StitchConfig, max_tokens: int) -> list[list[int]]:
    """Every recording walked segment by segment, in plain Python."""
    recordings = defaultdict(list)
    for k, row in enumerate(rows):
        recordings[row.get("source", 0), row["source_id"]].append(k)
    units: list[list[int]] = []
    for members in recordings.values():
        members.sort(key=lambda k: (rows[k]["segment_order"], k))
        chain: list[int] = []
        for k in members:
            if chain:
                last, row = rows[chain[-1]], rows[k]
                gap = row["start_time"] - last["end_time"]
                fits = sum(rows[i]["length"] for i in chain) + row["length"] <= max_tokens
                same = all(
                    row.get(name, 0) == last.get(name, 0) for name in ("speaker_id", "language", "source", "held_out")
                )
                quotes = any(one.get("reference_sample_id") for one in (row, last))
                adjacent = row["segment_order"] == last["segment_order"] + 1
                if (
                    not (fits and same and adjacent)
                    or quotes
                    or not (-config.max_overlap_seconds <= gap <= config.max_gap_seconds)
                    or not row["length"]
                    or not last["length"]
                ):
                    units.append(chain)
                    chain = []
            chain.append(k)
        if chain:
            units.append(chain)
    if config.singles == "drop":
        units = [unit for unit in units if len(unit) > 1]
    return sorted(units)


@st.composite
def recordings(draw: st.DrawFn) -> list[Row]:
    rows: list[Row] = []
    for source_id in "xyz"[: draw(st.integers(1, 3))]:
        now = 0.0
        for order in range(draw(st.integers(0, 10))):
            now += draw(st.sampled_from([0.0, 0.0, 0.5, -0.05, 3.0, -2.0]))
            end = now + draw(st.sampled_from([1.0, 2.5]))
            row = {
                "source_id": source_id,
                "speaker_id": draw(st.sampled_from("sssst")),
                "segment_order": order + draw(st.sampled_from([0, 0, 0, 0, 1])),
                "start_time": now,
                "end_time": end,
                "length": draw(st.integers(0, 30)),
                "language": draw(st.sampled_from([0, 0, 0, 0, 1])),
                "source": draw(st.sampled_from([0, 0, 0, 0, 0, 1])),
                "reference_sample_id": draw(st.sampled_from([None, None, None, None, "other"])),
            }
            now = end
            rows += [row] * draw(st.sampled_from([0, 1, 1, 1, 1, 2]))
    return draw(st.permutations(rows)) if draw(st.booleans()) else rows


@pytest.mark.slow
@settings(deadline=None, max_examples=250)
@given(recordings(), st.integers(1, 80), st.sampled_from(["keep", "drop"]))
def test_chains_are_those_of_a_walk_through_each_recording(rows: list[Row], max_tokens: int, singles: str) -> None:
    config = StitchConfig(singles=singles, missing="single")  # type: ignore[arg-type]
    if all(row.get("reference_sample_id") for row in rows):
        rows = rows + talk(1, "another", length=3)
    table = stitch(table_of(rows), columns_of(rows), config, max_tokens=max_tokens)
    assert units_of(table) == naive(rows, config, max_tokens)
    lengths = np.array([row.get("length", 10) for row in rows])
    assert table.lengths.tolist() == [int(lengths[unit].sum()) for unit in units_of(table)]
    kept = np.concatenate([np.zeros(0, np.int64), *units_of(table)])
    assert len(set(kept.tolist())) == len(kept) == len(rows) - table.dropped


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(recordings(), st.integers(5, 40), st.sampled_from(["cut", "fit"]), st.integers(0, 3))
def test_expanded_segments_hold_every_token_of_the_units_in_order(
    rows: list[Row], seq_length: int, mode: str, seed: int
) -> None:
    rows = rows + talk(3, "one more", length=4)
    stitched = stitch(table_of(rows), columns_of(rows), StitchConfig(missing="single"), max_tokens=seq_length)
    plain = table_of(talk(5, length=seq_length // 2 + 1), task="text_lm")
    tables: list[DocumentTable] = [stitched, plain]
    random = np.random.default_rng(seed)
    order = random.permutation(len(stitched.lengths) + len(plain.lengths))
    which = (order >= len(stitched.lengths)).astype(np.int32)
    unit = np.where(which, order - len(stitched.lengths), order).astype(np.int32)
    lengths = np.array([tables[w].lengths[u] for w, u in zip(which, unit, strict=True)], dtype=np.int32)
    packed = pack_cut(lengths, seq_length) if mode == "cut" else pack_fit(lengths, seq_length, open_bins=4)[0]

    found = expand(packed.seq_ptr, which[packed.position], unit[packed.position], packed.start, packed.length, tables)
    expected: list[list[tuple[int, int, int, bool]]] = []  # (table, document, token, continues what is before it)
    parts = units_of(stitched)
    for a, b in zip(packed.seq_ptr[:-1], packed.seq_ptr[1:], strict=True):
        row = []
        for k in range(a, b):
            w, u = int(which[packed.position[k]]), int(unit[packed.position[k]])
            documents = [u] if w else parts[u]
            tokens = [(w, d, i) for d in documents for i in range(tables[1].lengths[d] if w else rows[d]["length"])]
            taken = tokens[packed.start[k] : packed.start[k] + packed.length[k]]
            row += [(*token, i > 0) for i, token in enumerate(taken)]
        expected.append(row)
    assert len(found.seq_ptr) == len(packed.seq_ptr)
    for index, (a, b) in enumerate(zip(found.seq_ptr[:-1], found.seq_ptr[1:], strict=True)):
        row = []
        for k in range(a, b):
            w = int(which[packed.position[found.segment[k]]])
            for i in range(found.length[k]):
                row.append((w, int(found.document[k]), int(found.start[k]) + i, bool(i > 0 or found.joined[k])))
        assert row == expected[index]


def test_what_separates_two_segments() -> None:
    rows = talk(4)
    assert joined(rows) == [[0, 1, 2, 3]]
    assert joined([rows[k] for k in (2, 0, 3, 1)]) == [[1, 3, 0, 2]]
    for changed in (
        {"speaker_id": "other"},
        {"language": 1},
        {"source": 1},
        {"source_id": "other"},
        {"held_out": True},
        {"start_time": 5.5, "end_time": 5.9},
        {"start_time": 3.5},
        {"segment_order": 7},
        {"reference_sample_id": "sample-1"},
        {"length": 0},
    ):
        again = [dict(row) for row in rows]
        again[2] |= changed
        assert [0, 1] in joined(again), changed
    assert joined(rows, max_tokens=25) == [[0, 1], [2, 3]]
    assert joined(rows, max_tokens=9) == [[0], [1], [2], [3]]


def test_a_recording_of_another_corpus_with_the_same_name_is_another_recording() -> None:
    rows = talk(2) + talk(2, source=1)
    assert joined(rows) == [[0, 1], [2, 3]]


def test_documents_without_a_neighbour_are_kept_or_dropped_and_counted() -> None:
    rows = talk(3) + talk(1, "alone")
    assert joined(rows) == [[0, 1, 2], [3]]
    assert joined(rows, singles="drop") == [[0, 1, 2]]
    table = stitch(table_of(rows), columns_of(rows), StitchConfig(singles="drop"), max_tokens=100)
    assert table.dropped == 1


def test_text_is_left_alone() -> None:
    rows = [{"source_id": "book"}] * 3
    assert joined(rows, task="text_lm", singles="drop") == [[0], [1], [2]]


def test_metadata_that_cannot_tell_adjacency_is_refused_with_its_counts() -> None:
    rows = talk(3)
    without = [row | {"segment_order": None, "end_time": None} for row in rows]
    with pytest.raises(InputError, match=r"of 3 documents none has all .* segment_order \(in 3\), end_time \(in 3\)"):
        joined(without)
    with pytest.raises(InputError, match="none has all"):
        joined(without, missing="single")
    some = rows + talk(2, "quiet", speaker_id="") + talk(2, "nan", start_time=float("nan"))
    with pytest.raises(InputError, match=r"4 of 7 documents .* speaker_id \(in 2\), start_time \(in 2\)"):
        joined(some)
    assert joined(some, missing="single") == [[0, 1, 2], [3], [4], [5], [6]]


def test_metadata_read_by_row_group_are_those_of_the_whole_table(
    tmp_path: Any, toy_space: Any, make_dataset: Any, document: Any
) -> None:
    dataset = make_dataset(tmp_path / "d", toy_space, "speech_lm", [document(codes=n) for n in (3, 0, 5)])
    read, whole = Adjacency.read(dataset), Adjacency.of(dataset.columns(*COLUMNS))
    assert read.source.tolist() == whole.source.tolist()
    assert read.missing == whole.missing == dict.fromkeys(COLUMNS[:5], 3) | {"source_id": 0}
    assert not read.complete.any()
