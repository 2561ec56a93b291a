"""The order of a stage: WF²Q keeps every prefix in proportion, epochs are permutations, shares follow the recipe."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_speech.data.config import StageDataConfig
from megatron_speech.data.order import Order, _schedule_python, draw, fixed_order, schedule, shuffled
from megatron_speech.data.strata import Blend, DocumentTable, check_stage, resolve
from megatron_speech.errors import InputError


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


# ---- the schedule

mixtures = st.lists(
    st.tuples(st.floats(0.01, 10.0), st.lists(st.integers(1, 500), min_size=1, max_size=8)), min_size=1, max_size=8
)


def repeat_until(lengths: list[int], needed: float) -> list[int]:
    times = int(needed // sum(lengths)) + 2
    return lengths * times


@settings(max_examples=200, deadline=None)
@given(mixtures, st.integers(1, 4000))
def test_every_prefix_is_within_one_document_of_its_proportions(
    mixture: list[tuple[float, list[int]]], stop: int
) -> None:
    shares = np.array([weight for weight, _ in mixture])
    shares /= shares.sum()
    longest = max(max(lengths) for _, lengths in mixture)
    strata = [
        repeat_until(lengths, share * (stop + longest) + 2 * longest)
        for share, (_, lengths) in zip(shares, mixture, strict=True)
    ]
    costs = np.concatenate(strata).astype(np.int32)
    ptr = np.cumsum([0, *map(len, strata)]).astype(np.int64)

    order = schedule(costs, ptr, shares, stop)

    which = np.searchsorted(ptr, order, side="right") - 1
    done = np.cumsum(np.where(which[:, None] == np.arange(len(strata)), costs[order][:, None], 0), axis=0)
    lag = done - shares * done.sum(axis=1, keepdims=True)
    own_longest = np.array([max(lengths) for _, lengths in mixture])
    assert (lag >= -longest - 1e-6).all()
    assert (lag <= (1 - shares) * own_longest + 1e-6).all()
    assert done[-1].sum() >= stop > done[-1].sum() - costs[order[-1]]
    for k in range(len(strata)):
        mine = order[which == k]
        assert (mine == ptr[k] + np.arange(len(mine))).all()
    assert (order == _schedule_python(costs, ptr, shares, stop)).all()


def test_a_longer_budget_prolongs_the_order_and_changes_nothing_in_it() -> None:
    random = np.random.default_rng(0)
    tables = [
        table("a", "speech_lm", random.integers(5, 50, 40)),
        table("b", "tts", random.integers(5, 90, 30)),
    ]
    recipe = stage(task_mass={"speech_lm": 0.8, "tts": 0.2})
    blend = resolve(recipe, tables)
    short = draw(recipe, blend, tables, tokens=2_000, seed=3)
    long = draw(recipe, blend, tables, tokens=20_000, seed=3)
    count = len(short.document)
    assert (short.document == long.document[:count]).all()
    assert (short.stratum == long.stratum[:count]).all()


def drawn(order: Order, blend: Blend, k: int) -> np.ndarray:
    return order.document[order.stratum == k]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**40), st.floats(0.05, 0.95))
def test_each_document_occurs_exactly_once_per_epoch(n: int, m: int, seed: int, mass: float) -> None:
    random = np.random.default_rng(seed)
    tables = [
        table("a", "speech_lm", random.integers(1, 50, n)),
        table("b", "tts", random.integers(1, 50, m)),
    ]
    recipe = stage(task_mass={"speech_lm": mass, "tts": 1 - mass})
    blend = resolve(recipe, tables)
    tokens = 3 * int(tables[0].lengths.sum() + tables[1].lengths.sum())
    order = draw(recipe, blend, tables, tokens=tokens, seed=seed)
    lengths = np.where(order.stratum == 0, tables[0].lengths[order.document % n], tables[1].lengths[order.document % m])
    assert lengths.sum() >= tokens > lengths[:-1].sum()  # just enough documents
    for k, stratum in enumerate(blend.strata):
        documents = drawn(order, blend, k)
        size = len(stratum.documents)
        for epoch in range(0, len(documents) - size + 1, size):
            assert sorted(documents[epoch : epoch + size]) == stratum.documents.tolist()
        rest = documents[len(documents) // size * size :]
        assert len(set(rest.tolist())) == len(rest)


def test_a_stratum_is_shuffled_independently_of_the_others_and_anew_each_epoch() -> None:
    a, b = table("a", lengths=[7] * 50), table("b", "tts", lengths=[9] * 20)
    alone = stage()
    both = stage(task_mass={"speech_lm": 0.5, "tts": 0.5})
    first = draw(alone, resolve(alone, [a]), [a], tokens=900, seed=1)
    mixed = draw(both, resolve(both, [a, b]), [a, b], tokens=1800, seed=1)
    of_a = mixed.document[mixed.stratum == 0]
    count = min(len(of_a), len(first.document))
    assert count > 100
    assert (of_a[:count] == first.document[:count]).all()
    assert (first.document[:50] != first.document[50:100]).any()
    other_seed = draw(alone, resolve(alone, [a]), [a], tokens=900, seed=2)
    assert (first.document[:50] != other_seed.document[:50]).any()


def test_shuffles_are_the_same_for_ever() -> None:
    # A resumed run continues an order that an earlier version drew: these numbers must not change.
    assert shuffled(10, 1, "stage", "tts/a/en/toy", 0).tolist() == SHUFFLE_OF_TEN


SHUFFLE_OF_TEN = [8, 9, 3, 1, 7, 0, 6, 2, 4, 5]


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
    order = draw(recipe, blend, tables, tokens=100_000, seed=0)
    tokens = np.zeros(3)
    for k, stratum in enumerate(blend.strata):
        tokens[k] = tables[stratum.dataset].lengths[drawn(order, blend, k)].sum()
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
    blend = resolve(recipe, tables)
    order = draw(recipe, blend, tables, tokens=60_000, seed=0)
    targets = [tables[s.dataset].targets[drawn(order, blend, k)].sum() for k, s in enumerate(blend.strata)]
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
    order = fixed_order(validation, 0)
    assert sorted(order.document) == np.flatnonzero(held_out).tolist()


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
        ({"task_mass": {"speech_lm": float("nan")}}, "mass of speech_lm is nan"),
        ({"task_mass": {"speach_lm": 1.0}}, "unknown task 'speach_lm'; did you mean speech_lm"),
        ({"task_mass": {}}, "task_mass is empty"),
        ({"task_mass": None}, "neither task_mass nor strata"),
        ({"strata": [{"task": "tts", "mass": 1}], "task_mass": {"tts": 1}}, "both task_mass and strata"),
        ({"task_mass": {"text_lm": 1.0}}, "no dataset of that task .* speech \\(speech_lm\\), pairs \\(tts\\)"),
        ({"tokens": 100}, "budget of 100 tokens is smaller than one global batch of 256"),
        ({"global_batch_tokens": 250}, "not a multiple of seq_length 64; nearest: 192 or 256"),
        ({"strata": [{"task": "tts", "mass": 1, "languages": ["eng"]}]}, "'eng' in languages.* did you mean en"),
        ({"strata": [{"task": "tts", "mass": 1, "datasets": ["pair"]}]}, "'pair' in datasets.* did you mean pairs"),
        ({"strata": [{"task": "tts", "mass": 1, "sources": ["webb"]}]}, "'webb' in sources.* did you mean web"),
        (
            {"strata": [{"task": "tts", "mass": 1, "name": "x"}, {"task": "tts", "mass": 1, "languages": ["en"]}]},
            "strata x and tts/en both take language en",
        ),
        ({"strata": [{"task": "tts", "mass": 1, "languages": ["hi"]}]}, "tts/hi has mass 1 but no document"),
        ({"source_caps": {"web": 0.0}}, "source_caps.web is 0"),
        ({"source_caps": {"wbe": 0.5}}, "source_caps names 'wbe'.* did you mean web"),
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
