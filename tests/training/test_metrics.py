"""Grouped losses are means over tokens."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_speech.recipe.loss import LossConfig
from megatron_speech.training.telemetry.metrics import LossMeter, peak_tflops

GROUPS = [("tts", "en", "studio"), ("tts", "hi", "street"), ("speech_lm", "en", "street")]


def feed(meter: LossMeter, losses: np.ndarray, plain: np.ndarray, weights: np.ndarray, ids: np.ndarray) -> None:
    """One global batch of these learned positions, and one position of padding."""
    modality = ids % 3 if meter.loss.normalizers == 3 else np.zeros_like(ids)
    totals = [np.bincount(modality, weights=by, minlength=meter.loss.normalizers) for by in (weights, None)]
    tensors = (torch.from_numpy(array.astype(np.float32)) for array in (losses, plain, weights))
    meter.add_losses(*tensors, torch.from_numpy(ids.astype(np.int32)))
    meter.add_counts(loss_totals=np.array(totals), tokens=len(ids), pad_tokens=1)


@given(
    seed=st.integers(0, 2**31),
    batches=st.integers(1, 4),
    size=st.integers(0, 40),
    normalize=st.sampled_from(["global", "modality"]),
)
def test_grouped_losses_are_means_over_the_tokens_of_a_group(
    seed: int, batches: int, size: int, normalize: Literal["global", "modality"]
) -> None:
    generator = np.random.default_rng(seed)
    section = LossConfig(text=0.25, audio=2.0, special=1.0, normalize=normalize)
    meter = LossMeter(GROUPS, "cpu", section)
    seen: list[tuple[int, float, float, float]] = []
    for _ in range(batches):
        ids = generator.integers(0, 9, size)
        weights = np.array([0.25, 2.0, 1.0])[ids % 3] * generator.choice([0.5, 1.0], size)
        plain = generator.exponential(3.0, size)
        losses = plain + generator.exponential(1.0, size)  # smoothing and z-loss
        feed(meter, losses, plain, weights, ids)
        seen += zip(ids.tolist(), weights.tolist(), losses.tolist(), plain.tolist(), strict=True)
    means = meter.read()
    assert means["tokens"] == batches * size
    assert means["pad_fraction"] == pytest.approx(1 / (size + 1))
    if not seen:
        assert math.isnan(means["loss"])
        return
    if normalize == "global":
        expected = sum(w * v for _, w, v, _ in seen) / sum(w for _, w, _, _ in seen)
    else:
        expected = 0.0
        for modality, weight in enumerate((0.25, 2.0, 1.0)):
            own = [(w, v) for i, w, v, _ in seen if i % 3 == modality]
            if own:
                expected += weight * sum(w * v for w, v in own) / sum(w for w, _ in own)
    assert means["loss"] == pytest.approx(expected, rel=1e-5)
    for name, member in {
        "loss/modality/audio": lambda group, modality: modality == 1,
        "loss/task/tts": lambda group, modality: group < 2,
        "loss/language/hi": lambda group, modality: group == 1,
        "loss/source/street": lambda group, modality: group > 0,
    }.items():
        values = [v for i, _, _, v in seen if member(i // 3, i % 3)]
        assert (name in means) == bool(values)
        if values:
            assert means[name] == pytest.approx(np.mean(values), rel=1e-6)


def test_a_read_begins_a_new_interval() -> None:
    meter = LossMeter(GROUPS, "cpu")
    for value in (1.0, 3.0):
        feed(meter, np.array([value]), np.array([value]), np.ones(1), np.array([1]))
        assert meter.read()["loss"] == value
    assert math.isnan(meter.read()["loss"])


def test_sums_that_were_saved_half_way_continue() -> None:
    def steps(meter: LossMeter, numbers: range) -> None:
        for step in numbers:
            losses = np.full(3, 0.1 * step + 0.3)
            feed(meter, losses, losses, np.ones(3), np.array([0, 4, 8]))

    through, first, second = (LossMeter(GROUPS, "cpu", LossConfig(normalize="modality")) for _ in range(3))
    steps(through, range(5))
    through.reduce()
    steps(through, range(5, 9))
    steps(first, range(5))
    first.reduce()
    second.totals.copy_(first.totals)
    steps(second, range(5, 9))
    assert second.read() == through.read()


def test_the_losses_of_a_rank_that_does_not_contribute_do_not_count() -> None:
    meter = LossMeter(GROUPS, "cpu", contributes=False)
    feed(meter, np.ones(1), np.ones(1), np.ones(1), np.zeros(1, dtype=int))
    assert math.isnan(meter.read()["loss"])


def test_the_peak_of_a_gpu_is_looked_up_by_its_most_specific_name() -> None:
    assert peak_tflops("NVIDIA H100 PCIe") == 756.0
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989.4
    assert peak_tflops("Some other device") is None and peak_tflops(None) is None
