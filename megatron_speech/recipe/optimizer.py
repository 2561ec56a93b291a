"""The typed parts of a recipe of the optimizer: learning rates, parameter groups, what stays frozen.

Light to import: no torch.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_speech.recipe.base import StrictConfig


class TableConfig(StrictConfig):
    """Sections `optimizer.embeddings` and `optimizer.head`: what differs for that table."""

    lr_multiplier: float = Field(default=1.0, gt=0.0, description="of the stage's learning rate, peak and end alike")
    weight_decay: float | None = Field(default=None, ge=0.0, description="null: that of the section `optimizer`")


class OptimizerConfig(StrictConfig):
    """Recipe section `optimizer`: AdamW, decoupled weight decay, gradient clipping by global norm."""

    beta1: float = Field(default=0.9, ge=0.0, lt=1.0, description="decay of the mean of the gradients")
    beta2: float = Field(default=0.95, ge=0.0, lt=1.0, description="decay of the mean of their squares")
    eps: float = Field(default=1e-8, gt=0.0, lt=1.0, description="added to the root of that mean")
    weight_decay: float = Field(default=0.1, ge=0.0, description="of matrices; never of norms and biases")
    clip_grad: float = Field(default=1.0, ge=0.0, description="largest global gradient norm; 0: do not clip")
    embeddings: TableConfig = Field(
        default_factory=TableConfig, description="the token table, which is the output head too where they are tied"
    )
    head: TableConfig = Field(default_factory=TableConfig, description="the output head of an untied model")
    layer_lr_decay: float = Field(
        default=1.0,
        gt=0.0,
        le=1.0,
        description="d: of L layers, the one with l layers above it trains with d^l of the learning rate, an untied "
        "token table with d^L, final norm and head with all of it",
    )
    freeze: list[str] = Field(
        default_factory=list,
        description="shell patterns of names of parameters that are not trained; layers count from 0 through the whole "
        "model: decoder.layers.[0-3].*, embedding.*, output_layer.*",
    )
    freeze_rows: Literal["text"] | Annotated[int, Field(gt=0)] | None = Field(
        default=None,
        description="rows of the token table and of the head that stay bit for bit: text: those of the text ids; a "
        "number: those of the ids below it",
    )
