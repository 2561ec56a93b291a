"""Strata: filters on any column, shares within bounds, limits of epochs; what cannot be is a sentence."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_speech.data.blend import where
from megatron_speech.data.blend.shares import bounded_shares, natural_shares
from megatron_speech.data.blend.strata import Blend, apply_filters, check_stage, resolve
from megatron_speech.data.dataset.document_columns import DocumentTable
from megatron_speech.errors import InputError
from megatron_speech.recipe.stage import StageDataConfig


def table(
    lengths: list[int] | np.ndarray,
    *,
    name: str = "a",
    task: str = "speech_lm",
    languages: list[str] | None = None,
    sources: list[str] | None = None,
    marks: list[int] | None = None,
) -> DocumentTable:
    lengths = np.asarray(lengths, dtype=np.int32)
    language_names, language = np.unique(languages or ["en"] * len(lengths), return_inverse=True)
    source_names, source = np.unique(sources or ["toy"] * len(lengths), return_inverse=True)
    return DocumentTable(
        name=name, task=task, lengths=lengths, targets=lengths, seconds=lengths.astype(np.float32),
        language=language.astype(np.uint16), source=source.astype(np.uint16), languages=language_names.tolist(),
        sources=source_names.tolist(), held_out=np.zeros(len(lengths), bool),
        quotes_held_out=np.zeros(len(lengths), bool),
        marks=None if marks is None else np.array(marks, dtype=np.uint8),
    )  # fmt: skip


def stage(**fields: Any) -> StageDataConfig:
    defaults: dict[str, Any] = {"name": "s", "tokens": 1024, "seq_length": 64, "global_batch_tokens": 256}
    if "strata" not in fields:
        defaults["task_mass"] = {"speech_lm": 1.0}
    return StageDataConfig(**{**defaults, **fields})


def shares_by(blend: Blend, field: str) -> dict[str, float]:
    sums: dict[str, float] = {}
    for stratum in blend.strata:
        sums[getattr(stratum, field)] = sums.get(getattr(stratum, field), 0.0) + stratum.share
    return sums


# ---- where


ROWS = [
    {"speaker_id": "ann", "duration_seconds": 1.0, "segment_order": 0, "extra": '{"mos": 3.5, "channel": "phone"}'},
    {"speaker_id": "bob", "duration_seconds": 5.0, "segment_order": 1, "extra": '{"mos": 4, "clean": true}'},
    {"speaker_id": None, "duration_seconds": 9.5, "segment_order": None, "extra": None},
    {"speaker_id": "cyd", "duration_seconds": None, "segment_order": 3, "extra": '{"channel": "studio", "mos": null}'},
    {"speaker_id": "", "duration_seconds": float("nan"), "segment_order": 2, "extra": "{}"},
]


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    schema = pa.schema(
        [("speaker_id", pa.string()), ("duration_seconds", pa.float64()), ("segment_order", pa.int64()),
         ("extra", pa.string()), ("split_hash", pa.uint64())]
    )  # fmt: skip
    rows = [{**row, "split_hash": 0} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "P.docs.parquet", row_group_size=2)
    return tmp_path / "P.docs.parquet"


@pytest.mark.parametrize(
    ("condition", "passing"),
    [
        ({"speaker_id": "ann"}, [0]),
        ({"speaker_id": ["ann", "bob"]}, [0, 1]),
        ({"speaker_id": {"not": "ann"}}, [1, 2, 3, 4]),  # rows without a speaker are not Ann
        ({"speaker_id": {"not": ["ann", "bob"]}}, [2, 3, 4]),
        ({"speaker_id": {"null": True}}, [2]),
        ({"speaker_id": {"null": False}}, [0, 1, 3, 4]),
        ({"duration_seconds": {"min": 5}}, [1, 2]),
        ({"duration_seconds": {"min": 1, "max": 5.0}}, [0, 1]),
        ({"duration_seconds": {"max": 9.5, "not": 5}}, [0, 2]),
        ({"segment_order": 3}, [3]),
        ({"segment_order": {"min": 0.5}}, [1, 3, 4]),
        ({"segment_order": [0, 1.0]}, [0, 1]),
        ({"extra.mos": {"min": 3.5}}, [0, 1]),
        ({"extra.mos": {"null": True}}, [2, 3, 4]),
        ({"extra.channel": "phone"}, [0]),
        ({"extra.clean": True}, [1]),
        ({"extra.clean": {"not": True}}, [0, 2, 3, 4]),
        ({"speaker_id": {"not": "bob"}, "duration_seconds": {"max": 6}}, [0]),
        ({"extra.mos": {"min": 1}, "extra.channel": {"not": "phone"}}, [1]),
    ],
)
def test_a_filter_passes_the_rows_that_it_says(documents: Path, condition: dict[str, Any], passing: list[int]) -> None:
    found = where.marks(documents, [where.parse(condition, "where")], len(ROWS), "where")
    assert found.dtype == np.uint8
    assert np.flatnonzero(found).tolist() == passing


def test_each_filter_has_a_bit_and_rows_are_read_group_by_group(documents: Path) -> None:
    filters = [where.parse({"segment_order": k}, "where") for k in range(9)]
    found = where.marks(documents, filters, len(ROWS), "where")
    assert found.dtype == np.uint16
    assert found.tolist() == [1, 2, 0, 8, 4]


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ({"speaker_id": 3}, "compares the column speaker_id with a number, but it holds text"),
        ({"speaker_id": {"min": 3}}, "compares the column speaker_id with a number, but it holds text"),
        ({"duration_seconds": "long"}, "compares the column duration_seconds with text, but it holds a number"),
        ({"spaeker_id": "ann"}, "names the column 'spaeker_id'.*did you mean 'speaker_id'"),
        ({"extra.moss": {"min": 3}}, r"names extra\.moss, a field that no document has; did you mean 'mos'\?"),
        ({"extra.channel": {"min": 3}}, "field channel of column extra is not of one type.*with a number"),
        ({"extra.": 3}, "names the column 'extra.'"),
        ({"speaker_id": {}}, "speaker_id is empty"),
        ({"speaker_id": []}, "all of one kind"),
        ({"speaker_id": ["ann", 3]}, "all of one kind"),
        ({"speaker_id": None}, "null: true"),
        ({"duration_seconds": {"min": 3, "max": 2}}, "min 3 is above max 2"),
        ({"duration_seconds": {"min": float("inf")}}, "a bound is a finite number"),
        ({"duration_seconds": {"minimum": 3}}, "has the key 'minimum'; did you mean 'min'"),
        ({"duration_seconds": {"null": True, "min": 3}}, "null stands alone"),
        ({"duration_seconds": {"max": 3, "not": "x"}}, "values of one kind"),
    ],
)
def test_a_filter_that_cannot_be_is_refused(documents: Path, condition: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        where.marks(documents, [where.parse(condition, "where")], len(ROWS), "where")


def test_strata_with_filters_and_the_rest(
    tmp_path: Path, toy_space: Any, make_dataset: Callable[..., Any], document: Any
) -> None:
    dataset = make_dataset(tmp_path / "a", toy_space, "speech_lm", [document(codes=5 * k) for k in range(1, 11)])
    lengths = np.asarray(dataset.lengths)
    config = stage(
        strata=[
            {"task": "speech_lm", "mass": 1, "name": "short", "where": {"duration_seconds": {"max": 0.4}}},
            {"task": "speech_lm", "mass": 3, "name": "long", "otherwise": True},
        ]
    )
    marked = apply_filters(config, table(lengths), dataset)
    blend = resolve(config, [marked])
    assert {s.name.split("/")[0]: s.documents.tolist() for s in blend.strata} == {
        "short": [0, 1], "long": list(range(2, 10)),
    }  # fmt: skip
    assert {s.name.split("/")[0]: s.share for s in blend.strata} == pytest.approx({"short": 0.25, "long": 0.75})

    overlapping = stage(
        strata=[
            {"task": "speech_lm", "mass": 1, "where": {"duration_seconds": {"max": 0.6}}},
            {"task": "speech_lm", "mass": 1, "where": {"duration_seconds": {"min": 0.6}}},
        ]
    )
    with pytest.raises(InputError, match=r"both take language en, .*pass both of their filters"):
        resolve(overlapping, [apply_filters(overlapping, table(lengths), dataset)])
    apart = stage(
        strata=[
            {"task": "speech_lm", "mass": 1, "where": {"duration_seconds": {"max": 0.6}}},
            {"task": "speech_lm", "mass": 1, "where": {"duration_seconds": {"min": 0.61}}},
        ]
    )
    assert len(resolve(apart, [apply_filters(apart, table(lengths), dataset)]).strata) == 2


def test_a_filter_is_asked_only_of_the_datasets_it_is_for(
    tmp_path: Path, toy_space: Any, make_dataset: Callable[..., Any], document: Any
) -> None:
    dataset = make_dataset(tmp_path / "a", toy_space, "speech_lm", [document(codes=10)] * 3)
    config = stage(
        strata=[{"task": "speech_lm", "mass": 1, "datasets": ["b"], "where": {"extra.mos": {"min": 3}}}]
    )  # fmt: skip
    assert apply_filters(config, table(dataset.lengths), dataset).marks is None


def test_two_strata_of_one_name_are_refused() -> None:
    strata = [{"task": "tts", "mass": 1, "name": "x", "languages": [code]} for code in ("en", "hi")]
    with pytest.raises(InputError, match="two strata are named x"):
        check_stage(stage(strata=strata))


# ---- bounds

mixtures = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 3), st.floats(0.01, 10.0), st.floats(0.02, 1.5)),
    min_size=1,
    max_size=10,
    unique_by=lambda row: row[:3],
)


def nowhere_to_go(
    keys: list[tuple[int, str, str]], mass: np.ndarray, caps: dict[str, float], limits: np.ndarray
) -> float:
    """The mass that has no place whatever the shares: total minus the smallest cut, over all cuts."""
    groups, sources = sorted({key[0] for key in keys}), sorted({key[2] for key in keys})
    smallest = np.inf
    for inside in itertools.product([False, True], repeat=len(groups)):
        for closed in itertools.product([False, True], repeat=len(sources)):
            kept = {group for group, is_in in zip(groups, inside, strict=True) if is_in}
            cut = sum(mass[group] for group in groups if group not in kept)
            cut += sum(caps.get(source, np.inf) for source, shut in zip(sources, closed, strict=True) if shut)
            shut_sources = {source for source, shut in zip(sources, closed, strict=True) if shut}
            cut += sum(
                limit for key, limit in zip(keys, limits, strict=True) if key[0] in kept and key[2] not in shut_sources
            )
            smallest = min(smallest, cut)
    return float(mass[groups].sum() - smallest)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(mixtures, st.dictionaries(st.sampled_from(["s0", "s1", "s2", "s3"]), st.floats(0.02, 1.0)), st.booleans())
def test_bounds_hold_masses_are_kept_and_only_the_impossible_is_refused(
    rows: list[tuple[int, int, int, float, float]], caps: dict[str, float], limited: bool
) -> None:
    keys = [(group, f"l{language}", f"s{source}") for group, language, source, *_ in rows]
    natural = np.array([weight for *_, weight, _ in rows])
    natural /= natural.sum()
    limits = np.array([limit for *_, limit in rows]) if limited else np.full(len(rows), np.inf)
    mass = np.bincount([key[0] for key in keys], natural, minlength=3)

    shares, missing = bounded_shares(natural, keys, caps, limits)

    nowhere = nowhere_to_go(keys, mass, caps, limits)
    assert bool(missing) == (nowhere > 1e-9) or abs(nowhere) < 1e-7
    assert (shares >= 0).all() and (shares <= limits * (1 + 1e-9)).all()
    for source, cap in caps.items():
        assert sum(s for s, key in zip(shares, keys, strict=True) if key[2] == source) <= cap + 1e-9
    if missing:
        assert sum(missing.values()) == pytest.approx(nowhere, abs=1e-7)
        return
    assert np.bincount([key[0] for key in keys], shares, minlength=3) == pytest.approx(mass, abs=1e-9)

    again, _ = bounded_shares(shares + 0.0, keys, caps, limits * (1 + 1e-9))
    assert again == pytest.approx(shares, abs=1e-6)
    order = np.random.default_rng(len(rows)).permutation(len(rows))
    other, _ = bounded_shares(natural[order], [keys[k] for k in order], caps, limits[order])
    assert (other == shares[order]).all()


def test_a_cap_leaves_room_for_those_who_have_no_other_source() -> None:
    # Speech has the web as well; the pairs have the studio alone.
    tables = [
        table([10] * 100, sources=["studio"] * 50 + ["web"] * 50),
        table([10] * 10, name="pairs", task="tts", sources=["studio"] * 10),
    ]
    config = stage(task_mass={"speech_lm": 0.9, "tts": 0.1}, source_caps={"studio": 0.15})
    blend = resolve(config, tables)
    assert {s.name: s.share for s in blend.strata} == pytest.approx(
        {"speech_lm/a/en/studio": 0.05, "speech_lm/a/en/web": 0.85, "tts/pairs/en/studio": 0.1}, abs=1e-6
    )


@settings(max_examples=60, deadline=None)
@given(mixtures, st.floats(0.0, 1.0))
def test_temperature_is_a_power_of_a_languages_tokens(
    rows: list[tuple[int, int, int, float, float]], temperature: float
) -> None:
    keys = [(group, f"l{language}", f"s{source}") for group, language, source, *_ in rows]
    masses = [1.0, 2.0, 4.0]
    groups = sorted({key[0] for key in keys})
    renumbered = [(groups.index(key[0]), *key[1:]) for key in keys]
    counted = np.array([weight * 1000 for *_, weight, _ in rows])
    shares = natural_shares(masses[: len(groups)], renumbered, counted, temperature)
    for index in range(len(groups)):
        tokens: dict[str, float] = {}
        share: dict[str, float] = {}
        for key, count, part in zip(renumbered, counted, shares, strict=True):
            if key[0] == index:
                tokens[key[1]] = tokens.get(key[1], 0.0) + count
                share[key[1]] = share.get(key[1], 0.0) + part
        weights = {language: count**temperature for language, count in tokens.items()}
        mass = masses[index] / sum(masses[: len(groups)])
        for language, weight in weights.items():
            assert share[language] == pytest.approx(mass * weight / sum(weights.values()))


# ---- limits of epochs


def test_a_limit_of_epochs_hands_the_rest_to_the_group_and_says_so() -> None:
    tables = [table([10] * 400, languages=["en"] * 390 + ["am"] * 10)]
    free = resolve(stage(tokens=4096, language_temperature=0.0), tables)
    assert shares_by(free, "language") == pytest.approx({"en": 0.5, "am": 0.5})  # Amharic: 20 epochs
    blend = resolve(stage(tokens=4096, language_temperature=0.0, epoch_limit=4), tables)
    (name,) = blend.limited
    assert name == "speech_lm/a/am/toy"
    share = shares_by(blend, "language")
    assert share["am"] * 4096 <= 4 * 100 and share["am"] * 4096 == pytest.approx(4 * 100, abs=25)
    assert sum(share.values()) == pytest.approx(1.0)


def test_what_was_trained_on_before_counts_towards_the_limit() -> None:
    tables = [table([10] * 400, languages=["en"] * 390 + ["am"] * 10)]
    config = stage(tokens=4096, language_temperature=0.0, epoch_limit=4)
    blend = resolve(config, tables, tokens=2048, taken={"speech_lm/a/am/toy": 250})
    assert shares_by(blend, "language")["am"] * 2048 == pytest.approx(150, abs=25)
    over = resolve(config, tables, tokens=2048, taken={"speech_lm/a/am/toy": 400})
    assert [s.language for s in over.strata] == ["en"]
    assert over.limited["speech_lm/a/am/toy"]["given"] == 0.0


def test_a_limit_that_the_budget_cannot_keep_is_refused() -> None:
    with pytest.raises(InputError, match=r"epoch limits leave .* of the stage's tokens without a source"):
        resolve(stage(tokens=4096, epoch_limit=2), [table([10] * 100)])


def test_a_stratum_may_have_a_limit_of_its_own() -> None:
    tables = [table([10] * 200, languages=["en"] * 180 + ["am"] * 20)]
    strata = [
        {"task": "speech_lm", "mass": 1, "name": "all", "epoch_limit": 50},
    ]
    assert not resolve(stage(tokens=4096, epoch_limit=1, strata=strata), tables).limited


# ---- fields


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"packing": {"mode": "cut", "max_tokens": 32}}, "packing.max_tokens is 32 but packing.mode is cut"),
        ({"packing": {"mode": "bucket", "max_tokens": 65}}, "packing.max_tokens 65 is above seq_length 64"),
        ({"packing": {"mode": "bucket"}, "stitch": {}}, "stitch makes documents of up to seq_length 64"),
        ({"loss": {"prompt": 0.5}, "stitch": {}}, "stitch with loss.prompt 0.5"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_stage(stage(**fields))
