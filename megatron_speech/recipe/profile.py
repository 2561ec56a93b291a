"""Recipe section `profile`: steps of which a trace is recorded."""

from __future__ import annotations

from pydantic import Field, model_validator

from megatron_speech.recipe.base import StrictConfig


class ProfileConfig(StrictConfig):
    """Recipe section `profile`: what runs, and where memory goes, in a few steps. They are slower than the others."""

    steps: tuple[int, int] = Field(description="first and last step of the run, counted from 1, that are recorded")
    ranks: tuple[int, ...] = Field(default=(0,), min_length=1, description="ranks that record")
    warmup: int = Field(default=1, ge=0, description="steps before the first that run under the profiler unrecorded")
    stacks: bool = Field(default=False, description="record the Python stack of every operator too")

    @model_validator(mode="after")
    def _first_before_last(self) -> ProfileConfig:
        first, last = self.steps
        if not 1 <= first <= last:
            raise ValueError(
                f"profile.steps is [{first}, {last}]; needed are the first and the last step, counted from 1, such as "
                "[10, 13]"
            )
        return self
