"""Harmful steps: found and skipped on the device, logged on the host, and discarded by a rollback.

A step is skipped where its loss or its gradient norm is not finite, or stands far above the median of the steps
before it. Skipping moves neither weights nor moments nor averages. Where many in a row are skipped the weights
themselves are bad: the run rolls back to an earlier checkpoint and continues with the sequences after (as for
PaLM, arXiv:2204.02311, section 5.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_speech.errors import DivergenceError
from megatron_speech.recipe.recipe import Recipe
from megatron_speech.recipe.spikes import SpikesConfig
from megatron_speech.training.checkpoint.store import CheckpointInfo, find_latest
from megatron_speech.training.position import Ended, Position
from megatron_speech.training.telemetry.run_log import RunLog

QUANTITIES = ("loss", "grad_norm")


@dataclass(frozen=True)
class Verdict:
    """What was measured of one step, and what followed.

    Attributes:
        step: of the run, from 1.
        values: loss and gradient norm.
        limits: above which each counts as a spike; infinite where it has no limit (yet).
        skipped_in_row: skipped steps up to and including this one; 0: it was taken, or had nothing to learn.
        run_length: steps since the first of those, this one included; more where some between had nothing to learn.
    """

    step: int
    values: tuple[float, float]
    limits: tuple[float, float]
    skipped_in_row: int
    run_length: int

    @property
    def reason(self) -> str:
        """Why it was skipped."""
        parts = []
        for name, value, limit in zip(QUANTITIES, self.values, self.limits, strict=True):
            if not math.isfinite(value):
                parts.append(f"{name} is {value}")
            elif value > limit:
                parts.append(f"{name} {value:.4g} is above {limit:.4g}")
        return " and ".join(parts)


class SpikeGuard:
    """Decides on every step, on the device; the host learns of it when it asks.

    Args:
        config: the recipe's `spikes` section.
        device: where losses and norms are.

    Attributes:
        rollbacks: times that the stage went back.
    """

    def __init__(self, config: SpikesConfig, device: torch.device) -> None:
        self.config = config
        self._device = device
        factors = [config.loss_above or math.inf, config.grad_norm_above or math.inf]
        self._factors = torch.tensor(factors, dtype=torch.float32, device=device)
        self._slots = torch.arange(config.window, device=device)
        self._pending: list[Tensor] = []
        self.begin_stage()

    def begin_stage(self) -> None:
        """Forget the steps so far: another stage has other losses."""
        self.rollbacks = 0
        self.skipped = 0  # steps, by this process
        # The last steps that were taken, [window, loss and norm]; empty slots are infinite, and sort behind the rest.
        self._taken = torch.full((self.config.window, len(QUANTITIES)), math.inf, device=self._device)
        self._count = torch.zeros((), dtype=torch.int64, device=self._device)
        self._in_row = torch.zeros((), dtype=torch.int64, device=self._device)
        self._run = torch.zeros((), dtype=torch.int64, device=self._device)

    @torch.no_grad()
    def decide(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether to skip this step; a collective. No device sync.

        Args:
            loss: float32 scalar, this rank's part of the global batch's loss.
            norm: float32 scalar, the global gradient norm.

        Returns:
            float32 scalar on the device: 1 to skip the step, 0 to take it; the same on all ranks.
        """
        values = torch.stack((loss.float(), norm.float()))
        if dist.get_world_size() > 1:
            values[1] /= dist.get_world_size()  # every rank has the norm, and what is decided must not differ by a bit
            dist.all_reduce(values)
        filled = self._count.clamp(max=self.config.window)
        middle = (filled - 1).clamp(min=0) // 2
        median = self._taken.sort(dim=0).values.index_select(0, middle.view(1)).squeeze(0)
        limits = torch.where(self._count >= self.config.min_steps, median * self._factors, math.inf)
        skip = ~(torch.isfinite(values).all() & (values <= limits).all())
        here = (self._slots == self._count % self.config.window) & ~skip
        self._taken = torch.where(here.unsqueeze(1), values, self._taken)
        self._count += ~skip
        self._in_row = (self._in_row + 1) * skip
        self._run = (self._run + 1) * skip
        self._pending.append(torch.cat((values, limits, torch.stack((self._in_row, self._run)).float())))
        return skip.float()

    def pass_over(self) -> None:
        """Count a step without anything to learn: it is neither taken nor skipped, and enters no median."""
        self._run = (self._run + 1) * (self._in_row > 0)
        nothing = [math.nan, math.nan, math.inf, math.inf, 0.0, 0.0]
        self._pending.append(torch.tensor(nothing, device=self._device))

    def read(self, step: int) -> list[Verdict]:
        """The verdicts since the last call, the newest of which is on step `step`. A device sync."""
        if not self._pending:
            return []
        rows = torch.stack(self._pending).tolist()
        self._pending = []
        first = step - len(rows) + 1
        return [
            Verdict(first + number, (loss, norm), (loss_limit, norm_limit), int(in_row), int(length))
            for number, (loss, norm, loss_limit, norm_limit, in_row, length) in enumerate(rows)
        ]

    def rollback(self, verdict: Verdict, directory: Path, advice: str) -> CheckpointInfo:
        """The checkpoint to roll back to: the newest sound one from before the skipped steps. A collective.

        Args:
            verdict: on the step at which `skip_limit` was reached.
            directory: RUN/checkpoints.
            advice: what to do where there is nowhere to go back to.

        Raises:
            DivergenceError: there is none, or the stage has used up its rollbacks.
        """
        first = verdict.step - verdict.run_length + 1
        what = f"steps {first} to {verdict.step} were skipped ({verdict.reason})"
        if self.rollbacks >= self.config.rewind_limit:
            raise DivergenceError(
                f"{what}, and the stage was rolled back {self.rollbacks} times (rewind_limit); {advice}"
            )
        info = find_latest(directory, before_step=first)
        if info is None:
            raise DivergenceError(f"{what}, and there is no checkpoint from before them to roll back to; {advice}")
        self.rollbacks += 1
        return info

    def state(self) -> dict[str, Any]:
        """What decisions depend on, equal on all ranks, for a checkpoint."""
        return {
            "taken": self._taken.cpu(),
            "count": int(self._count),
            "in_row": int(self._in_row),
            "run": int(self._run),
            "rewinds": self.rollbacks,
        }

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Take over a :meth:`state`; of another window, or None, only that there is none."""
        self._pending = []
        self.begin_stage()
        if state is not None and state["taken"].shape == self._taken.shape:
            self._taken.copy_(state["taken"])
            self._count.fill_(state["count"])
            self._in_row.fill_(state["in_row"])
            self._run.fill_(state.get("run", state["in_row"]))
            self.rollbacks = state["rewinds"]


def log_skipped_steps(guard: SpikeGuard, step: int, recipe: Recipe, ended: Ended, log: RunLog) -> Verdict | None:
    """Log the steps skipped since the last call, by the sequences that they were of, up to step `step`.

    Returns:
        The verdict at which `skip_limit` was reached, or None. Later ones are not logged: their steps are taken again.
    """
    for verdict in guard.read(step):
        if verdict.skipped_in_row == 0:
            continue
        guard.skipped += 1
        after = Position.at_step(recipe, verdict.step, ended)
        first = Position.at_step(recipe, verdict.step - 1, ended).consumed_sequences
        record = after.as_record(recipe)
        log.write(
            {
                **record,
                "split": "skipped",
                "first_sequence": first,
                **dict(zip(QUANTITIES, verdict.values, strict=True)),
                "skipped_in_row": verdict.skipped_in_row,
                "reason": verdict.reason,
            }
        )
        log.info(
            f"{record['stage']} step {verdict.step} skipped, sequences {first:,} to "
            f"{after.consumed_sequences - 1:,}: {verdict.reason}"
        )
        if verdict.skipped_in_row >= guard.config.skip_limit:
            return verdict
    return None


def log_rollback(info: CheckpointInfo, verdict: Verdict, recipe: Recipe, ended: Ended, log: RunLog) -> None:
    """Log that the run was rolled back to `info` after `verdict`, and which sequences that discards."""
    after = Position.at_step(recipe, verdict.step, ended)
    first = Position.at_step(recipe, info.step, ended).consumed_sequences
    record = after.as_record(recipe)
    log.write({**record, "split": "rewound", "checkpoint": info.path.name, "first_sequence": first})
    log.info(
        f"{record['stage']} rolls back to {info.path.name} and continues with sequence {after.consumed_sequences:,}; "
        f"{first:,} to {after.consumed_sequences - 1:,} are discarded by the rollback"
    )
