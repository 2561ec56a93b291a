"""What the head of the model is to learn of a micro-batch, and the losses that it returns.

The weight of a token is decided here and nowhere else: its loss weight (the recipe's `loss` section and the document's
own, as the loader gives it) times the scale of its group, 1 over the weight of the global batch.

Shapes: T tokens of the packed row, R of them that are learned.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_speech.model.packed import send
from megatron_speech.ops.cross_entropy import LinearLoss
from megatron_speech.parallel import groups as parallel_groups

# The loss of the head over the token vocabulary.
TOKENS = "tokens"


@dataclass(frozen=True)
class HeadTargets:
    """The rows that the head reads, and what of them is minimised. On the device; made with :meth:`build`.

    Attributes:
        rows: int64 [R], positions of the packed row whose loss counts, ascending.
        labels: int64 [R], the ids that follow them.
        weights: float32 [R], what their losses count for in the total: loss weight × scale. May be negative.
        loss_weights: float32 [R], the loss weights alone, for reports.
        groups: int32 [R], document group · 3 + modality of the label.
        label_smoothing, z_loss: of the loss, see :func:`megatron_speech.ops.cross_entropy.linear_cross_entropy`.
    """

    rows: Tensor
    labels: Tensor
    weights: Tensor
    loss_weights: Tensor
    groups: Tensor
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    @classmethod
    def build(
        cls,
        labels: Tensor,
        loss_weights: Tensor | None = None,
        groups: Tensor | None = None,
        *,
        scales: Sequence[float] = (1.0,),
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        device: torch.device | str | None = None,
    ) -> HeadTargets:
        """From a micro-batch on the host; nothing is read back from the device.

        Args:
            labels: int64 of T elements in any shape, any value where the weight is zero.
            loss_weights: float32 of T elements; None: 1 everywhere. Tokens of weight zero are no targets.
            groups: int32 of T elements, as the loader gives them; None: 0 everywhere.
            scales: what weight 1 counts for in the loss of the global batch, of all labels or by modality
                (:meth:`megatron_speech.recipe.loss.LossConfig.scales`).
            label_smoothing, z_loss: see the class.
            device: where the model runs; by default this process's.
        """
        device = torch.device(device) if device is not None else parallel_groups.device()
        labels = labels.reshape(-1)
        plain = torch.ones(labels.shape) if loss_weights is None else loss_weights.detach().cpu().reshape(-1)
        groups = torch.zeros(labels.shape, dtype=torch.int32) if groups is None else groups.reshape(-1)
        weights = plain * _by_position(scales, groups)
        rows = weights.nonzero().squeeze(1)
        return cls(
            rows=send(rows, device),
            labels=send(labels.cpu()[rows], device),
            weights=send(weights[rows], device),
            loss_weights=send(plain[rows], device),
            groups=send(groups[rows], device),
            label_smoothing=label_smoothing,
            z_loss=z_loss,
        )


def _by_position(scales: Sequence[float], groups: Tensor) -> float | Tensor:
    """The factor of each position: the only one, or that of its label's modality (any where nothing is learned)."""
    return scales[0] if len(scales) == 1 else torch.tensor(scales)[groups.long() % len(scales)]


class Losses(dict[str, LinearLoss]):
    """The losses of a micro-batch by name; today the one of the token head, :data:`TOKENS`."""

    @property
    def total(self) -> Tensor:
        """Their sum, a scalar: what is minimised."""
        return functools.reduce(torch.add, (loss.total for loss in self.values()))
