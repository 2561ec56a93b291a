"""Recipe section `validation`: how often, and on how much."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from megatron_speech.recipe.base import StrictConfig
from megatron_speech.recipe.numbers import human_integer


class ValidationConfig(StrictConfig):
    """Recipe section `validation`: loss on held-out sources, also run at every checkpoint and stage end."""

    interval_steps: int = Field(default=1000, ge=0, description="steps between validations; 0: never validate")
    tokens: Annotated[int, BeforeValidator(human_integer)] = Field(
        default=1_000_000, gt=0, description="at most this many held-out positions per validation"
    )
