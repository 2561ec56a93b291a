"""Learning rates follow their closed form, norms do not decay, clipping scales to the norm."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_runs import toy_recipe

from megatron_speech.recipe.learning_rate import LearningRateConfig
from megatron_speech.recipe.recipe import Recipe


@pytest.fixture
def trainable() -> Iterator[Any]:
    """make(recipe) → (wrapped chunks, Optimizer) in this process."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from megatron_speech.model.builder import build_model
    from megatron_speech.parallel import groups
    from megatron_speech.training.optim.optimizer import Optimizer

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
    style = lr.schedule
    if style == "wsd":
        decay = lr.decay_steps(steps)
        style, progress = lr.decay_style, max(0.0, (step - (steps - decay)) / decay)
    share = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "exponential": 2 * 0.5**progress - 1,
        "minus_sqrt": 1 - math.sqrt(progress),
    }[style]
    return lr.floor + (lr.peak - lr.floor) * share


def schedule_only() -> Any:
    """An optimizer that has a schedule and no model: groups that train with 1, 0.5 and 0 times the rate."""
    from megatron_speech.training.optim.optimizer import Optimizer

    optimizer = object.__new__(Optimizer)
    optimizer._parts, optimizer._frozen_rows = [], None
    groups = [{"lr": 0.0, "lr_mult": multiplier, "wd_mult": 0.1} for multiplier in (0.5, 1.0, 0.0)]
    optimizer.core = type("Core", (), {"param_groups": groups})()
    return optimizer


@settings(max_examples=80, deadline=None)
@given(
    schedule=st.sampled_from(["cosine", "linear", "constant", "wsd"]),
    warmup=st.sampled_from([0.0, 0.1, 0.5, 3.0]),
    end=st.sampled_from([None, 0.0, 1e-5]),
    decay=st.sampled_from([0.1, 0.4, 0.9, 1.0, 7.0]),
    style=st.sampled_from(["cosine", "linear", "exponential", "minus_sqrt"]),
    steps=st.integers(1, 40),
)
def test_the_learning_rate_has_its_closed_form_at_every_step(
    schedule: Any, warmup: float, end: float | None, decay: float, style: Any, steps: int
) -> None:
    values = toy_recipe(Path("/toy"))
    lr = {"peak": 1e-3, "end": end, "warmup": warmup, "schedule": schedule}
    if schedule == "wsd":
        lr |= {"decay": decay, "decay_style": style}
    values["stages"][0].update(lr=lr, tokens=512 * steps)
    stage = Recipe.model_validate(values).stages[0]
    optimizer = schedule_only()
    scheduler = optimizer.start_stage(stage)
    for step in range(1, steps + 1):
        scheduler.step(1)
        expected = closed_form(stage.lr, step, steps)
        assert optimizer.learning_rate == pytest.approx(expected, rel=1e-9, abs=1e-18)
        for group in optimizer.core.param_groups:
            assert group["lr"] == pytest.approx(expected * group["lr_mult"], rel=1e-9, abs=1e-18)
            assert group["weight_decay"] == 0.1
    if schedule != "constant" and steps > 1:
        assert optimizer.learning_rate == pytest.approx(stage.lr.floor, rel=1e-9)


@pytest.mark.parametrize(("rule", "power"), [("linear", 1.0), ("sqrt", 0.5)])
def test_a_rate_follows_the_batch_of_its_step(rule: str, power: float) -> None:
    """Through a ramp of 2, 4, 6 sequences up to 8, with a rate that is meant for 4."""
    values = toy_recipe(Path("/toy"))
    lr = {"peak": 1e-3, "end": 1e-4, "warmup": 3, "schedule": "linear"}
    scaled = {**lr, "scale_with_batch": rule, "reference_batch_tokens": 256}
    ramp = {"start": 128, "increment": 128, "over": 1536}
    values["stages"][0].update(lr=scaled, tokens=512 * 9, batch_ramp=ramp, micro_batch_size=1)
    stage = Recipe.model_validate(values).stages[0]
    sizes = [size for size, steps in stage.batches() for _ in range(steps)]
    assert set(sizes) == {128, 256, 384, 512} and len(sizes) == stage.steps
    optimizer = schedule_only()
    scheduler = optimizer.start_stage(stage)
    for step, size in enumerate(sizes, 1):
        scheduler.step(1)
        expected = closed_form(LearningRateConfig(**lr), step, stage.steps) * (size / 256) ** power
        assert optimizer.learning_rate == pytest.approx(expected, rel=1e-9)
        for group in optimizer.core.param_groups:
            assert group["lr"] == pytest.approx(expected * group["lr_mult"], rel=1e-9)
    continued = schedule_only()
    continued.start_stage(stage).step(5)
    assert continued.learning_rate == pytest.approx(
        closed_form(LearningRateConfig(**lr), 5, stage.steps) * (sizes[4] / 256) ** power, rel=1e-9
    )


def test_a_wsd_schedule_stays_at_its_peak_between_warm_up_and_decay() -> None:
    values = toy_recipe(Path("/toy"))
    lr = {"peak": 1e-3, "end": 0.0, "warmup": 5, "schedule": "wsd", "decay": 0.2}
    values["stages"][0].update(lr=lr, tokens=512 * 50)
    optimizer = schedule_only()
    scheduler = optimizer.start_stage(Recipe.model_validate(values).stages[0])
    rates = []
    for _ in range(50):
        scheduler.step(1)
        rates.append(optimizer.learning_rate)
    assert rates[4:40] == [1e-3] * 36 and rates[3] < 1e-3 and rates[40] == pytest.approx(0.9e-3)


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_trains_with_the_rate_and_the_decay_of_its_depth_and_kind(trainable: Any, tied: bool) -> None:
    section: dict[str, Any] = {
        "weight_decay": 0.1, "layer_lr_decay": 0.95, "embeddings": {"lr_multiplier": 0.5, "weight_decay": 0.01},
    }  # fmt: skip
    if not tied:
        section["head"] = {"lr_multiplier": 2.0, "weight_decay": 0.0}
    values = toy_recipe(Path("/toy"), optimizer=section)
    values["model"] |= {"qkv_bias": True, "tie_embeddings": tied, "num_layers": 3}
    recipe = Recipe.model_validate(values)
    (model,), optimizer = trainable(recipe)
    stage = recipe.stages[0]
    scheduler = optimizer.start_stage(stage)

    def expected(name: str) -> float:
        if name == "embedding.word_embeddings.weight":
            return 0.5 if tied else 0.5 * 0.95**3
        if name == "output_layer.weight":
            return 2.0
        return 0.95 ** (2 - int(name.split(".")[2])) if name.startswith("decoder.layers.") else 1.0

    names = {id(parameter): name for name, parameter in model.module.named_parameters()}
    for step in range(1, stage.steps + 1):
        scheduler.step(1)
        seen = set()
        for group in optimizer.core.param_groups:
            for parameter in group["params"]:
                name = names[id(parameter)]
                rate = closed_form(stage.lr, step, stage.steps) * expected(name)
                assert group["lr"] == pytest.approx(rate, rel=1e-9), name
                table = {"embedding.word_embeddings.weight": 0.01, "output_layer.weight": 0.0}.get(name, 0.1)
                assert group["weight_decay"] == (0.0 if parameter.dim() == 1 else table), name
                seen.add(name)
        assert seen == set(names.values())
    assert {name.rsplit(".", 1)[-1] for name in seen} == {"weight", "bias"}
    assert optimizer.learning_rate == pytest.approx(stage.lr.floor)


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
