"""Cross-entropy of a language-model head, without ever holding the logits of a whole batch.

The head of a speech model is its hot spot: 194 k ids × hidden. Rows whose loss weight is zero never come here, the
others come in chunks; each chunk's logits live only as long as it takes to reduce them. With `keep_bytes` to spare
they are kept for the backward pass; otherwise they are computed again there. Softmax is in fp32. Under tensor
parallelism every rank holds some rows of the table and the ranks exchange one maximum and two sums per row
(Megatron-LM, arXiv:1909.08053, section 3).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Elements (fp32) of a chunk's logits: large enough for a full matrix product, small beside the activations.
_CHUNK_ELEMENTS_CPU = 1 << 21
_CHUNK_ELEMENTS_CUDA = 1 << 28
_KEEP_BYTES_CPU = 1 << 28


def linear_cross_entropy(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    chunk_rows: int | None = None,
    keep_bytes: int | None = None,
) -> Tensor:
    """−log softmax(hidden · weightᵀ)[label] for every row.

    Args:
        hidden_NH: [N, H] rows, fp32 or bf16; N may be 0.
        weight_VH: [V, H] this rank's rows of the table, of the same dtype; rank r of `group` holds ids
            r·V … (r+1)·V − 1.
        labels_N: [N] int64 ids, all below `vocab_size`.
        vocab_size: ids that exist. Rows of the table beyond it are padding: they get no probability and no gradient.
        group: tensor-parallel group, None for one process.
        chunk_rows: rows at once; chosen by size if None.
        keep_bytes: keep the probabilities for the backward pass if they take no more than this (default 256 MiB on
            CPU, 0 on CUDA); otherwise they are computed again.

    Returns:
        [N] fp32. The gradient with respect to `hidden_NH` is this rank's part of a sum over `group`.

    Raises:
        ValueError: a label is no id (checked on CPU only: elsewhere it would make the host wait).
    """
    loss: Tensor = _LinearCrossEntropy.apply(hidden_NH, weight_VH, labels_N, vocab_size, group, chunk_rows, keep_bytes)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        labels_N: Tensor,
        vocab_size: int,
        group: dist.ProcessGroup | None,
        chunk_rows: int | None,
        keep_bytes: int | None,
    ) -> Tensor:
        ranks = dist.get_world_size(group) if group is not None else 1
        first = (dist.get_rank(group) if ranks > 1 else 0) * weight_VH.shape[0]
        # Slicing the padding off is cheaper than masking it, and as final.
        real = max(0, min(weight_VH.shape[0], vocab_size - first))
        rows = hidden_NH.shape[0]
        on_cpu = hidden_NH.device.type == "cpu"
        if on_cpu and rows and not 0 <= int(labels_N.min()) <= int(labels_N.max()) < vocab_size:
            raise ValueError(f"labels lie in {int(labels_N.min())}…{int(labels_N.max())}, ids in 0…{vocab_size - 1}")
        if chunk_rows is None:
            elements = _CHUNK_ELEMENTS_CPU if on_cpu else _CHUNK_ELEMENTS_CUDA
            chunk_rows = max(64, elements // max(1, real))
        if keep_bytes is None:
            keep_bytes = _KEEP_BYTES_CPU if on_cpu else 0
        keep = 4 * rows * real <= keep_bytes
        table = weight_VH[:real]
        local_N = labels_N - first
        loss_N = hidden_NH.new_empty(rows, dtype=torch.float32)
        normaliser_N = torch.empty_like(loss_N)
        kept: list[Tensor] = []
        for start in range(0, rows, chunk_rows):
            part = slice(start, start + chunk_rows)
            logits = (hidden_NH[part] @ table.t()).float()
            maximum = logits.amax(-1) if real else logits.new_full((logits.shape[0],), float("-inf"))
            if ranks > 1:
                dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
            logits.sub_(maximum.unsqueeze(-1))
            own, index = _own_labels(local_N[part], real)
            target = logits.gather(1, index).squeeze(1) * own if real else torch.zeros_like(maximum)
            logits.exp_()
            total = logits.sum(-1)
            if ranks > 1:
                sums = torch.stack((target, total))
                dist.all_reduce(sums, group=group)
                target, total = sums.unbind(0)
            loss_N[part] = total.log() - target
            if keep:
                normaliser_N[part] = total
                kept.append(logits)
            else:
                normaliser_N[part] = total.log_().add_(maximum)
        ctx.save_for_backward(hidden_NH, weight_VH, local_N, normaliser_N, *kept)
        ctx.real, ctx.chunk_rows, ctx.keep = real, chunk_rows, keep
        return loss_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, local_N, normaliser_N, *kept = ctx.saved_tensors
        table = weight_VH[: ctx.real]
        d_hidden = torch.empty_like(hidden_NH)
        d_weight = torch.zeros_like(weight_VH, dtype=torch.float32)
        for number, start in enumerate(range(0, hidden_NH.shape[0], ctx.chunk_rows)):
            part = slice(start, start + ctx.chunk_rows)
            gradient = gradients[0][part]
            if ctx.keep:
                # A second backward through a retained graph needs the exponentials again.
                logits = kept[number] * (gradient / normaliser_N[part]).unsqueeze(-1)
            else:
                logits = (hidden_NH[part] @ table.t()).float()
                logits.sub_(normaliser_N[part].unsqueeze(-1)).exp_().mul_(gradient.unsqueeze(-1))
            own, index = _own_labels(local_N[part], ctx.real)
            if ctx.real:
                logits.scatter_add_(1, index, (-gradient * own).unsqueeze(-1))
            logits = logits.to(hidden_NH.dtype)
            torch.mm(logits, table, out=d_hidden[part])
            if hidden_NH.dtype == torch.float32:
                d_weight[: ctx.real].addmm_(logits.t(), hidden_NH[part])
            else:
                d_weight[: ctx.real] += logits.t() @ hidden_NH[part]
        return d_hidden, d_weight.to(weight_VH.dtype), None, None, None, None, None


def _own_labels(local: Tensor, real: int) -> tuple[Tensor, Tensor]:
    """Which labels this rank holds ([n] bool), and their index in its rows ([n, 1], 0 for the others')."""
    own = (local >= 0) & (local < real)
    return own, torch.where(own, local, 0).unsqueeze(1)


def reference_cross_entropy(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor, vocab_size: int) -> Tensor:
    """The same in two lines, with every logit in memory: what :func:`linear_cross_entropy` is tested against."""
    logits_NV = (hidden_NH @ weight_VH[:vocab_size].t()).float()
    return torch.nn.functional.cross_entropy(logits_NV, labels_N, reduction="none")
