"""A second kind of layer, which carries something of its own from token to token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_speech.model import builder, specs
from megatron_speech.model.layer_plan import ATTENTION_MLP
from megatron_speech.model.packed import PackedSequences
from megatron_speech.model.state import GenerationState

RUNNING_SUM = "running_sum"


class RunningSum:
    """The sum of what a layer has given for each sequence so far."""

    def __init__(self, state: GenerationState) -> None:
        self.total = torch.zeros(())

    def keep(self, index: Tensor) -> None:
        self.total = self.total[index]


class RunningSumLayer(TransformerLayer):
    """A layer like any other, whose output also has a hundredth of the sum of its document's outputs so far."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.gain = torch.nn.Parameter(torch.ones(self.config.hidden_size))

    def forward(self, *arguments: Any, packed_seq_params: PackedSequences, **named: Any) -> tuple[Tensor, Any]:
        hidden, context = super().forward(*arguments, packed_seq_params=packed_seq_params, **named)
        return hidden + 0.01 * self.gain * self._sums(hidden, packed_seq_params), context

    def _sums(self, hidden: Tensor, packed: PackedSequences) -> Tensor:
        kept = packed.state.of(self.layer_number, RunningSum) if packed.state is not None else None
        if packed.decoding:
            kept.total = kept.total + hidden
            return kept.total
        documents = hidden.split(packed.cu_seqlens_q.diff().tolist())
        sums = torch.cat([document.cumsum(0) for document in documents])
        if kept is not None:
            kept.total = sums[packed.cu_seqlens_q[1:].long() - 1]
        return sums


def install(set_item: Callable[..., None], set_attribute: Callable[..., None], at: int) -> None:
    """Register the kind, and have it for layer `at` (from 0, of the whole model) of every model built from now on."""
    set_item(
        specs.LAYER_SPECS,
        RUNNING_SUM,
        lambda core, backend: replace(specs.attention_mlp(core, backend), module=RunningSumLayer),
    )
    set_attribute(
        builder,
        "layer_kinds",
        lambda config: tuple(RUNNING_SUM if layer == at else ATTENTION_MLP for layer in range(config.num_layers)),
    )
