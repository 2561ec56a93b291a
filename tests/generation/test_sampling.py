"""Sampling: legal ids only, filters equal to a naive reference, noise that belongs to one request."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_speech.errors import InputError
from megatron_speech.generation.sampling import (
    LegalCodes,
    LegalText,
    SamplingConfig,
    illegal_share,
    probabilities,
    sample,
    uniform_noise,
)
from megatron_speech.tokens.space import CodecDescription, TokenSpace

LOGITS = st.lists(
    st.floats(-8, 8, allow_nan=False, width=16).map(lambda value: round(value, 2)), min_size=1, max_size=24
)


def naive_distribution(logits: list[float], config: SamplingConfig, seen: list[bool]) -> list[float]:
    """The filters one id at a time, as their papers describe them."""
    scores = list(logits)
    for i, was_seen in enumerate(seen):
        if was_seen:
            scores[i] = (
                scores[i] / config.repetition_penalty if scores[i] > 0 else scores[i] * config.repetition_penalty
            )
    order = sorted(range(len(scores)), key=lambda i: -scores[i])  # stable: the earlier id wins a tie
    if config.temperature == 0:
        return [float(i == order[0]) for i in range(len(scores))]
    top = max(scores)
    mass = [math.exp((score - top) / config.temperature) for score in scores]
    if config.top_k:
        mass = [value if i in order[: config.top_k] else 0.0 for i, value in enumerate(mass)]
    total = sum(mass)
    kept, before = set(), 0.0
    for i in order:
        if before < config.top_p or config.top_p == 1:
            kept.add(i)
        before += mass[i] / total
    mass = [value if i in kept else 0.0 for i, value in enumerate(mass)]
    return [value / sum(mass) for value in mass]


@settings(max_examples=200, deadline=None)
@given(
    logits=LOGITS,
    seen=st.lists(st.booleans(), min_size=24, max_size=24),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.integers(0, 30),
    # Values that no cumulative sum of these softmaxes meets exactly: at equality the last bit decides.
    top_p=st.sampled_from([0.1234567, 0.5432101, 0.9012345, 1.0]),
    penalty=st.sampled_from([0.5, 1.0, 1.3, 4.0]),
)
def test_filters_equal_the_naive_reference(
    logits: list[float], seen: list[bool], temperature: float, top_k: int, top_p: float, penalty: float
) -> None:
    config = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty)
    flags = seen[: len(logits)]
    found = probabilities(torch.tensor([logits], dtype=torch.float64), config, torch.tensor([flags]))[0]
    needed = naive_distribution(logits, config, flags)
    assert [value > 0 for value in found.tolist()] == [value > 0 for value in needed]
    np.testing.assert_allclose(found.numpy(), needed, rtol=1e-9, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.0, 1e-12, 0.25, 1.0, 7.0]), min_size=1, max_size=20).filter(any),
    uniform=st.floats(0, 1, exclude_max=True),
)
def test_an_id_of_probability_zero_is_never_drawn(weights: list[float], uniform: float) -> None:
    probs = torch.tensor([weights], dtype=torch.float64)
    probs /= probs.sum()
    for value in (uniform, 0.0, 1 - 2**-53):
        column = int(sample(probs, torch.tensor([value], dtype=torch.float64)))
        assert probs[0, column] > 0


def test_draws_follow_the_distribution() -> None:
    probs = torch.tensor([[0.5, 0.2, 0.0, 0.3]], dtype=torch.float64).expand(20_000, 4)
    drawn = sample(probs, uniform_noise(torch.arange(20_000), 3))
    share = torch.bincount(drawn, minlength=4) / 20_000
    np.testing.assert_allclose(share.numpy(), [0.5, 0.2, 0.0, 0.3], atol=0.015)


def test_noise_is_a_function_of_seed_and_position_only() -> None:
    seeds = torch.tensor([0, 1, -5, 2**62, 7])
    batch = torch.stack([uniform_noise(seeds, t) for t in range(6)])
    alone = torch.stack([torch.cat([uniform_noise(seeds[i : i + 1], t) for i in range(5)]) for t in range(6)])
    assert torch.equal(batch, alone)
    assert batch.unique().numel() == batch.numel()
    assert ((batch >= 0) & (batch < 1)).all()


def test_noise_is_uniform_over_seeds_and_over_positions() -> None:
    over_seeds = uniform_noise(torch.arange(50_000), 0)
    over_positions = torch.cat([uniform_noise(torch.tensor([42]), t) for t in range(5_000)])
    for values in (over_seeds, over_positions):
        counts = torch.histc(values, bins=10, min=0, max=1) / values.numel()
        np.testing.assert_allclose(counts.numpy(), 0.1, atol=0.02)
    paired = torch.corrcoef(torch.stack([over_seeds[:-1], over_seeds[1:]]))[0, 1]
    assert abs(float(paired)) < 0.02


def test_legal_ids_cycle_through_the_codebooks_and_end_only_at_a_frame_edge() -> None:
    codec = CodecDescription("toy", "0" * 64, 8000, 25.0, ("a", "b", "c"), (5, 3, 4))
    space = TokenSpace.build("bytes", codec)
    legal = LegalCodes(space, torch.device("cpu"))
    end = space.special("<speech_end>")
    for position in range(9):
        book = space.codebooks[position % 3]
        codes = list(range(book.offset, book.offset + book.size))
        may_end = position > 0 and position % 3 == 0
        assert legal.at(position).tolist() == codes + [end] * may_end
    assert legal.unit_tokens == 3


def test_text_is_of_text_ids_and_ends_after_one_of_them() -> None:
    space = TokenSpace.build("bytes", CodecDescription("toy", "0" * 64, 8000, 25.0, ("a",), (5,)))
    legal = LegalText(space, torch.device("cpu"))
    assert legal.at(0).tolist() == list(range(256))
    assert legal.at(1).tolist() == legal.at(2).tolist() == [*range(256), space.special("</target_text>")]
    assert legal.unit_tokens == 1


def test_illegal_share_is_the_softmax_mass_outside_the_legal_ids() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 3
    columns = torch.arange(10, 30)
    mass, argmax = illegal_share(logits, logits[:, columns])
    softmax = logits.softmax(1)
    np.testing.assert_allclose(mass.numpy(), 1 - softmax[:, columns].sum(1).numpy(), atol=1e-5)
    top = logits.argmax(1)
    assert argmax.tolist() == [not 10 <= int(i) < 30 for i in top]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("repetition_penalty", 0.0),
        ("max_seconds", 0.0),
    ],
)
def test_impossible_settings_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(InputError, match=field):
        SamplingConfig(**{field: value})
