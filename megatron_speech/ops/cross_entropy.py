"""The output head and its loss in one operation, without ever holding the logits of a whole batch.

The head of a speech model is its hot spot: 194 k ids × hidden. Rows whose loss weight is zero never come here, the
others come in chunks; each chunk's logits live only as long as it takes to reduce them, and all chunks share one
buffer. Softmax is in fp32. Under tensor parallelism every rank holds some rows of the table, and the ranks exchange a
maximum and two or three sums per row (Megatron-LM, arXiv:1909.08053, section 3), in one collective per chunk.

The gradients are made in the forward pass. What each row's loss counts for in the total (its weight over the
normaliser of the global batch) is known before it, so the gradient of a chunk's logits is known while they are at
hand: one product with the table less than computing them again in the backward pass, no probabilities to keep, and
memory that does not grow with the number of rows (Liger Kernel, arXiv:2410.10989, section 3.2). What is left for the
backward pass is a multiplication by the gradient of the total.

Letters in names: N rows, n rows of a chunk, H hidden, V rows of the table on this rank, R of them ids that exist.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# Elements (fp32) of a chunk's logits: on a GPU 1 GiB, enough rows at 194 k ids to fill its matrix units and to make
# reading and writing the weight gradient once per chunk cheap; on a CPU 8 MiB, near its caches.
_CHUNK_ELEMENTS_CPU = 1 << 21
_CHUNK_ELEMENTS_CUDA = 1 << 28
# However large the table: below this, products with it are slowed down by its memory traffic (at 194 k ids: 97 MiB).
_MIN_CHUNK_ROWS = 128
# On a CPU: with fewer, adding a bf16 product to the fp32 weight gradient takes longer than an fp32 product in place.
_MIN_NARROW_ROWS = 512


# (log p fp32 [n] of the labels of some rows, which rows: a slice of 0 … N with both ends)
# → (their losses [n], d loss / d log p [n]), both fp32.
Objective = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


class LinearLoss(NamedTuple):
    """What :func:`linear_cross_entropy` returns; all fp32.

    total: scalar, Σ row weight · loss. It alone carries a gradient. losses: [N], what is minimised, smoothing and
    z-loss included, or what the objective gave. cross_entropy: [N], −log softmax(hidden · weightᵀ)[label], for reports.
    """

    total: Tensor
    losses: Tensor
    cross_entropy: Tensor


def linear_cross_entropy(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    row_weights_N: Tensor | None = None,
    *,
    vocab_size: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    objective: Objective | None = None,
    group: dist.ProcessGroup | None = None,
    chunk_rows: int | None = None,
) -> LinearLoss:
    """Weighted sum of the cross-entropies of logits = hidden · weightᵀ.

    With K = `vocab_size` ids, Z = Σ_k exp(logit_k) over them, ε = `label_smoothing` and ζ = `z_loss`, a row's loss is

        (1 − ε) · (log Z − logit_label) + ε · (log Z − 1/K · Σ_k logit_k) + ζ · (log Z)²

    that is, cross-entropy against (1 − ε) on the label and ε/K on every id, the label among them (Szegedy et al.,
    arXiv:1512.00567; `torch.nn.functional.cross_entropy` defines it alike), and the auxiliary loss that keeps log Z
    near zero (PaLM, arXiv:2204.02311, section 5: ζ = 1e-4). Rows of the table beyond the ids that exist take no part
    in any of it.

    With an `objective` a row's loss is whatever that makes of log p of its label, which is log softmax of its logits
    at it (a ratio to another policy's, clipped; a preference): with g = d loss/d log p, the gradient of the logits is
    row weight · g · ([k is the label] − p_k).

    Args:
        hidden_NH: [N, H] rows, fp32 or bf16; N may be 0.
        weight_VH: [V, H] this rank's rows of the table, of the same dtype; rank r of `group` holds ids
            r·V … (r+1)·V − 1.
        labels_N: [N] int64 ids, all below `vocab_size`.
        row_weights_N: [N] fp32, what a row's loss counts for in the total; None: 1. Of any sign, and any sum.
            Constants: they get no gradient.
        vocab_size: ids that exist. Rows of the table beyond it are padding: they get no probability and no gradient.
        label_smoothing, z_loss: ε and ζ above; 0 with an `objective`.
        objective: instead of the cross-entropy; called once per chunk, in order, without autograd and with fp32
            log p. It must not make the host wait for the device. Under tensor parallelism every rank calls it with the
            same numbers, and it must give the same on all.
        group: tensor-parallel group, None for one process. All of its ranks give the same rows and get the same loss.
        chunk_rows: rows at once; chosen by size if None.

    In bf16 the elements of the gradients are rounded, which is up to 1e-2 of the largest of them. A CPU rounds the
    logits too, by 1/512 of their value: probabilities are off by as much as that, and gradients by up to 1e-2 +
    max |logit| / 256 of their largest element, where the target leaves one (with smoothing; measured: 1.4e-2, 2.2e-2,
    7.4e-2 and 1.5e-1 at smoothing 0.99, one row at a time and logits up to 6, 20, 65 and 195). A GPU's logits are fp32.

    Returns:
        The total and, without gradients, the losses by row. The gradient of the total with respect to `hidden_NH` is
        this rank's part of a sum over `group`. It can be taken once: the first backward pass hands its memory on.

    Raises:
        ValueError: a label is no id (checked on CPU only: elsewhere it would make the host wait; there such a label
            has the logit 0); an objective beside smoothing or z-loss, or one that gives something else than two
            numbers a row.
    """
    if objective is not None and (label_smoothing or z_loss):
        raise ValueError(
            f"an objective takes the place of the cross-entropy, but label_smoothing is {label_smoothing:g} and z_loss "
            f"{z_loss:g}; set both to 0 or leave the objective out"
        )
    rows = labels_N.shape[0]
    if labels_N.device.type == "cpu" and rows and not 0 <= int(labels_N.min()) <= int(labels_N.max()) < vocab_size:
        raise ValueError(f"labels lie in {int(labels_N.min())}…{int(labels_N.max())}, ids in 0…{vocab_size - 1}")
    if row_weights_N is None:
        row_weights_N = torch.ones(rows, dtype=torch.float32, device=labels_N.device)
    # Without autograd (validation) the inputs still say that they require gradients.
    grad = torch.is_grad_enabled()
    wanted = grad and hidden_NH.requires_grad, grad and weight_VH.requires_grad
    total, per_row = _LinearCrossEntropy.apply(
        hidden_NH,
        weight_VH,
        labels_N,
        row_weights_N,
        vocab_size,
        label_smoothing,
        z_loss,
        objective,
        group,
        chunk_rows,
        wanted,
    )
    return LinearLoss(total, per_row[0], per_row[1])


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        labels_N: Tensor,
        row_weights_N: Tensor,
        vocab_size: int,
        label_smoothing: float,
        z_loss: float,
        objective: Objective | None,
        group: dist.ProcessGroup | None,
        chunk_rows: int | None,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor]:
        ranks = dist.get_world_size(group) if group is not None else 1
        first = (dist.get_rank(group) if ranks > 1 else 0) * weight_VH.shape[0]
        # Slicing the padding off is cheaper than masking it, and as final.
        real = max(0, min(weight_VH.shape[0], vocab_size - first))
        table_RH, local_N = weight_VH[:real], labels_N - first
        rows, device = hidden_NH.shape[0], hidden_NH.device
        if chunk_rows is None:
            elements = _CHUNK_ELEMENTS_CPU if device.type == "cpu" else _CHUNK_ELEMENTS_CUDA
            chunk_rows = max(_MIN_CHUNK_ROWS, elements // max(1, real) // 64 * 64)
        buffer = torch.empty(min(rows, chunk_rows), real, dtype=torch.float32, device=device)
        losses = torch.empty(2, rows, dtype=torch.float32, device=device)  # as minimised, plain
        d_hidden = torch.empty_like(hidden_NH) if wanted[0] else None
        d_weight = _WeightGradient(weight_VH, real, chunks=-(-rows // chunk_rows)) if wanted[1] else None
        for start in range(0, rows, chunk_rows):
            part = slice(start, min(start + chunk_rows, rows))
            hidden, weights = hidden_NH[part], row_weights_N[part]
            logits = _product(hidden, table_RH.t(), out=buffer[: hidden.shape[0]])
            own = (local_N[part] >= 0) & (local_N[part] < real)
            index = torch.where(own, local_N[part], 0).unsqueeze(1)
            # From here on `logits` holds exp(logit − maximum).
            maximum, stats = _reduce(logits, own, index, smoothed=label_smoothing > 0.0)
            if ranks > 1:
                stats = _combine(stats, ranks, group)
            shift, total, target, *logit_sum = stats.unbind(0)
            log_z = shift + total.log()
            plain = total.log() - (target - shift)
            loss = plain
            if label_smoothing:
                loss = torch.lerp(plain, log_z - logit_sum[0] / vocab_size, label_smoothing)
            if z_loss:
                loss = loss + z_loss * log_z.square()
            if objective is not None:
                loss, d_log_p = _apply(objective, -plain, part)
                weights = -d_log_p * weights  # the cross-entropy has d loss/d log p = −1
            losses[0, part], losses[1, part] = loss, plain
            if d_hidden is None and d_weight is None:
                continue
            # d loss/d logit_k = p_k · (1 + 2ζ log Z) − (1 − ε)·[k is the label] − ε/K
            factor = weights * (1.0 + 2.0 * z_loss * log_z) if z_loss else weights
            factor = factor * (maximum - shift).exp() / total
            uniform = weights * (label_smoothing / vocab_size)
            peak = torch.where(own, weights * (1.0 - label_smoothing), 0)
            at_label = _gather(logits, index) * factor - uniform - peak
            # Rounded as it is written where both products read it so; one of a CPU's may want it in fp32.
            wide = hidden.shape[0] < _MIN_NARROW_ROWS and device.type == "cpu"
            gradient = logits if wide else _like(logits, hidden.dtype)
            if label_smoothing:  # rounded once, after the subtraction, in which p and ε/K may nearly cancel
                torch.sub(logits.mul_(factor.unsqueeze(1)), uniform.unsqueeze(1), out=gradient)
            else:
                torch.mul(logits, factor.unsqueeze(1), out=gradient)
            if real:
                # Labels of other ranks write at index 0 what is there already.
                gradient.scatter_(1, index, at_label.to(gradient.dtype).unsqueeze(1))
            if d_weight is not None:
                d_weight.add(gradient, hidden)
            if d_hidden is not None:
                torch.mm(gradient.to(hidden.dtype), table_RH, out=d_hidden[part])
        ctx.mark_non_differentiable(losses)
        ctx.gradients = d_hidden, None if d_weight is None else d_weight.tensor, weight_VH.dtype
        return torch.dot(losses[0], row_weights_N), losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradient of linear_cross_entropy was taken before: it can be taken once")
        (d_hidden, d_weight, dtype), ctx.gradients = ctx.gradients, None
        if d_hidden is not None:
            d_hidden.mul_(gradients[0])
        if d_weight is not None:
            same = d_weight.dtype == dtype
            d_weight = torch.mul(d_weight, gradients[0], out=d_weight if same else d_weight.new_empty(0, dtype=dtype))
        return d_hidden, d_weight, *[None] * 9


def _apply(objective: Objective, log_p_n: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """What `objective` makes of a chunk, in fp32."""
    found = objective(log_p_n, part)
    shapes = [tuple(tensor.shape) for tensor in found]
    if shapes != [tuple(log_p_n.shape)] * 2:
        raise ValueError(
            f"the objective gave shapes {shapes} for rows {part.start} to {part.stop}; needed are the loss and "
            f"d loss/d log p of each, both {tuple(log_p_n.shape)}"
        )
    loss_n, d_log_p_n = (tensor.to(log_p_n.dtype) for tensor in found)
    return loss_n, d_log_p_n


class _WeightGradient:
    """Σ over chunks of gradientᵀ · hidden, for the first `real` rows of the table; zero in the others.

    Several chunks are added up in fp32, on a GPU and of fp32 products without a [V, H] tensor besides the sum itself;
    of one alone a GPU rounds the product as it comes.
    """

    def __init__(self, weight_VH: Tensor, real: int, chunks: int) -> None:
        one = chunks == 1 and weight_VH.device.type != "cpu"
        self.tensor = torch.empty_like(weight_VH, dtype=weight_VH.dtype if one else torch.float32)
        self._sum_RH = self.tensor[:real]
        (self.tensor[real:] if chunks else self.tensor).zero_()
        self._empty = True

    def add(self, gradient_nR: Tensor, hidden_nH: Tensor) -> None:
        """Add one chunk: `gradient_nR` fp32, or of the dtype of `hidden_nH`."""
        if gradient_nR.dtype == torch.float32:
            self._sum_RH.addmm_(gradient_nR.t(), hidden_nH.float(), beta=0 if self._empty else 1)
        elif self._empty:
            _product(gradient_nR.t(), hidden_nH, out=self._sum_RH)
        elif self._sum_RH.device.type == "cpu":
            self._sum_RH += gradient_nR.t() @ hidden_nH
        else:
            torch.addmm(self._sum_RH, gradient_nR.t(), hidden_nH, out_dtype=torch.float32, out=self._sum_RH)
        self._empty = False


def _like(logits_nR: Tensor, dtype: torch.dtype) -> Tensor:
    """Where the gradient of the logits goes: the logits' own place if it takes as much room."""
    return logits_nR if dtype == logits_nR.dtype else torch.empty_like(logits_nR, dtype=dtype)


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """The product, in `out`, which may be fp32 where a and b are bf16: a GPU then rounds nothing in between."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.device.type == "cpu":
        return out.copy_(a @ b)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def _gather(logits_nR: Tensor, index_n1: Tensor) -> Tensor:
    return logits_nR.gather(1, index_n1).squeeze(1) if logits_nR.shape[1] else logits_nR.new_zeros(logits_nR.shape[0])


def _reduce(logits_nR: Tensor, own_n: Tensor, index_n1: Tensor, *, smoothed: bool) -> tuple[Tensor, Tensor]:
    """(maximum [n], statistics [3 or 4, n]) of this rank's logits, which become exp(logit − maximum).

    Statistics: maximum, Σ exp(logit − maximum), the label's logit (0 where another rank has it) and, if `smoothed`,
    the sum of the logits.
    """
    if not logits_nR.shape[1]:  # a rank that holds nothing but padding
        stats = logits_nR.new_zeros(4 if smoothed else 3, logits_nR.shape[0])
        stats[0] = float("-inf")
        return stats[0], stats
    maximum = logits_nR.amax(-1)
    target = torch.where(own_n, _gather(logits_nR, index_n1), 0)
    logit_sum = [logits_nR.sum(-1)] if smoothed else []
    logits_nR.sub_(maximum.unsqueeze(1)).exp_()
    return maximum, torch.stack((maximum, logits_nR.sum(-1), target, *logit_sum))


def _combine(stats: Tensor, ranks: int, group: dist.ProcessGroup | None) -> Tensor:
    """The same statistics of the whole vocabulary, the same to the bit on every rank."""
    every = stats.new_empty(ranks, *stats.shape)
    dist.all_gather(list(every.unbind(0)), stats, group=group)
    maximum = every[:, 0].amax(0)
    total = (every[:, 1] * (every[:, 0] - maximum).exp()).sum(0)
    return torch.cat((torch.stack((maximum, total)), every[:, 2:].sum(0)))
