"""Checkpoints: written whole or not at all, checked on open, readable under any parallel layout.

    RUN/checkpoints/step_00000100/
        checkpoint.json     what it is: position, token space, model, layout, sizes and SHA-256 of every file
        recipe.yaml token_space.json
        common.pt *.distcp .metadata metadata.json      megatron-core's torch_dist format
    RUN/checkpoints/best -> step_00000100

A checkpoint is built in a hidden directory and renamed: a directory that bears the name is complete. What a
disk or a copy did to it later is found through sizes and hashes, and an older checkpoint is taken instead.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint import save as torch_save

from megatron_speech.data.history import BLEND_FIELDS
from megatron_speech.errors import InputError
from megatron_speech.files import fsync_path, read_json, write_json
from megatron_speech.model.builder import SpeechGPTModel, build_model
from megatron_speech.model.config import ModelConfig
from megatron_speech.parallel import groups
from megatron_speech.token_space import TokenSpace
from megatron_speech.training.metrics import is_main_process, warn
from megatron_speech.training.optimizer import Optimizer
from megatron_speech.training.recipe import Recipe, parse_recipe

FORMAT_VERSION = 2
_NAME = re.compile(r"step_([0-9]{8,})")
# Sharding of a distributed optimizer's state that loads under another data-parallel size.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


@dataclass(frozen=True)
class CheckpointInfo:
    """The contents of checkpoint.json, and where it lies."""

    path: Path
    fields: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps taken when it was written."""
        return int(self.fields["step"])

    @property
    def audio_loss(self) -> float | None:
        """Validation loss on audio tokens at this step; None when there was no validation."""
        validation = self.fields.get("validation") or {}
        return validation.get("loss/modality/audio")


# ------------------------------------------------------------------------------------------- finding


def checkpoint_name(step: int) -> str:
    """Directory name of the checkpoint after `step` steps."""
    return f"step_{step:08d}"


def list_checkpoints(directory: Path) -> list[Path]:
    """Checkpoint directories below `directory` (RUN/checkpoints), newest first; unverified."""
    if not directory.is_dir():
        return []
    found = [(int(match[1]), path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def read_info(path: Path) -> CheckpointInfo:
    """Read checkpoint.json of the checkpoint at `path` and check its format version.

    Raises:
        InputError: it is missing, unreadable or of a format that this version does not know.
    """
    fields = read_json(path / "checkpoint.json", "checkpoint description")
    if not isinstance(fields, dict) or "format_version" not in fields or "files" not in fields:
        raise InputError(
            f"{path / 'checkpoint.json'} is not a checkpoint description: format_version or files is missing"
        )
    if fields["format_version"] != FORMAT_VERSION:
        raise InputError(
            f"checkpoint {path} has format_version {fields['format_version']}, this version reads {FORMAT_VERSION}; "
            "use the version of megatron-speech that wrote it"
        )
    return CheckpointInfo(path, fields)


def find_damage(info: CheckpointInfo) -> str | None:
    """What is wrong with the files of a checkpoint, or None. Reads every byte; ranks share the work.

    A collective where torch.distributed is up: all ranks get the same answer.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    problem = None
    for number, (name, expected) in enumerate(sorted(info.fields["files"].items())):
        path = info.path / name
        if not path.is_file():
            problem = f"{name} is missing"
        elif path.stat().st_size != expected["bytes"]:
            problem = f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        elif number % world == rank and _hash_and_sync(path, sync=False) != expected["sha256"]:
            problem = f"{name} does not have the SHA-256 that was recorded"
        if problem:
            break
    if world > 1:
        problems: list[str | None] = [None] * world
        dist.all_gather_object(problems, problem)
        problem = next((text for text in problems if text), None)
    return problem


def find_latest(directory: Path) -> CheckpointInfo | None:
    """The newest sound checkpoint below `directory` (RUN/checkpoints); damaged ones are skipped with a notice.

    A collective where torch.distributed is up.
    """
    for path in list_checkpoints(directory):
        try:
            info = read_info(path)
            problem = find_damage(info)
        except InputError as error:
            problem = str(error)
        if problem is None:
            return info
        warn(f"checkpoint {path} is skipped: {problem}")
    return None


# -------------------------------------------------------------------------------------------- saving


class _InProcessSave(TorchDistSaveShardedStrategy):
    """torch_dist, written by this process.

    megatron-core's own strategy writes through forked workers and a manager process, which costs a second per
    save and leaves the manager behind when a run is killed. The files are the same.
    """

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> None:
        main_replicas, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        torch_save(
            mcore_to_pyt_state_dict(main_replicas, False),
            storage_writer=FileSystemWriter(checkpoint_dir, sync_files=False),  # synced below, with the hashing
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def save_checkpoint(
    directory: Path,
    *,
    recipe: Recipe,
    space: TokenSpace,
    fields: dict[str, Any],
    chunks: list[Any],
    optimizer: Optimizer | None,
    state: dict[str, Any],
) -> Path:
    """Write RUN/checkpoints/step_N for N = fields["step"]. A collective.

    Args:
        directory: RUN/checkpoints, on storage that all ranks share.
        recipe, space: saved beside the weights.
        fields: JSON-able description: position, validation scores, dataset fingerprints.
        chunks: this rank's model chunks (unwrapped).
        optimizer: its moments and master weights are saved; None: weights only, which no run continues from.
        state: small state that is equal on all ranks (scheduler, loss sums).
    """
    contents = _model_state(chunks)
    if optimizer is not None:
        contents["optimizer"] = optimizer.sharded_state(_merged(contents), _METADATA, is_loading=False)
    contents["rng"] = ShardedObject("rng", _rng_state(), (dist.get_world_size(),), (dist.get_rank(),))
    contents["state"] = state
    described = {
        **fields,
        "recipe": recipe.model_dump(mode="json"),
        "max_seq_length": max(stage.seq_length for stage in recipe.stages),
        "model": recipe.model.model_dump(mode="json"),
        "precision": recipe.precision,
        "layout": {"world_size": dist.get_world_size(), **recipe.parallel.model_dump()},
    }
    return _write(directory / checkpoint_name(fields["step"]), contents, described, space, recipe)


def save_weights(
    path: Path,
    *,
    space: TokenSpace,
    model: ModelConfig,
    precision: str,
    max_seq_length: int,
    chunks: list[Any],
    fields: dict[str, Any] | None = None,
) -> Path:
    """Write a checkpoint of weights alone at `path`, without a run: step 0, no recipe, no optimizer. A collective.

    `generate` and `evaluate` read it as any other, and a recipe's `init.checkpoint` starts from it.

    Args:
        path: the checkpoint's directory; replaced if it is there.
        space: the ids that the rows of its tables stand for.
        model, precision, max_seq_length: what the model is; `max_seq_length` in tokens.
        chunks: this rank's model chunks.
        fields: more of a description, such as where the weights come from.
    """
    described = {
        "step": 0,
        "stage": "init",
        **(fields or {}),
        "max_seq_length": max_seq_length,
        "model": model.model_dump(mode="json"),
        "precision": precision,
        "layout": {"world_size": dist.get_world_size()},
    }
    return _write(path, _model_state(chunks), described, space, None)


def _write(
    final: Path, contents: ShardedStateDict, described: dict[str, Any], space: TokenSpace, recipe: Recipe | None
) -> Path:
    """Build the directory `final` in a hidden one beside it, and rename that. A collective."""
    rank, world = dist.get_rank(), dist.get_world_size()
    directory = final.parent
    building = directory / f".{final.name}.tmp"
    if rank == 0:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
    dist.barrier()
    with _quiet():
        dist_checkpointing.save(contents, str(building), sharded_strategy=_InProcessSave(), content_metadata=_METADATA)
    dist.barrier()
    if rank == 0:
        if recipe is not None:
            recipe.save(building / "recipe.yaml")
        space.save(building / "token_space.json")
    # Each rank syncs and hashes what it wrote; rank 0 also what belongs to no rank.
    mine = [path for path in building.iterdir() if _writer_of(path.name) == rank]
    hashes = {path.name: {"bytes": path.stat().st_size, "sha256": _hash_and_sync(path, sync=True)} for path in mine}
    gathered: list[dict[str, Any]] = [{} for _ in range(world)]
    dist.all_gather_object(gathered, hashes)
    if rank == 0:
        write_json(
            building / "checkpoint.json",
            {
                **described,
                "format_version": FORMAT_VERSION,
                "token_space_hash": space.hash,
                "codec": {"name": space.codec.name, "hash": space.codec.hash},
                "files": {name: entry for part in gathered for name, entry in part.items()},
            },
        )
        fsync_path(building)
        if final.exists():  # a damaged one that was skipped on resume
            shutil.rmtree(final)
        os.rename(building, final)
        fsync_path(directory)
    dist.barrier()
    return final


def _writer_of(name: str) -> int:
    """The rank whose shard `__RANK_N.distcp` is; 0 for what is written once."""
    match = re.fullmatch(r"__([0-9]+)_[0-9]+\.distcp", name)
    return int(match[1]) if match else 0


def _hash_and_sync(path: Path, *, sync: bool) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(1 << 22):
            digest.update(chunk)
        if sync:
            os.fsync(handle.fileno())
    return digest.hexdigest()


def promote_best(directory: Path, stage: str) -> CheckpointInfo | None:
    """Point RUN/checkpoints/best at the checkpoint of `stage` with the lowest audio validation loss.

    Losses of different stages are not comparable (an SFT stage scores target speech only), so each stage
    promotes its own. Call on one rank. Returns the best one, or None when none was validated.
    """
    best: CheckpointInfo | None = None
    for path in reversed(list_checkpoints(directory)):  # oldest first: a tie keeps the earlier one
        try:
            info = read_info(path)
        except InputError:
            continue
        if info.fields.get("stage") != stage or info.audio_loss is None:
            continue
        if best is None or best.audio_loss is None or info.audio_loss < best.audio_loss:
            best = info
    if best is not None:
        link = directory / "best"
        if not link.is_symlink() or os.readlink(link) != best.path.name:
            temporary = directory / ".best.tmp"
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
            temporary.symlink_to(best.path.name)
            os.replace(temporary, link)
            fsync_path(directory)
    return best


def prune(directory: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` checkpoints and the one that `best` points at. Call on one rank."""
    best = directory / "best"
    kept = os.readlink(best) if best.is_symlink() else None
    for path in list_checkpoints(directory)[keep_last:]:
        if path.name != kept:
            # Renamed first, so that a crash half-way never leaves a directory with a checkpoint's name.
            doomed = directory / f".{path.name}.removed"
            os.rename(path, doomed)
            shutil.rmtree(doomed)


def clean_leftovers(directory: Path) -> None:
    """Remove what a killed save or prune left behind. Call on one rank."""
    if directory.is_dir():
        for path in directory.iterdir():
            if path.name.startswith(".step_"):
                shutil.rmtree(path, ignore_errors=True)


# ------------------------------------------------------------------------------------------- loading


def load_checkpoint(info: CheckpointInfo, *, chunks: list[Any], optimizer: Optimizer) -> dict[str, Any]:
    """Load weights, optimizer state and generators in place; returns `state` as given to the save. A collective.

    Generators are restored when the number of processes is what it was; under another layout they keep the
    seed of the run.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    contents = _model_state(chunks)
    contents["optimizer"] = optimizer.sharded_state(_merged(contents), _METADATA, is_loading=True)
    same_layout = info.fields["layout"]["world_size"] == world
    if same_layout:
        contents["rng"] = ShardedObject("rng", None, (world,), (rank,))
    with _quiet():
        loaded = dist_checkpointing.load(contents, str(info.path))
    _load_model_state(chunks, loaded)
    optimizer.load_state(loaded["optimizer"])
    if same_layout:
        _restore_rng_state(loaded["rng"])
    state = loaded["state"]
    assert isinstance(state, dict)
    return state


def load_for_inference(path: str | os.PathLike[str]) -> tuple[SpeechGPTModel, TokenSpace, CheckpointInfo]:
    """Build the model of a checkpoint in this single process and load its weights.

    Args:
        path: a checkpoint directory, RUN/checkpoints/best, or a run directory (its newest checkpoint is taken).
            It may have been saved under any parallel layout.

    Returns:
        The model in eval mode on this machine's device, its token space, and the checkpoint's description.

    Raises:
        InputError: there is no checkpoint there, or it is damaged.
    """
    info, space = open_checkpoint(path)
    if not dist.is_initialized():
        groups.initialize()
    chunks = build_model(
        ModelConfig.model_validate(info.fields["model"]),
        space.padded_size,
        precision=info.fields["precision"],
        max_sequence_length=int(info.fields["max_seq_length"]),
        seed=None,
        valid_vocab_size=space.size,
    )
    load_weights(info, chunks)
    (model,) = chunks
    model.eval()
    return model, space, info


def open_checkpoint(path: str | os.PathLike[str]) -> tuple[CheckpointInfo, TokenSpace]:
    """Find the checkpoint that `path` names, check every byte of it, and open its token space.

    A collective where torch.distributed is up: all ranks get the same answer.

    Args:
        path: a checkpoint directory, RUN/checkpoints/best, or a run directory (its newest checkpoint is taken).

    Raises:
        InputError: there is no checkpoint there, or it is damaged.
    """
    path = Path(path)
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


def load_weights(info: CheckpointInfo, chunks: list[Any]) -> None:
    """Load a checkpoint's weights into this rank's model chunks, whatever layout it was saved under. A collective."""
    with _quiet():
        loaded = dist_checkpointing.load(_model_state(chunks), str(info.path))
    _load_model_state(chunks, loaded)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's notices to megatron-core about the ShardedTensor that its format is made of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield


def _model_state(chunks: list[Any]) -> ShardedStateDict:
    """Sharded state of this rank's chunks: `model`, or `model0` … `modelN` with virtual pipeline stages."""
    names = ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]
    return {name: chunk.sharded_state_dict(metadata=dict(_METADATA)) for name, chunk in zip(names, chunks, strict=True)}


def _merged(contents: ShardedStateDict) -> ShardedStateDict:
    """What the optimizer looks parameters up in."""
    return contents["model"] if "model" in contents else dict(contents)


def _load_model_state(chunks: list[Any], loaded: dict[str, Any]) -> None:
    names = ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]
    for name, chunk in zip(names, chunks, strict=True):
        chunk.load_state_dict(loaded[name], strict=True)


def _rng_state() -> dict[str, Any]:
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def _restore_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])


# ------------------------------------------------------------------------------- continuing a run


_HARMLESS = ("name", "run_dir", "token_space", "data.datasets", "data.cache_dir", "data.cache_gib",
             "data.stage_datasets", "data.on_change", "data.prefetch", "data.workers", "parallel", "checkpoint",
             "validation", "logging")  # fmt: skip
_HARMLESS_IN_STAGE = ("max_epochs", "micro_batch_size")


def check_resumable(info: CheckpointInfo, recipe: Recipe, space: TokenSpace, fingerprints: dict[str, str]) -> list[str]:
    """Refuse to continue a checkpoint with a recipe that means another run; returns the harmless changes.

    Harmless: where files lie, layout, intervals, the budget of a stage that is not over, anything in stages
    that have not begun; what a stage draws on, where `data.on_change` is continue. Not harmless: whatever would
    make the losses from here on differ from those of the run that was started (model, token space, datasets, seed,
    optimizer, the running stage).

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
    remedy = "start a new run with another run_dir, or say data.on_change: continue to go on with the changed blend"
    for name, fingerprint in info.fields["datasets"].items():
        if name in fingerprints and fingerprints[name] != fingerprint and not may_change:
            raise InputError(
                f"{where}: the contents of data.datasets.{name} have changed since the run began; put the old dataset "
                f"back, {remedy}"
            )
    # Parsed again, so that a key which this version added counts as its default.
    before = _flatten(parse_recipe(info.fields["recipe"], str(info.path / "checkpoint.json")).model_dump(mode="json"))
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
            f"{stage.steps}; give it at least {taken * stage.global_batch_tokens} tokens, or start a new run with "
            "another run_dir"
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
    if key == "parallel.distributed_optimizer":
        return False  # the two kinds of optimizer do not read each other's state
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


def say_resume(info: CheckpointInfo, notes: list[str]) -> None:
    """Tell the user, once, what is continued and with which changes."""
    if is_main_process():
        print(f"continuing from {info.path}", flush=True)
        for note in notes:
            print(f"  changed since it was written: {note}", flush=True)
