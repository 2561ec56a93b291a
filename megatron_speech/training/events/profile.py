"""A trace of a few steps, and where their memory went: `RUN/profile/`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_speech.files import write_json
from megatron_speech.recipe.profile import ProfileConfig
from megatron_speech.training.events.event import Boundary, Event, StageRun
from megatron_speech.training.run import Run
from megatron_speech.training.telemetry.metrics import memory_gib

_LARGEST = 50  # operators of the memory summary
_ALLOCATIONS = 100_000  # that CUDA's allocator remembers


class Profile(Event):
    """Records the steps that the recipe's section `profile` names, on the ranks that it names.

    Into RUN/profile go, per rank: `steps_FIRST_to_LAST_rank_N.json.gz`, a trace for chrome://tracing or Perfetto with
    operators, shapes and memory; `…_memory.json`, the operators that took most memory; and on a GPU
    `…_memory.pickle`, the allocator's history for pytorch.org/memory_viz.

    Args:
        run: the run.
        config: the recipe's section.
    """

    def __init__(self, run: Run, config: ProfileConfig) -> None:
        self._run, self._config = run, config
        self._first, self._last = config.steps
        self._mine = run.rank in config.ranks
        self._profiler: Any = None

    @property
    def path(self) -> Path:
        """What the names of this rank's files begin with."""
        return self._run.directory / "profile" / f"steps_{self._first}_to_{self._last}_rank_{self._run.rank}"

    def before_step(self, stage: StageRun) -> None:
        """Start before the first step that is recorded, or before its warm-up."""
        step = self._run.progress.position.step + 1
        if self._mine and self._profiler is None and max(1, self._first - self._config.warmup) <= step <= self._last:
            self._start(step)

    def after_step(self, stage: StageRun, boundary: Boundary) -> None:
        """Count a step, and write the files after the last one."""
        if self._profiler is None:
            return
        self._profiler.step()
        if boundary.step >= self._last:
            self._finish()

    def close(self) -> None:
        """Write what was recorded, where the run has ended before the last step."""
        if self._profiler is not None:
            self._finish()

    def _start(self, step: int) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_ALLOCATIONS)
        warmup = max(0, self._first - step)
        schedule = torch.profiler.schedule(wait=0, warmup=warmup, active=self._last - step - warmup + 1, repeat=1)
        self._profiler = torch.profiler.profile(
            activities=activities,
            schedule=schedule,
            record_shapes=True,
            profile_memory=True,
            with_stack=self._config.stacks,
        )
        self._profiler.start()

    def _finish(self) -> None:
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if profiler.profiler is None or profiler.events() is None:  # ended within the warm-up
            return
        profiler.export_chrome_trace(f"{self.path}.json.gz")
        operators = sorted(profiler.key_averages(), key=lambda row: -abs(_memory_of(row)))[:_LARGEST]
        summary = {
            "peak_gib": memory_gib(),
            "operators": [
                {"name": row.key, "calls": row.count, "bytes_allocated_less_freed": _memory_of(row)}
                for row in operators
            ],
        }
        write_json(Path(f"{self.path}_memory.json"), summary)
        if torch.cuda.is_available():
            torch.cuda.memory._dump_snapshot(f"{self.path}_memory.pickle")
            torch.cuda.memory._record_memory_history(enabled=None)
        self._run.log.info(f"profile of steps {self._first} to {self._last}: {self.path}.json.gz (Perfetto reads it)")


def _memory_of(row: Any) -> int:
    """Bytes that an operator itself took and did not give back, on the device where there is one."""
    return int(row.self_device_memory_usage if torch.cuda.is_available() else row.self_cpu_memory_usage)
