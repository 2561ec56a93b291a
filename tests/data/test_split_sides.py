"""A split that leaves nothing on a side, or that one source decides, is said where it is used."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from megatron_speech.data.dataset.split import SplitCount, SplitSides, is_held_out, name_hash
from megatron_speech.data.stage import StageData
from megatron_speech.recipe.data import DataConfig
from megatron_speech.recipe.stage import StageDataConfig
from megatron_speech.tokens.space import TokenSpace


def sides_of(sources: list[str], tokens: list[int], fraction: float, batch: int = 7) -> SplitSides:
    count = SplitCount()
    hashes, lengths = name_hash(pa.array(sources)), np.array(tokens, np.int32)
    columns = pa.table({"source_id": sources, "sample_id": [""] * len(sources)})
    parts = [slice(first, first + batch) for first in range(0, len(sources), batch)]
    for part in parts:
        count.add(hashes[part], lengths[part], is_held_out(hashes[part], fraction, 0))
    return count.finish(lambda: ((hashes[p], lengths[p], columns.slice(p.start, batch)) for p in parts))


def test_a_source_with_more_than_half_of_the_tokens_is_found_and_no_other() -> None:
    sources = [f"talk {i}" for i in range(300)] + ["a.tar"] * 300
    random = np.random.default_rng(0).permutation(600)
    for heavy, share in ((9, 0.474), (10, 0.5), (11, 0.524)):
        tokens = [10] * 300 + [heavy] * 300
        sides = sides_of([sources[i] for i in random], [tokens[i] for i in random], 0.1)
        assert (sides.documents, sides.tokens) == (600, sum(tokens))
        assert (sides.heavy_source, sides.heavy_tokens) == (("a.tar", heavy * 300) if share > 0.5 else (None, 0))
        (finding,) = sides.findings("d", 0.1) or [""]
        assert ("source 'a.tar' holds 52% of the tokens" in finding) is (share > 0.5)


def test_both_sides_are_counted() -> None:
    sources = [f"talk {i}" for i in range(500)]
    sides = sides_of(sources, list(range(500)), 0.2)
    held = is_held_out(name_hash(pa.array(sources)), 0.2, 0)
    assert (sides.held_out_documents, sides.held_out_tokens) == (held.sum(), np.flatnonzero(held).sum())
    assert sides.findings("d", 0.2) == []
    assert sides_of(["one"], [5], 0.2).findings("d", 0.2) == [], "one document has one side"


def three_talks(i: int, *, fraction: float, held: bool) -> str:
    """One of three sources, all on one side."""
    names = [f"talk {k}" for k in range(200)]
    side = is_held_out(name_hash(pa.array(names)), fraction, 0)
    return names[np.flatnonzero(side == held)[i % 3]]


STAGE: dict[str, Any] = {
    "name": "pt", "task_mass": {"speech_lm": 1.0}, "tokens": 64 * 16, "seq_length": 64, "global_batch_tokens": 64 * 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("source_of", "fraction", "found"),
    [
        (lambda i: "/corpus/a.tar", 0.01, "source '/corpus/a.tar' holds 100% of the tokens; 0 of its 60 documents"),
        (
            partial(three_talks, fraction=0.01, held=False),
            0.01,
            "nothing is held out to validate on; 0 of its 60",
        ),
        (partial(three_talks, fraction=0.5, held=True), 0.5, "nothing is left to train on; 60 of its 60"),
        (lambda i: f"a.tar/{i}", 0.2, None),
    ],
)
def test_a_blend_says_how_its_datasets_are_split(
    tmp_path: Path,
    toy_space: TokenSpace,
    make_dataset: Any,
    document: Any,
    source_of: Callable[[int], str],
    fraction: float,
    found: str | None,
) -> None:
    datasets = {}
    for name, source in (("d", source_of), ("sound", lambda i: f"{i}.wav")):
        documents = [document(codes=20, source_id=source(i)) for i in range(60)]
        datasets[name] = make_dataset(tmp_path / name, toy_space, "speech_lm", documents)
    data = DataConfig(datasets={name: str(tmp_path / name) for name in datasets}, validation_fraction=fraction)
    stage = StageData(StageDataConfig(**STAGE), data, datasets, toy_space, seed=1, cache_dir=tmp_path / "cache")
    about_d = [warning for warning in stage.warnings if "dataset d:" in warning]
    assert len(about_d) == (found is not None) and (found is None or found in about_d[0])
    report = stage.blend_report()
    assert report["split_sides"]["d"]["documents"] == 60 and report["warnings"] == stage.warnings
    # The index is found again, and says the same.
    again = StageData(StageDataConfig(**STAGE), data, datasets, toy_space, seed=1, cache_dir=tmp_path / "cache")
    assert again.warnings == stage.warnings
