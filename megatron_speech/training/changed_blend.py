"""A run that is continued with another blend: found, refused or carried out, before anything is built."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from megatron_speech.data.dataset.indexed import TokenDataset
from megatron_speech.data.sequences.history import (
    Continuation,
    Entry,
    History,
    blend_spec,
    continuation_path,
    find_changes,
)
from megatron_speech.data.sequences.index_build import index_key
from megatron_speech.data.sequences.index_cache import open_table
from megatron_speech.data.stage import StageData, open_datasets
from megatron_speech.errors import InputError
from megatron_speech.recipe.data import dataset_prefixes
from megatron_speech.recipe.load import parse_recipe
from megatron_speech.recipe.recipe import Recipe
from megatron_speech.tokens.space import TokenSpace
from megatron_speech.training.checkpoint.store import CheckpointInfo
from megatron_speech.training.health.agreement import raise_on_all_ranks


def stage_histories(
    info: CheckpointInfo | None,
    recipe: Recipe,
    datasets: Mapping[str, TokenDataset],
    space: TokenSpace,
    *,
    is_main: bool,
) -> tuple[dict[str, History], str | None]:
    """What each stage was trained with so far, by name, and what changes now, as a sentence. A collective.

    Where the running stage's blend has changed, the main process writes down what its index has taken, and every
    process reads it: processes on other nodes need not hold that index.

    Raises:
        InputError: the blend has changed and `data.on_change` is refuse, a dataset was replaced, or the index that
            the run was trained with is neither there nor can be built again.
    """
    histories: dict[str, History] = {}
    if info is None:
        return histories, None
    current, taken = int(info.fields["stage_index"]), int(info.fields["stage_step"])
    change: tuple[str, list[str]] | None = None
    with raise_on_all_ranks():
        for index, stage in enumerate(recipe.stages[: current + 1]):
            entries: list[Entry] = info.fields["blend"][stage.name]
            over = index < current or taken >= stage.steps or stage.name in info.fields.get("ended_early", {})
            histories[stage.name] = History(entries, _continuation(recipe, stage.name, entries), closed=over)
            if over:
                continue
            spec = blend_spec(stage, recipe.data, datasets, recipe.seed)
            if changes := find_changes(entries[-1]["spec"], spec, datasets):
                change = stage.name, changes
        if change is not None and recipe.data.on_change == "refuse":
            raise InputError(
                f"run {recipe.run_directory}, checkpoint {info.path.name}: the blend of stage {change[0]} has changed: "
                f"{'; '.join(change[1])}. Set it back, start a new run with another run_dir, or set data.on_change: "
                "continue to go on with the changed blend"
            )
    if change is None:
        return histories, None
    name, changes = change
    stage, history = recipe.stages[current], histories[name]
    from_sequence = stage.sequences_after(taken)
    path = continuation_path(recipe.run_directory, name, history.entries[-1]["key"], from_sequence)
    with raise_on_all_ranks():
        if is_main:
            _taken_so_far(info, recipe, datasets, space, history, from_sequence).save(path)
    with raise_on_all_ranks():
        continuation = Continuation.load(path)
    reason = "; ".join(changes)
    histories[name] = history.changed(reason, continuation)
    return histories, f"{name} goes on from sequence {from_sequence:,} with a changed blend: {reason}"


def _continuation(recipe: Recipe, stage: str, entries: list[Entry]) -> Continuation | None:
    """What the index in use took over, from the run directory."""
    if entries[-1]["continuation"] is None:
        return None
    path = continuation_path(recipe.run_directory, stage, entries[-2]["key"], entries[-1]["from_sequence"])
    return Continuation.load(path, entries[-1]["continuation"])


def _taken_so_far(
    info: CheckpointInfo,
    recipe: Recipe,
    datasets: Mapping[str, TokenDataset],
    space: TokenSpace,
    history: History,
    from_sequence: int,
) -> Continuation:
    """What the run has taken of the index that it was trained with; built again if it is no longer there."""
    entry = history.entries[-1]
    before = parse_recipe(info.fields["recipe"], str(info.path / "checkpoint.json"))
    cache = recipe.data.index_directory(recipe.run_directory)
    if not (cache / entry["key"]).is_dir():
        _build_again(before, int(info.fields["stage_index"]), space, history, cache)
    table, content = open_table(cache / entry["key"], entry["key"])
    lengths = {name: np.asarray(dataset.lengths) for name, dataset in datasets.items()}
    for name, prefix in dataset_prefixes(before.data).items():
        if name not in lengths:
            # Taken out of the recipe, but perhaps not for ever: what it gave is remembered while its files are there.
            with contextlib.suppress(InputError):
                lengths[name] = np.asarray(TokenDataset(prefix).lengths)
    return Continuation.after(table, content["strata"], lengths, from_sequence, history.continuation)


def _build_again(before: Recipe, index: int, space: TokenSpace, history: History, cache: Path) -> None:
    """Build the index that the checkpoint's recipe describes, if its datasets are still what they were."""
    key, stage = history.entries[-1]["key"], before.stages[index]
    gone = (
        f"stage {stage.name}: what the run was trained on stands in the sequence index {key}, which is not in {cache} "
        "and cannot be built again, since a dataset has changed; restore that folder, or put the datasets back as "
        "they were"
    )
    try:
        datasets = open_datasets(before.data, space)
    except InputError as error:
        raise InputError(gone) from error
    found = index_key(
        stage, before.data, datasets, split="train", n_sequences=stage.n_sequences, seed=before.seed,
        continuation=history.continuation,
    )  # fmt: skip
    if found != key:
        raise InputError(gone)
    StageData(stage, before.data, datasets, space, seed=before.seed, cache_dir=cache, history=history)
