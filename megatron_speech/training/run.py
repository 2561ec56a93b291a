"""What a run consists of, put together on every rank before the first step.

recipe ─► process groups ─► checks ─► datasets, sequence indices ─► model, optimizer ─► checkpoint ─► log
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_speech import environment
from megatron_speech.console import output
from megatron_speech.data.dataset.indexed import TokenDataset
from megatron_speech.data.stage import StageData, open_datasets, save_blend
from megatron_speech.files import prepare_output_directory, sha256_file, write_json
from megatron_speech.parallel import groups
from megatron_speech.recipe.recipe import Recipe
from megatron_speech.recipe.stage import StageConfig
from megatron_speech.remote import check_writable
from megatron_speech.tokens.space import TokenSpace
from megatron_speech.training import plan
from megatron_speech.training.batches import BatchSource, StageBatches
from megatron_speech.training.changed_blend import stage_histories
from megatron_speech.training.checkpoint.load import load_checkpoint
from megatron_speech.training.checkpoint.resume import Differences, ResumeRequest, check_resumable, log_resume
from megatron_speech.training.checkpoint.rewind import find_checkpoint, set_aside
from megatron_speech.training.checkpoint.run import RunCheckpoints, newest_checkpoint, remove_leftovers
from megatron_speech.training.checkpoint.store import CheckpointInfo, checkpoint_name, find_latest
from megatron_speech.training.determinism import set_determinism
from megatron_speech.training.early_stop import check_held_out
from megatron_speech.training.engine import Engine
from megatron_speech.training.health.agreement import raise_on_all_ranks
from megatron_speech.training.health.control import StopRequest
from megatron_speech.training.health.preflight import Preflight
from megatron_speech.training.health.safety import Safety
from megatron_speech.training.position import RunProgress
from megatron_speech.training.spikes import SpikeGuard
from megatron_speech.training.step import TrainStep
from megatron_speech.training.telemetry.exporters import check_exporters, open_exporters
from megatron_speech.training.telemetry.goodput import Ledger
from megatron_speech.training.telemetry.metrics import Group, LossMeter
from megatron_speech.training.telemetry.run_log import RunLog, record_failure
from megatron_speech.training.validation import validation_sequences


@dataclass
class Run:
    """The parts of a run, as :func:`set_up` makes them.

    Attributes:
        recipe: what is done.
        directory: where it is written.
        device: of this process.
        rank, world_size, dp_rank, dp_size: of this process among all and among the data-parallel ranks.
        safety: signals, watchdog, slow ranks.
        space: the id space.
        fingerprints: name → hash of the manifest of each dataset.
        stages, held_out: data of each stage, to train on and to validate on.
        sources: of the global batches of each stage.
        engine: model, optimizer, schedule.
        spikes: decides which steps are skipped; None: none is.
        step: takes the steps.
        progress: where the run stands.
        log: records, console lines, status.
        checkpoints: of this run.
        loaded: what the checkpoint that it goes on from holds besides weights and optimizer; empty for a new run.
        changes: of the recipe that were requested while the run went on: step, key, before, after.
        ledger: what the time of this process is spent on.
    """

    recipe: Recipe
    directory: Path
    device: torch.device
    rank: int
    world_size: int
    dp_rank: int
    dp_size: int
    safety: Safety
    space: TokenSpace
    fingerprints: dict[str, str]
    stages: list[StageData]
    held_out: list[StageData]
    sources: list[BatchSource]
    engine: Engine
    spikes: SpikeGuard | None
    progress: RunProgress
    log: RunLog
    checkpoints: RunCheckpoints
    loaded: dict[str, Any] = field(default_factory=dict)
    changes: list[dict[str, Any]] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)
    step: TrainStep = field(init=False)

    def __post_init__(self) -> None:
        self.step = self.make_step(self.spikes)

    @property
    def is_main(self) -> bool:
        """Whether this process logs and writes for all."""
        return self.rank == 0

    def make_meter(self, stage: StageConfig, document_groups: Sequence[Group]) -> LossMeter:
        """A loss meter of this rank for a stage's batches."""
        counts = parallel_state.get_context_parallel_rank() == 0
        return LossMeter(document_groups, self.device, stage.loss, contributes=self.engine.contributes, counts=counts)

    def make_step(self, spikes: SpikeGuard | None) -> TrainStep:
        """What takes optimizer steps, with another guard than the recipe's."""
        return TrainStep(
            self.recipe,
            self.engine,
            self.device,
            data_parallel=self.dp_size,
            timer=self.safety.timer,
            before_update=self.checkpoints.block_training_stream,
            spikes=spikes,
        )

    def write_status(self, state: str, message: str = "", *, force: bool = True) -> None:
        """Write status.json, see :meth:`RunLog.status`."""
        self.log.status(state, self.progress.as_record(), message, force=force)


def set_up(
    recipe: Recipe,
    *,
    log_environment: bool = True,
    stop: StopRequest | None = None,
    resume: bool = True,
    read_only: bool = False,
    request: ResumeRequest | None = None,
) -> Run:
    """Put a run together, from its newest checkpoint or from the start. A collective of all processes.

    Args:
        recipe: what to do.
        log_environment: print what the process runs on (once per command).
        stop: signals that ask the run to save and end; None: nothing asks.
        resume: go on from the newest checkpoint of the run directory, if it holds one.
        read_only: write nothing to the run directory but the cache of sequence indices and what was taken of an
            index that has changed; check the exporters and the upload URL instead of opening them.
        request: what is asked of a run that is continued.

    Raises:
        InputError: anything about the recipe, its data or its run directory that keeps it from starting.
    """
    ledger = Ledger()
    parallel = recipe.parallel
    set_determinism(recipe.deterministic)
    groups.initialize(
        parallel.tensor,
        parallel.pipeline,
        parallel.context,
        virtual_pipeline=parallel.virtual_pipeline,
        seed=recipe.seed,
        stopped=None if stop is None else lambda: stop.requested,
    )
    ledger.started("groups")
    random.seed(recipe.seed)
    np.random.seed(recipe.seed)

    def note_failure(message: str) -> None:
        if not read_only:  # else the status of the run stays as it is
            record_failure(recipe, message)

    safety = Safety(recipe.watchdog, recipe.run_directory, stop, note_failure)
    with safety.guard():
        return _assemble(
            recipe,
            safety,
            request or ResumeRequest(),
            ledger,
            log_environment=log_environment,
            resume=resume,
            read_only=read_only,
        )


def _assemble(
    recipe: Recipe,
    safety: Safety,
    request: ResumeRequest,
    ledger: Ledger,
    *,
    log_environment: bool,
    resume: bool,
    read_only: bool,
) -> Run:
    directory, device = recipe.run_directory, groups.device()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dp_rank = parallel_state.get_data_parallel_rank()
    is_main = rank == 0
    found = environment.detect() if is_main else {}
    if is_main and log_environment:
        output(environment.describe(found))
    preflight = Preflight(recipe, safety.control, safety.hosts, device)
    with safety.progress.doing("the first sum over all processes"):
        preflight.processes()
    info = _find_checkpoint(directory / "checkpoints", request.rewind_to, read_only=read_only) if resume else None
    differences = Differences()
    with raise_on_all_ranks():
        dp_size = recipe.data_parallel_size(world_size)
        space = TokenSpace.load(recipe.token_space)
        plan.check_fits(recipe, space.padded_size, dp_size, device)
        datasets = open_datasets(recipe.data, space)
        fingerprints = {name: _fingerprint(dataset) for name, dataset in datasets.items()}
        prepare_output_directory(directory / "checkpoints")
        if info is not None:
            differences = check_resumable(info, recipe, space, fingerprints, request.changes)
    preflight.data(datasets, space)
    preflight.storage(directory, recipe.model.parameters(space.padded_size))
    histories, change = stage_histories(info, recipe, datasets, space, is_main=is_main)

    def stage_data(stage: StageConfig, *, validation: bool = False) -> StageData:
        return StageData(
            stage,
            recipe.data,
            datasets,
            space,
            seed=recipe.seed,
            cache_dir=recipe.data.index_directory(directory),
            n_sequences=validation_sequences(recipe.validation.tokens, stage) if validation else None,
            split="validation" if validation else "train",
            history=None if validation else histories.get(stage.name),
        )

    with raise_on_all_ranks():
        stages = [stage_data(stage) for stage in recipe.stages]
        held_out = [stage_data(stage, validation=True) for stage in recipe.stages]
        check_held_out(recipe.stages, held_out)
    if is_main:
        for data in stages:
            data.load_speakers(fingerprints)
    ledger.started("data")
    with raise_on_all_ranks():
        engine = Engine(
            recipe, space, device, data_parallel=dp_size, fresh=info is None, on_backward_end=safety.timer.end
        )
    ledger.started("model")
    spikes = SpikeGuard(recipe.spikes, device) if recipe.spikes is not None else None
    progress, loaded = RunProgress(recipe), {}
    if info is not None:
        loaded = load_checkpoint(info, chunks=engine.chunks, optimizer=engine.optimizer)
        progress = RunProgress(recipe, info.step, info.fields["ended_early"])
        log_resume(info, differences)
        ledger.started("checkpoint")
    aside = None
    if request.rewind_to is not None and not read_only:
        aside = set_aside(directory, request.rewind_to) if is_main else None
        dist.barrier()
    changes = [*(info.fields.get("changes", []) if info is not None else []), *differences.requested]
    log, checkpoints = _open_directory(recipe, space, info, progress, changes, active=is_main, read_only=read_only)
    if is_main and not read_only:
        write_json(directory / "environment.json", {**found, "model": engine.execution.record()})
        recipe.save(directory / "recipe.yaml")
        save_blend(directory / "blend.json", stages)
    run = Run(
        recipe=recipe,
        directory=directory,
        device=device,
        rank=rank,
        world_size=world_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        safety=safety,
        space=space,
        fingerprints=fingerprints,
        stages=stages,
        held_out=held_out,
        sources=[
            StageBatches(stage, data, dp_rank, dp_size) for stage, data in zip(recipe.stages, stages, strict=True)
        ],
        engine=engine,
        spikes=spikes,
        progress=progress,
        log=log,
        checkpoints=checkpoints,
        loaded=loaded,
        changes=changes,
        ledger=ledger,
    )
    position = progress.as_record()
    for requested in differences.requested:
        log.write({**position, "split": "changed", **requested})
    if request.rewind_to is not None and not read_only:
        where = None if aside is None else str(aside)
        log.write({**position, "split": "set_aside", "checkpoint": checkpoint_name(request.rewind_to), "folder": where})
    if is_main:
        if aside is not None:
            log.info(f"rewound to step {request.rewind_to}: what came after it is in {aside}")
        _log_plan(run)
        if change is not None:
            running = stages[min(progress.position.stage_index, len(stages) - 1)]
            log.info(f"{change}; {running.documents_due:,} documents are still due and come first")
    return run


def _find_checkpoint(folder: Path, step: int | None, *, read_only: bool) -> CheckpointInfo | None:
    """The checkpoint that the run goes on from: that of `step`, or the newest. A collective."""
    if step is not None:
        with raise_on_all_ranks():
            found = find_checkpoint(folder, step)
        if not read_only:
            remove_leftovers(folder)
        return found
    return find_latest(folder) if read_only else newest_checkpoint(folder)


def _open_directory(
    recipe: Recipe,
    space: TokenSpace,
    info: CheckpointInfo | None,
    progress: RunProgress,
    changes: list[dict[str, Any]],
    *,
    active: bool,
    read_only: bool,
) -> tuple[RunLog, RunCheckpoints]:
    """Log and checkpoints of the run directory; with `read_only` neither writes to it."""
    directory = recipe.run_directory
    if read_only:
        with raise_on_all_ranks():
            if active:
                check_exporters(recipe)
                if recipe.checkpoint.upload is not None:
                    check_writable(recipe.checkpoint.upload.url, recipe.checkpoint.upload.options)
        log = RunLog(directory, active=active, writes=False)
        quiet = recipe.checkpoint.model_copy(update={"upload": None, "export_hf": None})
        recipe, info = recipe.model_copy(update={"checkpoint": quiet}), None
    else:
        with raise_on_all_ranks():
            exporters = open_exporters(recipe, directory, progress.position.step) if active else []
        log = RunLog(directory, active=active, exporters=exporters)
    return log, RunCheckpoints(directory / "checkpoints", recipe, space, info=info, log=log, changes=changes)


def _log_plan(run: Run) -> None:
    recipe, log = run.recipe, run.log
    parameters = recipe.model.parameters(run.space.size)
    layout = f"{run.world_size} process{'es' * (run.world_size > 1)}"
    if run.world_size > 1:
        parts = {"data": run.dp_size, "tensor": recipe.parallel.tensor, "pipeline": recipe.parallel.pipeline}
        layout += f" ({', '.join(f'{name} {size}' for name, size in parts.items())})"
    log.info(
        f"{recipe.name}: {parameters / 1e6:.2f} M parameters, {run.space.size} ids, {recipe.precision}, "
        f"{layout}, run directory {run.directory}"
    )
    if run.engine.init_note is not None:
        log.info(f"  {run.engine.init_note}")
    reports = [data.blend_report() for data in run.stages]
    reaches = [data.reach for data in run.stages]
    cost = plan.lines(recipe, run.space.padded_size, run.dp_size, run.device, reaches, reports)
    for line in (*run.engine.execution.lines(reaches), *cost, *plan.stage_lines(recipe, reports)):
        log.info(f"  {line}")


def _fingerprint(dataset: TokenDataset) -> str:
    """Hash of a dataset's manifest, which holds the hashes of its other files."""
    return sha256_file(Path(f"{dataset.prefix}.manifest.json"))
