"""What a run reports: records to its exporters, lines to the console, its state to status.json."""

from __future__ import annotations

import errno
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_speech.console import message, output
from megatron_speech.files import read_json, write_json
from megatron_speech.recipe.recipe import Recipe
from megatron_speech.training.telemetry.exporters import Exporter, Record, finite
from megatron_speech.wording import clock


class RunLog:
    """The exporters, the console and status.json of one run; silent on all ranks but one.

    A full disk stops none of it: it raises an alarm, on stderr, once for as long as it lasts.

    Args:
        directory: the run directory.
        active: whether this rank writes.
        exporters: where records go.
        writes: False: status.json is left as it is.
    """

    STATUS_SECONDS = 5.0

    def __init__(
        self, directory: Path, *, active: bool, exporters: Sequence[Exporter] = (), writes: bool = True
    ) -> None:
        self.directory = directory
        self.active = active
        self._writes = active and writes
        self._exporters = list(exporters) if active else []
        self._status_written = -math.inf
        self._alarms: set[str] = set()

    def write(self, record: Record) -> None:
        """Give `record` to every exporter; NaN becomes null."""
        clean = finite(record)
        for exporter in self._exporters:
            self.alarm(type(exporter).__name__, exporter.write(clean))

    def info(self, text: str) -> None:
        """Print one line."""
        if self.active:
            output(text)

    def alarm(self, what: str, problem: str | None, *, word: str = "ALARM") -> None:
        """Print `problem` of `what` when it begins; None ends it."""
        if problem is None:
            self._alarms.discard(what)
        elif what not in self._alarms:
            self._alarms.add(what)
            message(word, f"{problem}; training continues")

    def status(self, state: str, position: dict[str, Any], message: str = "", *, force: bool = True) -> None:
        """Write status.json; without `force` at most every few seconds, since each write is an fsync."""
        if not self._writes:
            return
        now = time.monotonic()
        if not force and now - self._status_written < self.STATUS_SECONDS:
            return
        self._status_written = now
        path = self.directory / "status.json"
        try:
            write_json(path, {"state": state, **position, "message": message})
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self.alarm("status", f"{path}: {error.strerror}; it holds the state before")
        else:
            self.alarm("status", None)

    def close(self) -> None:
        """Flush and close the exporters."""
        for exporter in self._exporters:
            exporter.close()
        self._exporters = []


def record_failure(recipe: Recipe, message: str) -> None:
    """Note in the run directory, if there is one, why the run did not start or continue.

    The position stays as it was, and a finished run stays finished: a later command that was refused, for a
    changed recipe say, took nothing from it.
    """
    path = recipe.run_directory / "status.json"
    if not recipe.run_directory.is_dir():
        return
    status = {"stage": recipe.stages[0].name, "step": 0, "consumed_sequences": 0, "consumed_tokens": 0}
    if path.exists():
        status = read_json(path, "run status")
        if status.get("state") == "finished":
            return
    write_json(path, {**status, "state": "failed", "message": message})


def as_text(value: float | str | None, form: str) -> str:
    """A number as the console shows it; `-` for what there is none of (the MFU of a CPU), a word for NaN."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return "not a number" if math.isnan(value) else format(value, form)


def console_line(record: Record, *, stage_step: int, stage_steps: int, total_steps: int, eta_seconds: float) -> str:
    """The one line that is printed per logging interval; see :func:`as_text` for what has no value."""

    def number(key: str, form: str) -> str:
        return as_text(record.get(key), form)

    if record.get("loss") is None:
        record = {**record, "loss": "none (nothing to learn)"}

    return (
        f"{record['stage']} {stage_step:>{len(str(stage_steps))}}/{stage_steps}"
        f"  step {record['step']}/{total_steps}"
        f"  loss {number('loss', '.4f')}"
        f"  audio {number('loss/modality/audio', '.4f')}"
        f"  text {number('loss/modality/text', '.4f')}"
        f"  lr {number('lr', '.2e')}"
        f"  grad {number('grad_norm', '.2f')}"
        f"  {number('tokens_per_second_per_gpu', ',.0f')} tok/s/GPU"
        f"  {number('tflops_per_gpu', '.3g')} TFLOP/s"
        f"  MFU {number('mfu', '.1%')}"
        f"  mem {number('memory_gib', '.1f')} GiB"
        f"  wait {record['data_wait_seconds'] * 1e3:.0f} ms"
        f"  eta {clock(eta_seconds)}"
    )
