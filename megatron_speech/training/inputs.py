"""Micro-batches as the model takes them."""

from __future__ import annotations

import torch

from megatron_speech.data.loading.loader import MicroBatch
from megatron_speech.model.attention import PackedSequences
from megatron_speech.recipe.loss import LossConfig


class ModelInputs:
    """A micro-batch on the model's device, flattened to one packed row of T = B·S positions.

    `scales`: what weight 1 counts for in the loss of the global batch, of all labels or by modality.
    """

    def __init__(
        self,
        batch: MicroBatch,
        device: torch.device,
        loss: LossConfig,
        scales: list[float],
        *,
        fused: bool,
        context: int,
    ) -> None:
        self.tokens = batch.tokens.view(1, -1).to(device, non_blocking=True)
        self.labels = batch.labels.view(1, -1).to(device, non_blocking=True)
        self.weights = batch.loss_weights.view(-1).to(device, non_blocking=True)
        self.group_ids = batch.group_ids.view(-1).to(device, non_blocking=True)
        self.packed = PackedSequences.build(
            batch.cu_seqlens,
            position_ids=batch.position_ids,
            loss_weights=batch.loss_weights * _by_position(scales, batch.group_ids),
            row_pointers=batch.row_pointers,
            fused=fused,
            context=context,
            device=device,
        )
        self.packed.label_smoothing, self.packed.z_loss = loss.label_smoothing, loss.z_loss

    def learned(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss weights, group ids) of the tokens that the head returns losses of."""
        rows = self.packed.loss_rows
        assert rows is not None
        return self.weights.index_select(0, rows), self.group_ids.index_select(0, rows)


def _by_position(scales: list[float], group_ids: torch.Tensor) -> float | torch.Tensor:
    """The factor of each position: the only one, or that of its label's modality (any where nothing is learned)."""
    return scales[0] if len(scales) == 1 else torch.tensor(scales)[group_ids.long() % len(scales)]
