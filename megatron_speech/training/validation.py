"""Loss on held-out sources: over all ranks, weighted by tokens, in the same groups as the training loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_speech.data.stage import StageData
from megatron_speech.recipe.stage import StageConfig
from megatron_speech.training.telemetry.metrics import LossMeter


def validation_sequences(tokens: int, stage: StageConfig) -> int:
    """Sequences that a validation of at most `tokens` positions reads: at least one."""
    return max(1, tokens // stage.seq_length)


class Validator:
    """Scores the model on the held-out documents of one stage, always the same ones in the same order.

    Args:
        stage, data: the stage and its held-out sequences.
        meter: a meter of `data.groups` on this rank's device.
        run_batch: (micro-batches, meter, loss section, weights of the global batch, forward_only) of the trainer.
        dp_rank, dp_size: of this rank.
        micro_batches: micro-batches per global batch that the schedule needs.
    """

    def __init__(
        self,
        stage: StageConfig,
        data: StageData,
        meter: LossMeter,
        run_batch: Callable[..., None],
        *,
        dp_rank: int,
        dp_size: int,
        micro_batches: int,
    ) -> None:
        self.stage, self.data, self.meter = stage, data, meter
        self._run_batch = run_batch
        self._dp_rank, self._dp_size = dp_rank, dp_size
        # As small as can be: what the last one is filled up with (rows of padding) is computed for nothing.
        self._rows = stage.micro_batch_size * dp_size * micro_batches

    def run(self) -> dict[str, Any]:
        """Means by group, as in training lines; a collective. Empty when nothing is held out."""
        if self.data.n_sequences == 0:
            return {}
        stage = self.stage
        with (
            torch.no_grad(),
            self.data.loader(0, stage.micro_batch_size, self._rows, self._dp_rank, self._dp_size) as batches,
        ):
            for batch in batches:
                sums = batch.loss_totals
                self._run_batch(batch, self.meter, stage.loss, sums, forward_only=True)
                self.meter.add_counts(loss_totals=sums, tokens=batch.tokens, pad_tokens=batch.pad_tokens)
        means = self.meter.read()
        if not means["learned"]:  # a loss that is not a number is another matter: it is reported
            return {}
        return {key: value for key, value in means.items() if key == "loss" or key.startswith("loss/")} | {
            "tokens": int(means["tokens"])
        }
