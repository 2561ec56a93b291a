"""Recipe section `ema`: a moving average of the weights."""

from __future__ import annotations

from pydantic import Field

from megatron_speech.recipe.base import StrictConfig


class EmaConfig(StrictConfig):
    """Recipe section `ema`: a moving average of the weights, saved with every checkpoint."""

    decay: float = Field(default=0.9999, gt=0.0, lt=1.0, description="at most; update n (from 0) has (1+n)/(10+n)")
    use_for_validation: bool = Field(
        default=False, description="true: validation, early stop and the best checkpoint judge the average"
    )
