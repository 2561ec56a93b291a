"""Continuing a run: from where, what may have changed in its recipe since, and what would make it another run."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from megatron_speech.console import is_main_process, output
from megatron_speech.data.sequences.history import BLEND_FIELDS
from megatron_speech.errors import InputError
from megatron_speech.recipe.load import parse_recipe
from megatron_speech.recipe.recipe import Recipe
from megatron_speech.tokens.space import TokenSpace
from megatron_speech.training.checkpoint.store import CheckpointInfo
from megatron_speech.training.position import Position

_HARMLESS = ("name", "run_dir", "token_space", "data.datasets", "data.cache_dir", "data.cache_gib",
             "data.stage_datasets", "data.on_change", "data.prefetch", "data.workers", "parallel", "checkpoint",
             "validation", "logging", "profile", "ema", "spikes", "deterministic", "recompute", "model.backend",
             "init")  # fmt: skip
_HARMLESS_IN_STAGE = ("max_epochs", "micro_batch_size", "checkpoint", "early_stop")
# What changes the losses from here on and nothing that a checkpoint holds: it may be asked for, by name.
_ON_REQUEST = ("optimizer.beta1", "optimizer.beta2", "optimizer.eps", "optimizer.weight_decay", "optimizer.clip_grad",
               "optimizer.layer_lr_decay", "optimizer.embeddings", "optimizer.head")  # fmt: skip
_ON_REQUEST_IN_STAGE = ("lr", "loss.label_smoothing", "loss.z_loss")


@dataclass(frozen=True)
class ResumeRequest:
    """What a command asks of a run that it continues.

    Attributes:
        changes: dotted keys, stages by name, that may differ from those of the checkpoint (`train --change`).
        rewind_to: the step to go on from, not the newest one (`train --rewind-to`); None: the newest one.
    """

    changes: Collection[str] = ()
    rewind_to: int | None = None


@dataclass(frozen=True)
class Differences:
    """What has changed in a recipe since a checkpoint: `harmless` as sentences, `requested` as records."""

    harmless: list[str] = field(default_factory=list)
    requested: list[dict[str, Any]] = field(default_factory=list)


def check_resumable(
    info: CheckpointInfo,
    recipe: Recipe,
    space: TokenSpace,
    fingerprints: dict[str, str],
    changes: Collection[str] = (),
) -> Differences:
    """Refuse to continue a checkpoint with a recipe that means another run; returns the other changes.

    Harmless: where files lie, where the weights of step 0 came from, layout, intervals, the budget of a stage that is
    not over, anything in stages that have not begun; what a stage draws on, where `data.on_change` is continue. Not
    harmless: whatever would make the losses from here on differ from those of the run that was started (model, token
    space, datasets, seed, optimizer, the running stage).

    Args:
        fingerprints: name → fingerprint of the manifest of each dataset.
        changes: see :class:`ResumeRequest`.

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
    found = Differences()
    for key in sorted({key for key in (*before, *after) if before.get(key) != after.get(key)}):
        change = f"{key}: {_show(before.get(key))} → {_show(after.get(key))}"
        of_blend = key.startswith("stages.") and key.split(".")[2] in BLEND_FIELDS
        if not _is_harmless(key, current) and not (of_blend and may_change):
            named = _by_name(key, recipe)
            if not _can_be_requested(key, current):
                raise InputError(
                    f"{where}: {key} was {_show(before.get(key))}, the recipe now says {_show(after.get(key))}; that "
                    f"would be another run. Set it back, {remedy if of_blend else another_run}"
                )
            if not any(named == one or named.startswith(one + ".") for one in changes):
                raise InputError(
                    f"{where}: {key} was {_show(before.get(key))}, the recipe now says {_show(after.get(key))}. Set it "
                    f"back, {another_run}, or say that this one is to go on with it: --change "
                    f"{named}={_as_yaml(after.get(key))}"
                )
            found.requested.append(
                {"step": info.step, "key": named, "before": before.get(key), "after": after.get(key)}
            )
        elif key not in ("data.datasets", "run_dir"):
            found.harmless.append(change)
    stage, taken = recipe.stages[current], int(info.fields["stage_step"])
    if stage.steps < taken:
        raise InputError(
            f"{where}: stage {stage.name} has taken {taken} steps, its tokens {stage.tokens} now pay for "
            f"{stage.steps}; give it at least {stage.seq_length * old.stages[current].sequences_after(taken)} tokens, "
            "or start a new run with another run_dir"
        )
    _check_position(info, recipe, where)
    return found


def _check_position(info: CheckpointInfo, recipe: Recipe, where: str) -> None:
    """Refuse a recipe whose stages are not over where those of the checkpoint's run were."""
    position = Position.at_step(recipe, info.step, info.fields["ended_early"])
    if position.consumed_sequences == info.fields["consumed_sequences"]:
        return
    budgets = ", ".join(
        f"stages.{one.name}.tokens={one.tokens // one.global_batch_tokens * one.global_batch_tokens}"
        for one in recipe.stages[: int(info.fields["stage_index"]) + 1]
    )
    raise InputError(
        f"{where}: after step {info.step} the run had taken {info.fields['consumed_sequences']:,} sequences, and would "
        f"have taken {position.consumed_sequences:,} by this version, which rounds tokens of a stage to the nearest "
        f"whole global batch where earlier ones rounded down; continue with {budgets}"
    )


def _is_harmless(key: str, current_stage: int) -> bool:
    """Whether a change of the recipe's `key` leaves the trajectory of the run alone, or extends it."""
    parts = key.split(".")
    if parts[0] == "stages":
        index = int(parts[1])
        if index > current_stage:
            return True
        return parts[2] in _HARMLESS_IN_STAGE or (index == current_stage and parts[2] == "tokens")
    return _is_below(key, _HARMLESS)


def _can_be_requested(key: str, current_stage: int) -> bool:
    """Whether a run can go on with another value of `key`, where that is asked for."""
    parts = key.split(".")
    if parts[0] == "stages":
        rest = ".".join(parts[2:])
        return int(parts[1]) == current_stage and _is_below(rest, _ON_REQUEST_IN_STAGE)
    return _is_below(key, _ON_REQUEST)


def _is_below(key: str, names: Collection[str]) -> bool:
    return any(key == name or key.startswith(name + ".") for name in names)


def _by_name(key: str, recipe: Recipe) -> str:
    """`stages.0.lr.peak` with the stage's name in the place of its number; other keys as they are."""
    parts = key.split(".")
    if parts[0] == "stages" and len(parts) > 1 and int(parts[1]) < len(recipe.stages):
        parts[1] = recipe.stages[int(parts[1])].name
    return ".".join(parts)


def _as_yaml(value: Any) -> str:
    return "null" if value is None else json.dumps(value)


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


def log_resume(info: CheckpointInfo, found: Differences) -> None:
    """Print, once, what is continued and with which changes."""
    if is_main_process():
        output(f"continuing from {info.path}")
        for note in found.harmless:
            output(f"  changed since it was written: {note}")
        for change in found.requested:
            output(
                f"  changed on request, from step {info.step + 1} on: {change['key']}: {_show(change['before'])} → "
                f"{_show(change['after'])}"
            )
