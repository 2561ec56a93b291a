"""Gates before a big launch: everything up to the first step, and a model that overfits a few sequences.

Both do what a run would do, through the same code, and leave nothing behind but the cache of sequence indices.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from megatron_speech.data.loading.loader import GlobalBatch, MicroBatch
from megatron_speech.errors import InputError
from megatron_speech.recipe.loss import LossConfig
from megatron_speech.recipe.recipe import Recipe
from megatron_speech.remote import cache_folder, is_url
from megatron_speech.training.checkpoint.resume import ResumeRequest
from megatron_speech.training.health.agreement import raise_on_all_ranks
from megatron_speech.training.health.control import StopRequest
from megatron_speech.training.run import Run, set_up

TARGET = 0.05
"""Nats above the unavoidable loss at which the overfit check has passed."""

_LOG_STEPS = 10
_WARMUP_STEPS = 10


@contextlib.contextmanager
def _rehearsed(
    recipe: Recipe, stop: StopRequest | None, *, resume: bool, request: ResumeRequest | None = None
) -> Iterator[Run]:
    """A run that writes nothing to its directory; folders that were made for nothing go afterwards.

    Args:
        recipe: what would be run.
        stop: signals that end it.
        resume: load the checkpoint that the run would go on from.
        request: which one that is, and what may differ from it.
    """
    made = _missing(recipe.run_directory / "checkpoints")
    run = set_up(recipe, stop=stop, resume=resume, read_only=True, request=request)
    try:
        with run.safety.guard():
            yield run
            run.safety.finish()
    finally:
        run.log.close()
        if run.is_main:
            for folder in reversed(made):
                with contextlib.suppress(OSError):  # not empty: the index cache is in it
                    folder.rmdir()


def dry_run(recipe: Recipe, stop: StopRequest | None = None, request: ResumeRequest | None = None) -> None:
    """Fetch the batch of the next step, and say that everything is there. A collective."""
    before = _entries(recipe)
    with _rehearsed(recipe, stop, resume=True, request=request) as run:
        position = run.progress.position
        if run.progress.finished:
            run.log.info(f"dry run: {recipe.name} is finished, there is no next step")
            return
        with run.sources[position.stage_index].batches(position.stage_step) as batches:
            batch = next(batches)
        labels = float(batch.loss_totals[1].sum())
        counts = run.safety.control.gather([batch.tokens, batch.pad_tokens, labels]).sum(0).tolist()
        tokens, padding, learned = (int(count / (run.world_size / run.dp_size)) for count in counts)
        stage = recipe.stages[position.stage_index]
        run.log.info(
            f"dry run: ready for step {position.step + 1} (stage {stage.name}): its batch has {tokens:,} tokens and "
            f"{padding:,} of padding; {learned:,} labels carry loss{'' if learned else ': this step would do nothing'}"
        )
        run.log.info(f"dry run: {_written(before, _entries(recipe))}")


def _entries(recipe: Recipe) -> dict[str, set[Path]]:
    """What lies where a dry run may leave something, by what it is."""
    data, run = recipe.data, recipe.run_directory
    places = {"sequence indices": data.index_directory(run), "history of the blend": run / "blend_history"}
    if data.stage_datasets and data.cache_dir is not None:
        places["staged datasets"] = Path(data.cache_dir) / "datasets"
    if recipe.init is not None and is_url(recipe.init.checkpoint):
        places["fetched checkpoints"] = cache_folder() / "checkpoints"
    return {
        what: {path for path in folder.glob("*/*" if what == "fetched checkpoints" else "*") if path.is_dir()}
        | {path for path in folder.glob("*.npz")}
        for what, folder in places.items()
    }


def _written(before: dict[str, set[Path]], after: dict[str, set[Path]]) -> str:
    """What is there now and was not before, as a sentence."""
    parts = []
    for what, entries in after.items():
        new = sorted(path for path in entries - before[what] if not path.name.startswith("."))
        if new:
            parts.append(f"{what} ({len(new)} in {new[0].parent})")
    return f"written: {', '.join(parts)}; nothing else" if parts else "nothing was written"


def overfit(recipe: Recipe, sequences: int, steps: int, stop: StopRequest | None = None) -> bool:
    """Train on the first `sequences` sequences of the first stage until the model predicts them.

    All of them make one batch; the learning rate rises to the stage's peak and stays there.

    Returns:
        Whether the loss came within `TARGET` of what no model can avoid, in at most `steps` steps. A collective.

    Raises:
        InputError: the sequences cannot be divided among the ranks, or there are not so many.
    """
    with _rehearsed(recipe, stop, resume=False) as run:
        stage, data = recipe.stages[0], run.stages[0]
        loss = stage.loss.model_copy(update={"label_smoothing": 0.0, "z_loss": 0.0})
        with raise_on_all_ranks():
            unit = stage.micro_batch_size * run.dp_size * recipe.parallel.micro_batch_multiple
            if sequences % unit or sequences > data.n_sequences:
                raise InputError(
                    f"--overfit {sequences}: needed is a multiple of {unit} (micro_batch_size × data-parallel "
                    f"ranks), at most the {data.n_sequences} sequences of stage {stage.name}"
                )
        with data.loader(0, stage.micro_batch_size, sequences, run.dp_rank, run.dp_size) as batches:
            batch = next(batches)
        with data.loader(0, stage.micro_batch_size, sequences) as batches:
            whole: GlobalBatch = next(batches)
        unavoidable = unavoidable_loss(whole.micro_batches, loss, whole.loss_totals)
        rate = stage.lr.model_copy(update={"schedule": "constant", "end": None, "warmup": float(_WARMUP_STEPS)})
        size = sequences * stage.seq_length
        update = {"lr": rate, "tokens": steps * size, "global_batch_tokens": size, "batch_ramp": None}
        scheduler = run.engine.optimizer.start_stage(stage.model_copy(update=update))
        meter = run.make_meter(stage, data.groups)
        step_without_skips = run.make_step(spikes=None)
        run.safety.progress.begin_steps()
        now = math.nan
        for step in range(1, steps + 1):
            step_without_skips.take(batch, meter, loss, scheduler)
            if run.safety.should_stop(step):
                break
            if step % _LOG_STEPS and step != steps:
                continue
            now = meter.read()["loss"]
            run.log.info(
                f"overfit {step}/{steps}  loss {now:.4f}  of it unavoidable {unavoidable:.4f}  "
                f"lr {run.engine.optimizer.learning_rate:.2e}"
            )
            if now - unavoidable <= TARGET:
                run.log.info(f"overfit check passed: {sequences} sequences of stage {stage.name}, after {step} steps")
                return True
        run.log.info(
            f"error: overfit: after {step} steps the loss on {sequences} sequences of stage {stage.name} is "
            f"{now:.4f}, needed is {unavoidable + TARGET:.4f}; something keeps the model from learning (labels, "
            f"masks, its layers), or lr.peak {stage.lr.peak:g} and --overfit-steps {steps} are too low"
        )
        return False


def unavoidable_loss(micro_batches: Iterable[MicroBatch], loss: LossConfig, loss_totals: np.ndarray) -> float:
    """The loss of a model that predicts these sequences as well as any can, in nats.

    Documents that begin alike and go on differently cannot be distinguished before they differ: after a common prefix
    the best prediction is the share of each continuation. The loss is the weighted entropy of those shares.

    Args:
        micro_batches: all sequences.
        loss: what positions weigh.
        loss_totals: theirs, as `loss.scales` takes them.
    """
    scales = loss.scales(loss_totals)
    nodes: dict[tuple[int, int], int] = {}
    shares: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for batch in micro_batches:
        tokens, labels = batch.tokens.view(-1).tolist(), batch.labels.view(-1).tolist()
        weights, groups = batch.loss_weights.view(-1).tolist(), batch.group_ids.view(-1).tolist()
        bounds = batch.cu_seqlens.tolist()
        for begin, end in itertools.pairwise(bounds):
            node = 0
            for at in range(begin, end):
                node = nodes.setdefault((node, tokens[at]), len(nodes) + 1)
                if groups[at] >= 0 and weights[at] > 0.0:
                    shares[node][labels[at]] += weights[at] * scales[groups[at] % len(scales)]
    total = 0.0
    for continuations in shares.values():
        mass = sum(continuations.values())
        total -= sum(weight * math.log(weight / mass) for weight in continuations.values())
    return total


def _missing(path: Path) -> list[Path]:
    """The folders on the way to `path` that are not there, from the top."""
    return [folder for folder in (*reversed(path.parents), path) if not folder.exists()]
