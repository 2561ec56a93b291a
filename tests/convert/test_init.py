"""Claims about the recipe's section `init`: every layout starts from the same weights, and only from the right ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from backbones import CODEC, make_backbone, make_tokenizer
from toy_runs import LaunchTwo, make_toy_datasets, read_metrics, toy_recipe, train, write_recipe

from megatron_speech import cli
from megatron_speech.tokens.space import TokenSpace


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy datasets, a backbone of bytes, and its checkpoint."""
    folder = make_toy_datasets(tmp_path_factory.mktemp("toy"))
    make_backbone(folder / "hf", "llama", tokenizer=None, vocab_size=256, bos_token_id=None, eos_token_id=None)
    arguments = ["--token-space", str(folder / "ts.json"), "--output", str(folder / "backbone")]
    assert cli.main(["convert", "import-hf", "--input", str(folder / "hf"), *arguments]) == 0
    return folder


def recipe_of(toy: Path, **changes: Any) -> dict[str, Any]:
    recipe = toy_recipe(toy, init={"checkpoint": str(toy / "backbone")}, validation={"interval_steps": 0})
    recipe["stages"] = [{**recipe["stages"][0], "tokens": 6 * 512}]
    recipe["logging"]["interval_steps"] = 1
    recipe["checkpoint"] = {"interval_steps": 3, "keep_last": 10}
    del recipe["model"]
    return {**recipe, **changes}


def losses(run: Path) -> np.ndarray:
    return np.array([line["loss"] for line in read_metrics(run)])


def test_training_starts_from_a_backbone_under_every_layout(
    toy: Path, launch_two: LaunchTwo, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_of(toy))
    one = tmp_path / "one"
    assert train(recipe, one) == 0
    assert f"weights from {toy / 'backbone'} (imported from {toy / 'hf'}, fp32)" in capfd.readouterr().out
    resolved = yaml.safe_load((one / "recipe.yaml").read_text())
    assert resolved["init"]["checkpoint"] == str(toy / "backbone")
    assert resolved["model"]["max_position_embeddings"] == 256  # the backbone's, which an export of the run is for too
    assert resolved["model"]["num_layers"] == 2 and resolved["model"]["rope_scaling"]["factor"] == 8.0
    parts = {"tp": ["parallel.tensor=2"], "pp": ["parallel.pipeline=2"]}
    commands = [[str(recipe), f"run_dir={tmp_path / name}", *flags] for name, flags in parts.items()]
    done = launch_two(*commands)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in parts:
        np.testing.assert_allclose(losses(tmp_path / name), losses(one), rtol=1e-5)
    # Not the weights that a seed draws.
    drawn = {key: value for key, value in recipe_of(toy, model=resolved["model"]).items() if key != "init"}
    assert train(write_recipe(tmp_path / "drawn.yaml", drawn), tmp_path / "drawn") == 0
    assert abs(losses(tmp_path / "drawn")[0] - losses(one)[0]) > 0.1
    # The run continues from its own checkpoints, and needs the backbone no more.
    killed = tmp_path / "killed"
    shutil.copytree(one, killed, symlinks=True)
    for path in sorted((killed / "checkpoints").glob("step_*"))[1:]:
        shutil.rmtree(path)
    shutil.move(toy / "backbone", toy / "moved")
    try:
        assert train(one / "recipe.yaml", killed) == 0
    finally:
        shutil.move(toy / "moved", toy / "backbone")
    np.testing.assert_array_equal(losses(killed), losses(one))


@pytest.mark.slow
def test_weights_of_another_type_and_of_a_run_are_taken(toy: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_of(toy))
    assert train(recipe, tmp_path / "fp32") == 0
    assert train(recipe, tmp_path / "bf16", "precision=bf16") == 0
    assert losses(tmp_path / "bf16")[0] == pytest.approx(losses(tmp_path / "fp32")[0], rel=2e-2)
    # A run directory stands for its newest checkpoint, whatever its optimizer was.
    assert train(recipe, tmp_path / "next", f"init.checkpoint={tmp_path / 'bf16'}") == 0
    assert losses(tmp_path / "next")[0] < losses(tmp_path / "fp32")[0] - 0.1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"preset": "tiny"}}, ["model.ffn_hidden_size is 176", "has 160", "backbone"]),
        ({"model": {"num_query_groups": 4}}, ["model.num_query_groups is 4", "has 2"]),
        ({"init": {"checkpoint": "absent"}}, ["absent", "import-hf"]),
        ({"init": {"checkpont": "x"}}, ["init.checkpont", "checkpoint"]),
    ],
    ids=["another preset", "another shape", "no checkpoint", "a misspelt key"],
)
def test_what_does_not_fit_is_refused(
    toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], changes: dict[str, Any], words: list[str]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_of(toy, **changes))
    assert train(recipe, tmp_path / "run") == 2
    error = capfd.readouterr().err
    assert all(word in error for word in words), error


def test_other_ids_are_refused(toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    space = TokenSpace.load(toy / "ts.json")
    other = TokenSpace.build("bytes", space.codec, pad_multiple=256)
    other.save(tmp_path / "other.json")
    arguments = ["--token-space", str(tmp_path / "other.json"), "--output", str(tmp_path / "backbone")]
    assert cli.main(["convert", "import-hf", "--input", str(toy / "hf"), *arguments]) == 0
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_of(toy))
    assert train(recipe, tmp_path / "run", f"init.checkpoint={tmp_path / 'backbone'}") == 2
    error = capfd.readouterr().err
    assert other.hash in error and space.hash in error


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["llasa", "inworld"])
def test_a_public_checkpoint_is_fine_tuned(
    tmp_path: Path, imported: Callable[..., Path], layout: str, capfd: pytest.CaptureFixture[str]
) -> None:
    tokenizer = make_tokenizer(layout)
    folder = tmp_path / "public"
    make_backbone(folder, "llama", tied=True, vocab_size=tokenizer.get_vocab_size(), tokenizer=tokenizer)
    checkpoint = imported(folder, layout=layout)
    space = TokenSpace.load(checkpoint / "token_space.json")
    spoken = np.random.default_rng(0).integers(0, CODEC.codebook_sizes[0], (40, 12))
    with open(tmp_path / "samples.jsonl", "w") as handle:
        for i, codes in enumerate(spoken.tolist()):
            row = {"sample_id": f"s{i}", "transcript": f"say {i}", "language": "en", "codes": codes}
            handle.write(json.dumps(row) + "\n")
    from megatron_speech.preprocess.preprocess_data import main as preprocess

    arguments = ["--task", "tts", "--input", str(tmp_path / "samples.jsonl"), "--token-space"]
    arguments += [str(checkpoint / "token_space.json"), "--output-prefix", str(tmp_path / "tts")]
    preprocess(arguments)
    assert preprocess([*arguments[:-1], str(tmp_path / "no"), "--cloning", "same-speaker"]) == 2
    assert f"layout of {layout}" in capfd.readouterr().err
    recipe = toy_recipe(
        tmp_path, token_space=str(checkpoint / "token_space.json"), init={"checkpoint": str(checkpoint)},
        data={"datasets": [str(tmp_path / "tts")]}, validation={"interval_steps": 0},
    )  # fmt: skip
    del recipe["model"]
    length = 512
    recipe["stages"] = [
        {**recipe["stages"][1], "tokens": 4 * 1024, "seq_length": length, "micro_batch_size": 1,
         "global_batch_tokens": 1024},
    ]  # fmt: skip
    recipe["logging"]["interval_steps"] = 1
    assert train(write_recipe(tmp_path / "recipe.yaml", recipe), tmp_path / "run") == 0
    lines = read_metrics(tmp_path / "run")
    assert lines[-1]["loss"] < lines[0]["loss"] and "loss/modality/text" not in lines[0]
    # The first loss is that of the public checkpoint on the codes and their end, and on nothing else.
    assert set(lines[0]) >= {"loss/modality/audio", "loss/modality/special"}
    assert space.layout == layout
