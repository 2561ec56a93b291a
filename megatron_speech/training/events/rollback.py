"""Harmful steps were skipped on the device: log them, and roll back where there were too many."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_speech.training.checkpoint.divergence import advice
from megatron_speech.training.checkpoint.load import load_checkpoint
from megatron_speech.training.events.event import Boundary, Event, StageRun
from megatron_speech.training.position import Position
from megatron_speech.training.run import Run
from megatron_speech.training.spikes import SpikeGuard, Verdict, log_rollback, log_skipped_steps
from megatron_speech.training.telemetry.goodput import ROLLBACK


class RollBackOnSpikes(Event):
    """Wherever the device is read anyway: log the steps skipped since the last time, roll back at `skip_limit`.

    After a rollback the run has the weights and the optimizer's state of an earlier checkpoint, and stands after the
    step at which the limit was reached, whenever that was found out: the sequences in between are not trained on again.
    """

    def __init__(self, run: Run, guard: SpikeGuard) -> None:
        self._run, self._guard = run, guard

    def at_stage_start(self, stage: StageRun) -> None:
        """Another stage has other losses."""
        if stage.begins:
            self._guard.begin_stage()

    def after_step(self, stage: StageRun, boundary: Boundary) -> None:
        """Check where the device is read anyway."""
        if boundary.due or boundary.stage_ended:
            self.check(boundary)

    def check(self, boundary: Boundary) -> None:
        """Log what was skipped, and roll back where it was too much. A collective, and a device sync."""
        run = self._run
        before = self._guard.skipped
        verdict = log_skipped_steps(self._guard, boundary.step, run.recipe, run.progress.ended, run.log)
        run.ledger.skip(self._guard.skipped - before)
        if verdict is not None:
            with run.safety.progress.doing("rolling back to a checkpoint"), run.ledger.spending(ROLLBACK):
                step = self._roll_back(verdict)
            run.ledger.rolled_back(verdict.step, step)
            boundary.rolled_back = True

    def _roll_back(self, verdict: Verdict) -> int:
        """Returns the step of the checkpoint."""
        run, guard = self._run, self._guard
        run.checkpoints.wait()
        folder = run.directory / "checkpoints"
        running = Position.at_step(run.recipe, verdict.step, run.progress.ended).stage_of_last_step(run.recipe)[1]
        instead = advice(run.recipe, running.name, folder, run.changes)
        info = guard.rollback(verdict, folder, f"look at the sequences that metrics.jsonl calls skipped, or {instead}")
        state = load_checkpoint(info, chunks=run.engine.chunks, optimizer=run.engine.optimizer)
        run.progress.move_to(verdict.step)
        index, stage = run.progress.position.stage_of_last_step(run.recipe)
        begun = info.fields["stage_index"] == index
        if not begun and not stage.carry_optimizer:
            run.engine.optimizer.reset_state()
        rollbacks = guard.rollbacks
        guard.load_state(state.get("spikes") if begun else None)
        guard.rollbacks = rollbacks
        log_rollback(info, verdict, run.recipe, run.progress.ended, run.log)
        return info.step

    def state(self) -> dict[str, Any]:
        """What its decisions depend on."""
        return {"spikes": self._guard.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Of a run without a guard there is none."""
        self._guard.load_state(state.get("spikes"))
