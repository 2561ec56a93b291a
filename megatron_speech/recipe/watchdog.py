"""Recipe section `watchdog`: how long a step may take before the run is ended."""

from __future__ import annotations

from pydantic import Field

from megatron_speech.recipe.base import StrictConfig


class WatchdogConfig(StrictConfig):
    """Recipe section `watchdog`: when a process that hangs ends itself. Limits are in seconds."""

    enabled: bool = Field(default=True, description="false: a process that hangs hangs for ever")
    timeout_seconds: float | None = Field(
        default=None, gt=0.0, description="of a step; null: median_factor × the median step, at least floor_seconds"
    )
    median_factor: float = Field(default=20.0, gt=1.0, description="how many median steps a step may take")
    floor_seconds: float = Field(default=300.0, gt=0.0, description="a limit made of the median is never shorter")
    pause_seconds: float = Field(
        default=3600.0, gt=0.0, description="of the first step of a process, a validation, a save"
    )
    peer_seconds: float = Field(
        default=60.0, ge=0.0, description="seconds without a heartbeat after which a rank is given up; 0: never"
    )
