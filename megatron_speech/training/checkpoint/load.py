"""Loading a checkpoint: to continue its run, or for its weights, under any parallel layout."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron_speech.errors import InputError
from megatron_speech.model.builder import SpeechGPTModel, build_model
from megatron_speech.parallel import groups
from megatron_speech.recipe.model import ModelConfig
from megatron_speech.remote import fetch_checkpoint, is_url
from megatron_speech.tokens.space import TokenSpace
from megatron_speech.training.checkpoint.contents import (
    load_model_state,
    merged,
    model_state,
    quiet,
    restore_rng_state,
)
from megatron_speech.training.checkpoint.extra_state import only_saved_extra_state
from megatron_speech.training.checkpoint.store import CheckpointInfo, find_damage, find_latest, read_info
from megatron_speech.training.optim.ema import averaged_state
from megatron_speech.training.optim.optimizer import Optimizer
from megatron_speech.training.optim.ranges import missing_key, read_ranges


def load_checkpoint(info: CheckpointInfo, *, chunks: list[Any], optimizer: Optimizer) -> dict[str, Any]:
    """Load weights, optimizer state and generators in place; returns `state` as given to the save. A collective.

    Generators are restored when the number of processes is what it was; under another layout they keep the
    seed of the run.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    contents = model_state(chunks)
    ranges = optimizer.ranges(merged(contents), with_ema=has_average(info))
    same_layout = info.fields["layout"]["world_size"] == world
    if same_layout:
        contents["rng"] = ShardedObject("rng", None, (world,), (rank,))
    with quiet():
        loaded = dist_checkpointing.load(only_saved_extra_state(contents, chunks, info.path), str(info.path))
    load_model_state(chunks, loaded)
    read_ranges(info.path, ranges)
    optimizer.set_counts(loaded["optimizer"])
    if same_layout:
        restore_rng_state(loaded["rng"])
    state = loaded["state"]
    assert isinstance(state, dict)
    return state


def load_moments(info: CheckpointInfo, *, chunks: list[Any], optimizer: Optimizer) -> str | None:
    """Load the optimizer's state alone, for a new run from these weights. A collective.

    Returns:
        What the checkpoint lacks of it, then nothing is loaded; None: nothing.
    """
    ranges = optimizer.ranges(merged(model_state(chunks)), with_ema=False)
    missing = missing_key(info.path, ranges)
    if missing is not None:
        return missing
    read_ranges(info.path, ranges)
    optimizer.set_counts(dist_checkpointing.load_common_state_dict(str(info.path))["optimizer"])
    return None


def has_average(info: CheckpointInfo) -> bool:
    """Whether the run that wrote it kept a moving average of its weights."""
    return (info.fields.get("recipe") or {}).get("ema") is not None


def load_for_inference(
    path: str | os.PathLike[str], *, ema: bool = False
) -> tuple[SpeechGPTModel, TokenSpace, CheckpointInfo]:
    """Build the model of a checkpoint in this single process and load its weights.

    Args:
        path: a checkpoint directory, RUN/checkpoints/best, or a run directory (its newest checkpoint is taken).
            It may have been saved under any parallel layout.
        ema: take the moving average of the weights instead (and the weights themselves of what was frozen).

    Returns:
        The model in eval mode on this machine's device, its token space, and the checkpoint's description.

    Raises:
        InputError: there is no checkpoint there, it is damaged, or it has no moving average.
    """
    info, space = open_checkpoint(path)
    if not dist.is_initialized():
        groups.initialize()
    chunks = build_model(
        ModelConfig.model_validate(info.fields["model"]),
        space.padded_size,
        precision="fp32" if info.fields["precision"] == "fp32" else "bf16",
        max_sequence_length=int(info.fields["max_seq_length"]),
        seed=None,
        valid_vocab_size=space.size,
        backend="torch",  # it has a cache of keys and values, whatever the run was trained with
    )
    load_weights(info, chunks, ema=ema)
    (model,) = chunks
    model.eval()
    return model, space, info


def open_checkpoint(path: str | os.PathLike[str]) -> tuple[CheckpointInfo, TokenSpace]:
    """Find the checkpoint that `path` names, check every byte of it, and open its token space.

    A collective where torch.distributed is up: all ranks get the same answer.

    Args:
        path: a checkpoint directory, RUN/checkpoints/best, or a run directory (its newest checkpoint is taken); or
            the URL of a checkpoint or of what a run copies its checkpoints to.

    Raises:
        InputError: there is no checkpoint there, or it is damaged.
    """
    path = fetch_checkpoint(os.fspath(path)) if is_url(path) else Path(path)
    if (path / "checkpoint.json").is_file():
        info = read_info(path.resolve())
        if problem := find_damage(info):
            raise InputError(f"checkpoint {path} is damaged: {problem}; take another one")
    else:
        directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        latest = find_latest(directory)
        if latest is None:
            raise InputError(f"{path} holds no complete checkpoint; name a run directory or one of its checkpoints")
        info = latest
    space = TokenSpace.load(info.path / "token_space.json")
    if space.hash != info.fields["token_space_hash"]:
        raise InputError(
            f"checkpoint {info.path}: token_space.json has hash {space.hash}, checkpoint.json says "
            f"{info.fields['token_space_hash']}; the directory was put together from two runs"
        )
    return info, space


def load_weights(info: CheckpointInfo, chunks: list[Any], *, ema: bool = False) -> None:
    """Load a checkpoint's weights into this rank's model chunks, whatever layout it was saved under. A collective.

    With `ema` the moving average, and the weights themselves of what was frozen.

    Raises:
        InputError: the average is requested, and there is none.
    """
    if ema and not has_average(info):
        raise InputError(
            f"checkpoint {info.path} has no moving average of the weights: its run had no section `ema`; take the "
            "weights themselves, or train with one"
        )
    contents = only_saved_extra_state(model_state(chunks), chunks, info.path)
    with quiet():
        if ema:
            saved = dist_checkpointing.load_tensors_metadata(str(info.path))
            contents = averaged_state(contents, set(saved))
        loaded = dist_checkpointing.load(contents, str(info.path))
    load_model_state(chunks, loaded)
