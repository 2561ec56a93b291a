"""Going back: a run continues from one of its earlier checkpoints, and what came after it is set aside.

    RUN/set_aside/after_step_00000100/
        step_00000200/ …    the later checkpoints, as they were
        metrics.jsonl       the run's, with the lines of the steps that are taken again

Nothing is removed.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megatron_speech.errors import InputError
from megatron_speech.files import fsync_path
from megatron_speech.training.checkpoint.store import (
    CheckpointInfo,
    checkpoint_name,
    find_latest,
    list_checkpoints,
    sound_or_why,
    step_of_name,
)


def find_checkpoint(directory: Path, step: int) -> CheckpointInfo:
    """The checkpoint of exactly `step`, every byte of which was checked. A collective.

    Args:
        directory: RUN/checkpoints.
        step: of the run.

    Raises:
        InputError: it is not there, or damaged; names the nearest sound one before it.
    """
    path = directory / checkpoint_name(step)
    problem = f"{directory} has no {path.name}"
    if path.is_dir():
        found = sound_or_why(path)
        if isinstance(found, CheckpointInfo):
            return found
        problem = f"{path} is damaged: {found}"
    before = find_latest(directory, before_step=step)
    if before is not None:
        nearest = f"the nearest sound checkpoint before it is of step {before.step}: --rewind-to {before.step}"
    else:
        steps = [str(step_of_name(path.name)) for path in reversed(list_checkpoints(directory))]
        later = f"; there are those of steps {', '.join(steps)}" if steps else ""
        nearest = f"there is no sound checkpoint before it either{later}"
    raise InputError(f"--rewind-to {step}: {problem}; {nearest}")


def set_aside(run: Path, step: int) -> Path | None:
    """Move the checkpoints after `step` out of the way, the newest first, and copy the metrics. Call on one rank.

    A process that is killed in between has moved the newest ones, and the same command goes on.

    Returns:
        The folder that they are in; None where there was none.
    """
    later = [path for path in list_checkpoints(run / "checkpoints") if (step_of_name(path.name) or 0) > step]
    if not later:
        return None
    base = run / "set_aside" / f"after_{checkpoint_name(step)}"
    folder, number = base, 1
    while folder.exists():
        number += 1
        folder = base.with_name(f"{base.name}_{number}")
    folder.mkdir(parents=True)
    if (run / "metrics.jsonl").exists():
        shutil.copyfile(run / "metrics.jsonl", folder / "metrics.jsonl")
    for path in later:
        for name in ("latest", "best"):
            link = path.parent / name
            if link.is_symlink() and os.readlink(link) == path.name:
                link.unlink()
        (run / "uploads" / f"{path.name}.json").unlink(missing_ok=True)
        os.rename(path, folder / path.name)
    fsync_path(run / "checkpoints")
    return folder
