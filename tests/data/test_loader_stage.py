"""The loader: batches are a pure function of the position, whatever the layout, and errors reach the consumer."""

from __future__ import annotations

import gc
import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_speech.data.dataset.indexed import TokenDataset
from megatron_speech.data.loading.loader import GlobalBatch, MicroBatch, StageLoader
from megatron_speech.data.sequences import history, index_build
from megatron_speech.data.stage import StageData, open_datasets, save_blend
from megatron_speech.errors import InputError
from megatron_speech.files import read_json
from megatron_speech.recipe.data import DataConfig
from megatron_speech.recipe.stage import StageDataConfig
from megatron_speech.tokens.space import MODALITY_AUDIO, CodecDescription, TokenSpace

S = 48  # seq_length


@pytest.fixture(scope="session")
def datasets(
    tmp_path_factory: pytest.TempPathFactory, toy_space: TokenSpace, make_dataset: Any, document: Any
) -> dict[str, TokenDataset]:
    folder = tmp_path_factory.mktemp("datasets")
    random = np.random.default_rng(0)
    speech = [
        document(codes=int(n), language="en" if k % 3 else "hi", source_id=f"recording-{k // 2}")
        for k, n in enumerate(random.integers(0, 120, 90))
    ]
    pairs = [
        document(codes=int(n), text=int(n) // 3, source_id=f"recording-{k}") for k, n in enumerate([20, 9, 30] * 25)
    ]
    text = [
        document(text=int(n), language="am", source="books", source_id=f"book-{n}") for n in random.integers(1, 40, 60)
    ]
    return {
        name: make_dataset(folder / name, toy_space, task, documents, seed=seed)
        for seed, (name, task, documents) in enumerate(
            [("speech", "speech_lm", speech), ("pairs", "tts", pairs), ("text", "text_lm", text)]
        )
    }


def data_config(datasets: dict[str, TokenDataset], **fields: Any) -> DataConfig:
    return DataConfig(datasets={name: dataset.prefix for name, dataset in datasets.items()}, **fields)


PT: dict[str, Any] = {
    "name": "pt",
    "task_mass": {"speech_lm": 0.6, "tts": 0.3, "text_lm": 0.1},
    "tokens": S * 24 * 4,
    "seq_length": S,
    "global_batch_tokens": S * 24,
}
SFT: dict[str, Any] = {**PT, "name": "sft", "task_mass": {"tts": 1.0}, "loss": {"prompt": 0.0}, "tokens": S * 24 * 2}


@pytest.fixture(scope="session")
def open_stage(
    datasets: dict[str, TokenDataset], toy_space: TokenSpace, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., StageData]:
    cache = tmp_path_factory.mktemp("cache")

    def build(fields: dict[str, Any], data: dict[str, Any] | None = None, **options: Any) -> StageData:
        config = data_config(datasets, **({"validation_fraction": 0.2} | (data or {})))
        arguments = {"seed": 5, "cache_dir": cache} | options
        return StageData(StageDataConfig(**fields), config, datasets, toy_space, **arguments)

    return build


TENSORS = ("tokens", "labels", "loss_weights", "position_ids", "group_ids")


def rows_of(batches: list[GlobalBatch]) -> dict[int, dict[str, torch.Tensor]]:
    """Sequence number → its row of every tensor."""
    found: dict[int, dict[str, torch.Tensor]] = {}
    for batch in batches:
        for micro in batch.micro_batches:
            for row, sequence in enumerate(micro.sequences.tolist()):
                assert sequence not in found
                found[sequence] = {name: getattr(micro, name)[row] for name in TENSORS}
    return found


def load(stage: StageData, start: int = 0, mbs: int = 4, rank: int = 0, size: int = 1) -> list[GlobalBatch]:
    with stage.loader(start, mbs, stage.stage.global_batch_sequences, rank, size) as loader:
        return list(loader)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in TENSORS)


def naive_row(stage: StageData, sequence: int) -> dict[str, list[int | float]]:
    """One sequence token by token, in plain Python."""
    table, loss, space = stage.table, stage.stage.loss, stage.space
    modality = space.modality_table()
    row: dict[str, list[int | float]] = {name: [] for name in TENSORS}
    for k in range(int(table.seq_ptr[sequence]), int(table.seq_ptr[sequence + 1])):
        dataset = list(stage.datasets.values())[table.dataset_of(k)]
        ids = dataset.document(int(table.document[k])).astype(int).tolist()
        start, length = int(table.start[k]), int(table.length[k])
        ends = [i for i, token in enumerate(ids) if token == space.special("<speech_start>")]
        prompt_end = ends[0] if ends else len(ids)
        columns = dataset.columns("language", "dataset_source", "task").slice(int(table.document[k]), 1).to_pylist()[0]
        group = stage.groups.index((columns["task"], columns["language"], columns["dataset_source"]))
        for i in range(start, start + length):
            row["tokens"].append(ids[i])
            row["position_ids"].append(i - start)
            weight = 0.0
            if i + 1 < len(ids):
                weight = (loss.text, loss.audio, loss.special)[modality[ids[i + 1]]]
                if i + 1 <= prompt_end and columns["task"] != "text_lm":
                    weight *= loss.prompt
            row["loss_weights"].append(weight)
            row["labels"].append(ids[i + 1] if weight else -100)
            row["group_ids"].append(group * 3 + int(modality[ids[i + 1]]) if weight else -1)
    used = len(row["tokens"])
    for i in range(used, stage.stage.seq_length):
        for name, value in zip(TENSORS, (space.special("<pad>"), -100, 0.0, i - used, -1), strict=True):
            row[name].append(value)
    return row


@pytest.mark.parametrize(
    "fields",
    [
        PT,
        {**PT, "name": "weighted", "loss": {"text": 0.25, "audio": 0.75, "special": 0.0}},
        {**SFT, "name": "prompted", "loss": {"text": 0.25, "audio": 0.75, "prompt": 0.5}},
        {**PT, "name": "fit", "packing": {"mode": "fit", "oversize": "drop"}},
        SFT,
        {**SFT, "name": "mixed", "task_mass": {"tts": 0.7, "text_lm": 0.3}, "allow_text_in_sft": True},
    ],
    ids=lambda fields: fields["name"],
)
def test_every_row_equals_a_token_by_token_reference(
    open_stage: Callable[..., StageData], fields: dict[str, Any]
) -> None:
    stage = open_stage(fields)
    batches = load(stage)
    rows = rows_of(batches)
    assert sorted(rows) == list(range(stage.n_sequences)) == list(range(stage.stage.n_sequences))
    for sequence, row in rows.items():
        for name, expected in naive_row(stage, sequence).items():
            assert row[name].tolist() == expected, (sequence, name)
    for batch in batches:
        counts = sum(micro.counts for micro in batch.micro_batches)
        weights = torch.cat([micro.loss_weights for micro in batch.micro_batches]).double()
        assert batch.loss_totals[0] == pytest.approx([float(weights.sum())])
        assert batch.loss_totals[1] == [int((weights != 0).sum())]
        assert batch.tokens == int(counts[0])
        assert batch.tokens + batch.pad_tokens == stage.stage.global_batch_tokens
        assert int(counts[2]) == int((weights != 0).sum())
        for micro in batch.micro_batches:
            assert_segments_are_documents(stage, micro)


def assert_segments_are_documents(stage: StageData, micro: MicroBatch) -> None:
    edges = micro.cu_seqlens.tolist()
    assert edges[0] == 0
    assert edges[-1] == micro.tokens.numel()
    assert micro.max_seqlen == max(np.diff(edges))
    starts = {edge for edge in edges[:-1] if edge < edges[-1]}
    assert starts == set(np.flatnonzero(micro.position_ids.ravel().numpy() == 0).tolist())
    documents = stage.table.document[
        stage.table.seq_ptr[micro.sequences[0]] : stage.table.seq_ptr[micro.sequences[-1] + 1]
    ]
    assert micro.documents[:, 1].tolist() == documents.tolist()
    assert len(edges) == len(documents) + len(micro.sequences) + 1


def test_the_look_ahead_makes_every_token_a_label_once_but_for_first_tokens(
    open_stage: Callable[..., StageData],
) -> None:
    stage = open_stage({**PT, "name": "look-ahead"})
    table = stage.table
    labels = sum(int((row["labels"] != -100).sum()) for row in rows_of(load(stage)).values())
    first_tokens = int((table.start == 0).sum())
    last = int(table.start[-1] + table.length[-1])
    goes_on = last < list(stage.datasets.values())[table.dataset_of(-1)].lengths[table.document[-1]]
    begins_inside = int(table.start[0] > 0)
    assert labels == int(table.length.sum()) - first_tokens - begins_inside + int(goes_on)
    assert (table.start > 0).any()


@pytest.mark.parametrize(("mbs", "size"), [(1, 1), (2, 3), (3, 2), (12, 2), (1, 24)])
def test_the_global_batch_is_the_same_for_any_layout(open_stage: Callable[..., StageData], mbs: int, size: int) -> None:
    stage = open_stage(PT)
    whole = load(stage, mbs=24)
    shares = [load(stage, mbs=mbs, rank=rank, size=size) for rank in range(size)]
    for step, batch in enumerate(whole):
        expected = rows_of([batch])
        ranks = [share[step] for share in shares]
        found = rows_of(ranks)
        assert sorted(found) == sorted(expected)
        assert all(same(found[sequence], expected[sequence]) for sequence in expected)
        assert sum(rank.loss_totals for rank in ranks) == pytest.approx(batch.loss_totals)
        assert sum(rank.tokens for rank in ranks) == batch.tokens
        # Micro-batch j over all ranks is one run of sequences.
        for j in range(24 // (mbs * size)):
            together = np.concatenate([rank.micro_batches[j].sequences for rank in ranks])
            assert together.tolist() == list(range(step * 24 + j * mbs * size, step * 24 + (j + 1) * mbs * size))


@pytest.mark.parametrize("start", [0, 24, 40, 72, 96])
def test_starting_at_any_position_gives_the_tail(open_stage: Callable[..., StageData], start: int) -> None:
    stage = open_stage(PT)
    everything, tail = rows_of(load(stage)), rows_of(load(stage, start=start))
    whole_batches = (96 - start) // 24 * 24
    assert sorted(tail) == list(range(start, start + whole_batches))
    assert all(same(everything[sequence], row) for sequence, row in tail.items())
    consumed = [batch.consumed_sequences for batch in load(stage, start=start)]
    assert consumed == list(range(start + 24, start + whole_batches + 1, 24))


def test_a_longer_stage_begins_with_the_shorter_one(open_stage: Callable[..., StageData]) -> None:
    short, long = rows_of(load(open_stage(PT))), rows_of(load(open_stage({**PT, "tokens": 3 * PT["tokens"]})))
    assert all(same(long[sequence], row) for sequence, row in short.items())


def test_sft_documents_are_whole_and_learn_only_what_follows_speech_start(
    open_stage: Callable[..., StageData], toy_space: TokenSpace
) -> None:
    stage = open_stage(SFT)
    modality = toy_space.modality_table()
    end = toy_space.special("<speech_end>")
    for row in rows_of(load(stage)).values():
        labels = row["labels"][row["labels"] != -100].numpy()
        assert ((modality[labels] == MODALITY_AUDIO) | (labels == end)).all()
        documents = (row["tokens"] == toy_space.special("<bos>")).sum()
        assert (labels == end).sum() == documents


# ---- split and validation


def documents_of(stage: StageData) -> set[tuple[int, int]]:
    return set(zip(stage.table.dataset_of(slice(None)).tolist(), stage.table.document.tolist(), strict=True))


@pytest.mark.parametrize("fields", [PT, SFT], ids=["cut", "fit"])
def test_training_never_sees_a_source_that_is_held_out(
    open_stage: Callable[..., StageData], fields: dict[str, Any]
) -> None:
    train, validation = open_stage({**fields, "tokens": S * 24 * 20}), open_stage(fields, split="validation")
    sources = []
    for stage in (train, validation):
        columns = [dataset.columns("source_id")["source_id"].to_pylist() for dataset in stage.datasets.values()]
        sources.append({columns[dataset][document] for dataset, document in documents_of(stage)})
    assert sources[0] and sources[1]
    assert not sources[0] & sources[1]
    assert train.groups == validation.groups


def test_validation_holds_each_held_out_document_once_and_fills_the_last_batch_with_padding(
    open_stage: Callable[..., StageData],
) -> None:
    stage = open_stage(PT, split="validation")
    held_out = sum(stage.table.start == 0)
    assert held_out == len(documents_of(stage))
    assert stage.table.length.sum() == sum(
        list(stage.datasets.values())[dataset].lengths[document] for dataset, document in documents_of(stage)
    )
    with stage.loader(0, 2, 14, 0, 1) as loader:
        batches = list(loader)
    assert len(batches) == -(-stage.n_sequences // 14)
    assert sum(batch.tokens for batch in batches) == stage.table.length.sum()
    beyond = [row for sequence, row in rows_of(batches).items() if sequence >= stage.n_sequences]
    assert len(beyond) == -stage.n_sequences % 14
    assert all((row["labels"] == -100).all() and (row["loss_weights"] == 0).all() for row in beyond)
    assert open_stage(PT, split="validation", n_sequences=3).n_sequences == 3


def test_nothing_held_out_is_an_empty_validation_with_a_warning(open_stage: Callable[..., StageData]) -> None:
    stage = open_stage(PT, {"validation_fraction": 1e-6}, split="validation")
    assert stage.n_sequences == 0
    assert list(stage.loader(0, 2, 4)) == []
    assert "nothing to validate on" in stage.warnings[0]
    assert stage.blend_report()["tokens"] == 0


# ---- the cache's key


def test_the_key_is_the_content_and_not_the_path(
    tmp_path: Path, toy_space: TokenSpace, make_dataset: Any, document: Any
) -> None:
    def key(prefix: Path, codes: int, seed: int = 0, **fields: Any) -> str:
        dataset = make_dataset(prefix, toy_space, "speech_lm", [document(codes=codes)] * 30)
        stage = StageDataConfig(**{**PT, "task_mass": {"speech_lm": 1.0}, **fields})
        data = {"d": dataset}
        return StageData(stage, data_config(data), data, toy_space, seed=seed, cache_dir=tmp_path / "cache").key

    first = key(tmp_path / "a", 20)
    assert key(tmp_path / "b", 20) == first  # elsewhere, same content
    assert key(tmp_path / "a", 20, max_epochs=9.0, loss={"audio": 0.5}) == first  # fields that move no document
    others = [
        key(tmp_path / "a", 21),  # same path, other content
        key(tmp_path / "a", 20, seed=1),
        key(tmp_path / "a", 20, name="other"),
        key(tmp_path / "a", 20, packing={"mode": "fit"}),
        key(tmp_path / "a", 20, tokens=2 * PT["tokens"]),
        key(tmp_path / "a", 20, shuffle_window={"shards": 2, "shard_mib": 0.001}),
        key(tmp_path / "a", 20, shuffle_window={"shards": 3, "shard_mib": 0.001}),
    ]
    assert len({first, *others}) == 8


def test_a_stage_without_a_shuffle_window_has_the_key_that_it_had_before_there_was_one(
    datasets: dict[str, TokenDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Any] = []
    real = index_build.canonical_json
    monkeypatch.setattr(index_build, "canonical_json", lambda value: hashed.append(value) or real(value))
    windows: list[Any] = [None, {"shards": 2}]
    for window, split in itertools.product(windows, ("train", "validation")):
        stage = StageDataConfig(**PT, shuffle_window=window)
        index_build.index_key(stage, data_config(datasets), datasets, split=split, n_sequences=1, seed=0)
    assert ["shuffle_window" in fields["stage"] for fields in hashed] == [False, False, True, False]
    assert (
        "shuffle_window" not in history.blend_spec(StageDataConfig(**PT), data_config(datasets), datasets, 0)["stage"]
    )


# ---- refusals


def test_datasets_of_two_codecs_are_refused_naming_both_files_and_hashes(
    tmp_path: Path, datasets: dict[str, TokenDataset], make_dataset: Any, document: Any, toy_space: TokenSpace
) -> None:
    other = TokenSpace.build("bytes", CodecDescription("toy", "d" * 64, 8000, 25.0, ("codes",), (32,)))
    alien = make_dataset(tmp_path / "alien", other, "tts", [document(codes=3, text=3)])
    config = DataConfig(datasets=[datasets["speech"].prefix, alien.prefix])
    with pytest.raises(InputError) as refusal:
        open_datasets(config, toy_space)
    for word in ("speech.manifest.json", "alien.manifest.json", "codec.hash", "c" * 64):
        assert word in str(refusal.value)
    with pytest.raises(InputError, match=r"alien\.manifest\.json: codec hash"):
        open_datasets(DataConfig(datasets=[alien.prefix]), toy_space)


def test_datasets_of_other_templates_are_refused(
    tmp_path: Path, datasets: dict[str, TokenDataset], make_dataset: Any, document: Any, toy_space: TokenSpace
) -> None:
    old = make_dataset(tmp_path / "old", toy_space, "tts", [document(codes=3, text=3)], template_hash="0" * 64)
    for prefixes in ([datasets["speech"].prefix, old.prefix], [old.prefix]):
        with pytest.raises(InputError, match=r"old.manifest.json: template_hash is 0000.* templates of tts"):
            open_datasets(DataConfig(datasets=prefixes), toy_space)


def test_dataset_names_must_be_unique(tmp_path: Path, toy_space: TokenSpace) -> None:
    with pytest.raises(InputError, match="would both be named 'train'"):
        open_datasets(DataConfig(datasets=["a/train", "b/train"]), toy_space)
    with pytest.raises(InputError, match="datasets is empty"):
        open_datasets(DataConfig(datasets=[]), toy_space)


def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_that_do(open_stage: Callable[..., StageData]) -> None:
    with pytest.raises(InputError, match=r"24 sequences does not divide .* 5 on 2 .* nearest global batches: 20 or 30"):
        open_stage(PT).loader(0, 5, 24, 0, 2)
    with pytest.raises(InputError, match="start_sequence is 97"):
        open_stage(PT).loader(97, 4, 24)


# ---- the background thread


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "megatron-speech-loader"]


def test_an_error_in_the_background_is_raised_by_the_consumer(open_stage: Callable[..., StageData]) -> None:
    def failing() -> Iterator[GlobalBatch]:
        yield from ()
        raise InputError("the disk is gone")

    loader = StageLoader(failing, 2)
    with pytest.raises(InputError, match="the disk is gone"):
        next(loader)
    assert not loader_threads()


def test_batches_made_before_the_error_are_still_delivered(open_stage: Callable[..., StageData]) -> None:
    stage = open_stage(PT)
    good = load(stage)[:2]

    def failing() -> Iterator[GlobalBatch]:
        yield from good
        raise RuntimeError("third")

    loader = StageLoader(failing, 8)
    assert [next(loader), next(loader)] == good
    with pytest.raises(RuntimeError, match="third"):
        next(loader)


@pytest.mark.parametrize("how", ["close", "drop", "exhaust"])
def test_no_thread_is_left_behind(open_stage: Callable[..., StageData], how: str) -> None:
    loader = open_stage(PT).loader(0, 4, 24)
    next(loader)
    if how == "close":
        loader.close()
        loader.close()
        assert list(loader) == []
    elif how == "exhaust":
        assert len(list(loader)) == 3
    del loader
    gc.collect()
    assert not loader_threads()


def test_the_queue_is_bounded(open_stage: Callable[..., StageData]) -> None:
    made = []
    full = threading.Event()

    def counting() -> Iterator[GlobalBatch]:
        for k in range(50):
            made.append(k)
            if k == 3:
                full.set()
            yield k  # type: ignore[misc]

    with StageLoader(counting, 3) as loader:
        assert full.wait(10)  # three are ready and the fourth waits for room
        assert len(made) == 4
        assert next(loader) == 0


# ---- the report


def test_the_report_says_what_was_asked_for_and_what_came_out(
    open_stage: Callable[..., StageData], tmp_path: Path
) -> None:
    stage = open_stage({**PT, "tokens": S * 24 * 40})
    report = stage.blend_report()
    assert report["tokens"] == stage.n_sequences * S == stage.table.length.sum()
    assert report["pad_tokens"] == 0
    assert {task: row["target"] for task, row in report["by_task"].items()} == pytest.approx(PT["task_mass"])
    for task, row in report["by_task"].items():
        assert row["realised"] == pytest.approx(PT["task_mass"][task], abs=0.01)
        tokens = sum(
            stage.table.length[stage.table.dataset_of(slice(None)) == k].sum()
            for k, dataset in enumerate(stage.datasets.values())
            if dataset.manifest is not None and dataset.manifest.task == task
        )
        assert row["tokens"] == tokens
        assert row["epochs"] == pytest.approx(tokens / row["tokens_available"])
    assert set(report["by_language"]) == {"en", "hi", "am"}
    assert report["by_task"]["text_lm"]["audio_seconds"] == 0
    assert sum(row["realised"] for row in report["by_source"].values()) == pytest.approx(1)
    assert "repeated more than 4 epochs" in report["warnings"][0]
    save_blend(tmp_path / "blend.json", [stage])
    assert read_json(tmp_path / "blend.json", "blend")["stages"][0]["by_task"] == report["by_task"]


def test_an_sft_report_counts_target_tokens(open_stage: Callable[..., StageData]) -> None:
    stage = open_stage(SFT)
    learned = sum(int((row["labels"] != -100).sum()) for row in rows_of(load(stage)).values())
    report = stage.blend_report()
    assert report["counted"] == "target_tokens"
    assert report["counted_tokens"] == learned
    assert report["tokens"] + report["pad_tokens"] == stage.n_sequences * S
