"""What the example scripts share: run the project's own commands one after another, each shown before it runs."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable


def say(text: str) -> None:
    """One line on stdout, at once."""
    print(text, flush=True)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Pipeline:
    """Runs steps, prints each command as a person would type it, and remembers how long each took."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.seconds: dict[str, float] = {}

    def step(self, title: str, argv: Sequence[str | Path], **environment: str) -> None:
        """Run one command from the root of the checkout; a failure ends the script with the command's status."""
        words = [str(word) for word in argv]
        shown = ["python" if word == PYTHON else word for word in words]
        say(f"\n── {title}\n$ {shlex.join(shown)}")
        start = time.monotonic()
        status = subprocess.run(words, cwd=ROOT, env={**os.environ, **environment}).returncode
        self.seconds[title] = time.monotonic() - start
        if status:
            say(f"stopped: “{title}” ended with status {status} (its message is above)")
            raise SystemExit(status)
        say(f"   ({self.seconds[title]:.0f} s)")

    def elapsed(self) -> float:
        """Seconds since the script began."""
        return time.monotonic() - self.started


def megatron_speech(*words: str | Path) -> list[str | Path]:
    """The console script's argv, run with this interpreter."""
    return [PYTHON, "-m", "megatron_speech.cli", *words]


def script(path: str, *words: str | Path) -> list[str | Path]:
    """A script of the checkout's argv, run with this interpreter."""
    return [PYTHON, ROOT / path, *words]
