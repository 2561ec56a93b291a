"""Recipe section `stages`: what a stage trains on, for how long, and how.

Types and ranges of single fields are checked here; what depends on the datasets (a task without data, a language
nobody speaks) is checked by `data.blend.strata`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from megatron_speech.recipe.base import StrictConfig
from megatron_speech.recipe.checkpoint import Cadence
from megatron_speech.recipe.learning_rate import LearningRateConfig
from megatron_speech.recipe.loss import LossConfig
from megatron_speech.recipe.numbers import TokenCount
from megatron_speech.recipe.packing import PackingConfig, ShuffleWindowConfig, StitchConfig

Share = float
"""A relative mass: any positive number; the masses of a stage are divided by their sum."""


class StratumConfig(StrictConfig):
    """One explicit stratum of a stage: the documents that pass every filter given, and their mass."""

    task: str = Field(description="of the documents: speech_lm, tts …")
    mass: Share = Field(description="a positive number, relative to those of the stage's other strata")
    name: str | None = Field(default=None, description="name in the report; null: made of the filters")
    datasets: list[str] | None = Field(default=None, description="names of datasets; null: every dataset of the task")
    languages: list[str] | None = Field(default=None, description="languages; null: all")
    sources: list[str] | None = Field(default=None, description="values of dataset_source; null: all")
    where: dict[str, Any] = Field(
        default_factory=dict,
        description="column of the documents table, or extra.NAME: a value, a list of values, {min, max}, "
        "{not: value or list}, {null: true or false}",
    )
    otherwise: bool = Field(
        default=False, description="of the documents that pass the filters, only those that no other stratum takes"
    )
    max_epochs: float | None = Field(
        default=None, gt=0.0, description="repeated more often than this is warned about; null: the stage's max_epochs"
    )
    epoch_limit: float | None = Field(
        default=None, gt=0.0, description="never repeated more often than this; null: the stage's epoch_limit"
    )


class BatchRampConfig(StrictConfig):
    """Stage section `batch_ramp`: global batches that grow in equal parts of `over`, up to `global_batch_tokens`."""

    start: int = Field(gt=0, description="positions of the first global batches")
    increment: int = Field(gt=0, description="positions that each part adds to the global batch")
    over: int = Field(gt=0, description="positions trained on until the global batch has its full size")


class StageDataConfig(StrictConfig):
    """What the data path needs of a stage. :class:`StageConfig` extends it."""

    name: str = Field(min_length=1, description="in logs, in overrides (stages.NAME.tokens=2M) and for --through")
    task_mass: dict[str, Share] | None = Field(
        default=None, description="task: share of the tokens trained on; give this or `strata`"
    )
    strata: list[StratumConfig] | None = Field(default=None, description="explicit strata; give this or `task_mass`")
    language_temperature: float = Field(
        default=1.0, ge=0.0, le=1.0, description="a language's share of its task ∝ tokens^T: 1 natural, 0 equal"
    )
    source_caps: dict[str, float] = Field(
        default_factory=dict,
        description="dataset_source: greatest share of the stage's tokens, 0 < cap <= 1; the others take the surplus",
    )
    max_epochs: float = Field(
        default=4.0, gt=0.0, description="a stratum repeated more often than this is warned about, never refused"
    )
    epoch_limit: float | None = Field(
        default=None,
        gt=0.0,
        description="a stratum gets at most this many epochs: the rest of its share goes to the others of its group",
    )
    tokens: int = Field(gt=0, description="budget: positions fed to the model, padding included")
    seq_length: int = Field(gt=0, description="positions of a sequence")
    global_batch_tokens: int = Field(gt=0, description="positions per optimizer step; a multiple of seq_length")
    batch_ramp: BatchRampConfig | None = Field(default=None, description="smaller global batches to begin with")
    packing: PackingConfig = Field(default_factory=PackingConfig)
    stitch: StitchConfig | None = Field(
        default=None, description="join adjacent segments of a recording to long documents; null: leave them apart"
    )
    shuffle_window: ShuffleWindowConfig | None = Field(
        default=None,
        description="take the documents of an epoch from a few shards of the dataset at a time, for datasets larger "
        "than the node's disk; null: an epoch is a permutation of all documents",
    )
    loss: LossConfig = Field(default_factory=LossConfig)
    allow_text_in_sft: bool = Field(default=False, description="let text_lm documents into a stage with loss.prompt 0")

    @property
    def is_sft(self) -> bool:
        """Whether prompts are given, not learned: proportions then count target tokens only."""
        return self.loss.prompt == 0.0

    @property
    def packing_mode(self) -> Literal["cut", "fit", "bucket"]:
        """The packing mode with `auto` resolved."""
        if self.packing.mode != "auto":
            return self.packing.mode
        return "cut" if self.loss.prompt == 1.0 else "fit"

    @property
    def max_document_tokens(self) -> int | None:
        """Tokens of the longest document that a sequence takes whole; None where documents are cut."""
        if self.packing_mode == "cut":
            return None
        if self.packing_mode == "bucket" and self.packing.max_tokens is not None:
            return self.packing.max_tokens
        return self.seq_length

    @property
    def global_batch_sequences(self) -> int:
        """Sequences per optimizer step, over all data-parallel ranks."""
        return self.global_batch_tokens // self.seq_length

    def batches(self) -> list[tuple[int, int]]:
        """(positions per optimizer step, steps with that many), in the order of training; whole global batches only.

        Their sum is the multiple that is nearest to `tokens`: at most half a global batch more or less.

        Of a ramp from b₀ by increments of i in K = (global_batch_tokens - b₀)/i parts, part k has
        ⌈over / (K · (b₀ + k·i))⌉ steps of b₀ + k·i positions; the rest of the budget has global_batch_tokens.
        """
        parts: list[tuple[int, int]] = []
        left, ramp = self.tokens, self.batch_ramp
        if ramp is not None:
            count = (self.global_batch_tokens - ramp.start) // ramp.increment
            for size in range(ramp.start, self.global_batch_tokens, ramp.increment):
                steps = min(-(-ramp.over // (count * size)), left // size)
                parts.append((size, steps))
                left -= steps * size
        size = self.global_batch_tokens
        return [*parts, (size, (2 * left + size) // (2 * size))]

    @property
    def steps(self) -> int:
        """Optimizer steps of the budget (whole global batches, see :meth:`batches`)."""
        return sum(steps for _, steps in self.batches())

    @property
    def n_sequences(self) -> int:
        """Sequences that the stage trains on: `steps` whole global batches."""
        return self.sequences_after(self.steps)

    def sequences_after(self, step: int) -> int:
        """Sequences that the first `step` steps of the stage take."""
        tokens = 0
        for size, steps in self.batches():
            tokens += size * min(step, steps)
            step -= min(step, steps)
        return tokens // self.seq_length

    def batch_at(self, step: int) -> tuple[int, int]:
        """(sequences of the global batch that comes after `step` steps, step after which its size changes)."""
        end = 0
        for size, steps in self.batches():
            end += steps
            if step < end:
                return size // self.seq_length, end
        raise ValueError(f"stage {self.name} has {end} steps, and there is none after {step}")

    @model_validator(mode="after")
    def _ramp_goes_up(self) -> StageDataConfig:
        ramp = self.batch_ramp
        if ramp is None:
            return self
        distance = self.global_batch_tokens - ramp.start
        if distance <= 0 or distance % ramp.increment:
            raise ValueError(
                f"stage {self.name}: batch_ramp goes from {ramp.start} to global_batch_tokens "
                f"{self.global_batch_tokens} in steps of {ramp.increment}; it has to start below, by a multiple of "
                "its increment"
            )
        if ramp.over > self.tokens:
            raise ValueError(f"stage {self.name}: batch_ramp.over {ramp.over} is more than its tokens {self.tokens}")
        return self


class RampConfig(BatchRampConfig):
    """Stage section `batch_ramp`, with token counts as people write them."""

    start: TokenCount = Field(description="positions of the first global batches")
    increment: TokenCount = Field(description="positions that each part of the ramp adds to the global batch")
    over: TokenCount = Field(description="positions trained on until the global batch has its full size")


class EarlyStopConfig(StrictConfig):
    """Stage section `early_stop`: the stage ends when the audio loss of its validations no longer falls."""

    patience: int = Field(default=5, ge=1, description="validations in a row without a new best loss that end it")
    min_delta: float = Field(default=0.01, ge=0.0, description="what a loss has to be below the best by, to be one")


class StageConfig(StageDataConfig):
    """One stage: what it trains on (see :class:`StageDataConfig`) and how."""

    tokens: TokenCount = Field(
        description="budget: positions fed to the model, padding included; rounded to the nearest whole global batch"
    )
    seq_length: TokenCount = Field(description="positions of a sequence")
    global_batch_tokens: TokenCount = Field(description="positions per optimizer step; a multiple of seq_length")
    micro_batch_size: int = Field(default=1, gt=0, description="sequences per forward pass on one data-parallel rank")
    lr: LearningRateConfig = Field(description="the learning rate by step")
    batch_ramp: RampConfig | None = Field(default=None, description="smaller global batches to begin with; null: none")
    early_stop: EarlyStopConfig | None = Field(
        default=None, description="end the stage when validation no longer improves; null: it has its whole budget"
    )
    carry_optimizer: bool = Field(
        default=True, description="true: keep the optimizer's moments from the stage before; false: start them at zero"
    )
    allow_lr_increase: bool = Field(default=False, description="let this stage peak above the peak of the stage before")
    skip: bool = Field(default=False, description="leave this stage out, as if it were not there")
    checkpoint: Cadence | None = Field(
        default=None, description="steps of this stage between checkpoints; null: checkpoint.interval_steps"
    )

    @property
    def peak_learning_rate(self) -> float:
        """The highest learning rate of a step: `lr.peak`, scaled to the full global batch where a rule says so."""
        return self.lr.peak * self.lr.batch_factor(self.global_batch_tokens)
