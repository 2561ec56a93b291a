"""Recipe section `data`: the datasets of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from megatron_speech.errors import InputError
from megatron_speech.recipe.base import StrictConfig
from megatron_speech.remote import is_url


class DataConfig(StrictConfig):
    """Recipe section `data`: the datasets of a run, shared by all of its stages."""

    datasets: list[str] | dict[str, str] = Field(
        description="prefixes P (of P.bin, P.idx, …): a list, each named by the last part of its path, or name: prefix "
        "(null drops one that a base names)"
    )
    validation_fraction: float = Field(
        default=0.01, ge=0.0, lt=1.0, description="share of the sources that is held out and never trained on"
    )
    split_seed: int = Field(default=0, description="seed of the hash that draws the validation sources")
    cache_dir: str | None = Field(
        default=None,
        description="folder on this node's disk: indices/<key> and, with stage_datasets, datasets/<sha256>; null: "
        "indices lie in `index_cache` of the run directory, and datasets are read where they are",
    )
    cache_gib: float | None = Field(
        default=None,
        gt=0.0,
        description="above this size what is least used of the datasets in cache_dir goes; null: never",
    )
    stage_datasets: bool | Literal["shards"] = Field(
        default=False,
        description="copy the datasets to cache_dir once per node, checked, and read them there; shards: fetch the "
        "parts of .bin that are needed next, and let those go that are not, within cache_gib",
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
        if self.stage_datasets == "shards" and self.cache_gib is None:
            raise ValueError("stage_datasets: shards needs cache_gib; say how much of the node's disk they may take")
        return self

    def index_directory(self, run_directory: Path) -> Path:
        """Where the sequence indices of a run lie."""
        return run_directory / "index_cache" if self.cache_dir is None else Path(self.cache_dir) / "indices"


def dataset_prefixes(data: DataConfig, base: str | Path | None = None) -> dict[str, str]:
    """Name → prefix of the recipe's datasets; relative prefixes are taken from `base` (default: where we are).

    A prefix may be a URL (s3://…, gs://…) where the datasets are staged.

    Raises:
        InputError: no dataset, two of one name, or a URL that nothing makes a local copy of.
    """
    if isinstance(data.datasets, dict):
        named = list(data.datasets.items())
    else:
        named = [(Path(prefix).name, prefix) for prefix in data.datasets]
    if not named:
        raise InputError("data.datasets is empty; list at least one dataset prefix")
    prefixes: dict[str, str] = {}
    for name, prefix in named:
        if name in prefixes:
            raise InputError(
                f"data.datasets: {prefixes[name]} and {prefix} would both be named {name!r}; "
                "give them names (data.datasets as a mapping, name: prefix)"
            )
        if is_url(prefix) and not data.stage_datasets:
            raise InputError(
                f"data.datasets: {prefix} is a URL, and training reads local files; set data.stage_datasets: true and "
                "name a data.cache_dir"
            )
        prefixes[name] = prefix if is_url(prefix) else str(Path(base or ".") / prefix)
    return prefixes
