"""Continuing a run: what may have changed in its recipe since, and what would make it another run."""

from __future__ import annotations

from typing import Any

from megatron_speech.console import is_main_process, output
from megatron_speech.data.sequences.history import BLEND_FIELDS
from megatron_speech.errors import InputError
from megatron_speech.recipe.load import parse_recipe
from megatron_speech.recipe.recipe import Recipe
from megatron_speech.tokens.space import TokenSpace
from megatron_speech.training.checkpoint.store import CheckpointInfo

_HARMLESS = ("name", "run_dir", "token_space", "data.datasets", "data.cache_dir", "data.cache_gib",
             "data.stage_datasets", "data.on_change", "data.prefetch", "data.workers", "parallel", "checkpoint",
             "validation", "logging", "profile", "ema", "spikes", "deterministic", "recompute", "model.backend",
             "init")  # fmt: skip
_HARMLESS_IN_STAGE = ("max_epochs", "micro_batch_size", "checkpoint", "early_stop")


def check_resumable(info: CheckpointInfo, recipe: Recipe, space: TokenSpace, fingerprints: dict[str, str]) -> list[str]:
    """Refuse to continue a checkpoint with a recipe that means another run; returns the harmless changes.

    Harmless: where files lie, where the weights of step 0 came from, layout, intervals, the budget of a stage that is
    not over, anything in stages that have not begun; what a stage draws on, where `data.on_change` is continue. Not
    harmless: whatever would make the losses from here on differ from those of the run that was started (model, token
    space, datasets, seed, optimizer, the running stage).

    Args:
        fingerprints: name → fingerprint of the manifest of each dataset.

    Raises:
        InputError: names the first such field, what it was and what it is now.
    """
    where = f"run {recipe.run_directory}, checkpoint {info.path.name}"
    if space.hash != info.fields["token_space_hash"]:
        raise InputError(
            f"{where}: it was trained with token space {info.fields['token_space_hash']}, {recipe.token_space} is "
            f"{space.hash}; give the first one back, or start a new run with another run_dir"
        )
    # What a changed blend means for the running stage is found out, and carried out, by `changed_blend`.
    may_change = recipe.data.on_change == "continue"
    another_run = "or start a new run with another run_dir"
    remedy = "start a new run with another run_dir, or set data.on_change: continue to train on the changed blend"
    for name, fingerprint in info.fields["datasets"].items():
        if name in fingerprints and fingerprints[name] != fingerprint and not may_change:
            raise InputError(
                f"{where}: the contents of data.datasets.{name} have changed since the run began; put the old dataset "
                f"back, {remedy}"
            )
    # Parsed again, so that a key which this version added counts as its default.
    old = parse_recipe(info.fields["recipe"], str(info.path / "checkpoint.json"))
    before = _flatten(old.model_dump(mode="json"))
    after = _flatten(recipe.model_dump(mode="json"))
    before["data.datasets"], after["data.datasets"] = sorted(info.fields["datasets"]), sorted(fingerprints)
    if before["data.datasets"] != after["data.datasets"] and not may_change:
        raise InputError(
            f"{where}: the run has the datasets {', '.join(before['data.datasets'])}, the recipe now names "
            f"{', '.join(after['data.datasets'])}; set it back, {remedy}"
        )
    current = int(info.fields["stage_index"])
    notes = []
    for key in sorted({key for key in (*before, *after) if before.get(key) != after.get(key)}):
        change = f"{key}: {_show(before.get(key))} → {_show(after.get(key))}"
        of_blend = key.startswith("stages.") and key.split(".")[2] in BLEND_FIELDS
        if not _is_harmless(key, current) and not (of_blend and may_change):
            raise InputError(
                f"{where}: {key} was {_show(before.get(key))}, the recipe now says {_show(after.get(key))}; that "
                f"would be another run. Set it back, {remedy if of_blend else another_run}"
            )
        if key not in ("data.datasets", "run_dir"):
            notes.append(change)
    stage, taken = recipe.stages[current], int(info.fields["stage_step"])
    if stage.steps < taken:
        raise InputError(
            f"{where}: stage {stage.name} has taken {taken} steps, its tokens {stage.tokens} now pay for "
            f"{stage.steps}; give it at least {stage.seq_length * old.stages[current].sequences_after(taken)} tokens, "
            "or start a new run with another run_dir"
        )
    return notes


def _is_harmless(key: str, current_stage: int) -> bool:
    """Whether a change of the recipe's `key` leaves the trajectory of the run alone, or extends it."""
    parts = key.split(".")
    if parts[0] == "stages":
        index = int(parts[1])
        if index > current_stage:
            return True
        return parts[2] in _HARMLESS_IN_STAGE or (index == current_stage and parts[2] == "tokens")
    return any(key == name or key.startswith(name + ".") for name in _HARMLESS)


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one level of dotted keys; the datasets are compared by name elsewhere."""
    if prefix == "data.datasets" or not isinstance(value, dict | list) or not value:
        return {prefix: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    flat: dict[str, Any] = {}
    for key, item in items:
        flat.update(_flatten(item, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _show(value: Any) -> str:
    return "not set" if value is None else repr(value)


def log_resume(info: CheckpointInfo, notes: list[str]) -> None:
    """Print, once, what is continued and with which changes."""
    if is_main_process():
        output(f"continuing from {info.path}")
        for note in notes:
            output(f"  changed since it was written: {note}")
