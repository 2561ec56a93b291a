"""Stage section `loss`: what a position counts for, and what the sum is divided by."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from megatron_speech.errors import InputError
from megatron_speech.modalities import MODALITIES
from megatron_speech.recipe.base import StrictConfig


class LossConfig(StrictConfig):
    """Stage section `loss`: what a position counts for by what its label is, and what the sum is divided by."""

    text: float = Field(default=1.0, ge=0.0, le=1000.0, description="weight of text labels")
    audio: float = Field(default=1.0, ge=0.0, le=1000.0, description="weight of labels that are audio codes")
    special: float = Field(default=1.0, ge=0.0, le=1000.0, description="weight of labels that are special tokens")
    prompt: float = Field(
        default=1.0,
        ge=0.0,
        le=1.0,
        description="factor of everything up to and including the first <speech_start>; 0 makes the stage an SFT stage",
    )
    normalize: Literal["global", "modality"] = Field(
        default="global",
        description="global: Σ weight·ce / divisor over the global batch; modality: the mean ce of text, audio and "
        "special labels, each over the global batch, times their weights and added up",
    )
    divisor: Literal["weights", "tokens"] = Field(
        default="weights",
        description="what Σ weight·ce is divided by: weights: Σ weight; tokens: the number of labels with a weight, "
        "for weights that may be negative or add up to nothing",
    )
    label_smoothing: float = Field(
        default=0.0, ge=0.0, lt=1.0, description="share of the target that is spread over all ids; training only"
    )
    z_loss: float = Field(
        default=0.0, ge=0.0, le=1.0, description="factor of (log Σ exp logit)², added to the loss; training only"
    )

    @model_validator(mode="after")
    def _something_is_learned(self) -> LossConfig:
        if self.text == self.audio == self.special == 0.0:
            raise ValueError(
                "loss.text, loss.audio and loss.special are all 0, so that nothing is learned; give one a weight, or "
                "leave the stage out (skip: true)"
            )
        return self

    @property
    def normalizers(self) -> int:
        """Divisors of a global batch: one, or one per modality."""
        return 1 if self.normalize == "global" else len(MODALITIES)

    def divisors(self, totals: np.ndarray) -> np.ndarray:
        """What the stage divides by, [`normalizers`]: the row of `totals` (see :meth:`scales`) that `divisor` names."""
        chosen: np.ndarray = totals[("weights", "tokens").index(self.divisor)]
        return chosen

    def scales(self, totals: np.ndarray) -> list[float]:
        """What weight 1 counts for in the loss, so that the loss is Σ scale · weight · ce.

        Args:
            totals: float64 [2, `normalizers`], of the whole global batch: Σ weight, and the number of labels with a
                weight, of all labels or by modality.

        Returns:
            One factor per normaliser, 0 where there is no label: a group that is absent adds nothing. By modality m
            and divided by weights the factor is weight_m / Σ_m weight, so that Σ_m weight·ce becomes weight_m times a
            mean whose own weights are those of prompts alone. Divided by tokens it is 1 / labels, so that Σ_m
            weight·ce, in which weight_m is a factor already, becomes the mean of weight·ce over the labels.

        Raises:
            InputError: there are labels, but their weights sum to 0 or less and are what is divided by.
        """
        names = ("all labels",) if self.normalize == "global" else MODALITIES
        by_weights = self.normalize == "modality" and self.divisor == "weights"
        scales = []
        for name, divisor, labels in zip(names, self.divisors(totals).tolist(), totals[1].tolist(), strict=True):
            if labels and divisor <= 0.0:
                raise InputError(
                    f"loss.divisor is weights, but the loss weights of {name} of a global batch sum to {divisor:g} "
                    f"over {labels:.0f} labels, and a loss cannot be divided by that; set loss.divisor: tokens where "
                    "weights may be negative"
                )
            scales.append((getattr(self, name) if by_weights else 1.0) / divisor if labels else 0.0)
        return scales
