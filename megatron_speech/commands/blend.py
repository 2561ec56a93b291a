"""`megatron-speech blend RECIPE.yaml`: what each stage will train on, before any GPU is used.

Builds (or finds) the sequence index of each stage, the one that training then uses, and prints the target and the
realised proportions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_speech.console import output, tables
from megatron_speech.data.blend.plot import check_plot_path, plot_reports
from megatron_speech.errors import InputError
from megatron_speech.wording import suggestion

_SHOWN_STRATA = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `megatron-speech blend`."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help="the recipe")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes to the recipe, as `train` takes them"
    )
    parser.add_argument("--stage", metavar="S", help="only the stage of this name (default: all)")
    parser.add_argument("--json", action="store_true", help="print the full report as JSON, as in a run's blend.json")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read the sequence indices, new or found, and compare them with the checksums of when they were built",
    )
    parser.add_argument(
        "--plot", type=Path, metavar="OUT.png", help="draw target and realised shares, epochs and what is left out"
    )


def run(args: argparse.Namespace) -> int:
    """Print the blend of a recipe's stages; returns 0.

    Raises:
        InputError: the recipe, its datasets or its masses cannot be used.
    """
    if args.plot is not None:
        check_plot_path(args.plot)
    # Only now: `--help` needs neither the recipe's schema nor the datasets' libraries.
    from megatron_speech.data.stage import StageData, open_datasets
    from megatron_speech.recipe.load import load_recipe
    from megatron_speech.tokens.space import TokenSpace

    recipe = load_recipe(args.recipe, args.overrides)
    stages = recipe.stages
    if args.stage is not None:
        names = [stage.name for stage in stages]
        if args.stage not in names:
            raise InputError(f"recipe {args.recipe} has no stage {args.stage!r}; {suggestion(args.stage, names)}")
        stages = [stages[names.index(args.stage)]]
    space = TokenSpace.load(recipe.token_space)
    datasets = open_datasets(recipe.data, space, in_place=True)
    cache = recipe.data.index_directory(recipe.run_directory)
    reports = []
    for stage in stages:
        data = StageData(stage, recipe.data, datasets, space, seed=recipe.seed, cache_dir=cache)
        reports.append(data.blend_report() | ({"index_sha256": data.verify()} if args.verify else {}))
    if args.plot is not None:
        plot_reports(args.plot, reports)
    if args.json:
        output(json.dumps({"stages": reports}, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        print_reports(reports)
    return 0


def print_reports(reports: Iterable[dict[str, Any]]) -> None:
    """Print blend reports as tables."""
    from rich.table import Table

    console = tables(width=120)

    def table(title: str, rows: Iterable[tuple[str, dict[str, Any]]]) -> None:
        grid = Table(title=title, title_justify="left", title_style="", header_style="", box=None, pad_edge=False)
        grid.add_column("", overflow="fold")
        for column in ("target", "realised", "tokens", "documents", "audio hours", "of audio", "epochs"):
            grid.add_column(column, justify="right", no_wrap=True)
        for name, row in rows:
            grid.add_row(
                name,
                f"{row['target']:.2%}",
                f"{row['realised']:.2%}",
                f"{row['tokens']:,}",
                f"{row['documents']:,}",
                f"{row['audio_seconds'] / 3600:,.2f}",
                f"{row['audio_share']:.2%}",
                f"{row['epochs']:.2f}",
            )
        console.print(grid)
        console.print()

    for report in reports:
        console.print(
            f"stage {report['stage']}: {report['n_sequences']:,} sequences of {report['seq_length']:,} tokens, "
            f"{report['packing']} packing, {report['pad_fraction']:.2%} padding; shares are of {report['counted']}"
        )
        if "index_sha256" in report:
            console.print(f"  index {report['key']}: every byte is as it was built")
        for reason, counts in report["excluded_documents"].items():
            parts = ", ".join(f"{name} {count:,}" for name, count in counts.items())
            console.print(f"  left out, {reason.replace('_', ' ')}: {parts} documents")
        console.print()
        for field in ("task", "language", "source"):
            table(f"by {field}", report[f"by_{field}"].items())
        strata = sorted(report["strata"], key=lambda stratum: -stratum["tokens"])
        table(
            "by stratum (task or name / dataset / language / source)", ((s["name"], s) for s in strata[:_SHOWN_STRATA])
        )
        if len(strata) > _SHOWN_STRATA:
            console.print(f"… and {len(strata) - _SHOWN_STRATA} strata more: --json lists all of them\n")
        for warning in report["warnings"]:
            console.print(f"note: {warning}\n")
