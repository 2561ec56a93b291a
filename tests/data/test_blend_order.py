"""The order of a stage: WF²Q keeps every prefix in proportion, epochs are permutations, shares follow the recipe."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_speech.data.blend.order import (
    BlendOrder,
    EpochPosition,
    FixedOrder,
    OrderedDocuments,
    StratumDocuments,
    _permuted_numpy,
    _PythonOrder,
    _windowed_numpy,
    epoch_key,
    permuted,
    seed_of,
    stage_order,
    windowed,
)
from megatron_speech.data.blend.strata import Blend, check_stage, resolve
from megatron_speech.data.dataset.document_columns import DocumentTable
from megatron_speech.data.dataset.shards import rows_by_shard, shard_edges
from megatron_speech.errors import InputError
from megatron_speech.recipe.stage import StageDataConfig


def table(
    name: str = "a",
    task: str = "speech_lm",
    lengths: list[int] | np.ndarray = (10, 20, 30),
    *,
    targets: list[int] | np.ndarray | None = None,
    languages: list[str] | None = None,
    sources: list[str] | None = None,
    held_out: list[bool] | np.ndarray | None = None,
    quotes_held_out: list[bool] | np.ndarray | None = None,
) -> DocumentTable:
    """A documents table without files."""
    lengths = np.asarray(lengths, dtype=np.int32)
    language_names, language = np.unique(languages or ["en"] * len(lengths), return_inverse=True)
    source_names, source = np.unique(sources or ["toy"] * len(lengths), return_inverse=True)
    return DocumentTable(
        name=name,
        task=task,
        lengths=lengths,
        targets=lengths if targets is None else np.asarray(targets, dtype=np.int32),
        seconds=lengths.astype(np.float32),
        language=language.astype(np.int32),
        source=source.astype(np.int32),
        languages=language_names.tolist(),
        sources=source_names.tolist(),
        held_out=np.zeros(len(lengths), dtype=bool) if held_out is None else np.asarray(held_out),
        quotes_held_out=np.zeros(len(lengths), bool) if quotes_held_out is None else np.asarray(quotes_held_out),
    )


def stage(**fields: object) -> StageDataConfig:
    defaults: dict[str, object] = {
        "name": "s",
        "task_mass": {"speech_lm": 1.0},
        "tokens": 1024,
        "seq_length": 64,
        "global_batch_tokens": 256,
    }
    if "strata" in fields:
        defaults["task_mass"] = None
    return StageDataConfig(**{**defaults, **fields})


def shares_of(blend: Blend, field: str) -> dict[str, float]:
    sums: dict[str, float] = {}
    for stratum in blend.strata:
        sums[getattr(stratum, field)] = sums.get(getattr(stratum, field), 0.0) + stratum.share
    return sums


# ---- permutations


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1), st.data())
def test_a_permutation_is_a_bijection_the_same_compiled_and_in_numpy_whole_or_in_runs(
    count: int, key: int, data: st.DataObject
) -> None:
    found = permuted(count, key)
    assert found.dtype == np.int32
    assert sorted(found.tolist()) == list(range(count))
    first = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(first, count))
    with np.errstate(over="ignore"):
        assert _permuted_numpy(count, key, first, stop).tolist() == found[first:stop].tolist()
    assert permuted(count, key, first, stop).tolist() == found[first:stop].tolist()


@pytest.mark.parametrize("count", [46_341, 2**20, 2**31 - 1])
def test_runs_of_large_permutations_agree_and_repeat_nothing(count: int) -> None:
    run = permuted(count, 11, count - 5000, count)
    assert len(np.unique(run)) == 5000
    assert 0 <= run.min() and run.max() < count
    with np.errstate(over="ignore"):
        assert (_permuted_numpy(count, 11, count - 5000, count) == run).all()


def test_small_permutations_occur_equally_often_over_the_epochs() -> None:
    seen = Counter(tuple(permuted(4, epoch_key(7, epoch)).tolist()) for epoch in range(4800))
    assert len(seen) == 24
    assert min(seen.values()) > 140 and max(seen.values()) < 270  # 200 expected, standard deviation 14


def test_neighbours_in_the_dataset_are_not_neighbours_in_the_order() -> None:
    count = 100_000
    order = permuted(count, 5).astype(np.int64)
    distance = np.abs(np.diff(order))
    assert np.mean(distance) == pytest.approx(count / 3, rel=0.02)
    assert np.corrcoef(order, np.arange(count))[0, 1] == pytest.approx(0, abs=0.02)
    parts = np.bincount(order[: count // 10] // 1000, minlength=100)  # of each hundredth, a tenth comes first
    assert parts.min() > 55 and parts.max() < 145


def test_shuffles_are_the_same_for_ever() -> None:
    # A resumed run continues an order that an earlier version drew: these numbers must not change.
    key = seed_of(1, "stage", "tts/a/en/toy")
    assert permuted(10, epoch_key(key, 0)).tolist() == SHUFFLE_OF_TEN


SHUFFLE_OF_TEN = [4, 2, 0, 5, 8, 7, 9, 3, 6, 1]


# ---- local permutations

runs = st.lists(st.integers(1, 60), min_size=1, max_size=30)


def bounds_of(sizes: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)])


@settings(max_examples=150, deadline=None)
@given(runs, st.integers(1, 40), st.integers(0, 2**64 - 1), st.data())
def test_a_local_permutation_takes_every_element_once_the_same_compiled_and_in_numpy_whole_or_in_runs(
    sizes: list[int], shards: int, key: int, data: st.DataObject
) -> None:
    bounds = bounds_of(sizes)
    count = int(bounds[-1])
    found = windowed(bounds, shards, key)
    assert found.dtype == np.int32
    assert sorted(found.tolist()) == list(range(count))
    first = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(first, count))
    assert windowed(bounds, shards, key, first, stop).tolist() == found[first:stop].tolist()
    assert _windowed_numpy(bounds, shards, key, first, stop).tolist() == found[first:stop].tolist()


@settings(max_examples=60, deadline=None)
@given(runs, st.integers(1, 40), st.integers(0, 2**64 - 1))
def test_a_window_holds_whole_shards_no_more_than_it_was_given(sizes: list[int], shards: int, key: int) -> None:
    bounds = bounds_of(sizes)
    shard = np.searchsorted(bounds, windowed(bounds, shards, key), side="right") - 1
    windows = -(-len(sizes) // shards)
    at, seen = 0, set()
    for window in range(windows):
        here = set(shard[at : at + 1].tolist())
        expected = (window + 1) * len(sizes) // windows - window * len(sizes) // windows
        while at < len(shard) and (int(shard[at]) in here or len(here) < expected):
            here.add(int(shard[at]))
            at += 1
        assert len(here) <= shards and not here & seen
        seen |= here
    assert at == len(shard)


def test_windows_are_drawn_anew_from_the_whole_dataset_and_mixed() -> None:
    bounds = np.arange(0, 64_001, 1000)
    one, two = (windowed(bounds, 8, epoch_key(3, epoch)).astype(np.int64) for epoch in (0, 1))
    assert len({*(one[:8000] // 1000).tolist()}) == len({*(two[:8000] // 1000).tolist()}) == 8
    assert {*(one[:8000] // 1000).tolist()} != {*(two[:8000] // 1000).tolist()}
    of_shard = np.bincount(one[:800] // 1000, minlength=64)  # a tenth of the first window
    assert of_shard.max() < 145 and of_shard[of_shard > 0].min() > 55
    # Neighbours in the dataset are not neighbours in the order.
    assert np.mean(np.diff(one[:8000]) == 1) < 0.002


def test_windows_are_the_same_for_ever() -> None:
    assert windowed(np.array([0, 3, 5, 9, 12]), 2, seed_of(1, "stage", "tts/a/en/toy")).tolist() == WINDOWS_OF_TWELVE


WINDOWS_OF_TWELVE = [7, 1, 5, 2, 0, 8, 6, 9, 4, 3, 11, 10]


def test_what_is_no_local_permutation_is_refused() -> None:
    for bounds, shards, stop in (([0, 2, 2], 1, 1), ([1, 2], 1, 1), ([0, 3], 0, 1), ([0, 3], 1, 4), ([0], 1, 0)):
        with pytest.raises(ValueError, match="elements 0 to"):
            windowed(np.array(bounds), shards, 0, 0, stop)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=80), st.integers(1, 1000), st.data())
def test_shards_cut_the_documents_by_the_byte_that_they_begin_at(
    sizes: list[int], shard_bytes: int, data: st.DataObject
) -> None:
    places = bounds_of(sizes)[:-1]
    edges = shard_edges(places, shard_bytes)
    for shard in range(len(edges) - 1):
        assert (places[edges[shard] : edges[shard + 1]] // shard_bytes == shard).all()
    assert edges[0] == 0 and edges[-1] == len(sizes)
    chosen = np.array(sorted(data.draw(st.sets(st.integers(0, len(sizes) - 1), min_size=1))))
    bounds = rows_by_shard(chosen, edges)
    assert bounds[0] == 0 and bounds[-1] == len(chosen) and (np.diff(bounds) > 0).all()
    of_run = [{*(places[chosen[a:b]] // shard_bytes).tolist()} for a, b in itertools.pairwise(bounds)]
    assert all(len(run) == 1 for run in of_run) and len(set.union(*of_run)) == len(of_run)


# ---- the schedule

mixtures = st.lists(
    st.tuples(st.floats(0.01, 10.0), st.lists(st.integers(1, 500), min_size=1, max_size=8)), min_size=1, max_size=8
)


def sources(mixture: list[tuple[float, list[int]]]) -> list[StratumDocuments]:
    total = sum(weight for weight, _ in mixture)
    return [
        StratumDocuments(
            documents=np.arange(len(lengths), dtype=np.int32),
            lengths=np.array(lengths, dtype=np.int32),
            counted=np.array(lengths, dtype=np.int32),
            seconds=np.array(lengths, dtype=np.float32) / 25,
            share=weight / total,
            key=seed_of(k),
        )
        for k, (weight, lengths) in enumerate(mixture)
    ]


def assert_same(found: OrderedDocuments, expected: OrderedDocuments) -> None:
    for name, column in expected._asdict().items():
        np.testing.assert_array_equal(getattr(found, name), column, err_msg=name, strict=True)


def joined(pieces: list[OrderedDocuments]) -> OrderedDocuments:
    return OrderedDocuments(*(np.concatenate(columns) for columns in zip(*pieces, strict=True)))


@settings(max_examples=100, deadline=None)
@given(mixtures, st.lists(st.integers(0, 120), min_size=1, max_size=6))
def test_every_prefix_is_within_one_document_of_its_proportions(
    mixture: list[tuple[float, list[int]]], sizes: list[int]
) -> None:
    strata = sources(mixture)
    order = BlendOrder(strata)
    documents = joined([order.take(size) for size in sizes])

    shares = np.array([stratum.share for stratum in strata])
    own_longest = np.array([max(lengths) for _, lengths in mixture])
    which, counted = documents.stratum, documents.counted
    done = np.cumsum(np.where(which[:, None] == np.arange(len(strata)), counted[:, None], 0), axis=0)
    lag = done - shares * done.sum(axis=1, keepdims=True)
    assert (lag >= -own_longest.max() - 1e-6).all()
    assert (lag <= (1 - shares) * own_longest + 1e-6).all()
    # The same however many are taken at a time, and the same without a compiler.
    assert_same(documents, BlendOrder(strata).take(sum(sizes)))
    assert_same(documents, OrderedDocuments(*_PythonOrder(strata).take(sum(sizes))))


@settings(max_examples=40, deadline=None)
@given(mixtures, st.integers(0, 3), st.data())
def test_an_order_goes_on_with_what_is_due_of_an_epoch(
    mixture: list[tuple[float, list[int]]], epoch: int, data: st.DataObject
) -> None:
    strata = [
        dataclasses.replace(
            stratum,
            first_epoch=epoch,
            first_documents=np.array(
                data.draw(st.lists(st.sampled_from(stratum.documents.tolist()), unique=True)), dtype=np.int32
            ),
        )
        for stratum in sources(mixture)
    ]
    documents = BlendOrder(strata).take(300)
    assert_same(documents, OrderedDocuments(*_PythonOrder(strata).take(300)))
    for k, stratum in enumerate(strata):
        mine = documents.document[documents.stratum == k]
        due = len(stratum.first_documents)
        assert set(mine[:due].tolist()) <= set(stratum.first_documents.tolist())
        assert len(set(mine[:due].tolist())) == len(mine[:due])
        size, rest = len(stratum.documents), mine[due:]
        key = epoch_key(stratum.key, epoch + (1 if due else 0))
        assert rest[:size].tolist() == stratum.documents[permuted(size, key)][: len(rest)].tolist()


@settings(max_examples=60, deadline=None)
@given(mixtures, st.integers(1, 5), st.integers(0, 3), st.data())
def test_an_order_by_windows_is_the_same_in_the_reference_and_goes_on_with_what_is_due(
    mixture: list[tuple[float, list[int]]], shards: int, epoch: int, data: st.DataObject
) -> None:
    strata = []
    for stratum in sources(mixture):
        due = data.draw(st.lists(st.sampled_from(stratum.documents.tolist()), unique=True))
        first = np.array(sorted(due), dtype=np.int32)
        edges = shard_edges(bounds_of(stratum.lengths.tolist())[:-1], data.draw(st.integers(1, 1500)))
        local = {"window_shards": shards, "bounds": rows_by_shard(stratum.documents, edges)}
        local |= {"first_epoch": epoch, "first_documents": first, "first_bounds": rows_by_shard(first, edges)}
        strata.append(dataclasses.replace(stratum, **local))
    sizes = data.draw(st.lists(st.integers(0, 120), min_size=1, max_size=5))
    order = BlendOrder(strata)
    documents = joined([order.take(size) for size in [*sizes, 200]])
    assert_same(documents, OrderedDocuments(*_PythonOrder(strata).take(sum(sizes) + 200)))
    for k, stratum in enumerate(strata):
        mine = documents.document[documents.stratum == k]
        due, size = len(stratum.first_documents), len(stratum.documents)
        if len(mine) >= due:
            assert sorted(mine[:due].tolist()) == stratum.first_documents.tolist()
        rest = mine[due:]
        key = epoch_key(stratum.key, epoch + (1 if due else 0))
        expected = stratum.documents[windowed(stratum.bounds, shards, key)]
        assert rest[:size].tolist() == expected[: len(rest)].tolist()


def test_a_document_that_counts_for_nothing_is_refused() -> None:
    strata = sources([(1.0, [5, 7])])
    strata[0].counted[1] = 0
    for order in (BlendOrder(strata), _PythonOrder(strata)):
        with pytest.raises(ValueError, match="document 1 of stratum 0 counts for nothing"):
            order.take(2)


def test_columns_at_odd_addresses_are_read_as_they_are() -> None:
    (stratum,) = sources([(1.0, list(range(1, 60)))])
    odd = np.frombuffer(b"\0\0" + stratum.lengths.tobytes(), dtype=np.int32, offset=2)  # as in a mapped .idx
    assert not odd.flags.aligned
    mapped = dataclasses.replace(stratum, lengths=odd, counted=odd)
    assert_same(BlendOrder([mapped]).take(200), BlendOrder([stratum]).take(200))


def drawn(recipe: StageDataConfig, tables: list[DocumentTable], count: int, seed: int = 0) -> OrderedDocuments:
    return stage_order(recipe, resolve(recipe, tables), tables, seed=seed).take(count)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**40), st.floats(0.05, 0.95))
def test_each_document_occurs_exactly_once_per_epoch(n: int, m: int, seed: int, mass: float) -> None:
    random = np.random.default_rng(seed)
    tables = [
        table("a", "speech_lm", random.integers(1, 50, n)),
        table("b", "tts", random.integers(1, 50, m)),
    ]
    recipe = stage(task_mass={"speech_lm": mass, "tts": 1 - mass})
    order = drawn(recipe, tables, 3 * (n + m), seed)
    for k, stratum in enumerate(resolve(recipe, tables).strata):
        documents = order.document[order.stratum == k]
        assert (order.length[order.stratum == k] == tables[k].lengths[documents]).all()
        size = len(stratum.documents)
        for epoch in range(0, len(documents) - size + 1, size):
            assert sorted(documents[epoch : epoch + size]) == stratum.documents.tolist()
        rest = documents[len(documents) // size * size :]
        assert len(set(rest.tolist())) == len(rest)


def test_a_stage_with_a_window_takes_a_few_shards_at_a_time() -> None:
    tables = [table("a", lengths=[10] * 100, languages=["en", "hi"] * 50)]
    places = [np.arange(100) * 20]
    recipe = stage(shuffle_window={"shards": 2, "shard_mib": 200 / 2**20})
    order = stage_order(recipe, resolve(recipe, tables), tables, seed=0, places=places).take(300)
    for k in range(2):
        mine = order.document[order.stratum == k]
        assert len(mine) == 150
        assert all(len(set(mine[at : at + 10] // 10)) == 2 for at in range(0, 150, 10))
        assert all(sorted(mine[at : at + 50]) == list(range(k, 100, 2)) for at in (0, 50, 100))
    uniform = stage_order(stage(), resolve(stage(), tables), tables, seed=0, places=places).take(300)
    assert_same(uniform, drawn(stage(), tables, 300))


def test_a_stratum_is_shuffled_independently_of_the_others_and_anew_each_epoch() -> None:
    a, b = table("a", lengths=[7] * 50), table("b", "tts", lengths=[9] * 20)
    first = drawn(stage(), [a], 130, seed=1)
    mixed = drawn(stage(task_mass={"speech_lm": 0.5, "tts": 0.5}), [a, b], 260, seed=1)
    of_a = mixed.document[mixed.stratum == 0]
    count = min(len(of_a), len(first.document))
    assert count > 100
    assert (of_a[:count] == first.document[:count]).all()
    assert (first.document[:50] != first.document[50:100]).any()
    assert (first.document[:50] != drawn(stage(), [a], 50, seed=2).document).any()
    renamed = drawn(stage(name="other"), [a], 50, seed=1)
    assert (first.document[:50] != renamed.document).any()


def test_an_epoch_of_which_nothing_is_due_is_over() -> None:
    tables = [table("a", lengths=[7] * 50)]
    blend = resolve(stage(), tables)
    name = blend.strata[0].name
    nothing = np.zeros(0, dtype=np.int32)
    whole = drawn(stage(), tables, 150)
    later = stage_order(stage(), blend, tables, seed=0, begin={name: EpochPosition(0, nothing)})
    assert (later.take(100).document == whole.document[50:]).all()


# ---- shares


def test_the_mass_of_a_task_is_its_share_of_tokens_not_of_documents() -> None:
    tables = [
        table("long", "speech_lm", [100] * 10),
        table("short", "tts", [10] * 500),
        table("text", "text_lm", [50] * 20),
    ]
    recipe = stage(task_mass={"speech_lm": 8, "tts": 1, "text_lm": 1})
    blend = resolve(recipe, tables)
    assert shares_of(blend, "task") == pytest.approx({"speech_lm": 0.8, "tts": 0.1, "text_lm": 0.1})
    order = drawn(recipe, tables, 3000)
    tokens = np.bincount(order.stratum, order.length)
    assert tokens / tokens.sum() == pytest.approx([0.8, 0.1, 0.1], abs=0.002)


def test_sft_proportions_are_of_target_tokens() -> None:
    tables = [
        table("a", "tts", [100] * 50, targets=[10] * 50, languages=["en"] * 50),
        table("b", "tts", [40] * 50, targets=[30] * 50, languages=["hi"] * 50),
    ]
    recipe = stage(
        strata=[
            {"task": "tts", "mass": 0.5, "datasets": ["a"]},
            {"task": "tts", "mass": 0.5, "datasets": ["b"]},
        ],
        seq_length=128,
        loss={"prompt": 0.0},
    )
    order = drawn(recipe, tables, 1000)
    assert (order.counted == np.choose(order.stratum, [10, 30])).all()
    targets = np.bincount(order.stratum, order.counted)
    assert targets[0] == pytest.approx(targets[1], abs=30)


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 0.9), (0.5, 0.75), (0.0, 0.5)])
def test_temperature_flattens_languages_inside_a_task(temperature: float, expected: float) -> None:
    tables = [table(lengths=[10] * 100, languages=["en"] * 90 + ["am"] * 10)]
    shares = shares_of(resolve(stage(language_temperature=temperature), tables), "language")
    assert shares == pytest.approx({"en": expected, "am": 1 - expected})


def test_a_cap_moves_the_surplus_inside_the_language_and_keeps_every_mass() -> None:
    tables = [
        table(
            lengths=[10] * 100,
            languages=["en"] * 80 + ["hi"] * 20,
            sources=["studio"] * 60 + ["web"] * 20 + ["web"] * 20,
        ),
        table("t", "text_lm", [10] * 10, sources=["books"] * 10),
    ]
    recipe = stage(task_mass={"speech_lm": 0.5, "text_lm": 0.5}, source_caps={"studio": 0.1})
    blend = resolve(recipe, tables)
    assert shares_of(blend, "source") == pytest.approx({"studio": 0.1, "web": 0.4, "books": 0.5})
    assert shares_of(blend, "task") == pytest.approx({"speech_lm": 0.5, "text_lm": 0.5})
    speech = [s for s in blend.strata if s.task == "speech_lm"]
    english = sum(s.share for s in speech if s.language == "en")
    assert english == pytest.approx(0.4)  # as without the cap: the surplus went to English web speech


def test_surplus_that_overfills_another_cap_moves_on() -> None:
    tables = [table(lengths=[10] * 100, sources=["a"] * 60 + ["b"] * 30 + ["c"] * 10)]
    blend = resolve(stage(source_caps={"a": 0.2, "b": 0.3}), tables)
    assert shares_of(blend, "source") == pytest.approx({"a": 0.2, "b": 0.3, "c": 0.5})


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(1, 50)), min_size=1, max_size=20),
    st.dictionaries(st.integers(0, 3), st.floats(0.05, 1.0), max_size=3),
    st.floats(0, 1),
)
def test_caps_hold_and_shares_sum_to_one_or_the_recipe_is_refused(
    rows: list[tuple[int, int, int]], caps: dict[int, float], temperature: float
) -> None:
    names = {f"s{source}" for _, source, _ in rows}
    tables = [
        table(
            lengths=[n for *_, n in rows], languages=[f"l{k}" for k, *_ in rows], sources=[f"s{k}" for _, k, _ in rows]
        )
    ]
    limits = {f"s{k}": cap for k, cap in caps.items() if f"s{k}" in names}
    room = sum(limits.get(name, 1.0) for name in names)
    try:
        blend = resolve(stage(source_caps=limits, language_temperature=temperature), tables)
    except InputError:
        assert room < 1 + 1e-9
        return
    shares = shares_of(blend, "source")
    assert sum(shares.values()) == pytest.approx(1)
    assert all(shares[name] <= cap + 1e-9 for name, cap in limits.items())


def test_explicit_strata_take_what_their_filters_say() -> None:
    tables = [
        table("a", lengths=[10] * 30, languages=["en", "hi", "am"] * 10),
        table("b", lengths=[10] * 10, languages=["en"] * 10),
    ]
    blend = resolve(
        stage(
            strata=[
                {"task": "speech_lm", "mass": 3, "languages": ["en"]},
                {"task": "speech_lm", "mass": 1, "languages": ["hi"], "name": "hindi"},
            ]
        ),
        tables,
    )
    assert shares_of(blend, "language") == pytest.approx({"en": 0.75, "hi": 0.25})
    assert [s.name for s in blend.strata] == [
        "speech_lm/en/a/en/toy", "hindi/a/hi/toy", "speech_lm/en/b/en/toy",
    ]  # fmt: skip
    assert sum(len(s.documents) for s in blend.strata) == 30  # Amharic is in no stratum


def test_validation_documents_are_on_the_other_side_and_occur_once() -> None:
    held_out = np.arange(50) % 5 == 0
    tables = [table(lengths=[10] * 50, held_out=held_out)]
    train, validation = resolve(stage(), tables), resolve(stage(), tables, validation=True)
    assert not set(train.strata[0].documents) & set(np.flatnonzero(held_out))
    order = FixedOrder(stage(), validation, tables, seed=0)
    pieces = [order.take(4) for _ in range(4)]
    assert [len(piece.document) for piece in pieces] == [4, 4, 2, 0]
    documents = joined(pieces).document
    assert sorted(documents) == np.flatnonzero(held_out).tolist()
    assert (documents == FixedOrder(stage(), validation, tables, seed=0).take(100).document).all()


def test_a_document_whose_reference_is_held_out_is_never_trained_on() -> None:
    number = np.arange(60)
    held_out, quoting = number % 5 == 0, number % 3 == 0
    tables = [table(lengths=[10] * 60, held_out=held_out, quotes_held_out=quoting)]
    train, validation = resolve(stage(), tables), resolve(stage(), tables, validation=True)
    assert train.strata[0].documents.tolist() == number[~held_out & ~quoting].tolist()
    assert validation.strata[0].documents.tolist() == number[held_out].tolist()
    assert train.excluded["quotes_held_out"] == {"a": int((~held_out & quoting).sum())}


# ---- refusals

TABLES = [
    table("speech", "speech_lm", [10, 20, 100], languages=["en", "en", "hi"], sources=["web", "web", "studio"]),
    table("pairs", "tts", [10, 20, 100], targets=[5, 5, 5]),
]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task_mass": {"speech_lm": 0.0}}, "mass of speech_lm is 0"),
        ({"task_mass": {"speech_lm": -1.0}}, "mass of speech_lm is -1"),
        ({"task_mass": {"speach_lm": 1.0}}, "unknown task 'speach_lm'; did you mean 'speech_lm'"),
        ({"task_mass": {}}, "task_mass is empty"),
        ({"task_mass": None}, "neither task_mass nor strata"),
        ({"strata": [{"task": "tts", "mass": 1}], "task_mass": {"tts": 1}}, "both task_mass and strata"),
        ({"task_mass": {"text_lm": 1.0}}, "no dataset of that task .* speech \\(speech_lm\\), pairs \\(tts\\)"),
        ({"tokens": 100}, "budget of 100 tokens is smaller than one global batch of 256"),
        ({"global_batch_tokens": 250}, "not a multiple of seq_length 64; nearest: 192 or 256"),
        ({"strata": [{"task": "tts", "mass": 1, "languages": ["eng"]}]}, "'eng' in languages.* did you mean 'en'"),
        ({"strata": [{"task": "tts", "mass": 1, "datasets": ["pair"]}]}, "'pair' in datasets.* did you mean 'pairs'"),
        ({"strata": [{"task": "tts", "mass": 1, "sources": ["webb"]}]}, "'webb' in sources.* did you mean 'web'"),
        (
            {"strata": [{"task": "tts", "mass": 1, "name": "x"}, {"task": "tts", "mass": 1, "languages": ["en"]}]},
            "strata x and tts/en both take language en",
        ),
        ({"strata": [{"task": "tts", "mass": 1, "languages": ["hi"]}]}, "tts/hi has mass 1 but no document"),
        ({"source_caps": {"web": 0.0}}, "source_caps.web is 0"),
        ({"source_caps": {"wbe": 0.5}}, "source_caps names 'wbe'.* did you mean 'web'"),
        ({"source_caps": {"web": 0.2, "studio": 0.2}}, "leave .* without a source"),
        ({"task_mass": {"tts": 1.0}, "packing": {"mode": "fit"}}, "1 documents are longer than seq_length 64 .*100"),
        ({"task_mass": {"tts": 1.0}, "loss": {"prompt": 0.0}, "packing": {"mode": "cut"}}, "packing.mode is cut"),
        ({"task_mass": {"text_lm": 1.0}, "loss": {"prompt": 0.0}}, "text_lm has mass 1 .*allow_text_in_sft"),
    ],
)
def test_a_stage_that_cannot_be_is_refused_with_a_sentence(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve(stage(**fields), TABLES)


def test_oversize_documents_are_counted_when_dropping_is_allowed() -> None:
    recipe = stage(task_mass={"tts": 1.0}, packing={"mode": "fit", "oversize": "drop"})
    blend = resolve(recipe, TABLES)
    assert blend.excluded == {"oversize": {"pairs": 1}}
    assert blend.strata[0].documents.tolist() == [0, 1]


def test_text_in_sft_is_let_in_when_the_recipe_says_so() -> None:
    groups = check_stage(stage(task_mass={"text_lm": 1.0}, loss={"prompt": 0.0}, allow_text_in_sft=True))
    assert [group.task for group in groups] == ["text_lm"]
