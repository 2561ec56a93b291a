"""Which implementation the layers run on, and megatron-core's specs of it.

- `torch`: megatron-core's own linear layers with our packed attention, norms and SwiGLU. Runs everywhere, CPU included.
- `te`: Transformer Engine's linear layers (norms fused into them), fused attention and RoPE. bf16, FP8 and context
  parallelism; needs CUDA.

Weights have the same names and initial values in both, and a checkpoint of one loads into the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset
from torch import Tensor

from megatron_speech.errors import InputError
from megatron_speech.model.attention import PackedSdpaAttention
from megatron_speech.model.layer_plan import ATTENTION_MLP, last_mlp_on_learned_only
from megatron_speech.model.norm import RMSNorm, SwiGLU
from megatron_speech.model.packed import PackedSequences
from megatron_speech.recipe.precision import Precision

BackendName = Literal["torch", "te"]


class Backend(NamedTuple):
    """An implementation of the layers, and why it was taken."""

    name: BackendName
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def choose_backend(pinned: str, precision: Precision, context: int) -> Backend:
    """The back-end for a model.

    Args:
        pinned: recipe `model.backend`: "auto", "torch" or "te".
        precision: recipe `precision`.
        context: ranks of context parallelism.

    `auto` takes Transformer Engine where only it can do what is asked, FP8 and context parallelism, and torch
    everywhere else.

    Raises:
        InputError: Transformer Engine is needed and is not there or pinned away, or cannot do what is asked.
    """
    needs = "precision fp8" if precision == "fp8" else f"parallel.context {context}" if context > 1 else None
    missing = transformer_engine_missing()
    if pinned == "torch":
        if needs:
            raise InputError(f"{needs} needs Transformer Engine, but model.backend is torch; set it to auto or te")
        return Backend("torch", "model.backend: torch")
    if pinned == "te" or needs:
        asked = needs or "model.backend te"
        if missing:
            raise InputError(
                f"{asked} needs Transformer Engine, but {missing}; run where it is, or set "
                + ("precision to bf16" if precision == "fp8" else "parallel.context to 1" if needs else "it to torch")
            )
        if precision == "fp32":
            raise InputError(f"{asked} needs precision bf16 or fp8: Transformer Engine's attention has no fp32")
        return Backend("te", "model.backend: te" if pinned == "te" else f"{needs} needs it")
    reason = f"no Transformer Engine: {missing}" if missing else "nothing here needs Transformer Engine"
    return Backend("torch", reason)


def transformer_engine_missing() -> str | None:
    """Why Transformer Engine cannot be used here, as part of a sentence; None where it can."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if not HAVE_TE:
        return "it is not installed"
    if not torch.cuda.is_available():
        return "this machine has no CUDA device"
    return None


def core_fields(backend: BackendName) -> dict[str, Any]:
    """Fields of megatron-core's TransformerConfig that differ between the back-ends."""
    # Under Transformer Engine RoPE is megatron-core's, by TE's kernel for packed documents: the loop over documents
    # that is its other implementation reads their lengths back from the device in every layer.
    return {"apply_rope_fusion": True, "cp_comm_type": "p2p"} if backend == "te" else {}


# A layer's spec from megatron-core's configuration and the back-end.
LayerSpecBuilder = Callable[[TransformerConfig, BackendName], ModuleSpec]


def block_spec(
    core: TransformerConfig, backend: BackendName, vp_stage: int | None, kinds: Sequence[str]
) -> TransformerBlockSubmodules:
    """The layers of this rank's chunk `vp_stage` of the model, and its last norm.

    Args:
        core: megatron-core's configuration.
        backend: what the layers run on.
        vp_stage: the chunk under a virtual pipeline, else None.
        kinds: of every layer of the whole model (:func:`megatron_speech.model.layer_plan.layer_kinds`).
    """
    first = get_transformer_layer_offset(core, vp_stage, parallel_state.get_pipeline_model_parallel_rank())
    own = kinds[first : first + get_num_layers_to_build(core, vp_stage=vp_stage)]
    layers = [LAYER_SPECS[kind](core, backend) for kind in own]
    has_head = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    if has_head and last_mlp_on_learned_only(
        kinds[-1],
        torch_backend=backend == "torch",
        sequence_parallel=core.sequence_parallel,
        layers=len(layers),
    ):
        layers[-1] = replace(layers[-1], module=LastLayer)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=_final_norm(backend))


class LastLayer(TransformerLayer):
    """The layer below the head: behind its attention it goes on with the rows that the head will read, and no others.

    Nobody attends to its output, so in SFT the prompt and the padding need nothing of its MLP.
    """

    def _forward_attention(
        self, *arguments: Any, packed_seq_params: PackedSequences | None = None, **named: Any
    ) -> tuple[Tensor, Any]:
        assert packed_seq_params is not None
        hidden, context = super()._forward_attention(*arguments, packed_seq_params=packed_seq_params, **named)
        rows = packed_seq_params.head_rows
        return hidden if rows is None else hidden.index_select(0, rows), context


def attention_mlp(core: TransformerConfig, backend: BackendName) -> ModuleSpec:
    """megatron-core's spec of a layer: under Transformer Engine as it is, else with our attention core and norms."""
    if backend == "te":
        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=core.qk_layernorm)
    else:
        layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=core.qk_layernorm)
        parts = layer.submodules
        parts.input_layernorm = RMSNorm
        parts.pre_mlp_layernorm = RMSNorm
        parts.self_attention.submodules.core_attention = PackedSdpaAttention
        if core.qk_layernorm:
            parts.self_attention.submodules.q_layernorm = RMSNorm
            parts.self_attention.submodules.k_layernorm = RMSNorm
    layer.submodules.mlp.submodules.activation_func = SwiGLU
    return layer


# How each kind of layer is built.
LAYER_SPECS: dict[str, LayerSpecBuilder] = {ATTENTION_MLP: attention_mlp}


def _final_norm(backend: BackendName) -> Any:
    if backend == "torch":
        return RMSNorm
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm
