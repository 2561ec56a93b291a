"""Where the time of the steps goes: training, waiting for data, and on which rank."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch


class Clock:
    """Time of the training steps since the last lap: validation and saving do not count."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self.waited = 0.0
        self.steps = 0

    def lap(self) -> tuple[float, int, float]:
        """(seconds, steps, seconds waited for data) since the last lap."""
        now = time.perf_counter()
        result = now - self._started, self.steps, self.waited
        self._started, self.steps, self.waited = now, 0, 0.0
        return result

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What runs inside takes no time."""
        paused_at = time.perf_counter()
        try:
            yield
        finally:
            self._started += time.perf_counter() - paused_at


class RankTimer:
    """This rank's own work per step: from the start of the forward pass to the end of the backward pass.

    A whole step takes the same time on all ranks, since they wait for each other when gradients are summed; this
    part of it ends before that. On a GPU two events are recorded per step, and read when the host has waited for
    the device anyway.
    """

    def __init__(self) -> None:
        self._cuda = torch.cuda.is_available()
        self._began = 0.0
        self._seconds = 0.0
        self._steps = 0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def begin(self) -> None:
        """The forward pass begins."""
        if self._cuda:
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            self._events.append(pair)
        self._began = time.perf_counter()

    def end(self) -> None:
        """The backward pass is over, gradients are not summed yet."""
        self._steps += 1
        if self._cuda:
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._began

    def lap(self) -> float:
        """Mean seconds per step since the last lap. The device must have finished the steps."""
        seconds = self._seconds + sum(begin.elapsed_time(end) for begin, end in self._events) / 1e3
        steps = max(1, self._steps)
        self._seconds, self._steps = 0.0, 0
        self._events.clear()
        return seconds / steps


@dataclass(frozen=True)
class Stragglers:
    """The slowest rank of an interval.

    Attributes:
        rank: its number.
        seconds: its own work and wait for data per step.
        median: of the ranks that do the same work: those of its pipeline stage.
    """

    rank: int
    seconds: float
    median: float

    @staticmethod
    def find(seconds: Sequence[float], stages: Sequence[int]) -> Stragglers:
        """The rank that is furthest above the median of its pipeline stage, by ratio.

        Args:
            seconds: per rank.
            stages: pipeline stage of each rank.
        """
        medians = {
            stage: statistics.median(value for value, other in zip(seconds, stages, strict=True) if other == stage)
            for stage in set(stages)
        }
        rank = max(range(len(seconds)), key=lambda r: seconds[r] / max(medians[stages[r]], 1e-9))
        return Stragglers(rank, seconds[rank], medians[stages[rank]])

    def sentence(self, factor: float, host: str) -> str | None:
        """The sentence to log when the rank takes more than `factor` times the median, and 0.1 s longer; else None."""
        if self.seconds <= max(factor * self.median, self.median + 0.1):
            return None
        return (
            f"rank {self.rank} on {host} is slow: {self.seconds:.3f} s of its own per step, the median of "
            f"ranks like it is {self.median:.3f} s"
        )
