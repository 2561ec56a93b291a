"""What is measured while training: losses by group, summed on the device; memory; the peak that MFU is a share of.

Losses are accumulated where they are computed and read once per interval, so that a step never waits for its
own numbers. The sums are carried through checkpoints: a run that was killed and continued writes the same
losses, digit for digit, as one that was not.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence

import torch

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


def is_main_process() -> bool:
    """Whether this process is rank 0 by its launcher's word; usable before process groups exist."""
    return int(os.environ.get("RANK", "0")) == 0


def warn(text: str) -> None:
    """A notice on stderr, once for the whole world."""
    if is_main_process():
        print(f"note: {text}", file=sys.stderr, flush=True)
