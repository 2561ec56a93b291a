"""What one tensor-parallel rank does with the output head: its rows of the table, everybody's rows of hidden states."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_speech.ops.cross_entropy import linear_cross_entropy

ROWS, WIDTH, CHUNK = 200, 32, 48


def inputs(dtype: torch.dtype, real: int, padded: int) -> tuple[torch.Tensor, ...]:
    """Hidden states, the whole table, labels and row weights, the same on every rank."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(ROWS, WIDTH, generator=generator).to(dtype)
    table = (0.4 * torch.randn(padded, WIDTH, generator=generator)).to(dtype)
    labels = torch.randint(0, real, (ROWS,), generator=generator)
    weights = torch.rand(ROWS, generator=generator) / ROWS
    return hidden, table, labels, weights


def squared(log_p: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """(log p)² times the number of the row, and its derivative."""
    number = torch.arange(rows.start, rows.stop)
    return number * log_p.square(), 2 * number * log_p


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1, "z_loss": 1e-3},
    "objective": {"objective": squared},
}


def head(rank: int, world_size: int, directory: str, real: int, padded: int) -> None:
    """Losses and gradients of this rank for each dtype, plain, with everything and of an objective, to `directory`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=world_size)
    found = {}
    for dtype, (kind, options) in itertools.product((torch.float32, torch.bfloat16), KINDS.items()):
        hidden, table, labels, weights = inputs(dtype, real, padded)
        own = table.chunk(world_size)[rank].clone().requires_grad_()
        hidden.requires_grad_()
        result = linear_cross_entropy(
            hidden,
            own,
            labels,
            weights,
            vocab_size=real,
            **options,
            group=dist.group.WORLD,
            chunk_rows=CHUNK,
        )
        result.total.backward()
        assert hidden.grad is not None
        whole = hidden.grad.float()  # the part of this rank: megatron-core's mappings add them up
        dist.all_reduce(whole)
        found[str(dtype), kind] = {
            "total": result.total.detach(),
            "losses": result.losses,
            "cross_entropy": result.cross_entropy,
            "hidden": whole,
            "table": own.grad,
        }
    torch.save(found, Path(directory, f"{rank}.pt"))
    dist.destroy_process_group()
