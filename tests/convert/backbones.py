"""Small Hugging Face backbones with the structure of the public ones, made on the spot."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from megatron_speech.tokens.layouts import LAYOUTS
from megatron_speech.tokens.space import CodecDescription

CODEC = CodecDescription("toy", "toy-1", 16000, 50.0, ("q0",), (120,))
KINDS = ("llama", "qwen2", "qwen3")
VOCABULARY = 320  # rows; the tokenizer has fewer, as those of published tables do

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LLAMA_SPECIALS = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
    *(f"<|reserved_special_token_{i}|>" for i in range(3, 20)),
)


@functools.cache
def _tokenizer_json(qwen: bool) -> str:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    pattern = _LLAMA3.replace("{1,3}", "") if qwen else _LLAMA3
    if qwen:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["Convert the text to speech: one two three four", "नमस्ते"] * 20, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in LLAMA_SPECIALS])
    return str(tokenizer.to_str())


def make_tokenizer(layout: str | None = None, *, qwen: bool = False) -> tokenizers.Tokenizer:
    """LLaMA 3's structure (or Qwen's), as it is or as another project extends it for CODEC."""
    tokenizer = tokenizers.Tokenizer.from_str(_tokenizer_json(qwen))
    if layout is not None:
        tokenizer.add_tokens(LAYOUTS[layout].appended(CODEC.codebook_sizes[0]))
        size = tokenizer.get_vocab_size()
        tokenizer.add_tokens([f"<|extra_token_{i}|>" for i in range(-size % LAYOUTS[layout].multiple)])
    return tokenizer


def make_backbone(
    folder: Path,
    kind: str,
    *,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    tokenizer: tokenizers.Tokenizer | bool | None = True,
    **changes: Any,
) -> transformers.PreTrainedModel:
    """Save a model of random weights, large enough that every part of it counts in the logits; returns it."""
    shape: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 256, "bos_token_id": 290,
        "eos_token_id": 291, "tie_word_embeddings": tied,
    }  # fmt: skip
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e6}
    if kind == "llama":
        rope = {
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }  # fmt: skip
        shape["rms_norm_eps"] = 1e-5
    if kind == "qwen3":
        shape["head_dim"] = 32
    classes = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config}
    config = classes[kind](**{**shape, "rope_parameters": rope, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(float("norm" in name) + 0.3 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.to(dtype).eval()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer is True:
        tokenizer = make_tokenizer(qwen=kind != "llama")
    if tokenizer:
        tokenizer.save(str(folder / "tokenizer.json"))
    return model


def edit_config(folder: Path, **changes: Any) -> None:
    """Change fields of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
