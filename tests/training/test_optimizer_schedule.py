"""Learning rates follow their closed form, norms do not decay, clipping scales to the norm."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_runs import toy_recipe

from megatron_speech.training.recipe import LearningRateConfig, Recipe


@pytest.fixture
def trainable() -> Iterator[Any]:
    """make(recipe) → (wrapped chunks, Optimizer) in this process."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from megatron_speech.model.builder import build_model
    from megatron_speech.parallel import groups
    from megatron_speech.training.optimizer import Optimizer

    groups.initialize(seed=1)

    def make(recipe: Recipe) -> tuple[list[Any], Optimizer]:
        chunks = build_model(recipe.model, 384, max_sequence_length=64, seed=1)
        wrapped = [DistributedDataParallel(c.config, DistributedDataParallelConfig(), c) for c in chunks]
        return wrapped, Optimizer(recipe, wrapped)

    yield make
    groups.destroy()


def closed_form(lr: LearningRateConfig, step: int, steps: int) -> float:
    warmup = lr.warmup_steps(steps)
    if step <= warmup:
        return lr.peak * step / warmup
    progress = (step - warmup) / (steps - warmup)
    if lr.schedule == "constant":
        return lr.peak
    share = 0.5 * (1 + math.cos(math.pi * progress)) if lr.schedule == "cosine" else 1 - progress
    return lr.floor + (lr.peak - lr.floor) * share


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    schedule=st.sampled_from(["cosine", "linear", "constant"]),
    warmup=st.sampled_from([0.0, 0.1, 0.5, 3.0]),
    end=st.sampled_from([None, 0.0, 1e-5]),
    steps=st.integers(1, 40),
)
def test_the_learning_rate_has_its_closed_form_at_every_step(
    schedule: Any, warmup: float, end: float | None, steps: int
) -> None:
    from megatron_speech.training.optimizer import Optimizer

    values = toy_recipe(Path("/toy"))
    lr = {"peak": 1e-3, "end": end, "warmup": warmup, "schedule": schedule}
    values["stages"][0].update(lr=lr, tokens=512 * steps)
    stage = Recipe.model_validate(values).stages[0]
    optimizer = object.__new__(Optimizer)  # the schedule alone: no model
    optimizer._parts = []
    optimizer.core = type("Core", (), {"param_groups": [{"lr": 0.0}], "config": type("C", (), {"weight_decay": 0.1})})()
    scheduler = optimizer.start_stage(stage)
    for step in range(1, steps + 1):
        scheduler.step(1)
        assert optimizer.learning_rate == pytest.approx(closed_form(stage.lr, step, steps), rel=1e-9, abs=1e-18)
    if schedule != "constant" and steps > 1:
        assert optimizer.learning_rate == pytest.approx(stage.lr.floor, rel=1e-9)


@pytest.mark.parametrize("decay_embeddings", [True, False])
def test_norms_and_biases_never_decay(trainable: Any, decay_embeddings: bool) -> None:
    values = toy_recipe(Path("/toy"), optimizer={"decay_embeddings": decay_embeddings})
    values["model"]["qkv_bias"] = True
    values["model"]["tie_embeddings"] = False
    recipe = Recipe.model_validate(values)
    (model,), optimizer = trainable(recipe)
    optimizer.start_stage(recipe.stages[0])
    decay = {id(p): group["weight_decay"] for group in optimizer.core.param_groups for p in group["params"]}
    seen = set()
    for name, parameter in model.module.named_parameters():
        table = "word_embeddings" in name or "output_layer" in name
        expected = 0.0 if parameter.dim() == 1 or (table and not decay_embeddings) else 0.1
        assert decay[id(parameter)] == expected, name
        seen.add(name.rsplit(".", 1)[-1])
    assert seen == {"weight", "bias"}


def test_gradients_above_the_limit_are_scaled_to_it_and_others_left_alone(trainable: Any) -> None:
    recipe = Recipe.model_validate(toy_recipe(Path("/toy"), optimizer={"clip_grad": 1.0}))
    (model,), optimizer = trainable(recipe)
    optimizer.start_stage(recipe.stages[0])
    generator = torch.Generator().manual_seed(0)
    for size in (3.0, 0.01):
        for parameter in model.module.parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator) * size)
        before = torch.cat([p.main_grad.flatten() for p in model.module.parameters()]).clone()
        norm = optimizer.step()
        after = torch.cat([p.grad.flatten() for p in model.module.parameters()])
        assert norm.item() == pytest.approx(before.norm().item(), rel=1e-5)
        torch.testing.assert_close(after, before * min(1.0, 1.0 / before.norm().item()), rtol=1e-5, atol=1e-9)


def test_a_reset_optimizer_takes_the_steps_of_a_new_one(trainable: Any) -> None:
    recipe = Recipe.model_validate(toy_recipe(Path("/toy")))

    def take(optimizer: Any, model: Any, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.module.parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
        optimizer.step()

    (used,), optimizer = trainable(recipe)
    (fresh,), other = trainable(recipe)
    scheduler = optimizer.start_stage(recipe.stages[0])
    scheduler.step(3)
    for seed in range(3):
        take(optimizer, used, seed)
    for mine, theirs in zip(used.module.parameters(), fresh.module.parameters(), strict=True):
        theirs.data.copy_(mine.data)
    optimizer.reset_state()
    for each, model in ((optimizer, used), (other, fresh)):
        each.start_stage(recipe.stages[1]).step(1)
        take(each, model, 9)
    for mine, theirs in zip(used.module.parameters(), fresh.module.parameters(), strict=True):
        assert torch.equal(mine, theirs)
