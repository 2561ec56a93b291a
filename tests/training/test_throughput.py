"""Tokens per second, TFLOP/s and MFU by hand."""

from __future__ import annotations

import pytest

from megatron_speech.recipe.model import ModelConfig
from megatron_speech.training.telemetry.throughput import Interval

MODEL = ModelConfig.model_validate({
    "num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 16, "num_attention_heads": 2, "num_query_groups": 1,
    "kv_channels": 4,
})  # fmt: skip


def test_only_what_is_computed_counts() -> None:
    interval = Interval(seconds=4.0, steps=2, waited=0.5, tokens=1000.0, learned=250.0, pad_fraction=0.2)
    record = interval.record(MODEL, 100, reach=10.0, processes=2, peak_tflops=1e-6)
    # Per layer: queries and output 8·8 each, keys and values 8·4 each, three matrices 8·16; attention 2 heads of 4.
    body = 6 * 2 * (2 * 64 + 2 * 32 + 3 * 128) + 6 * 2 * 2 * 4 * 10
    flops = 1000 * body + 250 * 6 * 8 * 100
    assert record["tflops_per_gpu"] == pytest.approx(flops / 4 / 2 / 1e12)
    assert record["mfu"] == pytest.approx(flops / 4 / 2 / 1e6)
    assert (record["tokens_per_second"], record["tokens_per_second_per_gpu"]) == (250.0, 125.0)
    assert (record["data_wait_seconds"], record["step_seconds"]) == (0.25, 2.0)
    assert (record["learned_fraction"], record["pad_fraction"]) == (0.25, 0.2)
    assert interval.record(MODEL, 100, reach=10.0, processes=2, peak_tflops=None)["mfu"] is None
    top = interval.record(MODEL, 100, reach=10.0, processes=2, peak_tflops=1e-6, last_mlp_on_learned_only=True)
    assert top["tflops_per_gpu"] == pytest.approx((flops - 750 * 6 * 3 * 128) / 4 / 2 / 1e12)
