"""Stage section `lr`: the learning rate by step."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from megatron_speech.recipe.base import StrictConfig
from megatron_speech.recipe.numbers import TokenCount


class LearningRateConfig(StrictConfig):
    """Stage section `lr`: warm-up from 0 to `peak`, then down to `end` at the stage's last step.

    Step k (1-based) of n, with w warm-up steps, trains with peak·k/w up to k = w and with
    end + (peak - end)·c((k - w)/(n - w)) after it, where c(x) is ½(1 + cos πx) (`cosine`) or 1 - x (`linear`).
    `constant` stays at the peak. `wsd` (warm-up, stable, decay: arXiv:2404.06395) stays at the peak until its last
    d = `decay` steps, step n-d+j of which has c(j/d); with `decay_style`, c(x) is also 2·½^x - 1 (`exponential`) or
    1 - √x (`minus_sqrt`).

    With `scale_with_batch` each of these is multiplied by :meth:`batch_factor` of the step's own global batch, so that
    a rate found with one batch size serves another, and grows within a `batch_ramp`.
    """

    peak: float = Field(gt=0.0, le=10.0, description="highest learning rate")
    end: float | None = Field(default=None, ge=0.0, description="learning rate of the last step; null: peak / 10")
    warmup: float = Field(
        default=0.0, ge=0.0, description="warm-up: below 1 a share of the stage's steps, from 1 on a number of steps"
    )
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        default="cosine", description="the way down from peak to end; wsd: flat, then down within `decay`"
    )
    decay: float = Field(
        default=0.1,
        gt=0.0,
        description="wsd only: the decay at the end, below 1 a share of the stage's steps, from 1 on a number of steps",
    )
    decay_style: Literal["cosine", "linear", "exponential", "minus_sqrt"] = Field(
        default="linear", description="wsd only: the way down from peak to end"
    )
    scale_with_batch: Literal["none", "linear", "sqrt"] = Field(
        default="none",
        description="multiply every step's rate by (positions of its global batch / reference_batch_tokens), to the "
        "power of 1 (linear) or 1/2 (sqrt)",
    )
    reference_batch_tokens: TokenCount | None = Field(
        default=None, description="the global batch that peak and end are meant for; needs scale_with_batch"
    )

    @property
    def floor(self) -> float:
        """The learning rate of the stage's last step."""
        if self.schedule == "constant":
            return self.peak
        return self.peak / 10 if self.end is None else self.end

    def batch_factor(self, batch_tokens: int) -> float:
        """What the rate of a step whose global batch has `batch_tokens` positions is multiplied by.

        Linear: Goyal et al., arXiv:1706.02677; square root, for Adam: Malladi et al., arXiv:2205.10287.
        """
        if self.reference_batch_tokens is None:
            return 1.0
        ratio = batch_tokens / self.reference_batch_tokens
        return ratio if self.scale_with_batch == "linear" else math.sqrt(ratio)

    def warmup_steps(self, steps: int) -> int:
        """Warm-up steps of a stage of `steps` steps; always below `steps`, as mcore's scheduler asks."""
        return min(_share_or_count(self.warmup, steps), steps - 1)

    def decay_steps(self, steps: int) -> int:
        """Steps of the decay that ends a stage of `steps` steps under `wsd`: at least one, none of the warm-up."""
        return max(1, min(_share_or_count(self.decay, steps), steps - self.warmup_steps(steps)))

    @model_validator(mode="after")
    def _falls(self) -> LearningRateConfig:
        if self.end is not None and self.end > self.peak:
            raise ValueError(f"end {self.end:g} is above peak {self.peak:g}; a learning rate falls within a stage")
        for name, value in (("warmup", self.warmup), ("decay", self.decay)):
            if value >= 1.0 and not value.is_integer():
                raise ValueError(f"{name} {value:g} is neither a share below 1 nor a whole number of steps")
        if (self.scale_with_batch == "none") != (self.reference_batch_tokens is None):
            raise ValueError(
                f"scale_with_batch is {self.scale_with_batch} and reference_batch_tokens "
                f"{self.reference_batch_tokens or 'null'}; name a rule and the batch that peak is meant for, or neither"
            )
        for name in ("decay", "decay_style"):
            value, default = getattr(self, name), type(self).model_fields[name].default
            if self.schedule != "wsd" and value != default:
                raise ValueError(
                    f"{name} {value} belongs to schedule wsd, and schedule is {self.schedule}; drop one of the two"
                )
        return self


def _share_or_count(value: float, steps: int) -> int:
    """Steps that `value` stands for: a share of `steps` below 1, a number of steps from 1 on."""
    return round(value * steps) if value < 1.0 else int(value)
