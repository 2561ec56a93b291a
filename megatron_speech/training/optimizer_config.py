"""The typed parts of a recipe that say how weights move: learning rates, parameter groups, what stays frozen.

Light to import: no torch.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_speech.data.config import BatchRampConfig, StrictConfig
from megatron_speech.training.human_numbers import TokenCount


class LearningRateConfig(StrictConfig):
    """Stage section `lr`: warm-up from 0 to `peak`, then down to `end` at the stage's last step.

    Step k (1-based) of n, with w warm-up steps, trains with peak·k/w up to k = w and with
    end + (peak - end)·c((k - w)/(n - w)) after it, where c(x) is ½(1 + cos πx) (`cosine`) or 1 - x (`linear`).
    `constant` stays at the peak. `wsd` (warm-up, stable, decay: arXiv:2404.06395) stays at the peak until its last
    d = `decay` steps, step n-d+j of which has c(j/d); with `decay_style`, c(x) is also 2·½^x - 1 (`exponential`) or
    1 - √x (`minus_sqrt`).
    """

    peak: float = Field(gt=0.0, description="highest learning rate")
    end: float | None = Field(default=None, ge=0.0, description="learning rate of the last step; null: peak / 10")
    warmup: float = Field(
        default=0.0, ge=0.0, description="warm-up: below 1 a share of the stage's steps, from 1 on a number of steps"
    )
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    decay: float = Field(
        default=0.1,
        gt=0.0,
        description="wsd only: the decay at the end, below 1 a share of the stage's steps, from 1 on a number of steps",
    )
    decay_style: Literal["cosine", "linear", "exponential", "minus_sqrt"] = Field(
        default="linear", description="wsd only: the way down from peak to end"
    )

    @property
    def floor(self) -> float:
        """The learning rate of the stage's last step."""
        if self.schedule == "constant":
            return self.peak
        return self.peak / 10 if self.end is None else self.end

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


class RampConfig(BatchRampConfig):
    """Stage section `batch_ramp`, with token counts as people write them."""

    start: TokenCount = Field(description="positions of the first global batches")
    increment: TokenCount = Field(description="positions that each part of the ramp adds to the global batch")
    over: TokenCount = Field(description="positions trained on until the global batch has its full size")


class EarlyStopConfig(StrictConfig):
    """Stage section `early_stop`: the stage ends when the audio loss of its validations no longer falls."""

    patience: int = Field(default=5, ge=1, description="validations in a row without a new best loss that end it")
    min_delta: float = Field(default=0.01, ge=0.0, description="what a loss has to be below the best by, to be one")


class TableConfig(StrictConfig):
    """Sections `optimizer.embeddings` and `optimizer.head`: what differs for that table."""

    lr_multiplier: float = Field(default=1.0, gt=0.0, description="of the stage's learning rate, peak and end alike")
    weight_decay: float | None = Field(default=None, ge=0.0, description="null: that of the section `optimizer`")


class OptimizerConfig(StrictConfig):
    """Recipe section `optimizer`: AdamW, decoupled weight decay, gradient clipping by global norm."""

    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    beta2: float = Field(default=0.95, ge=0.0, lt=1.0)
    eps: float = Field(default=1e-8, gt=0.0)
    weight_decay: float = Field(default=0.1, ge=0.0, description="of matrices; never of norms and biases")
    clip_grad: float = Field(default=1.0, ge=0.0, description="largest global gradient norm; 0: do not clip")
    embeddings: TableConfig = Field(
        default_factory=TableConfig, description="the token table, which is the output head too where they are tied"
    )
    head: TableConfig = Field(default_factory=TableConfig, description="the output head of an untied model")
    layer_lr_decay: float = Field(
        default=1.0,
        gt=0.0,
        le=1.0,
        description="d: of L layers, the one with l layers above it trains with d^l of the learning rate, an untied "
        "token table with d^L, final norm and head with all of it",
    )
    freeze: list[str] = Field(
        default_factory=list,
        description="shell patterns of names of parameters that are not trained; layers count from 0 through the whole "
        "model: decoder.layers.[0-3].*, embedding.*, output_layer.*",
    )
    freeze_rows: Literal["text"] | Annotated[int, Field(gt=0)] | None = Field(
        default=None,
        description="rows of the token table and of the head that stay bit for bit: text: those of the text ids; a "
        "number: those of the ids below it",
    )


class EmaConfig(StrictConfig):
    """Recipe section `ema`: a moving average of the weights, saved with every checkpoint."""

    decay: float = Field(default=0.9999, gt=0.0, lt=1.0, description="at most; update n (from 0) has (1+n)/(10+n)")
    use_for_validation: bool = Field(
        default=False, description="true: validation, early stop and the best checkpoint judge the average"
    )


class SpikesConfig(StrictConfig):
    """Recipe section `spikes`: steps that are skipped, and when to go back to a checkpoint.

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
        default=10, ge=1, description="skipped steps in a row after which the run goes back to the checkpoint before"
    )
    rewind_limit: int = Field(
        default=3, ge=0, description="times that a stage goes back before the run gives up; 0: it never goes back"
    )
