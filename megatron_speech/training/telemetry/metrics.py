"""What is measured while training: losses by group, summed on the device; memory; the peak that MFU is a share of.

Losses are accumulated where they are computed and read once per interval, so that a step never waits for its
own numbers. The sums are carried through checkpoints: a run that was killed and continued writes the same
losses, digit for digit, as one that was not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from megatron_speech.modalities import MODALITIES
from megatron_speech.recipe.loss import LossConfig

Group = tuple[str, str, str]
"""(task, language, source) of the documents of a group."""

_COUNTS = ("tokens", "pad_tokens")


class LossMeter:
    """Sums of cross-entropies by document group and modality, over an interval and over all ranks.

    The sums live on `device` in float64 and are reduced over the world only when they are read. `totals`
    holds what was reduced already; it is equal on all ranks and independent of the layout, so it can be
    saved and continued from.

    Args:
        groups: the document groups of the stage, in the order of the loader's group ids.
        device: where the losses are.
        loss: the stage's `loss` section, which defines what the loss is divided by.
        contributes: whether this rank's losses count: one tensor-parallel rank of the last pipeline stage, on every
            data-parallel and context-parallel rank.
        counts: whether its host-side counts do too: context-parallel ranks share the losses of a batch, but count
            all of it.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        device: torch.device | str,
        loss: LossConfig | None = None,
        *,
        contributes: bool = True,
        counts: bool = True,
    ) -> None:
        self.groups = list(groups)
        self.loss = loss or LossConfig()
        self.contributes, self.counts = contributes, counts
        self._slots = len(self.groups) * len(MODALITIES)
        self._normalizers = self.loss.normalizers
        # By slot (group · 3 + modality): Σ cross-entropy, positions. By normaliser: Σ weight · loss.
        self._sums = torch.zeros(self._slots, 2, dtype=torch.float64, device=device)
        self._weighted = torch.zeros(self._normalizers, dtype=torch.float64, device=device)
        self._normalizer = torch.arange(self._normalizers, device=device).unsqueeze(1)
        self._begin_interval()
        self.totals = torch.zeros(self.state_size, dtype=torch.float64)

    def _begin_interval(self) -> None:
        self._sums.zero_()
        self._weighted.zero_()
        self._settled: tuple[torch.Tensor, torch.Tensor] | None = None
        self._lost = torch.zeros_like(self._weighted)
        self._divisors = np.zeros(self._normalizers)
        self._host = dict.fromkeys(_COUNTS, 0.0)

    @property
    def state_size(self) -> int:
        """Length of `totals`: the sums by slot, then by normaliser Σ weight · loss and its divisor, then the counts."""
        return 2 * self._slots + 2 * self._normalizers + len(_COUNTS)

    def add_losses(
        self, losses: torch.Tensor, cross_entropy: torch.Tensor, weights: torch.Tensor, group_ids: torch.Tensor
    ) -> None:
        """Add the learned positions, R of them, of one micro-batch. No device sync.

        Args:
            losses: float32 [R], what is minimised, smoothing and z-loss included.
            cross_entropy: float32 [R], without them.
            weights: float32 [R], loss weights.
            group_ids: int32 [R], document_group·3 + modality of the label.
        """
        slots = group_ids.long()
        ones = torch.ones_like(cross_entropy, dtype=torch.float64)
        self._sums.index_add_(0, slots, torch.stack((cross_entropy.double(), ones), dim=1))
        weighted = losses.double() * weights
        # Not index_add_: its order of summation on a GPU changes from run to run.
        own = slots % self._normalizers == self._normalizer
        self._weighted += torch.where(own, weighted, 0.0).sum(1)

    def add_counts(self, *, loss_totals: np.ndarray, tokens: int, pad_tokens: int) -> None:
        """Add a global batch's host-side counts of this data-parallel rank; `loss_totals` as the loader gives them."""
        self._divisors += self.loss.divisors(loss_totals)
        self._host["tokens"] += tokens
        self._host["pad_tokens"] += pad_tokens

    def settle(self, skipped: torch.Tensor, loss_totals: np.ndarray) -> None:
        """Forget the losses of the global batch just added if its step was skipped. No device sync.

        Args:
            skipped: float32 scalar on the device: 1 or 0.
            loss_totals: that went to :meth:`add_counts`. Its tokens still count: they were worked on.
        """
        taken = skipped == 0.0
        if self._settled is None:
            self._settled = (torch.zeros_like(self._sums), torch.zeros_like(self._weighted))
        for sums, before in zip((self._sums, self._weighted), self._settled, strict=True):
            sums.copy_(torch.where(taken, sums, before))  # not a product: what was added may be NaN
            before.copy_(sums)
        self._lost += torch.stack([skipped.double() * part for part in self.loss.divisors(loss_totals).tolist()])

    def restore(self, totals: torch.Tensor, groups: Sequence[Sequence[str]]) -> None:
        """Take over the `totals` of a meter of `groups`; those of a group that is there no more are dropped."""
        width = 2 * len(MODALITIES)
        self.totals[width * len(self.groups) :] = totals[width * len(groups) :]
        for number, (task, language, source) in enumerate(groups):
            if (task, language, source) in self.groups:
                at = self.groups.index((task, language, source))
                self.totals[width * at : width * (at + 1)] = totals[width * number : width * (number + 1)]

    def reduce(self) -> None:
        """Move this interval's sums of all ranks into `totals`. The only device sync, and a collective."""
        local = torch.zeros(self.state_size, dtype=torch.float64, device=self._sums.device)
        scalars = [*self._divisors.tolist(), *self._host.values()]
        if self.contributes:
            local[: -len(scalars)] = torch.cat((self._sums.flatten(), self._weighted))
        if self.contributes and self.counts:
            local[-len(scalars) :] = torch.tensor(scalars, dtype=torch.float64, device=local.device)
            local[-len(scalars) : -len(_COUNTS)] -= self._lost
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(local)
        self.totals += local.cpu()
        self._begin_interval()

    def read(self) -> dict[str, float]:
        """Means over the interval, by name; then start a new interval.

        `loss` is what the optimizer saw: Σ weight·loss / divisor or, normalised by modality, the sum of the means of
        the modalities times their weights; smoothing and z-loss are part of it. The others are plain means of the
        cross-entropy over the positions that carry loss, so they do not move when weights are changed.
        """
        self.reduce()
        scalars = self.totals[2 * self._slots :].tolist()
        weighted, divisors = scalars[: self._normalizers], scalars[self._normalizers : 2 * self._normalizers]
        counts = dict(zip(_COUNTS, scalars[2 * self._normalizers :], strict=True))
        by_slot = self.totals[: 2 * self._slots].view(len(self.groups), len(MODALITIES), 2)
        labels = by_slot[..., 1].sum(0).view(self._normalizers, -1).sum(1)
        scales = self.loss.scales(np.array([divisors, labels.tolist()]))
        sums = by_slot.tolist()
        self.totals.zero_()
        named: dict[str, list[float]] = {}
        for (task, language, source), row in zip(self.groups, sums, strict=True):
            for modality, (loss, count) in zip(MODALITIES, row, strict=True):
                for name in (f"modality/{modality}", f"task/{task}", f"language/{language}", f"source/{source}"):
                    entry = named.setdefault(name, [0.0, 0.0])
                    entry[0] += loss
                    entry[1] += count
        positions = counts["tokens"] + counts["pad_tokens"]
        return {
            "loss": sum(a * b for a, b in zip(scales, weighted, strict=True)) if any(labels) else math.nan,
            **{f"loss/{name}": loss / count for name, (loss, count) in sorted(named.items()) if count},
            "pad_fraction": counts["pad_tokens"] / positions if positions else 0.0,
            "tokens": counts["tokens"],
            "learned": sum(count for name, (_, count) in named.items() if name.startswith("modality/")),
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
