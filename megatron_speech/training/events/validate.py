"""Validation losses: at fixed steps, for every checkpoint that is due, and at the end of a stage."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import Any

from megatron_speech.training.early_stop import EarlyStop
from megatron_speech.training.events.event import Boundary, Event, StageRun, is_multiple
from megatron_speech.training.run import Run
from megatron_speech.training.telemetry.goodput import VALIDATION
from megatron_speech.training.telemetry.run_log import as_text
from megatron_speech.training.validation import Validator
from megatron_speech.wording import clock


class Validate(Event):
    """Scores the model on the stage's held-out sequences, where there are any and the recipe asks for it.

    A checkpoint that only a stop asks for is not validated: time is short, and no other run has it.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._validator: Validator | None = None

    def at_stage_start(self, stage: StageRun) -> None:
        """Make the stage's validator."""
        run = self._run
        data = run.held_out[stage.index]
        self._validator = None
        if run.recipe.validation.interval_steps == 0 or data.n_sequences == 0:
            return
        self._validator = Validator(
            stage.config,
            data,
            run.make_meter(stage.config, data.groups),
            run.step.run_batch,
            dp_rank=run.dp_rank,
            dp_size=run.dp_size,
            micro_batches=run.recipe.parallel.micro_batch_multiple,
        )

    def is_due(self, stage: StageRun, boundary: Boundary) -> bool:
        """At the interval, and where a checkpoint is due."""
        run = self._run
        return self._validator is not None and (
            is_multiple(boundary.step, run.recipe.validation.interval_steps)
            or run.checkpoints.due(stage.config, boundary.step, run.progress.steps_taken(stage.index))
        )

    def after_step(self, stage: StageRun, boundary: Boundary) -> None:
        """Validate where it is due; the end of a stage comes later."""
        if not boundary.stage_ended and self.is_due(stage, boundary):
            self._validate(stage, boundary)

    def at_stage_end(self, stage: StageRun, boundary: Boundary) -> None:
        """Every stage ends with a validation."""
        if self._validator is not None and boundary.scores is None:
            self._validate(stage, boundary)

    def _validate(self, stage: StageRun, boundary: Boundary) -> None:
        run = self._run
        assert self._validator is not None
        with stage.clock.paused(), run.ledger.spending(VALIDATION), run.safety.progress.doing("validating"):
            started = time.perf_counter()
            run.engine.set_training(False)
            averaged = run.recipe.ema is not None and run.recipe.ema.use_for_validation
            if averaged:
                run.checkpoints.block_training_stream()  # the averages change places with the weights
            with run.engine.optimizer.averaged_weights() if averaged else contextlib.nullcontext():
                boundary.scores = scores = self._validator.run()
            run.engine.set_training(True)
            seconds = time.perf_counter() - started
            record = {**run.progress.as_record(), "split": "validation", **scores}
            run.log.write({**record, "validation_seconds": seconds})
            audio = scores.get("loss/modality/audio")
            run.log.info(
                f"{record['stage']} validation at step {record['step']}  loss {as_text(scores.get('loss'), '.4f')}"
                f"  audio {as_text(audio, '.4f')}  {scores.get('tokens', 0):,} tokens"
                f"  {clock(seconds)}"
            )


class EndStageEarly(Event):
    """Ends a stage whose validation no longer improves (`early_stop`), of those that are made at fixed steps."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._early_stop: EarlyStop | None = None

    def at_stage_start(self, stage: StageRun) -> None:
        """A stage that begins has no best validation yet; one that is continued takes over its own."""
        config = stage.config.early_stop
        if config is None:
            self._early_stop = None
        elif stage.begins or self._early_stop is None:
            self._early_stop = EarlyStop(config)

    def after_step(self, stage: StageRun, boundary: Boundary) -> None:
        """Look at the validation just made."""
        run, early = self._run, self._early_stop
        at_interval = is_multiple(boundary.step, run.recipe.validation.interval_steps)
        if early is None or boundary.stage_ended or boundary.scores is None or not at_interval:
            return
        audio = boundary.scores.get("loss/modality/audio")
        if audio is None or not early.update(audio):
            return
        run.log.info(
            f"{stage.config.name} ends early at step {boundary.step}: the audio loss {audio:.4f} is the "
            f"{early.without_improvement}th in a row that is not {early.config.min_delta:g} below the best, "
            f"{early.best:.4f}"
        )
        run.progress.end_stage()
        boundary.stage_ended = True

    def state(self) -> dict[str, Any]:
        """The best validation, and how long ago it was."""
        return {"early_stop": self._early_stop.state() if self._early_stop is not None else None}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Of a stage without `early_stop` there is none."""
        if self._early_stop is not None and state.get("early_stop"):
            self._early_stop.load_state(state["early_stop"])
