"""A Hugging Face `config.json` as a `ModelConfig` and back, for the three architectures that are the same model.

LLaMA 3, Qwen2 (biases of query, key and value) and Qwen3 (norms of query and key heads) are what `ModelConfig`
describes. Whatever would make them compute something else is refused by its field.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_speech.errors import InputError
from megatron_speech.files import read_json
from megatron_speech.recipe.model import ModelConfig

# architecture → (model_type, and what `transformers` takes a field to be that a config.json leaves out)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("llama", {"max_position_embeddings": 2048}),
    "Qwen2ForCausalLM": ("qwen2", {"max_position_embeddings": 32768}),
    "Qwen3ForCausalLM": ("qwen3", {"max_position_embeddings": 32768, "head_dim": 128}),
}
_DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "tie_word_embeddings": False}
_NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def read_config(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The shape of the model in a Hugging Face folder, and its config.json.

    Raises:
        InputError: it is no config.json, another architecture, or one with a feature that this model lacks.
    """
    path = folder / "config.json"
    config = read_json(path, "model config")
    if not isinstance(config, dict):
        raise InputError(f"{path} is no model config: it holds no mapping")
    names = config.get("architectures") or []
    if len(names) != 1 or names[0] not in ARCHITECTURES:
        raise InputError(
            f"{path}: architectures is {names or 'missing'}; needed: one of {', '.join(ARCHITECTURES)} "
            "(other architectures are other models, or have no language-model head)"
        )
    architecture = names[0]
    model_type = ARCHITECTURES[architecture][0]
    if config.get("model_type", model_type) != model_type:
        raise InputError(
            f"{path}: architectures is {architecture}, but model_type is {config['model_type']!r}, which is what "
            f"transformers goes by; needed: {model_type!r}"
        )
    given = {key: value for key, value in config.items() if value is not None}
    fields = {**_DEFAULTS, **ARCHITECTURES[architecture][1], **given}
    rope = _rope(path, config)
    _refuse_others(path, architecture, fields, rope)
    missing = [name for name in _NEEDED if name not in fields]
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}, without which the model's shape is not known")
    if "num_key_value_heads" in config:  # null: as many as heads, in every architecture
        fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
    if architecture != "LlamaForCausalLM" and "num_key_value_heads" not in fields:
        raise InputError(f"{path} lacks num_key_value_heads, without which the model's shape is not known")
    values = {
        "num_layers": fields["num_hidden_layers"],
        "hidden_size": fields["hidden_size"],
        "ffn_hidden_size": fields["intermediate_size"],
        "num_attention_heads": fields["num_attention_heads"],
        "num_query_groups": fields.get("num_key_value_heads"),
        "kv_channels": fields.get("head_dim"),
        "rope_base": rope.get("rope_theta", fields["rope_theta"]),
        "rope_scaling": _rope_scaling(path, rope, fields),
        "norm_epsilon": fields["rms_norm_eps"],
        "qk_norm": architecture == "Qwen3ForCausalLM",
        "qkv_bias": architecture == "Qwen2ForCausalLM",
        "tie_embeddings": fields["tie_word_embeddings"],
        "max_position_embeddings": fields["max_position_embeddings"],
        "init_std": fields.get("initializer_range", 0.02),
    }
    try:
        return ModelConfig.model_validate(values), fields
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"]))
        raise InputError(f"{path}: {where + ': ' if where else ''}{problem['msg']}") from error


def _rope(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The rotary parameters that count: those of transformers 5 (`RotaryEmbeddingConfigMixin`).

    `rope_scaling` takes the place of `rope_parameters` as a whole where both stand there, unless it is empty.
    """
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(name) or {}
    if not isinstance(rope, dict):
        raise InputError(f"{path}: {name} is {rope!r}; needed: a mapping with rope_type, and what that type needs")
    nested = [key for key, value in rope.items() if isinstance(value, dict)]
    if nested:
        raise InputError(
            f"{path}: {name} holds rotary parameters of their own for {', '.join(nested)}; supported: the same for all "
            "layers, which stand in it directly"
        )
    return {key: value for key, value in rope.items() if value is not None}


def _rope_scaling(path: Path, rope: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any] | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise InputError(f"{path}: the rotary scaling is of type {kind!r}; supported: none, and llama3")
    factors = ("factor", "low_freq_factor", "high_freq_factor")
    missing = [name for name in factors if name not in rope]
    if missing:
        raise InputError(f"{path}: the rotary scaling of type llama3 lacks {', '.join(missing)}")
    # A field of config.json itself comes before the scaling's own, and without either it is the longest text.
    original = "original_max_position_embeddings"
    first_training = fields.get(original, rope.get(original, fields["max_position_embeddings"]))
    return {**{name: rope[name] for name in factors}, "original_max_position": first_training}


def _refuse_others(path: Path, architecture: str, fields: dict[str, Any], rope: dict[str, Any]) -> None:
    """Refuse, by name, the fields that mean another computation."""
    kinds: Any = fields.get("layer_types") or []
    checks: tuple[tuple[str, Any, Callable[[Any], bool], str], ...] = (
        ("hidden_act", "silu", lambda v: v in ("silu", "swish"), "SwiGLU with silu"),
        ("attention_bias", False, lambda v: not v, "no bias in attention, but those of Qwen2"),
        ("mlp_bias", False, lambda v: not v, "no bias in the MLP"),
        ("use_sliding_window", False, lambda v: not v, "attention over the whole document"),
        ("layer_types", [], lambda v: set(v) <= {"full_attention"}, "attention over the whole document"),
        ("num_local_experts", 0, lambda v: v in (0, 1), "no mixture of experts"),
        ("num_experts", 0, lambda v: v in (0, 1), "no mixture of experts"),
        ("partial_rotary_factor", 1.0, lambda v: v == 1.0, "rotary turns of whole heads"),
        ("quantization_config", None, lambda v: v is None, "weights as they were trained; dequantise them first"),
    )  # fmt: skip
    if architecture == "LlamaForCausalLM" and fields.get("sliding_window") is not None:
        raise InputError(f"{path}: sliding_window is {fields['sliding_window']}; needed: attention over the whole text")
    for name, default, good, needed in checks:
        value = kinds if name == "layer_types" else rope.get(name, fields.get(name, default))
        if not good(value):
            raise InputError(f"{path}: {name} is {value!r}; supported: {needed}")


def architecture_of(model: ModelConfig) -> str:
    """The Hugging Face architecture that computes what `model` does.

    Raises:
        InputError: none of them does.
    """
    if model.qk_norm and model.qkv_bias:
        raise InputError(
            "the model has norms of query and key heads (model.qk_norm) and biases (model.qkv_bias): no Hugging Face "
            "architecture that can be exported to has both"
        )
    if model.qk_norm:
        return "Qwen3ForCausalLM"
    if not model.qkv_bias:
        return "LlamaForCausalLM"
    if model.kv_channels * model.num_attention_heads != model.hidden_size:
        raise InputError(
            f"the model has biases (model.qkv_bias) and heads of width {model.kv_channels}: Qwen2's are of width "
            f"hidden_size / num_attention_heads = {model.hidden_size / model.num_attention_heads:g}"
        )
    return "Qwen2ForCausalLM"


def write_config(
    model: ModelConfig, *, vocab_size: int, dtype: str, max_position: int, special_ids: dict[str, int]
) -> dict[str, Any]:
    """The `config.json` of `model`, in the fields that every version of `transformers` reads.

    Args:
        model: shape.
        vocab_size: rows of the tables as they are exported.
        dtype: of the weights, "float32" or "bfloat16".
        max_position: longest sequence that it is for, in tokens.
        special_ids: the token space's.
    """
    architecture = architecture_of(model)
    scaling = model.rope_scaling
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": ARCHITECTURES[architecture][0],
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "hidden_act": "silu",
        "max_position_embeddings": max_position,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rope_base,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        "use_cache": True,
        "bos_token_id": special_ids["<bos>"],
        "eos_token_id": special_ids["<eos>"],
        "pad_token_id": special_ids["<pad>"],
        "torch_dtype": dtype,
    }
    if scaling is not None:
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        }
    if architecture == "LlamaForCausalLM":
        config["mlp_bias"] = False
    else:
        config["use_sliding_window"] = False
    if architecture == "Qwen2ForCausalLM":
        del config["head_dim"], config["attention_bias"]
    return config
