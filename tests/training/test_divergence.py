"""A run that leaves the numbers: nothing of it is saved, and the commands that it advises continue it."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from toy_runs import copy_until, read_metrics, toy_recipe, train, without_timing, write_recipe

from megatron_speech import cli
from megatron_speech.recipe.recipe import Recipe
from megatron_speech.training.checkpoint.divergence import lower_rates

pytestmark = pytest.mark.slow


def values_of(toy: Path, **changes: Any) -> dict[str, Any]:
    """One stage of 16 steps, a checkpoint and a line every other step."""
    values = toy_recipe(
        toy,
        validation={"interval_steps": 0},
        checkpoint={"interval_steps": 2, "keep_last": 1},
        logging={"interval_steps": 2, "tensorboard": False},
        **changes,
    )
    values["stages"] = [values["stages"][0] | {"tokens": 16 * 512}]
    return values


def steps_of(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_*"))


def description(run: Path, step: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "checkpoints" / f"step_{step:08d}" / "checkpoint.json").read_text())
    return found


@pytest.fixture(scope="module")
def whole(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(recipe, run): 16 steps, all checkpoints kept."""
    folder = tmp_path_factory.mktemp("whole")
    values = values_of(toy)
    values["checkpoint"]["keep_last"] = 20
    recipe = write_recipe(folder / "r.yaml", values)
    assert train(recipe, folder / "run") == 0
    return recipe, folder / "run"


@pytest.fixture(scope="module")
def diverged(whole: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(recipe, run): a run that decays its weights by far more than all of them from step 9 on."""
    run = copy_until(whole[1], tmp_path_factory.mktemp("diverged") / "run", 8)
    assert train(whole[0], run, *HARM) == 1
    return whole[0], run


DECAY = ("--change", "optimizer.weight_decay=1e38")
HARM = (*DECAY, "checkpoint.keep_last=1", "logging.interval_steps=100")


def test_no_checkpoint_of_it_is_written_and_the_good_ones_stay(
    diverged: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run = diverged[0], tmp_path / "run"
    shutil.copytree(diverged[1], run, symlinks=True)
    assert steps_of(run) == [2, 4, 6, 8] and not list((run / "checkpoints").glob(".*"))
    assert train(recipe, run, *HARM) == 1
    error = capsys.readouterr().err
    written = r"ALARM: step_00000010 is not written: \S+ and \d+ more hold NaN or infinity\. "
    assert re.search(written + r"The newest checkpoint is step_00000008; training continues", error)
    assert "Traceback" not in error and steps_of(run) == [2, 4, 6, 8]
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "failed" and "are not both finite; continue from step_00000008" in status["message"]
    line = read_metrics(run)[-1]
    assert line["step"] == 16 and line["loss"] is None and line["grad_norm"] is None


def test_the_commands_that_it_advises_continue_it(
    diverged: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run = diverged
    message = json.loads((run / "status.json").read_text())["message"]
    commands = re.findall(r"megatron-speech (train \S+recipe\.yaml [^;]*)", message)
    assert len(commands) == 2 and "--change stages.pt.lr.peak=0.0025" in commands[0]
    assert "spikes.skip_limit=10" in commands[1]
    # Neither heals a decay of 1e38; what counts is that both are accepted and go on from the checkpoint that is left.
    for number, command in enumerate(commands):
        copy = tmp_path / f"copy{number}"
        shutil.copytree(run, copy, symlinks=True)
        arguments = shlex.split(command.replace(str(run), str(copy)))
        assert cli.main([*arguments, f"run_dir={copy}", "--dry-run"]) == 0
        assert f"continuing from {copy / 'checkpoints'}/step_00000008" in capsys.readouterr().out
    healed = tmp_path / "healed"
    shutil.copytree(run, healed, symlinks=True)
    lower = ("--change", "stages.pt.lr.peak=2e-3", "--change", "optimizer.weight_decay=0")
    assert train(recipe, healed, *lower) == 0
    assert max(steps_of(healed)) == 16 and math.isfinite(read_metrics(healed)[-1]["loss"])


def test_a_stop_within_it_saves_nothing_and_fails(
    diverged: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_speech.training.health.safety import Safety

    run = tmp_path / "run"
    shutil.copytree(diverged[1], run, symlinks=True)
    monkeypatch.setattr(Safety, "should_stop", lambda self, step: step == 11)
    assert train(diverged[0], run, *HARM) == 1
    error = capsys.readouterr().err
    assert "error: step_00000011 is not written: " in error and "--change stages.pt.lr.peak=0.0025" in error
    assert steps_of(run) == [2, 4, 6, 8]


def test_halved_rates_make_a_valid_recipe(toy: Path) -> None:
    values = toy_recipe(toy)
    values["stages"][0]["lr"] = {"peak": 1e-3, "end": 8e-4}
    values["stages"][1]["lr"] = {"peak": 9e-4, "end": 1e-5}
    recipe = Recipe.model_validate(values)
    expected = {"stages.pt.lr.peak": 5e-4, "stages.pt.lr.end": 5e-4, "stages.sft.lr.peak": 5e-4}
    assert lower_rates(recipe, "pt") == expected
    assert lower_rates(recipe, "sft") == {"stages.sft.lr.peak": 4.5e-4}


# ---- another rate, and an earlier checkpoint, on request


CHANGE = ("--change", "stages.pt.lr.peak=2e-3")


def test_another_rate_is_refused_unless_it_is_asked_for(
    whole: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run = whole[0], copy_until(whole[1], tmp_path / "run", 8)
    assert train(recipe, run, "stages.pt.lr.peak=2e-3") == 2
    error = capsys.readouterr().err
    assert (
        "stages.0.lr.peak was 0.005, the recipe now says 0.002. Set it back, or start a new run with another" in error
    )
    assert "run_dir, or say that this one is to go on with it: --change stages.pt.lr.peak=0.002" in error
    assert train(recipe, run, "--change", "seed=8") == 2
    assert "seed was 7, the recipe now says 8; that would be another run" in capsys.readouterr().err
    # It is in the log, and in every checkpoint from then on; the command may be given again.
    assert train(recipe, run, *CHANGE, "--through", "pt") == 0
    assert "changed on request, from step 9 on: stages.pt.lr.peak: 0.005 → 0.002" in capsys.readouterr().out
    change = {"step": 8, "key": "stages.pt.lr.peak", "before": 0.005, "after": 0.002}
    assert description(run, 8)["changes"] == [] and description(run, 10)["changes"] == [change]
    lines = read_metrics(run)
    assert [line["key"] for line in lines if line.get("split") == "changed"] == ["stages.pt.lr.peak"]
    before = without_timing(read_metrics(whole[1]))
    assert without_timing(lines)[:4] == before[:4]
    trained = [line for line in lines if "split" not in line]
    # Step 10 of 16 with 4 of warm-up, down to 1e-3 on a cosine.
    expected = 1e-3 + 0.5 * (2e-3 - 1e-3) * (1 + math.cos(math.pi * (10 - 4) / (16 - 4)))
    assert trained[4]["step"] == 10 and trained[4]["lr"] == pytest.approx(expected, rel=1e-12)
    killed = copy_until(run, tmp_path / "killed", 8)
    assert train(recipe, killed, *CHANGE) == 0
    assert without_timing(read_metrics(killed)) == without_timing(lines)
    later = copy_until(run, tmp_path / "later", 12)
    assert train(recipe, later, *CHANGE) == 0  # as it is in the checkpoint
    assert without_timing(read_metrics(later)) == without_timing(lines)
    capsys.readouterr()
    assert train(recipe, copy_until(run, tmp_path / "forgotten", 12)) == 2
    assert "stages.0.lr.peak was 0.002, the recipe now says 0.005" in capsys.readouterr().err


def test_a_run_goes_back_to_a_checkpoint_and_what_came_after_is_set_aside(
    whole: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run = whole[0], tmp_path / "run"
    shutil.copytree(whole[1], run, symlinks=True)
    metrics = (run / "metrics.jsonl").read_bytes()
    assert train(recipe, run, "--rewind-to", "9") == 2
    assert "--rewind-to 9: " in (error := capsys.readouterr().err)
    assert "the nearest sound checkpoint before it is of step 8: --rewind-to 8" in error
    (run / "checkpoints" / "step_00000008" / "common.pt").write_bytes(b"damaged")
    assert train(recipe, run, "--rewind-to", "8") == 2
    assert "is damaged: common.pt has" in (error := capsys.readouterr().err) and "--rewind-to 6" in error
    assert train(recipe, run, "--rewind-to", "1") == 2
    assert "there is no sound checkpoint before it either; there are those of steps 2, 4" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == metrics and len(steps_of(run)) == 8

    assert train(recipe, run, "--rewind-to", "6", "--dry-run") == 0
    assert "ready for step 7" in capsys.readouterr().out and len(steps_of(run)) == 8

    assert train(recipe, run, "--rewind-to", "6") == 0
    aside = run / "set_aside" / "after_step_00000006"
    assert f"rewound to step 6: what came after it is in {aside}" in capsys.readouterr().out
    assert sorted(path.name for path in aside.glob("step_*")) == [f"step_{step:08d}" for step in range(8, 17, 2)]
    assert (aside / "metrics.jsonl").read_bytes() == metrics
    lines = read_metrics(run)
    (mark,) = [line for line in lines if line.get("split") == "set_aside"]
    assert (mark["step"], mark["checkpoint"], mark["folder"]) == (6, "step_00000006", str(aside))
    again = [line for line in without_timing(lines) if "split" not in line]
    assert again == without_timing(read_metrics(whole[1])) and steps_of(run) == list(range(2, 17, 2))
    assert (run / "checkpoints" / "latest").resolve().name == "step_00000016"

    # A launcher that starts the same command again does not go back once more.
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train(recipe, run, "--rewind-to", "6") == 0
    assert "--rewind-to 6 is not repeated" in capsys.readouterr().err and len(steps_of(run)) == 8
    assert len(list((run / "set_aside").iterdir())) == 1
