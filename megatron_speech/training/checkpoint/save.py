"""Saving: at once (`save_checkpoint`, `save_weights`), or beside the training (`CheckpointSaver`)."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_speech.errors import InputError
from megatron_speech.recipe.model import ModelConfig
from megatron_speech.recipe.recipe import Recipe
from megatron_speech.tokens.space import TokenSpace
from megatron_speech.training.checkpoint.contents import merged, model_state, run_state
from megatron_speech.training.checkpoint.store import CheckpointInfo, checkpoint_name, point_link, read_info
from megatron_speech.training.checkpoint.writing import (
    HostBuffers,
    PlannedSave,
    SaveProblem,
    Sharing,
    plan_save,
    write_save,
)
from megatron_speech.training.optim.optimizer import Optimizer


@dataclass(frozen=True)
class PostSave:
    """What followed a checkpoint that was written: whether it is the best so far, and what should be looked into."""

    best: bool = False
    alarms: Sequence[str] = ()


@dataclass(frozen=True)
class SaveReport:
    """What became of one save.

    Attributes:
        step, stage: of the checkpoint.
        problem: why it was not written; None: it was. The same on all ranks.
        post_save: what was done after it, on rank 0.
        seconds: from the step that it was taken in until it had its name.
        waited_seconds: the part of that in which the training waited.
        bytes: size of this rank's shards.
    """

    step: int
    stage: str
    problem: SaveProblem | None
    post_save: PostSave
    seconds: float
    waited_seconds: float
    bytes: int


class CheckpointSaver:
    """Saves a run's checkpoints while training continues; one at a time.

    `save` copies this rank's state to host memory and returns; a thread writes it. The next `save` and `wait` wait
    for that. A save that fails (a full disk) leaves nothing behind, is reported, and the run continues.

    Args:
        directory: RUN/checkpoints, on storage that all ranks share.
        asynchronous: False: `save` waits until it is written.
        after_save: called on rank 0 with every checkpoint that was written, in the thread that wrote it; its answer
            is `SaveReport.post_save`.

    Constructing one is a collective: it creates a process group.
    """

    # How long a process that ends because of an error waits for a save that it had started. Another process of the
    # run may have gone, and then nothing more comes of it.
    ERROR_SECONDS = 30.0

    def __init__(
        self,
        directory: Path,
        *,
        recipe: Recipe,
        space: TokenSpace,
        asynchronous: bool,
        after_save: Callable[[CheckpointInfo], PostSave],
    ) -> None:
        self.directory = directory
        self._recipe, self._space = recipe, space
        self._after_save = after_save
        self._buffers = HostBuffers() if asynchronous else None
        self._group = None
        if dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(hours=2))
        self._sharing = Sharing(self._group)
        self._thread: threading.Thread | None = None
        self._reports: list[SaveReport] = []
        self._error: BaseException | None = None

    def save(self, *, fields: dict[str, Any], chunks: list[Any], optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Take a checkpoint of this moment; waits for the one before. A collective.

        Args:
            fields: JSON-able description: position, validation scores, dataset fingerprints.
            chunks: this rank's model chunks (unwrapped).
            optimizer: its moments and master weights are saved.
            state: small state that is equal on all ranks (scheduler, loss sums).
        """
        called = time.perf_counter()
        self._join()
        started = time.perf_counter()
        contents = run_state(chunks, optimizer, state)
        planned = plan_save(contents, self._sharing, self._buffers, optimizer.ranges(merged(contents)))
        described = copy.deepcopy(describe_run(self._recipe, fields))  # of now; what it names may change meanwhile
        final = self.directory / checkpoint_name(fields["step"])
        if self._buffers is None:
            self._write(planned, final, described, started, None)
            return
        waited = time.perf_counter() - called
        self._thread = threading.Thread(
            target=self._write_beside,
            args=(planned, final, described, started, waited),
            name="checkpoint",
            daemon=True,
        )
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._thread is not None and self._thread.is_alive()

    def block_training_stream(self) -> None:
        """Before weights or optimizer state change: on a GPU the change waits for the copies. No host sync."""
        if self._buffers is not None:
            self._buffers.block_training_stream()

    def poll(self) -> list[SaveReport]:
        """Reports of the saves that have ended since the last call; waits for nothing.

        Raises:
            whatever went wrong in the thread, other than the disk.
        """
        if self._error is not None:
            raise self._error
        reports, self._reports = self._reports, []
        return reports

    def wait(self) -> list[SaveReport]:
        """Wait for the save under way; then as :meth:`poll`."""
        self._join()
        return self.poll()

    def close(self, *, failed: bool) -> None:
        """End with the run; after an error the save under way has only so long."""
        if self._thread is not None:
            self._thread.join(self.ERROR_SECONDS if failed else None)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    def _write_beside(self, *arguments: Any) -> None:
        try:
            self._write(*arguments)
        except BaseException as error:  # raised again in the training's own thread
            self._error = error

    def _write(
        self, planned: PlannedSave, final: Path, described: dict[str, Any], started: float, waited: float | None
    ) -> None:
        problem = write_save(
            planned, final, described=described, space=self._space, recipe=self._recipe, group=self._group
        )
        seconds, post_save = time.perf_counter() - started, PostSave()
        if problem is None and dist.get_rank() == 0:
            try:
                point_link(self.directory / "latest", final.name)
                post_save = self._after_save(read_info(final))
            except OSError as error:  # the checkpoint is there all the same
                post_save = PostSave(alarms=[f"after {final.name} was written: {error}"])
        report = SaveReport(
            described["step"],
            described["stage"],
            problem,
            post_save,
            seconds,
            seconds if waited is None else waited,
            planned.bytes,
        )
        self._reports = [*self._reports, report]


def describe_run(recipe: Recipe, fields: dict[str, Any]) -> dict[str, Any]:
    """checkpoint.json of a run's checkpoint, without what is known only when its files are written."""
    return {
        **fields,
        "recipe": recipe.model_dump(mode="json"),
        "max_seq_length": max(stage.seq_length for stage in recipe.stages),
        "model": recipe.model.model_dump(mode="json"),
        "precision": recipe.precision,
        "layout": {"world_size": dist.get_world_size(), **recipe.parallel.model_dump()},
    }


def save_checkpoint(
    directory: Path,
    *,
    recipe: Recipe,
    space: TokenSpace,
    fields: dict[str, Any],
    chunks: list[Any],
    optimizer: Optimizer | None,
    state: dict[str, Any],
) -> Path:
    """Write RUN/checkpoints/step_N for N = fields["step"], and wait for it. A collective.

    Arguments are those of :meth:`CheckpointSaver.save`; without an optimizer no run continues from it.

    Raises:
        OSError: it could not be written.
        InputError: it holds NaN or infinity.
    """
    final = directory / checkpoint_name(fields["step"])
    contents = run_state(chunks, optimizer, state)
    ranges = [] if optimizer is None else optimizer.ranges(merged(contents))
    planned = plan_save(contents, Sharing(), None, ranges)
    _raise(write_save(planned, final, described=describe_run(recipe, fields), space=space, recipe=recipe, group=None))
    return final


def save_weights(
    path: Path,
    *,
    space: TokenSpace,
    model: ModelConfig,
    precision: str,
    max_seq_length: int,
    chunks: list[Any],
    fields: dict[str, Any] | None = None,
) -> Path:
    """Write a checkpoint of weights alone at `path`, without a run: step 0, no recipe, no optimizer. A collective.

    `generate` and `evaluate` read it as any other, and a recipe's `init.checkpoint` starts from it.

    Args:
        path: the checkpoint's directory; replaced if it is there.
        space: the ids that the rows of its tables stand for.
        model, precision, max_seq_length: what the model is; `max_seq_length` in tokens.
        chunks: this rank's model chunks.
        fields: more of a description, such as where the weights come from.

    Raises:
        OSError: it could not be written.
        InputError: it holds NaN or infinity.
    """
    described = {
        "step": 0,
        "stage": "init",
        **(fields or {}),
        "max_seq_length": max_seq_length,
        "model": model.model_dump(mode="json"),
        "precision": precision,
        "layout": {"world_size": dist.get_world_size()},
    }
    planned = plan_save(model_state(chunks), Sharing(), None)
    _raise(write_save(planned, path, described=described, space=space, recipe=None, group=None))
    return path


def _raise(problem: SaveProblem | None) -> None:
    if problem is not None and problem.not_finite:
        raise InputError(f"the checkpoint is not written: {problem.reason}; such weights are of no use")
    if problem is not None:
        raise OSError(f"the checkpoint could not be written: {problem.reason}")
