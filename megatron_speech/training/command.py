"""`megatron-speech train RECIPE.yaml [key=value …]`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from megatron_speech.errors import InputError, PeerError
from megatron_speech.training.agreement import AgreedError
from megatron_speech.training.recipe import Recipe, load_recipe
from megatron_speech.training.run_log import record_failure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "recipe", type=Path, metavar="RECIPE.yaml", help="the recipe; everything about the run is in it"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="replace a value of the recipe: run_dir=/data/run1 stages.pt.tokens=0.5M stages.1.lr.peak=1e-4",
    )


def run(args: argparse.Namespace) -> int:
    """Train, alone or as one process of torchrun or srun; continues what the run directory holds."""
    adopt_slurm_environment()
    try:
        recipe = load_recipe(args.recipe, args.overrides)
        recipe.data_parallel_size(int(os.environ.get("WORLD_SIZE", "1")))
    except InputError as error:
        return _report_for_all(error)
    try:
        train(recipe)
    except AgreedError as error:
        if _is_main():
            record_failure(recipe, str(error))
        return _report_for_all(error)
    except InputError as error:  # of this process alone: the launcher ends the others
        record_failure(recipe, str(error))
        raise
    except PeerError as error:  # the rank that it is about has the traceback
        if _is_main():
            record_failure(recipe, str(error))
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except Exception as error:
        if _is_main():
            record_failure(recipe, str(error) or type(error).__name__)
        raise
    return 0


def _is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _report_for_all(error: InputError) -> int:
    """Of processes that all have the same error, let the main one report it."""
    if _is_main():
        raise error
    # The main process may be a little behind, and a launcher ends it as soon as this one has ended: let it speak.
    time.sleep(2.0)
    return 2


def train(recipe: Recipe) -> str:
    """Train `recipe` in this process (group); returns the state that status.json ends with."""
    from megatron_speech.training.environment import prepare_imports

    prepare_imports()  # before megatron-core is imported
    from megatron_speech.parallel import groups
    from megatron_speech.training.control import StopRequest
    from megatron_speech.training.trainer import Trainer

    with StopRequest() as stop:
        try:
            return Trainer(recipe, stop=stop).run()
        finally:
            groups.destroy()


def adopt_slurm_environment() -> None:
    """Give torch.distributed the names it reads, under `srun` without torchrun."""
    if "RANK" in os.environ or "SLURM_PROCID" not in os.environ or "MASTER_ADDR" not in os.environ:
        return
    for ours, theirs in (("RANK", "SLURM_PROCID"), ("WORLD_SIZE", "SLURM_NTASKS"), ("LOCAL_RANK", "SLURM_LOCALID")):
        if theirs in os.environ:
            os.environ[ours] = os.environ[theirs]
