"""A stage ends when validation no longer improves, at the same step whether or not the run was interrupted."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_runs import copy_until, read_metrics, toy_recipe, train, without_timing, write_recipe

from megatron_speech.recipe.stage import EarlyStopConfig
from megatron_speech.training.checkpoint import save
from megatron_speech.training.early_stop import EarlyStop
from megatron_speech.training.events.event import Boundary, StageRun
from megatron_speech.training.events.log_metrics import LogMetrics


@given(
    losses=st.lists(st.integers(0, 30).map(lambda n: n / 100), min_size=1, max_size=40),
    patience=st.integers(1, 6),
    min_delta=st.sampled_from([0.0, 0.01, 0.05]),
    interrupted=st.integers(0, 40),
)
def test_it_ends_after_as_many_validations_without_a_new_best(
    losses: list[float], patience: int, min_delta: float, interrupted: int
) -> None:
    config = EarlyStopConfig(patience=patience, min_delta=min_delta)
    early = EarlyStop(config)
    best_at = 0
    for number, loss in enumerate(losses):
        if number == interrupted:
            saved = json.loads(json.dumps(early.state()))
            early = EarlyStop(config)
            early.load_state(saved)
        if loss < losses[best_at] - min_delta:
            best_at = number
        assert early.update(loss) == (number - best_at >= patience)
        assert early.best == losses[best_at]


@pytest.fixture(scope="module")
def stopped(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(recipe, run) whose first stage ends early, since no loss is 10 below another."""
    folder = tmp_path_factory.mktemp("early")
    values = toy_recipe(
        toy,
        validation={"interval_steps": 4, "tokens": 512},
        checkpoint={"interval_steps": 5, "keep_last": 20},
        logging={"interval_steps": 5, "tensorboard": False},
        optimizer={"freeze": ["embedding.*"]},
    )
    values["stages"][0]["early_stop"] = {"patience": 2, "min_delta": 10.0}
    values["stages"][1]["tokens"] = 8 * 512
    recipe = write_recipe(folder / "r.yaml", values)
    assert train(recipe, folder / "run") == 0
    return recipe, folder / "run"


@pytest.mark.slow
def test_the_stage_ends_with_a_checkpoint_and_the_next_one_begins(stopped: tuple[Path, Path]) -> None:
    _, run = stopped
    lines = read_metrics(run)
    assert [(line["step"], line["stage"]) for line in lines if "split" not in line] == [
        (5, "pt"), (10, "pt"), (12, "pt"), (15, "sft"), (20, "sft"),
    ]  # fmt: skip
    assert {line["step"] for line in lines if line.get("split") == "validation"} >= {4, 8, 12, 16, 20}
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"], status["consumed_sequences"]) == ("finished", 20, 160)
    fields = json.loads((run / "checkpoints" / "step_00000012" / "checkpoint.json").read_text())
    assert fields["stage_ended"] and fields["stage_step"] == 12 and fields["ended_early"] == {"pt": 12}


# The checkpoints of steps 5 and 10 were validated too, out of turn: that does not count.
@pytest.mark.slow
@pytest.mark.parametrize("at", [5, 10, 12, 15])
def test_a_continued_run_ends_the_stage_at_the_same_step(stopped: tuple[Path, Path], tmp_path: Path, at: int) -> None:
    recipe, run = stopped
    copy = copy_until(run, tmp_path / "copy", at)
    assert train(recipe, copy) == 0
    assert without_timing(read_metrics(copy)) == without_timing(read_metrics(run))
    assert train(recipe, copy) == 0  # finished: nothing to do


@pytest.mark.slow
def test_a_checkpoint_that_is_written_late_tells_of_its_own_moment(
    stopped: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of step 10 reaches the disk when the stage has ended at step 12, and knows nothing of that."""
    ended = threading.Event()
    write, log_interval = save.write_save, LogMetrics._log

    def held(planned: Any, final: Path, **named: Any) -> str | None:
        if final.name == "step_00000010":
            assert ended.wait(60)
        return write(planned, final, **named)

    def told(event: LogMetrics, stage: StageRun, boundary: Boundary) -> None:
        log_interval(event, stage, boundary)
        if event._run.progress.ended:
            ended.set()

    monkeypatch.setattr(save, "write_save", held)
    monkeypatch.setattr(LogMetrics, "_log", told)
    recipe, run = stopped
    assert train(recipe, tmp_path / "run") == 0
    for folder in (run, tmp_path / "run"):
        fields = json.loads((folder / "checkpoints" / "step_00000010" / "checkpoint.json").read_text())
        assert fields["ended_early"] == {} and not fields["stage_ended"]


def test_a_new_patience_may_be_given_to_a_running_stage(stopped: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, run = stopped
    copy = copy_until(run, tmp_path / "copy", 5)
    assert train(recipe, copy, "stages.pt.early_stop.patience=1", "stages.sft.tokens=512") == 0
    assert json.loads((copy / "status.json").read_text())["step"] == 9


def test_nothing_to_go_by_is_refused(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = toy_recipe(toy)
    values["stages"][1]["early_stop"] = {}
    recipe = write_recipe(tmp_path / "r.yaml", values)
    assert train(recipe, tmp_path / "run", "validation.interval_steps=0") == 2
    assert (
        "stage sft: early_stop needs validation losses, and validation.interval_steps is 0" in capsys.readouterr().err
    )
    assert train(recipe, tmp_path / "run", "data.validation_fraction=0") == 2
    assert "stage sft: early_stop needs validation losses, and no document of its strata" in capsys.readouterr().err
