"""Transformer Engine without its kernels: modules of the same structure, in plain PyTorch, for megatron-core's spec.

The stand-ins have TE's parameters under TE's names, its `_extra_state`, its sharding and its contract for packed
documents, context parallelism included.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.extensions import transformer_engine
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron_speech.model import specs


def install(patch):
    """Make Transformer Engine seem to be there; `patch(object, name, value)` sets an attribute."""
    gpt_layer_specs.TESpecProvider = Provider
    patch(transformer_engine, "TENorm", Norm)
    patch(specs, "transformer_engine_missing", lambda: None)


class ExtraState:
    """TE keeps FP8's scales here; an empty tensor says that there are none."""

    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        assert state is None or state.numel() == 0
        self.restored = state


class Norm(ExtraState, torch.nn.Module):
    """te.pytorch.RMSNorm."""

    def __init__(self, config, hidden_size, eps=1e-5):
        super().__init__()
        self.eps, self.weight = eps, torch.nn.Parameter(torch.full((hidden_size,), 3.0))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class NormLinear(ExtraState, ColumnParallelLinear):
    """megatron-core's TELayerNormColumnParallelLinear."""

    def __init__(self, input_size, output_size, *, config, **options):
        options.pop("stride", None)
        super().__init__(input_size, output_size, config=config, **options)
        self.eps, self.layer_norm_weight = config.layernorm_epsilon, torch.nn.Parameter(torch.full((input_size,), 3.0))
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel

    def forward(self, x):
        return super().forward(F.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps))

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {"weight": 0, "bias": 0}, sharded_offsets
        )


class Linear(ExtraState, RowParallelLinear):
    """megatron-core's TERowParallelLinear."""


class _Gathered(torch.autograd.Function):
    """[T, …] of every context-parallel rank, in their order."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(group.size())]
        torch.distributed.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient, group=ctx.group)
        return gradient.chunk(ctx.group.size())[ctx.group.rank()], None


class Attention(torch.nn.Module):
    """megatron-core's TEDotProductAttention for `thd`: [T, heads, D], queries and keys already turned."""

    def __init__(self, config, layer_number, attn_mask_type, attention_type, **options):
        super().__init__()
        assert options.get("cp_comm_type") in (None, "p2p")

    def forward(self, query, key, value, attention_mask, *, attn_mask_type, attention_bias=None, packed_seq_params):
        assert packed_seq_params.qkv_format == "thd" and query.dim() == 3
        assert attn_mask_type.name == "causal"  # megatron-core makes padding_causal of it
        bounds = packed_seq_params.cu_seqlens_q.cpu().numpy()
        assert np.diff(bounds).max() <= packed_seq_params.max_seqlen_q
        group = parallel_state.get_context_parallel_group()
        ranks = group.size()
        assert ranks == 1 or packed_seq_params.cu_seqlens_q_padded is packed_seq_params.cu_seqlens_q
        places = [_places(bounds, rank, ranks) for rank in range(ranks)]
        own, everywhere = (torch.from_numpy(x) for x in (places[group.rank()], np.concatenate(places)))
        if ranks > 1:
            key, value = _Gathered.apply(key, group), _Gathered.apply(value, group)
        document = torch.from_numpy(np.repeat(np.arange(len(bounds) - 1), np.diff(bounds)))
        seen = (document[own][:, None] == document[everywhere]) & (own[:, None] >= everywhere)
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        return out[0].transpose(0, 1).flatten(1)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        return {}


def _places(bounds, rank, ranks):
    """Where a rank's tokens stand in the packed row: pieces r and 2n-1-r of every document, as TE's documentation has
    it; all of it for one rank."""
    if ranks == 1:
        return np.arange(bounds[-1])
    documents = [np.split(np.arange(first, last), 2 * ranks) for first, last in itertools.pairwise(bounds)]
    return np.concatenate([piece for pieces in documents for piece in (pieces[rank], pieces[2 * ranks - 1 - rank])])


class Provider(LocalSpecProvider):
    """megatron-core's TESpecProvider."""

    def column_parallel_layer_norm_linear(self):
        return NormLinear

    def row_parallel_linear(self):
        return Linear

    def fuse_layernorm_and_linear(self):
        return True

    def layer_norm(self, rms_norm=False, for_qk=False):
        return Norm

    def core_attention(self):
        return Attention
