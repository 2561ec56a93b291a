"""Which checkpoints stay: the newest, milestones, ends of stages, the best; never none that is sound."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from megatron_speech.errors import InputError
from megatron_speech.recipe.checkpoint import CheckpointConfig
from megatron_speech.training.checkpoint.store import (
    CheckpointInfo,
    find_rank_damage,
    list_checkpoints,
    point_link,
    read_info,
    step_of_name,
)


class Soundness:
    """Whether checkpoints are sound; each is read once, and again when it is another one of the same name."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], str | None] = {}

    def problem(self, path: Path) -> str | None:
        """What is wrong with the checkpoint at `path`; None: nothing."""
        try:
            key = str(path), (path / "checkpoint.json").stat().st_mtime_ns
            if key not in self._known:
                self._known[key] = find_rank_damage(read_info(path))
            return self._known[key]
        except (OSError, InputError) as error:
            return str(error)


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
        point_link(directory / "best", best.path.name)
    return best


def prune(
    directory: Path,
    config: CheckpointConfig,
    *,
    problem: Callable[[Path], str | None],
    waiting: Collection[str] = (),
) -> list[str]:
    """Remove checkpoints that no rule keeps. Call on one rank.

    Only sound ones count among the newest `config.keep_last`, and each of those was read before anything older goes:
    one that was damaged since it was written never costs the run the last good one.

    Args:
        directory: RUN/checkpoints.
        config: what is kept.
        problem: what is wrong with a checkpoint, or None.
        waiting: names of checkpoints that are still to be copied elsewhere.

    Returns:
        A sentence for every damaged one among the newest.
    """
    best = directory / "best"
    kept = {*waiting, os.readlink(best) if best.is_symlink() else ""}
    sound, damaged = 0, []
    for path in list_checkpoints(directory):
        if sound < config.keep_last:
            if (found := problem(path)) is None:
                sound += 1
            else:
                damaged.append(f"checkpoint {path} is damaged: {found}; it is left where it is and does not count")
        elif path.name not in kept and not _is_milestone(path, config):
            # Renamed first, so that a crash half-way never leaves a directory with a checkpoint's name.
            doomed = directory / f".{path.name}.removed"
            shutil.rmtree(doomed, ignore_errors=True)
            os.rename(path, doomed)
            shutil.rmtree(doomed)
    return damaged


def _is_milestone(path: Path, config: CheckpointConfig) -> bool:
    step = step_of_name(path.name)
    if config.keep_every and step is not None and step % config.keep_every == 0:
        return True
    if not config.keep_stage_ends:
        return False
    try:
        return bool(read_info(path).fields.get("stage_ended"))
    except InputError:
        return False
