"""The channels of the package's messages: one function, or one class, for each kind of message.

    kind                                channel                            goes to
    result of a command, line of a run  output(text), tables()             stdout
    notice, warning                     logging.getLogger(__name__)        stderr, `note: …` and `warning: …`, of rank 0
    progress of long work               Progress(…)                        stderr, a bar on a terminal, else lines
    alarm of a run, refusal, interrupt  message(kind, text)                stderr, `kind: …`

Commands install the handler of the second row (`errors.command`); a program that uses the package as a library
configures `logging` as it likes.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from megatron_speech.wording import clock

if TYPE_CHECKING:
    from rich.console import Console

LINE_SECONDS = 30.0
"""Between two lines of progress."""

logger = logging.getLogger(__name__)


def is_main_process() -> bool:
    """Whether this process is rank 0 according to its launcher; usable before process groups exist."""
    rank = os.environ.get("RANK", "0")
    return not rank.isdecimal() or int(rank) == 0  # one that is no number is refused, and somebody has to say so


def output(text: str = "", *, end: str = "\n") -> None:
    """Print a result, or a line of a run, on stdout."""
    print(text, end=end, flush=True)


def tables(width: int = 140) -> Console:
    """A rich console on stdout; `width` columns wide where stdout is no terminal, so that pipes get whole tables."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=width)


def message(kind: str, text: str) -> None:
    """Print `kind: text` on stderr: an error that ends the command, an alarm of a run."""
    print(f"{kind}: {text}", file=sys.stderr, flush=True)


class _Handler(logging.Handler):
    """Prints the package's log records as messages, on the main process only."""

    def emit(self, record: logging.LogRecord) -> None:
        if is_main_process():
            message("note" if record.levelno < logging.WARNING else record.levelname.lower(), record.getMessage())


def install_handler() -> None:
    """Print the package's notices and warnings from now on; a second call changes nothing."""
    package = logging.getLogger("megatron_speech")
    if not any(isinstance(handler, _Handler) for handler in package.handlers):
        package.addHandler(_Handler())
        package.setLevel(logging.INFO)


class Progress:
    """How far long work is: a bar on a terminal, else a log line at most every `LINE_SECONDS`, of rank 0.

    Work that ends before the first line is due logs nothing.

    Args:
        what: is done, such as `encode`.
        total: units in all; None: not known.
        unit: what is counted: `row`; `B` for bytes, which are shown as MB and GB.
        initial: units that were done before, by an earlier process.
        clock: monotonic seconds.
        terminal: whether stderr is one; None: found out.

    Attributes:
        done: units done so far, `initial` included.
    """

    def __init__(
        self,
        what: str,
        *,
        total: int | None,
        unit: str,
        initial: int = 0,
        clock: Callable[[], float] = time.monotonic,
        terminal: bool | None = None,
    ) -> None:
        self.done = initial
        self._what, self._total, self._unit, self._initial = what, total, unit, initial
        self._clock = clock
        self._began = self._logged = clock()
        self._bar: Any = None
        if (sys.stderr.isatty() if terminal is None else terminal) and is_main_process():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=initial, unit=unit, unit_scale=unit == "B", desc=what)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def describe(self, what: str) -> None:
        """Name what is done from now on."""
        self._what = what
        if self._bar is not None:
            self._bar.set_description(what)

    def update(self, count: int) -> None:
        """Count `count` more units."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif (now := self._clock()) - self._logged >= LINE_SECONDS:
            self._logged = now
            logger.info("%s", self._line(now - self._began))

    def skip(self, count: int) -> None:
        """Count `count` units that were done before: they count for no rate."""
        self.done += count
        self._initial += count
        if self._bar is not None:
            self._bar.initial += count
            self._bar.update(count)

    def close(self) -> None:
        """End the bar; the lines end with what the work took."""
        if self._bar is not None:
            self._bar.close()
        elif self._logged > self._began:
            self._logged = self._began
            seconds = self._clock() - self._began
            logger.info("%s: %s in %s", self._what, self._count(self.done - self._initial), clock(seconds))

    def _line(self, seconds: float) -> str:
        rate = (self.done - self._initial) / seconds
        share = f" of {self._count(self._total)} ({self.done / self._total:.0%})" if self._total else ""
        left = f", eta {clock((self._total - self.done) / rate)}" if self._total and rate > 0 else ""
        return f"{self._what}: {self._count(self.done)}{share}, {self._count(rate)}/s{left}"

    def _count(self, value: float) -> str:
        if self._unit != "B":
            return f"{value:,.0f} {self._unit}" if value >= 10 or value == int(value) else f"{value:.1f} {self._unit}"
        for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
            if value >= size:
                return f"{value / size:,.1f} {unit}"
        return f"{value:.0f} B"
