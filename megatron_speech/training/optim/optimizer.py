"""AdamW through megatron-core, a gradient clip without a device sync, and one LR schedule per stage."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    AdamOptimizerConfig,
    ChainedOptimizer,
    MegatronOptimizer,
    get_megatron_optimizer,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MixedPrecisionOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from megatron_speech.recipe.recipe import Recipe
from megatron_speech.recipe.stage import StageConfig
from megatron_speech.training.optim.ema import Ema
from megatron_speech.training.optim.freezing import FrozenRows, without_table_decay
from megatron_speech.training.optim.masters import masters
from megatron_speech.training.optim.optimizer_state import set_step_count, state_ranges, step_count, writers
from megatron_speech.training.optim.parameters import group_overrides, parameter_rules
from megatron_speech.training.optim.ranges import Range, parameters_of


class _StageScheduler(OptimizerParamScheduler):
    """megatron-core's schedule, times what the stage's rule makes of each step's own global batch."""

    def __init__(self, stage: StageConfig, *arguments: Any, **options: Any) -> None:
        self._stage = stage
        super().__init__(*arguments, **options)

    def get_lr(self, param_group: dict[str, Any]) -> float:
        """Of step number `num_steps`, counted from 1; before it, of the first."""
        stage = self._stage
        step = min(max(self.num_steps, 1), stage.steps)
        sequences, _ = stage.batch_at(step - 1)
        return float(super().get_lr(param_group)) * stage.lr.batch_factor(sequences * stage.seq_length)


class Optimizer:
    """megatron-core's optimizer for the recipe, with the clip and the stage changes that the trainer needs.

    Args:
        recipe: its `optimizer`, `parallel` and `precision` sections are read here.
        chunks: this rank's model chunks, wrapped for data parallelism.
        frozen_ids: ids from 0 on whose rows of the token tables stay as they are.
    """

    def __init__(self, recipe: Recipe, chunks: list[DistributedDataParallel], *, frozen_ids: int = 0) -> None:
        section = recipe.optimizer
        bf16 = recipe.precision != "fp32"  # fp8: bf16 weights, fp32 masters
        config = AdamOptimizerConfig(
            lr=recipe.stages[0].lr.peak,
            min_lr=recipe.stages[0].lr.floor,
            weight_decay=1.0,  # every group multiplies it by its own: see group_overrides
            adam_beta1=section.beta1,
            adam_beta2=section.beta2,
            adam_eps=section.eps,
            clip_grad=section.clip_grad,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=recipe.parallel.distributed_optimizer,
        )
        models = [chunk.module for chunk in chunks]
        rules = parameter_rules(models, section)
        core_rules = without_table_decay(rules, models) if frozen_ids else rules
        optimizer = get_megatron_optimizer(config, chunks, config_overrides=group_overrides(core_rules))
        assert isinstance(optimizer, ChainedOptimizer)
        self.core: ChainedOptimizer = optimizer
        self.clip_grad = section.clip_grad
        self._parts: list[MegatronOptimizer] = optimizer.chained_optimizers
        self._use_fused_kernel()
        self._owned = [master for part in self._parts for master in masters(part, chunks)]
        self._frozen_rows = FrozenRows(frozen_ids, self._owned, models, rules) if frozen_ids else None
        self.ema: Ema | None = None
        if recipe.ema is not None:
            self.ema = Ema(recipe.ema.decay, self._owned)
        # Which parameters count in the norm never changes: not the copies that tensor-parallel ranks share,
        # nor the tied head that another pipeline stage holds too.
        self._normed = [
            [p for p in part.get_parameters()
             if param_is_not_shared(p) and param_is_not_tensor_parallel_duplicate(p, getattr(part, "tp_group", None))]
            for part in self._parts
        ]  # fmt: skip

    @property
    def _skip_on_host(self) -> bool:
        """Whether an optimizer of this rank is not torch's, which knows how to skip on the device."""
        return not all(isinstance(part.optimizer, torch.optim.AdamW) for part in self._parts)

    def _use_fused_kernel(self) -> None:
        """Run torch's AdamW as one kernel per group (2 to 3 times as fast as its loop, on CPU too)."""
        for part in self._parts:
            if isinstance(part.optimizer, torch.optim.AdamW):
                for group in part.optimizer.param_groups:
                    group["fused"], group["foreach"] = True, False

    @torch.no_grad()
    def step(self, skip: Callable[[torch.Tensor], torch.Tensor] | None = None) -> torch.Tensor:
        """Clip the gradients to the global norm `clip_grad` and update; returns the norm before clipping.

        Args:
            skip: norm → 1 where nothing is to move (weights, moments, averages), 0 else: float32 scalars on the
                device. Torch's AdamW obeys there; Transformer Engine's cannot, and the host reads the answer.

        Returns:
            float32 scalar on the device of the parameters; reading it is the caller's sync to choose.
        """
        self.core.prepare_grads()
        if self._frozen_rows is not None:
            self._frozen_rows.clear_gradients()
        norm = self._grad_norm()
        skipped = None if skip is None else skip(norm)
        if self.clip_grad > 0.0:
            scale = (self.clip_grad / (norm + 1e-6)).clamp(max=1.0)
            # On a CPU the value is at hand, so a multiplication by one is spared; on a GPU asking would stall.
            if not (scale.is_cpu and scale.item() == 1.0):
                for part in self._parts:
                    if grads := [p.grad for p in part.get_parameters() if p.grad is not None]:
                        torch._foreach_mul_(grads, scale)
        taken = None if skipped is None else 1.0 - skipped
        if skipped is not None and self._skip_on_host and skipped.item():
            return norm
        for part in self._parts:
            part.optimizer.found_inf = skipped  # what torch's fused AdamW looks at before it touches anything
        if self._frozen_rows is not None:
            self._frozen_rows.decay(self.learning_rate, taken)
        self.core.step_with_ready_grads()
        if self.ema is not None:
            self.ema.update(taken)
        return norm

    def _grad_norm(self) -> torch.Tensor:
        squares: list[torch.Tensor] = []
        for part, parameters in zip(self._parts, self._normed, strict=True):
            grads = [p.grad for p in parameters if p.grad is not None]
            device = torch.cuda.current_device()
            square = torch.zeros((), dtype=torch.float32, device=device)
            if grads:
                square = torch.stack(torch._foreach_norm(grads)).square().sum()
            group = part.get_grad_stats_parallel_group()
            if group.size() > 1:
                torch.distributed.all_reduce(square, group=group)
            squares.append(square)
        return torch.stack(squares).sum().sqrt()

    def zero_grad(self) -> None:
        """Drop the parameters' gradients; the DDP buffers are zeroed by their owner."""
        self.core.zero_grad(set_to_none=True)

    def ranges(self, model_state: ShardedStateDict, *, with_ema: bool = True) -> list[Range]:
        """Moments, master weights and moving average as this rank holds them: to save, or for a load to fill.

        Args:
            model_state: sharded state of the model chunks.
            with_ema: False: the checkpoint to be loaded has no moving average.
        """
        (part,) = self._parts
        parameters, written = parameters_of(model_state), writers(part, self._owned)
        ranges = state_ranges(part, self._owned, parameters, written)
        if self.ema is not None and with_ema:
            ranges += self.ema.ranges(parameters, written)
        return ranges

    def counts(self) -> dict[str, Any]:
        """What is saved beside the ranges, the same on all ranks. A collective."""
        (part,) = self._parts
        counts: dict[str, Any] = {"core": {"step": step_count(part, self._owned)}}
        if self.ema is not None:
            counts["ema"] = {"updates": self.ema.updates.cpu()}
        return counts

    @torch.no_grad()
    def set_counts(self, counts: dict[str, Any]) -> None:
        """After a load has filled the ranges; :meth:`start_stage` follows."""
        (part,) = self._parts
        set_step_count(part, self._owned, int(counts["core"]["step"]))
        if self.ema is not None:
            if "ema" in counts:
                self.ema.updates.copy_(counts["ema"]["updates"])
            else:  # of a checkpoint of a run that kept none
                self.ema.restart()

    def reset_state(self) -> None:
        """Forget moments and step count, as a stage with `carry_optimizer: false` asks."""
        for part in self._parts:
            if part.optimizer is not None:
                part.optimizer.state.clear()
                for group in part.optimizer.param_groups:
                    group.pop("step", None)  # Transformer Engine's FusedAdam counts here, not per parameter
        if self.ema is not None:
            self.ema.restart()

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """While inside, the model computes with the moving average of its weights. A collective."""
        if self.ema is None:
            yield
            return
        with self.ema.in_place_of_weights(self._publish):
            yield

    @torch.no_grad()
    def _publish(self) -> None:
        """Make the model's parameters those of the masters, on all ranks."""
        for part in self._parts:
            if isinstance(part, MixedPrecisionOptimizer) and not part.is_stub_optimizer:
                part._copy_main_params_to_model_params()
            if isinstance(part, DistributedOptimizer):
                for chunk in part.model_chunks:
                    chunk.start_param_sync(force_sync=True)

    def start_stage(self, stage: StageConfig) -> OptimizerParamScheduler:
        """The stage's LR schedule, at its step 0; `scheduler.step(1)` comes before each update.

        So step k of n trains with the closed form of :class:`LearningRateConfig` at k: the first step is not
        lost to a learning rate of 0, and the last one has exactly `end`.
        """
        self._use_fused_kernel()  # a loaded checkpoint brings its own flags
        if self._frozen_rows is not None:
            for part in self._parts:
                self._frozen_rows.clear_moments(part.optimizer.state)
        peak, floor, steps = stage.lr.peak, stage.lr.floor, stage.steps
        for group in self.core.param_groups:
            group["max_lr"], group["min_lr"] = peak * group["lr_mult"], floor * group["lr_mult"]
        self._scheduler = _StageScheduler(
            stage,
            self.core,
            init_lr=0.0,
            max_lr=peak,
            min_lr=floor,
            lr_warmup_steps=stage.lr.warmup_steps(steps),
            lr_decay_steps=steps,
            lr_decay_style="WSD" if stage.lr.schedule == "wsd" else stage.lr.schedule,
            wsd_decay_steps=stage.lr.decay_steps(steps),
            lr_wsd_decay_style=stage.lr.decay_style,
            start_wd=1.0,
            end_wd=1.0,
            wd_incr_steps=0,
            wd_incr_style="constant",
            # The recipe decides, not the checkpoint: only the count of steps is taken from there.
            use_checkpoint_opt_param_scheduler=False,
            override_opt_param_scheduler=True,
        )
        return self._scheduler

    @property
    def learning_rate(self) -> float:
        """The learning rate of the last update, before the multipliers of the groups."""
        return float(self._scheduler.get_lr({}))
