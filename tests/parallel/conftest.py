"""Runs a function in the ranks of a small world, each a process of its own."""

import multiprocessing
import multiprocessing.forkserver
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Workers are found by name in the processes of the fork server.
_TESTS = Path(__file__).parent.parent
# The others for toy_runs and te_stand_ins.
sys.path[:0] = [str(_TESTS / room) for room in ("parallel", "training", "model")]


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., None]:
    """`run_ranks(function, world_size, *arguments)` calls function(rank, world_size, *arguments) in every rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["layout_worker", "train_worker"])
    # The server imports megatron-core once for all ranks; Python 3.11 gives it this process's path only so.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        patch.setenv("PYTHONWARNINGS", "ignore")
        multiprocessing.forkserver.ensure_running()

    def run(function: Callable[..., None], world_size: int, *arguments: object) -> None:
        ranks = [context.Process(target=function, args=(rank, world_size, *arguments)) for rank in range(world_size)]
        try:
            for process in ranks:
                process.start()
            for process in ranks:
                process.join(120)
        finally:  # also of an interrupt: Python would wait for the ranks, which wait for each other
            stuck = [process for process in ranks if process.is_alive()]
            for process in stuck:
                process.kill()
        assert not stuck, "a rank did not finish in 120 seconds"
        assert [process.exitcode for process in ranks] == [0] * world_size

    return run
