"""Keys and values of one attention layer during a generation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from megatron_speech.model.state import GenerationState


class KeyValueCache:
    """A :class:`~megatron_speech.model.state.LayerState`: the keys and values of every token so far.

    Memory is taken on first use: [sequences, G, max_length, D] each for keys and values, of G key heads of width D.
    """

    def __init__(self, state: GenerationState) -> None:
        self._state = state
        self._stored: tuple[Tensor, Tensor] | None = None  # keys, values [sequences, max_length, G, D]

    def store(self, key_TGD: Tensor, value_TGD: Tensor) -> None:
        """Write the keys and values of the tokens of the running forward pass."""
        state, stored = self._state, self._stored
        if stored is None:
            shape = (state.sequences, state.max_length, *key_TGD.shape[1:])
            stored = key_TGD.new_zeros(shape), value_TGD.new_zeros(shape)
        elif stored[0].shape[1] < state.max_length:
            more = (0, 0, 0, 0, 0, state.max_length - stored[0].shape[1])
            stored = F.pad(stored[0], more), F.pad(stored[1], more)
        self._stored = stored
        assert state.slots is not None
        for kept, new in zip(stored, (key_TGD, value_TGD), strict=True):
            kept.view(-1, *new.shape[1:]).index_copy_(0, state.slots, new)

    def attend(self, query_THD: Tensor, scale: float) -> Tensor:
        """[n, H, D] queries, one per sequence, over all that is stored → [n, H, D]."""
        visible = self._state.visible
        assert visible is not None and self._stored is not None
        keys, values = (kept[:, : visible.shape[-1]].transpose(1, 2) for kept in self._stored)
        # The query heads that share a key head are its batch of queries: no copy of the cache per head.
        query = query_THD.view(query_THD.shape[0], keys.shape[1], -1, query_THD.shape[-1])
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=visible, scale=scale)
        return out.reshape(query_THD.shape)

    def keep(self, index: Tensor) -> None:
        """Drop every sequence but `index`, int64 places in the batch."""
        if self._stored is not None:
            keys, values = self._stored
            self._stored = keys[index], values[index]
