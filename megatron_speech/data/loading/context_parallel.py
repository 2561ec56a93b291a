"""Which tokens a context-parallel rank holds: two pieces of every document, one from its front and one from its back.

Transformer Engine's ring attention over packed documents cuts every document into 2·n equal pieces for n ranks; rank
r holds pieces r and 2·n−1−r, so that under causality all ranks have the same work. A document is therefore padded at
its end to a multiple of 2·n. Padding attends like any token of its document and is seen by none before it; it has no
loss.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch

from megatron_speech.data.loading.loader import MicroBatch
from megatron_speech.ops.loss_mask import NO_GROUP


@dataclasses.dataclass(frozen=True)
class Share:
    """One rank's tokens of a packed row.

    source: int64 [T], the token of the row at each of the rank's positions, -1 for padding; cu_seqlens: int32 [n+1],
    ends of the padded documents over all ranks, the last T·ranks.
    """

    source: np.ndarray
    cu_seqlens: np.ndarray


def padded_length(cu_seqlens: np.ndarray, ranks: int) -> int:
    """Tokens of a row with documents `cu_seqlens` (int, [n+1]) when each is padded for `ranks`."""
    multiple = 2 * ranks
    return int((-(-np.diff(cu_seqlens) // multiple) * multiple).sum())


def share(cu_seqlens: np.ndarray, ranks: int, rank: int, total: int) -> Share:
    """The tokens that `rank` of `ranks` holds.

    Args:
        cu_seqlens: int [n+1], ends of the documents of the row; empty ones are allowed.
        ranks, rank: the context-parallel group.
        total: length of the padded row, at least :func:`padded_length` and like it a multiple of 2·ranks; what is
            left over becomes one more document of padding.
    """
    multiple = 2 * ranks
    lengths = np.diff(cu_seqlens).astype(np.int64)
    padded = -(-lengths // multiple) * multiple
    left = total - int(padded.sum())
    if left < 0 or total % multiple:
        raise ValueError(f"{total} positions do not hold {int(padded.sum())} padded tokens in multiples of {multiple}")
    starts = np.append(cu_seqlens[:-1].astype(np.int64), cu_seqlens[-1])
    lengths, padded = np.append(lengths, 0), np.append(padded, left)
    piece = padded // multiple
    owner = np.repeat(np.arange(len(piece)), 2 * piece)
    # Position within the document's share: first the rank's piece from the front, then the one from the back.
    first = np.cumsum(2 * piece) - 2 * piece
    within = np.arange(len(owner)) - first[owner]
    back = within >= piece[owner]
    position = np.where(back, within + (multiple - 2 - 2 * rank) * piece[owner], within) + rank * piece[owner]
    source = np.where(position < lengths[owner], starts[owner] + position, -1)
    bounds = np.concatenate(([0], np.cumsum(padded)))
    return Share(source, bounds.astype(np.int32))


def share_micro_batches(batches: list[MicroBatch], ranks: int, rank: int, multiple: int = 1) -> list[MicroBatch]:
    """What of a step's micro-batches this rank computes.

    All get the same length, which pipelines need: that of the longest, so that a rank's part is a multiple of
    `multiple` (and even).
    """
    unit = ranks * math.lcm(2, multiple)
    longest = max((padded_length(batch.cu_seqlens.numpy(), ranks) for batch in batches), default=0)
    total = -(-longest // unit) * unit
    return [_share_micro_batch(batch, ranks, rank, total) for batch in batches]


def _share_micro_batch(batch: MicroBatch, ranks: int, rank: int, total: int) -> MicroBatch:
    """The tensors of `batch` as one row [1, total / ranks] (and K); `cu_seqlens` spans all ranks.

    Padding has token 0, no label, weight and group.
    """
    own = share(batch.cu_seqlens.numpy(), ranks, rank, total)
    index = torch.from_numpy(own.source)
    real, index = index >= 0, index.clamp(min=0)

    def pick(values: torch.Tensor, padding: float) -> torch.Tensor:
        picked = values.flatten(0, 1)[index]  # of several streams [T, K]
        return picked.masked_fill_(~real.view(-1, *[1] * (picked.dim() - 1)), padding)[None]

    return dataclasses.replace(
        batch,
        tokens=pick(batch.tokens, 0),
        labels=pick(batch.labels, -100),
        loss_weights=pick(batch.loss_weights, 0.0),
        position_ids=pick(batch.position_ids, 0),
        group_ids=pick(batch.group_ids, NO_GROUP),
        cu_seqlens=torch.from_numpy(own.cu_seqlens),
        row_pointers=torch.tensor([0, len(own.cu_seqlens) - 2], dtype=torch.int32),  # the last one is all padding
        max_seqlen=int(np.diff(own.cu_seqlens).max(initial=0)),
    )
