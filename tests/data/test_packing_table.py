"""The segment table: cut runs on without gaps, fit never splits, and the cache is keyed by content."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_speech.data.order import Order
from megatron_speech.data.packing import SegmentTable, cached_table, pack
from megatron_speech.errors import InputError


def packed(lengths: list[int], mode: str, seq_length: int, open_sequences: int = 4) -> SegmentTable:
    count = len(lengths)
    order = Order(np.arange(count, dtype=np.int32) % 2, np.arange(count, dtype=np.int32))
    return pack(
        order,
        np.array([5, 6]),
        np.array(lengths, dtype=np.int32),
        mode=mode,  # type: ignore[arg-type]
        seq_length=seq_length,
        open_sequences=open_sequences,
    )


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 50))
def test_cut_is_the_stream_of_documents_without_gap_or_padding(lengths: list[int], seq_length: int) -> None:
    table = packed(lengths, "cut", seq_length)
    per_sequence = np.add.reduceat(table.length, table.seq_ptr[:-1])
    assert (per_sequence[:-1] == seq_length).all()
    stream = [(k, i) for k, length in enumerate(lengths) for i in range(length)]
    found = [
        (int(document), int(start) + i)
        for document, start, length in zip(table.document, table.start, table.length, strict=True)
        for i in range(length)
    ]
    assert found == stream
    assert (table.dataset == 5 + table.stratum).all()
    assert (table.stratum == table.document % 2).all()


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(50, 120), st.integers(1, 8))
def test_fit_holds_every_document_whole_and_once(lengths: list[int], seq_length: int, open_sequences: int) -> None:
    table = packed(lengths, "fit", seq_length, open_sequences)
    assert sorted(table.document) == list(range(len(lengths)))
    assert (table.start == 0).all()
    assert (table.length == np.array(lengths)[table.document]).all()
    assert (np.add.reduceat(table.length, table.seq_ptr[:-1]) <= seq_length).all()


def test_the_first_sequences_of_a_table_are_a_table() -> None:
    table = packed([7, 8, 9, 10], "cut", 5)
    first = table.first(3)
    assert first.n_sequences == 3
    assert first.length.sum() == 15
    assert table.first(100).n_sequences == table.n_sequences


def example() -> tuple[SegmentTable, dict[str, int]]:
    return packed([3, 4, 5], "cut", 5), {"answer": 42}


def test_a_built_table_is_found_again_memory_mapped_and_not_built_twice(tmp_path: Path) -> None:
    _, content = cached_table(tmp_path / "cache", "k" * 64, example)

    def never() -> tuple[SegmentTable, dict[str, int]]:
        raise AssertionError("built twice")

    found, again = cached_table(tmp_path / "cache", "k" * 64, never)
    assert content == again == {"answer": 42}
    assert isinstance(found.length, np.memmap)
    for name in ("seq_ptr", "stratum", "dataset", "document", "start", "length"):
        assert (getattr(found, name) == getattr(example()[0], name)).all()
    assert not list((tmp_path / "cache").glob(".*tmp"))


def test_an_empty_table_can_be_stored(tmp_path: Path) -> None:
    nothing = np.zeros(0, np.int32)
    table, _ = cached_table(
        tmp_path, "e", lambda: (SegmentTable(np.zeros(1, np.int64), nothing, nothing, nothing, nothing, nothing), {})
    )
    assert table.n_sequences == 0


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> tuple[SegmentTable, dict[str, int]]:
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        cached_table(tmp_path, "k", failing)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("damage", ["truncate", "remove", "key"])
def test_a_damaged_index_is_refused_and_named(tmp_path: Path, damage: str) -> None:
    cached_table(tmp_path, "k", example)
    if damage == "truncate":
        path = tmp_path / "k" / "length.npy"
        path.write_bytes(path.read_bytes()[:-4])
    elif damage == "remove":
        (tmp_path / "k" / "length.npy").unlink()
    else:
        path = tmp_path / "k" / "index.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "key": "other"}))
    with pytest.raises(InputError, match=r"(length\.npy|key is other).* remove the folder"):
        cached_table(tmp_path, "k", example)


def _build_in_process(folder: str) -> int:
    return cached_table(Path(folder), "k", example)[0].n_sequences


def test_two_processes_may_build_the_same_index(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_build_in_process, [str(tmp_path)] * 4) == [3] * 4
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "k"]
