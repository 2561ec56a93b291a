"""What is frozen stays bit for bit, and the rest trains as if it were not there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_runs import toy_recipe, train, write_recipe

from megatron_speech.errors import InputError
from megatron_speech.recipe.recipe import Recipe

TABLE, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


@pytest.fixture
def parallel() -> Iterator[None]:
    from megatron_speech.parallel import groups

    groups.initialize(seed=1)
    yield
    groups.destroy()


def trainable(
    section: dict[str, Any],
    *,
    frozen_ids: int = 0,
    distributed: bool = False,
    precision: Any = "fp32",
    **model: Any,
) -> Any:
    """(recipe, wrapped model, optimizer) of the toy recipe with the section `optimizer`."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from megatron_speech.model.builder import build_model
    from megatron_speech.parallel import groups
    from megatron_speech.training.optim.freezing import freeze_parameters
    from megatron_speech.training.optim.optimizer import Optimizer

    values = toy_recipe(Path("/toy"), optimizer=section, precision=precision)
    values["model"] |= model
    values["parallel"] = {"distributed_optimizer": distributed}
    recipe = Recipe.model_validate(values)
    chunks = build_model(recipe.model, 384, max_sequence_length=64, seed=1, precision=precision)
    chunks[0].to(groups.device())
    freeze_parameters(chunks, recipe.optimizer.freeze)
    config = DistributedDataParallelConfig(use_distributed_optimizer=distributed, grad_reduce_in_fp32=True)
    wrapped = DistributedDataParallel(chunks[0].config, config, chunks[0])
    return recipe, wrapped, Optimizer(recipe, [wrapped], frozen_ids=frozen_ids)


def random_gradients(model: Any, generator: torch.Generator) -> None:
    for parameter in model.module.parameters():
        if parameter.requires_grad:
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tied", "distributed", "precision"),
    [(True, False, "fp32"), (False, False, "fp32"), (True, True, "fp32"), (True, False, "bf16"), (False, True, "bf16")],
)
def test_frozen_rows_are_bit_exact_after_a_thousand_steps_with_decay(
    parallel: None, tied: bool, distributed: bool, precision: str
) -> None:
    frozen = 100
    section = {"weight_decay": 0.1, "layer_lr_decay": 0.9, "freeze_rows": frozen}
    shape = dict(num_layers=1, hidden_size=16, ffn_hidden_size=16, num_attention_heads=2, num_query_groups=2)
    recipe, model, optimizer = trainable(
        section,
        frozen_ids=frozen,
        distributed=distributed,
        precision=precision,
        preset=None,
        tie_embeddings=tied,
        **shape,
    )
    before = {name: parameter.detach().clone() for name, parameter in model.module.named_parameters()}
    scheduler = optimizer.start_stage(recipe.stages[0])
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        random_gradients(model, generator)
        scheduler.step(1)
        optimizer.step()
    tables = {TABLE} if tied else {TABLE, HEAD}
    for name, parameter in model.module.named_parameters():
        if name in tables:
            bits = torch.int32 if precision == "fp32" else torch.int16
            assert torch.equal(parameter[:frozen].view(bits), before[name][:frozen].view(bits)), name
            assert (parameter[frozen:] != before[name][frozen:]).float().mean() > 0.99, name
        else:
            assert not torch.equal(parameter, before[name]), name


def test_rows_that_train_beside_frozen_ones_take_the_steps_they_would_take_alone(parallel: None) -> None:
    """Frozen rows neither count in the norm nor change the decay: as if their gradients had been zero, and no decay."""
    frozen = 100
    _, model, optimizer = trainable({"freeze_rows": frozen, "weight_decay": 0.1}, frozen_ids=frozen)
    recipe, other, reference = trainable({"weight_decay": 0.1})
    schedulers = [each.start_stage(recipe.stages[0]) for each in (optimizer, reference)]
    first, second = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    for _ in range(20):
        random_gradients(model, first)
        random_gradients(other, second)
        other.module.embedding.word_embeddings.weight.main_grad[:frozen] = 0.0
        for scheduler in schedulers:
            scheduler.step(1)
        assert optimizer.step() == reference.step()
    expected = dict(other.module.named_parameters())
    for name, parameter in model.module.named_parameters():
        rows = slice(frozen, None) if name == TABLE else slice(None)
        torch.testing.assert_close(parameter[rows], expected[name][rows], rtol=1e-5, atol=1e-7)


def test_a_stage_that_carries_moments_over_does_not_move_frozen_rows(parallel: None) -> None:
    recipe, model, optimizer = trainable({"freeze_rows": 100}, frozen_ids=100)
    scheduler = optimizer.start_stage(recipe.stages[0])
    random_gradients(model, torch.Generator().manual_seed(0))
    scheduler.step(1)
    optimizer.step()
    table = model.module.embedding.word_embeddings.weight
    for name in ("exp_avg", "exp_avg_sq"):  # as a checkpoint of a run that trained them would bring
        optimizer.core.chained_optimizers[0].optimizer.state[table][name].fill_(1.0)
    before = table[:100].clone()
    optimizer.start_stage(recipe.stages[1]).step(3)
    random_gradients(model, torch.Generator().manual_seed(1))
    optimizer.step()
    assert torch.equal(table[:100], before)


def test_frozen_parameters_stay_and_do_not_count_in_the_norm(parallel: None) -> None:
    recipe, model, optimizer = trainable({"freeze": ["decoder.layers.0.*", "embedding.*"], "clip_grad": 1.0})
    before = {name: parameter.detach().clone() for name, parameter in model.module.named_parameters()}
    scheduler = optimizer.start_stage(recipe.stages[0])
    scheduler.step(1)
    random_gradients(model, torch.Generator().manual_seed(0))
    trained = {name: p for name, p in model.module.named_parameters() if p.requires_grad}
    norm = torch.cat([p.main_grad.flatten() for p in trained.values()]).norm()
    assert optimizer.step() == pytest.approx(norm.item(), rel=1e-5)
    assert trained and all(not name.startswith(("decoder.layers.0.", "embedding.")) for name in trained)
    for name, parameter in model.module.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trained), name


@pytest.mark.parametrize(
    ("patterns", "sentence"),
    [
        (["decoder.layers.7.*"], "'decoder.layers.7.*' matches no parameter; their names are like decoder.final"),
        (["*"], "leave no parameter to train"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(parallel: None, patterns: list[str], sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        trainable({"freeze": patterns})
    assert sentence in str(caught.value)


@pytest.mark.slow
def test_a_run_with_frozen_parts_is_saved_and_continues(toy: Path, tmp_path: Path) -> None:
    """The first layer, the text rows of the table: saved, loaded into a run that goes on, and where they were."""
    from megatron_speech.parallel import groups
    from megatron_speech.tokens.space import TokenSpace
    from megatron_speech.training.checkpoint.load import load_for_inference

    section = {"freeze": ["decoder.layers.0.*"], "freeze_rows": "text", "layer_lr_decay": 0.9}
    recipe = write_recipe(tmp_path / "r.yaml", toy_recipe(toy, optimizer=section))
    assert train(recipe, tmp_path / "run", "stages.pt.tokens=2560", "stages.sft.tokens=512") == 0
    assert train(recipe, tmp_path / "run", "stages.pt.tokens=2560", "stages.sft.tokens=5120") == 0
    frozen = TokenSpace.load(toy / "ts.json").text_size
    weights = []
    for step in (5, 15):
        model, _, _ = load_for_inference(tmp_path / "run" / "checkpoints" / f"step_{step:08d}")
        weights.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
        groups.destroy()
    before, after = weights
    for name in before:
        if name == TABLE:
            assert torch.equal(before[name][:frozen], after[name][:frozen])
            assert not torch.equal(before[name][frozen:], after[name][frozen:])
        else:
            assert torch.equal(before[name], after[name]) == name.startswith("decoder.layers.0."), name


@pytest.mark.slow
def test_what_trains_beside_frozen_parts_takes_the_step_it_would_take_without_them(toy: Path, tmp_path: Path) -> None:
    """In every way the gradients come: through a frozen head, above a frozen bottom, also where it is recomputed."""
    from megatron_speech.parallel import groups
    from megatron_speech.training.checkpoint.load import load_for_inference

    values = toy_recipe(toy, optimizer={"clip_grad": 0.0}, validation={"interval_steps": 0})
    values["model"]["tie_embeddings"] = False
    values["stages"] = [values["stages"][0] | {"tokens": 512}]
    recipe = write_recipe(tmp_path / "r.yaml", values)
    bottom = ["embedding.*", "decoder.layers.0.*"]
    weights = {}
    for name, patterns, mode in (
        ("all", [], "none"),
        ("bottom", bottom, "none"),
        ("recomputed", bottom, "full"),
        ("head", ["output_layer.*"], "none"),
    ):
        run = tmp_path / name
        assert train(recipe, run, f"optimizer.freeze={patterns}", f"recompute.mode={mode}") == 0
        model, _, _ = load_for_inference(run)
        weights[name] = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
        groups.destroy()
        prefixes = tuple(pattern.removesuffix("*") for pattern in patterns)
        for key, expected in weights["all"].items():
            assert torch.equal(weights[name][key], expected) != key.startswith(prefixes or "-"), (name, key)


def test_more_frozen_rows_than_ids_are_refused(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", toy_recipe(toy))
    assert train(recipe, tmp_path / "run", "optimizer.freeze_rows=9999") == 2
    assert "optimizer.freeze_rows: ids below 9999 are to be frozen, and the token space has" in capsys.readouterr().err
