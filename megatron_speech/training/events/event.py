"""What an event of the training loop is: something that happens between steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_speech.recipe.stage import StageConfig
from megatron_speech.training.batches import BatchSource
from megatron_speech.training.telemetry.metrics import LossMeter
from megatron_speech.training.telemetry.timing import Clock


@dataclass
class StageRun:
    """A stage while its steps are taken, from its beginning or from where it is continued.

    Attributes:
        index: number of the stage in the recipe.
        config: its section of the recipe.
        source: of its global batches.
        scheduler: of the learning rate.
        meter: sums of the losses since the last logged line.
        clock: time of the steps since the last logged line.
        begins: whether its first step comes next.
    """

    index: int
    config: StageConfig
    source: BatchSource
    scheduler: OptimizerParamScheduler
    meter: LossMeter
    clock: Clock
    begins: bool


@dataclass
class Boundary:
    """The boundary after an optimizer step; events pass on through it what they have found or done.

    Attributes:
        step: optimizer steps taken, over all stages.
        norm: float32 scalar on the device, the gradient norm of the step; None where it had nothing to learn.
        last: no further step was asked for.
        stage_ended: the stage has had its last step.
        due: an event has something to do here that reads the device.
        stop: the run ends here, because it was asked to.
        rolled_back: the run was rolled back to an earlier checkpoint; nothing more happens at this boundary.
        logged: the metrics of the interval were written.
        scores: of the validation made here, or None.
    """

    step: int
    norm: torch.Tensor | None
    last: bool
    stage_ended: bool
    due: bool = False
    stop: bool = False
    rolled_back: bool = False
    logged: bool = False
    scores: dict[str, Any] | None = None


class Event:
    """Base of the events; here nothing happens. Events run in the order that `training.trainer` states.

    All ranks call every method at the same moments, so that collectives are allowed in all of them but `close`.
    """

    def at_stage_start(self, stage: StageRun) -> None:
        """Before the first step of a stage, and where a stage is continued."""

    def before_step(self, stage: StageRun) -> None:
        """Before the batch of the next step is asked for."""

    def is_due(self, stage: StageRun, boundary: Boundary) -> bool:
        """Whether `after_step` will read the device; decided by numbers of steps alone."""
        return False

    def after_step(self, stage: StageRun, boundary: Boundary) -> None:
        """After every step."""

    def at_stage_end(self, stage: StageRun, boundary: Boundary) -> None:
        """After the last step of a stage, behind `after_step`; also where that step was discarded by a rollback."""

    def state(self) -> dict[str, Any]:
        """What has to be in a checkpoint for the event to go on from it, by names of its own."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over the `state` of a checkpoint in the midst of the stage that starts next."""

    def close(self) -> None:
        """The run has ended, perhaps by an error."""


def is_multiple(step: int, interval: int) -> bool:
    """Whether something that happens every `interval` steps happens after `step`; 0: never."""
    return interval > 0 and step % interval == 0
