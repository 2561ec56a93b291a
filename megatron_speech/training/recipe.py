"""A recipe: one typed YAML file that says everything a run does.

    base YAML(s) ← this YAML ← key=value overrides  →  Recipe (pydantic)  →  RUN/recipe.yaml

A key that the schema does not know is refused with its full dotted path and the nearest valid name. Relative
paths in a file are relative to that file; relative paths in `key=value` overrides are relative to the
directory the command runs in. The resolved recipe holds absolute paths only and reads back unchanged.

Light to import: no torch.
"""

from __future__ import annotations

import difflib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, field_validator, model_validator

from megatron_speech.data.config import DataConfig, StageDataConfig, StrictConfig
from megatron_speech.errors import InputError
from megatron_speech.files import write_text
from megatron_speech.model.config import ModelConfig
from megatron_speech.model.execution import Fp8Config, Precision, RecomputeConfig
from megatron_speech.parallel.pipeline_split import check_split
from megatron_speech.training.checkpoint_config import Cadence, CheckpointConfig
from megatron_speech.training.human_numbers import TokenCount, human_integer
from megatron_speech.training.initial import InitConfig, fill_model
from megatron_speech.training.optimizer_config import (
    EarlyStopConfig,
    EmaConfig,
    LearningRateConfig,
    OptimizerConfig,
    RampConfig,
    SpikesConfig,
    TableConfig,
)
from megatron_speech.training.parallel_config import ParallelConfig
from megatron_speech.training.remote import is_url
from megatron_speech.training.run_config import LoggingConfig, PreflightConfig, WatchdogConfig


class StageConfig(StageDataConfig):
    """One stage: what it trains on (see :class:`StageDataConfig`) and how."""

    tokens: TokenCount = Field(description="budget: positions fed to the model, padding included")
    seq_length: TokenCount
    global_batch_tokens: TokenCount = Field(description="positions per optimizer step; a multiple of seq_length")
    micro_batch_size: int = Field(default=1, gt=0, description="sequences per forward pass on one data-parallel rank")
    lr: LearningRateConfig
    batch_ramp: RampConfig | None = Field(default=None, description="smaller global batches to begin with; null: none")
    early_stop: EarlyStopConfig | None = Field(
        default=None, description="end the stage when validation no longer improves; null: it has its whole budget"
    )
    carry_optimizer: bool = Field(
        default=True, description="true: keep the optimizer's moments from the stage before; false: start them at zero"
    )
    allow_lr_increase: bool = Field(default=False, description="let this stage peak above the end of the stage before")
    skip: bool = Field(default=False, description="leave this stage out, as if it were not there")
    checkpoint: Cadence | None = Field(
        default=None, description="steps of this stage between checkpoints; null: checkpoint.interval_steps"
    )


class ValidationConfig(StrictConfig):
    """Recipe section `validation`: loss on held-out sources, also run at every checkpoint and stage end."""

    interval_steps: int = Field(default=1000, ge=0, description="steps between validations; 0: never validate")
    tokens: Annotated[int, BeforeValidator(human_integer)] = Field(
        default=1_000_000, gt=0, description="at most this many held-out positions per validation"
    )


class Recipe(StrictConfig):
    """The whole of a run; see the module's docstring for how it is read."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    run_dir: str | None = Field(default=None, description="null: runs/<name> beside the recipe file")
    seed: int = Field(default=0, ge=0, lt=2**31)
    deterministic: bool = Field(
        default=False, description="only kernels that give the same bits in every run; a GPU loses speed by it"
    )
    token_space: str = Field(description="file written by `megatron-speech token-space`")
    model: ModelConfig
    init: InitConfig | None = Field(default=None, description="weights of step 0; null: drawn from the seed")
    data: DataConfig
    stages: list[StageConfig] = Field(min_length=1)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    spikes: SpikesConfig | None = Field(
        default=None, description="skip steps that would do harm; null: a run ends at a loss that is not finite"
    )
    ema: EmaConfig | None = Field(default=None, description="keep a moving average of the weights; null: none")
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    precision: Precision = Field(
        default="fp32", description="of activations and weights (fp8: bf16, but the layers' products); masters are fp32"
    )
    fp8: Fp8Config = Field(default_factory=Fp8Config)
    recompute: RecomputeConfig = Field(default_factory=RecomputeConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    validation: ValidationConfig = Field(default_factory=ValidationConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
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
            if stage.steps < 1:
                raise ValueError(
                    f"stage {stage.name}: tokens {stage.tokens} is less than one step of global_batch_tokens "
                    f"{stage.global_batch_tokens}; raise tokens or lower global_batch_tokens"
                )
        for before, stage in itertools.pairwise(stages):
            if stage.lr.peak > before.lr.peak and not stage.allow_lr_increase:
                raise ValueError(
                    f"stage {stage.name}: lr.peak {stage.lr.peak:g} is above lr.peak {before.lr.peak:g} of stage "
                    f"{before.name}; the learning rate only drops from stage to stage. Lower it, or set "
                    "allow_lr_increase: true in this stage"
                )
        return stages

    @model_validator(mode="after")
    def _early_stop_needs_validation(self) -> Recipe:
        for stage in self.stages:
            if stage.early_stop is not None and self.validation.interval_steps == 0:
                raise ValueError(
                    f"stage {stage.name}: early_stop goes by validation, and validation.interval_steps is 0; set one"
                )
        return self

    @model_validator(mode="after")
    def _tied_head_is_the_table(self) -> Recipe:
        if self.model.tie_embeddings and self.optimizer.head != TableConfig():
            raise ValueError(
                "optimizer.head is set, but model.tie_embeddings is true: the head is the token table; say it under "
                "optimizer.embeddings, or set model.tie_embeddings: false"
            )
        return self

    @model_validator(mode="after")
    def _execution_makes_sense(self) -> Recipe:
        parallel = self.parallel
        if parallel.pipeline_layout is not None:
            check_split(parallel.pipeline_layout, self.model.num_layers, parallel.pipeline, parallel.virtual_pipeline)
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


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe at `path`, apply `key=value` overrides, check every field.

    A top-level `base: other.yaml` (or a list of them) is read first and merged under this file. In overrides
    a list item is addressed by number (`stages.0.tokens=1000`), a stage also by name (`stages.pt.tokens=1000`).

    Raises:
        InputError: an unreadable file, an unknown key (with the nearest valid one), a value out of range.
    """
    path = Path(path)
    config = _read_layers(path, seen=())
    for override in overrides:
        _apply_override(config, override)
    try:
        values = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise InputError(f"recipe {path}: {_first_line(error)}") from error
    assert isinstance(values, dict)
    fill_model(values, str(path))
    if values.get("run_dir") is None and isinstance(values.get("name"), str):
        values["run_dir"] = str(path.resolve().parent / "runs" / values["name"])
    return parse_recipe(values, source=str(path))


def parse_recipe(values: dict[Any, Any], source: str) -> Recipe:
    """Check plain `values` (from YAML) against the schema; `source` names them in errors.

    Raises:
        InputError: one sentence for the first problem found, and how many more there are.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        # An unknown key explains a missing one beside it (a misspelt name is both), so it comes first.
        problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
        more = f" ({len(problems) - 1} more problem{'s' * (len(problems) > 2)} after this)" if len(problems) > 1 else ""
        raise InputError(f"recipe {source}: {_explain(dict(problems[0]))}{more}") from error


def _explain(problem: dict[str, Any]) -> str:
    """One pydantic problem as a sentence."""
    location: tuple[str | int, ...] = problem["loc"]
    dotted = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        known = sorted(_known_keys(location[:-1]))
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return f"unknown key {dotted!r}; {hint}"
    if problem["type"] == "missing":
        return f"key {dotted!r} is missing and has no default"
    if problem["type"] == "value_error":  # raised by a validator of ours: already a sentence
        sentence = str(problem["ctx"]["error"])
        return sentence if not dotted or sentence.startswith((dotted, "stage ")) else f"{dotted}: {sentence}"
    return f"{dotted} = {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _known_keys(location: Sequence[str | int]) -> set[str]:
    """Names of the fields of the section at `location` ("stages", 0, "lr")."""
    models: list[type[BaseModel]] = [Recipe]
    for part in location:
        if isinstance(part, int):
            continue  # the item of a list: its model was entered with the list
        inner = [field.annotation for model in models if (field := model.model_fields.get(part)) is not None]
        models = [found for annotation in inner for found in _models_in(annotation)] or models
    return {name for model in models for name in model.model_fields}


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The pydantic models inside a type such as `list[StageConfig] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (list, dict, tuple, Union, UnionType, Annotated):
        for argument in get_args(annotation):
            yield from _models_in(argument)


def _read_layers(path: Path, seen: tuple[Path, ...]) -> DictConfig:
    """Read `path` over its bases; paths in each file become absolute against that file's folder."""
    path = path.resolve()
    if path in seen:
        raise InputError(f"recipe {path} is its own base (through {' → '.join(map(str, seen))}); break the circle")
    try:
        config = OmegaConf.load(path)
    except FileNotFoundError as error:
        raise InputError(f"recipe {path} does not exist; check the path") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {path} cannot be read: {error}") from error
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"recipe {path} is not valid YAML: {_first_line(error)}") from error
    layer = OmegaConf.to_container(config, resolve=False)
    if not isinstance(layer, dict) or not layer:
        raise InputError(f"recipe {path} holds no mapping of sections; it should start like `name: my_run`")
    bases = layer.pop("base", None)
    _absolutise(layer, path.parent)
    config = OmegaConf.create(layer)
    if bases is None:
        return config
    layers = [_read_layers(path.parent / str(base), (*seen, path)) for base in _as_list(bases)]
    merged = OmegaConf.merge(*layers, config)
    assert isinstance(merged, DictConfig)
    return merged


def _absolutise(layer: dict[Any, Any], folder: Path) -> None:
    """Make the relative paths of a recipe layer absolute against `folder`, in place."""

    def absolute(value: Any) -> Any:
        # An interpolation such as ${oc.env:DATA}/x is filled in later; it is expected to be absolute. A URL is.
        if not isinstance(value, str) or value.startswith("${") or is_url(value):
            return value
        return os.path.normpath(folder / Path(value).expanduser())

    data = layer.get("data")
    init = layer.get("init")
    for section, key in ((layer, "token_space"), (layer, "run_dir"), (data, "cache_dir"), (init, "checkpoint")):
        if isinstance(section, dict) and key in section:
            section[key] = absolute(section[key])
    datasets = data.get("datasets") if isinstance(data, dict) else None
    if isinstance(datasets, list):
        datasets[:] = [absolute(prefix) for prefix in datasets]
    elif isinstance(datasets, dict):
        datasets.update({name: absolute(prefix) for name, prefix in datasets.items()})


def _apply_override(config: DictConfig, override: str) -> None:
    """Apply one `dotted.key=value`; the value is read as YAML."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise InputError(f"override {override!r} is not of the form key=value, such as stages.0.tokens=1000")
    stages = config.get("stages")
    if parts[0] == "stages" and len(parts) > 1 and isinstance(stages, ListConfig) and not parts[1].isdigit():
        names = [stage.get("name") for stage in stages]
        if parts[1] not in names:
            raise InputError(
                f"override {override!r}: no stage is named {parts[1]!r}; the stages are {', '.join(map(str, names))}"
            )
        parts[1] = str(names.index(parts[1]))
    try:
        value = OmegaConf.to_container(OmegaConf.create(f"value: {text}"))["value"]  # type: ignore[index, call-overload]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"override {override!r}: {text!r} is not a YAML value ({_first_line(error)})") from error
    layer: dict[str, Any] = {parts[-1]: value}
    for part in reversed(parts[:-1]):
        layer = {part: layer}
    _absolutise(layer, Path.cwd())
    node: Any = config
    for position, part in enumerate(parts):
        layer = layer[part]
        index: str | int = _list_index(part, node, override) if isinstance(node, ListConfig) else part
        if position == len(parts) - 1:
            node[index] = layer
            return
        if isinstance(node, DictConfig) and node.get(part) is None:
            node[part] = {}
        node = node[index]
        if not isinstance(node, DictConfig | ListConfig):
            raise InputError(f"override {override!r}: {'.'.join(parts[: position + 1])} holds a value, not a section")


def _list_index(part: str, node: ListConfig, override: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise InputError(
            f"override {override!r}: {part!r} is not an item of a list of {len(node)} (0 to {len(node) - 1})"
        )
    return int(part)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
