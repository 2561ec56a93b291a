"""A recipe that cannot fit is refused before anything is built; one that can says what it takes."""

import json
import re

import pytest
import torch
from toy_runs import toy_recipe, train, write_recipe

from megatron_speech import cli
from megatron_speech.errors import InputError
from megatron_speech.model.memory import GIB
from megatron_speech.recipe.load import load_recipe
from megatron_speech.training import plan

CPU = torch.device("cpu")


@pytest.fixture
def recipe_path(toy, tmp_path):
    return write_recipe(tmp_path / "toy.yaml", toy_recipe(toy))


def test_a_model_that_cannot_fit_is_refused_before_the_data_is_read(recipe_path, tmp_path, capsys):
    assert train(recipe_path, tmp_path / "run", "model={preset: 8b}", "precision=bf16", "model.num_layers=4096") == 2
    error = capsys.readouterr().err
    assert re.search(r"stage \w+: a rank needs at least [\d.]+ GiB \(weights .*optimizer .*\).*this machine has", error)
    assert not (tmp_path / "run" / "index_cache").exists()


def test_the_refusal_names_what_is_enough(recipe_path):
    recipe = load_recipe(recipe_path, ["model={preset: 1b}", "precision=bf16", "stages.pt.micro_batch_size=8"])
    vocab_size, enough = 193_856, 64 * GIB
    plan.check_fits(recipe, vocab_size, 8, CPU, enough)
    with pytest.raises(InputError, match=r"any one of these is enough: parallel.distributed_optimizer: true \("):
        plan.check_fits(recipe, vocab_size, 8, CPU, 18 * GIB)
    with pytest.raises(InputError, match=r"no single change is enough; the nearest: "):
        plan.check_fits(recipe, vocab_size, 1, CPU, 2 * GIB)


@pytest.mark.slow
def test_a_run_says_what_it_takes(recipe_path, tmp_path, capsys):
    assert train(recipe_path, tmp_path / "run", "stages.pt.tokens=1024", "stages.sft.tokens=1024") == 0
    out = capsys.readouterr().out
    assert re.search(r"memory of the fullest rank, at least 0\.\d+ of [\d.]+ GiB \(stage \w+\): weights 0\.\d\d,", out)
    assert re.search(r"FLOP per token: pt [\d.]+ [kMG], sft [\d.]+ [kMG]; of the whole run [\d.]+ [MG]FLOP", out)


def test_a_machine_is_shared_by_the_ranks_on_it(monkeypatch):
    whole = plan.rank_bytes(CPU)
    assert whole == plan.machine_bytes() and whole > GIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert plan.rank_bytes(CPU) == whole / 4


def test_the_table_of_layouts(recipe_path, tmp_path, capsys):
    large = ["model={preset: 8b}", "precision=bf16", "stages.pt.micro_batch_size=1", "stages.sft.micro_batch_size=1"]
    words = ["estimate", str(recipe_path), *large, "--vocab-size", "193856", "--json", str(tmp_path / "t.json")]
    assert cli.main([*words, "--gpus", "8", "--gpu-memory", "20"]) == 0
    out = capsys.readouterr().out
    assert "8,567.7 M parameters" in out and "do not fit (--all shows them)" in out
    rows = json.loads((tmp_path / "t.json").read_text())["layouts"]
    assert all(row["tensor"] * row["pipeline"] * row["context"] * row["data"] == 8 for row in rows)
    alone = next(row for row in rows if row["tensor"] == row["pipeline"] == 1)
    assert not alone["fits"] and alone["recompute"] == "full"
    assert all(row["total_gib"] <= 20 for row in rows if row["fits"])
    assert cli.main([*words, "--gpus", "0"]) == 2
    assert "--gpus is 0" in capsys.readouterr().err
