"""Harmful steps are skipped, logged and rolled back from; a continued run decides the same."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_runs import copy_until, read_metrics, toy_recipe, train, without_timing, write_recipe

from megatron_speech.recipe.recipe import Recipe
from megatron_speech.recipe.spikes import SpikesConfig


@pytest.fixture
def parallel() -> Iterator[None]:
    from megatron_speech.parallel import groups

    groups.initialize(seed=1)
    yield
    groups.destroy()


VALUE = st.one_of(st.floats(0.5, 2.0, width=32), st.sampled_from([50.0, math.nan, math.inf]))


def test_decisions_are_those_of_a_running_median(parallel: None) -> None:
    from megatron_speech.training.spikes import SpikeGuard

    config = SpikesConfig(grad_norm_above=3.0, loss_above=1.5, window=8, min_steps=5)

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.tuples(VALUE, VALUE), min_size=1, max_size=40))
    def check(measured: list[tuple[float, float]]) -> None:
        guard = SpikeGuard(config, torch.device("cpu"))
        taken: list[tuple[float, float]] = []
        in_row = 0
        expected, decided = [], []
        for number, (loss, norm) in enumerate(measured):
            if number == len(measured) // 2:  # as by a checkpoint
                other = SpikeGuard(config, torch.device("cpu"))
                other.load_state(guard.state())
                other._pending, guard = guard._pending, other
            spike = not (math.isfinite(loss) and math.isfinite(norm))
            if len(taken) >= config.min_steps:
                recent = taken[-config.window :]
                for value, factor, each in ((loss, 1.5, 0), (norm, 3.0, 1)):
                    spike |= value > factor * torch.tensor(statistics.median_low([t[each] for t in recent])).item()
            in_row = in_row + 1 if spike else 0
            if not spike:
                taken.append((loss, norm))
            expected.append(in_row)
            decided.append(guard.decide(torch.tensor(loss), torch.tensor(norm)).item())
        verdicts = guard.read(len(measured))
        assert [verdict.step for verdict in verdicts] == list(range(1, len(measured) + 1))
        assert [verdict.skipped_in_row for verdict in verdicts] == expected
        assert decided == [float(number > 0) for number in expected]
        assert all(bool(verdict.reason) == (verdict.skipped_in_row > 0) for verdict in verdicts)

    check()


@pytest.mark.parametrize("distributed", [False, True])
def test_a_skipped_step_moves_nothing(parallel: None, distributed: bool) -> None:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from megatron_speech.model.builder import build_model
    from megatron_speech.parallel import groups
    from megatron_speech.training.optim.optimizer import Optimizer

    values = toy_recipe(Path("/toy"), ema={"decay": 0.9}, parallel={"distributed_optimizer": distributed})
    recipe = Recipe.model_validate(values)

    def make() -> tuple[Any, Optimizer]:
        (chunk,) = build_model(recipe.model, 384, max_sequence_length=64, seed=1)
        chunk.to(groups.device())
        wrapped = DistributedDataParallel(
            chunk.config, DistributedDataParallelConfig(use_distributed_optimizer=distributed), chunk
        )
        optimizer = Optimizer(recipe, [wrapped], frozen_ids=100)
        optimizer.start_stage(recipe.stages[0]).step(6)
        return wrapped, optimizer

    def take(model: Any, optimizer: Optimizer, seed: int, skip: Callable[[Any], Any] | None) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.module.parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
        if seed == 99:
            next(model.module.parameters()).main_grad.fill_(math.nan)
        optimizer.step(skip)

    model, optimizer = make()
    other, reference = make()
    for seed in (1, 99, 2, 99, 99, 3):
        take(model, optimizer, seed, lambda norm: (~torch.isfinite(norm)).float())
        if seed != 99:
            take(other, reference, seed, None)
    for mine, theirs in zip(model.module.parameters(), other.module.parameters(), strict=True):
        assert torch.equal(mine, theirs) and torch.isfinite(mine).all()
    with optimizer.averaged_weights(), reference.averaged_weights():
        for mine, theirs in zip(model.module.parameters(), other.module.parameters(), strict=True):
            assert torch.equal(mine, theirs)
    states = [each.core.chained_optimizers[0].optimizer.state for each in (optimizer, reference)]
    for mine, theirs in zip(states[0].values(), states[1].values(), strict=True):
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


# ---- in runs


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, float]], None]:
    """spoil({step: factor}): the gradients of these steps are multiplied by the factors, in every run from here on."""
    from megatron_speech.training.loop import TrainingLoop
    from megatron_speech.training.run import Run
    from megatron_speech.training.step import TrainStep

    factors: dict[int, float] = {}
    runs: list[Run] = []
    begin, run_batch = TrainingLoop.__init__, TrainStep.run_batch

    def remember(self: Any, run: Run, events: Any) -> None:
        runs.append(run)
        begin(self, run, events)

    def spoiled(self: Any, *arguments: Any, forward_only: bool) -> None:
        run_batch(self, *arguments, forward_only=forward_only)
        factor = factors.get(runs[-1].progress.position.step + 1)
        if factor is not None and not forward_only:
            for parameter in runs[-1].engine.chunks[0].parameters():
                parameter.main_grad.mul_(factor)

    monkeypatch.setattr(TrainingLoop, "__init__", remember)
    monkeypatch.setattr(TrainStep, "run_batch", spoiled)

    def choose(chosen: dict[int, float]) -> None:
        factors.clear()
        factors.update(chosen)

    return choose


@pytest.fixture
def recipe_file(toy: Path, tmp_path: Path) -> Path:
    values = toy_recipe(
        toy,
        spikes={"grad_norm_above": 10.0, "window": 8, "min_steps": 3, "skip_limit": 3},
        ema={"decay": 0.9},
        checkpoint={"interval_steps": 4, "keep_last": 30},
        validation={"interval_steps": 10, "tokens": 512},
        logging={"interval_steps": 5, "tensorboard": False},
    )
    values["stages"][0]["tokens"], values["stages"][1]["tokens"] = 18 * 512, 512
    return write_recipe(tmp_path / "r.yaml", values)


def weights_of(checkpoint: Path, *, ema: bool = False) -> torch.Tensor:
    from megatron_speech.parallel import groups
    from megatron_speech.training.checkpoint.load import load_for_inference

    try:
        model, _, _ = load_for_inference(checkpoint, ema=ema)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    finally:
        groups.destroy()


def checkpoint_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


@pytest.mark.slow
def test_steps_that_spike_are_skipped_and_named(
    recipe_file: Path, tmp_path: Path, spoil: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    spoil({7: math.nan, 12: 1000.0})
    overrides = ("checkpoint.interval_steps=1", "stages.pt.tokens=6656")
    assert train(recipe_file, tmp_path / "run", *overrides) == 0
    lines = read_metrics(tmp_path / "run")
    skipped = [line for line in lines if line.get("split") == "skipped"]
    assert [(line["step"], line["first_sequence"], line["consumed_sequences"]) for line in skipped] == [
        (7, 48, 56), (12, 88, 96),
    ]  # fmt: skip
    assert skipped[0]["reason"] == "grad_norm is nan" and skipped[0]["grad_norm"] is None
    assert "is above" in skipped[1]["reason"] and skipped[1]["grad_norm"] > 100
    assert all(line["loss"] is not None for line in lines if "split" not in line)
    assert "pt step 7 skipped, sequences 48 to 55: grad_norm is nan" in capsys.readouterr().out
    for step in (7, 12):
        before, after = (checkpoint_of(tmp_path / "run", k) for k in (step - 1, step))
        assert torch.equal(weights_of(before), weights_of(after))
        assert torch.equal(weights_of(before, ema=True), weights_of(after, ema=True))
    continued = copy_until(tmp_path / "run", tmp_path / "copy", 6)
    assert train(recipe_file, continued, *overrides) == 0
    assert without_timing(read_metrics(continued)) == without_timing(lines)
    assert torch.equal(weights_of(tmp_path / "run"), weights_of(continued))


@pytest.mark.slow
def test_the_loss_of_an_interval_is_that_of_the_steps_taken(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_speech.training.spikes import SpikeGuard

    assert train(recipe_file, tmp_path / "single", "logging.interval_steps=1", "stages.pt.tokens=512") == 0
    decide = SpikeGuard.decide

    def all_but_the_first(self: Any, loss: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        return decide(self, loss, norm if self._count == 0 else norm * math.nan)

    monkeypatch.setattr(SpikeGuard, "decide", all_but_the_first)
    overrides = ("logging.interval_steps=4", "stages.pt.tokens=2048", "spikes.skip_limit=9", "stages.sft.tokens=512")
    assert train(recipe_file, tmp_path / "run", *overrides) == 0
    first = read_metrics(tmp_path / "single")[0]
    line = next(line for line in read_metrics(tmp_path / "run") if "split" not in line)
    # The schedule is another, but the first step's loss is that of the weights at the beginning.
    assert line["step"] == 4 and line["loss"] == pytest.approx(first["loss"], rel=1e-12)
    assert line["loss/modality/audio"] == pytest.approx(first["loss/modality/audio"], rel=1e-12)


@pytest.mark.slow
def test_too_many_in_a_row_go_back_to_a_checkpoint_and_over_the_data(
    recipe_file: Path, tmp_path: Path, spoil: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    spoil({9: math.nan, 10: 1000.0, 11: math.nan})
    run = tmp_path / "run"
    assert train(recipe_file, run) == 0
    printed = "pt rolls back to step_00000008 and continues with sequence 88; 64 to 87 are discarded by the rollback"
    assert printed in capsys.readouterr().out
    lines = read_metrics(run)
    (back,) = [line for line in lines if line.get("split") == "rewound"]
    assert (back["step"], back["checkpoint"]) == (11, "step_00000008")
    assert [line["step"] for line in lines if line.get("split") == "skipped"] == [9, 10, 11]
    assert [line["step"] for line in lines if "split" not in line] == [5, 10, 15, 18, 19]
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"], status["consumed_sequences"]) == ("finished", 19, 152)
    # Weights do not move in a skipped step, so here a rollback changes nothing: the same run without one.
    spoil({9: math.nan, 10: math.nan, 11: math.nan})
    assert train(recipe_file, tmp_path / "patient", "spikes.skip_limit=9") == 0
    for step in (12, 18):
        assert torch.equal(weights_of(checkpoint_of(run, step)), weights_of(checkpoint_of(tmp_path / "patient", step)))


@pytest.mark.slow
def test_going_back_takes_the_state_of_the_checkpoint_and_a_continued_run_goes_back_too(
    recipe_file: Path, tmp_path: Path, spoil: Callable[..., None]
) -> None:
    # Steps 9 and 10 are taken and lost: the checkpoint before the bad steps is that of step 8.
    spoil({11: math.nan, 12: math.nan, 13: math.nan})
    run = tmp_path / "run"
    assert train(recipe_file, run) == 0
    lines = read_metrics(run)
    (back,) = [line for line in lines if line.get("split") == "rewound"]
    assert (back["step"], back["checkpoint"], back["first_sequence"]) == (13, "step_00000008", 64)
    for name, overrides in (("copy", ()), ("other", ("logging.interval_steps=1", "validation.interval_steps=3"))):
        # Found out at another step, decided the same.
        copy = copy_until(run, tmp_path / name, 4)
        assert train(recipe_file, copy, *overrides) == 0
        if not overrides:
            assert without_timing(read_metrics(copy)) == without_timing(lines)
        for ema in (False, True):
            assert torch.equal(weights_of(run, ema=ema), weights_of(copy, ema=ema))
    # The same from the checkpoint of step 8 with steps 9 to 13 never taken.
    never = copy_until(run, tmp_path / "never", 8)
    spoil(dict.fromkeys(range(9, 14), math.nan))
    assert train(recipe_file, never, "spikes.skip_limit=9") == 0
    for step in (16, 19):
        assert torch.equal(weights_of(checkpoint_of(never, step)), weights_of(checkpoint_of(run, step)))


@pytest.mark.slow
@pytest.mark.parametrize(("last", "stage_steps"), [(18, "512"), (23, "2560"), (21, "1536")])
def test_a_stage_whose_last_step_is_stepped_over_ends_with_a_checkpoint(
    recipe_file: Path, tmp_path: Path, spoil: Callable[..., None], last: int, stage_steps: str
) -> None:
    """Of the first stage, and of the last one: then the run is finished, and stays so. The third is all skipped."""
    spoil(dict.fromkeys(range(last - 2, last + 1), math.nan))
    run = tmp_path / "run"
    overrides = ("validation.interval_steps=4", f"stages.sft.tokens={stage_steps}")
    assert train(recipe_file, run, *overrides) == 0
    (back,) = [line for line in read_metrics(run) if line.get("split") == "rewound"]
    assert back["step"] == last
    fields = json.loads((checkpoint_of(run, last) / "checkpoint.json").read_text())
    assert fields["stage_ended"] and fields["validation"]["loss"] > 0
    assert torch.equal(weights_of(checkpoint_of(run, last)), weights_of(run / "checkpoints" / back["checkpoint"]))
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", 18 + int(stage_steps) // 512)
    lines = read_metrics(run)
    continued = copy_until(run, tmp_path / "copy", last)
    assert train(recipe_file, continued, *overrides) == 0
    assert without_timing(read_metrics(continued)) == without_timing(lines)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["spikes.rewind_limit=0"],
            r"9 to 11 were skipped \(grad_norm is nan\), and the stage was rolled back 0 times",
        ),
        (["checkpoint.interval_steps=0"], "there is no checkpoint from before them to roll back to"),
        (["spikes.rewind_limit=1"], "steps 12 to 14 were skipped .*, and the stage was rolled back 1 times"),
    ],
)
def test_a_run_that_cannot_go_back_ends_with_a_sentence(
    recipe_file: Path,
    tmp_path: Path,
    spoil: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    sentence: str,
) -> None:
    spoil(dict.fromkeys(range(9, 18), math.nan))
    assert train(recipe_file, tmp_path / "run", *overrides) == 1
    error = capsys.readouterr().err
    assert re.search(sentence, error) and "--change stages.pt.lr.peak=0.0025" in error
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
