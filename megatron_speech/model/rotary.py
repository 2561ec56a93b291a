"""RoPE: the tables of a micro-batch, and the rotation of heads by them.

Shapes: T tokens, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Rotary = tuple[Tensor, Tensor]


def rotary_tables(inverse_frequency: Tensor, position_ids: Tensor) -> Rotary:
    """RoPE's cos and sin, each [T, 1, D/2] fp32 (arXiv:2104.09864; halves of a head form the pairs)."""
    angles = position_ids.float().unsqueeze(-1) * inverse_frequency
    return angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """Turn [*, heads, D] in place by the angles [*, 1, D/2] (back, if `inverse`)."""
    first, second = x.chunk(2, dim=-1)
    sign = -1.0 if inverse else 1.0
    crossed = first * sin
    first.mul_(cos).addcmul_(second, sin, value=-sign)
    second.mul_(cos).add_(crossed, alpha=sign)
    return x


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """:func:`rotate_` of a copy, with a gradient."""
    turned: Tensor = _Rotate.apply(x, cos, sin)
    return turned


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate_(x.clone(memory_format=torch.contiguous_format), cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotate_(gradients[0].clone(), cos, sin, inverse=True), None, None
