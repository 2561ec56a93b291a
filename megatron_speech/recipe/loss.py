"""Stage section `loss`: what a position counts for, and what the sum is divided by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from megatron_speech.modalities import MODALITIES
from megatron_speech.recipe.base import StrictConfig


class LossConfig(StrictConfig):
    """Stage section `loss`: what a position counts for by what its label is, and what the sum is divided by."""

    text: float = Field(default=1.0, ge=0.0, description="weight of text labels; audio and special likewise")
    audio: float = Field(default=1.0, ge=0.0)
    special: float = Field(default=1.0, ge=0.0)
    prompt: float = Field(
        default=1.0,
        ge=0.0,
        description="factor of everything up to and including the first <speech_start>; 0 makes the stage an SFT stage",
    )
    normalize: Literal["global", "modality"] = Field(
        default="global",
        description="global: Σ weight·ce / Σ weight over the global batch; modality: the mean ce of text, audio and "
        "special labels, each over the global batch, times their weights and added up",
    )
    label_smoothing: float = Field(
        default=0.0, ge=0.0, lt=1.0, description="share of the target that is spread over all ids; training only"
    )
    z_loss: float = Field(
        default=0.0, ge=0.0, description="factor of (log Σ exp logit)², added to the loss; training only"
    )

    @property
    def normalizers(self) -> int:
        """Sums of weights that a global batch is divided by: one, or one per modality."""
        return 1 if self.normalize == "global" else len(MODALITIES)

    def scales(self, weight_sums: Sequence[float]) -> list[float]:
        """What weight 1 counts for in the loss, so that the loss is Σ scale · weight · ce.

        Args:
            weight_sums: Σ weight over the whole global batch, [`normalizers`]: of all labels, or by modality.

        Returns:
            One factor per normaliser, 0 where there is no weight: a group that is absent adds nothing. By modality m
            the factor is weight_m / Σ_m weight, so that Σ_m weight·ce becomes weight_m times a mean whose own
            weights are those of prompts alone.
        """
        numerators = [1.0] if self.normalize == "global" else [getattr(self, name) for name in MODALITIES]
        return [top / total if total > 0.0 else 0.0 for top, total in zip(numerators, weight_sums, strict=True)]
