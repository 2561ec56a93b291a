"""Attention over packed documents (:mod:`megatron_speech.model.packed`), and with the keys of a generation.

Shapes: T tokens, H query heads and G key heads of this rank, D head width, n documents of a bucket, L their padded
length.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_speech.model.kv_cache import KeyValueCache
from megatron_speech.model.packed import PackedSequences, PaddedLayout
from megatron_speech.model.rotary import rotate, rotate_
from megatron_speech.ops import cpu_layers


@functools.cache
def varlen_kernel() -> tuple[Callable[..., Any], frozenset[str]] | None:
    """The attention of torch over documents end to end, and the names of its arguments; None where torch has none.

    Not imported at the top: it brings torch.compile's half of torch with it, seconds of every command on a CPU.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # torch < 2.10
        return None
    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


class _Gather(torch.autograd.Function):
    """[T, heads, D] queries, keys, values → per bucket three [n, L, heads, D], queries and keys turned.

    The result has the dtype of `cos` and `sin`: on CPU attention runs in fp32 whatever the model's precision, since
    torch's bf16 kernel takes several times as long there.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, layout: PaddedLayout
    ) -> tuple[Tensor, ...]:
        ctx.layout, ctx.dtype = layout, query.dtype
        ctx.save_for_backward(cos, sin)
        out: list[tuple[Tensor, ...]] = []
        slot_cos, slot_sin = cos.index_select(0, layout.slots), sin.index_select(0, layout.slots)
        for number, tensor in enumerate((query, key, value)):
            padded = tensor.index_select(0, layout.slots).to(cos.dtype)
            if number < 2:
                rotate_(padded, slot_cos, slot_sin)
            parts = padded.split([count * length for count, length in layout.buckets])
            out.append(
                tuple(
                    part.view(count, length, *padded.shape[1:])
                    for part, (count, length) in zip(parts, layout.buckets, strict=True)
                )
            )
        return tuple(itertools.chain.from_iterable(zip(*out, strict=True)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        result: list[Tensor | None] = []
        for number in range(3):
            parts = [gradient.flatten(0, 1) for gradient in gradients[number::3]]
            padded = parts[0] if len(parts) == 1 else torch.cat(parts)
            flat = padded.index_select(0, ctx.layout.inverse)
            if number < 2:
                rotate_(flat, cos, sin, inverse=True)
            result.append(flat.to(ctx.dtype))
        return (*result, None, None, None)


class _Scatter(torch.autograd.Function):
    """Per bucket [n, L, H, D] → [T, H, D] of the given dtype."""

    @staticmethod
    def forward(ctx: Any, layout: PaddedLayout, dtype: torch.dtype, *parts: Tensor) -> Tensor:
        ctx.layout, ctx.dtype = layout, parts[0].dtype
        flat = [part.flatten(0, 1) for part in parts]
        padded = flat[0] if len(flat) == 1 else torch.cat(flat)
        return padded.index_select(0, layout.inverse).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        layout, gradient = ctx.layout, gradients[0].to(ctx.dtype)
        # Slots beyond a document's end must get no gradient: they hold copies of real keys.
        padded = gradient.new_zeros((layout.slots.shape[0], *gradient.shape[1:]))
        padded.index_copy_(0, layout.inverse, gradient)
        parts = padded.split([count * length for count, length in layout.buckets])
        return (
            None,
            None,
            *(
                part.view(count, length, *gradient.shape[1:])
                for part, (count, length) in zip(parts, layout.buckets, strict=True)
            ),
        )


class PackedSdpaAttention(nn.Module):
    """Causal attention in which every document sees only itself; a `core_attention` for megatron-core's specs.

    RoPE is applied here, where the keys of a generation enter the cache. fp32 and bf16. On CUDA in bf16 the varlen
    kernel of torch ≥ 2.10 takes the packed tokens as they are, on a CPU our own (`ops.cpu_layers`); elsewhere the
    documents are gathered into a few rectangles (:class:`PaddedLayout`) for `scaled_dot_product_attention`, in fp32 if
    on CPU.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__()
        if config.context_parallel_size > 1:
            raise ValueError("context parallelism needs the Transformer Engine back-end")
        self.layer_number = layer_number
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> Tensor:
        """[T, 1, H, D], [T, 1, G, D], [T, 1, G, D] → [T, 1, H·D]."""
        packed = packed_seq_params
        if not isinstance(packed, PackedSequences) or packed.rotary is None:
            raise TypeError("this attention needs the PackedSequences of the micro-batch as packed_seq_params")
        query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        cos, sin = packed.rotary
        if query.is_cuda:
            cos, sin = cos.to(query.dtype), sin.to(query.dtype)
        if packed.state is not None:
            out = self._cached(query, key, value, cos, sin, packed)
        elif query.is_cuda and query.dtype != torch.float32 and varlen_kernel() is not None:
            out = self._varlen(rotate(query, cos, sin), rotate(key, cos, sin), value, packed)
        else:
            out = self._documents(query, key, value, cos, sin, packed)
        return out.reshape(out.shape[0], 1, -1)

    def _documents(
        self, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, packed: PackedSequences
    ) -> Tensor:
        if packed.segments is not None:
            return cpu_layers.packed_attention(query, key, value, cos, sin, packed.segments, self.scale)
        return self._padded(query, key, value, cos, sin, packed)

    def _padded(
        self, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, packed: PackedSequences
    ) -> Tensor:
        assert packed.layout is not None
        gathered = _Gather.apply(query, key, value, cos, sin, packed.layout)
        grouped = query.shape[1] != key.shape[1]
        outputs = []
        for first in range(0, len(gathered), 3):
            q, k, v = (tensor.transpose(1, 2) for tensor in gathered[first : first + 3])
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=grouped)
            outputs.append(attended.transpose(1, 2))
        result: Tensor = _Scatter.apply(packed.layout, query.dtype, *outputs)
        return result

    def _varlen(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences) -> Tensor:
        kernel = varlen_kernel()
        assert kernel is not None
        attend, arguments = kernel
        # torch 2.10 has is_causal, later ones a window that reaches back without end and forward not at all.
        options: dict[str, Any] = {"is_causal": True} if "is_causal" in arguments else {"window_size": (-1, 0)}
        if query.shape[1] != key.shape[1]:
            if "enable_gqa" in arguments:
                options["enable_gqa"] = True
            else:
                key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        result: Tensor = attend(
            query,
            key,
            value.contiguous(),
            packed.cu_seqlens_q,
            packed.cu_seqlens_kv,
            packed.max_seqlen_q,
            packed.max_seqlen_kv,
            scale=self.scale,
            **options,
        )
        return result

    def _cached(
        self, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, packed: PackedSequences
    ) -> Tensor:
        assert packed.state is not None
        cache = packed.state.of(self.layer_number, KeyValueCache)
        # The cache has the dtype of the tables: fp32 on CPU, where attention runs in fp32.
        keys = rotate_(key.to(cos.dtype, copy=True), cos, sin)
        cache.store(keys, value.to(cos.dtype))
        if packed.decoding:
            turned = rotate_(query.to(cos.dtype, copy=True, memory_format=torch.contiguous_format), cos, sin)
            return cache.attend(turned, self.scale).to(query.dtype)
        return self._documents(query, key, value, cos, sin, packed)
