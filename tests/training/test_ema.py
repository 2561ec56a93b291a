"""The moving average against a naive one, over restarts, for validation and for use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_runs import copy_until, read_metrics, toy_recipe, train, without_timing, write_recipe

from megatron_speech.errors import InputError
from megatron_speech.recipe.recipe import Recipe


def naive_average(weights: list[torch.Tensor], decay: float) -> torch.Tensor:
    """weights[0] is what training begins with; each further one follows an update."""
    average = weights[0].double()
    for n, value in enumerate(weights[1:]):
        d = min(decay, (1 + n) / (10 + n))
        average = d * average + (1 - d) * value.double()
    return average


@pytest.fixture
def parallel() -> Iterator[None]:
    from megatron_speech.parallel import groups

    groups.initialize(seed=1)
    yield
    groups.destroy()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("decay", [0.9999, 0.7])
def test_thirty_updates_give_the_naive_average_in_fp32(
    parallel: None, decay: float, distributed: bool, precision: Any
) -> None:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from megatron_speech.model.builder import build_model
    from megatron_speech.parallel import groups
    from megatron_speech.training.optim.optimizer import Optimizer

    values = toy_recipe(Path("/toy"), ema={"decay": decay}, precision=precision)
    values["parallel"] = {"distributed_optimizer": distributed}
    recipe = Recipe.model_validate(values)
    (chunk,) = build_model(recipe.model, 384, max_sequence_length=64, seed=1, precision=precision)
    chunk.to(groups.device())
    config = DistributedDataParallelConfig(use_distributed_optimizer=distributed, grad_reduce_in_fp32=True)
    model = DistributedDataParallel(chunk.config, config, chunk)
    optimizer = Optimizer(recipe, [model])
    assert optimizer.ema is not None
    scheduler = optimizer.start_stage(recipe.stages[0])
    generator = torch.Generator().manual_seed(0)
    owned = optimizer.ema._owned
    history = [[master.values.detach().clone() for master in owned]]
    for _ in range(30):
        for parameter in model.module.parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
        scheduler.step(1)
        optimizer.step()
        history.append([master.values.detach().clone() for master in owned])
    model_before = [parameter.detach().clone() for parameter in model.module.parameters()]
    with optimizer.averaged_weights():
        for number, master in enumerate(owned):
            expected = naive_average([weights[number] for weights in history], decay)
            assert master.values.dtype == torch.float32
            torch.testing.assert_close(master.values.double(), expected, rtol=2e-6, atol=1e-8)
            there = master.parameter.flatten()[master.start : master.start + master.values.numel()]
            torch.testing.assert_close(there.float(), master.values.flatten().to(there.dtype).float(), rtol=0, atol=0)
    for before, after in zip(model_before, model.module.parameters(), strict=True):
        assert torch.equal(before, after)


def weights_of(checkpoint: Path, *, ema: bool = False) -> dict[str, torch.Tensor]:
    from megatron_speech.parallel import groups
    from megatron_speech.training.checkpoint.load import load_for_inference

    try:
        model, _, _ = load_for_inference(checkpoint, ema=ema)
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    finally:
        groups.destroy()


@pytest.fixture(scope="module")
def averaged_run(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(recipe, run) of 14 steps in two stages, a checkpoint after each step, the first layer frozen."""
    folder = tmp_path_factory.mktemp("ema")
    values = toy_recipe(
        toy,
        ema={"decay": 0.8, "use_for_validation": True},
        optimizer={"freeze": ["decoder.layers.0.*"]},
        checkpoint={"interval_steps": 1, "keep_last": 30},
        validation={"interval_steps": 5, "tokens": 512},
        logging={"interval_steps": 1, "tensorboard": False},
    )
    values["stages"][0]["tokens"], values["stages"][1]["tokens"] = 8 * 512, 6 * 512
    recipe = write_recipe(folder / "r.yaml", values)
    assert train(recipe, folder / "run") == 0
    return recipe, folder / "run"


@pytest.mark.slow
def test_every_checkpoint_holds_the_average_of_the_weights_so_far(averaged_run: tuple[Path, Path]) -> None:
    _, run = averaged_run
    paths = {step: run / "checkpoints" / f"step_{step:08d}" for step in range(1, 15)}
    weights = {step: weights_of(path) for step, path in paths.items()}
    for step in (3, 8):
        # The weights that the run began with are in no checkpoint: the average after one update and two tell them.
        found, first = weights_of(paths[step], ema=True), weights_of(paths[1], ema=True)
        for name in found:
            if name.startswith("decoder.layers.0."):
                assert torch.equal(found[name], weights[step][name])
                continue
            begin = (first[name].double() - 0.9 * weights[1][name].double()) / 0.1
            expected = naive_average([begin, *(weights[k][name] for k in range(1, step + 1))], 0.8)
            torch.testing.assert_close(found[name].double(), expected, rtol=1e-4, atol=2e-6)


@pytest.mark.slow
def test_a_stage_that_resets_the_optimizer_begins_a_new_average(averaged_run: tuple[Path, Path]) -> None:
    _, run = averaged_run
    paths = {step: run / "checkpoints" / f"step_{step:08d}" for step in range(8, 13)}
    weights = {step: weights_of(path) for step, path in paths.items()}
    found = weights_of(paths[12], ema=True)
    for name in found:
        expected = naive_average([weights[k][name] for k in range(8, 13)], 0.8)
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_a_run_that_is_continued_keeps_its_average(averaged_run: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, run = averaged_run
    copy = copy_until(run, tmp_path / "copy", 5)
    assert train(recipe, copy) == 0
    ours, theirs = (weights_of(each / "checkpoints" / "step_00000008", ema=True) for each in (copy, run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert without_timing(read_metrics(copy)) == without_timing(read_metrics(run))


@pytest.mark.slow
def test_validating_the_average_leaves_training_alone(averaged_run: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, run = averaged_run
    assert train(recipe, tmp_path / "plain", "ema.use_for_validation=false", "stages.sft.tokens=512") == 0
    ours, theirs = (without_timing(read_metrics(each)) for each in (tmp_path / "plain", run))
    trained = [[line for line in lines if "split" not in line and line["step"] <= 8] for lines in (ours, theirs)]
    assert trained[0] == trained[1]
    scores = [
        {line["step"]: line["loss"] for line in lines if "split" in line and line["step"] <= 8}
        for lines in (ours, theirs)
    ]
    assert scores[0].keys() == scores[1].keys() and all(scores[0][k] != scores[1][k] for k in scores[0])


@pytest.mark.slow
def test_a_run_that_begins_to_average_starts_from_its_weights(
    averaged_run: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, _ = averaged_run
    assert train(recipe, tmp_path / "run", "ema=null", "stages.pt.tokens=2048", "stages.sft.tokens=512") == 0
    copy = copy_until(tmp_path / "run", tmp_path / "copy", 3)
    with pytest.raises(InputError, match="has no moving average of the weights: its run had no section `ema`"):
        weights_of(copy, ema=True)
    assert train(recipe, copy, "stages.pt.tokens=2560", "stages.sft.tokens=512") == 0
    assert "changed since it was written: ema" in capsys.readouterr().out
    weights = {step: weights_of(copy / "checkpoints" / f"step_{step:08d}") for step in (3, 4, 5)}
    found = weights_of(copy / "checkpoints" / "step_00000005", ema=True)
    for name in found:
        expected = naive_average([weights[k][name] for k in (3, 4, 5)], 0.8)
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-7)
