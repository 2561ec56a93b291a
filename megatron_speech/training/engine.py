"""What a rank trains: its model chunks wrapped for data parallelism, their optimizer, and megatron-core's schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_speech.recipe.recipe import Recipe
from megatron_speech.tokens.space import TokenSpace
from megatron_speech.training.execution import Execution
from megatron_speech.training.initial import carry_moments, start_from
from megatron_speech.training.optim.freezing import freeze_parameters, frozen_ids
from megatron_speech.training.optim.optimizer import Optimizer


class Engine:
    """Model, optimizer and schedule of this rank. To be made on all ranks at the same time.

    Args:
        recipe: what is trained.
        space: its ids.
        device: where the model goes.
        data_parallel: copies of the model that share the global batch.
        fresh: no checkpoint follows: take the weights that `init` names, where it names any.
        on_backward_end: called after the backward pass of a step, before gradients are summed over the ranks.

    Attributes:
        execution: what the layers run on.
        chunks: the model chunks, bare; `model`: the same, wrapped for data parallelism.
        optimizer: of all chunks.
        schedule: megatron-core's forward-backward function for the layout.
        init_note: a line for the log about where the weights came from, or None.
        contributes: whether this rank's losses count: one tensor-parallel rank of the last pipeline stage.

    Raises:
        InputError: the model cannot be built, or what `init` names cannot be loaded.
    """

    def __init__(
        self,
        recipe: Recipe,
        space: TokenSpace,
        device: torch.device,
        *,
        data_parallel: int,
        fresh: bool,
        on_backward_end: Callable[[], None],
    ) -> None:
        self._on_backward_end = on_backward_end
        self.execution = Execution.choose(recipe, space)
        self.chunks: list[Any] = self.execution.build(space)
        self.init_note: str | None = None
        begins = recipe.init if fresh else None
        if begins is not None:
            source, self.init_note = start_from(begins, recipe.model, space, self.chunks)
        freeze_parameters(self.chunks, recipe.optimizer.freeze)
        self.model = self._wrap(recipe, device, data_parallel)
        self.optimizer = Optimizer(recipe, self.model, frozen_ids=frozen_ids(recipe.optimizer, space))
        if begins is not None:
            carried = carry_moments(begins, recipe.stages[0], source, chunks=self.chunks, optimizer=self.optimizer)
            self.init_note = f"{self.init_note}; {carried}"
        self.schedule = get_forward_backward_func()
        first_copy = parallel_state.get_tensor_model_parallel_rank() == 0
        self.contributes = parallel_state.is_pipeline_last_stage() and first_copy

    def _wrap(self, recipe: Recipe, device: torch.device, data_parallel: int) -> list[DistributedDataParallel]:
        parallel = recipe.parallel
        wrapping = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            use_distributed_optimizer=parallel.distributed_optimizer,
        )
        model: list[DistributedDataParallel] = []
        for index, chunk in enumerate(self.chunks):
            chunk.to(device)
            config = chunk.config
            # Gradients are already those of Σ w·ce / Σ w: they are summed over the ranks and nothing else.
            config.finalize_model_grads_func = self._sum_gradients
            wrapped = DistributedDataParallel(config, wrapping, chunk, disable_bucketing=index > 0)
            if data_parallel > 1:
                wrapped.broadcast_params()
            model.append(wrapped)
        if parallel.overlap_grad_reduce:
            syncs = [wrapped.no_sync for wrapped in model]
            for chunk in self.chunks:
                chunk.config.no_sync_func = syncs[0] if len(syncs) == 1 else syncs
        return model

    def _sum_gradients(self, model: list[Any], num_tokens: Any = None, **kwargs: Any) -> None:
        """megatron-core's gradient reduction without its division: the loss is already divided by its weight."""
        self._on_backward_end()
        finalize_model_grads(model, None, **kwargs)

    def zero_gradients(self) -> None:
        """Empty the gradient buffers, before the first micro-batch of a step."""
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def set_training(self, training: bool) -> None:
        """Switch all chunks between training and evaluation."""
        for chunk in self.model:
            chunk.train(training)
