"""Recipe section `spikes`: which steps are skipped, and when the run rolls back."""

from __future__ import annotations

from pydantic import Field

from megatron_speech.recipe.base import StrictConfig


class SpikesConfig(StrictConfig):
    """Recipe section `spikes`: steps that are skipped, and when to roll back to a checkpoint.

    A step whose loss or gradient norm is not finite is always skipped.
    """

    grad_norm_above: float | None = Field(
        default=None, gt=1.0, description="skip a gradient norm above this many times its median; null: no such limit"
    )
    loss_above: float | None = Field(
        default=None, gt=1.0, description="skip a loss above this many times its median; null: no such limit"
    )
    window: int = Field(default=100, ge=4, description="steps (taken ones, of the stage) that the medians are of")
    min_steps: int = Field(
        default=20, ge=1, description="steps to be taken in a stage before anything finite is called a spike"
    )
    skip_limit: int = Field(
        default=10, ge=1, description="skipped steps in a row after which the run rolls back to the checkpoint before"
    )
    rewind_limit: int = Field(
        default=3, ge=0, description="rollbacks of a stage before the run gives up; 0: it never rolls back"
    )
