"""The training loop: a recipe in, a run directory out.

    recipe ─ stages ─► StageData ─ loader ─► micro-batches ─ schedule ─► loss ─► gradients ─► AdamW
                                                                   └─ grouped sums ─► metrics.jsonl

megatron-core runs the step (schedules, data-parallel wrapper, optimizer); this file decides what a step is: which
sequences, what the loss is divided by, when to log, validate and save. B rows of S columns make a micro-batch of
T = B·S positions, which travels through the model as one packed row.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_speech import environment
from megatron_speech.data.dataset.indexed import TokenDataset
from megatron_speech.data.loading.loader import GlobalBatch
from megatron_speech.data.stage import StageData, open_datasets, save_blend
from megatron_speech.files import prepare_output_directory, sha256_file, write_json
from megatron_speech.ops.cross_entropy import LinearLoss
from megatron_speech.parallel import groups
from megatron_speech.recipe.loss import LossConfig
from megatron_speech.recipe.recipe import Recipe
from megatron_speech.recipe.stage import StageConfig
from megatron_speech.tokens.space import TokenSpace
from megatron_speech.training import checkpoint, plan
from megatron_speech.training.batches import stage_batches
from megatron_speech.training.changed_blend import stage_histories
from megatron_speech.training.determinism import set_determinism
from megatron_speech.training.early_stop import EarlyStop, check_held_out
from megatron_speech.training.execution import Execution
from megatron_speech.training.health.agreement import agreed
from megatron_speech.training.health.control import StopRequest
from megatron_speech.training.health.preflight import Preflight
from megatron_speech.training.health.safety import Safety
from megatron_speech.training.initial import carry_moments, start_from
from megatron_speech.training.inputs import ModelInputs
from megatron_speech.training.optim.freezing import freeze_parameters, frozen_ids
from megatron_speech.training.optim.optimizer import Optimizer
from megatron_speech.training.position import Position, steps_of, total_steps
from megatron_speech.training.spikes import SpikeGuard, Verdict, tell_of_rewind, tell_of_skips
from megatron_speech.training.telemetry.exporters import open_exporters
from megatron_speech.training.telemetry.metrics import LossMeter, memory_gib, peak_tflops
from megatron_speech.training.telemetry.run_log import RunLog, console_line, record_failure
from megatron_speech.training.telemetry.throughput import Interval
from megatron_speech.training.telemetry.timing import Clock
from megatron_speech.training.validation import Validator, validation_sequences
from megatron_speech.wording import clock


class Trainer:
    """One run of a recipe, from its newest checkpoint or from the start.

    Args:
        recipe: what to do.
        say_environment: print what the process runs on (once per command).
        stop: signals that ask the run to save and end; None: nothing asks.

    Raises:
        InputError: anything about the recipe, its data or its run directory that keeps it from starting.
    """

    def __init__(self, recipe: Recipe, *, say_environment: bool = True, stop: StopRequest | None = None) -> None:
        self.recipe = recipe
        self.directory = recipe.run_directory
        parallel = recipe.parallel
        set_determinism(recipe.deterministic)
        groups.initialize(
            parallel.tensor,
            parallel.pipeline,
            parallel.context,
            virtual_pipeline=parallel.virtual_pipeline,
            seed=recipe.seed,
        )
        random.seed(recipe.seed)
        np.random.seed(recipe.seed)
        self.device = groups.device()
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.dp_rank = parallel_state.get_data_parallel_rank()
        self.is_main = self.rank == 0
        self._safety = Safety(recipe.watchdog, self.directory, stop, self._note_failure)
        with self._safety.guard():
            self._set_up(say_environment)

    # ---- setting up

    def _set_up(self, say_environment: bool) -> None:
        recipe = self.recipe
        found = environment.detect() if self.is_main else {}
        if self.is_main and say_environment:
            print(environment.describe(found), flush=True)
        preflight = Preflight(recipe, self._safety.control, self._safety.hosts, self.device)
        with self._safety.progress.doing("the first sum over all processes"):
            preflight.processes()
        info = self._find_checkpoint()
        notes: list[str] = []
        with agreed():
            self.dp_size = recipe.data_parallel_size(self.world_size)
            self.space = TokenSpace.load(recipe.token_space)
            plan.check_fits(recipe, self.space.padded_size, self.dp_size, self.device)
            self.datasets = open_datasets(recipe.data, self.space)
            self._fingerprints = {name: _fingerprint(dataset) for name, dataset in self.datasets.items()}
            prepare_output_directory(self.directory / "checkpoints")
            if info is not None:
                notes = checkpoint.check_resumable(info, recipe, self.space, self._fingerprints)
        preflight.data(self.datasets, self.space)
        preflight.storage(self.directory, recipe.model.parameters(self.space.padded_size))
        self._histories, change = stage_histories(info, recipe, self.datasets, self.space, is_main=self.is_main)
        with agreed():
            self.stages = [self._stage_data(stage) for stage in recipe.stages]
            self._held_out = [self._stage_data(stage, validation=True) for stage in recipe.stages]
            check_held_out(recipe.stages, self._held_out)
        with agreed():
            self._build(start=info is None)
        self._resume(info, notes)
        self._open(info, found)
        if self.is_main:
            self._say_plan()
            if change is not None:
                running = self.stages[min(self.position.stage_index, len(self.stages) - 1)]
                self._log.say(f"{change}; {running.documents_due:,} documents are still due and come first")

    def _find_checkpoint(self) -> checkpoint.CheckpointInfo | None:
        """The checkpoint that the run goes on from. A collective."""
        return checkpoint.newest_checkpoint(self.directory / "checkpoints")

    def _open(self, info: checkpoint.CheckpointInfo | None, found: dict[str, Any]) -> None:
        """Begin to write to the run directory."""
        recipe = self.recipe
        with agreed():
            exporters = open_exporters(recipe, self.directory, self.position.step) if self.is_main else []
        self._log = RunLog(self.directory, active=self.is_main, exporters=exporters)
        self._checkpoints = checkpoint.RunCheckpoints(
            self.directory / "checkpoints", recipe, self.space, info=info, log=self._log
        )
        if self.is_main:
            write_json(self.directory / "environment.json", {**found, "model": self.execution.record()})
            recipe.save(self.directory / "recipe.yaml")
            save_blend(self.directory / "blend.json", self.stages)

    def _note_failure(self, message: str) -> None:
        """Write down why the run ends, where the main thread cannot."""
        record_failure(self.recipe, message)

    def _stage_data(self, stage: StageConfig, *, validation: bool = False) -> StageData:
        cache = self.recipe.data.index_directory(self.directory)
        return StageData(
            stage,
            self.recipe.data,
            self.datasets,
            self.space,
            seed=self.recipe.seed,
            cache_dir=cache,
            n_sequences=validation_sequences(self.recipe.validation.tokens, stage) if validation else None,
            split="validation" if validation else "train",
            history=None if validation else self._histories.get(stage.name),
        )

    def _build(self, *, start: bool) -> None:
        recipe, parallel = self.recipe, self.recipe.parallel
        self.execution = Execution.choose(recipe, self.space)
        self.chunks: list[Any] = self.execution.build(self.space)
        self._start = None
        if start and recipe.init is not None:
            start_info, self._start = start_from(recipe.init, recipe.model, self.space, self.chunks)
        freeze_parameters(self.chunks, recipe.optimizer.freeze)
        wrapping = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            use_distributed_optimizer=parallel.distributed_optimizer,
        )
        self.model: list[DistributedDataParallel] = []
        for index, chunk in enumerate(self.chunks):
            chunk.to(self.device)
            config = chunk.config
            # Gradients are already those of Σ w·ce / Σ w: they are summed over the ranks and nothing else.
            config.finalize_model_grads_func = self._sum_gradients
            wrapped = DistributedDataParallel(config, wrapping, chunk, disable_bucketing=index > 0)
            if self.dp_size > 1:
                wrapped.broadcast_params()
            self.model.append(wrapped)
        if parallel.overlap_grad_reduce:
            syncs = [wrapped.no_sync for wrapped in self.model]
            for chunk in self.chunks:
                chunk.config.no_sync_func = syncs[0] if len(syncs) == 1 else syncs
        self.optimizer = Optimizer(recipe, self.model, frozen_ids=frozen_ids(recipe.optimizer, self.space))
        if start and recipe.init is not None:
            carried = carry_moments(
                recipe.init, recipe.stages[0], start_info, chunks=self.chunks, optimizer=self.optimizer
            )
            self._start = f"{self._start}; {carried}"
        self._schedule = get_forward_backward_func()
        last_stage = parallel_state.is_pipeline_last_stage()
        first_copy = parallel_state.get_tensor_model_parallel_rank() == 0
        self._contributes = last_stage and first_copy
        self._no_tokens = torch.zeros((), dtype=torch.int, device=self.device)
        self._spikes = SpikeGuard(recipe.spikes, self.device) if recipe.spikes is not None else None
        self._step_loss = torch.zeros((), device=self.device)

    def _resume(self, info: checkpoint.CheckpointInfo | None, notes: list[str]) -> None:
        """Load the checkpoint that the run goes on from, if there is one."""
        self.position = Position.at_step(self.recipe, 0)
        self._ended: dict[str, int] = {}
        self._early_stop: EarlyStop | None = None
        self._loaded: dict[str, Any] = {}
        if info is None:
            return
        self._loaded = checkpoint.load_checkpoint(info, chunks=self.chunks, optimizer=self.optimizer)
        self._ended = dict(info.fields["ended_early"])
        self.position = Position.at_step(self.recipe, info.step, self._ended)
        if self._spikes is not None:
            self._spikes.load_state(self._loaded.get("spikes"))
        if self.position.stage_step and (early := self.recipe.stages[self.position.stage_index].early_stop):
            self._early_stop = EarlyStop(early)
            if state := self._loaded.get("early_stop"):
                self._early_stop.load_state(state)
        checkpoint.say_resume(info, notes)

    def _say_plan(self) -> None:
        recipe, log = self.recipe, self._log
        parameters = recipe.model.parameters(self.space.size)
        layout = f"{self.world_size} process{'es' * (self.world_size > 1)}"
        if self.world_size > 1:
            parts = {"data": self.dp_size, "tensor": recipe.parallel.tensor, "pipeline": recipe.parallel.pipeline}
            layout += f" ({', '.join(f'{name} {size}' for name, size in parts.items())})"
        log.say(
            f"{recipe.name}: {parameters / 1e6:.2f} M parameters, {self.space.size} ids, {recipe.precision}, "
            f"{layout}, run directory {self.directory}"
        )
        if self._start is not None:
            log.say(f"  {self._start}")
        reports = [data.blend_report() for data in self.stages]
        reaches = [data.reach for data in self.stages]
        cost = plan.lines(recipe, self.space.padded_size, self.dp_size, self.device, reaches, reports)
        for line in (*self.execution.lines(reaches[0]), *cost, *plan.stage_lines(recipe, reports)):
            log.say(f"  {line}")

    # ---- the run

    def run(self, *, max_steps: int | None = None, through: str | None = None) -> str:
        """Train to the end of the recipe, of stage `through`, or for `max_steps` more steps.

        Returns:
            The state left in status.json; `paused` when stages are left that were not asked for.
        """
        names = [stage.name for stage in self.recipe.stages]
        end = len(names) if through is None else names.index(through) + 1
        if self.position.stage_index >= end:
            what = self.recipe.name if end == len(names) else f"{self.recipe.name} through {through}"
            self._log.say(f"{what} is finished: nothing left to do in {self.directory}")
            self._checkpoints.finish(copied=True)
            self._write_status("finished" if self.position.stage_index == len(names) else "paused")
            self._log.close()
            self._safety.finish()
            return "finished" if self.position.stage_index == len(names) else "paused"
        limit = total_steps(self.recipe, self._ended) if max_steps is None else self.position.step + max_steps
        self._write_status("running")
        self._safety.stop.take_interrupts()
        state, message = "preempted", "stopped on request; start the same command to continue"
        try:
            with self._safety.guard():
                while self.position.stage_index < end and self.position.step < limit:
                    if not self._run_stage(self.position.stage_index, limit):
                        break
                else:
                    at = self.position.stage_index
                    state = "finished" if at == len(names) else "paused" if at == end else "preempted"
                    message = ""
                with self._safety.progress.doing("writing and copying the last checkpoint"):
                    self._checkpoints.finish(copied=state != "preempted")
                self._write_status(state, message)
                self._safety.finish()
            return state
        except BaseException as error:
            self._checkpoints.close(failed=True)
            self._write_status("failed", str(error) or type(error).__name__)
            raise
        finally:
            self._log.close()

    def _run_stage(self, index: int, limit: int) -> bool:
        """Train stage `index` from the current position on; False when the run was asked to stop."""
        recipe, stage, data = self.recipe, self.recipe.stages[index], self.stages[index]
        with self._safety.progress.doing("writing a checkpoint"):
            self._checkpoints.wait()
        if self.position.stage_step == 0:
            self._begin_stage(index)
        scheduler = self.optimizer.start_stage(stage)
        scheduler.step(self.position.stage_step)
        meter = self._meter(stage, data)
        if self.position.stage_step and self._loaded:
            meter.restore(self._loaded["meter"], self._loaded["groups"])
        self._loaded = {}
        validator = self._make_validator(index)
        self._clock = Clock()
        self._safety.progress.begin_steps()
        with contextlib.closing(
            stage_batches(stage, data, self.position.stage_step, self.dp_rank, self.dp_size)
        ) as batches:
            while self.position.stage_index == index and self.position.step < limit:
                before_wait = time.perf_counter()
                batch = next(batches)
                self._clock.waited += time.perf_counter() - before_wait
                norm = self._train_step(batch, meter, stage.loss, scheduler)
                self._clock.steps += 1
                self.position = Position.at_step(recipe, self.position.step + 1, self._ended)
                step, ended = self.position.step, self.position.stage_index != index
                log = step % recipe.logging.interval_steps == 0 or ended or step == limit
                validate = validator is not None and (_every(step, recipe.validation.interval_steps) or ended)
                due = self._checkpoints.due(stage, step, self.position.stage_step) or ended
                if (log or validate or due) and self._went_back():
                    return self._leave_after_going_back(index, meter, validator)
                if log:
                    self._log_interval(index, meter, norm)
                stop = self._safety.stop_agreed(step)
                if stop and self._went_back():
                    return self._leave_after_going_back(index, meter, validator)
                save = due or stop
                self._checkpoints.speak()
                if validate or save:
                    with self._clock.paused():
                        scores: dict[str, Any] = {}
                        # Not for a checkpoint that only the stop asks for: time is short, and no other run has it.
                        if validator is not None and (validate or due):
                            with self._safety.progress.doing("validating"):
                                scores = self._validate(validator)
                        if not ended and _every(step, recipe.validation.interval_steps) and self._ends_early(scores):
                            self._ended[stage.name] = self.position.stage_step
                            self.position = Position.at_step(recipe, step, self._ended)
                            save = True
                            if not log:
                                self._log_interval(index, meter, norm)
                        if save:
                            with self._safety.progress.doing("saving"):
                                self._save(index, meter, scores)
                if stop:
                    return False
        return True

    def _begin_stage(self, index: int) -> None:
        """Set what starts anew with stage `index`."""
        stage = self.recipe.stages[index]
        if index > 0 and not stage.carry_optimizer:
            self.optimizer.reset_state()
        if self._spikes is not None:
            self._spikes.begin_stage()
        self._early_stop = EarlyStop(stage.early_stop) if stage.early_stop is not None else None

    def _ends_early(self, scores: dict[str, Any]) -> bool:
        """Whether the stage ends with this validation, of those that are made at fixed steps."""
        audio, early = scores.get("loss/modality/audio"), self._early_stop
        if early is None or audio is None or not early.update(audio):
            return False
        self._log.say(
            f"{self.recipe.stages[self.position.stage_index].name} ends early at step {self.position.step}: the audio "
            f"loss {audio:.4f} is the {early.without_improvement}th in a row that is not {early.config.min_delta:g} "
            f"below the best, {early.best:.4f}"
        )
        return True

    def _train_step(
        self, batch: GlobalBatch, meter: LossMeter, loss: LossConfig, scheduler: OptimizerParamScheduler
    ) -> torch.Tensor:
        """One optimizer step; returns the gradient norm, on the device."""
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = batch.loss_totals
        self._run_batch(batch, meter, loss, self._sum_over_ranks(sums), forward_only=False)
        meter.add_counts(loss_totals=sums, tokens=batch.tokens, pad_tokens=batch.pad_tokens)
        scheduler.step(1)
        self._checkpoints.hold_training_stream()
        guard = self._spikes
        if guard is None:
            return self.optimizer.step()
        step_loss, self._step_loss = self._step_loss, torch.zeros_like(self._step_loss)

        def skip(norm: torch.Tensor) -> torch.Tensor:
            skipped = guard.decide(step_loss, norm)
            meter.settle(skipped, sums)
            return skipped

        return self.optimizer.step(skip)

    def _run_batch(
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
        # The meter weighs what is validated by itself: any scale will do that is not 0.
        scales = [1.0] * loss.normalizers if forward_only else loss.scales(loss_totals)
        plain = loss.model_copy(update={"label_smoothing": 0.0, "z_loss": 0.0}) if forward_only else loss
        context, fused = self.recipe.parallel.context, self.chunks[0].fused_attention
        inputs = [
            ModelInputs(micro_batch, self.device, plain, scales, fused=fused, context=context)
            for micro_batch in self.execution.own(batch.micro_batches)
        ]

        def forward_step(iterator: Iterator[ModelInputs], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
            micro_batch = next(iterator)
            output = model(
                input_ids=micro_batch.tokens,
                position_ids=None,
                attention_mask=None,
                labels=micro_batch.labels,
                packed_seq_params=micro_batch.packed,
            )

            def total(head: LinearLoss) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
                meter.add_losses(head.losses, head.cross_entropy, *micro_batch.learned())
                if self._spikes is not None and self._contributes and not forward_only:
                    self._step_loss += head.total.detach()
                return head.total, self._no_tokens, {}

            return output, total

        iterators = [iter(inputs) for _ in self.model]
        if not forward_only:
            self._safety.timer.begin()
        self._schedule(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.model if len(self.model) > 1 else self.model[0],
            num_microbatches=len(inputs),
            seq_length=inputs[0].tokens.numel() * context,  # which megatron-core divides by it
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def _sum_gradients(self, model: list[Any], num_tokens: Any = None, **kwargs: Any) -> None:
        """megatron-core's gradient reduction without its division: the loss is already divided by its weight."""
        self._safety.timer.end()
        finalize_model_grads(model, None, **kwargs)

    def _sum_over_ranks(self, values: np.ndarray) -> np.ndarray:
        """Sum of host numbers (float64) over the data-parallel ranks, on the host: no device waits for it."""
        if self.dp_size == 1:
            return values
        total = torch.from_numpy(values.copy())
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group_gloo())
        return total.numpy()

    # ---- what happens between steps

    def _log_interval(self, index: int, meter: LossMeter, norm: torch.Tensor) -> None:
        """Read the interval's sums and write them. A collective."""
        means = meter.read()
        seconds, steps, waited = self._clock.lap()
        stage, position = self.recipe.stages[index], self.position
        measured = {name: means.pop(name) for name in ("tokens", "learned", "pad_fraction")}
        peak = peak_tflops(torch.cuda.get_device_name() if torch.cuda.is_available() else None)
        grad_norm = norm.item()
        slowest, host = self._safety.stragglers(waited / steps)
        if self.is_main:
            self._log.alarm("straggler", slowest.sentence(self.recipe.logging.straggler_factor, host), word="note")
        record = {
            **position.as_record(self.recipe),
            **means,
            "lr": self.optimizer.learning_rate,
            "grad_norm": grad_norm,
            **Interval(seconds, steps, waited, **measured).record(
                self.recipe.model,
                self.space.size,
                reach=self.stages[index].reach,
                processes=self.world_size,
                peak_tflops=peak,
                top_of_learned=self.execution.top_of_learned,
            ),
            "memory_gib": memory_gib(),
            "slowest_rank": slowest.rank,
            "slowest_rank_seconds": slowest.seconds,
            "median_rank_seconds": slowest.median,
        }
        self._log.write(record)
        done = position.stage_step if position.stage_index == index else steps_of(stage, self._ended)
        total = total_steps(self.recipe, self._ended)
        eta = (total - position.step) * seconds / steps
        if self.is_main:
            of = {"stage_steps": stage.steps, "total_steps": total}
            self._log.say(console_line(record, stage_step=done, **of, eta_seconds=eta))
        self._write_status("running", force=False)
        if self._spikes is None and not (math.isfinite(means["loss"]) and math.isfinite(grad_norm)):
            raise RuntimeError(
                f"step {position.step}: loss {means['loss']} and gradient norm {grad_norm} are not both "
                "finite; lower lr.peak of the stage or lengthen its warm-up, and continue from the last checkpoint; a "
                "section spikes in the recipe skips such steps"
            )

    def _went_back(self) -> bool:
        """Tell of the steps skipped since the last call; True when there were so many that the run has gone back.

        It then has the weights and the optimizer's state of an earlier checkpoint, and stands after the step at which
        the limit was reached, whenever that was found out: the sequences in between are stepped over. A collective.
        """
        if self._spikes is None:
            return False
        verdict = tell_of_skips(self._spikes, self.position.step, self.recipe, self._ended, self._log)
        if verdict is None:
            return False
        with self._safety.progress.doing("going back to a checkpoint"):
            self._go_back(self._spikes, verdict)
        return True

    def _go_back(self, guard: SpikeGuard, verdict: Verdict) -> None:
        self._checkpoints.wait()
        info = guard.rewind(verdict, self.directory / "checkpoints")
        state = checkpoint.load_checkpoint(info, chunks=self.chunks, optimizer=self.optimizer)
        self.position = Position.at_step(self.recipe, verdict.step, self._ended)
        index, stage = self.position.stage_of_last_step(self.recipe)
        begun = info.fields["stage_index"] == index
        if not begun and not stage.carry_optimizer:
            self.optimizer.reset_state()
        rewinds = guard.rewinds
        guard.load_state(state.get("spikes") if begun else None)
        guard.rewinds = rewinds
        tell_of_rewind(info, verdict, self.recipe, self._ended, self._log)

    def _leave_after_going_back(self, index: int, meter: LossMeter, validator: Validator | None) -> bool:
        """A stage whose last step was stepped over ends with a checkpoint like any other; True. A collective."""
        if self.position.stage_index != index:
            with self._safety.progress.doing("ending the stage"):
                self._save(index, meter, self._validate(validator) if validator is not None else {})
        return True

    def _meter(self, stage: StageConfig, data: StageData) -> LossMeter:
        counts = parallel_state.get_context_parallel_rank() == 0
        return LossMeter(data.groups, self.device, stage.loss, contributes=self._contributes, counts=counts)

    def _make_validator(self, index: int) -> Validator | None:
        data = self._held_out[index]
        if self.recipe.validation.interval_steps == 0 or data.n_sequences == 0:
            return None
        meter = self._meter(self.recipe.stages[index], data)
        return Validator(
            self.recipe.stages[index],
            data,
            meter,
            self._run_batch,
            dp_rank=self.dp_rank,
            dp_size=self.dp_size,
            micro_batches=self.recipe.parallel.micro_batch_multiple,
        )

    def _validate(self, validator: Validator) -> dict[str, Any]:
        started = time.perf_counter()
        for chunk in self.model:
            chunk.eval()
        averaged = self.recipe.ema is not None and self.recipe.ema.use_for_validation
        if averaged:
            self._checkpoints.hold_training_stream()  # the averages change places with the weights
        with self.optimizer.averaged_weights() if averaged else contextlib.nullcontext():
            scores = validator.run()
        for chunk in self.model:
            chunk.train()
        seconds = time.perf_counter() - started
        record = {**self.position.as_record(self.recipe), "split": "validation", **scores}
        self._log.write({**record, "validation_seconds": seconds})
        audio = scores.get("loss/modality/audio")
        self._log.say(
            f"{record['stage']} validation at step {record['step']}  loss {scores.get('loss', math.nan):.4f}"
            f"  audio {'-' if audio is None else f'{audio:.4f}'}  {scores.get('tokens', 0):,} tokens"
            f"  {clock(seconds)}"
        )
        return scores

    def _save(self, index: int, meter: LossMeter, scores: dict[str, Any]) -> None:
        """Take a checkpoint of this moment. A collective."""
        # Reduced here in every run, continued or not: the sums that the next line is made of are added up in the
        # same order in both.
        meter.reduce()
        stage = self.recipe.stages[index]
        ended = self.position.stage_index != index
        taken = steps_of(stage, self._ended) if ended else self.position.stage_step
        self._checkpoints.save(
            fields={
                **self.position.as_record(self.recipe),
                "stage_index": index,
                "stage_step": taken,
                "stage_ended": ended,
                "ended_early": self._ended,
                "datasets": self._fingerprints,
                "blend": {data.stage.name: data.history.entries for data in self.stages[: index + 1]},
                "validation": scores,
            },
            chunks=self.chunks,
            optimizer=self.optimizer,
            state={
                "meter": meter.totals.clone(),
                "groups": meter.groups,
                "spikes": self._spikes.state() if self._spikes is not None else None,
                "early_stop": self._early_stop.state() if self._early_stop is not None else None,
            },
        )
        self._write_status("running")

    def _write_status(self, state: str, message: str = "", *, force: bool = True) -> None:
        self._log.status(state, self.position.as_record(self.recipe), message, force=force)


def _every(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _fingerprint(dataset: TokenDataset) -> str:
    """Hash of a dataset's manifest, which holds the hashes of its other files."""
    return sha256_file(Path(f"{dataset.prefix}.manifest.json"))
