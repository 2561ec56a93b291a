"""`megatron-speech compare RUN_A RUN_B`: what a change did to losses, speed and memory."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from megatron_speech.console import output, tables
from megatron_speech.errors import InputError
from megatron_speech.evaluation.compare import Tolerances, compare_runs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    limits = Tolerances()
    add = parser.add_argument
    add("run_a", type=Path, metavar="RUN_A", help="the run to compare with")
    add("run_b", type=Path, metavar="RUN_B", help="the run with the change")
    add("--from-step", type=int, default=0, metavar="N", help="leave out the steps up to N, such as those in common")
    for name, value, unit in (
        ("loss", limits.loss, "nats by which B's mean loss may be higher"),
        ("speed", limits.speed, "fraction by which B may be slower"),
        ("memory", limits.memory, "fraction by which B may take more memory"),
    ):
        add(f"--{name}-tolerance", type=float, default=value, metavar="X", help=f"{unit} (%(default)s)")
    add("--json", action="store_true", help="print one JSON object instead of tables")


def run(args: argparse.Namespace) -> int:
    """Print the comparison; exit status 1 if B is worse.

    Raises:
        InputError: a folder is no run, or the runs have nothing in common.
    """
    for name in ("loss", "speed", "memory"):
        value = getattr(args, f"{name}_tolerance")
        if not 0 <= value < float("inf"):
            raise InputError(f"--{name}-tolerance is {value:g}; it has to be 0 or more")
    limits = Tolerances(loss=args.loss_tolerance, speed=args.speed_tolerance, memory=args.memory_tolerance)
    found = compare_runs(args.run_a, args.run_b, limits, from_step=args.from_step)
    if args.json:
        output(json.dumps(found, indent=2))
    else:
        _print(found)
    return 1 if found["worse"] else 0


def _print(found: dict[str, Any]) -> None:
    from rich.table import Table

    console = tables()
    output(f"A: {found['a']}\nB: {found['b']}")
    for what in ("recipe", "environment"):
        if found[what]:
            table = Table(what, "A", "B")
            for name, (a, b) in found[what].items():
                table.add_row(name, str(a), str(b))
            console.print(table)
        else:
            output(f"{what}: the same")
    table = Table("mean over the common records", "A", "B", "B − A", "± error", "largest", "differs from step")
    rows = {**found["losses"], "validation loss": found["validation"], "grad_norm": found["grad_norm"]}
    for name, row in rows.items():
        if row is not None:
            error = "–" if row["error"] is None else f"{row['error']:.2g}"
            first = "never" if row["first_difference"] is None else str(row["first_difference"])
            table.add_row(
                name, f"{row['a']:.5f}", f"{row['b']:.5f}", f"{row['mean']:+.2e}", error, f"{row['largest']:.2e}", first
            )
    console.print(table)
    table = Table("", "A", "B", "B / A")
    for name, row in (("tokens/s/GPU, median", found["speed"]), ("memory, GiB, most", found["memory"])):
        if row is not None:
            ratio = "–" if row["ratio"] is None else f"{row['ratio']:.3f}"
            table.add_row(name, f"{row['a']:,.4g}", f"{row['b']:,.4g}", ratio)
    console.print(table)
    output(found["verdict"])
