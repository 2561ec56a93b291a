"""`megatron-speech stage-datasets RECIPE.yaml`: a recipe's datasets, copied to this node's disk before training."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_speech.console import output
from megatron_speech.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help="the recipe; copied to its data.cache_dir")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for `megatron-speech train`")


def run(args: argparse.Namespace) -> int:
    """Copy what is not there yet, checked; print name and local prefix of every dataset.

    With `data.stage_datasets: shards` that is all but `.bin`.
    """
    from megatron_speech.data.dataset.staging import stage_datasets, stage_shards
    from megatron_speech.recipe.data import dataset_prefixes
    from megatron_speech.recipe.load import load_recipe

    data = load_recipe(args.recipe, args.overrides).data
    if data.cache_dir is None:
        raise InputError(f"{args.recipe}: data.cache_dir is null; name a folder on this node's disk")
    prefixes = dataset_prefixes(data.model_copy(update={"stage_datasets": True}))
    if data.stage_datasets == "shards":
        assert data.cache_gib is not None  # checked by DataConfig
        for name, store in stage_shards(prefixes, data.cache_dir, data.cache_gib).items():
            output(f"{name}: {store.prefix} (.bin by the shard: nothing of it is fetched before it is needed)")
        return 0
    for name, prefix in stage_datasets(prefixes, data.cache_dir, data.cache_gib).items():
        output(f"{name}: {prefix}")
    return 0
