"""Commands that tests start, and their end: nothing that a test has started outlives the test, nor the test runner.

torchrun gives each of its workers a session of its own, and a daemon leaves its parent, so neither a process group nor
a walk from parent to child finds all of a command. What all processes of a command have in common is the environment
they were started with: a variable with a name of its own marks it, and `end_marked` ends whatever bears the mark.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

GRACE_SECONDS = 2.0  # for what ends by itself when the test runner has, such as multiprocessing's resource tracker
TIMEOUT_SECONDS = 300.0


def _new_mark() -> str:
    return f"MEGATRON_SPEECH_TEST_{uuid.uuid4().hex}"


def marked(mark: str) -> list[psutil.Process]:
    """The processes of this user, this one excepted, in whose first environment the variable `mark` is set."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and mark in process.environ():
                found.append(process)
        except psutil.Error:
            pass  # another user's, or ended since
    return found


def end_marked(mark: str) -> None:
    """SIGKILL what bears the mark, until nothing does: a process that is killed may just have started another one."""
    while found := marked(mark):
        for process in found:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
        psutil.wait_procs(found, timeout=1)


@contextmanager
def started(
    command: Sequence[str | os.PathLike[str]], *, env: Mapping[str, str] | None = None, **options: Any
) -> Iterator[subprocess.Popen[str]]:
    """A command in a session of its own, with text pipes; every process of it is killed when the block is left.

    Args:
        command: the program and its arguments.
        env: its environment; default: this process's.
        options: more of subprocess.Popen's.
    """
    mark = _new_mark()
    environment = {**(os.environ if env is None else env), mark: "1"}
    with subprocess.Popen(command, env=environment, text=True, start_new_session=True, **options) as process:
        try:
            yield process
        finally:
            end_marked(mark)


def run(
    command: Sequence[str | os.PathLike[str]], *, timeout: float = TIMEOUT_SECONDS, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and return what it printed; whatever stops the wait ends every process of the command.

    Args:
        command: the program and its arguments.
        timeout: seconds, after which subprocess.TimeoutExpired is raised.
        options: more of `started`'s.
    """
    with started(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
        out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def end_commands_with_this_process() -> None:
    """Whatever this process starts from now on ends with it, also when it is killed and can clean up nothing itself."""
    mark = _new_mark()
    os.environ[mark] = "1"
    watcher = {name: value for name, value in os.environ.items() if name != mark}
    subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), str(os.getpid()), mark],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True, env=watcher,
    )  # fmt: skip


def end_with_parent() -> None:
    """For a process that was forked and has the environment of its parent: have the kernel kill it when that ends."""
    pr_set_pdeathsig = 1
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _watch(runner: int, mark: str) -> None:
    try:
        descriptor = os.pidfd_open(runner)
        if os.getppid() == runner:  # else it has ended before this process came so far
            select.select([descriptor], [], [])  # readable as soon as it has ended, whether or not anybody reaps it
    except ProcessLookupError:
        pass
    psutil.wait_procs(marked(mark), timeout=GRACE_SECONDS)
    end_marked(mark)


if __name__ == "__main__":
    _watch(int(sys.argv[1]), sys.argv[2])
