"""What to do about a run that has left the numbers: commands that continue it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from megatron_speech.recipe.recipe import Recipe
from megatron_speech.training.checkpoint.store import list_checkpoints


def advice(recipe: Recipe, stage: str, directory: Path, changes: Collection[Mapping[str, Any]] = ()) -> str:
    """How to go on with the newest checkpoint and a lower learning rate, or with `spikes`.

    Args:
        recipe: of the run; its learning rates are halved.
        stage: name of the one that diverged; later ones are lowered only where they would be above it.
        directory: RUN/checkpoints.
        changes: of the recipe that the run was continued with: the newest checkpoint may be from before them.
    """
    newest = next(iter(list_checkpoints(directory)), None)
    where = "from the beginning, since there is no checkpoint," if newest is None else f"from {newest.name}"
    command = f"megatron-speech train {shlex.quote(str(directory.parent / 'recipe.yaml'))}"
    before = {str(change["key"]): change["after"] for change in changes}
    lowered = f"{command}{_options({**before, **lower_rates(recipe, stage)})}"
    skipping = f"; or have such steps skipped: {command}{_options(before)} spikes.skip_limit=10"
    return (
        f"continue {where} with half the learning rate, started as this run was: {lowered}"
        f"{'' if recipe.spikes is not None else skipping}; --rewind-to STEP goes back to an earlier checkpoint"
    )


def _options(changes: Mapping[str, Any]) -> str:
    return "".join(f" --change {shlex.quote(f'{key}={json.dumps(value)}')}" for key, value in changes.items())


def lower_rates(recipe: Recipe, stage: str) -> dict[str, float]:
    """Learning rates of a recipe that is valid again when that of `stage` is halved: key → value."""
    changed: dict[str, float] = {}
    highest: float | None = None
    for one in recipe.stages:
        peak = one.lr.peak
        if one.name == stage:
            peak = peak / 2
        elif highest is not None and not one.allow_lr_increase:
            peak = min(peak, highest)
        if peak != one.lr.peak:
            changed[f"stages.{one.name}.lr.peak"] = peak
            if one.lr.end is not None and one.lr.end > peak:
                changed[f"stages.{one.name}.lr.end"] = peak
        highest = peak if one.name == stage or highest is not None else None
    return changed
