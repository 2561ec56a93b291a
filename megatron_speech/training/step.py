"""One optimizer step: a global batch in, a loss meter and changed weights out.

    GlobalBatch ─► micro-batches ─ schedule ─► loss ─► gradients ─► clip ─► AdamW
                                          └─ grouped sums ─► LossMeter

B rows of S columns make a micro-batch of T = B·S positions, which travels through the model as one packed row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_speech.data.loading.loader import GlobalBatch
from megatron_speech.model.targets import TOKENS, Losses
from megatron_speech.recipe.loss import LossConfig
from megatron_speech.recipe.recipe import Recipe
from megatron_speech.training.engine import Engine
from megatron_speech.training.inputs import ModelInputs
from megatron_speech.training.spikes import SpikeGuard
from megatron_speech.training.telemetry.metrics import LossMeter
from megatron_speech.training.telemetry.timing import RankTimer


class TrainStep:
    """Takes optimizer steps; also runs batches without one, for validation.

    Args:
        recipe: what is trained.
        engine: this rank's model and optimizer.
        device: of the model.
        data_parallel: copies of the model that share the global batch.
        timer: times this rank's own work.
        before_update: called before weights or optimizer state change.
        spikes: decides whether a step is taken; None: all are.
    """

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        device: torch.device,
        *,
        data_parallel: int,
        timer: RankTimer,
        before_update: Callable[[], None],
        spikes: SpikeGuard | None,
    ) -> None:
        self._context = recipe.parallel.context
        self._engine, self._device, self._data_parallel = engine, device, data_parallel
        self._timer, self._before_update, self._spikes = timer, before_update, spikes
        self._no_tokens = torch.zeros((), dtype=torch.int, device=device)
        self._step_loss = torch.zeros((), device=device)

    def take(
        self, batch: GlobalBatch, meter: LossMeter, loss: LossConfig, scheduler: OptimizerParamScheduler
    ) -> torch.Tensor | None:
        """Take one optimizer step; a collective. No device sync.

        A global batch in which no rank has a label to learn is passed over: the position and the learning rate
        advance, while weights, moments and averages stay, nothing is computed and nothing is measured.

        Args:
            batch: this rank's share of the global batch.
            meter: takes the losses and counts.
            loss: the stage's `loss` section.
            scheduler: of the learning rate, at the step before.

        Returns:
            float32 scalar on the device: the gradient norm before clipping; None where nothing was to be learned.
        """
        engine, guard = self._engine, self._spikes
        totals = batch.loss_totals
        of_all_ranks = self._sum_over_ranks(totals)
        if not of_all_ranks[1].any():  # known on the host, and the same on every rank of any layout
            scheduler.step(1)
            if guard is not None:
                guard.pass_over()
            return None
        engine.zero_gradients()
        self.run_batch(batch, meter, loss, of_all_ranks, forward_only=False)
        meter.add_counts(loss_totals=totals, tokens=batch.tokens, pad_tokens=batch.pad_tokens)
        scheduler.step(1)
        self._before_update()
        if guard is None:
            return engine.optimizer.step()
        step_loss, self._step_loss = self._step_loss, torch.zeros_like(self._step_loss)

        def skip(norm: torch.Tensor) -> torch.Tensor:
            skipped = guard.decide(step_loss, norm)
            meter.settle(skipped, totals)
            return skipped

        return engine.optimizer.step(skip)

    def run_batch(
        self, batch: GlobalBatch, meter: LossMeter, loss: LossConfig, loss_totals: np.ndarray, *, forward_only: bool
    ) -> None:
        """Forward (and backward) over this rank's micro-batches with megatron-core's schedule.

        Args:
            batch: this rank's share of the global batch.
            meter: takes the losses.
            loss: the stage's `loss` section.
            loss_totals: of the whole global batch, all ranks: what Σ weight·ce is divided by (`LossConfig.scales`).
            forward_only: no gradients, and the plain cross-entropy.
        """
        engine = self._engine
        # The meter weighs what is validated by itself: any scale will do that is not 0.
        scales = [1.0] * loss.normalizers if forward_only else loss.scales(loss_totals)
        plain = loss.model_copy(update={"label_smoothing": 0.0, "z_loss": 0.0}) if forward_only else loss
        fused = engine.chunks[0].fused_attention
        inputs = [
            ModelInputs(micro_batch, self._device, plain, scales, fused=fused, context=self._context)
            for micro_batch in engine.execution.local_micro_batches(batch.micro_batches)
        ]

        def forward_step(iterator: Iterator[ModelInputs], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
            micro_batch = next(iterator)
            output = model(
                input_ids=micro_batch.tokens,
                position_ids=None,
                attention_mask=None,
                targets=micro_batch.targets,
                packed_seq_params=micro_batch.packed,
            )

            def total(losses: Losses) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
                tokens, targets = losses[TOKENS], micro_batch.targets
                meter.add_losses(tokens.losses, tokens.cross_entropy, targets.loss_weights, targets.groups)
                if self._spikes is not None and engine.contributes and not forward_only:
                    self._step_loss += losses.total.detach()
                return losses.total, self._no_tokens, {}

            return output, total

        iterators = [iter(inputs) for _ in engine.model]
        if not forward_only:
            self._timer.begin()
        engine.schedule(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=engine.model if len(engine.model) > 1 else engine.model[0],
            num_microbatches=len(inputs),
            seq_length=inputs[0].tokens.numel() * self._context,  # which megatron-core divides by it
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _sum_over_ranks(self, values: np.ndarray) -> np.ndarray:
        """Sum of host numbers (float64) over the data-parallel ranks, on the host: no device waits for it."""
        if self._data_parallel == 1:
            return values
        total = torch.from_numpy(values.copy())
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group_gloo())
        return total.numpy()
