"""A global batch without a label to learn: the run goes on, and nothing else happens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from toy_runs import copy_until, read_metrics, toy_recipe, train, without_timing, write_recipe

pytestmark = pytest.mark.slow

STEPS = 24
NO_SAVES = ("checkpoint.interval_steps=0",)  # but that of the end


@pytest.fixture(scope="module")
def recipe_file(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Speech with a little text, of which only the text is learned; one sequence a step."""
    values = toy_recipe(
        toy,
        validation={"interval_steps": 0},
        ema={"decay": 0.9},
        checkpoint={"interval_steps": 1, "keep_last": 99},
        logging={"interval_steps": 1, "tensorboard": False},
        spikes={"window": 8, "min_steps": 3, "grad_norm_above": 100.0},
    )
    stage = values["stages"][0] | {"task_mass": {"speech_lm": 0.9, "text_lm": 0.1}, "tokens": STEPS * 64}
    stage |= {"global_batch_tokens": 64, "micro_batch_size": 1, "loss": {"audio": 0.0, "special": 0.0}}
    values["stages"] = [stage]
    return write_recipe(tmp_path_factory.mktemp("nothing") / "r.yaml", values)


@pytest.fixture(scope="module")
def run(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    assert train(recipe_file, folder) == 0
    return folder


def empty_steps(run: Path) -> list[int]:
    return [line["step"] for line in read_metrics(run) if line["loss"] is None]


def state_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights, moments and averages of a checkpoint, by name."""
    from torch.distributed import checkpoint

    reader = checkpoint.FileSystemReader(run / "checkpoints" / f"step_{step:08d}")
    found = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if hasattr(entry, "size")
    }
    checkpoint.load(found, storage_reader=reader, no_dist=True)
    return found


def test_weights_moments_and_averages_stay_and_the_position_and_the_rate_advance(run: Path, recipe_file: Path) -> None:
    lines = {line["step"]: line for line in read_metrics(run)}
    empty = empty_steps(run)
    assert list(lines) == list(range(1, STEPS + 1)) and 3 < len(empty) < STEPS - 3
    rates = [lines[step]["lr"] for step in lines]
    assert rates[5:] == sorted(rates[5:], reverse=True) and len(set(rates)) > STEPS - 4
    for step in empty:
        line = lines[step]
        assert line["loss"] is None and line["grad_norm"] is None and not [key for key in line if "loss/" in key]
        assert line["consumed_sequences"] == step
    step = next(step for step in empty if step > 1)
    before, after = state_of(run, step - 1), state_of(run, step)
    assert before.keys() == after.keys() and len(before) > 40
    assert all(torch.equal(before[name], after[name]) for name in before)
    moved = next(step for step in lines if step > 1 and step not in empty)
    before, after = state_of(run, moved - 1), state_of(run, moved)
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("overrides", [(), ("spikes=null",)], ids=["guarded", "unguarded"])
def test_the_result_does_not_depend_on_how_often_it_is_logged(
    recipe_file: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: tuple[str, ...]
) -> None:
    # An interval of 1 logs every empty step; this one ends on one of them, behind steps that are not empty.
    interval = next(step for step in empty_steps(run) if step > 2)
    other = tmp_path / "run"
    assert train(recipe_file, other, f"logging.interval_steps={interval}", *NO_SAVES, *overrides) == 0
    line = next(line for line in read_metrics(other) if line["step"] == interval)
    assert line["loss"] is not None and line["grad_norm"] is None
    out = capsys.readouterr().out
    assert "nan" not in out
    one, two = state_of(run, STEPS), state_of(other, STEPS)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_goes_on_from_such_a_step_with_the_same_numbers(recipe_file: Path, run: Path, tmp_path: Path) -> None:
    step = next(step for step in empty_steps(run) if step > 4)
    continued = copy_until(run, tmp_path / "run", step)
    assert train(recipe_file, continued, *NO_SAVES) == 0
    assert without_timing(read_metrics(continued)) == without_timing(read_metrics(run))


def test_the_console_says_so_in_words(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(recipe_file, tmp_path / "run", *NO_SAVES) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if "none (nothing to learn)" in line]
    assert len(printed) == len(empty_steps(tmp_path / "run"))
    assert all("grad -" in line for line in printed)


def test_it_enters_no_median_and_counts_in_no_row() -> None:
    from megatron_speech.parallel import groups
    from megatron_speech.recipe.spikes import SpikesConfig
    from megatron_speech.training.spikes import SpikeGuard

    groups.initialize(seed=1)
    try:
        config = SpikesConfig(grad_norm_above=3.0, window=8, min_steps=2)
        one, other = SpikeGuard(config, torch.device("cpu")), SpikeGuard(config, torch.device("cpu"))
        skipped: list[list[float]] = [[], []]
        for norm in (1.0, 1.1, 50.0, None, 60.0, 1.2, None, 9.0):
            for guard, decided in zip((one, other), skipped, strict=True):
                if norm is not None:
                    decided.append(guard.decide(torch.tensor(2.0), torch.tensor(norm)).item())
                elif guard is one:
                    guard.pass_over()
        assert skipped[0] == skipped[1] == [0.0, 0.0, 1.0, 1.0, 0.0, 1.0]
        verdicts = one.read(8)
        assert [verdict.skipped_in_row for verdict in verdicts] == [0, 0, 1, 0, 2, 0, 0, 1]
        # What a rollback has to be from before: step 3, though only two of the three since were skipped.
        assert [verdict.step - verdict.run_length + 1 for verdict in verdicts if verdict.skipped_in_row] == [3, 3, 8]
        limits = [row.limits[1] for row in verdicts]
        assert np.allclose(limits[-1], other.read(6)[-1].limits[1])
    finally:
        groups.destroy()
