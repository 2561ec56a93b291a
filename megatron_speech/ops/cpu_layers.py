"""Attention, RMSNorm and SwiGLU on a CPU, compiled (`csrc/layers.cpp`): one pass over memory each, fp32 inside.

Each is an autograd function over fp32 or bf16 tensors. Callers ask :func:`usable` first and have a reference of plain
PyTorch for where it says no: another dtype or device, or no compiler when the package was installed.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

# Raised together with kInterface in csrc/layers.cpp whenever a signature changes.
INTERFACE = 2

_DTYPES = (torch.float32, torch.bfloat16)


@functools.cache
def _kernels() -> ModuleType | None:
    """The compiled module; None where it was not built, is of other sources, or is switched off."""
    if os.environ.get("MEGATRON_SPEECH_NO_EXTENSION", "0") not in ("", "0"):
        return None
    try:
        module = importlib.import_module("megatron_speech._layers")
    except ImportError:
        return None
    return module if getattr(module, "interface", None) == INTERFACE else None


def built() -> bool:
    """Whether the kernels are there."""
    return _kernels() is not None


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels take these tensors: on a CPU, all of one of the two dtypes."""
    first = tensors[0].dtype
    return (
        first in _DTYPES
        and all(tensor.device.type == "cpu" and tensor.dtype == first for tensor in tensors)
        and _kernels() is not None
    )


def _module() -> ModuleType:
    module = _kernels()
    assert module is not None, "ask usable() first"
    return module


def _heads(tensor: Tensor) -> tuple[int, int, int]:
    """Address and strides of [tokens, heads, width]; the last dimension is contiguous."""
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(1)


def _rows_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def packed_attention(
    query_THD: Tensor,
    key_TGD: Tensor,
    value_TGD: Tensor,
    cos: Tensor,
    sin: Tensor,
    segments: Tensor,
    scale: float,
) -> Tensor:
    """Causal attention within documents that lie end to end, RoPE of queries and keys included.

    Args:
        query_THD: [T, H, D], fp32 or bf16; any strides that leave the last dimension contiguous.
        key_TGD: [T, G, D] of the same dtype, H a multiple of G.
        value_TGD: [T, G, D].
        cos, sin: fp32 of T·D/2 elements: the angles of every token (halves of a head form the pairs).
        segments: [n, 2] int64, first token and tokens of each document; none overlaps another.
        scale: of the scores.

    Returns:
        [T, H, D]; zero at tokens that are in no segment, which get zero gradients too.
    """
    result: Tensor = _Attention.apply(query_THD, key_TGD, value_TGD, cos, sin, segments, scale)
    return result


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, segments: Tensor, scale: float
    ) -> Tensor:
        query, key, value = (_rows_contiguous(tensor) for tensor in (query, key, value))
        out = query.new_zeros(query.shape)
        saved = query, key, value, cos, sin, segments, out
        ctx.save_for_backward(*saved)
        ctx.scale = scale
        _attend(False, saved, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradients_of_inputs = tuple(torch.zeros_like(tensor) for tensor in ctx.saved_tensors[:3])
        _attend(True, ctx.saved_tensors, ctx.scale, _rows_contiguous(gradients[0]), *gradients_of_inputs)
        return (*gradients_of_inputs, None, None, None, None)


def _attend(backward: bool, saved: Sequence[Tensor], scale: float, *gradients: Tensor) -> None:
    query, key, value, cos, sin, segments, out = saved
    tensors = (query, key, value, out, *gradients)
    _module().attention(
        backward,
        query.dtype == torch.bfloat16,
        tuple(_heads(tensor) for tensor in tensors) + ((),) * (8 - len(tensors)),
        cos.data_ptr(),
        sin.data_ptr(),
        segments.data_ptr(),
        segments.shape[0],
        *query.shape[:2],
        *key.shape[1:],
        scale,
        torch.get_num_threads(),
    )


def rms_norm(x_TH: Tensor, weight_H: Tensor, epsilon: float) -> Tensor:
    """RMSNorm, x / √(mean(x²) + ε) · weight over the last dimension (arXiv:1910.07467): [T, H] → [T, H]."""
    result: Tensor = _RMSNorm.apply(x_TH, weight_H, epsilon)
    return result


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        x = x.contiguous()
        out, scale = torch.empty_like(x), torch.empty(x.shape[0], dtype=torch.float32)
        ctx.save_for_backward(x, weight, scale)
        _norm(False, x, weight, scale, epsilon, out=out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        d_x, d_weight = torch.empty_like(x), torch.empty(weight.shape, dtype=torch.float32)
        _norm(True, x, weight, scale, 0.0, d_out=gradients[0].contiguous(), d_x=d_x, d_weight=d_weight)
        return d_x, d_weight.to(weight.dtype), None


def _norm(
    backward: bool,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    epsilon: float,
    *,
    out: Tensor | None = None,
    d_out: Tensor | None = None,
    d_x: Tensor | None = None,
    d_weight: Tensor | None = None,
) -> None:
    addresses = (0 if tensor is None else tensor.data_ptr() for tensor in (x, weight, scale, out, d_out, d_x, d_weight))
    bf16 = x.dtype == torch.bfloat16
    _module().rms_norm(backward, bf16, *addresses, *x.shape, epsilon, torch.get_num_threads())


def swiglu(x: Tensor) -> Tensor:
    """SwiGLU, silu(gate)·linear (arXiv:2002.05202) of `[..., 2·ffn]` = gate | linear → `[..., ffn]`."""
    result: Tensor = _SwiGLU.apply(x)
    return result


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
        _glu(False, x, out=out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        d_x = torch.empty_like(x)
        _glu(True, x, d_out=gradients[0].contiguous(), d_x=d_x)
        return d_x


def _glu(
    backward: bool, x: Tensor, *, out: Tensor | None = None, d_out: Tensor | None = None, d_x: Tensor | None = None
) -> None:
    addresses = (0 if tensor is None else tensor.data_ptr() for tensor in (x, out, d_out, d_x))
    width = x.shape[-1] // 2
    _module().swiglu(
        backward, x.dtype == torch.bfloat16, *addresses, x.numel() // (2 * width), width, torch.get_num_threads()
    )
