"""`megatron-speech benchmark train RECIPE.yaml`: tokens per second of a recipe on its own data."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_speech.errors import InputError
from megatron_speech.files import write_json

FIGURES = (
    "tokens_per_second",
    "tokens_per_second_per_gpu",
    "step_seconds",
    "data_wait_seconds",
    "tflops_per_gpu",
    "mfu",
    "memory_gib",
    "pad_fraction",
)
"""Reported as the median over the measurements, and as `<figure>_range` [lowest, highest]."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help="what to train")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace values of the recipe")
    parser.add_argument("--stage", metavar="S", help="name of the stage that is measured; default: the first")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="optimizer steps measured (50)")
    parser.add_argument("--warmup-steps", type=int, default=10, metavar="N", help="steps before the clock starts (10)")
    parser.add_argument("--interval", type=int, default=5, metavar="N", help="steps per measurement (5)")
    parser.add_argument("--json", type=Path, metavar="F", help="write the figures to F")


@contextlib.contextmanager
def _run_directory(of_recipe: Path) -> Iterator[str]:
    """A temporary run directory that all processes of the run share, removed by the first one.

    On several nodes it lies beside the run directory of the recipe: their own temporary folders are not shared.
    """
    import torch.distributed as dist

    from megatron_speech.parallel import groups

    groups.start()
    folder: tempfile.TemporaryDirectory[str] | None = None
    if dist.get_rank() == 0:
        one_node = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE")) == os.environ.get("WORLD_SIZE")
        if not one_node:
            of_recipe.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(
            prefix="megatron-speech-benchmark-", dir=None if one_node else of_recipe.parent
        )
    names = [folder.name if folder is not None else ""]
    dist.broadcast_object_list(names, src=0)
    try:
        yield names[0]
    finally:
        groups.destroy()
        if folder is not None:
            folder.cleanup()


def run(args: argparse.Namespace) -> int:
    """Train without validation or checkpoints in a temporary run directory, and report the middle of the figures."""
    for name in ("steps", "warmup_steps", "interval"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it has to be at least 1")
    from megatron_speech.console import is_main_process
    from megatron_speech.environment import detect, prepare_imports
    from megatron_speech.recipe.load import load_recipe

    prepare_imports()
    total = args.warmup_steps + args.steps
    with _run_directory(load_recipe(args.recipe, args.overrides).run_directory) as folder:
        quiet = [
            f"run_dir={folder}",
            f"logging.interval_steps={args.interval}",
            "logging.tensorboard=false",
            "logging.prometheus_port=null",
            "logging.wandb=null",
            "validation.interval_steps=0",
            "checkpoint.interval_steps=0",
        ]
        recipe = load_recipe(args.recipe, [*args.overrides, *quiet])
        names = [stage.name for stage in recipe.stages]
        if args.stage is not None and args.stage not in names:
            raise InputError(f"{args.recipe} has no stage {args.stage!r}; its stages are {', '.join(names)}")
        stage = recipe.stages[names.index(args.stage) if args.stage is not None else 0]
        # One step more than is run: the stage does not end, so nothing is validated or saved.
        stage = stage.model_copy(update={"tokens": (total + 1) * stage.global_batch_tokens})
        recipe = recipe.model_copy(update={"stages": [stage]})
        from megatron_speech.training import trainer
        from megatron_speech.training.run import set_up

        trainer.train(set_up(recipe), max_steps=total)
        if not is_main_process():
            return 0
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if line["step"] > args.warmup_steps + args.interval - 1]
    result: dict[str, Any] = {
        "benchmark": "train",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "stage": stage.name,
        "steps": args.steps,
        "measurements": len(measured),
        "environment": detect(),
    }
    for key in FIGURES:
        values = [line[key] for line in measured if line[key] is not None]
        result[key] = statistics.median(values) if values else None
        result[f"{key}_range"] = [min(values), max(values)] if values else None
    result["recipe"] = recipe.model_dump(mode="json")
    lowest, highest = result["tokens_per_second_range"]
    print(
        f"{recipe.name}, stage {stage.name}: {result['tokens_per_second']:,.0f} tokens/s ({lowest:,.0f} to "
        f"{highest:,.0f}), {result['step_seconds'] * 1e3:.1f} ms per step, data wait "
        f"{result['data_wait_seconds'] * 1e3:.2f} ms"
    )
    if args.json is not None:
        write_json(args.json, result)
    return 0
