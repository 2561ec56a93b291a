"""The checkpoints of one run: found, due, saved beside the training, promoted, pruned, uploaded, logged."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_speech.errors import DivergenceError, OutputError
from megatron_speech.recipe.checkpoint import is_due
from megatron_speech.recipe.recipe import Recipe
from megatron_speech.recipe.stage import StageConfig
from megatron_speech.tokens.space import TokenSpace
from megatron_speech.training.checkpoint.divergence import advice
from megatron_speech.training.checkpoint.hf_exports import HuggingFaceExports
from megatron_speech.training.checkpoint.retention import Soundness, promote_best, prune
from megatron_speech.training.checkpoint.save import CheckpointSaver, PostSave, SaveReport
from megatron_speech.training.checkpoint.store import (
    CheckpointInfo,
    checkpoint_name,
    clean_leftovers,
    find_latest,
    list_checkpoints,
    point_link,
)
from megatron_speech.training.checkpoint.upload import Uploader
from megatron_speech.training.health.agreement import raise_on_all_ranks
from megatron_speech.training.optim.optimizer import Optimizer
from megatron_speech.training.telemetry.run_log import RunLog


def newest_checkpoint(directory: Path) -> CheckpointInfo | None:
    """The newest sound checkpoint below RUN/checkpoints, after what a killed save left was removed. A collective."""
    remove_leftovers(directory)
    return find_latest(directory)


def remove_leftovers(directory: Path) -> None:
    """Remove what a killed save left below RUN/checkpoints. A collective."""
    if dist.get_rank() == 0:
        clean_leftovers(directory)
    dist.barrier()


class RunCheckpoints:
    """A run's checkpoints, as its recipe's `checkpoint` section configures them. Constructing one is a collective.

    Args:
        directory: RUN/checkpoints.
        recipe, space: of the run.
        info: the checkpoint that it continues from.
        log: of the run.
        changes: of the recipe that were requested, see `Run.changes`.
    """

    def __init__(
        self,
        directory: Path,
        recipe: Recipe,
        space: TokenSpace,
        *,
        info: CheckpointInfo | None,
        log: RunLog,
        changes: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.directory = directory
        self._recipe, self._config, self._log, self._changes = recipe, recipe.checkpoint, log, changes
        self._soundness = Soundness()
        self._problem: str | None = None  # of the last save
        self._diverged = False  # it was not finite
        self._stage = recipe.stages[0].name  # that it was of
        self.reports: deque[SaveReport] = deque(maxlen=100)
        """Of the last saves that have ended, the newest last."""
        if info is not None and dist.get_rank() == 0:
            point_link(directory / "latest", info.path.name)
            promote_best(directory, info.fields["stage"])
        self._uploader: Uploader | None = None
        with raise_on_all_ranks():
            if self._config.upload is not None and dist.get_rank() == 0:
                self._uploader = Uploader(directory.parent, self._config)
        self._exports: HuggingFaceExports | None = None
        if self._config.export_hf is not None and dist.get_rank() == 0:
            self._exports = HuggingFaceExports(directory.parent, self._config.export_hf)
            for problem in self._exports.advance():
                log.alarm("export", problem)
        self._saver = CheckpointSaver(
            directory, recipe=recipe, space=space, asynchronous=self._config.asynchronous, after_save=self._after_save
        )

    def due(self, stage: StageConfig, step: int, stage_step: int) -> bool:
        """Whether one is written after `step` steps of the run, the `stage_step`-th of its stage; ends besides."""
        if stage.checkpoint is not None:
            return is_due(stage.checkpoint, stage_step)
        return self._config.interval_steps > 0 and step % self._config.interval_steps == 0

    def save(self, *, fields: dict[str, Any], chunks: list[Any], optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Take a checkpoint of this moment, see :meth:`CheckpointSaver.save`. A collective."""
        self._saver.save(fields=fields, chunks=chunks, optimizer=optimizer, state=state)
        self.log_finished_saves()

    @property
    def busy(self) -> bool:
        """Whether a save is under way beside the training."""
        return self._saver.busy

    def block_training_stream(self) -> None:
        """Before weights or optimizer state change, see :meth:`CheckpointSaver.block_training_stream`."""
        self._saver.block_training_stream()

    def log_finished_saves(self) -> None:
        """Log the saves that have ended; waits for nothing."""
        for report in self._saver.poll():
            self._log_save(report)

    def wait(self) -> None:
        """Wait for the save under way, and log it."""
        for report in self._saver.wait():
            self._log_save(report)

    def finish(self, *, copied: bool) -> None:
        """Wait for the last one, which the run needs; with `copied` also for copies that are still to be made.

        Raises:
            OutputError: it could not be written.
            DivergenceError: it was not finite.
        """
        self.wait()
        if self._problem is not None and self._diverged:
            raise DivergenceError(
                f"{self._problem}; {advice(self._recipe, self._stage, self.directory, self._changes)}"
            )
        if self._problem is not None:
            raise OutputError(f"{self._problem}; free some space and start the same command again")
        left: list[str] = []
        if self._exports is not None and copied:
            for problem in self._exports.finish():
                self._log.alarm(f"export {problem}", problem)
        if self._uploader is not None:
            if copied:
                left = self._uploader.finish()
                if left:
                    names = ", ".join(left)
                    self._log.alarm("copies", f"{names}: not copied yet; run the same command again to resume copying")
            self._uploader.close()
        if copied and (self._uploader is not None or self._exports is not None):
            prune(self.directory, self._config, problem=self._soundness.problem, waiting=left)

    def close(self, *, failed: bool) -> None:
        """End with the run, see :meth:`CheckpointSaver.close`. What is not copied yet the next process copies."""
        self._saver.close(failed=failed)
        if self._uploader is not None:
            self._uploader.close()
        if self._exports is not None:
            self._exports.close()

    def _after_save(self, info: CheckpointInfo) -> PostSave:
        """On rank 0, beside the training: read it back, promote, have it copied, prune."""
        alarms = []
        waiting: list[str] = []
        if problem := self._soundness.problem(info.path):
            alarms.append(f"checkpoint {info.path} was written, but cannot be read back: {problem}")
        else:
            if self._uploader is not None:
                for name in self._uploader.add(info.path.name):
                    alarms.append(f"{name} is not copied: more than checkpoint.upload.max_waiting are waiting")
            if self._exports is not None and self._exports.due(
                info.path.name, stage_ended=bool(info.fields.get("stage_ended"))
            ):
                self._exports.add(info.path.name)
        if self._uploader is not None:
            waiting += self._uploader.waiting()
        if self._exports is not None:
            alarms += self._exports.advance()
            waiting += self._exports.waiting()
        best = promote_best(self.directory, info.fields["stage"])
        alarms += prune(self.directory, self._config, problem=self._soundness.problem, waiting=waiting)
        return PostSave(best is not None and best.step == info.step, alarms)

    def _log_save(self, report: SaveReport) -> None:
        self.reports.append(report)
        name = checkpoint_name(report.step)
        if report.problem is not None:
            good = next((path.name for path in list_checkpoints(self.directory)), "none")
            what = "is not written" if report.problem.not_finite else "could not be written"
            self._problem = f"{name} {what}: {report.problem.reason}. The newest checkpoint is {good}"
            self._diverged, self._stage = report.problem.not_finite, report.stage
            self._log.alarm("checkpoint", self._problem)
            return
        self._problem = None
        self._log.alarm("checkpoint", None)
        for alarm in report.post_save.alarms:
            self._log.alarm(f"checkpoint {alarm}", alarm)
        note = " (best so far)" if report.post_save.best else ""
        self._log.info(
            f"{report.stage} checkpoint {name}{note}, {report.bytes / 1e6:,.1f} MB of this process in "
            f"{report.seconds:.2f} s, of which training waited {report.waited_seconds:.2f} s"
        )
