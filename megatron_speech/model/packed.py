"""Where the documents of a packed micro-batch lie.

A micro-batch [B, S] runs as one row of T = B·S tokens with the documents end to end. `PackedSequences` says where
they begin; it is made on the host, once per micro-batch, and reaches every layer of every pipeline stage as
megatron-core's `packed_seq_params`. Its `qkv_format` is "thd" for Transformer Engine's attention only: megatron-core
then turns RoPE itself, with TE's kernel, while for ours the angles are looked up once per micro-batch.

Shapes: T tokens, n documents of a bucket, L their padded length, P padded slots of all buckets.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_speech.model.rotary import Rotary
from megatron_speech.ops import cpu_layers
from megatron_speech.parallel import groups

# Cost of one more attention call (forward and backward), in score elements of one document batch.
_BUCKET_COST = 2048
# Padding attends within pieces of this length: nobody reads the result.
_PAD_PIECE = 64


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
        return PaddedLayout(self.buckets, send(self.slots, device), send(self.inverse, device))


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


class LayerStates(Protocol):
    """What the layers keep of a generation, by layer and kind: :class:`megatron_speech.model.state.GenerationState`."""

    def of(self, layer: int, kind: Callable[[Any], Any]) -> Any:
        """What layer number `layer` keeps of this kind, made when it is first asked for."""
        ...


@dataclass
class PackedSequences(PackedSeqParams):
    """Where the documents of one flattened micro-batch lie, and which of its rows go on to the head.

    Make it with :meth:`build` (training, validation) or through a :class:`GenerationState` (generation). What the head
    is to learn is no part of it: see :class:`megatron_speech.model.targets.HeadTargets`.
    """

    position_ids: Tensor | None = None  # [T] int64: position of every token in its document
    # [R] int64: tokens that the head reads, None for all. With targets the model sets it to theirs. It travels here and
    # not beside the forward pass since recomputation runs the layer below the head again in the backward pass.
    head_rows: Tensor | None = None
    layout: PaddedLayout | None = None
    segments: Tensor | None = None  # [n, 2] int64, first token and length of each document: for `ops.cpu_layers`
    state: LayerStates | None = None  # what the layers keep of a generation
    decoding: bool = False  # one token per sequence, which goes on from the state
    rotary: Rotary | None = field(default=None, repr=False)  # cos, sin [T, 1, D/2], set by the model

    @classmethod
    def build(
        cls,
        cu_seqlens: Tensor,
        *,
        position_ids: Tensor | None = None,
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
            row_pointers: [B+1] int32 as given to `ops.loss_mask`: row b holds documents row_pointers[b] to
                row_pointers[b+1], and one segment of padding after them. Attention spends nothing on padding whose
                place is known; without it padding is attended to like a document.
            fused: for Transformer Engine's attention instead of ours (`SpeechGPTModel.fused_attention`).
            context: ranks that share every document's tokens; more than 1 needs `fused`.
            device: where the model runs; by default this process's.
        """
        device = torch.device(device) if device is not None else groups.device()
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
        longest = int(lengths.max(initial=0))
        packed = cls(qkv_format="sbhd", position_ids=send(position_ids.reshape(-1), device))
        if fused:
            packed.qkv_format = "thd"
            cu = torch.from_numpy(np.unique(bounds))  # without the empty segments
            longest = _fused_length(longest, 2 * context)
        elif device.type == "cpu" and cpu_layers.built():
            packed.segments = _segments(bounds, padding)
        else:
            packed.layout = PaddedLayout.build(bounds, padding).to(device)
        packed.cu_seqlens_q = packed.cu_seqlens_kv = send(cu, device)
        packed.max_seqlen_q = packed.max_seqlen_kv = longest
        if context > 1:
            # Required there. Padding belongs to its document, which causality keeps from seeing it; being the same
            # tensor, it also spares TE a comparison on the device, for which the host would wait.
            packed.cu_seqlens_q_padded = packed.cu_seqlens_kv_padded = packed.cu_seqlens_q
        return packed


def _fused_length(longest: int, multiple: int) -> int:
    """A bound on `longest` of which there are few: cuDNN plans its kernels for each separately."""
    bound = 1 << max(6, (longest - 1).bit_length())
    return -(-bound // multiple) * multiple


def _segments(bounds: np.ndarray, padding: np.ndarray | None) -> Tensor:
    """(first token, tokens) of every document, [n, 2] int64; the longest first, which suits threads."""
    starts, lengths = bounds[:-1].astype(np.int64), np.diff(bounds).astype(np.int64)
    real = lengths > 0 if padding is None else (lengths > 0) & ~padding
    order = np.argsort(-lengths[real], kind="stable")
    return torch.from_numpy(np.stack((starts[real][order], lengths[real][order]), axis=1))


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """To `device`, from pinned memory so that the host does not wait for the stream."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
