"""Recipe section `parallel`: who holds which part of the model and of the data."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field, model_validator

from megatron_speech.errors import InputError
from megatron_speech.recipe.base import StrictConfig


class ParallelConfig(StrictConfig):
    """Recipe section `parallel`: how the world is divided. What is left over is data-parallel."""

    tensor: int = Field(default=1, ge=1, description="ranks that share the matrices of every layer")
    pipeline: int = Field(default=1, ge=1, description="ranks that share the layers")
    virtual_pipeline: int | None = Field(
        default=None, ge=2, description="model chunks per pipeline stage (interleaved schedule); null: one"
    )
    pipeline_layout: tuple[int, ...] | None = Field(
        default=None,
        description="layers of every chunk, in the order of the model: chunk c is on stage c mod pipeline; null: "
        "balanced by cost, counting token table and output head",
    )
    context: int = Field(default=1, ge=1, description="ranks that share every document's tokens (Transformer Engine)")
    sequence_parallel: bool = Field(default=False, description="shard norms and residuals over the tensor ranks")
    distributed_optimizer: bool = Field(default=False, description="shard optimizer state over the data-parallel ranks")
    overlap_grad_reduce: bool = Field(default=False, description="reduce gradients while the backward pass runs")

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor * self.pipeline * self.context

    @property
    def micro_batch_multiple(self) -> int:
        """What the number of micro-batches per step has to be a multiple of: the interleaved schedule's groups."""
        return self.pipeline if self.virtual_pipeline is not None else 1

    @model_validator(mode="after")
    def _what_needs_company(self) -> ParallelConfig:
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError("sequence_parallel needs tensor above 1; set it to false or raise tensor")
        if self.pipeline_layout is not None and self.pipeline == 1:
            raise ValueError("pipeline_layout needs pipeline above 1; leave it out or raise pipeline")
        return self


def check_pipeline_layout(split: Sequence[int], num_layers: int, stages: int, chunks: int | None) -> tuple[int, ...]:
    """A split that a recipe gives (`parallel.pipeline_layout`), or an InputError that says what is wrong with it."""
    pieces = stages * (chunks or 1)
    shown = f"parallel.pipeline_layout {list(split)}"
    if len(split) != pieces:
        raise InputError(
            f"{shown} has {len(split)} entries: parallel.pipeline {stages} × virtual_pipeline {chunks or 1} needs "
            f"{pieces}, the layers of every piece in the order of the model; or leave it out to have it balanced"
        )
    if sum(split) != num_layers:
        raise InputError(
            f"{shown} adds up to {sum(split)} layers, model.num_layers is {num_layers}; make it add up, or leave it "
            "out to have it balanced"
        )
    if any(count < 0 for count in split) or any(count == 0 for count in split[1:-1]):
        raise InputError(
            f"{shown} leaves a piece without a layer: only the first piece, which has the token table, and the last "
            "one, which has the output head, can do without"
        )
    return tuple(split)
