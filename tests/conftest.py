"""Fixtures that every room's tests share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

# Two test workers share two cores: one thread each. Set before torch is imported anywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

sys.path.append(str(Path(__file__).parent))  # tests are imported without their folders

import processes

# A gate repeats: the same examples in every run, however busy the machine. HYPOTHESIS_PROFILE=random looks for others.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("random", derandomize=False, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# A shell's background job ignores interrupts, and all that it starts would: what is sent one here has to notice.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Where no bytecode is kept, each of hundreds of processes compiles torch anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Set before anything is started: all of it ends with this process, whichever way that ends.
processes.end_commands_with_this_process()

REPOSITORY = Path(__file__).resolve().parent.parent


# Who uses one of these, itself or through another fixture, is marked `distributed` by that.
STARTS_RANKS = {"run_ranks", "launch_two"}
COLLECTED = pytest.StashKey[list[pytest.Item]]()


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if STARTS_RANKS.intersection(getattr(item, "fixturenames", ())):
            item.add_marker("distributed")
    config.stash[COLLECTED] = list(items)
    if hasattr(config, "workerinput"):  # of several workers: none shall begin with something long when little is left
        weight: dict[Path, int] = {}
        for item in items:
            own = 2 if item.get_closest_marker("distributed") else 1 if item.get_closest_marker("slow") else 0
            weight[item.path] = max(own, weight.get(item.path, 0))
        items.sort(key=lambda item: -weight[item.path])


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The tests of a file go to one worker, which then makes their fixtures, whole runs among them, only once."""
    from xdist.scheduler import LoadGroupScheduling

    class FileScheduling(LoadGroupScheduling):
        def _split_scope(self, nodeid: str) -> str:
            scope = super()._split_scope(nodeid)
            return scope.split("::")[0] if scope == nodeid else scope

    if config.getvalue("dist") != "loadgroup":
        return None
    config.option.loadscopereorder = False  # in the order above, not by the number of tests
    return FileScheduling(config, log)


@pytest.fixture(scope="session")
def collected(pytestconfig: pytest.Config) -> list[pytest.Item]:
    """Every test of the whole suite, also those that -m leaves out."""
    if [(pytestconfig.invocation_params.dir / argument).resolve() for argument in pytestconfig.args] != [
        REPOSITORY / "tests"
    ]:
        pytest.skip("only a part of the tests was collected: run pytest on tests/")
    return pytestconfig.stash[COLLECTED]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, None, None]:
    """Parallel groups end with the file of tests that brought them up: commands leave theirs to the process's end."""
    yield
    if (nextitem is None or nextitem.path != item.path) and "megatron.core" in sys.modules:
        from megatron_speech.parallel import groups

        groups.destroy()


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def fsdd() -> Path:
    """samples.jsonl of real spoken digits, kept beside the checkout and not in it (CC BY-SA)."""
    path = REPOSITORY.parent / "shared" / "data" / "fsdd" / "samples.jsonl"
    if not path.is_file():
        pytest.skip(f"the spoken-digit recordings are not at {path}")
    return path


@pytest.fixture(scope="session")
def launch_two() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`launch_two(*commands)` runs `megatron-speech train` with each list of arguments on the same two processes."""

    def launch(*commands: list[str]) -> subprocess.CompletedProcess[str]:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        script = REPOSITORY / "tests" / "training" / "train_many.py"
        return processes.run([*torchrun, str(script), json.dumps(commands)], env={**os.environ, "OMP_NUM_THREADS": "1"})

    return launch
