"""Where checkpoints lie: names, descriptions, links, damage.

    RUN/checkpoints/step_00000100/
        checkpoint.json     what it is: position, token space, model, layout, sizes and SHA-256 of every file
        recipe.yaml token_space.json
        common.pt *.distcp .metadata metadata.json      megatron-core's torch_dist format
    RUN/checkpoints/latest -> step_00000100
    RUN/checkpoints/best   -> step_00000080

A checkpoint is built in a hidden directory and renamed: a directory that bears the name is complete. What a
disk or a copy did to it later is found through sizes and hashes, and an older checkpoint is taken instead.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_speech.errors import InputError
from megatron_speech.files import fsync_path, read_json, sha256_file

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
_NAME = re.compile(r"step_([0-9]{8,})")


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


def checkpoint_name(step: int) -> str:
    """Directory name of the checkpoint after `step` steps."""
    return f"step_{step:08d}"


def step_of_name(name: str) -> int | None:
    """The step of a checkpoint's directory name; None for any other name."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def list_checkpoints(directory: Path) -> list[Path]:
    """Checkpoint directories below `directory` (RUN/checkpoints), newest first; unverified."""
    if not directory.is_dir():
        return []
    found = [(step, path) for path in directory.iterdir() if (step := step_of_name(path.name)) is not None]
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


def find_rank_damage(info: CheckpointInfo, rank: int = 0, world: int = 1) -> str | None:
    """What is wrong with the files of a checkpoint, or None; reads the bytes of every `world`-th of them."""
    for number, (name, expected) in enumerate(sorted(info.fields["files"].items())):
        path = info.path / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        if number % world == rank and sha256_file(path) != expected["sha256"]:
            return f"{name} does not have the SHA-256 that was recorded"
    return None


def find_damage(info: CheckpointInfo) -> str | None:
    """What is wrong with the files of a checkpoint, or None. Reads every byte; ranks share the work.

    A collective where torch.distributed is up: all ranks get the same answer.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    problem = find_rank_damage(info, rank, world)
    if world > 1:
        problems: list[str | None] = [None] * world
        dist.all_gather_object(problems, problem)
        problem = next((text for text in problems if text), None)
    return problem


def sound_or_why(path: Path) -> CheckpointInfo | str:
    """The checkpoint at `path`, every byte of which was checked, or what is wrong with it. A collective likewise."""
    try:
        info = read_info(path)
        return find_damage(info) or info
    except InputError as error:
        return str(error)


def find_latest(directory: Path, *, before_step: int | None = None) -> CheckpointInfo | None:
    """The newest sound checkpoint below `directory` (RUN/checkpoints); damaged ones are skipped with a notice.

    A collective where torch.distributed is up. `before_step`: only those of an earlier step.
    """
    for path in list_checkpoints(directory):
        if before_step is not None and (step_of_name(path.name) or 0) >= before_step:
            continue
        found = sound_or_why(path)
        if isinstance(found, CheckpointInfo):
            return found
        logger.warning("checkpoint %s is skipped: %s", path, found)
    return None


def point_link(link: Path, target: str) -> None:
    """Make `link` a symbolic link to `target` beside it. It resolves at every moment, to the old one or to the new."""
    if link.is_symlink() and os.readlink(link) == target:
        return
    temporary = link.with_name(f".{link.name}.tmp")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    temporary.symlink_to(target)
    os.replace(temporary, link)
    fsync_path(link.parent)


def clean_leftovers(directory: Path) -> None:
    """Remove what a killed save or prune left behind. Call on one rank."""
    if directory.is_dir():
        for path in directory.iterdir():
            if path.name.startswith(".step_"):
                shutil.rmtree(path, ignore_errors=True)
