"""Checkpoints: where they are due, at the end of a stage, and where the run stops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_speech.training.events.event import Boundary, Event, StageRun
from megatron_speech.training.run import Run
from megatron_speech.training.telemetry.exporters import finite
from megatron_speech.training.telemetry.goodput import SAVING


class LogFinishedSaves(Event):
    """Reports the saves that have ended beside the training; waits for none."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def after_step(self, stage: StageRun, boundary: Boundary) -> None:
        """At every boundary: it costs nothing."""
        self._run.checkpoints.log_finished_saves()


class SaveCheckpoint(Event):
    """Takes a checkpoint of the moment; it is written beside the steps that follow, promoted and pruned there.

    Args:
        run: the run.
        event_states: what the events of the loop want to go on from.
    """

    def __init__(self, run: Run, event_states: Callable[[], dict[str, Any]]) -> None:
        self._run, self._event_states = run, event_states

    def is_due(self, stage: StageRun, boundary: Boundary) -> bool:
        """At the interval of the run, or of the stage where it has its own."""
        run = self._run
        return run.checkpoints.due(stage.config, boundary.step, run.progress.steps_taken(stage.index))

    def after_step(self, stage: StageRun, boundary: Boundary) -> None:
        """Save where it is due or the run stops; the end of a stage comes later."""
        if not boundary.stage_ended and (boundary.stop or self.is_due(stage, boundary)):
            self._save(stage, boundary)

    def at_stage_end(self, stage: StageRun, boundary: Boundary) -> None:
        """Every stage ends with a checkpoint, also one whose last step a rollback discarded."""
        self._save(stage, boundary)

    def _save(self, stage: StageRun, boundary: Boundary) -> None:
        """A collective."""
        run = self._run
        with stage.clock.paused(), run.ledger.spending(SAVING), run.safety.progress.doing("saving"):
            # Reduced here in every run, continued or not: the sums that the next line is made of are added up in the
            # same order in both.
            stage.meter.reduce()
            run.checkpoints.save(
                fields={
                    **run.progress.as_record(),
                    "stage_index": stage.index,
                    "stage_step": run.progress.steps_taken(stage.index),
                    "stage_ended": run.progress.position.stage_index != stage.index,
                    "ended_early": dict(run.progress.ended),
                    "datasets": run.fingerprints,
                    "changes": list(run.changes),
                    "blend": {data.stage.name: data.history.entries for data in run.stages[: stage.index + 1]},
                    "validation": finite(boundary.scores or {}),
                },
                chunks=run.engine.chunks,
                optimizer=run.engine.optimizer,
                state={
                    "meter": stage.meter.totals.clone(),
                    "groups": stage.meter.groups,
                    "spikes": None,
                    "early_stop": None,
                    **self._event_states(),
                },
            )
            run.write_status("running")
        run.ledger.note(boundary.step)
