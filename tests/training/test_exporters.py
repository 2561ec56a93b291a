"""One record goes to every exporter, and says the same in all of them."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import socket
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from toy_runs import read_metrics, toy_recipe, train, write_recipe

from megatron_speech.errors import InputError
from megatron_speech.recipe.load import parse_recipe
from megatron_speech.recipe.recipe import Recipe
from megatron_speech.training.telemetry import exporters
from megatron_speech.training.telemetry.exporters import (
    JsonLines,
    Prometheus,
    TensorBoard,
    open_exporters,
    truncate_metrics,
)
from megatron_speech.training.telemetry.run_log import RunLog, console_line
from megatron_speech.wording import clock

TRAIN = {
    "step": 120, "stage": "s1", "consumed_tokens": 1_000_000, "loss": 3.25, "loss/modality/audio": 4.5,
    "loss/language/hi": 5.5, "loss/source/studio a/b \"c\"": 2.5, "lr": 1.5e-4, "mfu": None,
}  # fmt: skip
VALIDATION = {"step": 120, "stage": "s1", "split": "validation", "loss": 3.75, "loss/task/tts": 3.5}


def scrape(port: int) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """(name, labels) → value of what a Prometheus server would read."""
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def recipe_with(folder: Path, **logging: Any) -> Recipe:
    return parse_recipe({**toy_recipe(folder), "logging": logging, "run_dir": str(folder)}, "test")


# ---- metrics.jsonl


def test_floats_are_written_to_the_last_bit(tmp_path: Path) -> None:
    log = RunLog(tmp_path, active=True, exporters=[JsonLines(tmp_path / "metrics.jsonl", 0)])
    value = 0.1 + 0.2
    log.write({"step": 1, "loss": value, "mfu": None, "worst": math.nan})
    log.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line == {"step": 1, "loss": value, "mfu": None, "worst": None}


def test_lines_after_the_checkpoint_and_torn_lines_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step}) + "\n" for step in (1, 2, 2, 3, 4)]
    path.write_text("".join(lines) + '{"step": 5, "lo')
    truncate_metrics(path, 3)
    assert path.read_text() == "".join(lines[:4])


def test_a_full_disk_loses_no_line_and_is_an_alarm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    room = 25  # bytes until the disk is full: it tears the second line
    real = os.write

    def write(descriptor: int, data: bytes) -> int:
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = real(descriptor, data[:room])
        room -= written
        return written

    monkeypatch.setattr(exporters.os, "write", write)
    log = RunLog(tmp_path, active=True, exporters=[JsonLines(tmp_path / "metrics.jsonl", 0)])
    for step in range(4):
        log.write({"step": step, "loss": 1.5})
    error = capsys.readouterr().err
    assert error.count("ALARM") == 1 and "No space left on device" in error and "training continues" in error
    room = 10**6
    log.write({"step": 4, "loss": 1.5})
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3, 4]


# ---- TensorBoard


def test_the_same_record_goes_to_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard.open(tmp_path, 0)
    assert board is not None
    log = RunLog(tmp_path, active=True, exporters=[board])
    log.write(TRAIN)
    log.write(VALIDATION)
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(120, 3.25)]
    assert [(event.step, event.value) for event in events.Scalars("validation/loss")] == [(120, 3.75)]


# ---- Prometheus


def test_prometheus_serves_every_number_of_the_newest_records_with_its_labels() -> None:
    exporter = Prometheus("run1", 0)
    try:
        assert exporter.write({**TRAIN, "step": 110, "stage": "s0", "loss/language/am": 1.0}) is None
        exporter.write(TRAIN)
        exporter.write(VALIDATION)
        found = scrape(exporter.port)
    finally:
        exporter.close()
    train = {("run", "run1"), ("stage", "s1"), ("split", "train")}
    validation = {("run", "run1"), ("stage", "s1"), ("split", "validation")}
    recorded = [value for (name, _), value in found.items() if name == "megatron_speech_recorded_at_seconds"]
    assert len(recorded) == 2
    assert {key: value for key, value in found.items() if key[0] != "megatron_speech_recorded_at_seconds"} == {
        ("megatron_speech_step", frozenset(train)): 120,
        ("megatron_speech_step", frozenset(validation)): 120,
        ("megatron_speech_consumed_tokens", frozenset(train)): 1e6,
        ("megatron_speech_loss", frozenset(train)): 3.25,
        ("megatron_speech_loss", frozenset(validation)): 3.75,
        ("megatron_speech_loss_by_modality", frozenset({*train, ("modality", "audio")})): 4.5,
        ("megatron_speech_loss_by_language", frozenset({*train, ("language", "hi")})): 5.5,
        ("megatron_speech_loss_by_source", frozenset({*train, ("source", 'studio a/b "c"')})): 2.5,
        ("megatron_speech_loss_by_task", frozenset({*validation, ("task", "tts")})): 3.5,
        ("megatron_speech_lr", frozenset(train)): 1.5e-4,
    }
    with pytest.raises(OSError):
        scrape(exporter.port)


def test_a_port_that_is_taken_is_one_sentence(tmp_path: Path) -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"logging.prometheus_port {port} cannot be opened: .*in use"):
            open_exporters(recipe_with(tmp_path, prometheus_port=port), tmp_path, 0)
    assert not (tmp_path / "metrics.jsonl").exists()


# ---- Weights & Biases


class FakeWandb(SimpleNamespace):
    """Records what it is called with."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__(calls=[])

    def init(self, **arguments: Any) -> FakeWandb:
        self.calls.append(("init", arguments))
        return self

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **options: self.calls.append((name, arguments, options))


def test_wandb_gets_the_same_record_and_a_continued_run_goes_on_in_the_same_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_with(tmp_path, tensorboard=False, wandb={"project": "speech", "mode": "offline", "tags": ["x"]})
    ids = []
    for _ in range(2):
        fake = FakeWandb()
        monkeypatch.setitem(sys.modules, "wandb", fake)
        log = RunLog(tmp_path, active=True, exporters=open_exporters(recipe, tmp_path, 0))
        log.write(TRAIN)
        log.write(VALIDATION)
        log.close()
        kind, arguments = fake.calls[0]
        assert kind == "init" and (arguments["project"], arguments["mode"], arguments["resume"]) == (
            "speech", "offline", "allow",
        )  # fmt: skip
        assert arguments["config"]["name"] == "toy" and arguments["name"] == "toy"
        ids.append(arguments["id"])
        logged = [call[1][0] for call in fake.calls if call[0] == "log"]
        assert logged[0] == {key: value for key, value in TRAIN.items() if key not in ("stage", "mfu")}
        assert logged[1] == {"step": 120, "validation/loss": 3.75, "validation/loss/task/tts": 3.5}
        assert fake.calls[-1][0] == "finish"
    assert ids[0] == ids[1]


def test_wandb_that_is_asked_for_and_absent_or_unable_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_with(tmp_path, wandb={"project": "speech"})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"logging\.wandb is set and the package wandb is not installed"):
        open_exporters(recipe, tmp_path, 0)

    class Unable(FakeWandb):
        def init(self, **arguments: Any) -> FakeWandb:
            raise self.Error("no API key")

    monkeypatch.setitem(sys.modules, "wandb", Unable())
    with pytest.raises(InputError, match=r"logging\.wandb cannot start a run: no API key"):
        open_exporters(recipe, tmp_path, 0)


# ---- the console


def test_the_console_line_says_what_matters() -> None:
    record = {"stage": "s1", "step": 107, "loss": 3.21, "loss/modality/audio": 4.0, "lr": 1.5e-4, "grad_norm": 0.5,
              "tokens_per_second_per_gpu": 12345.6, "tflops_per_gpu": 412.34, "mfu": 0.4168, "memory_gib": 61.26,
              "data_wait_seconds": 0.002}  # fmt: skip
    line = console_line(record, stage_step=7, stage_steps=100, total_steps=500, eta_seconds=3723)
    assert line == (
        "s1   7/100  step 107/500  loss 3.2100  audio 4.0000  text -  lr 1.50e-04  grad 0.50  12,346 tok/s/GPU"
        "  412 TFLOP/s  MFU 41.7%  mem 61.3 GiB  wait 2 ms  eta 1:02:03"
    )
    assert "MFU -" in console_line(
        {**record, "mfu": None}, stage_step=7, stage_steps=100, total_steps=500, eta_seconds=0
    )
    assert clock(59.6) == "1:00"


@pytest.mark.slow
def test_the_dashboard_shows_exactly_what_a_run_exports(
    toy: Path, tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_recipe(tmp_path / "recipe.yaml", toy_recipe(toy))
    short = ["stages.pt.tokens=2048", "stages.sft.tokens=1024", "data.cache_dir=" + str(tmp_path / "cache")]
    # A CPU has no peak to be a share of.
    monkeypatch.setattr("megatron_speech.training.events.log_metrics.peak_tflops", lambda name: 1.0)
    assert train(file, tmp_path / "run", *short) == 0
    exporter = Prometheus("toy", 0)
    try:
        for line in read_metrics(tmp_path / "run"):
            exporter.write(line)
        exported: dict[str, set[str]] = {}
        for name, labels in scrape(exporter.port):
            exported.setdefault(name, set()).update(label for label, _ in labels)
    finally:
        exporter.close()
    dashboard = json.loads((repository / "examples" / "grafana" / "megatron_speech.json").read_text())
    shown: set[str] = set()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            (name,) = re.findall(r"megatron_speech_\w+", target["expr"])
            labels = set(re.findall(r"(\w+)=~?\"", target["expr"])) | set(
                re.findall(r"{{(\w+)}}", target["legendFormat"])
            )
            assert labels <= exported[name], (panel["title"], labels)
            shown.add(name)
    assert shown == set(exported)
