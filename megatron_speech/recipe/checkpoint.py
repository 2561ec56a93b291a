"""Recipe section `checkpoint`, and the stage field of the same name: when one is written, what is kept, where it goes.

Light to import: no torch.
"""

from __future__ import annotations

import itertools
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, field_validator

from megatron_speech.recipe.base import StrictConfig
from megatron_speech.recipe.numbers import human_integer

_SECRET_WORDS = ("secret", "password", "token", "credential")


class IntervalConfig(StrictConfig):
    """One part of a stage's cadence: a checkpoint every `every` steps, up to step `until` of the stage."""

    every: Annotated[int, BeforeValidator(human_integer)] = Field(gt=0, description="steps between checkpoints")
    until: Annotated[int, BeforeValidator(human_integer)] | None = Field(
        default=None, gt=0, description="last step of the stage that this holds for; null: to the stage's end"
    )


def _follow_each_other(parts: list[IntervalConfig]) -> list[IntervalConfig]:
    for before, part in itertools.pairwise(parts):
        if before.until is None or (part.until is not None and part.until <= before.until):
            raise ValueError(
                f"checkpoint: `every: {before.every}, until: {before.until}` is followed by `every: {part.every}, "
                f"until: {part.until}`; every part but the last needs an `until`, and they have to rise"
            )
    return parts


def _parts(value: Any) -> Any:
    """`checkpoint: 1000` is short for one part."""
    return value if isinstance(value, list) or value is None else [{"every": value}]


Cadence = Annotated[
    list[IntervalConfig], BeforeValidator(_parts), Field(min_length=1), AfterValidator(_follow_each_other)
]
"""Dense early, then sparse: `[{until: 20000, every: 2000}, {every: 5000}]`, or one number."""


def is_due(cadence: list[IntervalConfig], stage_step: int) -> bool:
    """Whether a checkpoint is due after `stage_step` steps of a stage."""
    part = next((part for part in cadence if part.until is None or stage_step <= part.until), None)
    return part is not None and stage_step % part.every == 0


class UploadConfig(StrictConfig):
    """Recipe section `checkpoint.upload`: every checkpoint is copied to a URL in the background."""

    url: str = Field(pattern=r"^[a-z][a-z0-9+.-]*://.", description="folder for the copies, such as s3://bucket/run1")
    keep_last: int | None = Field(
        default=None, ge=1, description="newest copies kept there besides milestones, stage ends and best; null: all"
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="fsspec's options of the storage, such as endpoint_url; no credentials"
    )
    max_waiting: int = Field(
        default=4, ge=1, description="checkpoints kept here only because their copy is not there yet"
    )
    wait_minutes: float = Field(
        default=30.0,
        ge=0.0,
        description="a finished run waits so long for its copies; less than watchdog.pause_seconds",
    )

    @field_validator("options")
    @classmethod
    def _no_secrets(cls, options: dict[str, Any]) -> dict[str, Any]:
        for key in options:
            if key == "key" or any(word in key.lower() for word in _SECRET_WORDS):
                raise ValueError(
                    f"options.{key} looks like a credential, and a recipe is copied into every run and checkpoint; "
                    "leave it to the environment (AWS_ACCESS_KEY_ID, AWS_PROFILE …)"
                )
        return options


def _upload(value: Any) -> Any:
    """`upload: s3://bucket/prefix` is short for a section with that url."""
    return {"url": value} if isinstance(value, str) else value


class ExportConfig(StrictConfig):
    """Recipe section `checkpoint.export_hf`: checkpoints made Hugging Face folders in RUN/hf, in the background."""

    every: Annotated[int, BeforeValidator(human_integer)] = Field(
        gt=0, description="export the checkpoints whose step is a multiple of this"
    )
    stage_ends: bool = Field(default=True, description="export the last checkpoint of every stage too")
    keep_last: int | None = Field(default=None, ge=1, description="newest exports kept; null: all")
    ema: bool = Field(default=False, description="export the moving average of the weights, which `ema` keeps")


def _export(value: Any) -> Any:
    """`export_hf: 5000` is short for a section with that `every`."""
    return value if isinstance(value, dict | ExportConfig) or value is None else {"every": value}


class CheckpointConfig(StrictConfig):
    """Recipe section `checkpoint`. One is always written at the end of a stage."""

    interval_steps: int = Field(
        default=1000,
        ge=0,
        description="steps of the run between checkpoints, in stages without `checkpoint`; 0: only at stage ends",
    )
    asynchronous: bool = Field(
        default=True, description="true: training continues while a checkpoint is written; false: it waits"
    )
    keep_last: int = Field(default=2, ge=1, description="newest sound checkpoints kept; the best one is kept besides")
    keep_every: int = Field(default=0, ge=0, description="keep every checkpoint whose step is a multiple; 0: none")
    keep_stage_ends: bool = Field(default=True, description="keep the last checkpoint of every stage")
    upload: Annotated[UploadConfig | None, BeforeValidator(_upload)] = Field(
        default=None, description="URL that checkpoints are copied to, or a section; null: nowhere"
    )
    export_hf: Annotated[ExportConfig | None, BeforeValidator(_export)] = Field(
        default=None, description="steps between Hugging Face folders made of checkpoints, or a section; null: none"
    )
