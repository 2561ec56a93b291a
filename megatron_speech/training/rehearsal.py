"""Gates before a big launch: everything up to the first step, and a model that learns a few sequences by heart.

Both do what a run would do, through the same code, and leave nothing behind but the cache of sequence indices.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_speech.data.loading.loader import GlobalBatch, MicroBatch
from megatron_speech.errors import InputError
from megatron_speech.recipe.loss import LossConfig
from megatron_speech.recipe.recipe import Recipe
from megatron_speech.training import checkpoint
from megatron_speech.training.batches import stage_batches
from megatron_speech.training.health.agreement import agreed
from megatron_speech.training.health.control import StopRequest
from megatron_speech.training.telemetry.run_log import RunLog
from megatron_speech.training.trainer import Trainer

TARGET = 0.05
"""Nats above the unavoidable loss at which sequences count as learned by heart."""

_LOOK_STEPS = 10
_WARMUP_STEPS = 10


class Rehearsal(Trainer):
    """A trainer that writes nothing to the run directory.

    Args:
        recipe: what would be run.
        resume: load the checkpoint that the run would go on from.
        stop: signals that end it.
    """

    def __init__(self, recipe: Recipe, *, resume: bool, stop: StopRequest | None = None) -> None:
        self._resumes = resume
        self._made = _missing(recipe.run_directory / "checkpoints")
        super().__init__(recipe, stop=stop)

    def _find_checkpoint(self) -> checkpoint.CheckpointInfo | None:
        return checkpoint.find_latest(self.directory / "checkpoints") if self._resumes else None

    def _open(self, info: checkpoint.CheckpointInfo | None, found: dict[str, Any]) -> None:
        self._log = RunLog(self.directory, active=self.is_main, writes=False)
        quiet = self.recipe.checkpoint.model_copy(update={"upload": None})
        self._checkpoints = checkpoint.RunCheckpoints(
            self.directory / "checkpoints",
            self.recipe.model_copy(update={"checkpoint": quiet}),
            self.space,
            info=None,
            log=self._log,
        )

    def _note_failure(self, message: str) -> None:
        pass

    @contextlib.contextmanager
    def _leaving_nothing(self) -> Iterator[None]:
        """What a rehearsal does inside; folders that it made for nothing go afterwards."""
        try:
            with self._safety.guard():
                yield
                self._safety.finish()
        finally:
            self._log.close()
            if self.is_main:
                for folder in reversed(self._made):
                    with contextlib.suppress(OSError):  # not empty: the index cache is in it
                        folder.rmdir()

    def dry_run(self) -> None:
        """Fetch the batch of the next step, and say that everything is there."""
        with self._leaving_nothing():
            index, step = self.position.stage_index, self.position.step
            if index == len(self.recipe.stages):
                self._log.say(f"dry run: {self.recipe.name} is finished, there is no next step")
                return
            stage, data = self.recipe.stages[index], self.stages[index]
            batches = stage_batches(stage, data, self.position.stage_step, self.dp_rank, self.dp_size)
            with contextlib.closing(batches):
                batch = next(batches)
            counts = self._safety.control.gather([batch.tokens, batch.pad_tokens]).sum(0).tolist()
            tokens, padding = (int(count / (self.world_size / self.dp_size)) for count in counts)
            self._log.say(
                f"dry run: ready for step {step + 1} (stage {stage.name}): its batch has {tokens:,} tokens and "
                f"{padding:,} of padding; nothing was written but the index cache"
            )

    def overfit(self, sequences: int, steps: int) -> bool:
        """Train on the first `sequences` sequences of the first stage until they are known by heart.

        All of them make one batch; the learning rate rises to the stage's peak and stays there.

        Returns:
            Whether the loss came within `TARGET` of what no model can avoid, in at most `steps` steps. A collective.
        """
        stage, data = self.recipe.stages[0], self.stages[0]
        loss = stage.loss.model_copy(update={"label_smoothing": 0.0, "z_loss": 0.0})
        with self._leaving_nothing():
            with agreed():
                unit = stage.micro_batch_size * self.dp_size * self.recipe.parallel.micro_batch_multiple
                if sequences % unit or sequences > data.n_sequences:
                    raise InputError(
                        f"--overfit {sequences}: needed is a multiple of {unit} (micro_batch_size × data-parallel "
                        f"ranks), at most the {data.n_sequences} sequences of stage {stage.name}"
                    )
            with data.loader(0, stage.micro_batch_size, sequences, self.dp_rank, self.dp_size) as batches:
                batch = next(batches)
            with data.loader(0, stage.micro_batch_size, sequences) as batches:
                whole: GlobalBatch = next(batches)
            unavoidable = unavoidable_loss(whole.micro_batches, loss, whole.loss_totals)
            rate = stage.lr.model_copy(update={"schedule": "constant", "end": None, "warmup": float(_WARMUP_STEPS)})
            size = sequences * stage.seq_length
            update = {"lr": rate, "tokens": steps * size, "global_batch_tokens": size, "batch_ramp": None}
            scheduler = self.optimizer.start_stage(stage.model_copy(update=update))
            meter = self._meter(stage, data)
            self._spikes = None
            self._safety.progress.begin_steps()
            now = math.nan
            for step in range(1, steps + 1):
                self._train_step(batch, meter, loss, scheduler)
                if self._safety.stop_agreed(step):
                    break
                if step % _LOOK_STEPS and step != steps:
                    continue
                now = meter.read()["loss"]
                self._log.say(
                    f"overfit {step}/{steps}  loss {now:.4f}  of it unavoidable {unavoidable:.4f}  "
                    f"lr {self.optimizer.learning_rate:.2e}"
                )
                if now - unavoidable <= TARGET:
                    self._log.say(
                        f"overfit: {sequences} sequences of stage {stage.name} are known by heart after {step} steps"
                    )
                    return True
            self._log.say(
                f"error: overfit: after {step} steps the loss on {sequences} sequences of stage {stage.name} is "
                f"{now:.4f}, needed is {unavoidable + TARGET:.4f}; something keeps the model from learning (labels, "
                f"masks, its layers), or lr.peak {stage.lr.peak:g} and --overfit-steps {steps} are too low"
            )
            return False


def unavoidable_loss(micro_batches: Iterable[MicroBatch], loss: LossConfig, loss_totals: np.ndarray) -> float:
    """The loss of a model that has learned these sequences by heart, in nats.

    Documents that begin alike and go on differently cannot be told apart before they differ: after a common prefix
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
