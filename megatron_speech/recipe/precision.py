"""How a model is computed: FP8, and activations computed again instead of kept; with their cost.

Recipe sections and what they mean to megatron-core's TransformerConfig. Light to import: no torch.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from megatron_speech.recipe.base import StrictConfig
from megatron_speech.recipe.model import ModelConfig

Precision = Literal["fp32", "bf16", "fp8"]
"""Of matrix products and activations. fp8: products of the layers in FP8, everything else in bf16."""


class Fp8Config(StrictConfig):
    """Recipe section `fp8`, read when `precision: fp8`: how Transformer Engine scales to 8 bits."""

    recipe: Literal["delayed", "tensorwise", "blockwise"] = Field(
        default="tensorwise",
        description="scale from the maxima of steps before (delayed), of the tensor itself (tensorwise), or of blocks "
        "of 128 (blockwise)",
    )
    format: Literal["hybrid", "e4m3"] | None = Field(
        default=None,
        description="hybrid: e4m3 forward, e5m2 gradients. null: hybrid, but e4m3 where blockwise",
    )
    amax_history: int = Field(default=1024, ge=1, description="steps whose maxima a delayed scale is taken from")
    bf16_ends: int = Field(default=0, ge=0, description="first and last layers of the model that stay in bf16")

    @model_validator(mode="after")
    def _ends_need_a_scale_of_their_own(self) -> Fp8Config:
        if self.bf16_ends and self.recipe == "delayed":
            raise ValueError(
                f"fp8.bf16_ends is {self.bf16_ends}, but a delayed scale is reduced over all layers at once; set "
                "fp8.recipe to tensorwise or blockwise, or bf16_ends to 0"
            )
        return self

    def token_multiple(self, tensor: int, sequence_parallel: bool) -> int:
        """What a micro-batch's tokens have to be a multiple of.

        Transformer Engine multiplies in FP8 where the tokens of a product are a multiple of 16 (8 forward, 16 for the
        gradient of a weight), and gathers blocks of 128 whole under sequence parallelism.
        """
        if not sequence_parallel:
            return 16
        return tensor * (128 if self.recipe == "blockwise" else 16)

    def check_widths(self, config: ModelConfig, tensor: int, sequence_parallel: bool) -> None:
        """Raise ValueError for a model whose matrices cannot be multiplied in FP8 on `tensor` ranks."""
        heads, groups, width = config.num_attention_heads, config.num_query_groups, config.kv_channels
        multiple = 128 if self.recipe == "blockwise" and sequence_parallel else 16
        for name, size, unit in (
            ("model.hidden_size", config.hidden_size, multiple),
            ("model.ffn_hidden_size", config.ffn_hidden_size, 16 * tensor),
            ("model.num_attention_heads × kv_channels", heads * width, 16 * tensor),
            (
                "model.(num_attention_heads + 2·num_query_groups) × kv_channels",
                (heads + 2 * groups) * width,
                16 * tensor,
            ),
        ):
            if size % unit:
                raise ValueError(
                    f"{name} is {size}: precision fp8 needs a multiple of {unit} on parallel.tensor {tensor}; choose "
                    "another shape or layout, or precision bf16"
                )

    def core_fields(self) -> dict[str, Any]:
        """Fields of megatron-core's TransformerConfig."""
        fields: dict[str, Any] = {
            "fp8": self.format or ("e4m3" if self.recipe == "blockwise" else "hybrid"),
            "fp8_recipe": self.recipe,
        }
        if self.recipe == "delayed":
            fields |= {"fp8_amax_history_len": self.amax_history, "fp8_amax_compute_algo": "max"}
        if self.bf16_ends:
            fields |= {
                "first_last_layers_bf16": True,
                "num_layers_at_start_in_bf16": self.bf16_ends,
                "num_layers_at_end_in_bf16": self.bf16_ends,
            }
        return fields
