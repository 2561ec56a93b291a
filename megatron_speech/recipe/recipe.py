"""A recipe: one typed YAML file that defines everything a run does.

    base YAML(s) ← this YAML ← key=value overrides  →  Recipe (pydantic)  →  RUN/recipe.yaml

A key that the schema does not know is refused with its full dotted path and the nearest valid name. Relative
paths in a file are relative to that file; relative paths in `key=value` overrides are relative to the
directory the command runs in. The resolved recipe holds absolute paths only and reads back unchanged.

Light to import: no torch.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import yaml
from pydantic import Field, field_validator, model_validator

from megatron_speech.errors import InputError
from megatron_speech.files import write_text
from megatron_speech.recipe.base import StrictConfig
from megatron_speech.recipe.checkpoint import CheckpointConfig
from megatron_speech.recipe.data import DataConfig
from megatron_speech.recipe.ema import EmaConfig
from megatron_speech.recipe.init import InitConfig
from megatron_speech.recipe.logging import LoggingConfig
from megatron_speech.recipe.model import ModelConfig
from megatron_speech.recipe.optimizer import OptimizerConfig, TableConfig
from megatron_speech.recipe.parallel import ParallelConfig, check_pipeline_layout
from megatron_speech.recipe.precision import Fp8Config, Precision
from megatron_speech.recipe.preflight import PreflightConfig
from megatron_speech.recipe.profile import ProfileConfig
from megatron_speech.recipe.recompute import RecomputeConfig
from megatron_speech.recipe.spikes import SpikesConfig
from megatron_speech.recipe.stage import StageConfig
from megatron_speech.recipe.validation import ValidationConfig
from megatron_speech.recipe.watchdog import WatchdogConfig


class Recipe(StrictConfig):
    """The whole of a run; see the module's docstring for how it is read."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="of the run, in its log and run_dir")
    run_dir: str | None = Field(default=None, description="null: runs/<name> beside the recipe file")
    seed: int = Field(default=0, ge=0, lt=2**31, description="of initial weights and of the order of the data")
    deterministic: bool = Field(
        default=False, description="only kernels that give the same bits in every run; a GPU loses speed by it"
    )
    token_space: str = Field(description="file written by `megatron-speech token-space`")
    model: ModelConfig = Field(description="the shape of the decoder: a preset, or every size")
    init: InitConfig | None = Field(default=None, description="weights of step 0; null: drawn from the seed")
    data: DataConfig
    stages: list[StageConfig] = Field(min_length=1, description="what is trained on, one after the other")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    spikes: SpikesConfig | None = Field(
        default=None, description="skip steps that would do harm; null: a run ends at a loss that is not finite"
    )
    ema: EmaConfig | None = Field(default=None, description="keep a moving average of the weights; null: none")
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    precision: Precision = Field(
        default="fp32", description="of activations and weights (fp8: bf16, but the layers' products); masters are fp32"
    )
    fp8: Fp8Config = Field(
        default_factory=Fp8Config, description="with precision fp8: how Transformer Engine scales to 8 bits"
    )
    recompute: RecomputeConfig = Field(default_factory=RecomputeConfig)
    checkpoint: CheckpointConfig = Field(
        default_factory=CheckpointConfig,
        description="when checkpoints are written, which stay, where copies go; one ends every stage",
    )
    validation: ValidationConfig = Field(default_factory=ValidationConfig)
    logging: LoggingConfig = Field(
        default_factory=LoggingConfig, description="where the numbers go; metrics.jsonl is always written"
    )
    profile: ProfileConfig | None = Field(default=None, description="record a trace of a few steps; null: none")
    preflight: PreflightConfig = Field(default_factory=PreflightConfig)
    watchdog: WatchdogConfig = Field(default_factory=WatchdogConfig)

    @field_validator("stages")
    @classmethod
    def _stages_make_sense(cls, stages: list[StageConfig]) -> list[StageConfig]:
        names = [stage.name for stage in stages]
        stages = [stage for stage in stages if not stage.skip]
        if not stages:
            raise ValueError("every stage is skipped; set skip: false in one")
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two stages are named {twice!r}; give every stage a name of its own")
        for stage in stages:
            _check_batch(stage, data_parallel=1)
            if stage.tokens < stage.global_batch_tokens:
                raise ValueError(
                    f"stage {stage.name}: tokens {stage.tokens} is less than one step of global_batch_tokens "
                    f"{stage.global_batch_tokens}; raise tokens or lower global_batch_tokens"
                )
        for before, stage in itertools.pairwise(stages):
            # Two floats of one value may differ in their last bits once they are scaled.
            if stage.peak_learning_rate > before.peak_learning_rate * (1.0 + 1e-9) and not stage.allow_lr_increase:
                raise ValueError(
                    f"stage {stage.name}: lr.peak {stage.peak_learning_rate:g} is above lr.peak "
                    f"{before.peak_learning_rate:g} of stage {before.name}; the learning rate only drops from stage to "
                    "stage. Lower it, or set allow_lr_increase: true in this stage"
                )
        return stages

    @model_validator(mode="after")
    def _early_stop_needs_validation(self) -> Recipe:
        for stage in self.stages:
            if stage.early_stop is not None and self.validation.interval_steps == 0:
                raise ValueError(
                    f"stage {stage.name}: early_stop needs validation losses, and validation.interval_steps is 0; "
                    "set one"
                )
        return self

    @model_validator(mode="after")
    def _exports_have_what_they_export(self) -> Recipe:
        export = self.checkpoint.export_hf
        if export is not None and export.ema and self.ema is None:
            raise ValueError(
                "checkpoint.export_hf.ema is true, but the run keeps no moving average; add a section ema, or set it "
                "false"
            )
        return self

    @model_validator(mode="after")
    def _tied_head_is_the_table(self) -> Recipe:
        if self.model.tie_embeddings and self.optimizer.head != TableConfig():
            raise ValueError(
                "optimizer.head is set, but model.tie_embeddings is true: the head is the token table; set it under "
                "optimizer.embeddings, or set model.tie_embeddings: false"
            )
        return self

    @model_validator(mode="after")
    def _execution_makes_sense(self) -> Recipe:
        parallel = self.parallel
        if parallel.pipeline_layout is not None:
            check_pipeline_layout(
                parallel.pipeline_layout, self.model.num_layers, parallel.pipeline, parallel.virtual_pipeline
            )
        if self.precision != "fp8":
            if self.fp8 != Fp8Config():
                raise ValueError(f"fp8 is set, but precision is {self.precision}; set precision: fp8, or leave fp8 out")
            return self
        self.fp8.check_widths(self.model, parallel.tensor, parallel.sequence_parallel)
        multiple = self.fp8.token_multiple(parallel.tensor, parallel.sequence_parallel)
        for stage in self.stages:
            if parallel.context == 1 and stage.seq_length * stage.micro_batch_size % multiple:  # else it is padded
                raise ValueError(
                    f"stage {stage.name}: seq_length {stage.seq_length} × micro_batch_size {stage.micro_batch_size} is "
                    f"not a multiple of {multiple}, which precision fp8 needs; choose one that is, or precision bf16"
                )
        if self.fp8.bf16_ends > self.model.num_layers // parallel.pipeline:
            raise ValueError(
                f"fp8.bf16_ends is {self.fp8.bf16_ends}: it can be {self.model.num_layers // parallel.pipeline} at "
                "most, the layers of a pipeline stage"
            )
        return self

    @property
    def run_directory(self) -> Path:
        """Where the run's files go."""
        return Path(self.run_dir if self.run_dir is not None else Path("runs") / self.name)

    @property
    def total_steps(self) -> int:
        """Optimizer steps over all stages."""
        return sum(stage.steps for stage in self.stages)

    def data_parallel_size(self, world_size: int) -> int:
        """Data-parallel ranks of a world of `world_size` processes, after checking that all batches divide.

        Raises:
            InputError: the world or a stage's batch cannot be divided; names the nearest values that can.
        """
        size = self.parallel.model_parallel_size
        if world_size % size:
            lower, upper = world_size // size * size, (world_size // size + 1) * size
            nearest = f"{lower} or {upper}" if lower else f"{upper}"
            raise InputError(
                f"recipe {self.name}: {world_size} processes cannot be divided by parallel.tensor × pipeline × context "
                f"= {size}; start {nearest} processes, or change the parallel section"
            )
        data_parallel = world_size // size
        for stage in self.stages:
            try:
                _check_batch(stage, data_parallel, self.parallel.micro_batch_multiple)
            except ValueError as error:
                raise InputError(f"recipe {self.name}: {error}") from error
        return data_parallel

    def to_yaml(self) -> str:
        """The recipe as YAML that reads back to an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe to `path`, whole or not at all."""
        write_text(path, self.to_yaml())


def _check_batch(stage: StageConfig, data_parallel: int, micro_batches: int = 1) -> None:
    """Refuse a global batch that micro-batches do not fill exactly; the message holds the nearest that do."""
    unit = stage.seq_length * stage.micro_batch_size * data_parallel * micro_batches
    sizes = {"global_batch_tokens": stage.global_batch_tokens}
    if stage.batch_ramp is not None:
        # Of these two every global batch of the ramp is made up.
        sizes |= {"batch_ramp.start": stage.batch_ramp.start, "batch_ramp.increment": stage.batch_ramp.increment}
    for field, tokens in sizes.items():
        if tokens % unit == 0:
            continue
        lower, upper = tokens // unit * unit, (tokens // unit + 1) * unit
        nearest = f"{lower} and {upper}" if lower else f"{upper}"
        ranks = f" × {data_parallel} data-parallel ranks" if data_parallel > 1 else ""
        if micro_batches > 1:
            ranks += f" × {micro_batches} (micro-batches of an interleaved pipeline come in such groups)"
        raise ValueError(
            f"stage {stage.name}: {field} {tokens} is not a multiple of seq_length "
            f"{stage.seq_length} × micro_batch_size {stage.micro_batch_size}{ranks} = {unit}; "
            f"the nearest that {'are' if lower else 'is'}: {nearest}"
        )


# ------------------------------------------------------------------------------------------ reading
