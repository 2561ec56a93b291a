"""Shape of a model: typed, with presets, and the arithmetic of its size and cost."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megatron_speech.wording import nearest

if TYPE_CHECKING:
    from torch import Tensor

# Decoder shapes by name. Published ones carry the shape of the checkpoint they are named after.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(num_layers=2, hidden_size=64, ffn_hidden_size=176, num_attention_heads=4, num_query_groups=2),
    "digits": dict(num_layers=4, hidden_size=192, ffn_hidden_size=512, num_attention_heads=6),
    "smoke": dict(num_layers=8, hidden_size=320, ffn_hidden_size=896, num_attention_heads=10, num_query_groups=5),
    "100m": dict(num_layers=12, hidden_size=768, ffn_hidden_size=2048, num_attention_heads=12, num_query_groups=4),
    "qwen2.5-0.5b": dict(
        num_layers=24,
        hidden_size=896,
        ffn_hidden_size=4864,
        num_attention_heads=14,
        num_query_groups=2,
        rope_base=1e6,
        norm_epsilon=1e-6,
        qkv_bias=True,
    ),
    "llama-3.2-1b": dict(
        num_layers=16,
        hidden_size=2048,
        ffn_hidden_size=8192,
        num_attention_heads=32,
        num_query_groups=8,
        kv_channels=64,
        rope_base=5e5,
        rope_scaling=dict(factor=32.0),
    ),
    "llama-3.1-8b": dict(
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=14336,
        num_attention_heads=32,
        num_query_groups=8,
        rope_base=5e5,
        rope_scaling=dict(factor=8.0),
        tie_embeddings=False,
    ),
    "qwen3-0.6b": dict(
        num_layers=28,
        hidden_size=1024,
        ffn_hidden_size=3072,
        num_attention_heads=16,
        num_query_groups=8,
        kv_channels=128,
        rope_base=1e6,
        norm_epsilon=1e-6,
        qk_norm=True,
    ),
    "qwen3-1.7b": dict(
        num_layers=28,
        hidden_size=2048,
        ffn_hidden_size=6144,
        num_attention_heads=16,
        num_query_groups=8,
        kv_channels=128,
        rope_base=1e6,
        norm_epsilon=1e-6,
        qk_norm=True,
    ),
}
# The sizes that recipes are made for, by size.
PRESETS |= {
    "0.6b": PRESETS["qwen3-0.6b"],
    "1b": PRESETS["llama-3.2-1b"],
    "1.7b": PRESETS["qwen3-1.7b"],
    "8b": PRESETS["llama-3.1-8b"],
}


class RopeScaling(BaseModel):
    """Llama 3's stretch of the rotary frequencies to longer texts than those of its first training.

    A frequency that turns fewer than `low_freq_factor` times within `original_max_position` tokens is divided by
    `factor`, one that turns more than `high_freq_factor` times stays, those between are blended in proportion to
    their turns ("The Llama 3 Herd of Models", arXiv:2407.21783; the defaults are those of Llama 3.1 and 3.2).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    factor: float = Field(ge=1.0, description="8 in Llama 3.1, 32 in Llama 3.2")
    low_freq_factor: float = Field(1.0, gt=0, description="fewer turns than this: divided by `factor`")
    high_freq_factor: float = Field(4.0, gt=0, description="more turns than this: left as they are")
    original_max_position: int = Field(8192, gt=0, description="tokens of a sequence of the first training")

    @model_validator(mode="after")
    def _check(self) -> RopeScaling:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"model.rope_scaling.high_freq_factor {self.high_freq_factor:g} must be above low_freq_factor "
                f"{self.low_freq_factor:g}"
            )
        return self


class ModelConfig(BaseModel):
    """A decoder-only transformer: RMSNorm, SwiGLU, grouped-query attention, RoPE.

    Give every shape, or a `preset` and what differs from it. A shape that cannot be is a pydantic ValidationError
    with one sentence per field.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    preset: str | None = Field(None, description="name of a shape in PRESETS; other fields override it")
    num_layers: int = Field(gt=0, description="transformer layers")
    hidden_size: int = Field(gt=0, description="width of the residual stream")
    ffn_hidden_size: int = Field(gt=0, description="width of the SwiGLU between its two projections")
    num_attention_heads: int = Field(gt=0, description="heads of queries")
    num_query_groups: int = Field(gt=0, description="heads of keys and values; default num_attention_heads")
    kv_channels: int = Field(gt=0, description="width of a head; default hidden_size / num_attention_heads")
    rope_base: float = Field(10_000.0, gt=0, description="base of the rotary frequencies (RoPE theta)")
    rope_scaling: RopeScaling | None = Field(None, description="Llama 3's scaling of the frequencies; none by default")
    norm_epsilon: float = Field(1e-5, gt=0, lt=1, description="added to the mean square under RMSNorm's root")
    qk_norm: bool = Field(False, description="RMSNorm of every query and key head (Qwen3)")
    qkv_bias: bool = Field(False, description="bias of the query, key and value projection (Qwen2)")
    tie_embeddings: bool = Field(True, description="the output head is the embedding table")
    max_position_embeddings: int | None = Field(
        None,
        gt=0,
        description="tokens that a backbone is for, as an export says; bounds nothing in training",
    )
    init_std: float = Field(0.02, gt=0, le=10, description="standard deviation of matrices drawn from the seed")
    backend: Literal["auto", "torch", "te"] = Field("auto", description="attention and layer implementation")

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        given = {key: value for key, value in values.items() if value is not None}
        name = given.get("preset")
        if name is not None:
            if name not in PRESETS:
                near = nearest(str(name), PRESETS, cutoff=0.0)
                raise ValueError(f"model.preset {name!r} is not known; nearest: {near!r} (all: {', '.join(PRESETS)})")
            given = {**PRESETS[name], **given}
        heads, hidden = given.get("num_attention_heads"), given.get("hidden_size")
        if isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
            given.setdefault("num_query_groups", heads)
            if "kv_channels" not in given:
                if hidden % heads:
                    raise ValueError(
                        f"model.hidden_size {hidden} is not a multiple of model.num_attention_heads {heads}: "
                        "choose one that is, or give model.kv_channels"
                    )
                given["kv_channels"] = hidden // heads
            # Two thirds of the usual four hidden sizes, since SwiGLU has three matrices; a multiple of 64 is fast.
            given.setdefault("ffn_hidden_size", max(64, round(hidden * 8 / 3 / 64) * 64))
        return given

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"model.num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"model.num_query_groups {self.num_query_groups}"
            )
        if self.kv_channels % 2:
            raise ValueError(f"model.kv_channels is {self.kv_channels}: RoPE turns pairs, so it must be even")
        return self

    def inverse_frequencies(self) -> Tensor:
        """Angle per position of each rotary pair of a head: fp32 [kv_channels / 2] on the CPU.

        rope_base^(-2i/kv_channels) (arXiv:2104.09864), under `rope_scaling` if there is one. Every back-end turns
        by these.
        """
        import torch

        exponents = torch.arange(0, self.kv_channels, 2, dtype=torch.float32) / self.kv_channels
        frequencies = 1.0 / self.rope_base**exponents
        scaling = self.rope_scaling
        if scaling is None:
            return frequencies
        turns = scaling.original_max_position * frequencies / (2.0 * math.pi)
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept.clamp_(0.0, 1.0)
        return frequencies * (kept + (1.0 - kept) / scaling.factor)

    def parameters(self, vocab: int) -> int:
        """Number of trained parameters with a table of `vocab` rows.

        Per layer: h·d·(2·heads + 2·groups) of attention, 3·h·f of SwiGLU, 2·h of norms (and 2·d of query and key
        norms, d·(heads + 2·groups) of biases where used); one last norm; the table, twice if the head is not tied.
        """
        return (
            self._matrix_parameters()
            + self._vector_parameters()
            + vocab * self.hidden_size * (1 if self.tie_embeddings else 2)
        )

    def flops_per_token(self, seq_length: float, vocab: int) -> float:
        """Floating-point operations of forward and backward for one token (a multiply-add is two).

        6 per parameter of every matrix that the token passes, the head included and the embedding look-up not,
        plus 6·layers·heads·d·seq_length for causal attention (scores and values, 12 without the mask's half).
        `seq_length` is what a token can see: the mean document length weighted by tokens when documents are packed.
        Recomputation is not counted (the convention of MFU: PaLM, arXiv:2204.02311, appendix B).
        """
        attention = 6.0 * self.num_layers * self.num_attention_heads * self.kv_channels * seq_length
        return 6.0 * (self._matrix_parameters() + vocab * self.hidden_size) + attention

    def _matrix_parameters(self) -> int:
        heads = 2 * self.num_attention_heads + 2 * self.num_query_groups
        attention = self.hidden_size * self.kv_channels * heads
        return self.num_layers * (attention + 3 * self.hidden_size * self.ffn_hidden_size)

    def _vector_parameters(self) -> int:
        per_layer = 2 * self.hidden_size
        if self.qk_norm:
            per_layer += 2 * self.kv_channels
        if self.qkv_bias:
            per_layer += self.kv_channels * (self.num_attention_heads + 2 * self.num_query_groups)
        return self.num_layers * per_layer + self.hidden_size
