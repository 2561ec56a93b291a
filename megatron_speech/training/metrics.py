"""What a run says about itself: grouped losses summed on the device, one line per logging interval.

Losses are accumulated where they are computed and read once per interval, so that a step never waits for its
own numbers. The sums are carried through checkpoints: a run that was killed and continued writes the same
losses, digit for digit, as one that was not.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch

from megatron_speech.files import atomic_write, write_json
from megatron_speech.token_space import MODALITIES

Group = tuple[str, str, str]
"""(task, language, source) of the documents of a group."""

_SCALARS = ("weighted_loss", "weight", "tokens", "pad_tokens", "stop_requests")


class LossMeter:
    """Sums of cross-entropies by document group and modality, over an interval and over all ranks.

    The sums live on `device` in float64 and are reduced over the world only when they are read. `totals`
    holds what was reduced already; it is equal on all ranks and independent of the layout, so it can be
    saved and continued from.

    Args:
        groups: the document groups of the stage, in the order of the loader's group ids.
        device: where the losses are.
        contributes: whether this rank's losses count: one tensor-parallel and context-parallel rank of the
            last pipeline stage, on every data-parallel rank.
    """

    def __init__(self, groups: Sequence[Group], device: torch.device | str, *, contributes: bool = True) -> None:
        self.groups = list(groups)
        self.contributes = contributes
        self._slots = len(self.groups) * len(MODALITIES)
        # Slot 0 takes the positions that carry no loss, so that no row has to be selected (a device sync).
        self._sums = torch.zeros(self._slots + 1, 2, dtype=torch.float64, device=device)
        self._weighted = torch.zeros((), dtype=torch.float64, device=device)
        self._host = dict.fromkeys(_SCALARS, 0.0)
        self.totals = torch.zeros(self.state_size, dtype=torch.float64)

    @property
    def state_size(self) -> int:
        """Length of `totals`."""
        return 2 * self._slots + len(_SCALARS)

    def add_losses(self, losses: torch.Tensor, weighted: torch.Tensor, group_ids: torch.Tensor) -> None:
        """Add one micro-batch. No device sync.

        Args:
            losses: float32 [T], cross-entropy per position, 0 where there is no loss.
            weighted: float32 scalar, Σ weight·loss of the micro-batch.
            group_ids: int32 [T], document_group·3 + modality of the label, -1 where there is no loss.
        """
        slots = group_ids.long() + 1
        values = torch.stack((losses.detach().double(), torch.ones_like(losses, dtype=torch.float64)), dim=1)
        self._sums.index_add_(0, slots, values)
        self._weighted += weighted.detach()

    def add_counts(self, *, weight: float, tokens: int, pad_tokens: int) -> None:
        """Add a global batch's host-side counts of this data-parallel rank."""
        self._host["weight"] += weight
        self._host["tokens"] += tokens
        self._host["pad_tokens"] += pad_tokens

    def request_stop(self) -> None:
        """Let all ranks know, at their next read, that this one was asked to stop."""
        self._host["stop_requests"] += 1.0

    def reduce(self) -> None:
        """Move this interval's sums of all ranks into `totals`. The only device sync, and a collective."""
        local = torch.zeros(self.state_size, dtype=torch.float64, device=self._sums.device)
        if self.contributes:
            local[: 2 * self._slots] = self._sums[1:].flatten()
            local[2 * self._slots] = self._weighted
            scalars = [self._host[name] for name in _SCALARS[1:]]
            local[2 * self._slots + 1 :] = torch.tensor(scalars, dtype=torch.float64, device=local.device)
        elif self._host["stop_requests"]:
            local[-1] = self._host["stop_requests"]
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(local)
        self.totals += local.cpu()
        self._sums.zero_()
        self._weighted.zero_()
        self._host = dict.fromkeys(_SCALARS, 0.0)

    def read(self) -> dict[str, float]:
        """Means over the interval, by name; then start a new interval.

        `loss` is Σ weight·ce / Σ weight, what the optimizer saw. The others are plain means of the
        cross-entropy over the positions that carry loss, so they do not move when weights are changed.
        """
        self.reduce()
        scalars = dict(zip(_SCALARS, self.totals[2 * self._slots :].tolist(), strict=True))
        sums = self.totals[: 2 * self._slots].view(len(self.groups), len(MODALITIES), 2).tolist()
        self.totals.zero_()
        named: dict[str, list[float]] = {}
        for (task, language, source), row in zip(self.groups, sums, strict=True):
            for modality, (loss, count) in zip(MODALITIES, row, strict=True):
                for name in (f"modality/{modality}", f"task/{task}", f"language/{language}", f"source/{source}"):
                    entry = named.setdefault(name, [0.0, 0.0])
                    entry[0] += loss
                    entry[1] += count
        positions = scalars["tokens"] + scalars["pad_tokens"]
        return {
            "loss": scalars["weighted_loss"] / scalars["weight"] if scalars["weight"] else math.nan,
            **{f"loss/{name}": loss / count for name, (loss, count) in sorted(named.items()) if count},
            "pad_fraction": scalars["pad_tokens"] / positions if positions else 0.0,
            "tokens": scalars["tokens"],
            "stop_requests": scalars["stop_requests"],
        }


# Dense bf16 peak without sparsity, in TFLOP/s, from NVIDIA's data sheets (SXM parts unless named).
_PEAK_TFLOPS = {"H200": 989.4, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.4, "A100": 312.0, "B200": 2250.0}


def peak_tflops(device_name: str | None) -> float | None:
    """Dense bf16 peak of a GPU by its name; None for a CPU or a GPU that is not in the table."""
    if device_name is None:
        return None
    return next((peak for name, peak in _PEAK_TFLOPS.items() if name in device_name), None)


def memory_gib() -> float:
    """Largest memory used so far by this process: of the GPU's allocator, or resident where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


class RunLog:
    """metrics.jsonl, TensorBoard, the console and status.json of one run; silent on all ranks but one.

    Args:
        directory: the run directory.
        active: whether this rank writes.
        resume_step: lines of metrics.jsonl after this step were written by work that is lost; they are removed.
        tensorboard: also write TensorBoard events, where tensorboard is installed.
    """

    STATUS_SECONDS = 5.0

    def __init__(self, directory: Path, *, active: bool, resume_step: int, tensorboard: bool) -> None:
        self.directory = directory
        self.active = active
        self._jsonl: IO[str] | None = None
        self._tensorboard: Any = None
        self._status: dict[str, Any] = {}
        self._status_written = -math.inf
        if not active:
            return
        path = directory / "metrics.jsonl"
        truncate_metrics(path, resume_step)
        self._jsonl = open(path, "a", encoding="utf-8")
        if tensorboard:
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                self._tensorboard = SummaryWriter(str(directory / "tensorboard"), purge_step=resume_step + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Append one line. Floats are written so that they read back to the same bits; NaN becomes null."""
        if self._jsonl is None:
            return
        clean = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                 for key, value in record.items()}  # fmt: skip
        self._jsonl.write(json.dumps(clean, ensure_ascii=False, allow_nan=False) + "\n")
        self._jsonl.flush()
        if self._tensorboard is not None:
            prefix = f"{record['split']}/" if "split" in record else ""
            for key, value in clean.items():
                if key != "step" and isinstance(value, int | float):
                    self._tensorboard.add_scalar(prefix + key, value, record["step"])

    def say(self, text: str) -> None:
        """One line for people."""
        if self.active:
            print(text, flush=True)

    def status(self, state: str, position: dict[str, Any], message: str = "", *, force: bool = True) -> None:
        """Write status.json; without `force` at most every few seconds, since each write is an fsync."""
        if not self.active:
            return
        now = time.monotonic()
        if not force and now - self._status_written < self.STATUS_SECONDS:
            return
        self._status_written = now
        write_json(self.directory / "status.json", {"state": state, **position, "message": message})

    def close(self) -> None:
        """Flush and close the files."""
        if self._jsonl is not None:
            self._jsonl.close()
            self._jsonl = None
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None


def truncate_metrics(path: Path, step: int) -> None:
    """Drop the lines of `path` whose step is above `step`, and a last line that was cut by a crash."""
    if not path.exists():
        return
    kept, dropped = [], False
    with open(path, encoding="utf-8") as handle:
        for line in handle:
            try:
                keep = line.endswith("\n") and json.loads(line)["step"] <= step
            except (ValueError, KeyError, TypeError):
                keep = False
            dropped |= not keep
            if keep:
                kept.append(line)
    if dropped:
        with atomic_write(path, "w") as out:
            out.writelines(kept)


def console_line(record: dict[str, Any], *, stage_step: int, stage_steps: int, eta_seconds: float) -> str:
    """The one line that is printed per logging interval."""

    def number(key: str, form: str) -> str:
        value = record.get(key)
        return "-" if value is None else format(value, form)

    return (
        f"{record['stage']} {stage_step:>{len(str(stage_steps))}}/{stage_steps}"
        f"  loss {number('loss', '.4f')}"
        f"  audio {number('loss/modality/audio', '.4f')}"
        f"  text {number('loss/modality/text', '.4f')}"
        f"  lr {number('lr', '.2e')}"
        f"  grad {number('grad_norm', '.2f')}"
        f"  {number('tokens_per_second', ',.0f')} tok/s"
        f"  wait {record['data_wait_seconds'] * 1e3:.0f} ms"
        f"  eta {duration(eta_seconds)}"
    )


def duration(seconds: float) -> str:
    """`seconds` as 1:02:03 or 2:03."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def is_main_process() -> bool:
    """Whether this process is rank 0 by its launcher's word; usable before process groups exist."""
    return int(os.environ.get("RANK", "0")) == 0


def warn(text: str) -> None:
    """A notice on stderr, once for the whole world."""
    if is_main_process():
        print(f"note: {text}", file=sys.stderr, flush=True)
