"""How the processes of a run find each other, and how that ends where they do not.

torch.distributed waits in C++, where Python runs no signal handlers and no other code of the main thread. A thread
beside it therefore takes the signals, says what the process waits for, and ends it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from megatron_speech.console import message
from megatron_speech.errors import InputError

# How long a process waits for the others without a word.
QUIET_SECONDS = 30.0
# What torch's own timeout, which is usually first, may be late by.
_GRACE_SECONDS = 60.0


def join(
    backend: str,
    rank: int,
    world_size: int,
    *,
    init_method: str | None,
    timeout: timedelta,
    stopped: Callable[[], bool] | None = None,
) -> None:
    """Join the other processes: torch.distributed's process group, with `init_method` or from the environment.

    Args:
        backend: "gloo" or "nccl".
        rank, world_size: of this process and of the run.
        init_method: instead of MASTER_ADDR and MASTER_PORT.
        timeout: how long to wait for the others, and that of later collectives.
        stopped: whether a signal came before; the process then ends here as if it came now.

    Raises:
        InputError: the address cannot be used, or the others do not come within `timeout`.
    """
    place = init_method or _place()
    with watched(f"the {world_size} processes of the run meet at {place}", timeout, stopped):
        try:
            dist.init_process_group(
                backend, init_method=init_method or "env://", rank=rank, world_size=world_size, timeout=timeout
            )
        except dist.DistError as error:
            raise InputError(_explained(error, place, rank, world_size, timeout)) from error


def _place() -> str:
    """MASTER_ADDR:MASTER_PORT, checked."""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise InputError(
            f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not set: the processes of a run meet at "
            "the host MASTER_ADDR (that of rank 0), port MASTER_PORT; start them with torchrun or srun, or set both"
        )
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not (port.isdecimal() and 0 < int(port) < 1 << 16):
        raise InputError(f"MASTER_PORT is {port!r}; needed is a free port of {host}, from 1 to 65535")
    try:
        socket.getaddrinfo(host, int(port))
    except OSError as error:
        raise InputError(
            f"MASTER_ADDR {host} does not resolve on this host ({error.strerror}); set MASTER_ADDR to an address of "
            "rank 0's host that every host reaches, such as its IP address"
        ) from error
    return f"{host}:{port}"


def _explained(error: dist.DistError, place: str, rank: int, world_size: int, timeout: timedelta) -> str:
    text = str(error).splitlines()[0]
    if "EADDRINUSE" in text:
        return (
            f"MASTER_PORT {place.rpartition(':')[2]} is taken by another process on this host, where rank 0 has to "
            "listen; set MASTER_PORT to a free port, the same for all processes"
        )
    minutes = f"{timeout.total_seconds() / 60:g} minutes"
    if isinstance(error, dist.DistStoreError) and rank == 0:
        return (
            f"rank 0 waited {minutes} at {place} and not all {world_size} processes came ({text}); look at the logs "
            "of the others, and whether their hosts reach this address and port"
        )
    if isinstance(error, dist.DistNetworkError | dist.DistStoreError):
        return (
            f"rank {rank} did not reach rank 0 at {place} in {minutes} ({text}); look at rank 0's log, and whether "
            "MASTER_ADDR and MASTER_PORT are its host and port, and the same for all processes"
        )
    return f"rank {rank} cannot join the {world_size} processes at {place}: {text}"


@contextlib.contextmanager
def watched(what: str, timeout: timedelta, stopped: Callable[[], bool] | None = None) -> Iterator[None]:
    """While the body waits in C++ for other processes: a signal ends this one, and so does a wait far over `timeout`.

    There is nothing to save yet, so the process ends with the status of one that the signal killed: a launcher must
    not take it for a run that is done.
    """
    if threading.current_thread() is not threading.main_thread():  # signals are handled nowhere else
        yield
        return
    receive, send = os.pipe()
    os.set_blocking(send, False)
    previous = signal.set_wakeup_fd(send, warn_on_full_buffer=False)
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(receive, done, what, timeout), name="rendezvous", daemon=True)
    watcher.start()
    try:
        if stopped is not None and stopped():
            _end(signal.SIGTERM, what)
        yield
    finally:
        done.set()
        signal.set_wakeup_fd(previous)
        os.write(send, b"\0")
        watcher.join()
        os.close(send)
        os.close(receive)


def _watch(receive: int, done: threading.Event, what: str, timeout: timedelta) -> None:
    begin = time.monotonic()
    poll = select.poll()  # select.select takes no descriptor beyond 1023
    poll.register(receive, select.POLLIN)
    limit = timeout.total_seconds() + _GRACE_SECONDS
    while True:
        readable = poll.poll(1000 * QUIET_SECONDS)
        if done.is_set():
            return
        for number in os.read(receive, 64) if readable else b"":
            if number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                _end(number, what)
        waited = time.monotonic() - begin
        if waited > limit:
            message("error", f"{what}: not all came in {limit:.0f} s; look at the logs of the others")
            os._exit(1)
        if not readable:
            message("note", f"{what}; waiting for {waited:.0f} s so far")


def _end(number: int, what: str) -> NoReturn:
    name = signal.Signals(number).name
    message("interrupted", f"{name} came while {what}; no step was trained, and there is nothing to save")
    os._exit(128 + number)
