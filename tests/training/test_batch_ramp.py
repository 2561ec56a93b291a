"""A batch that grows: every position has its closed form, and a run can be stopped on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_runs import copy_until, read_metrics, toy_recipe, train, without_timing, write_recipe

from megatron_speech.errors import InputError
from megatron_speech.recipe.load import parse_recipe
from megatron_speech.recipe.recipe import Recipe
from megatron_speech.training.position import Position


def ramped(tokens: int, start: int, increment: int, over: int, full: int, **changes: Any) -> dict[str, Any]:
    """The toy recipe whose first stage has a ramp; sizes in sequences of 64 positions."""
    values = toy_recipe(Path("/toy"), **changes)
    values["stages"][0] |= {
        "tokens": tokens, "global_batch_tokens": full * 64, "micro_batch_size": 1,
        "batch_ramp": {"start": start * 64, "increment": increment * 64, "over": over},
    }  # fmt: skip
    return values


@given(
    start=st.integers(1, 6),
    increment=st.integers(1, 4),
    parts=st.integers(1, 5),
    over=st.integers(1, 40_000),
    more=st.integers(0, 20_000),
)
def test_every_step_takes_the_sequences_that_a_simulation_gives_it(
    start: int, increment: int, parts: int, over: int, more: int
) -> None:
    full = start + parts * increment
    recipe = Recipe.model_validate(ramped(over + more + full * 64, start, increment, over, full))
    stage = recipe.stages[0]
    sizes: list[int] = []
    left = stage.tokens
    for part in range(parts):
        size, seen = (start + part * increment) * 64, 0
        while seen * parts < over and left >= size:
            sizes.append(size // 64)
            seen, left = seen + size, left - size
    while 2 * left >= full * 64:  # to the nearest: at most half a batch more than the budget
        sizes.append(full)
        left -= full * 64
    assert stage.steps == len(sizes) and stage.n_sequences == sum(sizes)
    for step, size in enumerate(sizes):
        sequences, until = stage.batch_at(step)
        assert sequences == size and set(sizes[step:until]) == {size}
        assert stage.sequences_after(step) == sum(sizes[:step])
        position = Position.at_step(recipe, step)
        assert (position.consumed_sequences, position.consumed_tokens) == (sum(sizes[:step]), 64 * sum(sizes[:step]))
    after = Position.at_step(recipe, len(sizes))
    assert (after.stage_index, after.stage_step, after.consumed_sequences) == (1, 0, sum(sizes))


@pytest.mark.parametrize(
    ("ramp", "sentence"),
    [
        ({"start": 512, "increment": 128, "over": 1024}, "batch_ramp goes from 512 to global_batch_tokens 512"),
        ({"start": 128, "increment": 256, "over": 1024}, "to global_batch_tokens 512 in steps of 256; it has to start"),
        ({"start": 192, "increment": 64, "over": 1024}, "batch_ramp.start 192 is not a multiple of seq_length 64"),
        ({"start": 128, "increment": 64, "over": 1024}, "batch_ramp.increment 64 is not a multiple of seq_length 64"),
        ({"start": 128, "increment": 128, "over": 20000}, "batch_ramp.over 20000 is more than its tokens 12288"),
    ],
)
def test_a_ramp_that_cannot_be_is_refused(ramp: dict[str, int], sentence: str) -> None:
    values = toy_recipe(Path("/toy"))
    values["stages"][0]["batch_ramp"] = ramp
    with pytest.raises(InputError) as caught:
        parse_recipe(values, "r.yaml")
    assert sentence in str(caught.value)


def test_a_ramp_has_to_divide_among_the_ranks_too() -> None:
    recipe = Recipe.model_validate(ramped(64 * 200, 3, 1, 64 * 20, 8))
    assert recipe.data_parallel_size(1) == 1
    with pytest.raises(InputError, match=r"batch_ramp.start 192 is not a multiple of .* 2 data-parallel ranks = 128"):
        recipe.data_parallel_size(2)


@pytest.mark.slow
def test_a_run_that_is_stopped_on_the_ramp_goes_on_as_if_it_had_not_been(toy: Path, tmp_path: Path) -> None:
    values = ramped(64 * 60, 2, 2, 64 * 24, 8, logging={"interval_steps": 1, "tensorboard": False})
    values |= {key: toy_recipe(toy)[key] for key in ("token_space", "data")}
    values["checkpoint"] = {"interval_steps": 3, "keep_last": 20}
    values["stages"][1]["tokens"] = 1024
    recipe = write_recipe(tmp_path / "r.yaml", values)
    run = tmp_path / "run"
    assert train(recipe, run) == 0
    lines = read_metrics(run)
    steps = [line["consumed_sequences"] for line in lines if "split" not in line and line["stage"] == "pt"]
    # Three parts of 8 sequences: 4 × 2, 2 × 4, 2 × 6 (the first that reaches 8), then 8 at a time.
    assert steps == [2, 4, 6, 8, 12, 16, 22, 28, 36, 44, 52, 60]
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"], status["consumed_sequences"]) == ("finished", 14, 76)
    for at in (3, 6):
        copy = copy_until(run, tmp_path / f"copy{at}", at)
        assert train(recipe, copy) == 0
        assert without_timing(read_metrics(copy)) == without_timing(lines)
