"""What the data benchmarks share: measured child processes, interleaved repetitions, figures with their spread."""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_speech.errors import InputError
from megatron_speech.files import write_json

SHOWN_LINES = 12


@dataclass(frozen=True)
class Measured:
    """What a command took: elapsed seconds, CPU seconds of it and all its children, and memory.

    peak_bytes: of the largest process, mapped files included, which the kernel takes back when it needs the room;
    anonymous_bytes: of all its processes together, without mapped files, looked at ten times a second (Linux, else 0).
    """

    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int
    output: str
    anonymous_bytes: int = 0


def run_measured(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Measured:
    """Run `command` to its end and account for it.

    Raises:
        InputError: it cannot be started, or exits with another status than 0; its last lines are quoted.
    """
    with tempfile.TemporaryFile() as output:
        begin = time.perf_counter()
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **single_threaded(), **(environment or {})},
            )
        except OSError as error:
            raise InputError(f"cannot run {command[0]}: {error.strerror or error}; name another program") from error
        finished, seen = threading.Event(), [0]
        watcher = threading.Thread(target=_watch, args=(process.pid, finished, seen), daemon=True)
        watcher.start()
        # wait4: the usage of this child and of the children that it has waited for, and of nobody else
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - begin
        finished.set()
        watcher.join()
        output.seek(0)
        text = output.read().decode("utf-8", "replace")
    if process.returncode:
        last = "\n".join(text.strip().splitlines()[-SHOWN_LINES:])
        raise InputError(f"`{' '.join(command)}` ended with status {process.returncode}:\n{last}")
    return Measured(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, text, seen[0])


def _watch(pid: int, finished: threading.Event, seen: list[int]) -> None:
    while not finished.wait(0.1):
        seen[0] = max(seen[0], _anonymous_bytes(pid))


def _anonymous_bytes(pid: int) -> int:
    """Anonymous memory of a process and all below it; 0 of what is gone, or where there is no /proc."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    except OSError:
        return 0
    own = next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:")), 0)
    return own + sum(_anonymous_bytes(int(child)) for child in children)


def single_threaded() -> dict[str, str]:
    """Environment of a child whose only parallelism is its own workers."""
    return {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore", "COLUMNS": "160"}


def script(module: str) -> list[str]:
    """The command line that runs a module of this installation, wherever we stand."""
    return [sys.executable, "-m", module]


def module_environment() -> dict[str, str]:
    """Lets `python -m` find the same packages as this process, from a checkout or installed."""
    root = str(Path(__file__).resolve().parents[2])
    return {"PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}


def interleaved(runs: Mapping[str, Callable[[], Measured]], repetitions: int) -> dict[str, list[Measured]]:
    """Each run once per repetition, one after the other: a machine that slows down slows all of them."""
    found: dict[str, list[Measured]] = {name: [] for name in runs}
    for repetition in range(repetitions):
        # Forth and back, so that none always follows the same neighbour.
        for name in runs if repetition % 2 == 0 else reversed(list(runs)):
            found[name].append(runs[name]())
    return found


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median and spread of some figures, and the figures."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "values": [round(value, 6) for value in values],
    }


def marginal_rates(count: int, measured: Sequence[Measured], idle: Sequence[Measured]) -> dict[str, Any]:
    """Things per second, by CPU and by wall; what the same command takes for next to none of them is subtracted.

    Args:
        count: how many more things `measured` did than `idle`.
        measured: the runs.
        idle: runs over a handful of rows, of the same repetitions: interpreter, imports, workers.
    """
    # The middle of the idle runs: a busy moment in one of them is no speed of the other.
    cpu_idle = statistics.median(one.cpu_seconds for one in idle)
    wall_idle = statistics.median(one.wall_seconds for one in idle)
    cpu = [max(one.cpu_seconds - cpu_idle, 1e-3) for one in measured]
    wall = [max(one.wall_seconds - wall_idle, 1e-3) for one in measured]
    return {
        "per_cpu_second": summary([count / seconds for seconds in cpu]),
        "per_second": summary([count / seconds for seconds in wall]),
        "cpu_seconds": summary([one.cpu_seconds for one in measured]),
        "wall_seconds": summary([one.wall_seconds for one in measured]),
        "startup_cpu_seconds": summary([one.cpu_seconds for one in idle]),
        "peak_bytes": max(one.peak_bytes for one in measured),
        "anonymous_bytes": max(one.anonymous_bytes for one in measured),
    }


def ratios(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Ours over theirs, repetition by repetition."""
    return {
        name: summary([a / b for a, b in zip(ours[name]["values"], theirs[name]["values"], strict=True)])
        for name in ("per_cpu_second", "per_second")
    }


def spread(figure: dict[str, Any], digits: int = 1, scale: float = 1.0) -> str:
    """`median [min .. max]`."""
    middle, low, high = (f"{figure[name] / scale:,.{digits}f}" for name in ("median", "min", "max"))
    return f"{middle} [{low} .. {high}]"


def report_of_kernels(
    args: argparse.Namespace,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    print_report: Callable[[dict[str, Any]], None],
) -> int:
    """Measure with `args.threads` threads, say what was found and where, and write it to `args.json` if that is given.

    Returns:
        The exit status of the command.
    """
    import torch

    from megatron_speech.environment import detect

    threads_before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        report = measure(args)
        report["environment"] = detect()
    finally:
        torch.set_num_threads(threads_before)
    report["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    print_report(report)
    if args.json is not None:
        write_json(args.json, report)
    return 0
