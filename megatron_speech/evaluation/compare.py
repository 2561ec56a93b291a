"""Two runs side by side: the test of a change, such as a new kernel on a run continued from one checkpoint.

Losses are paired where both runs stand at the same number of consumed tokens, so that what the data alone does to the
loss of a step cancels out.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_speech.errors import InputError
from megatron_speech.evaluation.run_files import RunFiles, read_run
from megatron_speech.files import read_json

# Of losses: relative differences below this are what another order of float32 additions leaves in a step.
ROUNDING = 1e-5
# What differs between any two runs and says nothing about them.
_OWN_FIELDS = ("name", "run_dir")
_SPEED = "tokens_per_second_per_gpu"


@dataclass(frozen=True)
class Tolerances:
    """From where on B is called worse: mean loss in nats, speed and memory as fractions of A's."""

    loss: float = 0.005
    speed: float = 0.05
    memory: float = 0.05


def compare_runs(a: Path, b: Path, tolerances: Tolerances | None = None, *, from_step: int = 0) -> dict[str, Any]:
    """What B does otherwise than A; JSON-able.

    Args:
        a, b: run directories.
        tolerances: see :class:`Tolerances`.
        from_step: records up to this step are left out, such as those before a change.

    Returns:
        `recipe` and `environment`: name → (A's value, B's value) of what differs. `losses`: name → paired
        differences B − A over the common records: `mean`, its standard `error`, `largest` (absolute), `records`; for
        `loss` also `first_difference`, the first step that differs at all. `validation`: the same of validations.
        `speed`, `memory`: A's and B's values and `ratio` B / A. `worse`: sentences, empty if B is as good as A.
        `verdict`: one sentence.

    Raises:
        InputError: a folder is no run, or the two have no record at the same number of tokens.
    """
    limits = tolerances or Tolerances()
    runs = read_run(a), read_run(b)
    pairs = _paired(runs, "training", from_step)
    if not pairs:
        spans = [_span(run.training) for run in runs]
        raise InputError(
            f"{a} ({spans[0]}) and {b} ({spans[1]}) have no record at the same number of tokens"
            f"{f' after step {from_step}' if from_step else ''}; compare runs of the same batches and "
            "logging.interval_steps, one of which may be the continuation of the other"
        )
    names = sorted(set(pairs[0][0]) & set(pairs[0][1]))
    losses = {name: _difference(pairs, name) for name in names if name == "loss" or name.startswith("loss/")}
    found: dict[str, Any] = {
        "a": str(a),
        "b": str(b),
        "steps": [pairs[0][0]["step"], pairs[-1][0]["step"]],
        "records": len(pairs),
        "recipe": _differences(_recipe(a), _recipe(b)),
        "environment": _differences(_environment(a), _environment(b)),
        "losses": {name: value for name, value in losses.items() if value is not None},
        "grad_norm": _difference(pairs, "grad_norm"),
        "validation": _difference(_paired(runs, "validation", from_step), "loss"),
        "speed": _ratio(pairs, _SPEED),
        "memory": _ratio(pairs, "memory_gib", largest=True),
    }
    found["worse"] = _worse(found, limits)
    found["verdict"] = _verdict(found)
    return found


def _paired(runs: tuple[RunFiles, RunFiles], kind: str, from_step: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Records (A's, B's) at the same stage and number of tokens, in order; of a step logged again the last one."""
    by_place = [
        {
            (row.get("stage"), row["consumed_tokens"]): row
            for row in getattr(run, kind)
            if row.get("loss") is not None and row["step"] > from_step
        }
        for run in runs
    ]
    return [(row, by_place[1][place]) for place, row in by_place[0].items() if place in by_place[1]]


def _span(rows: list[dict[str, Any]]) -> str:
    rows = [row for row in rows if row.get("loss") is not None]
    return f"steps {rows[0]['step']} to {rows[-1]['step']}" if rows else "no record"


def _difference(pairs: list[tuple[dict[str, Any], dict[str, Any]]], name: str) -> dict[str, Any] | None:
    """Paired differences of a field; None where no record of both has it."""
    both = [(a["step"], a[name], b[name]) for a, b in pairs if a.get(name) is not None and b.get(name) is not None]
    if not both:
        return None
    first, second = (np.array([row[i] for row in both], dtype=np.float64) for i in (1, 2))
    difference = second - first
    differing = np.flatnonzero(difference != 0)
    error = difference.std(ddof=1) / math.sqrt(len(both)) if len(both) > 1 else math.nan
    return {
        "a": float(first.mean()),
        "b": float(second.mean()),
        "mean": float(difference.mean()),
        "error": None if math.isnan(error) else float(error),
        "largest": float(np.abs(difference).max()),
        "largest_relative": float((np.abs(difference) / np.maximum(np.abs(first), 1e-12)).max()),
        "first_difference": int(both[differing[0]][0]) if len(differing) else None,
        "records": len(both),
    }


def _ratio(
    pairs: list[tuple[dict[str, Any], dict[str, Any]]], name: str, *, largest: bool = False
) -> dict[str, Any] | None:
    """Medians (or the largest values) of a field and B's by A's. The first record holds the warm-up: left out."""
    kept = pairs[1:] if len(pairs) > 2 and not largest else pairs
    values = [np.array([pair[i][name] for pair in kept if pair[i].get(name) is not None]) for i in (0, 1)]
    if not all(len(value) for value in values):
        return None
    a, b = (float(value.max() if largest else np.median(value)) for value in values)
    spread = [float(np.subtract(*np.percentile(value, [75, 25]))) for value in values]
    return {"a": a, "b": b, "ratio": b / a if a else None, "a_quartiles": spread[0], "b_quartiles": spread[1]}


def _worse(found: dict[str, Any], limits: Tolerances) -> list[str]:
    sentences = []
    for what, value in (("loss", found["losses"].get("loss")), ("validation loss", found["validation"])):
        if value is not None and value["mean"] > limits.loss:
            sentences.append(f"{what} is higher by {value['mean']:.4g} nats on average (tolerance {limits.loss:g})")
    speed, memory = found["speed"], found["memory"]
    if speed is not None and speed["ratio"] is not None and speed["ratio"] < 1 - limits.speed:
        sentences.append(f"speed is {speed['ratio']:.3f} of A's (tolerance {1 - limits.speed:g})")
    if memory is not None and memory["ratio"] is not None and memory["ratio"] > 1 + limits.memory:
        sentences.append(f"memory is {memory['ratio']:.3f} of A's (tolerance {1 + limits.memory:g})")
    return sentences


def _verdict(found: dict[str, Any]) -> str:
    loss = found["losses"]["loss"]
    if loss["first_difference"] is None:
        same = "every loss is the same bit for bit"
    elif loss["largest_relative"] <= ROUNDING:
        same = f"losses are the same up to rounding ({loss['largest_relative']:.1e} at most)"
    else:
        error = "" if loss["error"] is None else f" ± {loss['error']:.2g}"
        same = f"losses differ from step {loss['first_difference']} on, by {loss['mean']:+.4g}{error} nats on average"
    parts = [same]
    if found["speed"] is not None and found["speed"]["ratio"] is not None:
        parts.append(f"B has {found['speed']['ratio']:.3f} times A's speed")
    if found["memory"] is not None and found["memory"]["ratio"] is not None:
        parts.append(f"and {found['memory']['ratio']:.3f} times its memory")
    judged = "B is worse: " + "; ".join(found["worse"]) if found["worse"] else "B is no worse than A"
    return f"{judged}. Over steps {found['steps'][0]} to {found['steps'][1]} {', '.join(parts)}."


def _recipe(directory: Path) -> dict[str, Any]:
    path = directory / "recipe.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as the recipe of a run: {error}") from error
    return {name: value for name, value in _flat(values).items() if name not in _OWN_FIELDS}


def _environment(directory: Path) -> dict[str, Any]:
    path = directory / "environment.json"
    return _flat(read_json(path, "environment of the run")) if path.is_file() else {}


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Leaves of nested mappings and lists by dotted name; items of a list go by their `name` where they have one."""
    if isinstance(value, dict) and value:
        items = value.items()
    elif isinstance(value, list) and value:
        items = {
            str(item.get("name", i)) if isinstance(item, dict) else str(i): item for i, item in enumerate(value)
        }.items()
    else:
        return {name: value}
    return {
        key: leaf
        for part, inner in items
        for key, leaf in _flat(inner, f"{name}.{part}" if name else str(part)).items()
    }


def _differences(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = [*a, *(name for name in b if name not in a)]
    different = {name: (a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)}
    return json.loads(json.dumps(different, default=str))
