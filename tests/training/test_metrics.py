"""Grouped losses are means over tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_speech.training.metrics import LossMeter, peak_tflops

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


def test_the_peak_of_a_gpu_is_looked_up_by_its_most_specific_name() -> None:
    assert peak_tflops("NVIDIA H100 PCIe") == 756.0
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989.4
    assert peak_tflops("Some other device") is None and peak_tflops(None) is None
