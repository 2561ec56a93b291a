"""A stage whose blend changes: over its whole history no document comes again before those that are due."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_speech.data.dataset.indexed import TokenDataset
from megatron_speech.data.sequences.history import Continuation, History, blend_spec, find_changes
from megatron_speech.data.stage import StageData
from megatron_speech.errors import InputError
from megatron_speech.recipe.data import DataConfig
from megatron_speech.recipe.stage import StageDataConfig
from megatron_speech.tokens.space import TokenSpace

BUDGET, WIDTH = 64, 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("history")


@pytest.fixture(scope="module")
def datasets(
    folder: Path, toy_space: TokenSpace, make_dataset: Callable[..., TokenDataset], document: Any
) -> dict[str, TokenDataset]:
    random = np.random.default_rng(3)

    def documents(count: int, longest: int, text: int = 0) -> list[Any]:
        languages = ["en", "hi"]
        return [
            document(codes=int(random.integers(2, longest)), text=text, language=languages[k % 2]) for k in range(count)
        ]

    return {
        "speech": make_dataset(folder / "speech", toy_space, "speech_lm", documents(50, 100), seed=1),
        "pairs": make_dataset(folder / "pairs", toy_space, "tts", documents(30, 30, text=4), seed=2),
        "more": make_dataset(folder / "more", toy_space, "speech_lm", documents(40, 50), seed=3),
    }


def stage(mode: str = "cut", **fields: Any) -> StageDataConfig:
    return StageDataConfig(
        **{
            "name": "s", "tokens": BUDGET * WIDTH, "seq_length": WIDTH, "global_batch_tokens": WIDTH,
            "packing": {"mode": mode, "oversize": "drop", "open_sequences": 4}, "max_epochs": 1000,
            "task_mass": {"speech_lm": 0.5, "tts": 0.5}, **fields,
        }
    )  # fmt: skip


def data(names: list[str]) -> DataConfig:
    return DataConfig(datasets={name: name for name in names}, validation_fraction=0.0)


def build(
    config: StageDataConfig, datasets: dict[str, TokenDataset], space: TokenSpace, cache: Path, history: History | None
) -> StageData:
    return StageData(config, data(list(datasets)), datasets, space, seed=1, cache_dir=cache, history=history)


def changed(found: StageData, at: int, cache: Path) -> History:
    lengths = {name: np.asarray(dataset.lengths) for name, dataset in found.datasets.items()}
    taken = Continuation.after(found.table, found.strata, lengths, at, found.continuation)
    path = cache / f"taken-{found.key[:8]}-{at}.npz"
    taken.save(path)
    loaded = Continuation.load(path)
    assert (loaded.from_sequence, loaded.epochs, loaded.tokens) == (taken.from_sequence, taken.epochs, taken.tokens)
    assert loaded.turns.keys() == taken.turns.keys()
    assert all((loaded.turns[name] == taken.turns[name]).all() for name in loaded.turns)
    return found.history.changed("for the test", loaded)


def drawn(found: StageData, first: int, last: int) -> list[tuple[str, str, int]]:
    """(stratum, dataset, document) of the documents that end in these sequences, in order."""
    table, names = found.table, list(found.datasets)
    part = slice(int(table.seq_ptr[first]), int(table.seq_ptr[last]))
    rows = zip(
        table.stratum[part].tolist(), table.dataset_of(part).tolist(), table.document[part].tolist(),
        (table.start[part] + table.length[part]).tolist(), strict=True,
    )  # fmt: skip
    return [
        (found.strata[k]["name"], names[index], document)
        for k, index, document, end in rows
        if end == found.datasets[names[index]].lengths[document]
    ]


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(1, BUDGET - 1), st.floats(0.1, 0.9), st.floats(0.0, 1.0)), max_size=3),
    st.sampled_from(["cut", "fit"]),
    st.sampled_from([None, {"shards": 3, "shard_mib": 300 / 2**20}]),
)
def test_every_document_of_a_stratum_is_drawn_e_or_one_more_times(
    folder: Path, datasets: dict[str, TokenDataset], toy_space: TokenSpace,
    changes: list[tuple[int, float, float]], mode: str, window: dict[str, float] | None,
) -> None:  # fmt: skip
    used = {name: datasets[name] for name in ("speech", "pairs")}
    found = build(stage(mode, shuffle_window=window), used, toy_space, folder / "cache", None)
    available = {s["name"]: s["documents_available"] for s in found.strata}
    at, order = 0, []
    for position, mass, temperature in sorted(changes):
        if position <= at:
            continue
        order += drawn(found, at, position)
        history = changed(found, position, folder)
        masses = {"speech_lm": mass, "tts": 1 - mass}
        config = stage(mode, task_mass=masses, language_temperature=temperature, shuffle_window=window)
        found = build(config, used, toy_space, folder / "cache", history)
        assert found.n_sequences == BUDGET and int(found.table.seq_ptr[position]) == 0
        at = position
    order += drawn(found, at, BUDGET)
    # Fitting draws documents together, window by window: an epoch may end and the next begin within one.
    slack = 1 if mode == "cut" else 2
    for name, size in available.items():
        mine = [document for stratum, _, document in order if stratum == name]
        counts = Counter(mine)
        times = [*counts.values(), *([0] * (size - len(counts)))]
        assert max(times) - min(times) <= slack
        if mode == "cut":  # and not only at the end: after any prefix
            so_far = dict.fromkeys(counts, 0)
            missing = size - len(counts)
            for document in mine:
                so_far[document] += 1
                assert so_far[document] - min([*so_far.values(), *([0] * bool(missing))]) <= 1


def test_an_unchanged_blend_goes_on_with_the_same_documents(
    folder: Path, datasets: dict[str, TokenDataset], toy_space: TokenSpace
) -> None:
    used = {name: datasets[name] for name in ("speech", "pairs")}
    first = build(stage(), used, toy_space, folder / "cache", None)
    second = build(stage(), used, toy_space, folder / "cache", changed(first, 20, folder))
    assert second.key != first.key
    before, after = drawn(first, 0, 20), drawn(second, 20, BUDGET)
    whole = drawn(first, 0, BUDGET)
    # The epochs that were under way end with the same sets of documents, and the next ones are the same orders.
    for stratum in first.strata:
        name, size = stratum["name"], stratum["documents_available"]
        old = [document for k, _, document in whole if k == name]
        new = [document for k, _, document in before + after if k == name]
        for epoch in range(min(len(old), len(new)) // size):
            assert sorted(new[epoch * size : (epoch + 1) * size]) == sorted(old[epoch * size : (epoch + 1) * size])
        ended = -(-len([k for k, *_ in before if k == name]) // size) * size
        both = min(len(old), len(new))
        assert new[ended:both] == old[ended:both]


def test_documents_that_are_new_come_with_those_that_are_due(
    folder: Path, datasets: dict[str, TokenDataset], toy_space: TokenSpace,
    make_dataset: Callable[..., TokenDataset], document: Any, tmp_path: Path,
) -> None:  # fmt: skip
    random = np.random.default_rng(0)
    documents = [document(codes=int(random.integers(5, 40))) for _ in range(60)]
    small = {"speech": make_dataset(tmp_path / "old", toy_space, "speech_lm", documents[:40], seed=9)}
    large = {"speech": make_dataset(tmp_path / "new", toy_space, "speech_lm", documents, seed=9)}
    config = stage(task_mass={"speech_lm": 1.0})
    first = build(config, small, toy_space, tmp_path / "cache", None)
    at = 25
    before = Counter(document for *_, document in drawn(first, 0, at))
    behind = min([*before.values(), *([0] * (40 - len(before)))])
    due = {number for number in range(40) if before[number] == behind} | set(range(40, 60))
    assert 20 < len(due) < 60
    second = build(config, large, toy_space, tmp_path / "cache", changed(first, at, tmp_path))
    after = [document for *_, document in drawn(second, at, BUDGET)]
    assert set(after[: len(due)]) == due
    following = after[len(due) : len(due) + 60]
    assert len(set(following)) == len(following)  # then epochs of all of them
    changes = find_changes(
        blend_spec(config, data(["speech"]), small, 1), blend_spec(config, data(["speech"]), large, 1), large
    )
    assert changes == ["dataset speech grown (40 → 60 documents)"]

    # A later change knows that the new documents have joined: nothing of them is made up for.
    again = changed(second, at + 20, tmp_path)
    assert again.continuation is not None
    third = build(stage(task_mass={"speech_lm": 3.0}), large, toy_space, tmp_path / "cache", again)
    order = drawn(first, 0, at) + drawn(second, at, at + 20) + drawn(third, at + 20, BUDGET)
    counts = Counter(number for *_, number in order)
    old = [counts[number] for number in range(40)]
    assert max(old) - min(old) <= 1
    assert max(old) - behind - 1 <= max(counts[number] for number in range(40, 60)) <= max(old) - behind


def test_a_replaced_dataset_is_refused(
    toy_space: TokenSpace, make_dataset: Callable[..., TokenDataset], document: Any, tmp_path: Path
) -> None:
    config = stage(task_mass={"speech_lm": 1.0})
    old = {"a": make_dataset(tmp_path / "old", toy_space, "speech_lm", [document(codes=9)] * 5, seed=0)}
    spec = blend_spec(config, data(["a"]), old, 1)
    for seed, codes in ((1, [9] * 6), (0, [9] * 4), (0, [8, 10, 9, 9, 9, 9])):
        documents = [document(codes=count) for count in codes]
        new = {"a": make_dataset(tmp_path / "new", toy_space, "speech_lm", documents, seed=seed)}
        with pytest.raises(InputError, match="its documents are not those that the run began with"):
            find_changes(spec, blend_spec(config, data(["a"]), new, 1), new)


def test_what_a_stage_does_not_draw_on_is_no_change(datasets: dict[str, TokenDataset]) -> None:
    def spec(names: list[str], **fields: Any) -> dict[str, Any]:
        config = stage(task_mass={"tts": 1.0}, **fields)
        return blend_spec(config, data(names), {name: datasets[name] for name in names}, 1)

    before = spec(["pairs"])
    assert find_changes(before, spec(["speech", "pairs", "more"]), datasets) == []
    assert find_changes(before, spec(["pairs"], tokens=10 * BUDGET * WIDTH, max_epochs=3), datasets) == []
    assert find_changes(before, spec(["pairs"], epoch_limit=50), datasets) == [
        "epoch_limit not set → 50", f"tokens not set → {BUDGET * WIDTH}",
    ]  # fmt: skip


def test_a_damaged_record_of_what_was_taken_is_refused(tmp_path: Path) -> None:
    taken = Continuation(7, {"a": np.array([1, 0, 2], np.uint16)}, {"s": 1}, {"s": 99})
    path = tmp_path / "taken.npz"
    taken.save(path)
    digest = Continuation.load(path).digest
    assert Continuation.load(path, digest).turns["a"].tolist() == [1, 0, 2]
    with pytest.raises(InputError, match="needed f00d"):
        Continuation.load(path, "f00d")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match="cannot be read"):
        Continuation.load(path)


def test_another_window_is_a_change_of_the_blend(datasets: dict[str, TokenDataset]) -> None:
    config = data(list(datasets))
    windows: list[dict[str, float] | None] = [None, {"shards": 2}, {"shards": 3}]
    plain, two, three = (blend_spec(stage(shuffle_window=window), config, datasets, 0) for window in windows)
    assert find_changes(plain, two, datasets) == [
        "shuffle_window.shard_mib not set → 64", "shuffle_window.shards not set → 2",
    ]  # fmt: skip
    assert find_changes(two, three, datasets) == ["shuffle_window.shards 2 → 3"]
    assert find_changes(two, plain, datasets) and not find_changes(plain, plain, datasets)
