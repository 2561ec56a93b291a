"""Batches of datasets that are staged by the shard: those of whole ones, fetched ahead, without waiting in a circle."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_speech.data.dataset import staging
from megatron_speech.data.dataset.indexed import TokenDataset
from megatron_speech.data.dataset.shard_store import ShardStore
from megatron_speech.data.dataset.shard_table import ABSENT, ShardTable
from megatron_speech.data.dataset.sharded import ShardedTokenDataset
from megatron_speech.data.dataset.staging import check_windows, stage_shards
from megatron_speech.data.loading import gathering
from megatron_speech.data.loading.gathering import Gatherer, Segments
from megatron_speech.data.loading.loader import GlobalBatch
from megatron_speech.data.loading.lookahead import Lookahead, Shard
from megatron_speech.data.sequences.history import blend_spec, find_changes
from megatron_speech.data.stage import StageData, open_datasets
from megatron_speech.errors import InputError
from megatron_speech.recipe.data import DataConfig
from megatron_speech.recipe.stage import StageDataConfig
from megatron_speech.tokens.space import TokenSpace
from megatron_speech.training.health.preflight import dataset_facts

pytestmark = pytest.mark.usefixtures("no_entry_held")
SHARD, S = 4096, 64
WINDOW = {"shards": 2, "shard_mib": SHARD / 2**20}
STAGES: dict[str, dict[str, Any]] = {
    "cut": {},
    "fit": {"packing": {"mode": "fit", "oversize": "drop", "open_sequences": 8}},
    "bucket": {"packing": {"mode": "bucket", "oversize": "drop", "open_sequences": 8}},
    "sft": {"task_mass": {"tts": 1.0}, "loss": {"prompt": 0.0}, "packing": {"oversize": "drop"}},
    "stitched": {"stitch": {"missing": "single"}},
}
TENSORS = ("tokens", "labels", "loss_weights", "position_ids", "group_ids", "cu_seqlens", "row_pointers", "counts")


@pytest.fixture(scope="module")
def datasets(
    tmp_path_factory: pytest.TempPathFactory, toy_space: TokenSpace, make_dataset: Any, document: Any
) -> dict[str, TokenDataset]:
    """Some 60, 30 and 20 KB, in 15, 8 and 5 shards."""
    folder = tmp_path_factory.mktemp("datasets")
    random = np.random.default_rng(0)

    def talk(k: int) -> dict[str, Any]:
        return {"segment_order": k % 4, "start_time": k % 4, "end_time": k % 4 + 1.0, "speaker_id": "ann"}

    speech = [
        document(codes=int(n), language="en" if k % 3 else "hi", source_id=f"talk-{k // 4}", columns=talk(k))
        for k, n in enumerate(random.integers(1, 100, 600))
    ]
    pairs = [
        document(codes=int(n), text=int(n) // 3, source_id=f"recording-{k}", columns=talk(k))
        for k, n in enumerate(random.integers(5, 45, 400))
    ]
    text = [document(text=int(n), language="am", source="books") for n in random.integers(1, 70, 250)]
    return {
        name: make_dataset(folder / name, toy_space, task, documents, seed=seed)
        for seed, (name, task, documents) in enumerate(
            [("speech", "speech_lm", speech), ("pairs", "tts", pairs), ("text", "text_lm", text)]
        )
    }


def gib_of(datasets: dict[str, TokenDataset], size: float) -> float:
    """A `cache_gib` with room for `size` bytes of shards."""
    beside = [
        Path(f"{dataset.prefix}{suffix}").stat().st_size
        for dataset in datasets.values()
        for suffix in (".idx", ".docs.parquet", ".manifest.json")
    ]
    return (sum(beside) + size) / 2**30


def by_shard(datasets: dict[str, TokenDataset], cache: Path, size: float) -> dict[str, ShardedTokenDataset]:
    prefixes = {name: dataset.prefix for name, dataset in datasets.items()}
    stores = stage_shards(prefixes, cache, gib_of(datasets, size), shard_bytes=SHARD)
    return {name: ShardedTokenDataset(store) for name, store in stores.items()}


def open_stage(
    datasets: Any, space: TokenSpace, folder: Path, *, workers: int = 1, split: Any = "train", **fields: Any
) -> StageData:
    stage = StageDataConfig(
        **{
            "name": "s", "task_mass": {"speech_lm": 0.6, "tts": 0.3, "text_lm": 0.1}, "tokens": S * 40 * 24,
            "seq_length": S, "global_batch_tokens": S * 40, "max_epochs": 1e9, "shuffle_window": WINDOW,
        }
        | fields
    )  # fmt: skip
    prefixes = {name: dataset.prefix for name, dataset in datasets.items()}
    data = DataConfig(datasets=prefixes, validation_fraction=0.2, workers=workers)
    return StageData(stage, data, datasets, space, seed=3, cache_dir=folder / "indices", split=split)


def load(stage: StageData, rank: int = 0, size: int = 1, start: int = 0) -> list[GlobalBatch]:
    with stage.loader(start, 4, stage.stage.global_batch_sequences, rank, size) as loader:
        return list(loader)


def assert_same(found: list[GlobalBatch], expected: list[GlobalBatch]) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.consumed_sequences == other.consumed_sequences
        np.testing.assert_array_equal(one.loss_totals, other.loss_totals)
        for a, b in zip(one.micro_batches, other.micro_batches, strict=True):
            assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in TENSORS)
            np.testing.assert_array_equal(a.documents, b.documents)


def fetched(datasets: dict[str, ShardedTokenDataset]) -> int:
    return sum(dataset.shards.statistics.fetched_bytes for dataset in datasets.values())


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("workers", [1, 3])
def test_batches_of_a_cache_smaller_than_the_dataset_are_those_of_whole_ones(
    datasets: dict[str, TokenDataset], toy_space: TokenSpace, tmp_path: Path, name: str, workers: int,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO)
    whole = open_stage(datasets, toy_space, tmp_path, **STAGES[name])
    size = 12 * SHARD
    staged = by_shard(datasets, tmp_path / "cache", size)
    assert sum(dataset.shards.size for dataset in staged.values()) > 1.9 * size
    stage = open_stage(staged, toy_space, tmp_path, workers=workers, **STAGES[name])
    assert stage.key == whole.key
    assert_same(load(stage), load(whole))
    assert sum(ShardTable(one.shards.entry).bytes_taken() for one in staged.values()) <= size
    if name != "sft":
        assert fetched(staged) > size  # some made room for others
        shards = staged["speech"].shards.statistics.fetched
        assert any(f"speech.bin: {shards} shards fetched (0.00 GiB)" in message for message in caplog.messages)
    # From the middle on, as one of two ranks, with nothing there yet.
    later = whole.stage.global_batch_sequences * 5
    assert_same(load(stage, 1, 2, later), load(whole, 1, 2, later))


def test_batches_are_the_same_without_a_compiler(
    datasets: dict[str, TokenDataset], toy_space: TokenSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load(open_stage(datasets, toy_space, tmp_path))
    monkeypatch.setattr(gathering, "extension", lambda: None)
    assert_same(load(open_stage(by_shard(datasets, tmp_path / "cache", 12 * SHARD), toy_space, tmp_path)), expected)


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("compiled", [True, False])
def test_segments_are_gathered_as_from_whole_files(
    toy_space: TokenSpace, tmp_path: Path, make_dataset: Any, document: Any, monkeypatch: pytest.MonkeyPatch,
    streams: int, compiled: bool,
) -> None:  # fmt: skip
    random = np.random.default_rng(1)
    # A document of n codes has an even number of ids where n is even.
    parity = len(make_dataset(tmp_path / "one", toy_space, "speech_lm", [document(codes=2)]).tokens) % 2
    whole = {
        name: make_dataset(
            tmp_path / name, toy_space, "speech_lm",
            [document(codes=2 * int(n) + parity) for n in random.integers(20, 80, 150)], seed=seed, streams=streams,
        )
        for seed, name in enumerate("ab")
    }  # fmt: skip
    if not compiled:
        monkeypatch.setattr(gathering, "extension", lambda: None)
    staged = by_shard({"b": whole["b"]}, tmp_path / "cache", 4 * SHARD)
    both = Gatherer([whole["a"], staged["b"]])
    expected = Gatherer(list(whole.values()))
    rows, width = 30, 200
    for strided in (False, True):
        dataset, document_number = random.integers(0, 2, rows * 2), random.integers(0, 150, rows * 2)
        lengths = np.array([whole["ab"[k]].lengths[d] for k, d in zip(dataset, document_number, strict=True)])
        start = random.integers(0, lengths // 2)
        length = np.minimum(lengths - start, random.integers(0, width // 2 + 1, rows * 2))
        length[::7] = 0
        columns = [np.ascontiguousarray(column, np.int32) for column in (dataset, document_number, start, length)]
        strides = np.full(rows, width // 2, np.int32) if strided else None
        segments = Segments(*columns, np.arange(0, 2 * rows + 1, 2, dtype=np.int32), strides)
        for found, one in zip(both.gather(segments, width, 7), expected.gather(segments, width, 7), strict=True):
            np.testing.assert_array_equal(found, one, strict=True)
        beyond = segments._replace(document=np.where(np.arange(2 * rows) == 9, 150, segments.document).astype(np.int32))
        for gatherer in (both, expected):
            with pytest.raises(InputError, match=r"of document 150 are asked for by the sequence index, but"):
                gatherer.gather(beyond, width, 7)


def test_a_window_reads_each_shard_about_once_an_epoch_where_a_uniform_order_reads_it_all_the_time(
    datasets: dict[str, TokenDataset], toy_space: TokenSpace, tmp_path: Path
) -> None:
    speech = {"speech": datasets["speech"]}
    read = {}
    for window in (True, False):
        staged = by_shard(speech, tmp_path / f"cache-{window}", 8 * SHARD)
        fields: dict[str, Any] = {"task_mass": {"speech_lm": 1.0}, "shuffle_window": WINDOW if window else None}
        stage = open_stage(staged, toy_space, tmp_path, **fields, tokens=S * 40 * 10)  # less than an epoch
        load(stage)
        read[window] = fetched(staged)
    assert read[True] <= 2 * Path(f"{datasets['speech'].prefix}.bin").stat().st_size  # by each of two strata
    assert read[False] > 3 * read[True]


def test_validation_reads_its_documents_in_place_and_once(
    datasets: dict[str, TokenDataset], toy_space: TokenSpace, tmp_path: Path
) -> None:
    prefixes = {}
    for name, dataset in datasets.items():
        prefixes[name] = str(tmp_path / name)
        for suffix in (".bin", ".idx", ".docs.parquet", ".manifest.json"):
            Path(f"{tmp_path / name}{suffix}").write_bytes(Path(f"{dataset.prefix}{suffix}").read_bytes())
    moved = {name: TokenDataset(prefix) for name, prefix in prefixes.items()}
    expected = load(open_stage(datasets, toy_space, tmp_path, split="validation"))
    staged = by_shard(moved, tmp_path / "cache", 12 * SHARD)
    stage = open_stage(staged, toy_space, tmp_path, split="validation")
    assert_same(load(stage), expected)
    assert fetched(staged) == 0
    for prefix in prefixes.values():
        Path(f"{prefix}.bin").unlink()
    assert_same(load(stage), expected)


def test_what_goes_wrong_with_a_source_reaches_the_step(
    datasets: dict[str, TokenDataset], toy_space: TokenSpace, tmp_path: Path, make_dataset: Any, document: Any
) -> None:
    lost = make_dataset(tmp_path / "lost", toy_space, "speech_lm", [document(codes=90)] * 200)
    staged = by_shard({"lost": lost}, tmp_path / "cache", 6 * SHARD)
    stage = open_stage(staged, toy_space, tmp_path, task_mass={"speech_lm": 1.0})
    Path(f"{lost.prefix}.bin").unlink()
    with pytest.raises(InputError, match=r"lost\.bin cannot be read"):
        load(stage)


def test_a_dataset_that_has_grown_is_known_again(
    datasets: dict[str, TokenDataset], toy_space: TokenSpace, tmp_path: Path, make_dataset: Any, document: Any
) -> None:
    documents = [document(codes=codes) for codes in range(20, 80)]
    before = make_dataset(tmp_path / "before", toy_space, "speech_lm", documents[:40])
    grown = make_dataset(tmp_path / "grown", toy_space, "speech_lm", documents)
    staged = by_shard({"d": grown}, tmp_path / "cache", 4 * SHARD)
    stage = StageDataConfig(
        name="s", task_mass={"speech_lm": 1}, tokens=S, seq_length=S, global_batch_tokens=S, shuffle_window=WINDOW
    )
    data = DataConfig(datasets={"d": "d"})
    specs = [blend_spec(stage, data, {"d": one}, 0) for one in (before, staged["d"])]
    assert find_changes(*specs, staged) == ["dataset d grown (40 → 60 documents)"]
    with pytest.raises(InputError, match="its documents are not those that the run began with"):
        find_changes(blend_spec(stage, data, {"d": datasets["speech"]}, 0), specs[1], staged)


def test_ranks_compare_what_they_read_as_if_it_were_whole(datasets: dict[str, TokenDataset], tmp_path: Path) -> None:
    staged = by_shard(datasets, tmp_path / "cache", 12 * SHARD)["speech"]
    whole = {name.partition(".")[2]: fact for name, fact in dataset_facts(datasets["speech"]).items()}
    assert {name.partition(".")[2]: fact for name, fact in dataset_facts(staged).items()} == whole


# ---- looking ahead


@pytest.fixture
def store(datasets: dict[str, TokenDataset], tmp_path: Path) -> ShardStore:
    return by_shard({"speech": datasets["speech"]}, tmp_path / "cache", 8 * SHARD)["speech"].shards


def looking(store: ShardStore, chunks: list[list[int]], limit: float) -> Lookahead:
    def shards_of(chunk: int) -> list[Shard]:
        return [(store, shard) for shard in chunks[chunk]]

    return Lookahead(len(chunks), shards_of, store.wants_room, int(limit))


def holds(ahead: Lookahead, *shards: int) -> bool:
    """Waits until exactly these shards are held."""
    with ahead._changed:
        return ahead._changed.wait_for(lambda: {shard for _, shard in ahead._held} == {*shards}, timeout=60)


def test_shards_are_fetched_ahead_and_let_go_when_the_last_chunk_that_needs_them_has_passed(store: ShardStore) -> None:
    with looking(store, [[0, 1], [1], [2], [0, 3]], 100 * SHARD) as ahead:
        assert holds(ahead, 0, 1, 2, 3)
        assert store.statistics.fetched == 4
        ahead.passed()
        assert holds(ahead, 0, 1, 2, 3)
        ahead.passed()
        assert holds(ahead, 0, 2, 3)
        ahead.passed()
        assert holds(ahead, 0, 3)
    assert not store._pins


def test_no_more_is_held_ahead_than_there_is_room_for(store: ShardStore) -> None:
    limit = sum(map(store.shard_bytes, (0, 1, 2)))
    with looking(store, [[0], [1], [2], [3], [4]], limit) as ahead:
        assert holds(ahead, 0, 1, 2)
        ahead.passed()
        ahead.passed()
        room = limit - sum(map(store.shard_bytes, (2, 3)))
        assert room >= 0 and holds(ahead, *((2, 3, 4) if store.shard_bytes(4) <= room else (2, 3)))


def test_what_is_held_ahead_is_let_go_when_somebody_finds_no_room(store: ShardStore) -> None:
    sizes = np.diff(store.bounds)
    fit = int(np.searchsorted(np.cumsum(sizes), 8 * SHARD, side="right"))
    with looking(store, [[shard] for shard in range(12)], 100 * SHARD) as ahead:
        assert holds(ahead, *range(fit))
        store.pin(fit)  # for which there is no room, until it asks for some
        assert ABSENT in ShardTable(store.entry).records["state"][:fit].tolist()
        store.unpin(fit)


def test_nothing_stays_held_when_a_source_cannot_be_read_ahead(
    toy_space: TokenSpace, tmp_path: Path, make_dataset: Any, document: Any
) -> None:
    lost = make_dataset(tmp_path / "lost", toy_space, "speech_lm", [document(codes=90)] * 200)
    store = by_shard({"lost": lost}, tmp_path / "cache", 100 * SHARD)["lost"].shards
    store.pin(0)
    Path(f"{lost.prefix}.bin").unlink()
    with looking(store, [[0], [1]], 100 * SHARD) as ahead:
        ahead._thread.join(60)
        assert not ahead._thread.is_alive() and holds(ahead)
        assert store._pins == {0: 1}
        ahead.passed()


@pytest.mark.slow
def test_ranks_in_step_with_hardly_any_room_do_not_wait_for_one_another_in_a_circle(
    datasets: dict[str, TokenDataset], toy_space: TokenSpace, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"tokens": S * 40 * 4}
    whole = open_stage(datasets, toy_space, tmp_path, **fields)
    # Each with files, and so with locks, of its own, as of another process.
    ranks = [by_shard(datasets, tmp_path / "cache", 3 * SHARD) for _ in range(2)]
    loaders = [
        open_stage(staged, toy_space, tmp_path, **fields).loader(0, 4, 40, rank, 2) for rank, staged in enumerate(ranks)
    ]
    steps = list(zip(*loaders, strict=True))
    for rank in range(2):
        assert_same([step[rank] for step in steps], load(whole, rank, 2))


# ---- refusals


def windows(datasets: dict[str, TokenDataset], cache_gib: float, window: Any, strata: int = 2) -> None:
    stage = StageDataConfig(
        name="s", task_mass={"speech_lm": 1}, tokens=S, seq_length=S, global_batch_tokens=S, shuffle_window=window
    )
    data = DataConfig(
        datasets={"speech": "d"}, stage_datasets="shards", cache_dir="c", cache_gib=cache_gib, validation_fraction=0
    )
    check_windows(stage, data, {"speech": datasets["speech"]}, ["speech"] * strata)


def test_windows_that_the_cache_cannot_hold_are_refused_with_numbers(
    datasets: dict[str, TokenDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "_SHARD_BYTES", SHARD)
    speech = {"speech": datasets["speech"]}
    size = Path(f"{datasets['speech'].prefix}.bin").stat().st_size
    room = gib_of(speech, 9.9 * SHARD)
    windows(datasets, room, {"shards": 4, "shard_mib": SHARD / 2**20})
    with pytest.raises(
        InputError, match=r"of its 2 strata, 6 shards of .* are .* stages\.s\.shuffle_window\.shards to 4$"
    ):
        windows(datasets, room, {"shards": 6, "shard_mib": SHARD / 2**20})
    with pytest.raises(InputError, match=r"raise data.cache_gib$"):
        windows(datasets, room, {"shards": 6, "shard_mib": 5 * SHARD / 2**20})
    with pytest.raises(InputError, match=r"all of its datasets at once, .*; set stages.s.shuffle_window, or raise"):
        windows(datasets, room, None)
    windows(datasets, gib_of(speech, size + 2 * SHARD), {"shards": 1000, "shard_mib": 1000})
    windows(datasets, gib_of(speech, size + 2 * SHARD), None)


def test_the_recipe_of_shards_names_how_much_they_may_take() -> None:
    with pytest.raises(ValueError, match="stage_datasets: shards needs cache_gib"):
        DataConfig(datasets=["d"], cache_dir="c", stage_datasets="shards")
    with pytest.raises(ValueError, match="needs cache_dir"):
        DataConfig(datasets=["d"], cache_gib=1, stage_datasets="shards")


def test_the_recipe_opens_datasets_by_the_shard(
    datasets: dict[str, TokenDataset], toy_space: TokenSpace, tmp_path: Path
) -> None:
    data = DataConfig(
        datasets={"speech": datasets["speech"].prefix}, cache_dir=str(tmp_path), cache_gib=1.0, stage_datasets="shards"
    )
    staged = open_datasets(data, toy_space)["speech"]
    assert isinstance(staged, ShardedTokenDataset)
    np.testing.assert_array_equal(staged.document(5), datasets["speech"].document(5))
    assert not isinstance(open_datasets(data, toy_space, in_place=True)["speech"], type(staged))
