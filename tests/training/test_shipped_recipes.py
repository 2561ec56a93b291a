"""The shipped recipes hold the figures that they are meant to hold, written out here a second time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_speech.errors import InputError
from megatron_speech.recipe.checkpoint import is_due
from megatron_speech.recipe.load import load_recipe
from megatron_speech.recipe.model import ModelConfig
from megatron_speech.recipe.recipe import Recipe
from megatron_speech.recipe.stage import StageConfig

VOCABULARY = 193_800
PRETRAINING = ("s1", "s2", "s3")
SIZES = {"pt_sft_1b": (1.0e9, 1.7e9, 1.5e-4), "pt_sft_1.7b": (1.5e9, 2.1e9, 1.2e-4)}


@pytest.fixture(params=SIZES)
def shipped(request: pytest.FixtureRequest, repository: Path) -> tuple[Recipe, float]:
    """A recipe as it is shipped, and the peak of its first stage's learning rate."""
    recipe = load_recipe(repository / "examples" / "recipes" / f"{request.param}.yaml", ["init=null"])
    fewest, most, peak = SIZES[request.param]
    assert fewest < recipe.model.parameters(VOCABULARY) < most
    return recipe, peak


def stages(recipe: Recipe) -> dict[str, StageConfig]:
    return {stage.name: stage for stage in recipe.stages}


def test_masses_are_of_the_stage(shipped: tuple[Recipe, float]) -> None:
    found = stages(shipped[0])
    assert [stage.name for stage in shipped[0].stages] == ["s1", "s2", "s3", "sft"]
    assert found["s1"].task_mass == {"speech_lm": 80, "tts": 10, "text_lm": 10}
    assert found["s2"].task_mass == {"speech_lm": 60, "tts": 35, "text_lm": 5}
    assert found["sft"].task_mass == {"tts": 1}
    long = found["s3"]
    assert long.task_mass == {"speech_lm": 1} and long.stitch is not None
    # Only what really follows each other: same source, same speaker, segment order.
    assert (long.stitch.singles, long.stitch.missing) == ("drop", "refuse")
    assert [found[name].stitch for name in ("s1", "s2", "sft")] == [None] * 3


def test_pretraining_is_shared_out_70_20_10(shipped: tuple[Recipe, float]) -> None:
    found = stages(shipped[0])
    total = sum(found[name].tokens for name in PRETRAINING)
    assert [found[name].tokens / total for name in PRETRAINING] == pytest.approx([0.7, 0.2, 0.1])


def test_lengths_and_batches(shipped: tuple[Recipe, float]) -> None:
    found = stages(shipped[0])
    assert [stage.seq_length for stage in shipped[0].stages] == [2048, 2048, 4096, 2048]
    for name in PRETRAINING:
        assert found[name].global_batch_tokens == pytest.approx(0.5e6, rel=0.05)
    assert found["sft"].global_batch_tokens == pytest.approx(0.25e6, rel=0.05)
    for ranks in (8, 16, 32, 64):
        assert shipped[0].data_parallel_size(ranks) == ranks


def test_learning_rates_fall_from_stage_to_stage(shipped: tuple[Recipe, float]) -> None:
    recipe, peak = shipped
    assert [(stage.lr.peak, stage.lr.floor) for stage in recipe.stages] == [
        (peak, 3.0e-5), (3.0e-5, 1.5e-5), (1.5e-5, 7.0e-6), (1.5e-5, 5.0e-6),
    ]  # fmt: skip
    assert [stage.lr.warmup for stage in recipe.stages] == [0.1, 0.0, 0.0, 0.05]
    assert {stage.lr.schedule for stage in recipe.stages} == {"cosine"}
    assert not any(stage.allow_lr_increase for stage in recipe.stages)
    assert [stage.carry_optimizer for stage in recipe.stages] == [True, True, True, False]


def test_every_token_is_learned_and_in_fine_tuning_the_target_speech_only(shipped: tuple[Recipe, float]) -> None:
    for stage in shipped[0].stages:
        loss = stage.loss
        assert (loss.text, loss.audio, loss.special) == (1.0, 1.0, 1.0)
        assert loss.prompt == (0.0 if stage.name == "sft" else 1.0) and stage.is_sft == (stage.name == "sft")
        assert not stage.allow_text_in_sft


def test_languages_and_sources_are_balanced(shipped: tuple[Recipe, float]) -> None:
    found = stages(shipped[0])
    assert [stage.language_temperature for stage in shipped[0].stages] == [0.7, 0.7, 0.7, 0.5]
    assert list(found["sft"].source_caps.values()) == [0.15]


def test_the_optimizer_is_the_shared_one(shipped: tuple[Recipe, float]) -> None:
    recipe, _ = shipped
    optimizer = recipe.optimizer
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay, optimizer.clip_grad) == (0.9, 0.95, 0.1, 1.0)
    assert recipe.precision == "bf16"
    assert recipe.ema is not None and recipe.ema.decay == 0.9999
    early = stages(recipe)["sft"].early_stop
    assert early is not None and (early.patience, early.min_delta) == (5, 0.01)


def test_checkpoints_are_dense_early_then_sparse_and_validation_every_2000_steps(
    shipped: tuple[Recipe, float],
) -> None:
    recipe, _ = shipped
    assert recipe.validation.interval_steps == 2000
    for stage in recipe.stages:
        assert stage.checkpoint is not None
        due = [step for step in range(1, 40_001) if is_due(stage.checkpoint, step)]
        dense, until, sparse = (1000, 10_000, 2000) if stage.name == "sft" else (2000, 20_000, 5000)
        assert due == [*range(dense, until + 1, dense), *range(until + sparse, 40_001, sparse)]


def test_a_stage_without_its_metadata_can_be_left_out(repository: Path) -> None:
    file = repository / "examples" / "recipes" / "pt_sft_1b.yaml"
    recipe = load_recipe(file, ["init=null", "stages.s3.skip=true"])
    assert [stage.name for stage in recipe.stages] == ["s1", "s2", "sft"]
    everything = [f"stages.{name}.skip=true" for name in ("s1", "s2", "s3", "sft")]
    with pytest.raises(InputError, match="every stage is skipped"):
        load_recipe(file, ["init=null", *everything])


def test_the_smoke_recipe_takes_seconds(repository: Path) -> None:
    recipe = load_recipe(repository / "examples" / "recipes" / "smoke.yaml")
    assert [stage.name for stage in recipe.stages] == ["pt", "sft"] and recipe.total_steps < 50
    assert recipe.model == ModelConfig.model_validate({"preset": "tiny"})


def test_examples_of_datasets_are_named_by_their_task(shipped: tuple[Recipe, float]) -> None:
    names: Any = shipped[0].data.datasets
    assert set(names) == {"speech", "tts", "text"}
