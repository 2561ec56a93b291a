"""A process that waits in vain ends itself with a sentence; one that is asked to stop saves first."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import processes
import pytest
import torch.distributed as dist
from toy_runs import toy_recipe, write_recipe

from megatron_speech.recipe.watchdog import WatchdogConfig
from megatron_speech.training.health.control import StopRequest
from megatron_speech.training.health.watchdog import Heartbeat, StepTimer, Watchdog
from megatron_speech.training.telemetry.timing import Stragglers


class Time:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# ---- how long a step may take


def test_the_limit_of_a_step_follows_the_median_and_has_a_floor() -> None:
    time = Time()
    progress = StepTimer(WatchdogConfig(median_factor=10, floor_seconds=30, pause_seconds=1000), time)
    assert progress.limit() is None  # copying a dataset to the node may take hours
    progress.begin_steps()
    time.now += 999
    assert progress.overdue() is None
    time.now += 2
    assert "the first step has not ended after 1001 s" in (progress.overdue() or "")
    progress.step_ended(1)
    assert progress.limit() == 1000  # the first one says nothing about the others
    for step, seconds in enumerate((2.0, 2.0, 50.0), start=2):
        time.now += seconds
        progress.step_ended(step)
    assert progress.limit() == 30
    for step in range(5, 20):
        time.now += 4.0
        progress.step_ended(step)
    assert progress.limit() == 40
    time.now += 39
    assert progress.overdue() is None
    time.now += 2
    assert progress.overdue() == "step 20 has not ended after 41 s (watchdog allows 40 s)"


def test_validating_and_saving_are_no_part_of_a_step() -> None:
    time = Time()
    progress = StepTimer(WatchdogConfig(timeout_seconds=10, pause_seconds=1000), time)
    progress.begin_steps()
    progress.step_ended(1)
    time.now += 8
    with progress.doing("saving"):
        time.now += 900
        assert progress.overdue() is None and progress.describe() == "saving at step 1"
        time.now += 101
        assert "saving has not ended" in (progress.overdue() or "")
    time.now += 1
    assert progress.overdue() is None
    time.now += 2
    assert "step 2 has not ended after 11 s" in (progress.overdue() or "")


def test_a_process_that_was_suspended_is_not_late() -> None:
    time = Time()
    progress = StepTimer(WatchdogConfig(timeout_seconds=10), time)
    progress.step_ended(1)
    time.now += 3600
    assert progress.overdue() is not None
    progress.reset_timer()
    assert progress.overdue() is None


def test_a_hanging_step_ends_the_process_with_its_stacks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ended, sentences = threading.Event(), []
    codes: list[int] = []

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    config = WatchdogConfig(timeout_seconds=0.05)
    watchdog = Watchdog(config, tmp_path / "stacks", 3, sentences.append, end=end)
    watchdog.progress.step_ended(7)
    assert ended.wait(30)
    watchdog.close()
    assert codes == [1] and "rank 3 on this host: step 8 has not ended" in sentences[0]
    assert "the same command continues" in capfd.readouterr().err
    stacks = (tmp_path / "stacks" / "rank_3.txt").read_text()
    assert "test_a_hanging_step_ends_the_process_with_its_stacks" in stacks and sentences[0] in stacks


# ---- hearing of the others


def hearts(time: Time, seconds: float = 10.0) -> list[Heartbeat]:
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=1))
    return [
        Heartbeat(store, rank, ["n1", "n2", "n3"], lambda: "training at step 5", seconds, time) for rank in range(3)
    ]


def test_a_silent_rank_is_named_with_its_host_and_what_it_did_last() -> None:
    time = Time()
    first, second, third = hearts(time)
    for _ in range(3):
        for heartbeat in (first, second, third):
            assert heartbeat.beat() is None
        time.now += 4
    for _ in range(4):  # the second one is stopped
        time.now += 4
        assert first.beat() is None and third.beat() is None
    assert third.silent() is None
    sentence = first.silent()
    assert sentence is not None
    assert sentence.startswith("rank 1 on n2 has sent no heartbeat for 12 s") and "training at step 5" in sentence
    first.publish_verdict(sentence)
    assert third.beat() == sentence


def test_a_rank_that_is_done_is_not_missed() -> None:
    time = Time()
    first, second, _ = hearts(time)
    second.beat()
    second.done()
    for _ in range(5):
        time.now += 5
        first.beat()
    assert first.silent() is None


def test_a_store_that_does_not_answer_is_named() -> None:
    class Gone:
        def set(self, key: str, value: str) -> None:
            if self.broken:
                raise dist.DistNetworkError("Connection reset by peer")

        broken = False

    time, store = Time(), Gone()
    heartbeat = Heartbeat(store, 1, ["n1", "n2"], lambda: "", 10.0, time)
    store.broken = True
    time.now += 5
    assert heartbeat.beat() is None and heartbeat.silent() is None
    time.now += 6
    assert heartbeat.beat() is None
    assert "store of the launcher (on n1, where rank 0 runs) has not answered for 11 s" in (heartbeat.silent() or "")


def test_the_slowest_rank_is_compared_with_those_that_do_the_same() -> None:
    # Pipeline stage 1 has the head: it takes twice as long, and none of its ranks is late.
    found = Stragglers.find([1.0, 1.0, 1.3, 2.0, 2.0, 2.1], [0, 0, 0, 1, 1, 1])
    assert (found.rank, found.seconds, found.median) == (2, 1.3, 1.0)
    assert found.sentence(1.5, "n1") is None
    assert found.sentence(1.2, "n1") == (
        "rank 2 on n1 is slow: 1.300 s of its own per step, the median of ranks like it is 1.000 s"
    )


# ---- signals


def test_term_and_usr1_ask_and_a_second_interrupt_insists(capsys: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    for number in (signal.SIGTERM, signal.SIGUSR1):
        with StopRequest() as stop:
            assert not stop.requested
            os.kill(os.getpid(), number)
            assert stop.requested
    StopRequest().catch_interrupts()  # a benchmark's: nothing waits for its wish
    with StopRequest() as stop:
        with pytest.raises(KeyboardInterrupt):  # nothing to save yet
            os.kill(os.getpid(), signal.SIGINT)
        stop.catch_interrupts()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested and "saving; interrupt again" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before


# ---- two processes


@pytest.fixture(scope="module")
def faults(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What became of two processes after each fault."""
    folder = tmp_path_factory.mktemp("faults")
    recipe = write_recipe(folder / "recipe.yaml", toy_recipe(toy, logging={"interval_steps": 2, "tensorboard": False}))
    common = [f"data.cache_dir={folder / 'cache'}", "stages.pt.tokens=100k", "watchdog.peer_seconds=4"]
    common += ["logging.straggler_factor=1000"]  # a loaded machine has slow ranks
    scenarios = [
        {"name": fault, "fault": fault, "overrides": [f"run_dir={folder / fault}", *common]}
        for fault in ("USR1", "STOP", "KILL", "raise", "seed")
    ]
    gates = {"dry": ["--dry-run"], "overfit": ["--overfit", "8", "stages.pt.skip=true", "stages.sft.lr.peak=5e-3"]}
    scenarios += [
        {"name": name, "fault": "none", "overrides": [f"run_dir={folder / name}", *common[:1], *words]}
        for name, words in gates.items()
    ]
    request = json.dumps({"recipe": str(recipe), "scenarios": scenarios})
    done = processes.run(
        [sys.executable, str(Path(__file__).with_name("fault_rig.py")), request],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return folder, {result["name"]: result for result in map(json.loads, done.stdout.splitlines())}


def status(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())


@pytest.mark.slow
@pytest.mark.distributed
def test_a_signal_to_one_rank_saves_and_ends_all_of_them_cleanly(faults: tuple[Path, dict[str, Any]]) -> None:
    folder, results = faults
    assert results["USR1"]["codes"] == [0, 0], results["USR1"]["errors"]
    assert results["USR1"]["errors"] == ["", ""]
    left = status(folder / "USR1")
    assert left["state"] == "preempted" and left["step"] < 195
    assert (folder / "USR1" / "checkpoints" / f"step_{left['step']:08d}" / "checkpoint.json").is_file()


@pytest.mark.slow
@pytest.mark.distributed
def test_a_stopped_rank_ends_the_others_in_seconds(faults: tuple[Path, dict[str, Any]]) -> None:
    folder, results = faults
    assert results["STOP"]["codes"] == [1, -signal.SIGKILL]
    (sentence,) = [line for line in results["STOP"]["errors"][0].splitlines() if line.startswith("error: ")]
    assert "error: rank 1 on " in sentence and "has sent no heartbeat for" in sentence
    assert status(folder / "STOP")["state"] == "failed" and "rank 1 on" in status(folder / "STOP")["message"]
    assert "training/step.py" in (folder / "STOP" / "stacks" / "rank_0.txt").read_text()


@pytest.mark.slow
@pytest.mark.distributed
def test_a_killed_rank_ends_the_others_at_once(faults: tuple[Path, dict[str, Any]]) -> None:
    folder, results = faults
    assert results["KILL"]["codes"] == [1, -signal.SIGKILL]
    assert results["KILL"]["errors"][0].startswith("error: another rank ended without a message")
    assert results["KILL"]["errors"][0].count("\n") == 1
    assert status(folder / "KILL")["state"] == "failed"


@pytest.mark.slow
@pytest.mark.distributed
def test_the_error_of_one_rank_is_the_sentence_of_the_others(faults: tuple[Path, dict[str, Any]]) -> None:
    _, results = faults
    assert results["raise"]["codes"] == [1, 1]
    first, second = results["raise"]["errors"]
    assert "rank 1 on " in first and "has failed: a page of this dataset cannot be read" in first
    assert "raised ValueError: a page of this dataset" in second


@pytest.mark.slow
@pytest.mark.distributed
def test_processes_that_were_started_with_different_recipes_are_told_apart(
    faults: tuple[Path, dict[str, Any]],
) -> None:
    folder, results = faults
    assert results["seed"]["codes"] == [2, 2]
    first, second = results["seed"]["errors"]
    assert first.startswith("error: the recipe differs between the processes: rank 1 on ") and first.count("\n") == 1
    assert "start all processes with the same recipe" in first and second == ""
    assert not (folder / "seed").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_rehearse_as_one(faults: tuple[Path, dict[str, Any]]) -> None:
    folder, results = faults
    assert [results[name]["codes"] for name in ("dry", "overfit")] == [[0, 0], [0, 0]], results
    assert "dry run: written: sequence indices (1 in " in results["dry"]["last"]
    assert "overfit check passed: 8 sequences of stage sft" in results["overfit"]["last"]
    assert not (folder / "dry").exists() and not (folder / "overfit").exists()
