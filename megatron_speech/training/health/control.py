"""What the ranks of a run exchange besides gradients: over gloo, between hosts, without the device.

It has its own group, so that its operations neither wait for those of a layout's groups nor come in between.
"""

from __future__ import annotations

import signal
import threading
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from megatron_speech.console import message


class StopRequest:
    """Turns signals into a request that the training loop reads: save, and end as `preempted`.

    SIGTERM (preemption, `scancel`) and SIGUSR1 (`sbatch --signal=USR1@120`: the time limit is near) are taken from
    the start, SIGINT from :meth:`catch_interrupts` on: before it there is nothing to save. A second SIGINT ends the
    process at once. Does nothing outside of the main thread, where Python delivers no signals.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            self._take(number)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def catch_interrupts(self) -> None:
        """From now on the first SIGINT asks too; outside of `with` nothing changes."""
        if self._before:
            self._take(signal.SIGINT)

    def _take(self, number: int) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before.setdefault(number, signal.signal(number, self._ask))

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if number == signal.SIGINT:
            # What Python does with an interrupt, whatever handler was there before: a second interrupt is deliberate.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            message("interrupted", "saving; interrupt again to end at once")


class Control:
    """The control group of a run; every method is a collective unless it says otherwise.

    Args:
        timeout_seconds: of an operation.
    """

    def __init__(self, timeout_seconds: float = 1800.0) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        timeout = timedelta(seconds=timeout_seconds)
        self._group = dist.new_group(backend="gloo", timeout=timeout) if self.world_size > 1 else None
        self._asked: tuple[Any, torch.Tensor] | None = None

    def should_stop(self, requested: bool) -> bool:
        """Whether the run stops at this step boundary: True on all ranks at the same one, or on none.

        A single rank decides for itself. Of several, each boundary sends the ranks' requests and receives those of
        the boundary before: no step waits for a message, and a request is met at most two steps later.
        """
        if self._group is None:
            return requested
        agreed = False
        if self._asked is not None:
            work, requests = self._asked
            work.wait()
            agreed = bool(requests.item())
        self._asked = None
        if not agreed:
            requests = torch.tensor([int(requested)])
            self._asked = dist.all_reduce(requests, op=dist.ReduceOp.MAX, group=self._group, async_op=True), requests
        return agreed

    def gather(self, values: list[float]) -> torch.Tensor:
        """float64 [ranks, values]: the same numbers of every rank."""
        mine = torch.tensor(values, dtype=torch.float64)
        if self._group is None:
            return mine[None]
        rows = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(rows, mine, group=self._group)
        return torch.stack(rows)

    def gather_objects(self, value: Any) -> list[Any]:
        """A picklable value of every rank."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def barrier(self) -> None:
        """Wait for every rank to come here."""
        if self._asked is not None:
            self._asked[0].wait()
            self._asked = None
        if self._group is not None:
            dist.barrier(group=self._group)
