"""Recipe sections about watching a run: where its numbers go, and when it is given up."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_speech.recipe.base import StrictConfig


class WandbConfig(StrictConfig):
    """Section `logging.wandb`: a run of Weights & Biases. Needs the package wandb."""

    project: str = Field(min_length=1, description="that the run appears in")
    entity: str | None = Field(default=None, description="user or team; null: the account's own")
    group: str | None = Field(default=None, description="that the run belongs to; null: none")
    name: str | None = Field(default=None, description="null: the recipe's name")
    tags: list[str] = Field(default_factory=list, description="of the run")
    mode: Literal["online", "offline"] = Field(
        default="online", description="offline: write RUN/wandb only, for `wandb sync` from a node with a network"
    )


class LoggingConfig(StrictConfig):
    """Recipe section `logging`. metrics.jsonl is always written."""

    interval_steps: int = Field(default=10, ge=1, description="steps between records")
    tensorboard: bool = Field(default=True, description="write RUN/tensorboard too, where tensorboard is installed")
    prometheus_port: int | None = Field(
        default=None, ge=0, le=65535, description="rank 0 serves http://HOST:PORT/metrics; 0: a free port; null: none"
    )
    wandb: WandbConfig | None = Field(default=None, description="also log to Weights & Biases; null: no")
    straggler_factor: float = Field(
        default=1.5, gt=1.0, description="a rank whose own time per step is above this × the median is named"
    )
