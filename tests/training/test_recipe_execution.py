"""Sections that say how a model is computed: what they refuse, and what a run tells of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from toy_runs import read_metrics, toy_recipe, train, without_timing, write_recipe

from megatron_speech.errors import InputError
from megatron_speech.recipe.load import load_recipe


@pytest.fixture
def recipe_file(toy: Path, tmp_path: Path) -> Path:
    recipe = toy_recipe(toy, validation={"interval_steps": 0})
    recipe["stages"] = recipe["stages"][:1]
    recipe["stages"][0]["tokens"] = 6 * 512
    return write_recipe(tmp_path / "recipe.yaml", recipe)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["fp8.recipe=delayed"], "fp8 is set, but precision is fp32; set precision: fp8, or leave fp8 out"),
        (["precision=fp8", "fp8={recipe: delayed, bf16_ends: 1}"], "fp8.bf16_ends is 1, but a delayed scale"),
        (["precision=fp8", "fp8.bf16_ends=3"], "fp8.bf16_ends is 3: it can be 2 at most"),
        (["precision=fp8", "stages.pt.seq_length=8", "stages.pt.micro_batch_size=1"],
         "seq_length 8 × micro_batch_size 1 is not a multiple of 16, which precision fp8 needs"),
        (["precision=fp8", "model={preset: tiny, hidden_size: 72, kv_channels: 16}"],
         "model.hidden_size is 72: precision fp8 needs a multiple of 16"),
        (["precision=fp8", "fp8.recipe=blockwise", "parallel={tensor: 2, sequence_parallel: true}"],
         "model.hidden_size is 64: precision fp8 needs a multiple of 128 on parallel.tensor 2"),
        (["precision=fp8", "parallel.tensor=2", "model={preset: tiny, ffn_hidden_size: 176}"],
         "model.ffn_hidden_size is 176: precision fp8 needs a multiple of 32"),
        (["fp8.recpe=delayed"], "unknown key 'fp8.recpe'; did you mean 'recipe'"),
        (["recompute.layers=2"], "recompute.layers is 2, but mode none does not read it"),
        (["recompute={mode: full, modules: [mlp]}"], "recompute.modules is ['mlp'] with mode full"),
        (["parallel.pipeline_layout=[2]"], "pipeline_layout needs pipeline above 1"),
        (["parallel={pipeline: 2, pipeline_layout: [1, 2]}"], "adds up to 3 layers, model.num_layers is 2"),
        (["parallel={pipeline: 2, pipeline_layout: [1, 0, 1]}"], "has 3 entries"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_a_sentence(recipe_file: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(InputError) as refused:
        load_recipe(recipe_file, overrides)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_what_is_set_reads_back_the_same(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(
        recipe_file,
        [
            "precision=fp8",
            "fp8={recipe: tensorwise, format: e4m3, bf16_ends: 1}",
            "recompute={mode: selective, modules: [mlp, core_attn]}",
            "parallel={pipeline: 2, pipeline_layout: [2, 0], context: 2}",
            "model.backend=te",
        ],
    )
    recipe.save(tmp_path / "again.yaml")
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_fp8_without_transformer_engine_ends_with_a_sentence(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(recipe_file, tmp_path / "run", "precision=fp8") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: precision fp8 needs Transformer Engine, but ") and error.count("\n") == 1


@pytest.mark.slow
def test_a_run_tells_what_it_runs_on_and_what_it_recomputes(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(recipe_file, tmp_path / "plain") == 0
    assert "recompute" not in capsys.readouterr().out
    assert train(recipe_file, tmp_path / "full", "recompute.mode=full", "model.backend=torch") == 0
    out = capsys.readouterr().out
    assert "layers run on torch (model.backend: torch)" in out
    assert "recompute full: 2 of 2 layers are computed again in the backward pass, +" in out
    spared = re.search(r"recomputation: activations (.*) GiB, (.*) without it", out)
    assert spared and 0 < float(spared[1]) < float(spared[2])
    recorded = json.loads((tmp_path / "full" / "environment.json").read_text())["model"]
    assert recorded == {
        "backend": "torch", "backend_reason": "model.backend: torch", "layers_per_pipeline_chunk": [2],
    }  # fmt: skip
    lines = [without_timing(read_metrics(tmp_path / name)) for name in ("plain", "full")]
    assert lines[0] == lines[1]
