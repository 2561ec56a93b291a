"""`megatron-speech train RECIPE.yaml [key=value …]`."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_speech.console import is_main_process, message
from megatron_speech.convert.architectures import architecture_of
from megatron_speech.environment import rank_and_size
from megatron_speech.errors import DivergenceError, InputError, PeerError
from megatron_speech.recipe.load import load_recipe
from megatron_speech.recipe.recipe import Recipe
from megatron_speech.training.health.agreement import AllRanksError
from megatron_speech.training.telemetry.run_log import record_failure

# Above 0 where a launcher has started the job again by itself.
_RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


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
    gates = parser.add_mutually_exclusive_group()
    gates.add_argument(
        "--dry-run", action="store_true", help="do everything up to the first step, and say what that has written"
    )
    gates.add_argument(
        "--overfit",
        type=int,
        metavar="N",
        help="overfit the first N sequences of the first stage; exits 1 when the model cannot learn them",
    )
    parser.add_argument(
        "--overfit-steps", type=int, default=500, metavar="N", help="steps that --overfit may take (500)"
    )
    gates.add_argument(
        "--through", metavar="STAGE", help="end after this stage; the same command with a later one resumes there"
    )
    parser.add_argument(
        "--change",
        action="append",
        default=[],
        metavar="key=value",
        help="go on with another value of this key than the run had: stages.pt.lr.peak=1e-4, optimizer.clip_grad=0.5; "
        "may be given more than once, and again with the same command",
    )
    parser.add_argument(
        "--rewind-to",
        type=int,
        metavar="STEP",
        help="go on from the checkpoint of this step; later ones are moved to RUN/set_aside",
    )


def run(args: argparse.Namespace) -> int:
    """Train, alone or as one process of torchrun or srun; continues what the run directory holds."""
    adopt_slurm_environment()
    _, world_size = rank_and_size()
    try:
        recipe = load_recipe(args.recipe, [*args.overrides, *args.change])
        recipe.data_parallel_size(world_size)
        if recipe.checkpoint.export_hf is not None:
            architecture_of(recipe.model)  # refused now, not at the first export
        names = [stage.name for stage in recipe.stages]
        for name in ("overfit", "overfit_steps"):
            if getattr(args, name) is not None and getattr(args, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it has to be at least 1")
        if args.through is not None and args.through not in names:
            raise InputError(f"--through {args.through}: the stages of {args.recipe} are {', '.join(names)}")
        if args.overfit is not None and (args.change or args.rewind_to is not None):
            raise InputError("--overfit begins anew, and --change and --rewind-to continue a run; give one of them")
        changes, rewind_to = changed_keys(recipe, args.change), _rewind_to(args.rewind_to)
    except InputError as error:
        return _report_for_all(error)
    rehearsal = args.dry_run or args.overfit is not None
    note = _note_nothing if rehearsal else record_failure
    try:
        if rehearsal:
            passed = rehearse(recipe, args.overfit, args.overfit_steps, changes=changes, rewind_to=rewind_to)
            return 0 if passed else 1
        train(recipe, through=args.through, changes=changes, rewind_to=rewind_to)
    except AllRanksError as error:
        if is_main_process():
            note(recipe, str(error))
        return _report_for_all(error)
    except InputError as error:  # of this process alone: the launcher ends the others
        note(recipe, str(error))
        raise
    except DivergenceError as error:  # raised by all ranks
        if is_main_process():
            note(recipe, str(error))
            message("error", str(error))
        return 1
    except PeerError as error:  # the rank that it is about has the traceback
        if is_main_process():
            note(recipe, str(error))
        message("error", str(error))
        return 1
    except Exception as error:
        if is_main_process():
            note(recipe, str(error) or type(error).__name__)
        raise
    return 0


def changed_keys(recipe: Recipe, changes: Sequence[str]) -> list[str]:
    """The dotted keys that `--change key=value` names, a stage by its name.

    Raises:
        InputError: a stage by a number beyond the recipe's.
    """
    keys = []
    for change in changes:
        parts = change.partition("=")[0].strip().split(".")
        if parts[0] == "stages" and len(parts) > 1 and parts[1].isdigit():
            names = [stage.name for stage in recipe.stages]
            if int(parts[1]) >= len(names):
                raise InputError(f"--change {change}: name the stage: {', '.join(names)}")
            parts[1] = names[int(parts[1])]
        keys.append(".".join(parts))
    return keys


def _rewind_to(step: int | None) -> int | None:
    """The step to go back to; None in a job that was started again after it had gone back."""
    if step is None or step >= 0:
        again = any(os.environ.get(name, "0") not in ("", "0") for name in _RESTARTS)
        if step is not None and again and is_main_process():
            message("note", f"--rewind-to {step} is not repeated: this job was restarted ({' or '.join(_RESTARTS)})")
        return None if again else step
    raise InputError(f"--rewind-to is {step}; it is the step of a checkpoint, 0 or more")


def _note_nothing(recipe: Recipe, message: str) -> None:
    """A rehearsal leaves the status of the run as it is."""


def _report_for_all(error: InputError) -> int:
    """Of processes that all have the same error, let the main one report it."""
    if is_main_process():
        raise error
    # The main process may be a little behind, and a launcher ends it as soon as this one has ended: let it print.
    time.sleep(2.0)
    return 2


def train(
    recipe: Recipe, *, through: str | None = None, changes: Sequence[str] = (), rewind_to: int | None = None
) -> str:
    """Train `recipe` in this process (group); returns the state that status.json ends with.

    Args:
        recipe: what is trained.
        through: name of the last stage; None: all.
        changes: dotted keys that may differ from those of the checkpoint that the run continues from.
        rewind_to: the step of that checkpoint; None: the newest.
    """
    from megatron_speech.environment import prepare_imports

    prepare_imports()  # before megatron-core is imported
    from megatron_speech.parallel import groups
    from megatron_speech.training import trainer
    from megatron_speech.training.checkpoint.resume import ResumeRequest
    from megatron_speech.training.health.control import StopRequest
    from megatron_speech.training.run import set_up

    request = ResumeRequest(changes, rewind_to)

    with StopRequest() as stop:
        try:
            return trainer.train(set_up(recipe, stop=stop, request=request), through=through)
        finally:
            groups.destroy()


def rehearse(
    recipe: Recipe,
    overfit: int | None,
    steps: int,
    *,
    changes: Sequence[str] = (),
    rewind_to: int | None = None,
) -> bool:
    """A dry run, or `overfit` sequences learned in at most `steps` steps; False when that fails."""
    from megatron_speech.environment import prepare_imports

    prepare_imports()
    from megatron_speech.parallel import groups
    from megatron_speech.training import rehearsal
    from megatron_speech.training.checkpoint.resume import ResumeRequest
    from megatron_speech.training.health.control import StopRequest

    with StopRequest() as stop:
        try:
            if overfit is not None:
                return rehearsal.overfit(recipe, overfit, steps, stop)
            rehearsal.dry_run(recipe, stop, ResumeRequest(changes, rewind_to))
            return True
        finally:
            groups.destroy()


def adopt_slurm_environment() -> None:
    """Give torch.distributed the names it reads, in the tasks of a plain `srun`.

    The first node of the step is where the processes meet. MASTER_ADDR and MASTER_PORT are used where they are set;
    the port is else derived from the numbers of the job and the step. In a batch script itself, and in a step of one
    task (`srun --pty bash`), nothing is adopted: what runs there is one process, or torchrun's.
    """
    environment = os.environ
    if "RANK" in environment or "SLURM_STEP_ID" not in environment or "SLURM_PROCID" not in environment:
        return
    if environment.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    environment["LOCAL_RANK"] = environment.get("SLURM_LOCALID", "0")
    environment.setdefault("MASTER_ADDR", _address_of(first_host(environment["SLURM_STEP_NODELIST"])))
    number = 31 * int(environment.get("SLURM_JOB_ID", "0")) + int(environment["SLURM_STEP_ID"])
    environment.setdefault("MASTER_PORT", str(20000 + number % 10000))


def first_host(nodes: str) -> str:
    """The first host of a SLURM list such as `gpu[003-006,9],login1` or `rack[1-2]node[01-16]-ib`.

    SLURM's own `scontrol show hostnames` reads the list where it is there; else each bracket of the first name gives
    its first number, with its zeros.

    Raises:
        InputError: the list is none.
    """
    try:
        shown = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
    except OSError:  # not in this container
        shown = None
    if shown is not None and shown.returncode == 0 and (names := shown.stdout.split()):
        return names[0]
    # A comma parts names only outside of brackets.
    match = re.match(r"(?:[^\[\],]|\[[\d,-]+\])+", nodes)
    if match is None or nodes[match.end() :][:1] not in ("", ","):
        raise InputError(
            f"SLURM_STEP_NODELIST is {nodes!r}, which is no list of hosts such as node[01-04],login1; set MASTER_ADDR "
            "to the first host"
        )
    return re.sub(r"\[(\d+)[\d,-]*\]", r"\1", match[0])


def _address_of(host: str) -> str:
    """The address that SLURM itself reaches a node at; its name where `scontrol` does not say."""
    try:
        shown = subprocess.run(["scontrol", "show", "node", host], capture_output=True, text=True, check=False)
    except OSError:  # not in this container
        return host
    found = re.search(r"NodeAddr=(\S+)", shown.stdout)
    return found[1] if found else host
