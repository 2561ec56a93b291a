"""Metrics of an interval of steps: to the exporters, and one line to the console."""

from __future__ import annotations

import math
from typing import Any

import torch

from megatron_speech.errors import DivergenceError
from megatron_speech.training.checkpoint.divergence import advice
from megatron_speech.training.events.event import Boundary, Event, StageRun, is_multiple
from megatron_speech.training.run import Run
from megatron_speech.training.telemetry.metrics import memory_gib, peak_tflops
from megatron_speech.training.telemetry.run_log import console_line
from megatron_speech.training.telemetry.throughput import Interval


class LogMetrics(Event):
    """Every `logging.interval_steps`, after the last step that was asked for, and at the end of a stage.

    Raises:
        DivergenceError: loss or gradient norm is not finite, and nothing in the recipe deals with that.
    """

    def __init__(self, run: Run) -> None:
        self._run = run

    def is_due(self, stage: StageRun, boundary: Boundary) -> bool:
        """Whether an interval ends here."""
        return boundary.last or is_multiple(boundary.step, self._run.recipe.logging.interval_steps)

    def after_step(self, stage: StageRun, boundary: Boundary) -> None:
        """Log where an interval ends."""
        if self.is_due(stage, boundary):
            self._log(stage, boundary)

    def at_stage_end(self, stage: StageRun, boundary: Boundary) -> None:
        """Log what was not logged yet."""
        if not boundary.logged and not boundary.rolled_back:
            self._log(stage, boundary)

    def _log(self, stage: StageRun, boundary: Boundary) -> None:
        """Read the interval's sums and write them. A collective."""
        boundary.logged = True
        run, recipe = self._run, self._run.recipe
        means: dict[str, Any] = stage.meter.read()
        seconds, steps, waited = stage.clock.lap()
        measured = {name: means.pop(name) for name in ("tokens", "learned", "pad_fraction")}
        peak = peak_tflops(torch.cuda.get_device_name() if torch.cuda.is_available() else None)
        if not measured["learned"]:  # no step of the interval had a label, or was taken
            means["loss"] = None
        # Of the last step, and without a value where that had nothing to learn: no value is not a bad one.
        grad_norm = None if boundary.norm is None else boundary.norm.item()
        slowest, host = run.safety.stragglers(waited / steps)
        if run.is_main:
            run.log.alarm("straggler", slowest.sentence(recipe.logging.straggler_factor, host), word="note")
        record = {
            **run.progress.as_record(),
            **means,
            "lr": run.engine.optimizer.learning_rate,
            "grad_norm": grad_norm,
            **Interval(seconds, steps, waited, **measured).record(
                recipe.model,
                run.space.size,
                reach=stage.source.reach,
                processes=run.world_size,
                peak_tflops=peak,
                last_mlp_on_learned_only=run.engine.execution.last_mlp_on_learned_only,
            ),
            "memory_gib": memory_gib(),
            "speakers_per_batch": stage.source.speakers(run.progress.steps_taken(stage.index)) if run.is_main else None,
            "slowest_rank": slowest.rank,
            "slowest_rank_seconds": slowest.seconds,
            "median_rank_seconds": slowest.median,
        }
        run.ledger.note(boundary.step)
        run.log.write({**record, **run.ledger.record()})
        total = run.progress.total_steps
        eta = (total - boundary.step) * seconds / steps
        if run.is_main:
            of = {"stage_steps": stage.config.steps, "total_steps": total}
            done = run.progress.steps_taken(stage.index)
            run.log.info(console_line(record, stage_step=done, **of, eta_seconds=eta))
        run.write_status("running", force=False)
        if recipe.spikes is None and not all(map(_is_harmless, (means["loss"], grad_norm))):
            run.checkpoints.wait()
            checkpoints = run.directory / "checkpoints"
            raise DivergenceError(
                f"step {boundary.step}: loss {means['loss']} and gradient norm {grad_norm} are not both finite; "
                f"{advice(recipe, stage.config.name, checkpoints, run.changes)}"
            )


def _is_harmless(value: float | None) -> bool:
    return value is None or math.isfinite(value)
