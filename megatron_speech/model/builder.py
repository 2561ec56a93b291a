"""From a `ModelConfig` to the model chunks of this rank, with the same weights in every parallel layout."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron_speech.errors import InputError
from megatron_speech.model import pipeline_split, specs
from megatron_speech.model.gpt import SpeechGPTModel
from megatron_speech.model.layer_plan import layer_kinds
from megatron_speech.recipe.model import ModelConfig
from megatron_speech.recipe.parallel import check_pipeline_layout
from megatron_speech.recipe.precision import Fp8Config, Precision
from megatron_speech.recipe.recompute import RecomputeConfig


def transformer_config(
    config: ModelConfig,
    *,
    precision: Precision = "fp32",
    backend: specs.BackendName = "torch",
    split: Sequence[int] = (),
    sequence_parallel: bool = False,
    fp8: Fp8Config | None = None,
    recompute: RecomputeConfig | None = None,
    **overrides: Any,
) -> TransformerConfig:
    """megatron-core's configuration of `config` under the parallel state that is up.

    Args:
        config: shape.
        precision: of parameters and activations; the parameters of `fp8` are bf16.
        backend: what the layers run on.
        split: layers of every piece of the model, in its order, where there are several.
        sequence_parallel: see :func:`build_model`.
        fp8: scaling of `precision` fp8, its defaults if None.
        recompute: what the backward pass computes again, nothing if None.
        overrides: fields of megatron-core's TransformerConfig; they win.
    """
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    pipeline = parallel_state.get_pipeline_model_parallel_world_size()
    _check(config, tensor, sequence_parallel)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    fields: dict[str, Any] = dict(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.kv_channels,
        normalization="RMSNorm",
        layernorm_epsilon=config.norm_epsilon,
        qk_layernorm=config.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=config.qkv_bias,
        gated_linear_unit=True,
        activation_func=F.silu,
        # The name is Transformer Engine's, the module is the one that the spec gives: our SwiGLU.
        use_te_activation_func=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # Weights are drawn by init_weights, the same in every layout.
        perform_initialization=False,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        context_parallel_size=parallel_state.get_context_parallel_world_size(),
        sequence_parallel=sequence_parallel and tensor > 1,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
        # The trainer divides by the weight of the whole global batch: nothing else may scale the loss.
        calculate_per_token_loss=True,
        batch_p2p_comm=torch.cuda.is_available(),
        cuda_graph_scope=[],  # megatron-core warns about its own default
    )
    if len(split) > 1:
        fields["pipeline_model_parallel_layout"] = pipeline_split.core_layout(split)
    if precision == "fp8":
        fields |= (fp8 or Fp8Config()).core_fields()
    fields |= (recompute or RecomputeConfig()).core_fields() | specs.core_fields(backend) | overrides
    return TransformerConfig(**fields)


def build_model(
    config: ModelConfig,
    vocab_size: int,
    *,
    precision: Precision = "fp32",
    max_sequence_length: int = 2048,
    seed: int | None = 1234,
    valid_vocab_size: int | None = None,
    sequence_parallel: bool = False,
    pipeline_layout: Sequence[int] | None = None,
    fp8: Fp8Config | None = None,
    recompute: RecomputeConfig | None = None,
    backend: specs.BackendName | None = None,
    **overrides: Any,
) -> list[SpeechGPTModel]:
    """The model chunks of this rank: one, or several under a virtual pipeline.

    Args:
        config: shape.
        vocab_size: rows of the token table, `TokenSpace.padded_size`; padded further to a multiple of 128 per
            tensor-parallel rank.
        precision: of parameters and activations; `fp8` runs the layers' products in FP8 and keeps the rest in bf16.
        max_sequence_length: longest document, a bound that megatron-core asks for.
        seed: of the initial weights; None leaves matrices at zero, for a load to fill.
        valid_vocab_size: ids that exist, `TokenSpace.size`; ids from there on are never predicted. Default: all.
        sequence_parallel: also split the sequence where tensor parallelism leaves activations whole (needs TP > 1
            and micro-batches whose B·S is a multiple of TP).
        pipeline_layout: layers of every piece of a pipeline, in the order of the model; None balances them.
        fp8: how tensors are scaled to 8 bits.
        recompute: activations that the backward pass computes again.
        backend: what the layers run on; None lets `config.backend` decide.
        overrides: fields of megatron-core's TransformerConfig.

    Needs the parallel state (:func:`megatron_speech.parallel.groups.initialize`).
    """
    valid = vocab_size if valid_vocab_size is None else valid_vocab_size
    if not 0 < valid <= vocab_size:
        raise InputError(f"the vocabulary has {valid} ids but a table of {vocab_size} rows")
    if backend is None:
        context = parallel_state.get_context_parallel_world_size()
        backend = specs.choose_backend(config.backend, precision, context).name
    core = transformer_config(
        config,
        precision=precision,
        backend=backend,
        split=layer_split(config, vocab_size, max_sequence_length, pipeline_layout),
        sequence_parallel=sequence_parallel,
        fp8=fp8,
        recompute=recompute,
        **overrides,
    )
    multiple = 128 * core.tensor_model_parallel_size
    padded = math.ceil(vocab_size / multiple) * multiple
    chunks = []
    for stage in range(core.virtual_pipeline_model_parallel_size or 1):
        vp_stage = stage if core.virtual_pipeline_model_parallel_size else None
        ends = {"ignore_virtual": False, "vp_stage": vp_stage}
        model = SpeechGPTModel(
            config=core,
            transformer_layer_spec=specs.block_spec(core, backend, vp_stage, layer_kinds(config)),
            vocab_size=padded,
            max_sequence_length=max_sequence_length,
            pre_process=parallel_state.is_pipeline_first_stage(**ends),
            post_process=parallel_state.is_pipeline_last_stage(**ends),
            share_embeddings_and_output_weights=config.tie_embeddings,
            position_embedding_type="rope",
            rotary_base=config.rope_base,
            vp_stage=vp_stage,
        )
        # Ours in every back-end: megatron-core's scaling knows only Llama 3.1's constants.
        model.rotary_pos_emb.inv_freq = config.inverse_frequencies().to(model.rotary_pos_emb.inv_freq.device)
        model.model_config = config
        model.valid_vocab_size = valid
        model.fused_attention = backend == "te"
        init_weights(model, seed)
        chunks.append(model)
    return chunks


def layer_split(
    config: ModelConfig, vocab_size: int, max_sequence_length: int, pipeline_layout: Sequence[int] | None
) -> tuple[int, ...]:
    """Layers of every piece of the model under the parallel state that is up, in the order of the model."""
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    chunks = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    if pipeline_layout is not None:
        return check_pipeline_layout(pipeline_layout, config.num_layers, stages, chunks)
    return pipeline_split.split_layers(config, vocab_size, stages, chunks, max_sequence_length)


def init_weights(model: SpeechGPTModel, seed: int | None) -> None:
    """Draw every weight so that it depends on `seed` and its global name only, not on the layout.

    Each parameter is drawn whole, in fp32 on the CPU, from a generator seeded with a hash of (seed, name); the rank
    keeps its slice. Matrices are normal with `init_std`, the two that write to the residual stream with
    init_std/√(2·layers) (GPT-2); norms are one, biases and the rows of padding ids zero. Without a seed all
    matrices are zero: they are loaded next.
    """
    config = model.model_config
    rank = parallel_state.get_tensor_model_parallel_rank()
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    for name, parameter in global_named_parameters(model):
        with torch.no_grad():
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
                continue
            residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            # megatron-core marks only what it draws itself; norms of gradients need to know what is split.
            if not hasattr(parameter, "tensor_model_parallel"):  # Transformer Engine marks its own
                set_tensor_model_parallel_attributes(parameter, True, 1 if residual else 0, 1)
            if seed is None:
                parameter.zero_()
                continue
            std = config.init_std / math.sqrt(2 * config.num_layers) if residual else config.init_std
            rows, columns = parameter.shape
            if residual:
                parameter.copy_(_draw(seed, name, rows, columns * ranks, std).chunk(ranks, dim=1)[rank])
            elif name.endswith("linear_fc1.weight"):
                # gate | linear of the whole model; a rank holds its part of each.
                halves = _draw(seed, name, rows * ranks, columns, std).chunk(2)
                parameter.copy_(torch.cat([half.chunk(ranks)[rank] for half in halves]))
            elif name in (EMBEDDING, HEAD):
                # Only ids that exist are drawn: the padding depends on the layout.
                table = _draw(seed, name, model.valid_vocab_size, columns, std)
                own = table[rank * rows : (rank + 1) * rows]
                parameter.zero_()
                parameter[: own.shape[0]].copy_(own)
            else:
                parameter.copy_(_draw(seed, name, rows * ranks, columns, std).chunk(ranks)[rank])


EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "output_layer.weight"


def global_named_parameters(model: SpeechGPTModel) -> Iterator[tuple[str, Tensor]]:
    """(name, parameter) with layers numbered through the whole model, and a tied head under its table's name."""
    offset = get_transformer_layer_offset(
        model.config, model.vp_stage, parallel_state.get_pipeline_model_parallel_rank()
    )
    for name, parameter in model.named_parameters():
        if name == HEAD and model.share_embeddings_and_output_weights:
            yield EMBEDDING, parameter
            continue
        for fused, apart in _FUSED_NORMS.items():
            name = name.replace(fused, apart)
        yield re.sub(r"(?<=layers\.)\d+", lambda match: str(int(match[0]) + offset), name, count=1), parameter


# Transformer Engine's name of a norm that it fuses into the linear layer after it, and the name it has by itself.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def _draw(seed: int, name: str, rows: int, columns: int, std: float) -> Tensor:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randn(rows, columns, generator=generator).mul_(std)


def _check(config: ModelConfig, tensor: int, sequence_parallel: bool) -> None:
    for field in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        size = getattr(config, field)
        if size % tensor:
            raise InputError(f"model.{field} is {size}: it must be a multiple of parallel.tensor {tensor}")
    if sequence_parallel and tensor == 1:
        raise InputError("parallel.sequence_parallel needs parallel.tensor of 2 or more")
