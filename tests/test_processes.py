"""Nothing that a test starts outlives the test or the test runner, whichever way these end."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import processes
import psutil
import pytest

TESTS = Path(__file__).parent
PYTHON = [sys.executable, "-c"]
# A worker that says who it is and then waits for a signal that nobody sends.
WORKER = "import os, signal; open(os.environ['READY'], 'a').write(f'{os.getpid()}\\n'); signal.pause()"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
IMPORT = f"import os, signal, sys; sys.path.append({str(TESTS)!r}); import processes\n"
RUNNER = IMPORT + "processes.end_commands_with_this_process(); processes.run(sys.argv[1:])"
SECONDS = 120  # the most that a loaded machine may take


class Workers:
    """The other end of the pipe that READY names."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self._pipe = os.open(path, os.O_RDWR)  # not at its end when a writer goes

    def come(self, number: int) -> list[psutil.Process]:
        """The workers, as soon as so many have said that they are at work."""
        said = b""
        while said.count(b"\n") < number:
            assert select.select([self._pipe], [], [], SECONDS)[0], f"not {number} workers, but {said!r}"
            said += os.read(self._pipe, 1000)
        return [psutil.Process(int(pid)) for pid in said.split()]


@pytest.fixture
def ready(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Workers:
    """Tells the number of every WORKER that is started from now on."""
    monkeypatch.setenv("READY", str(tmp_path / "ready"))
    return Workers(tmp_path / "ready")


def assert_end(members: list[psutil.Process]) -> None:
    """They end, if they have not ended before: nothing has to reap them for that."""
    for member in members:
        try:
            descriptor = os.pidfd_open(member.pid)
        except ProcessLookupError:
            continue
        assert select.select([descriptor], [], [], SECONDS)[0] or not member.is_running(), f"{member} is left"
        os.close(descriptor)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_two_processes_under_torchrun_end_with_an_interrupted_runner(ready: Workers, number: signal.Signals) -> None:
    # Not by `started`, which would clean up after it.
    runner = subprocess.Popen([*PYTHON, RUNNER, *TORCHRUN, *PYTHON, WORKER], stderr=subprocess.DEVNULL)
    try:
        workers = ready.come(2)
        launcher = psutil.Process(workers[0].ppid())
        # A signal to torchrun's group would not find the workers.
        assert len({os.getsid(process.pid) for process in (launcher, *workers)}) == 3
        members = {launcher, *workers, *psutil.Process(runner.pid).children(recursive=True)}
        assert len(members) == 4  # with the process that watches over the runner
        runner.send_signal(number)
        runner.wait(SECONDS)
        assert_end(list(members))
    finally:
        runner.kill()
        runner.wait()


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_under_torchrun_end_with_the_block_that_they_were_started_in(ready: Workers) -> None:
    with processes.started([*TORCHRUN, *PYTHON, WORKER]):
        workers = ready.come(2)
        members = [psutil.Process(workers[0].ppid()), *workers]
    assert_end(members)


@pytest.mark.slow
def test_a_command_that_outstays_its_time_is_ended_and_leaves_nothing() -> None:
    reader, writer = os.pipe()
    shell = ["bash", "-c", 'setsid "$@" & setsid "$@" & wait', "bash", *PYTHON, "import signal; signal.pause()"]
    with pytest.raises(subprocess.TimeoutExpired):
        processes.run(shell, timeout=0.5, pass_fds=[writer])
    os.close(writer)
    # The pipe is at its end when no process is left that could write to it.
    assert select.select([reader], [], [], SECONDS)[0] and os.read(reader, 1) == b""
    os.close(reader)


@pytest.mark.slow
def test_a_daemon_that_a_finished_command_has_left_is_ended(ready: Workers) -> None:
    shell = ["bash", "-c", 'setsid "$@" &', "bash", *PYTHON, WORKER]
    with processes.started(shell) as command:
        assert command.wait(SECONDS) == 0
        (daemon,) = ready.come(1)
    assert_end([daemon])


def test_a_forked_process_ends_with_its_parent(ready: Workers) -> None:
    script = IMPORT + f"if os.fork() == 0:\n    processes.end_with_parent()\n    {WORKER}\nsignal.pause()"
    with processes.started([*PYTHON, script]) as parent:
        (forked,) = ready.come(1)
        assert forked.ppid() == parent.pid
        parent.kill()
        assert_end([forked])
