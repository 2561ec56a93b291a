"""Recipe sections about watching a run: where its numbers go, and when it is given up."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_speech.data.config import StrictConfig


class WandbConfig(StrictConfig):
    """Section `logging.wandb`: a run of Weights & Biases. Needs the package wandb."""

    project: str
    entity: str | None = None
    group: str | None = None
    name: str | None = Field(default=None, description="null: the recipe's name")
    tags: list[str] = Field(default_factory=list)
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


class PreflightConfig(StrictConfig):
    """Recipe section `preflight`: checks before the first step."""

    max_clock_skew_seconds: float = Field(
        default=60.0, gt=0.0, description="a node whose clock differs more from the others' is refused"
    )


class WatchdogConfig(StrictConfig):
    """Recipe section `watchdog`: when a process that hangs ends itself. Limits are in seconds."""

    enabled: bool = True
    timeout_seconds: float | None = Field(
        default=None, gt=0.0, description="of a step; null: median_factor × the median step, at least floor_seconds"
    )
    median_factor: float = Field(default=20.0, gt=1.0)
    floor_seconds: float = Field(default=300.0, gt=0.0)
    pause_seconds: float = Field(
        default=3600.0, gt=0.0, description="of the first step of a process, a validation, a save"
    )
    peer_seconds: float = Field(
        default=60.0, ge=0.0, description="a rank that was not heard of for so long is given up; 0: never"
    )
