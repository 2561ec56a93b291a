"""What the report shows of the training run: its loss curves and its blend."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_speech.errors import InputError
from megatron_speech.files import read_json


@dataclass(frozen=True)
class RunFiles:
    """A run directory's metrics and blend.

    Attributes:
        training, validation: lines of metrics.jsonl, in order.
        stages: the blend reports of blend.json; empty where the file is missing.
    """

    training: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    stages: list[dict[str, Any]]


def read_run(directory: Path) -> RunFiles:
    """Read metrics.jsonl and blend.json of a run directory.

    A last line of metrics.jsonl that is being written at this moment is left out.

    Raises:
        InputError: it is not a run directory, or a file of it is damaged.
    """
    path = directory / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError as error:
        raise InputError(
            f"{directory} is not a run directory: metrics.jsonl is missing; name one that `train` made"
        ) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if number == len(lines) and not line.endswith("\n"):
            break
        try:
            row = json.loads(line)
            row["step"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} line {number} is not a line of metrics ({error}); the file is damaged") from error
        rows.append(row)
    blend = directory / "blend.json"
    stages = read_json(blend, "blend report").get("stages", []) if blend.is_file() else []
    return RunFiles(
        training=[row for row in rows if row.get("split", "train") == "train"],
        validation=[row for row in rows if row.get("split") == "validation"],
        stages=stages,
    )
