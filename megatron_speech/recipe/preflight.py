"""Recipe section `preflight`: checks before the first step."""

from __future__ import annotations

from pydantic import Field

from megatron_speech.recipe.base import StrictConfig


class PreflightConfig(StrictConfig):
    """Recipe section `preflight`: checks before the first step."""

    max_clock_skew_seconds: float = Field(
        default=60.0, gt=0.0, description="a node whose clock differs more from the others' is refused"
    )
