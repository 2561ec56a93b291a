"""The typed part of a recipe that the data path reads: which datasets, and how a stage draws on them.

`training.recipe` embeds :class:`DataConfig` as the recipe's `data` section and extends
:class:`StageDataConfig` with what the optimizer needs. Types and ranges of single fields are checked here;
what depends on the datasets (a task without data, a language nobody speaks) is checked by `data.strata`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megatron_speech.token_space import MODALITIES

Share = float
"""A relative mass: any positive number; the masses of a stage are divided by their sum."""


class StrictConfig(BaseModel):
    """Base of every section: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class DataConfig(StrictConfig):
    """Recipe section `data`: the datasets of a run, shared by all of its stages."""

    datasets: list[str] | dict[str, str] = Field(
        description="prefixes P (of P.bin, P.idx, …): a list, each named by the last part of its path, or name: prefix"
    )
    validation_fraction: float = Field(
        default=0.01, ge=0.0, lt=1.0, description="share of the sources that is held out and never trained on"
    )
    split_seed: int = Field(default=0, description="seed of the hash that draws the validation sources")
    cache_dir: str | None = Field(
        default=None,
        description="folder on this node's disk: indices/<key> and, where asked for, datasets/<sha256>; null: indices "
        "lie in `index_cache` of the run directory, and datasets are read where they are",
    )
    cache_gib: float | None = Field(
        default=None,
        gt=0.0,
        description="above this size the datasets in cache_dir that are least used go; null: never",
    )
    stage_datasets: bool = Field(
        default=False, description="copy the datasets to cache_dir once per node, checked, and read them there"
    )
    on_change: Literal["refuse", "continue"] = Field(
        default="refuse",
        description="what to do with a run that is continued with another blend: refuse, naming the change, or "
        "continue, repeating no document before the ones that are still due",
    )
    prefetch: int = Field(default=2, ge=1, description="global batches prepared ahead of the step that uses them")
    workers: int = Field(default=1, ge=1, description="threads that prepare the batches of each process")

    @model_validator(mode="after")
    def _staging_needs_a_folder(self) -> DataConfig:
        if self.stage_datasets and self.cache_dir is None:
            raise ValueError("stage_datasets needs cache_dir; name a folder on this node's disk")
        return self

    def index_directory(self, run_directory: Path) -> Path:
        """Where the sequence indices of a run lie."""
        return run_directory / "index_cache" if self.cache_dir is None else Path(self.cache_dir) / "indices"


class LossConfig(StrictConfig):
    """Stage section `loss`: what a position counts for by what its label is, and what the sum is divided by."""

    text: float = Field(default=1.0, ge=0.0, description="weight of text labels; audio and special likewise")
    audio: float = Field(default=1.0, ge=0.0)
    special: float = Field(default=1.0, ge=0.0)
    prompt: float = Field(
        default=1.0,
        ge=0.0,
        description="factor of everything up to and including the first <speech_start>; 0 makes the stage an SFT stage",
    )
    normalize: Literal["global", "modality"] = Field(
        default="global",
        description="global: Σ weight·ce / Σ weight over the global batch; modality: the mean ce of text, audio and "
        "special labels, each over the global batch, times their weights and added up",
    )
    label_smoothing: float = Field(
        default=0.0, ge=0.0, lt=1.0, description="share of the target that is spread over all ids; training only"
    )
    z_loss: float = Field(
        default=0.0, ge=0.0, description="factor of (log Σ exp logit)², added to the loss; training only"
    )

    @property
    def normalizers(self) -> int:
        """Sums of weights that a global batch is divided by: one, or one per modality."""
        return 1 if self.normalize == "global" else len(MODALITIES)

    def scales(self, weight_sums: Sequence[float]) -> list[float]:
        """What weight 1 counts for in the loss, so that the loss is Σ scale · weight · ce.

        Args:
            weight_sums: Σ weight over the whole global batch, [`normalizers`]: of all labels, or by modality.

        Returns:
            One factor per normaliser, 0 where there is no weight: a group that is absent adds nothing. By modality m
            the factor is weight_m / Σ_m weight, so that Σ_m weight·ce becomes weight_m times a mean whose own
            weights are those of prompts alone.
        """
        numerators = [1.0] if self.normalize == "global" else [getattr(self, name) for name in MODALITIES]
        return [top / total if total > 0.0 else 0.0 for top, total in zip(numerators, weight_sums, strict=True)]


class PackingConfig(StrictConfig):
    """Stage section `packing`: how documents fill sequences of `seq_length` tokens."""

    mode: Literal["auto", "cut", "fit", "bucket"] = Field(
        default="auto",
        description="cut: documents run on over sequence edges, no padding; fit: a document is never cut; bucket: a "
        "sequence is a rectangle of whole documents of about the same target length; auto: cut where loss.prompt is "
        "1, else fit",
    )
    oversize: Literal["refuse", "drop"] = Field(
        default="refuse", description="fit and bucket: what to do with documents longer than a sequence holds"
    )
    max_tokens: int | None = Field(
        default=None,
        gt=0,
        description="bucket only: documents of a sequence × length of the longest of them; null: seq_length",
    )
    open_sequences: int = Field(
        default=512,
        ge=1,
        description="fit and bucket: the packer's look-ahead, in sequences (at the beginning of a stage, an eighth of "
        "what lies before); more pads less, and reorders over a longer run",
    )


class StitchConfig(StrictConfig):
    """Stage section `stitch`: adjacent segments of one recording become one long document, up to `seq_length`.

    Adjacent: same source, same speaker and language, consecutive `segment_order`, and a gap within the bounds.
    """

    max_gap_seconds: float = Field(
        default=1.0, ge=0.0, description="longest silence between the end of a segment and the start of the next"
    )
    max_overlap_seconds: float = Field(
        default=0.1, ge=0.0, description="furthest that a segment may start before the end of the one before"
    )
    singles: Literal["keep", "drop"] = Field(
        default="keep", description="documents without a neighbour: keep them as they are, or leave them out, counted"
    )
    missing: Literal["refuse", "single"] = Field(
        default="refuse",
        description="documents without source, speaker, segment_order or times, which nothing can be joined to: refuse "
        "the dataset, or take them as documents without a neighbour",
    )


class StratumConfig(StrictConfig):
    """One explicit stratum of a stage: the documents that pass every filter given, and their mass."""

    task: str
    mass: Share
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
    """What the data path needs of a stage. `training.recipe.Stage` extends it."""

    name: str
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
    seq_length: int = Field(gt=0)
    global_batch_tokens: int = Field(gt=0, description="positions per optimizer step; a multiple of seq_length")
    batch_ramp: BatchRampConfig | None = Field(default=None, description="smaller global batches to begin with")
    packing: PackingConfig = Field(default_factory=PackingConfig)
    stitch: StitchConfig | None = Field(
        default=None, description="join adjacent segments of a recording to long documents; null: leave them apart"
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
        return [*parts, (self.global_batch_tokens, left // self.global_batch_tokens)]

    @property
    def steps(self) -> int:
        """Optimizer steps that the budget pays for (whole global batches)."""
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
