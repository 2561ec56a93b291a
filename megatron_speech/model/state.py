"""What the layers of a model keep from step to step of a generation.

A :class:`GenerationState` belongs to one batch of sequences. It knows how far each of them is and makes the
`PackedSequences` of every forward pass; each layer finds in it what it keeps, by its number and the kind of its state:
attention its keys and values (:mod:`megatron_speech.model.kv_cache`), another layer whatever goes on from one token to
the next. Sequences that have ended leave all of it at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from megatron_speech.model.packed import PackedSequences
from megatron_speech.parallel import groups


class LayerState(Protocol):
    """What one layer keeps of every sequence of a batch; made of the :class:`GenerationState` that it belongs to."""

    def keep(self, index: Tensor) -> None:
        """Drop every sequence but `index`, int64 places in the batch, in the order wanted."""
        ...


State = TypeVar("State", bound=LayerState)


class GenerationState:
    """The state of the sequences of one batched generation, each of its own length.

    ::

        state = GenerationState(sequences=3, max_length=512)
        packed = state.prefill(prompt_lengths)                       # prompts end to end, T = Σ lengths
        logits = model(prompt_ids[None], packed_seq_params=packed)   # [3, V]
        packed = state.decode()                                      # one more token of every sequence
        logits = model(next_ids[None], packed_seq_params=packed)     # [3, V]
        state.keep([0, 2])                                           # sequence 1 has ended

    Attributes:
        sequences: that are in the batch.
        max_length: tokens that a sequence may have; :meth:`grow` raises it.
        lengths: int64 [sequences], tokens of each, those of the running forward pass included.
        slots: int64 [T], index of each token of the running forward pass into [sequences · max_length].
        visible: bool [sequences, 1, 1, longest], which positions a decoded token sees; None in a prefill.
    """

    def __init__(self, sequences: int, max_length: int, device: torch.device | str | None = None) -> None:
        self.sequences = sequences
        self.max_length = max_length
        self.device = torch.device(device) if device is not None else groups.device()
        self.lengths = np.zeros(sequences, dtype=np.int64)
        self.slots: Tensor | None = None
        self.visible: Tensor | None = None
        self._layers: dict[tuple[int, Callable[..., LayerState]], LayerState] = {}

    def of(self, layer: int, kind: Callable[[GenerationState], State]) -> State:
        """What layer number `layer` keeps of this kind, made as `kind(self)` when it is first asked for."""
        if (layer, kind) not in self._layers:
            self._layers[layer, kind] = kind(self)
        return cast(State, self._layers[layer, kind])

    def prefill(self, lengths: Any) -> PackedSequences:
        """Parameters of the forward pass over whole prompts, end to end, of the given lengths (each ≥ 1).

        The head reads the last token of each.
        """
        lengths = np.asarray(lengths, dtype=np.int64)
        if lengths.shape != (self.sequences,) or (lengths < 1).any():
            raise ValueError(f"prefill takes {self.sequences} lengths of at least one token, got {lengths.tolist()}")
        self._extend_to(lengths)
        bounds = np.concatenate(([0], np.cumsum(lengths)))
        packed = PackedSequences.build(torch.from_numpy(bounds.astype(np.int32)), device=self.device)
        assert packed.position_ids is not None
        first = np.repeat(np.arange(self.sequences) * self.max_length, lengths)
        self.slots, self.visible = torch.from_numpy(first).to(self.device) + packed.position_ids, None
        packed.head_rows = torch.from_numpy(bounds[1:] - 1).to(self.device)
        packed.state = self
        return packed

    def decode(self) -> PackedSequences:
        """Parameters of the forward pass over the next token of every sequence, T = sequences."""
        position = self.lengths.copy()
        self._extend_to(position + 1)
        positions = torch.from_numpy(position).to(self.device)
        self.slots = torch.arange(self.sequences, device=self.device) * self.max_length + positions
        longest = int(self.lengths.max())
        self.visible = (torch.arange(longest, device=self.device) <= positions[:, None])[:, None, None]
        return PackedSequences(qkv_format="sbhd", position_ids=positions, state=self, decoding=True)

    def keep(self, sequences: Any) -> None:
        """Drop every sequence but these (places in the batch, in the order wanted): they stop costing time."""
        index = np.asarray(sequences, dtype=np.int64)
        rows = torch.from_numpy(index).to(self.device)
        for layer in self._layers.values():
            layer.keep(rows)
        self.lengths = self.lengths[index]
        self.sequences = len(index)

    def grow(self, max_length: int) -> None:
        """Let sequences become so long; layers that keep something by position take the room when they next need it."""
        self.max_length = max(self.max_length, max_length)

    def _extend_to(self, lengths: np.ndarray) -> None:
        if lengths.max(initial=0) > self.max_length:
            raise ValueError(f"a sequence of {lengths.max()} tokens does not fit a state of {self.max_length}")
        self.lengths = lengths.copy()
