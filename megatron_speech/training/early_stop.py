"""Ending a stage when its validation no longer improves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from megatron_speech.data.stage import StageData
from megatron_speech.errors import InputError
from megatron_speech.recipe.stage import EarlyStopConfig, StageConfig


class EarlyStop:
    """Watches the audio loss of one stage's validations. Its best is its own, apart from that of the checkpoints.

    Args:
        config: the stage's section `early_stop`.
    """

    def __init__(self, config: EarlyStopConfig) -> None:
        self.config = config
        self.best: float | None = None
        self.without_improvement = 0

    def update(self, audio_loss: float) -> bool:
        """Take the loss of the newest validation; True when the stage is to end with it."""
        if math.isfinite(audio_loss) and (self.best is None or audio_loss < self.best - self.config.min_delta):
            self.best, self.without_improvement = audio_loss, 0
        else:
            self.without_improvement += 1
        return self.without_improvement >= self.config.patience

    def state(self) -> dict[str, Any]:
        """The best loss and the validations since, JSON-able."""
        return {"best": self.best, "without_improvement": self.without_improvement}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over a :meth:`state`."""
        self.best, self.without_improvement = state["best"], state["without_improvement"]


def check_held_out(stages: Sequence[StageConfig], held_out: Sequence[StageData]) -> None:
    """Refuse an `early_stop` that would have nothing to go by.

    Raises:
        InputError: a stage that may end early has no held-out sequences.
    """
    for stage, data in zip(stages, held_out, strict=True):
        if stage.early_stop is not None and data.n_sequences == 0:
            raise InputError(
                f"stage {stage.name}: early_stop needs validation losses, and no document of its strata is held out; "
                "raise data.validation_fraction, or drop early_stop"
            )
