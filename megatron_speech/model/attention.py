"""Attention over packed documents, and the cache of a generation.

A micro-batch [B, S] runs as one row of T = B·S tokens with the documents end to end. `PackedSequences` says where
they begin; it is made on the host, once per micro-batch, and reaches every layer of every pipeline stage as
megatron-core's `packed_seq_params`. Its `qkv_format` is "thd" for Transformer Engine's attention only: megatron-core
then turns RoPE itself, with TE's kernel, while for ours the angles are looked up once per micro-batch.

Shapes: T tokens, H query heads and G key heads of this rank, D head width, n documents of a bucket, L their padded
length, P padded slots of all buckets.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor, nn

from megatron_speech.ops import cpu_layers

varlen_attn: Callable[..., Any] | None
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch < 2.10
    varlen_attn = None

# Cost of one more attention call (forward and backward), in score elements of one document batch.
_BUCKET_COST = 2048
# Padding attends within pieces of this length: nobody reads the result.
_PAD_PIECE = 64

_VARLEN_ARGUMENTS = frozenset(inspect.signature(varlen_attn).parameters) if varlen_attn is not None else frozenset()

Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class PaddedLayout:
    """Documents gathered into a few [n, L] rectangles so that a dense attention kernel can take them.

    `slots[p]` is the token at padded slot p (an arbitrary one at slots beyond a document's end: causality keeps
    real queries from seeing them, and nothing reads them). `inverse[t]` is the slot of token t.
    """

    buckets: tuple[tuple[int, int], ...]
    slots: Tensor
    inverse: Tensor

    @classmethod
    def build(cls, cu_seqlens: np.ndarray, padding: np.ndarray | None = None) -> PaddedLayout:
        """Rectangles for segments `cu_seqlens` (int, [n+1]); `padding` (bool, [n]) marks segments nobody reads.

        Lengths that differ much go to different rectangles: the split minimises Σ n·L² + a fixed cost per rectangle,
        so that the area stays near Σ len².
        """
        starts, lengths = cu_seqlens[:-1].astype(np.int64), np.diff(cu_seqlens).astype(np.int64)
        if padding is not None and padding.any():
            starts, lengths = _cut(starts, lengths, padding)
        filled = lengths > 0
        starts, lengths = starts[filled], lengths[filled]
        order = np.argsort(lengths, kind="stable")
        starts, lengths = starts[order], lengths[order]
        buckets, pieces = [], []
        total = int(cu_seqlens[-1])
        inverse = np.empty(total, dtype=np.int64)
        offset = 0
        for begin, end in itertools.pairwise(_split(lengths)):
            longest = int(lengths[end - 1])
            column = np.arange(longest)
            real = column < lengths[begin:end, None]
            token = np.where(real, starts[begin:end, None] + column, starts[begin:end, None])
            slot = offset + np.arange(token.size).reshape(token.shape)
            inverse[token[real]] = slot[real]
            buckets.append((end - begin, longest))
            pieces.append(token.ravel())
            offset += token.size
        slots = np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)
        return cls(tuple(buckets), torch.from_numpy(slots), torch.from_numpy(inverse))

    @property
    def area(self) -> int:
        """Scores computed by a dense kernel, Σ n·L²."""
        return sum(count * length * length for count, length in self.buckets)

    def to(self, device: torch.device) -> PaddedLayout:
        """The same with its indices on `device`."""
        return PaddedLayout(self.buckets, _send(self.slots, device), _send(self.inverse, device))


def _cut(starts: np.ndarray, lengths: np.ndarray, padding: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Padding segments cut into pieces of `_PAD_PIECE` tokens, the others as they are."""
    counts = np.where(padding, -(-lengths // _PAD_PIECE), 1)
    owner = np.repeat(np.arange(len(starts)), counts)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    at = np.where(padding[owner], number * _PAD_PIECE, 0)
    left = lengths[owner] - at
    return starts[owner] + at, np.where(padding[owner], np.minimum(left, _PAD_PIECE), left)


def _split(lengths: np.ndarray) -> list[int]:
    """Boundaries of the cheapest split of ascending `lengths` into runs that share their longest length."""
    if not len(lengths):
        return []
    # A boundary only where the length has grown by 1/32 of the longest: at most 33 candidates, whatever n.
    step = max(1, int(lengths[-1]) // 32)
    edges = np.flatnonzero(np.diff(lengths // step)) + 1
    edges = np.concatenate(([0], edges, [len(lengths)])).astype(np.int64)
    best = np.zeros(len(edges))
    back = np.zeros(len(edges), dtype=np.int64)
    for j in range(1, len(edges)):
        longest = float(lengths[edges[j] - 1])
        cost = best[:j] + (edges[j] - edges[:j]) * longest * longest + _BUCKET_COST
        back[j] = int(np.argmin(cost))
        best[j] = cost[back[j]]
    path = [len(edges) - 1]
    while path[-1]:
        path.append(int(back[path[-1]]))
    return [int(edges[j]) for j in reversed(path)]


@dataclass
class PackedSequences(PackedSeqParams):
    """Where the documents of one flattened micro-batch lie, and what the head needs to know of it.

    Make it with :meth:`build` (training, validation) or through a :class:`KVCache` (generation).
    """

    position_ids: Tensor | None = None  # [T] int64: position of every token in its document
    loss_rows: Tensor | None = None  # [R] int64: tokens with a loss weight, None for all
    row_weights: Tensor | None = None  # [R] fp32: what their losses count for in the total, None: 1
    label_smoothing: float = 0.0  # of those losses; see `ops.cross_entropy`
    z_loss: float = 0.0
    logit_rows: Tensor | None = None  # [R] int64: tokens whose logits are wanted, None for all
    head_rows: Tensor | None = None  # whichever of the two the head will read, set by the model
    layout: PaddedLayout | None = None
    segments: Tensor | None = None  # [n, 2] int64, first token and length of each document: for `ops.cpu_layers`
    kv_cache: KVCache | None = None
    decoding: bool = False  # one token per sequence, attending to the cache
    rotary: Rotary | None = field(default=None, repr=False)  # cos, sin [T, 1, D/2], set by the model

    @classmethod
    def build(
        cls,
        cu_seqlens: Tensor,
        *,
        position_ids: Tensor | None = None,
        loss_weights: Tensor | None = None,
        row_pointers: Tensor | None = None,
        fused: bool = False,
        context: int = 1,
        device: torch.device | str | None = None,
    ) -> PackedSequences:
        """From a micro-batch on the host; nothing is read back from the device.

        Args:
            cu_seqlens: [n+1] int32 over the flattened B·S tokens, first 0, last T; empty segments are allowed. Under
                context parallelism over the tokens of all ranks, last T·context, and every length is a multiple of
                2·context (:mod:`megatron_speech.data.loading.context_parallel`).
            position_ids: int64 of T elements in any shape; by default positions in each segment.
            loss_weights: float32 of T elements in any shape: what a token's loss counts for in the total; the head
                works where it is not zero.
            row_pointers: [B+1] int32 as given to `ops.loss_mask`: row b holds documents row_pointers[b] to
                row_pointers[b+1], and one segment of padding after them. Attention spends nothing on padding whose
                place is known; without it padding is attended to like a document.
            fused: for Transformer Engine's attention instead of ours (`SpeechGPTModel.fused_attention`).
            context: ranks that share every document's tokens; more than 1 needs `fused`.
            device: where the model runs; by default this process's.
        """
        device = torch.device(device) if device is not None else _device()
        cu = cu_seqlens.detach().cpu().to(torch.int32)
        bounds = cu.numpy()
        lengths = np.diff(bounds)
        if position_ids is None:
            position_ids = torch.from_numpy(np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths)).long()
        padding = None
        if row_pointers is not None:
            rows = row_pointers.cpu().numpy()
            padding = np.zeros(len(lengths), dtype=bool)
            padding[rows[1:] + np.arange(len(rows) - 1)] = True
        loss_rows, row_weights = None, None
        if loss_weights is not None:
            weights = loss_weights.detach().cpu().reshape(-1)
            loss_rows = weights.nonzero().squeeze(1)
            row_weights = weights[loss_rows]
        longest = int(lengths.max(initial=0))
        packed = cls(
            qkv_format="sbhd",
            position_ids=_send(position_ids.reshape(-1), device),
            loss_rows=None if loss_rows is None else _send(loss_rows, device),
            row_weights=None if row_weights is None else _send(row_weights, device),
        )
        if fused:
            packed.qkv_format = "thd"
            cu = torch.from_numpy(np.unique(bounds))  # without the empty segments
            longest = _fused_length(longest, 2 * context)
        elif device.type == "cpu" and cpu_layers.built():
            packed.segments = _segments(bounds, padding)
        else:
            packed.layout = PaddedLayout.build(bounds, padding).to(device)
        packed.cu_seqlens_q = packed.cu_seqlens_kv = _send(cu, device)
        packed.max_seqlen_q = packed.max_seqlen_kv = longest
        if context > 1:
            # Required there. Padding belongs to its document, which causality keeps from seeing it; being the same
            # tensor, it also spares TE a comparison on the device, for which the host would wait.
            packed.cu_seqlens_q_padded = packed.cu_seqlens_kv_padded = packed.cu_seqlens_q
        return packed


def _fused_length(longest: int, multiple: int) -> int:
    """A bound on `longest` of which there are few: cuDNN plans its kernels for each anew."""
    bound = 1 << max(6, (longest - 1).bit_length())
    return -(-bound // multiple) * multiple


def _segments(bounds: np.ndarray, padding: np.ndarray | None) -> Tensor:
    """(first token, tokens) of every document, [n, 2] int64; the longest first, which suits threads."""
    starts, lengths = bounds[:-1].astype(np.int64), np.diff(bounds).astype(np.int64)
    real = lengths > 0 if padding is None else (lengths > 0) & ~padding
    order = np.argsort(-lengths[real], kind="stable")
    return torch.from_numpy(np.stack((starts[real][order], lengths[real][order]), axis=1))


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """To `device`, from pinned memory so that the host does not wait for the stream."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class KVCache:
    """Keys and values of the sequences of one batched generation, each of its own length.

    ::

        cache = KVCache(sequences=3, max_length=512)
        packed = cache.prefill(prompt_lengths)                       # prompts end to end, T = Σ lengths
        logits = model(prompt_ids[None], packed.position_ids[None], packed_seq_params=packed)      # [3, V]
        packed = cache.decode()                                      # one more token of every sequence
        logits = model(next_ids[None], packed.position_ids[None], packed_seq_params=packed)        # [3, V]
        cache.keep([0, 2])                                           # sequence 1 has ended

    Memory is taken per layer on first use: [sequences, G, max_length, D] each for keys and values.
    """

    def __init__(self, sequences: int, max_length: int, device: torch.device | str | None = None) -> None:
        self.sequences = sequences
        self.max_length = max_length
        self.device = torch.device(device) if device is not None else _device()
        self.lengths = np.zeros(sequences, dtype=np.int64)  # tokens whose keys are (being) stored
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._slot: Tensor | None = None  # [T] index of each new token into [sequences · max_length]
        self._mask: Tensor | None = None  # [n, 1, 1, longest] bool: what a decoded token sees

    def prefill(self, lengths: Any) -> PackedSequences:
        """Parameters of the forward pass over whole prompts, end to end, of the given lengths (each ≥ 1)."""
        lengths = np.asarray(lengths, dtype=np.int64)
        if lengths.shape != (self.sequences,) or (lengths < 1).any():
            raise ValueError(f"prefill takes {self.sequences} lengths of at least one token, got {lengths.tolist()}")
        self._grow_to(lengths)
        bounds = np.concatenate(([0], np.cumsum(lengths)))
        packed = PackedSequences.build(torch.from_numpy(bounds.astype(np.int32)), device=self.device)
        assert packed.position_ids is not None
        first = np.repeat(np.arange(self.sequences) * self.max_length, lengths)
        self._slot = torch.from_numpy(first).to(self.device) + packed.position_ids
        packed.logit_rows = torch.from_numpy(bounds[1:] - 1).to(self.device)
        packed.kv_cache = self
        return packed

    def decode(self) -> PackedSequences:
        """Parameters of the forward pass over the next token of every sequence, T = sequences."""
        position = self.lengths.copy()
        self._grow_to(position + 1)
        positions = torch.from_numpy(position).to(self.device)
        self._slot = torch.arange(self.sequences, device=self.device) * self.max_length + positions
        longest = int(self.lengths.max())
        self._mask = (torch.arange(longest, device=self.device) <= positions[:, None])[:, None, None]
        return PackedSequences(qkv_format="sbhd", position_ids=positions, kv_cache=self, decoding=True)

    def keep(self, sequences: Any) -> None:
        """Drop every sequence but these (indices, in the order wanted): they stop costing time."""
        index = np.asarray(sequences, dtype=np.int64)
        rows = torch.from_numpy(index).to(self.device)
        self.layers = {layer: (keys[rows], values[rows]) for layer, (keys, values) in self.layers.items()}
        self.lengths = self.lengths[index]
        self.sequences = len(index)

    def store(self, layer: int, key_TGD: Tensor, value_TGD: Tensor) -> None:
        """Write the keys and values of the tokens of the running forward pass."""
        if layer not in self.layers:
            shape = (self.sequences, self.max_length, *key_TGD.shape[1:])
            self.layers[layer] = (key_TGD.new_zeros(shape), value_TGD.new_zeros(shape))
        assert self._slot is not None
        for stored, new in zip(self.layers[layer], (key_TGD, value_TGD), strict=True):
            stored.view(-1, *new.shape[1:]).index_copy_(0, self._slot, new)

    def attend(self, layer: int, query_THD: Tensor, scale: float) -> Tensor:
        """[n, H, D] queries, one per sequence, over all that is stored → [n, H, D]."""
        assert self._mask is not None
        keys, values = (stored[:, : self._mask.shape[-1]].transpose(1, 2) for stored in self.layers[layer])
        # The query heads that share a key head are its batch of queries: no copy of the cache per head.
        query = query_THD.view(query_THD.shape[0], keys.shape[1], -1, query_THD.shape[-1])
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=self._mask, scale=scale)
        return out.reshape(query_THD.shape)

    def _grow_to(self, lengths: np.ndarray) -> None:
        if lengths.max(initial=0) > self.max_length:
            raise ValueError(f"a sequence of {lengths.max()} tokens does not fit a cache of {self.max_length}")
        self.lengths = lengths.copy()


def rotary_tables(inverse_frequency: Tensor, position_ids: Tensor) -> Rotary:
    """RoPE's cos and sin, each [T, 1, D/2] fp32 (arXiv:2104.09864; halves of a head form the pairs)."""
    angles = position_ids.float().unsqueeze(-1) * inverse_frequency
    return angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)


def _rotate_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """Turn [*, heads, D] in place by the angles [*, 1, D/2] (back, if `inverse`)."""
    first, second = x.chunk(2, dim=-1)
    sign = -1.0 if inverse else 1.0
    crossed = first * sin
    first.mul_(cos).addcmul_(second, sin, value=-sign)
    second.mul_(cos).add_(crossed, alpha=sign)
    return x


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate_(x.clone(memory_format=torch.contiguous_format), cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate_(gradients[0].clone(), cos, sin, inverse=True), None, None


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
                _rotate_(padded, slot_cos, slot_sin)
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
                _rotate_(flat, cos, sin, inverse=True)
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
        if packed.kv_cache is not None:
            out = self._cached(query, key, value, cos, sin, packed)
        elif varlen_attn is not None and query.is_cuda and query.dtype != torch.float32:
            out = self._varlen(_Rotate.apply(query, cos, sin), _Rotate.apply(key, cos, sin), value, packed)
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
        # torch 2.10 has is_causal, later ones a window that reaches back without end and forward not at all.
        options: dict[str, Any] = {"is_causal": True} if "is_causal" in _VARLEN_ARGUMENTS else {"window_size": (-1, 0)}
        if query.shape[1] != key.shape[1]:
            if "enable_gqa" in _VARLEN_ARGUMENTS:
                options["enable_gqa"] = True
            else:
                key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        assert varlen_attn is not None
        result: Tensor = varlen_attn(
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
        assert packed.kv_cache is not None
        # The cache has the dtype of the tables: fp32 on CPU, where attention runs in fp32.
        keys = _rotate_(key.to(cos.dtype, copy=True), cos, sin)
        packed.kv_cache.store(self.layer_number, keys, value.to(cos.dtype))
        if packed.decoding:
            turned = _rotate_(query.to(cos.dtype, copy=True, memory_format=torch.contiguous_format), cos, sin)
            return packed.kv_cache.attend(self.layer_number, turned, self.scale).to(query.dtype)
        return self._documents(query, key, value, cos, sin, packed)
