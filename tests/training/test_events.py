"""What happens between steps: the order of the events, batches of another source, and the profiler's trace."""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from toy_runs import read_metrics, toy_recipe, train, without_timing, write_recipe

from megatron_speech.data.loading.loader import GlobalBatch
from megatron_speech.parallel import groups
from megatron_speech.recipe.load import load_recipe
from megatron_speech.training import trainer
from megatron_speech.training.events.event import Boundary, Event, StageRun
from megatron_speech.training.run import set_up


@pytest.fixture
def recipe_file(toy: Path, tmp_path: Path) -> Path:
    values = toy_recipe(
        toy,
        validation={"interval_steps": 4, "tokens": 512},
        checkpoint={"interval_steps": 3, "keep_last": 9},
        logging={"interval_steps": 2, "tensorboard": False},
    )
    values["stages"][0]["tokens"], values["stages"][1]["tokens"] = 5 * 512, 2 * 512
    return write_recipe(tmp_path / "recipe.yaml", values)


class Diary(Event):
    """Writes down when it is called, and what it holds goes through checkpoints."""

    def __init__(self) -> None:
        self.lines: list[tuple[Any, ...]] = []
        self.steps = 0

    def at_stage_start(self, stage: StageRun) -> None:
        self.lines.append(("start", stage.config.name, stage.begins))

    def before_step(self, stage: StageRun) -> None:
        self.lines.append(("before", stage.config.name))

    def after_step(self, stage: StageRun, boundary: Boundary) -> None:
        self.steps += 1
        self.lines.append(("after", boundary.step, boundary.due, boundary.stage_ended))

    def at_stage_end(self, stage: StageRun, boundary: Boundary) -> None:
        self.lines.append(("end", stage.config.name, boundary.step))

    def state(self) -> dict[str, Any]:
        return {"diary": self.steps}

    def load_state(self, state: Any) -> None:
        self.steps = state["diary"]

    def close(self) -> None:
        self.lines.append(("close",))


def run_with(recipe_file: Path, run: Path, *events: Event, max_steps: int | None = None) -> None:
    recipe = load_recipe(recipe_file, [f"run_dir={run}"])
    try:
        trainer.train(set_up(recipe, log_environment=False), events=events, max_steps=max_steps)
    finally:
        groups.destroy()


def test_events_are_called_in_order_and_only_where_the_device_is_read_are_they_due(
    recipe_file: Path, tmp_path: Path
) -> None:
    diary = Diary()
    run_with(recipe_file, tmp_path / "run", diary)
    steps = {line[1]: line[2:] for line in diary.lines if line[0] == "after"}
    # Logged every 2 steps and at the last one, saved every 3, validated every 4; stage pt ends with step 5.
    assert steps == {1: (False, False), 2: (True, False), 3: (True, False), 4: (True, False), 5: (False, True),
                     6: (True, False), 7: (True, True)}  # fmt: skip
    assert [line for line in diary.lines if line[0] in ("start", "end", "close")] == [
        ("start", "pt", True), ("end", "pt", 5), ("start", "sft", True), ("end", "sft", 7), ("close",),
    ]  # fmt: skip
    at = diary.lines.index(("after", 5, False, True))
    assert diary.lines[at - 1 : at + 4] == [
        ("before", "pt"), ("after", 5, False, True), ("end", "pt", 5), ("start", "sft", True), ("before", "sft"),
    ]  # fmt: skip


@pytest.mark.slow
def test_an_event_goes_on_from_its_part_of_a_checkpoint(recipe_file: Path, tmp_path: Path) -> None:
    run_with(recipe_file, tmp_path / "run", Diary(), max_steps=3)
    second = Diary()
    run_with(recipe_file, tmp_path / "run", second)
    assert second.lines[0] == ("start", "pt", False)
    assert second.steps == 7


@pytest.mark.slow
def test_batches_may_come_from_another_source(recipe_file: Path, tmp_path: Path) -> None:
    """A source that gives every batch of the data twice, as one that replays rollouts would."""
    run = set_up(load_recipe(recipe_file, [f"run_dir={tmp_path / 'run'}"]), log_environment=False)
    asked: list[int] = []

    class Twice:
        groups, reach = run.sources[0].groups, run.sources[0].reach
        inner = run.sources[0]

        def speakers(self, step: int) -> int | None:
            return None

        @contextlib.contextmanager
        def batches(self, taken: int) -> Iterator[Iterator[GlobalBatch]]:
            asked.append(taken)
            with self.inner.batches(taken // 2) as batches:
                yield (batch for batch in batches for _ in range(2))

    run.sources[0] = Twice()
    try:
        trainer.train(run, through="pt")
    finally:
        groups.destroy()
    assert train(recipe_file, tmp_path / "plain", "--through", "pt") == 0
    mine, plain = (
        [line for line in without_timing(read_metrics(tmp_path / name)) if "split" not in line]
        for name in ("run", "plain")
    )
    assert asked == [0]
    assert [line["step"] for line in mine] == [line["step"] for line in plain] == [2, 4, 5]
    assert mine[0]["loss"] != plain[0]["loss"]  # the second step saw the first batch again


@pytest.mark.slow
def test_the_profiler_records_the_steps_that_the_recipe_names(recipe_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(recipe_file, run, "profile.steps=[3,4]") == 0
    names = sorted(path.name for path in (run / "profile").iterdir())
    assert names == ["steps_3_to_4_rank_0.json.gz", "steps_3_to_4_rank_0_memory.json"]
    trace = json.loads(gzip.decompress((run / "profile" / names[0]).read_bytes()))
    steps = {event["name"] for event in trace["traceEvents"] if event.get("name", "").startswith("ProfilerStep#")}
    assert len(steps) == 2
    assert any(event.get("name") == "aten::mm" for event in trace["traceEvents"])
    memory = json.loads((run / "profile" / names[1]).read_text())
    assert memory["peak_gib"] > 0 and memory["operators"] and all(row["calls"] > 0 for row in memory["operators"])
    # It changes nothing of the run.
    assert train(recipe_file, tmp_path / "plain") == 0
    assert without_timing(read_metrics(run)) == without_timing(read_metrics(tmp_path / "plain"))


@pytest.mark.slow
def test_a_profile_of_steps_that_are_never_reached_leaves_no_file(recipe_file: Path, tmp_path: Path) -> None:
    assert train(recipe_file, tmp_path / "run", "profile.steps=[50,51]") == 0
    assert not (tmp_path / "run" / "profile").exists()


@pytest.mark.slow
def test_a_profile_that_the_run_ends_within_is_written(recipe_file: Path, tmp_path: Path) -> None:
    assert train(recipe_file, tmp_path / "run", "profile.steps=[6,90]") == 0
    assert (tmp_path / "run" / "profile" / "steps_6_to_90_rank_0.json.gz").is_file()


def test_profile_steps_that_make_no_range_are_refused(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(recipe_file, tmp_path / "run", "profile.steps=[4,3]") == 2
    assert "profile.steps is [4, 3]; needed are the first and the last step" in capsys.readouterr().err
