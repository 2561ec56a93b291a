"""Runs are killed, continued, and compared with runs that were not: `python tests/training/kill_harness.py --kills 50`.

Each trial starts a small run of two stages, on one process or two, and ends it by SIGKILL or SIGTERM: in a step, in a
validation, at a change to the disk while a checkpoint is written or removed, as a stage begins, or at any time. The
run is started again, perhaps killed again, and at last left alone. Then its lines of metrics.jsonl are those of the
run that was not disturbed, digit for digit, its last checkpoint is the same byte for byte, and nothing half is left.
After every kill each directory that bears a checkpoint's name is read and has to be sound.

torch is imported once; runs are forked from this process. Nothing in the package knows of this: the places are found by
wrapping methods and by Python's audit events.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch.distributed as dist  # noqa: E402
from processes import end_with_parent  # noqa: E402
from toy_runs import make_toy_datasets, read_metrics, toy_recipe, without_timing, write_recipe  # noqa: E402

from megatron_speech import cli  # noqa: E402
from megatron_speech.environment import prepare_imports  # noqa: E402
from megatron_speech.training.telemetry.goodput import (  # noqa: E402
    FAILURES_PER_GPU_AND_DAY,
    expected_goodput,
    read_goodput,
)

PLACES = ("step", "validation", "disk", "stage", "time")
STEPS, VALIDATIONS, DISK_CHANGES = 20, 6, 60  # of the run below, and about as many as it makes on one rank


@dataclass(frozen=True)
class Kill:
    """One end of a run.

    Attributes:
        signal: KILL or TERM. TERM goes to all processes, as a scheduler's does.
        place: one of PLACES.
        number: which step, validation or change to the disk, from 0 on; of `time`, thousandths of the undisturbed run.
        rank: where the place is looked for, and which process a KILL ends; the launcher then ends the other.
    """

    signal: str
    place: str
    number: int
    rank: int = 0


@dataclass(frozen=True)
class Trial:
    """A run on `world` processes and the kills that it goes through; of two, the optimizer may be distributed."""

    world: int
    kills: tuple[Kill, ...]
    distributed_optimizer: bool = False

    @property
    def reference(self) -> str:
        """Names the undisturbed run that it is compared with."""
        return f"reference{self.world}{'d' if self.distributed_optimizer else ''}"


def recipe_of(toy: Path) -> dict[str, Any]:
    """12 steps and 8; saved and validated every four, two checkpoints stay."""
    recipe = toy_recipe(toy, checkpoint={"interval_steps": 4, "keep_last": 2, "keep_stage_ends": False})
    recipe["stages"][0]["tokens"], recipe["stages"][1]["tokens"] = 12 * 512, 8 * 512
    recipe["validation"] = {"interval_steps": 4, "tokens": 1024}
    recipe["data"]["cache_dir"] = str(toy / "cache")
    return recipe


# ---- in the run's process


def end_at(kill: Kill, run: Path) -> None:
    """Have this process signalled at the k-th time that it comes to the place."""
    from megatron_speech.training.loop import TrainingLoop
    from megatron_speech.training.step import TrainStep
    from megatron_speech.training.validation import Validator

    passed = 0

    def come_by() -> None:
        nonlocal passed
        if passed == kill.number:
            os.kill(os.getpid() if kill.signal == "KILL" else os.getppid(), signal.Signals[f"SIG{kill.signal}"])
        passed += 1

    def watched(owner: type, name: str) -> None:
        original = getattr(owner, name)

        def wrapper(*arguments: Any, **options: Any) -> Any:
            come_by()
            return original(*arguments, **options)

        setattr(owner, name, wrapper)

    if kill.place == "disk":
        folder = str(run / "checkpoints")
        writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT

        def audit(event: str, values: tuple[Any, ...]) -> None:
            changes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink")
            if changes or (event == "open" and isinstance(values[2], int) and values[2] & writing):
                # What a folder that is being removed holds is named without it.
                if any(folder in str(value) for value in values) or (event != "open" and values[-1] not in (-1, None)):
                    come_by()

        sys.addaudithook(audit)
    else:
        owner, name = {
            "step": (TrainStep, "take"), "validation": (Validator, "run"), "stage": (TrainingLoop, "begin_stage"),
        }[kill.place]  # fmt: skip
        watched(owner, name)


def child(rank: int, world: int, port: int, command: list[str], kill: Kill | None, run: Path, log: int) -> None:
    end_with_parent()
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if world > 1:
        os.environ |= {
            "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        }  # fmt: skip
    code = 1
    try:
        if kill is not None and kill.place != "time" and kill.rank == rank:
            end_at(kill, run)
        code = cli.main(command)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# ---- in the harness


def launch(recipe: Path, run: Path, trial: Trial, kill: Kill | None, usual_seconds: float, log: Path) -> list[int]:
    """Start the run, have it end as `kill` says, and wait; returns how its processes ended."""
    world = trial.world
    # As torchrun's agent: the store takes a free port.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if world > 1 else None
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    pids: list[int] = []

    def end_all(number: int, *_: Any) -> None:
        for pid in pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass  # it has just ended, and is waited for

    # A child that comes to its place of TERM tells its launcher, who tells all.
    signal.signal(signal.SIGTERM, end_all)
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            command = ["train", str(recipe), f"run_dir={run}"]
            command += ["parallel.distributed_optimizer=true"] if trial.distributed_optimizer else []
            child(rank, world, store.port if store is not None else 0, command, kill, run, output)
        pids.append(pid)
    os.close(output)
    timer = None
    if kill is not None and kill.place == "time":
        number = signal.Signals[f"SIG{kill.signal}"]
        target: Callable[..., Any] = end_all if kill.signal == "TERM" else lambda _: os.kill(pids[kill.rank], number)
        timer = threading.Timer(usual_seconds * kill.number / 1000, target, [number])
        timer.start()
    codes: dict[int, int] = {}
    while len(codes) < world:
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid] != 0:  # as torchrun and srun do
            end_all(signal.SIGKILL)
    if timer is not None:
        timer.cancel()
        timer.join()
    return [codes[pid] for pid in pids]


def look_at(run: Path) -> list[str]:
    """What is wrong with the directories that bear a checkpoint's name."""
    from megatron_speech.errors import InputError
    from megatron_speech.training.checkpoint.store import find_rank_damage, list_checkpoints, read_info

    problems = []
    for path in list_checkpoints(run / "checkpoints"):
        try:
            problem = find_rank_damage(read_info(path))
        except InputError as error:
            problem = str(error)
        if problem:
            problems.append(f"{path.name}: {problem}")
    return problems


def hidden(run: Path) -> list[str]:
    """What is half in RUN/checkpoints."""
    folder = run / "checkpoints"
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) if folder.is_dir() else []


def differences(run: Path, reference: Path) -> list[str]:
    """In what a run that was continued to its end differs from the one that was not disturbed."""
    found = []
    if without_timing(read_metrics(run)) != without_timing(read_metrics(reference)):
        found.append("metrics.jsonl differs")
    last = f"checkpoints/step_{STEPS:08d}"
    for path in sorted((reference / last).glob("*")):
        if path.suffix in (".distcp", ".pt") and path.read_bytes() != (run / last / path.name).read_bytes():
            found.append(f"{last}/{path.name} differs")
    if json.loads((run / "status.json").read_text())["state"] != "finished":
        found.append("status.json does not say finished")
    if os.readlink(run / "checkpoints" / "latest") != f"step_{STEPS:08d}":
        found.append("latest is another")
    if os.readlink(run / "checkpoints" / "best") != os.readlink(reference / "checkpoints" / "best"):
        found.append("best is another")
    return found + [f"{name} is left" for name in hidden(run)]


def drawn(number: int, seed: int) -> Trial:
    """The trial of this number: every place, signal and number of processes comes up in turn."""
    generator = random.Random(f"{seed} {number}")
    world = 1 + number % 2

    def one(place: str, name: str) -> Kill:
        limits = {"step": STEPS, "validation": VALIDATIONS, "disk": DISK_CHANGES, "stage": 2, "time": 1000}
        return Kill(name, place, generator.randrange(limits[place]), generator.randrange(world))

    kills = [one(PLACES[number // 2 % len(PLACES)], ("KILL", "TERM")[number // 10 % 2])]
    while generator.random() < 0.3:
        kills.append(one(generator.choice(PLACES), generator.choice(("KILL", "TERM"))))
    # Of two processes, every second trial.
    return Trial(world, tuple(kills), distributed_optimizer=world > 1 and number % 4 == 1)


def carry_out(trials: list[Trial], folder: Path, report: Callable[[dict[str, Any]], bool]) -> None:
    """Run the trials, one after the other, in `folder`, while `report`, which is told of each, wants more."""
    prepare_imports()
    importlib.import_module("megatron_speech.training.trainer")
    toy = folder / "toy"
    toy.mkdir()
    recipe = write_recipe(make_toy_datasets(toy) / "recipe.yaml", recipe_of(toy))
    usual: dict[str, float] = {}
    for name, trial in sorted({trial.reference: trial for trial in trials}.items()):
        for attempt in range(2):  # the first one builds the index, which the others find
            reference = folder / f"{name}.{attempt}"
            began = time.monotonic()
            codes = launch(recipe, reference, trial, None, 0.0, folder / "reference.log")
            usual[name] = time.monotonic() - began
            if any(codes):
                raise RuntimeError(f"the undisturbed run ended with {codes}: {(folder / 'reference.log').read_text()}")
    for number, trial in enumerate(trials):
        run, log = folder / f"run{number}", folder / f"run{number}.log"
        ends, problems, codes = [], [], [0]
        for kill in [*trial.kills, None]:
            codes = launch(recipe, run, trial, kill, usual[trial.reference], log)
            problems += look_at(run)
            landed = kill is not None and (-signal.SIGKILL in codes or state_of(run) == "preempted")
            ends.append({"codes": codes, "landed": landed, "half": len(hidden(run))})
        if any(codes):
            problems.append(f"the last start ended with {codes}")
        else:
            problems += differences(run, folder / f"{trial.reference}.1")
        if not report({"number": number, **asdict(trial), "ends": ends, "problems": problems}):
            break


def cost_of_failures(folder: Path, interval_minutes: float) -> str:
    """What a failure cost the runs of `folder`, and a run on 1,024 GPUs that fails as often as published."""
    restarts = [
        restart
        for path in sorted(folder.glob("run*/goodput.jsonl"))
        if (history := read_goodput(path.parent)) is not None
        for restart in history.restarts
    ]
    if not restarts:
        return "no run was restarted after its first step"
    mean = {name: sum(restart[name] for restart in restarts) / len(restarts) for name in restarts[0]}
    cost = sum(mean.values())
    failures = FAILURES_PER_GPU_AND_DAY * 1024
    # Of these runs little is done again: they save every few steps. One that saves rarely does half an interval again.
    rare = cost - mean["again"] + 30.0 * interval_minutes
    parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in mean.items())
    return (
        f"{len(restarts)} restarts cost {cost:.2f} s each ({parts}); with {failures:.2f} failures a day, as 1,024 GPUs "
        f"of Llama 3's pretraining had, goodput is {100 * expected_goodput(cost, 1024):.3f} %, and "
        f"{100 * expected_goodput(rare, 1024):.2f} % where a checkpoint is written every {interval_minutes:g} minutes"
    )


def state_of(run: Path) -> str | None:
    """Of status.json."""
    path = run / "status.json"
    return json.loads(path.read_text())["state"] if path.exists() else None


def main() -> int:
    """Draw trials, or take those of --trials; exit 1 if any of them failed."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--kills", type=int, default=50, help="kills that end a run, at least (50)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (0)")
    parser.add_argument(
        "--trials",
        help="JSON list of [processes, [[signal, place, number, rank], …], distributed optimizer or not] instead",
    )
    parser.add_argument("--output", type=Path, help="write a JSON line per trial to this file")
    parser.add_argument("--folder", type=Path, help="keep the runs in this folder; default: a temporary one")
    parser.add_argument(
        "--interval-minutes", type=float, default=30.0, help="between checkpoints of the run that goodput is scaled to"
    )
    arguments = parser.parse_args()
    # A kill may come too late, or its place not come: then there is one trial more.
    trials = [drawn(number, arguments.seed) for number in range(4 * arguments.kills)]
    if arguments.trials:
        trials = [
            Trial(world, tuple(Kill(*kill) for kill in kills), *more)
            for world, kills, *more in json.loads(arguments.trials)
        ]
    outcomes: list[dict[str, Any]] = []
    landed: Counter[tuple[str, str, int]] = Counter()

    def report(outcome: dict[str, Any]) -> bool:
        outcomes.append(outcome)
        line = json.dumps(outcome)
        print(line, flush=True)
        if arguments.output is not None:
            with open(arguments.output, "a", encoding="utf-8") as handle:
                handle.write(line + "\n")
        for kill, end in zip(outcome["kills"], outcome["ends"], strict=False):
            landed[kill["signal"], kill["place"], outcome["world"]] += end["landed"]
        return bool(arguments.trials) or landed.total() < arguments.kills

    with tempfile.TemporaryDirectory(prefix="kills-") as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        carry_out(trials, folder, report)
        cost = cost_of_failures(folder, arguments.interval_minutes)
    for (name, place, world), count in sorted(landed.items()):
        print(f"{name}  {place:10}  {world} process{'es' * (world > 1):2}  {count}")
    print(cost)
    good = sum(not outcome["problems"] for outcome in outcomes)
    print(f"{landed.total()} kills; {good} of {len(outcomes)} runs went on as if nothing had happened")
    return int(good < len(outcomes))


if __name__ == "__main__":
    sys.exit(main())
