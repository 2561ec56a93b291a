"""Three ways to go on from a checkpoint: continue the run, a new run from its weights, a new run with its moments."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from toy_runs import copy_until, read_metrics, toy_recipe, train, without_timing, write_recipe

pytestmark = pytest.mark.slow


def recipe_of(toy: Path, *stages: str, **changes: Any) -> dict[str, Any]:
    """Stages `pt` (6 steps) and `sft` (4 steps), without validation; every step has its line."""
    recipe = toy_recipe(toy, validation={"interval_steps": 0}, checkpoint={"interval_steps": 3, "keep_last": 10})
    both = {"pt": recipe["stages"][0] | {"tokens": 6 * 512}, "sft": recipe["stages"][1] | {"tokens": 4 * 512}}
    recipe["logging"]["interval_steps"] = 1
    return {**recipe, "stages": [both[name] for name in stages], **changes}


@pytest.fixture(scope="module")
def both(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Runs of both stages, by whether the second one carries the optimizer over."""
    folder = tmp_path_factory.mktemp("both")
    runs = {}
    for carried in (False, True):
        recipe = recipe_of(toy, "pt", "sft")
        recipe["stages"][1]["carry_optimizer"] = carried
        runs[carried] = folder / f"carry_{carried}"
        assert train(write_recipe(folder / f"{carried}.yaml", recipe), runs[carried]) == 0
    return runs


def lines(run: Path, stage: str) -> list[dict[str, Any]]:
    """A stage's lines, but for what counts from the run's beginning."""
    counts = {"step", "consumed_sequences", "consumed_tokens"}
    return [
        {key: value for key, value in line.items() if key not in counts}
        for line in without_timing(read_metrics(run))
        if line["stage"] == stage
    ]


@pytest.mark.parametrize("mode", ["transfer", "fine-tune"])
@pytest.mark.parametrize("carried", [False, True])
def test_a_new_run_from_a_checkpoint_is_the_stage_that_would_have_followed_it(
    toy: Path, both: dict[bool, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str, carried: bool
) -> None:
    """Digit for digit: with the moments where they are carried over, from zero where they are not."""
    first = both[False] / "checkpoints" / "step_00000006"
    recipe = recipe_of(toy, "sft", init={"checkpoint": str(first), "mode": mode})
    recipe["stages"][0]["carry_optimizer"] = carried
    assert train(write_recipe(tmp_path / "r.yaml", recipe), tmp_path / "run") == 0
    moments = mode == "fine-tune" and carried
    rest = "the optimizer's moments too; schedules, data and steps start at 0" if moments else "starts afresh"
    said = next(line for line in capsys.readouterr().out.splitlines() if f"{mode}: weights from {first}" in line)
    assert "(step 6 of a run, fp32)" in said and said.endswith(rest)
    assert lines(tmp_path / "run", "sft") == lines(both[moments], "sft")
    assert lines(tmp_path / "run", "sft") != lines(both[not moments], "sft")


def test_a_run_that_has_begun_continues_and_does_not_look_at_init_again(
    toy: Path, both: dict[bool, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    shutil.copytree(both[True] / "checkpoints" / "step_00000006", source)
    recipe = write_recipe(
        tmp_path / "r.yaml", recipe_of(toy, "sft", init={"checkpoint": str(source), "mode": "fine-tune"})
    )
    assert train(recipe, tmp_path / "run") == 0
    killed = copy_until(tmp_path / "run", tmp_path / "killed", 3)
    shutil.rmtree(source)
    capsys.readouterr()
    assert train(recipe, killed) == 0
    out = capsys.readouterr().out
    assert f"continuing from {killed / 'checkpoints' / 'step_00000003'}" in out and "weights from" not in out
    assert without_timing(read_metrics(killed)) == without_timing(read_metrics(tmp_path / "run"))


def test_moments_that_a_checkpoint_has_not_got_are_asked_for_in_vain(
    toy: Path, both: dict[bool, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = both[True] / "checkpoints" / "step_00000006"
    recipe = recipe_of(toy, "pt", init={"checkpoint": str(first), "mode": "fine-tune"}, precision="bf16")
    path = write_recipe(tmp_path / "r.yaml", recipe)
    assert train(path, tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert f"init.checkpoint {first} lacks optimizer.state.fp32_param." in error and error.count("\n") == 1
    assert "set stages.pt.carry_optimizer: false, or init.mode: transfer" in error
    assert train(path, tmp_path / "run", "stages.pt.carry_optimizer=false") == 0


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["stages.pt.seq_length=128"], "stages.0.seq_length was 64, the recipe now says 128"),
        (["stages.pt.global_batch_tokens=1024"], "stages.0.global_batch_tokens was 512, the recipe now says 1024"),
        (["stages.pt.task_mass={speech_lm: 1}"], "stages.0.task_mass"),
        (["precision=bf16"], "precision was 'fp32', the recipe now says 'bf16'"),
    ],
)
def test_what_would_be_another_run_is_refused_and_named(
    toy: Path,
    both: dict[bool, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    sentence: str,
) -> None:
    run = copy_until(both[False], tmp_path / "run", 3)
    recipe = write_recipe(tmp_path / "r.yaml", recipe_of(toy, "pt", "sft"))
    assert train(recipe, run, *overrides) == 2
    error = capsys.readouterr().err
    assert sentence in error and "start a new run with another run_dir" in error


def test_micro_batches_are_nobodys_business(toy: Path, both: dict[bool, Path], tmp_path: Path) -> None:
    run = copy_until(both[False], tmp_path / "run", 3)
    recipe = write_recipe(tmp_path / "r.yaml", recipe_of(toy, "pt", "sft"))
    assert train(recipe, run, "stages.pt.micro_batch_size=8", "stages.sft.micro_batch_size=1") == 0
    for line, other in zip(read_metrics(run), read_metrics(both[False]), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
