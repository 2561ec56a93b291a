"""Recipe section `recompute`: activations computed again instead of kept, and what that costs.

Light to import: no torch.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from megatron_speech.recipe.base import StrictConfig
from megatron_speech.recipe.model import ModelConfig


class RecomputeConfig(StrictConfig):
    """Recipe section `recompute`: activations that the backward pass computes again instead of finding them kept.

    Losses and gradients do not change by a bit; memory is paid for with time.
    """

    mode: Literal["none", "selective", "full"] = Field(
        default="none", description="selective: the parts named in `modules`, of every layer; full: whole layers"
    )
    layers: int | None = Field(
        default=None, ge=1, description="full: layers of every pipeline chunk that are recomputed; null: all"
    )
    modules: tuple[Literal["core_attn", "mlp"], ...] | None = Field(
        default=None, description="selective: parts of a layer that are recomputed; null: core_attn"
    )

    @model_validator(mode="after")
    def _only_what_the_mode_reads(self) -> RecomputeConfig:
        if self.layers is not None and self.mode != "full":
            raise ValueError(f"recompute.layers is {self.layers}, but mode {self.mode} does not read it; leave it out")
        if self.modules is not None and (self.mode != "selective" or not self.modules):
            raise ValueError(
                f"recompute.modules is {list(self.modules)} with mode {self.mode}; name one or more with mode "
                "selective, or leave it out"
            )
        return self

    @property
    def parts(self) -> tuple[str, ...]:
        """What mode selective recomputes."""
        return self.modules or ("core_attn",)

    def core_fields(self) -> dict[str, Any]:
        """Fields of megatron-core's TransformerConfig."""
        if self.mode == "none":
            return {}
        if self.mode == "selective":
            return {"recompute_granularity": "selective", "recompute_modules": list(self.parts)}
        # uniform with chunks of one layer keeps every layer's input; block leaves the layers after the first N alone.
        method = {"recompute_method": "uniform", "recompute_num_layers": 1}
        if self.layers is not None:
            method = {"recompute_method": "block", "recompute_num_layers": self.layers}
        return {"recompute_granularity": "full", **method}

    def recomputed_layers(self, split: tuple[int, ...]) -> int:
        """Layers of the model of which something is computed twice, when its pieces have `split` layers."""
        if self.mode == "none":
            return 0
        return sum(split) if self.layers is None else sum(min(count, self.layers) for count in split)

    def flops_per_token(self, config: ModelConfig, seq_length: float, split: tuple[int, ...]) -> float:
        """Floating-point operations per token that recomputation adds: the forward pass of what is recomputed.

        A third of what :meth:`ModelConfig.flops_per_token` counts for it (forward, and twice that backward).
        `seq_length` is what a token can see, as there.
        """
        layers = self.recomputed_layers(split)
        if not layers:
            return 0.0
        attention = 2.0 * config.num_attention_heads * config.kv_channels * seq_length
        mlp = 6.0 * config.hidden_size * config.ffn_hidden_size
        if self.mode == "full":
            return layers * config.flops_per_token(seq_length, 0) / config.num_layers / 3.0
        return layers * (attention * ("core_attn" in self.parts) + mlp * ("mlp" in self.parts))

    def describe(self, config: ModelConfig, seq_length: float, vocab_size: int, split: tuple[int, ...]) -> str:
        """One line for the log: what is recomputed, and what it costs."""
        if self.mode == "none":
            return "nothing is recomputed in the backward pass"
        what = "" if self.mode == "full" else " and ".join(self.parts) + " of "
        share = self.flops_per_token(config, seq_length, split) / config.flops_per_token(seq_length, vocab_size)
        return (
            f"recompute {self.mode}: {what}{self.recomputed_layers(split)} of {config.num_layers} layers are computed "
            f"again in the backward pass, +{share:.1%} FLOPs"
        )
