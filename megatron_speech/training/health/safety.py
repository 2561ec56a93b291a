"""What ends a run before its last step, or would keep it from ending: signals, hangs, lost ranks, slow ones."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_speech.environment import host_name
from megatron_speech.recipe.watchdog import WatchdogConfig
from megatron_speech.training.health.agreement import AllRanksError
from megatron_speech.training.health.control import Control, StopRequest
from megatron_speech.training.health.watchdog import Watchdog, peer_error, store_of_run
from megatron_speech.training.telemetry.timing import RankTimer, Stragglers


class Safety:
    """The control group, the watchdog and the rank's timer of one run. A collective.

    Args:
        config: the recipe's `watchdog` section.
        directory: the run directory; stacks of a rank that hangs go to `stacks/` in it.
        stop: the signals that request an end; None: there are none.
        on_end: called on rank 0 with a sentence before the watchdog ends the process.
    """

    def __init__(
        self, config: WatchdogConfig, directory: Path, stop: StopRequest | None, on_end: Callable[[str], None]
    ) -> None:
        rank = dist.get_rank()
        self.stop = stop or StopRequest()
        self.control = Control()
        self.timer = RankTimer()
        self._watchdog = Watchdog(config, directory / "stacks", rank, on_end if rank == 0 else _nothing)
        self.progress = self._watchdog.progress
        known = self.control.gather_objects(
            (uuid.uuid4().hex, host_name(), parallel_state.get_pipeline_model_parallel_rank())
        )
        self.hosts = [host for _, host, _ in known]
        self._pipeline_stages = [stage for _, _, stage in known]
        if len(known) > 1:
            self._watchdog.listen(store_of_run(known[0][0]), self.hosts, self.control.barrier)

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """An error inside ends all ranks: this one by the error, the others with a sentence about it.

        Raises:
            PeerError: another rank has ended, in place of the error of a collective that broke off.
        """
        try:
            yield
        except AllRanksError:  # raised by all ranks: none waits
            self._watchdog.close()
            raise
        except BaseException as error:
            peer = peer_error(error, self._watchdog) if isinstance(error, RuntimeError) else None
            if peer is None:
                rank = dist.get_rank()
                what = str(error) or type(error).__name__
                self._watchdog.report_failure(f"rank {rank} on {self.hosts[rank]} has failed: {what}")
            self._watchdog.close()
            if peer is not None:
                raise peer from error
            raise

    def should_stop(self, step: int) -> bool:
        """Call at the end of every step: whether all ranks stop here, because one received a signal. A collective."""
        self.progress.step_ended(step)
        return self.control.should_stop(self.stop.requested)

    def stragglers(self, waited: float) -> tuple[Stragglers, str]:
        """The slowest rank since the last call, and its host. A collective; the device must have finished the steps.

        Args:
            waited: seconds per step that this rank waited for data.
        """
        seconds = self.control.gather([self.timer.lap() + waited])[:, 0].tolist()
        found = Stragglers.find(seconds, self._pipeline_stages)
        return found, self.hosts[found.rank]

    def finish(self) -> None:
        """The run is over on this rank; leaves when it is on all of them. A collective."""
        self.control.barrier()
        self._watchdog.close()


def _nothing(sentence: str) -> None:
    """What a rank other than 0 notes in the run directory."""
