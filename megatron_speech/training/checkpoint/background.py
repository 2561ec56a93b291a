"""What goes on beside the training in processes of its own: what is due, and how they are started.

Light to import: no torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from megatron_speech.files import write_json


class Queue:
    """Checkpoints with which something is still to be done: a file for each in `folder`, which outlives a kill."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self) -> list[str]:
        """Of the checkpoints, oldest first."""
        return sorted((path.stem for path in self.folder.glob("step_*.json")), key=lambda name: int(name[5:]))

    def add(self, name: str) -> None:
        """It is due."""
        write_json(self.folder / f"{name}.json", {"checkpoint": name})

    def remove(self, name: str) -> None:
        """It is done, or given up."""
        (self.folder / f"{name}.json").unlink(missing_ok=True)


def with_this_package(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which a child process imports this package, wherever it was started from."""
    root = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join([root, *filter(None, [environment.get("PYTHONPATH")])])
    return {**environment, "PYTHONPATH": path}
