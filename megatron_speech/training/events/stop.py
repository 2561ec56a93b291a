"""The run ends at a step boundary when it was asked to."""

from __future__ import annotations

from megatron_speech.training.events.event import Boundary, Event, StageRun
from megatron_speech.training.events.rollback import RollBackOnSpikes
from megatron_speech.training.run import Run


class StopOnRequest(Event):
    """After every step: has any rank been asked to stop? All ranks stop at the same step.

    Args:
        run: the run.
        rollback: asked before the run stops: the checkpoint of the stop shall not hold what a rollback would discard.
    """

    def __init__(self, run: Run, rollback: RollBackOnSpikes | None) -> None:
        self._run, self._rollback = run, rollback

    def after_step(self, stage: StageRun, boundary: Boundary) -> None:
        """Find out, without waiting for a message."""
        boundary.stop = self._run.safety.should_stop(boundary.step)
        if boundary.stop and self._rollback is not None:
            self._rollback.check(boundary)
