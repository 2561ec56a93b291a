"""The segment table: cut runs on without gaps, fit never splits, and the cache is keyed by content."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_speech.data.blend import order as ordering
from megatron_speech.data.blend.order import BlendOrder, OrderedDocuments, StratumDocuments
from megatron_speech.data.sequences.index_cache import TableWriter, cached_table, verify_table
from megatron_speech.data.sequences.packing import PackedRun, pack
from megatron_speech.errors import InputError
from megatron_speech.files import canonical_json, sha256_hex

MODES = ["cut", "fit", "bucket"]


class Listed:
    """An order that ends: documents of these lengths, one after the other."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = np.array(lengths, dtype=np.int32)
        self.at = 0

    def take(self, count: int) -> OrderedDocuments:
        number = np.arange(self.at, min(self.at + count, len(self.lengths)), dtype=np.int32)
        self.at += len(number)
        length = self.lengths[number]
        return OrderedDocuments((number % 2).astype(np.uint16), number, length, length, length.astype(np.float32))


def targets(documents: OrderedDocuments) -> np.ndarray:
    return documents.length // 2


def runs_of(
    order: object, mode: str, seq_length: int, *, open_sequences: int = 4, **options: object
) -> list[PackedRun]:
    return list(
        pack(
            order,  # type: ignore[arg-type]
            mode=mode,  # type: ignore[arg-type]
            seq_length=seq_length,
            open_sequences=open_sequences,
            targets_of=targets,
            **options,  # type: ignore[arg-type]
        )
    )


def columns(runs: list[PackedRun]) -> dict[str, np.ndarray]:
    """The table of some runs."""
    before = np.cumsum([0, *(len(run.length) for run in runs)])
    ends = [run.seq_ends + begin for run, begin in zip(runs, before[:-1], strict=True)]
    return {
        "seq_ptr": np.concatenate([[0], *ends]),
        "stratum": np.concatenate([run.documents.stratum[run.position] for run in runs]),
        "document": np.concatenate([run.documents.document[run.position] for run in runs]),
        "start": np.concatenate([run.start for run in runs]),
        "length": np.concatenate([run.length for run in runs]),
    }


def packed(lengths: list[int], mode: str, seq_length: int, **options: object) -> dict[str, np.ndarray]:
    return columns(runs_of(Listed(lengths), mode, seq_length, **options))


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 50), st.integers(1, 9))
def test_cut_is_the_stream_of_documents_without_gap_or_padding(lengths: list[int], seq_length: int, piece: int) -> None:
    table = packed(lengths, "cut", seq_length, piece=piece)
    per_sequence = np.add.reduceat(table["length"], table["seq_ptr"][:-1])
    assert (per_sequence[:-1] == seq_length).all()
    assert table["seq_ptr"][-1] == len(table["length"])
    stream = [(k, i) for k, length in enumerate(lengths) for i in range(length)]
    found = [
        (document, start + i)
        for document, start, length in zip(
            table["document"].tolist(), table["start"].tolist(), table["length"].tolist(), strict=True
        )
        for i in range(length)
    ]
    assert found == stream
    assert (table["stratum"] == table["document"] % 2).all()


@pytest.mark.parametrize("mode", ["fit", "bucket"])
@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(50, 120), st.integers(1, 8))
def test_fit_and_bucket_hold_every_document_whole_and_once(
    mode: str, lengths: list[int], seq_length: int, open_sequences: int
) -> None:
    table = packed(lengths, mode, seq_length, open_sequences=open_sequences, piece=7)
    assert sorted(table["document"]) == list(range(len(lengths)))
    assert (table["start"] == 0).all()
    assert (table["length"] == np.array(lengths)[table["document"]]).all()
    assert table["seq_ptr"][-1] == len(lengths)
    if mode == "fit":
        assert (np.add.reduceat(table["length"], table["seq_ptr"][:-1]) <= seq_length).all()
    else:
        longest = np.maximum.reduceat(table["length"], table["seq_ptr"][:-1])
        assert (longest * np.diff(table["seq_ptr"]) <= seq_length).all()


@pytest.mark.parametrize("mode", MODES)
@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=80), st.integers(1, 30), st.integers(1, 90))
def test_the_table_does_not_depend_on_how_many_documents_are_taken_at_a_time(
    mode: str, lengths: list[int], piece: int, other: int
) -> None:
    expected = packed(lengths, mode, 60, piece=piece)
    for name, column in packed(lengths, mode, 60, piece=other).items():
        np.testing.assert_array_equal(column, expected[name], strict=True)


def endless(seed: int) -> BlendOrder:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 60, 500).astype(np.int32)
    return BlendOrder(
        [
            StratumDocuments(documents, lengths, lengths, lengths.astype(np.float32), share, k)
            for k, (documents, share) in enumerate(
                [(np.arange(200, dtype=np.int32), 0.3), (np.arange(200, 500, dtype=np.int32), 0.7)]
            )
        ]
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [0, 1, 7, 64, 300])
def test_a_longer_budget_prolongs_the_table_and_changes_nothing_in_it(mode: str, count: int) -> None:
    options = {"open_sequences": 8, "piece": 97}
    long = columns(runs_of(endless(0), mode, 64, n_sequences=300, **options))  # type: ignore[arg-type]
    short = columns(runs_of(endless(0), mode, 64, n_sequences=count, **options))  # type: ignore[arg-type]
    assert len(long["seq_ptr"]) == 301 and len(short["seq_ptr"]) == count + 1
    for name, column in short.items():
        np.testing.assert_array_equal(column, long[name][: len(column)])
    if count:
        assert len(short["length"]) == short["seq_ptr"][-1]


@pytest.mark.parametrize("mode", ["fit", "bucket"])
@pytest.mark.parametrize("count", [20, 100, 1000])
def test_a_window_moves_documents_about_by_a_small_part_of_what_lies_before_them(mode: str, count: int) -> None:
    lengths = np.random.default_rng(2).integers(1, 40, 20_000).tolist()
    table = columns(runs_of(Listed(lengths), mode, 64, n_sequences=count, open_sequences=1 << 20))
    # However short the stage: of the documents that the order begins with, few are left for later.
    documents = np.sort(table["document"])
    missing = documents[-1] + 1 - len(documents)
    assert missing <= max(16, count // 8) * 64 / np.mean(lengths) * 1.3
    if mode == "fit":
        assert table["length"].sum() / (count * 64) > 0.95


@pytest.mark.parametrize("mode", MODES)
def test_the_table_is_the_same_without_a_compiler(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_speech.data.sequences import bucketing, packing_kernels

    expected = columns(runs_of(endless(1), mode, 64, n_sequences=100, open_sequences=8))
    for module in (ordering, packing_kernels, bucketing):
        monkeypatch.setattr(module, "extension", lambda: None)
    found = columns(runs_of(endless(1), mode, 64, n_sequences=100, open_sequences=8))
    for name, column in expected.items():
        np.testing.assert_array_equal(found[name], column, strict=True)


def test_a_document_that_does_not_fit_is_the_callers_mistake() -> None:
    for mode in ("fit", "bucket"):
        with pytest.raises(ValueError, match="1 documents of the order are longer than 10 tokens"):
            packed([3, 11], mode, 10)


# ---- the cache


def example(writer: TableWriter) -> tuple[list[int], dict[str, int]]:
    for run in runs_of(Listed([3, 4, 5]), "cut", 5, piece=2):
        stratum, document = run.documents.stratum[run.position], run.documents.document[run.position]
        writer.append(run.seq_ends, stratum=stratum, document=document, start=run.start, length=run.length)
    return [5, 6], {"answer": 42}


def test_a_built_table_is_found_again_memory_mapped_and_not_built_twice(tmp_path: Path) -> None:
    _, content = cached_table(tmp_path / "cache", "k" * 64, example)

    def never(writer: TableWriter) -> tuple[list[int], dict[str, int]]:
        raise AssertionError("built twice")

    found, again = cached_table(tmp_path / "cache", "k" * 64, never)
    assert content == again == {"answer": 42}
    assert isinstance(found.length, np.memmap)
    for name, column in packed([3, 4, 5], "cut", 5).items():
        assert (getattr(found, name) == column).all()
    assert found.dataset_of(slice(None)).tolist() == [5, 6, 6, 5, 5]
    assert found.dataset_of(np.array([3, 1])).tolist() == [5, 6]
    assert found.joined is None
    assert not list((tmp_path / "cache").glob(".*tmp"))
    for path in (tmp_path / "cache" / ("k" * 64)).glob("*.npy"):
        assert len(np.load(path)), path  # plain files that NumPy reads


def test_a_table_of_stitched_documents_says_what_goes_on(tmp_path: Path) -> None:
    def stitched(writer: TableWriter) -> tuple[list[int], dict[str, int]]:
        two = np.array([0, 1])
        writer.append(np.array([2]), stratum=two * 0, document=two, start=two * 0, length=two + 3, joined=two)
        return [0], {}

    table, _ = cached_table(tmp_path, "k", stitched, joined=True)
    assert table.joined is not None and table.joined.dtype == np.uint8 and table.joined.tolist() == [0, 1]


def test_an_empty_table_can_be_stored(tmp_path: Path) -> None:
    table, _ = cached_table(tmp_path, "e", lambda writer: ([], {}))
    assert table.n_sequences == 0
    assert len(table.dataset_of(slice(None))) == 0


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def failing(writer: TableWriter) -> tuple[list[int], dict[str, int]]:
        example(writer)
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        cached_table(tmp_path, "k", failing)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_full_disk_is_a_sentence_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: TableWriter) -> dict[str, object]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TableWriter, "finish", full)
    with pytest.raises(InputError, match=r"No space left on device; name a data\.cache_dir with room"):
        cached_table(tmp_path, "k", example)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def damage(folder: Path, how: str) -> None:
    path = folder / "length.npy"
    if how == "truncate":
        path.write_bytes(path.read_bytes()[:-4])
    elif how == "append":
        path.write_bytes(path.read_bytes() + b"\0\0\0\0")
    elif how == "remove":
        path.unlink()
    elif how == "ends":
        pointers = np.load(folder / "seq_ptr.npy")
        pointers[-1] += 1
        np.save(folder / "seq_ptr.npy", pointers)
    else:
        path = folder / "index.json"
        description = {**json.loads(path.read_text()), **json.loads(how)}
        if "content" not in how:  # one that says so of itself
            del description["checksum"]
            description["checksum"] = sha256_hex(canonical_json(description))
        path.write_text(json.dumps(description))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncate", r"length\.npy"),
        ("append", r"length\.npy holds int32 \[5\] in 152 bytes, needed int32 \[5\] in 148"),
        ("remove", r"length\.npy cannot be read"),
        ("ends", r"seq_ptr\.npy runs from 0 to 6, needed 0 to 5"),
        ('{"key": "other"}', "key is other"),
        ('{"version": 1}', "version is 1"),
        ('{"sizes": {"length": 5}}', "not those of a table"),
        ('{"sizes": null}', "is not a description of an index"),
        ('{"content": {"answer": 43}}', "is not what was written with the index: it is damaged"),
    ],
)
def test_a_damaged_index_is_refused_and_named(tmp_path: Path, how: str, message: str) -> None:
    cached_table(tmp_path, "k", example)
    damage(tmp_path / "k", how)
    with pytest.raises(InputError, match=message + ".*; remove the folder"):
        cached_table(tmp_path, "k", example)


@pytest.mark.parametrize("name", ["seq_ptr", "stratum", "document", "start", "length"])
def test_a_flipped_bit_is_found_when_asked_for(tmp_path: Path, name: str) -> None:
    cached_table(tmp_path, "k", example)
    assert set(verify_table(tmp_path / "k")) == {"seq_ptr", "stratum", "document", "start", "length"}
    path = tmp_path / "k" / f"{name}.npy"
    data = bytearray(path.read_bytes())
    data[128 + 4] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=rf"{name}\.npy: SHA-256 .* it is damaged; remove the folder"):
        verify_table(tmp_path / "k")


def _killed_while_building(folder: str) -> None:
    def build(writer: TableWriter) -> tuple[list[int], dict[str, int]]:
        example(writer)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("still there")

    cached_table(Path(folder), "k", build)


def test_a_killed_build_leaves_nothing_that_the_next_one_does_not_remove(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_killed_while_building, args=(str(tmp_path),))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "k").exists()
    assert len(list(tmp_path.iterdir())) == 2  # the lock, and what it had written
    of_another_machine = tmp_path / ".0123.00000000.tmp"
    of_another_machine.mkdir()
    assert cached_table(tmp_path, "k", example)[0].n_sequences == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [of_another_machine.name, ".lock", "k"]


def _build_in_process(folder: str) -> int:
    return cached_table(Path(folder), "k", example)[0].n_sequences


def test_two_processes_may_build_the_same_index(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_build_in_process, [str(tmp_path)] * 4) == [3] * 4
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "k"]
