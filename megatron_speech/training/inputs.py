"""Micro-batches as the model takes them."""

from __future__ import annotations

import torch

from megatron_speech.data.loading.loader import MicroBatch
from megatron_speech.model.packed import PackedSequences
from megatron_speech.model.targets import HeadTargets
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
        self.packed = PackedSequences.build(
            batch.cu_seqlens,
            position_ids=batch.position_ids,
            row_pointers=batch.row_pointers,
            fused=fused,
            context=context,
            device=device,
        )
        self.targets = HeadTargets.build(
            batch.labels,
            batch.loss_weights,
            batch.group_ids,
            scales=scales,
            label_smoothing=loss.label_smoothing,
            z_loss=loss.z_loss,
            device=device,
        )
