"""`megatron-speech benchmark checkpoint RECIPE.yaml`: what a checkpoint costs the training, and how fast it is.

One run trains with saves in it, in turn beside the training and waited for, with undisturbed steps in between: each
save is compared with the steps after it. A step's time reaches from its beginning to the beginning of the next, so
that what the training waits for a save is part of it. On a machine that others use too, or that has no core left for
the thread that writes, the time in which the training's thread did not wait for a core says more: what it copies, and
what it waits for the other thread to let go of the interpreter, is in it.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_speech.benchmark.measure import spread, summary
from megatron_speech.errors import InputError
from megatron_speech.files import write_json


@dataclass(frozen=True)
class Step:
    """The beginning of a step of the measured run.

    Attributes:
        began: seconds, of a clock.
        queued: seconds for which the training's thread has waited for a core until then.
        busy: whether a save was under way.
        saved: the kind of save that was taken since the step before: "beside", "waited", or None.
    """

    began: float
    queued: float
    busy: bool
    saved: str | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help="what to train")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace values of the recipe")
    parser.add_argument("--saves", type=int, default=6, metavar="N", help="saves of each kind (6)")
    parser.add_argument(
        "--interval", type=int, default=30, metavar="N", help="steps between saves; more than two saves take (30)"
    )
    parser.add_argument("--warmup-steps", type=int, default=10, metavar="N", help="steps before the first save (10)")
    parser.add_argument("--json", type=Path, metavar="F", help="write the figures to F")


def run(args: argparse.Namespace) -> int:
    """Train in a temporary run directory below $TMPDIR, and report."""
    for name in ("saves", "interval", "warmup_steps"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it has to be at least 1")
    from megatron_speech.environment import prepare_imports

    prepare_imports()
    from megatron_speech.parallel import groups

    with tempfile.TemporaryDirectory(prefix="megatron-speech-benchmark-") as folder:
        try:
            result = measure(args, folder)
        finally:
            groups.destroy()
    if result is None:
        return 0
    print(
        f"{result['bytes'] / 1e6:,.0f} MB. Undisturbed step {spread(result['step_seconds'], 1, 1e-3)} ms; while one is "
        f"saved beside it {spread(result['ratio'], 3)} times that ({spread(result['ratio_with_cores'], 3)} with "
        f"free cores), over {result['steps_during_save']['median']:.0f} steps. Training waits "
        f"{spread(result['waited_seconds'], 1, 1e-3)} ms; where it waits until all is written "
        f"{spread(result['synchronous_seconds'], 1, 1e-3)} ms"
    )
    print(
        f"written, synced, hashed and read back at {spread(result['save_bytes_per_second'], 0, 1e6)} MB/s; checked at "
        f"{spread(result['check_bytes_per_second'], 0, 1e6)} MB/s, loaded at "
        f"{spread(result['load_bytes_per_second'], 0, 1e6)} MB/s"
    )
    if args.json is not None:
        write_json(args.json, result)
    return 0


def measure(args: argparse.Namespace, folder: str) -> dict[str, Any] | None:
    """The figures, on rank 0; None elsewhere."""
    import torch
    import torch.distributed as dist

    from megatron_speech.environment import detect
    from megatron_speech.recipe.load import load_recipe
    from megatron_speech.training import trainer
    from megatron_speech.training.checkpoint.load import load_checkpoint
    from megatron_speech.training.checkpoint.store import find_latest
    from megatron_speech.training.events.event import Event, StageRun
    from megatron_speech.training.run import set_up

    total = args.warmup_steps + 2 * args.saves * args.interval
    quiet = [
        f"run_dir={folder}", f"logging.interval_steps={total + 1}", "logging.tensorboard=false",
        "validation.interval_steps=0", f"checkpoint.interval_steps={args.interval}", "checkpoint.asynchronous=true",
        "checkpoint.keep_last=1", "checkpoint.keep_every=0", "checkpoint.upload=null",
    ]  # fmt: skip
    recipe = load_recipe(args.recipe, [*args.overrides, *quiet])
    stage = recipe.stages[0]
    stage = stage.model_copy(update={"tokens": (total + 1) * stage.global_batch_tokens, "checkpoint": None})
    recipe = recipe.model_copy(update={"stages": [stage]})
    steps: list[Step] = []

    run = set_up(recipe)

    class Measure(Event):
        """Notes when steps begin, and waits for every second save."""

        def __init__(self) -> None:
            self._saves = 0

        def before_step(self, stage: StageRun) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            saved: str | None = None
            taken = run.progress.position.step
            if taken and taken % args.interval == 0:
                saved = "beside" if self._saves % 2 == 0 else "waited"
                if saved == "waited":
                    run.checkpoints.wait()
                self._saves += 1
            steps.append(Step(time.perf_counter(), seconds_queued(), run.checkpoints.busy, saved))

    trainer.train(run, max_steps=total, events=[Measure()])
    reports = [report for report in run.checkpoints.reports if report.problem is None]
    info = find_latest(Path(folder) / "checkpoints")
    if info is None or not reports:
        raise InputError(f"no checkpoint could be written to {folder}; set TMPDIR to a disk with more room")
    size = sum(entry["bytes"] for entry in info.fields["files"].values())
    check, load = [], []
    for _ in range(args.saves):
        began = time.perf_counter()
        find_latest(Path(folder) / "checkpoints")
        check.append(time.perf_counter() - began)
        began = time.perf_counter()
        load_checkpoint(info, chunks=run.engine.chunks, optimizer=run.engine.optimizer)
        load.append(time.perf_counter() - began)
    if dist.get_rank() != 0:
        return None
    return {
        "benchmark": "checkpoint",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "bytes": size,
        "processes": dist.get_world_size(),
        **compare(steps[args.warmup_steps :]),
        "waited_seconds": summary([report.waited_seconds for report in reports[::2]]),
        "save_bytes_per_second": summary([size / report.seconds for report in reports[::2]]),
        "check_bytes_per_second": summary([size / seconds for seconds in check]),
        "load_bytes_per_second": summary([size / seconds for seconds in load]),
        "environment": detect(),
        "recipe": recipe.model_dump(mode="json"),
    }


def seconds_queued() -> float:
    """Seconds for which the calling thread could have run and had no core; 0 where the system does not say."""
    path = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
    return int(path.read_text(encoding="ascii").split()[1]) / 1e9 if path.exists() else 0.0


def compare(steps: list[Step]) -> dict[str, Any]:
    """Each save against the undisturbed steps that follow it, before the next one.

    Raises:
        InputError: a save was still under way when the next began: the interval is too short to compare with.
    """
    saves: list[tuple[str, list[tuple[float, float]], list[tuple[float, float]]]] = []
    for step, following in itertools.pairwise(steps):
        took = (
            following.began - step.began,
            following.began - step.began - (following.queued - step.queued),
        )
        if following.saved is not None:
            saves.append((following.saved, [took], []))
        elif saves:
            kind, disturbed, undisturbed = saves[-1]
            (disturbed if kind == "beside" and (step.busy or following.busy) else undisturbed).append(took)
    if not all(undisturbed for _, _, undisturbed in saves):
        raise InputError("a save took as long as --interval steps; give it more, so that some are undisturbed")

    def ratios(clock: int) -> list[float]:
        return [
            statistics.mean(one[clock] for one in disturbed) / statistics.median(one[clock] for one in undisturbed)
            for kind, disturbed, undisturbed in saves
            if kind == "beside"
        ]

    return {
        "step_seconds": summary([wall for _, _, undisturbed in saves for wall, _ in undisturbed]),
        "steps_during_save": summary([float(len(steps)) for kind, steps, _ in saves if kind == "beside"]),
        "ratio": summary(ratios(0)),
        "ratio_with_cores": summary(ratios(1)),
        "synchronous_seconds": summary(
            [
                disturbed[0][0] - statistics.median(wall for wall, _ in undisturbed)
                for kind, disturbed, undisturbed in saves
                if kind == "waited"
            ]
        ),
    }
