"""Grouped losses are means over tokens, and metrics.jsonl holds exactly what was computed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_speech.training.metrics import LossMeter, RunLog, console_line, duration, peak_tflops, truncate_metrics

GROUPS = [("tts", "en", "studio"), ("tts", "hi", "street"), ("speech_lm", "en", "street")]


@given(seed=st.integers(0, 2**31), batches=st.integers(1, 4), size=st.integers(1, 40))
def test_grouped_losses_are_means_over_the_tokens_of_a_group(seed: int, batches: int, size: int) -> None:
    generator = np.random.default_rng(seed)
    meter = LossMeter(GROUPS, "cpu")
    seen: list[tuple[int, float, float]] = []
    for _ in range(batches):
        ids = generator.integers(-1, 9, size)
        weights = np.where(ids < 0, 0.0, generator.choice([0.25, 1.0, 2.0], size)).astype(np.float32)
        losses = np.where(ids < 0, 0.0, generator.exponential(3.0, size)).astype(np.float32)
        loss_tensor, weight_tensor = torch.from_numpy(losses), torch.from_numpy(weights)
        meter.add_losses(loss_tensor, torch.dot(loss_tensor, weight_tensor), torch.from_numpy(ids.astype(np.int32)))
        meter.add_counts(weight=float(weights.sum()), tokens=size - 1, pad_tokens=1)
        seen += [(int(i), float(w), float(v)) for i, w, v in zip(ids, weights, losses, strict=True) if i >= 0]
    means = meter.read()
    assert means["tokens"] == batches * (size - 1)
    assert means["pad_fraction"] == pytest.approx(1 / size)
    if not seen:
        assert math.isnan(means["loss"])
        return
    assert means["loss"] == pytest.approx(sum(w * v for _, w, v in seen) / sum(w for _, w, _ in seen), rel=1e-5)
    for name, member in {
        "loss/modality/audio": lambda group, modality: modality == 1,
        "loss/task/tts": lambda group, modality: group < 2,
        "loss/language/hi": lambda group, modality: group == 1,
        "loss/source/street": lambda group, modality: group > 0,
    }.items():
        values = [v for i, _, v in seen if member(i // 3, i % 3)]
        assert (name in means) == bool(values)
        if values:
            assert means[name] == pytest.approx(np.mean(values), rel=1e-6)


def test_a_read_begins_a_new_interval() -> None:
    meter = LossMeter(GROUPS, "cpu")
    for value in (1.0, 3.0):
        meter.add_losses(torch.tensor([value]), torch.tensor(value), torch.tensor([1], dtype=torch.int32))
        meter.add_counts(weight=1.0, tokens=1, pad_tokens=0)
        assert meter.read()["loss"] == value
    assert math.isnan(meter.read()["loss"])


def test_sums_that_were_saved_half_way_continue() -> None:
    def feed(meter: LossMeter, steps: range) -> None:
        for step in steps:
            losses = torch.full((3,), 0.1 * step + 0.3)
            meter.add_losses(losses, losses.sum(), torch.tensor([0, 4, 8], dtype=torch.int32))
            meter.add_counts(weight=3.0, tokens=3, pad_tokens=0)

    through, first, second = (LossMeter(GROUPS, "cpu") for _ in range(3))
    feed(through, range(5))
    through.reduce()
    feed(through, range(5, 9))
    feed(first, range(5))
    first.reduce()
    second.totals.copy_(first.totals)
    feed(second, range(5, 9))
    assert second.read() == through.read()


def test_a_rank_that_does_not_contribute_can_still_ask_to_stop() -> None:
    meter = LossMeter(GROUPS, "cpu", contributes=False)
    meter.add_losses(torch.ones(1), torch.ones(()), torch.zeros(1, dtype=torch.int32))
    meter.request_stop()
    means = meter.read()
    assert means["stop_requests"] == 1 and math.isnan(means["loss"])


def test_floats_are_written_to_the_last_bit(tmp_path: Path) -> None:
    log = RunLog(tmp_path, active=True, resume_step=0, tensorboard=False)
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


def test_the_same_record_goes_to_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path, active=True, resume_step=0, tensorboard=True)
    log.write({"step": 3, "stage": "pt", "loss": 2.5, "mfu": None})
    log.write({"step": 3, "stage": "pt", "split": "validation", "loss": 2.75})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 2.5)]
    assert [(event.step, event.value) for event in events.Scalars("validation/loss")] == [(3, 2.75)]


def test_the_console_line_says_what_matters() -> None:
    record = {"stage": "pt", "loss": 3.21, "loss/modality/audio": 4.0, "lr": 1.5e-4, "grad_norm": 0.5,
              "tokens_per_second": 12345.6, "data_wait_seconds": 0.002}  # fmt: skip
    line = console_line(record, stage_step=7, stage_steps=100, eta_seconds=3723)
    assert line == (
        "pt   7/100  loss 3.2100  audio 4.0000  text -  lr 1.50e-04  grad 0.50  12,346 tok/s  wait 2 ms  eta 1:02:03"
    )
    assert duration(59.6) == "1:00"


def test_the_peak_of_a_gpu_is_looked_up_by_its_most_specific_name() -> None:
    assert peak_tflops("NVIDIA H100 PCIe") == 756.0
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989.4
    assert peak_tflops("Some other device") is None and peak_tflops(None) is None
