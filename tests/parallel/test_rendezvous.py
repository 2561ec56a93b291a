"""Processes that do not find each other say why, and end when they are asked to."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import processes
import pytest

from megatron_speech import environment
from megatron_speech.errors import InputError
from megatron_speech.parallel import rendezvous

# Waits for a second process, which never comes. The signals have handlers, as those of a run do.
WAITS = """
import signal
from datetime import timedelta
from megatron_speech.parallel import rendezvous
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda *_: None)
rendezvous.QUIET_SECONDS = 0.2
stopped = lambda: False
rendezvous.join("gloo", 0, 2, init_method=None, timeout=timedelta(minutes=30), stopped=stopped)
"""


def waiting(port: int, **variables: str) -> dict[str, str]:
    names = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {**os.environ, **names, **variables}


def set_environment(monkeypatch: pytest.MonkeyPatch, unset: tuple[str, ...], values: dict[str, str]) -> None:
    for name in unset:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def taken_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_process_that_waits_for_the_others(free_port: int, number: signal.Signals) -> None:
    words = [sys.executable, "-c", WAITS]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with processes.started(words, env=waiting(free_port), **pipes) as process:
        for line in process.stderr:
            if "waiting for" in line:  # the notice of the thread beside the wait: it has begun
                break
        process.send_signal(number)
        _, errors = process.communicate(timeout=processes.TIMEOUT_SECONDS)
    assert process.returncode == 128 + number
    assert f"{number.name} came while the 2 processes of the run meet at 127.0.0.1:{free_port}" in errors


def test_a_signal_that_came_before_ends_the_wait_too(free_port: int) -> None:
    code = WAITS.replace("lambda: False", "lambda: True")
    done = subprocess.run([sys.executable, "-c", code], env=waiting(free_port), capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGTERM
    assert "nothing to save" in done.stderr


def test_a_taken_port_is_named(monkeypatch: pytest.MonkeyPatch, taken_port: int) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(taken_port))
    with pytest.raises(InputError, match=f"MASTER_PORT {taken_port} is taken by another process on this host"):
        rendezvous.join("gloo", 0, 2, init_method=None, timeout=timedelta(seconds=5))


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"MASTER_PORT": "1234"}, "MASTER_ADDR is not set"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "no"}, "MASTER_PORT is 'no'; needed is a free port"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "70000"}, "from 1 to 65535"),
        ({"MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": "1234"}, "MASTER_ADDR no-such-host.invalid does not"),
    ],
)
def test_a_place_that_cannot_be_is_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], sentence: str
) -> None:
    set_environment(monkeypatch, ("MASTER_ADDR", "MASTER_PORT"), variables)
    with pytest.raises(InputError, match=sentence):
        rendezvous.join("gloo", 0, 2, init_method=None, timeout=timedelta(seconds=5))


def test_a_rank_that_never_comes_is_said(monkeypatch: pytest.MonkeyPatch, free_port: int) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port))
    with pytest.raises(InputError, match=r"rank 0 waited .* at 127.0.0.1:\d+ and not all 2 processes came"):
        rendezvous.join("gloo", 0, 2, init_method=None, timeout=timedelta(milliseconds=100))


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"RANK": "1"}, "RANK is set and WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set and RANK is not"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK from 0 to WORLD_SIZE - 1"),
        ({"RANK": "first", "WORLD_SIZE": "2"}, "needed are integers"),
    ],
)
def test_half_an_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], sentence: str
) -> None:
    set_environment(monkeypatch, ("RANK", "WORLD_SIZE"), {})
    assert environment.rank_and_size() == (0, 1)
    set_environment(monkeypatch, (), variables)
    with pytest.raises(InputError, match=sentence):
        environment.rank_and_size()


@pytest.mark.slow
def test_the_launcher_needs_no_name_of_the_host(repository: Path, tmp_path: Path) -> None:
    named = ["unshare", "--uts", "sh", "-c", 'hostname no-such-host.invalid && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*named, "true"], capture_output=True).returncode:
        pytest.skip("the name of the host can be changed by root only")
    (tmp_path / "meet.py").write_text(
        "import torch.distributed as dist\ndist.init_process_group('gloo')\nprint('met', flush=True)\n"
        "dist.destroy_process_group()\n"
    )
    launcher = (repository / "examples/launch.sh").read_text()
    assert "-m megatron_speech.cli train" in launcher
    script = tmp_path / "launch.sh"
    script.write_text(launcher.replace("-m megatron_speech.cli train", str(tmp_path / "meet.py")))
    environment_ = {**os.environ, "PYTHON": sys.executable, "NPROC": "2"}
    words = [*named, "bash", str(script), "recipe.yaml"]
    with processes.started(words, env=environment_, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        printed, errors = process.communicate(timeout=processes.TIMEOUT_SECONDS)
    assert process.returncode == 0, errors
    assert printed.count("met") == 2
