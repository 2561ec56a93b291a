"""Where the time of a run went: what became training that counts, and what was lost, over all of its processes.

    RUN/goodput.jsonl   appended by rank 0, never cut: a line when a process begins to train, one with every logged
                        interval and every checkpoint, one at the end

    {"event": "start", "time": …, "created": …, "step": 120, "processes": 8, "starting": {"imports": 4.1, …}}
    {"event": "progress", "time": …, "step": 140, "seconds": {"training": 93.1, "data": 0.2, "saving": 0.4}}
    {"event": "end", …}

`goodput` is the time of the steps whose result the run still has, by all the time since its first process was created.
A process that is killed loses what it did after its last line and what a later process does again; both are restarts.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from megatron_speech.training.telemetry.exporters import JsonLines

TRAINING, DATA, SAVING, VALIDATION, SKIPPED, ROLLBACK = (
    "training",
    "data",
    "saving",
    "validation",
    "skipped",
    "rollback",
)
LOST = ("restarts", "starting", SAVING, DATA, VALIDATION, SKIPPED, ROLLBACK, "other")

# Llama 3's pretraining: 419 unexpected interruptions in 54 days on 16,384 GPUs (Dubey et al. 2024, table 5).
FAILURES_PER_GPU_AND_DAY = 419 / 54 / 16384


class Ledger:
    """The time of this process by what it was spent on: every second since its creation is in one of the sums.

    Args:
        created: when the process was created, seconds since the epoch; None: as the system says.
    """

    def __init__(self, created: float | None = None) -> None:
        self.created = psutil.Process().create_time() if created is None else created
        self._mark = time.perf_counter()
        self.starting: dict[str, float] = {"imports": max(time.time() - self.created, 0.0)}
        self.seconds: dict[str, float] = defaultdict(float)
        self.steps = 0  # of the run, that this process has taken
        self.begun = False
        self._lines: JsonLines | None = None
        self._history: GoodputHistory | None = None

    def started(self, part: str) -> None:
        """What was done since the last call was this part of starting."""
        self.starting[part] = self.starting.get(part, 0.0) + self._lap()

    def begin(self, path: Path | None, step: int, processes: int) -> None:
        """The first step comes next. With `path` (rank 0) note it in RUN/goodput.jsonl, after what is there."""
        self.started("first batch")
        self.begun = True
        if path is None:
            return
        self._lines = JsonLines(path, resume_step=sys.maxsize)  # takes off a line that a kill cut
        self._history = GoodputHistory.read(path)
        self._write(
            {
                "event": "start",
                "created": self.created,
                "step": step,
                "processes": processes,
                "starting": self.starting,
            }
        )

    @contextlib.contextmanager
    def spending(self, what: str) -> Iterator[None]:
        """What runs inside is not training; before the first step it is part of starting."""
        if not self.begun:
            yield
            return
        self.seconds[TRAINING] += self._lap()
        try:
            yield
        finally:
            self.seconds[what] += self._lap()

    def skip(self, steps: int) -> None:
        """That many of the steps that this process has taken were stepped over: their share of training is lost."""
        if not steps:
            return
        self.seconds[TRAINING] += self._lap()
        lost = self.seconds[TRAINING] * min(steps / max(self.steps, 1), 1.0)
        self.seconds[TRAINING] -= lost
        self.seconds[SKIPPED] += lost

    def note(self, step: int, *, event: str = "progress", **more: Any) -> None:
        """Write how the time was spent up to now, after `step` steps of the run."""
        if not self.begun:
            return
        self.seconds[TRAINING] += self._lap()
        if self._lines is not None:
            self._write({"event": event, "step": step, "seconds": dict(self.seconds), **more})

    def rolled_back(self, step: int, to: int) -> None:
        """What was trained since step `to` is discarded; the run goes on after `step`."""
        self.note(step, event="rollback", to=to)

    def start_sentence(self) -> str:
        """How long it took to the first step, and where that went."""
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.starting.items())
        return f"ready for the first step {sum(self.starting.values()):.1f} s after the process began: {parts}"

    def summary(self) -> dict[str, Any] | None:
        """:meth:`GoodputHistory.summary` of the run up to now; None on other ranks, and before the first step."""
        return None if self._history is None else self._history.summary()

    def record(self) -> dict[str, float]:
        """Fields of metrics.jsonl: goodput so far, and lost seconds by what they were lost on. {} before `begin`."""
        found = self.summary()
        if found is None:
            return {}
        return {"goodput": found["goodput"], **{f"lost_seconds/{name}": found["lost"][name] for name in found["lost"]}}

    def _lap(self) -> float:
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        return seconds

    def _write(self, line: dict[str, Any]) -> None:
        assert self._lines is not None and self._history is not None
        line = {"time": time.time(), **line}
        self._history.add(line)
        self._lines.write(line)  # on a full disk it waits; that the disk is full the metrics beside it say

    def close(self) -> None:
        """Close the file."""
        if self._lines is not None:
            self._lines.close()
            self._lines = None


class GoodputHistory:
    """The lines of RUN/goodput.jsonl, summed up as they come."""

    def __init__(self) -> None:
        self._began: float | None = None  # of the first process
        self._last = 0.0  # time of the last line
        self._sums: dict[str, float] = defaultdict(float)  # of processes that have ended
        self._seconds: dict[str, float] = {}  # its last sums
        self._training: list[tuple[int, float]] = []  # (step, seconds of training up to it) that the run still has
        self._process_training = 0.0  # of the running process, up to its last line
        self.restarts: list[dict[str, float]] = []
        """Of each start but the first: seconds `down` (lost work included), `starting`, and of work done `again`."""

    @classmethod
    def read(cls, path: Path) -> GoodputHistory:
        """What is there; a last line that was cut by a kill is left out."""
        history = cls()
        if not path.exists():
            return history
        with open(path, encoding="utf-8", errors="replace") as handle:
            for line in handle:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    history.add(json.loads(line))
        return history

    def add(self, line: dict[str, Any]) -> None:
        """Take in a line."""
        if line["event"] == "start":
            self._start(line)
        else:
            self._seconds = line["seconds"]
            before = self._training[-1][1] if self._training else 0.0
            gained = self._seconds.get(TRAINING, 0.0) - self._process_training
            self._process_training = self._seconds.get(TRAINING, 0.0)
            self._training.append((int(line["step"]), before + gained))
            if line["event"] == "rollback":
                kept = [entry for entry in self._training if entry[0] <= line["to"]]
                have = kept[-1][1] if kept else 0.0
                self._sums[ROLLBACK] += self._training[-1][1] - have
                self._training = [*kept, (int(line["step"]), have)]
        self._last = line["time"]

    def _start(self, line: dict[str, Any]) -> None:
        starting = sum(line["starting"].values())
        if self._began is None:
            self._began = line["created"]
            self._sums["starting"] += starting
        else:
            self._close_process()
            kept = [entry for entry in self._training if entry[0] <= line["step"]]
            have, had = (entries[-1][1] if entries else 0.0 for entries in (kept, self._training))
            down = max(line["created"] - self._last, 0.0)
            self.restarts.append({"down": down, "starting": starting, "again": had - have})
            self._sums["restarts"] += down + starting + had - have
            self._training = kept
        self._seconds, self._process_training = {}, 0.0

    def _close_process(self) -> None:
        for name, seconds in self._seconds.items():
            if name != TRAINING:
                self._sums[name] += seconds
        self._seconds = {}

    def summary(self) -> dict[str, Any]:
        """`goodput`, `seconds` in all, `training` that counts, `lost` by what, `restarts` (number)."""
        total = max(self._last - (self._last if self._began is None else self._began), 1e-9)
        training = self._training[-1][1] if self._training else 0.0
        lost = {name: self._sums[name] + self._seconds.get(name, 0.0) for name in LOST}
        lost["other"] = max(total - training - sum(lost.values()), 0.0)
        return {
            "goodput": min(training / total, 1.0),
            "seconds": total,
            "training": training,
            "lost": lost,
            "restarts": len(self.restarts),
        }


def read_goodput(run: Path) -> GoodputHistory | None:
    """The history of a run directory; None where it has none."""
    path = run / "goodput.jsonl"
    return GoodputHistory.read(path) if path.exists() else None


def expected_goodput(seconds_per_failure: float, gpus: int, *, overhead: float = 0.0) -> float:
    """Share of a day that is training, with failures as often as published for a run of many GPUs.

    Args:
        seconds_per_failure: from the failure to where the run stood before it.
        gpus: of the run; failures are taken to be proportional.
        overhead: share of the time that saving, validation and waiting for data take.
    """
    failures = FAILURES_PER_GPU_AND_DAY * gpus
    return max(1.0 - failures * seconds_per_failure / 86_400 - overhead, 0.0)


def sentence(found: dict[str, Any]) -> str:
    """A summary as a line of the log."""
    lost = sorted(((seconds, name) for name, seconds in found["lost"].items() if seconds >= 0.05), reverse=True)
    parts = ", ".join(f"{name} {seconds:.1f}" for seconds, name in lost) or "nothing"
    return (
        f"goodput {100 * found['goodput']:.1f} % of {found['seconds']:.0f} s; lost seconds: {parts}; "
        f"{found['restarts']} restart{'' if found['restarts'] == 1 else 's'}"
    )
