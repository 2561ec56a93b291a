"""Where the numbers of a run go: each logged record, to every exporter that the recipe configures.

    record ─► metrics.jsonl      always; full precision, what a resumed run is compared by
          ├─► TensorBoard        logging.tensorboard
          ├─► Prometheus         logging.prometheus_port
          └─► Weights & Biases   logging.wandb

A record is one line of metrics.jsonl: `{"step": 120, "stage": "s1", "loss": 3.2, "loss/language/hi": 3.4, …}`, and
`"split": "validation"` in those of a validation. Nothing else is exported anywhere, so all of them agree.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import math
import os
import re
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from megatron_speech.errors import InputError
from megatron_speech.files import atomic_write, read_json, write_json
from megatron_speech.recipe.logging import WandbConfig
from megatron_speech.recipe.recipe import Recipe

Record = dict[str, Any]
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class Exporter(Protocol):
    """Takes every record of a run; `write` returns what keeps it from doing so, or None."""

    def write(self, record: Record) -> str | None:
        """Take one record; returns a sentence when it could not be written (yet), which ends no run."""
        ...

    def close(self) -> None:
        """Flush and close."""
        ...


def open_exporters(recipe: Recipe, directory: Path, resume_step: int) -> list[Exporter]:
    """The exporters that `recipe.logging` configures, of a run that continues after `resume_step`. Call on one rank.

    Raises:
        InputError: the port is taken, or Weights & Biases is configured and not installed.
    """
    section = recipe.logging
    exporters: list[Exporter] = []
    try:
        if section.prometheus_port is not None:
            exporters.append(Prometheus(recipe.name, section.prometheus_port))
        if section.wandb is not None:
            exporters.append(Wandb(section.wandb, recipe, directory))
        if section.tensorboard and (board := TensorBoard.open(directory, resume_step)) is not None:
            exporters.append(board)
        exporters.append(JsonLines(directory / "metrics.jsonl", resume_step))
    except BaseException:
        for exporter in exporters:
            exporter.close()
        raise
    return exporters


def check_exporters(recipe: Recipe) -> None:
    """Refuse what :func:`open_exporters` would refuse, and leave nothing open or written. Call on one rank.

    Raises:
        InputError: the port is taken, or Weights & Biases is configured and not installed.
    """
    section = recipe.logging
    if section.prometheus_port is not None:
        Prometheus(recipe.name, section.prometheus_port).close()
    if section.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise InputError(_without_wandb(recipe))


def _without_wandb(recipe: Recipe) -> str:
    return (
        f"recipe {recipe.name}: logging.wandb is set and the package wandb is not installed; `pip install wandb`, or "
        "set logging.wandb to null"
    )


def finite(record: Record) -> Record:
    """`record` with null for what is not finite: JSON knows no NaN."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }


def scalars(record: Record) -> Iterator[tuple[str, float]]:
    """(name, value) of the numbers of a record, `step` left out."""
    for key, value in record.items():
        if key != "step" and isinstance(value, int | float) and not isinstance(value, bool):
            yield key, value


# ------------------------------------------------------------------------------------- metrics.jsonl


class JsonLines:
    """Appends records to a file, a line each; floats are written so that they read back to the same bits.

    A full disk loses nothing while the run lives: lines wait in memory, in order, until there is space again.

    Args:
        path: metrics.jsonl.
        resume_step: lines after this step were written by work that is lost; they are removed.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        truncate_metrics(path, resume_step)
        self.path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._waiting = b""

    def write(self, record: Record) -> str | None:
        """Append `record`, and what had to wait before it."""
        self._waiting += (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
        try:
            while self._waiting:
                self._waiting = self._waiting[os.write(self._descriptor, self._waiting) :]
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise
            lines = self._waiting.count(b"\n")
            return f"{self.path}: {error.strerror}; {lines} line{'s' * (lines > 1)} wait in memory"
        return None

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def truncate_metrics(path: Path, step: int) -> None:
    """Drop the lines of `path` whose step is above `step`, and a last line that was cut by a crash."""
    if not path.exists():
        return
    kept, dropped = [], False
    with open(path, encoding="utf-8") as handle:
        for line in handle:
            try:
                record = json.loads(line)
                # A change of the recipe at `step` is noted again by the process that carries it out.
                last = step - 1 if record.get("split") == "changed" else step
                keep = line.endswith("\n") and record["step"] <= last
            except (ValueError, KeyError, TypeError, AttributeError):
                keep = False
            dropped |= not keep
            if keep:
                kept.append(line)
    if dropped:
        with atomic_write(path, "w") as out:
            out.writelines(kept)


# -------------------------------------------------------------------------------------- TensorBoard


class TensorBoard:
    """Event files in RUN/tensorboard; validation under `validation/`."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    @staticmethod
    def open(directory: Path, resume_step: int) -> TensorBoard | None:
        """A writer that forgets what came after `resume_step`; None where tensorboard is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return None
        return TensorBoard(SummaryWriter(str(directory / "tensorboard"), purge_step=resume_step + 1))

    def write(self, record: Record) -> str | None:
        """Add the numbers of `record`; after a full disk there is no writer any more, which is reported."""
        if self._writer is None:
            return "tensorboard/: stopped when the disk was full; it resumes when the run is continued"
        prefix = f"{record['split']}/" if "split" in record else ""
        try:
            for key, value in scalars(record):
                self._writer.add_scalar(prefix + key, value, record["step"])
        except OSError as error:  # of the writer's thread, handed on by the next call
            if error.errno not in _NO_SPACE:
                raise
            self._writer = None
            return f"tensorboard/: {error.strerror}"
        return None

    def close(self) -> None:
        """Flush and close."""
        if self._writer is not None:
            self._writer.close()


# --------------------------------------------------------------------------------------- Prometheus

PREFIX = "megatron_speech_"


def gauge_of(key: str) -> tuple[str, dict[str, str]]:
    """Prometheus name and own labels of a record's number: `loss/language/hi` → `…loss_by_language{language="hi"}`.

    `a/b` becomes `…a_by_name{name="b"}`.
    """
    name, *rest = key.split("/", 2)
    labels: dict[str, str] = {}
    if rest:
        label, value = rest if len(rest) == 2 else ("name", rest[0])
        label = _identifier(label)
        name, labels = f"{name}_by_{label}", {label: value}
    return PREFIX + _identifier(name), labels


def _identifier(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]", "_", text)


class Prometheus:
    """Serves the newest training and validation record as gauges on http://HOST:PORT/metrics.

    Labels: `run`, `stage`, `split` ("train" or "validation") on all of them, and what the name divides by
    (`modality`, `task`, `language`, `source`). `megatron_speech_recorded_at_seconds` is the Unix time of the record:
    an alert on its age finds a run that has stopped moving.

    Args:
        run: the recipe's name.
        port: TCP port; 0 takes a free one (see `port`).

    Raises:
        InputError: the port cannot be had.
    """

    def __init__(self, run: str, port: int) -> None:
        from prometheus_client import CollectorRegistry, start_http_server

        self._run = run
        self._newest: dict[str, tuple[Record, float]] = {}
        self._lock = threading.Lock()
        registry = CollectorRegistry()
        registry.register(self)  # type: ignore[arg-type]  # duck-typed, as prometheus-client documents it
        try:
            self._server, self._thread = start_http_server(port, registry=registry)
        except OSError as error:
            raise InputError(
                f"logging.prometheus_port {port} cannot be opened: {error.strerror}; name a port that is free on the "
                "node of rank 0, or null for none"
            ) from error
        self.port = int(self._server.server_port)

    def write(self, record: Record) -> str | None:
        """Show `record` from now on."""
        with self._lock:
            self._newest[record.get("split", "train")] = (record, time.time())
        return None

    def describe(self) -> list[Any]:
        """No gauge is known before the first record."""
        return []

    def collect(self) -> Iterator[Any]:
        """The gauges, as prometheus-client collects them at every scrape."""
        from prometheus_client.core import GaugeMetricFamily

        with self._lock:
            newest = dict(self._newest)
        families: dict[str, Any] = {}
        for split, (record, recorded_at) in newest.items():
            common = {"run": self._run, "stage": str(record["stage"]), "split": split}
            for key, value in (*scalars(record), ("step", record["step"]), ("recorded_at_seconds", recorded_at)):
                name, own = gauge_of(key)
                labels = {**common, **own}
                if name not in families:
                    families[name] = GaugeMetricFamily(name, f"{key.split('/')[0]} of the run", labels=list(labels))
                families[name].add_metric(list(labels.values()), value)
        yield from families.values()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


# --------------------------------------------------------------------------------- Weights & Biases


class Wandb:
    """A run of Weights & Biases; a continued run resumes the same one, whose id is in RUN/wandb.json.

    Raises:
        InputError: the package is not installed, or cannot start a run.
    """

    def __init__(self, section: WandbConfig, recipe: Recipe, directory: Path) -> None:
        try:
            import wandb
        except ImportError as error:
            raise InputError(_without_wandb(recipe)) from error
        path = directory / "wandb.json"
        if not path.exists():
            write_json(path, {"id": uuid.uuid4().hex[:16]})
        try:
            self._run = wandb.init(
                project=section.project,
                entity=section.entity,
                group=section.group,
                tags=section.tags,
                name=section.name or recipe.name,
                id=read_json(path, "Weights & Biases run")["id"],
                mode=section.mode,
                resume="allow",
                dir=str(directory),
                config=recipe.model_dump(mode="json"),
            )
        except wandb.Error as error:
            raise InputError(
                f"recipe {recipe.name}: logging.wandb cannot start a run: {error}; fix it, set mode: offline, or set "
                "logging.wandb to null"
            ) from error
        # With a step of our own a continued run may write a step again; W&B's own counter would drop it.
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Record) -> str | None:
        """Log the numbers of `record`."""
        prefix = f"{record['split']}/" if "split" in record else ""
        self._run.log({"step": record["step"], **{prefix + key: value for key, value in scalars(record)}})
        return None

    def close(self) -> None:
        """Finish the upload."""
        self._run.finish()
