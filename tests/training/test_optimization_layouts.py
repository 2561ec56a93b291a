"""Parameter groups, averages, frozen rows, skipped steps and growing batches: two processes do what one does."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_runs import LaunchTwo, copy_until, read_metrics, toy_recipe, train, write_recipe

LAYOUTS = {
    "data": [],
    "tensor": ["parallel.tensor=2", "parallel.sequence_parallel=true"],
    "pipeline": ["parallel.pipeline=2"],
    "distributed": ["parallel.distributed_optimizer=true", "parallel.overlap_grad_reduce=true"],
}
# All of the first pipeline stage, and the tied head of the last.
FROZEN = "optimizer.freeze=['embedding.*','decoder.layers.0.*']"
TABLE = "embedding.word_embeddings.weight"


@pytest.fixture(scope="module")
def recipe_file(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = toy_recipe(
        toy,
        optimizer={
            "layer_lr_decay": 0.7,
            "embeddings": {"lr_multiplier": 0.5, "weight_decay": 0.02},
            "freeze_rows": "text",
        },
        ema={"decay": 0.8, "use_for_validation": True},
        # So near to the median that steps of a sound run are skipped.
        spikes={"grad_norm_above": 1.05, "window": 4, "min_steps": 3, "skip_limit": 50},
        checkpoint={"interval_steps": 5, "keep_last": 10},
        validation={"interval_steps": 5, "tokens": 1024},
        logging={"interval_steps": 1, "tensorboard": False},
    )
    values["stages"][0] |= {
        "tokens": 12 * 512,
        "micro_batch_size": 1,
        "batch_ramp": {"start": 128, "increment": 128, "over": 1024},
        "lr": {"peak": 5e-3, "end": 1e-3, "warmup": 2, "schedule": "wsd", "decay": 0.4},
    }
    values["stages"][1]["tokens"] = 4 * 512
    return write_recipe(tmp_path_factory.mktemp("layouts") / "r.yaml", values)


@pytest.fixture(scope="module")
def runs(recipe_file: Path, launch_two: LaunchTwo) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A folder with `reference` and `frozen`, of one process, and with runs of two: by layout, `frozen2`, `moved`."""
    folder = recipe_file.parent
    assert train(recipe_file, folder / "reference") == 0
    assert train(recipe_file, folder / "frozen", FROZEN, "stages.sft.tokens=512") == 0
    copy_until(folder / "reference", folder / "moved", 10)
    commands = [[str(recipe_file), f"run_dir={folder / name}", *extra] for name, extra in LAYOUTS.items()]
    commands += [
        [str(recipe_file), f"run_dir={folder / 'frozen2'}", "parallel.pipeline=2", FROZEN, "stages.sft.tokens=512"],
        [str(recipe_file), f"run_dir={folder / 'moved'}", "parallel.tensor=2"],
    ]
    return folder, launch_two(*commands)


def weights_of(run: Path, *, ema: bool = False) -> dict[str, torch.Tensor]:
    from megatron_speech.parallel import groups
    from megatron_speech.training.checkpoint.load import load_for_inference

    try:
        model, _, _ = load_for_inference(run, ema=ema)
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    finally:
        groups.destroy()


def test_two_processes_finish(runs: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    assert runs[1].returncode == 0, runs[1].stderr
    assert "exit codes [0, 0, 0, 0, 0, 0]" in runs[1].stdout


def same_course(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    assert [(line["step"], line.get("split")) for line in ours] == [
        (line["step"], line.get("split")) for line in theirs
    ]
    for line, other in zip(ours, theirs, strict=True):
        assert line["consumed_sequences"] == other["consumed_sequences"]
        assert line.get("lr") == other.get("lr")
        for key in ("loss", "loss/modality/audio", "grad_norm"):
            assert (line.get(key) is None) == (other.get(key) is None)
            if other.get(key) is not None:
                assert line[key] == pytest.approx(other[key], rel=2e-5), (line["step"], line.get("split"), key)


@pytest.mark.parametrize("layout", [*LAYOUTS, "moved"])
def test_two_processes_take_the_course_of_one(runs: tuple[Path, subprocess.CompletedProcess[str]], layout: str) -> None:
    folder, _ = runs
    reference = read_metrics(folder / "reference")
    assert sum(line.get("split") == "skipped" for line in reference) >= 3
    same_course(read_metrics(folder / layout), reference)


@pytest.mark.parametrize("layout", [*LAYOUTS, "moved"])
def test_two_processes_end_with_the_weights_and_averages_of_one(
    runs: tuple[Path, subprocess.CompletedProcess[str]], layout: str
) -> None:
    from megatron_speech.tokens.space import TokenSpace

    folder, _ = runs
    for ema in (False, True):
        ours, theirs = (weights_of(folder / name, ema=ema) for name in (layout, "reference"))
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-4, msg=name)
        space = TokenSpace.load(folder / "reference" / "checkpoints" / "step_00000005" / "token_space.json")
        begin = weights_of(folder / "reference" / "checkpoints" / "step_00000005")
        assert torch.equal(ours[TABLE][: space.text_size], begin[TABLE][: space.text_size])


def test_a_pipeline_stage_may_be_frozen_as_a_whole(runs: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = runs
    same_course(read_metrics(folder / "frozen2"), read_metrics(folder / "frozen"))
    ours, theirs = weights_of(folder / "frozen2"), weights_of(folder / "frozen")
    for name in theirs:
        frozen = name.startswith(("embedding.", "decoder.layers.0."))
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0 if frozen else 1e-4, msg=name)
    state = json.loads((folder / "frozen2" / "status.json").read_text())["state"]
    assert state == "finished"
