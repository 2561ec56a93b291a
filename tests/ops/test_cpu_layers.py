"""The compiled layers against their formulas in float64, and a model with them against one without."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_speech.ops import cpu_layers

pytestmark = pytest.mark.skipif(not cpu_layers.built(), reason="the compiled layers were not built")

# Largest error of a result of size 1: fp32 sums of a few hundred terms; bf16 rounds the result to 8 bits.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8}
DTYPES = list(TOLERANCE)


def close(actual, expected):
    """Within the rounding of `actual`'s dtype, relative to the largest expected value."""
    scale = max(1.0, expected.detach().abs().max().item())
    difference = (actual.detach().double() - expected.detach()).abs().max().item()
    assert difference <= 2 * TOLERANCE[actual.dtype] * scale, (difference, scale)


def attention_formula(query, key, value, cos, sin, segments, scale):
    def turn(x):
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    shared = query.shape[1] // key.shape[1]
    query, key, value = turn(query), turn(key).repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    out = torch.zeros_like(query)
    for first, length in segments.tolist():
        part = slice(first, first + length)
        scores = torch.einsum("qhd,khd->hqk", query[part], key[part]) * scale
        mask = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(mask, -torch.inf).softmax(-1)
        out = out.index_add(0, torch.arange(first, first + length), torch.einsum("hqk,khd->qhd", weights, value[part]))
    return out


def attention_case(lengths, groups, shared, width, dtype, gap=3, seed=0):
    """Inputs as megatron-core gives them: views of one projection. Between documents lie `gap` tokens of padding."""
    generator = torch.Generator().manual_seed(seed)
    firsts = np.cumsum([0, *[length + gap for length in lengths[:-1]]])
    tokens = int(firsts[-1]) + lengths[-1] + gap
    mixed = torch.randn(tokens, groups, shared + 2, width, generator=generator).to(dtype)
    angles = 6.0 * torch.rand(tokens, 1, width // 2, generator=generator)
    segments = torch.tensor(np.stack((firsts, lengths), 1))
    gradient = torch.randn(tokens, groups * shared, width, generator=generator).to(dtype)
    return mixed, angles, segments, gradient


def attend(function, mixed, angles, segments, gradient):
    mixed = mixed.clone().requires_grad_()
    query, key, value = mixed[:, :, :-2].flatten(1, 2), mixed[:, :, -2], mixed[:, :, -1]
    out = function(query, key, value, angles.cos(), angles.sin(), segments, query.shape[-1] ** -0.5)
    (d_mixed,) = torch.autograd.grad(out, mixed, gradient)
    return out.detach(), d_mixed


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    groups=st.integers(1, 3),
    shared=st.integers(1, 3),
    width=st.sampled_from([2, 16, 18, 32, 40, 64]),
)
def test_attention_is_its_formula(dtype, lengths, groups, shared, width):
    case = attention_case(lengths, groups, shared, width, dtype)
    exact = [tensor.double() if tensor.is_floating_point() else tensor for tensor in case]
    for actual, expected in zip(
        attend(cpu_layers.packed_attention, *case), attend(attention_formula, *exact), strict=True
    ):
        close(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_a_billion_have_finite_gradients(dtype):
    """Their rounding is larger than what exp can take: the weights of both passes are made from the same scores."""
    mixed, angles, segments, gradient = attention_case([23], 2, 2, 24, dtype)
    mixed[:, :, :-1] *= 3e4  # queries and keys, not values
    exact = mixed.double(), angles.double(), segments, gradient.double()
    out, d_mixed = attend(cpu_layers.packed_attention, mixed, angles, segments, gradient)
    expected, d_expected = attend(attention_formula, *exact)
    assert torch.isfinite(out).all() and torch.isfinite(d_mixed).all()
    close(out, expected)
    close(d_mixed[:, :, -1], d_expected[:, :, -1])  # every query has one key: those of the values are exact


def test_attention_of_a_long_document():
    case = attention_case([1111], 2, 2, 64, torch.float32)
    exact = [tensor.double() if tensor.is_floating_point() else tensor for tensor in case]
    for actual, expected in zip(
        attend(cpu_layers.packed_attention, *case), attend(attention_formula, *exact), strict=True
    ):
        close(actual, expected)


def test_tokens_of_no_document_are_zero_and_get_no_gradient():
    case = attention_case([9, 20], 2, 1, 16, torch.bfloat16, gap=5)
    out, d_mixed = attend(cpu_layers.packed_attention, *case)
    nobody = torch.ones(len(out), dtype=torch.bool)
    for first, length in case[2].tolist():
        nobody[first : first + length] = False
    assert nobody.sum() == 10 and not out[nobody].any() and not d_mixed[nobody].any()


def test_threads_change_no_bit():
    case = attention_case([40, 9, 77, 30, 64], 3, 2, 32, torch.bfloat16)
    x = torch.randn(700, 96)
    weight, gradient = torch.randn(96), torch.randn(700, 96)

    def results():
        leaf, scale = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out = cpu_layers.rms_norm(leaf, scale, 1e-5)
        return [*attend(cpu_layers.packed_attention, *case), out, *torch.autograd.grad(out, (leaf, scale), gradient)]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results()
        torch.set_num_threads(3)
        three = results()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=15, deadline=None)
@given(rows=st.integers(0, 150), width=st.integers(1, 100), size=st.sampled_from([1e-3, 1.0, 1e3]))
def test_norm_is_its_formula(dtype, rows, width, size):
    generator = torch.Generator().manual_seed(rows * 101 + width)
    x, gradient = ((size * torch.randn(rows, width, generator=generator)).to(dtype) for _ in range(2))
    weight = torch.randn(width, generator=generator).to(dtype)

    def run(function, *inputs):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs[:2]]
        out = function(*leaves)
        return out, *torch.autograd.grad(out, leaves, inputs[2])

    actual = run(lambda x, w: cpu_layers.rms_norm(x, w, 1e-5), x, weight, gradient)
    exact = run(lambda x, w: F.rms_norm(x, (width,), w, 1e-5), x.double(), weight.double(), gradient.double())
    for a, b in zip(actual, exact, strict=True):
        if b.numel():
            close(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_is_its_formula(dtype):
    generator = torch.Generator().manual_seed(0)
    x = (8 * torch.randn(131, 2 * 70, generator=generator)).to(dtype)
    x[0, :7] = torch.tensor([0.0, -0.0, 1e-30, 87.0, -87.0, 1e4, -1e4])
    gradient = torch.randn(131, 70, generator=generator).to(dtype)

    def run(function, x, gradient):
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        return out, torch.autograd.grad(out, leaf, gradient)[0]

    def formula(x):
        gate, linear = x.chunk(2, -1)
        return F.silu(gate) * linear

    actual = run(cpu_layers.swiglu, x, gradient)
    for a, b in zip(actual, run(formula, x.double(), gradient.double()), strict=True):
        close(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_not_hidden(dtype):
    bad = torch.tensor([[float("nan")] * 16 + [1.0] * 16, [float("inf")] * 16 + [1.0] * 16], dtype=dtype)
    out = cpu_layers.swiglu(bad)
    assert out[0].isnan().all() and out[1].isposinf().all()
    assert cpu_layers.rms_norm(bad, torch.ones(32, dtype=dtype), 1e-5)[0].isnan().all()
    mixed, angles, segments, gradient = attention_case([20], 1, 1, 16, dtype)
    mixed[7, 0, 0, 0] = float("nan")  # a query
    out, _ = attend(cpu_layers.packed_attention, mixed, angles, segments, gradient)
    assert out[7].isnan().all() and not out[:7].isnan().any() and not out[8:].isnan().any()


def test_other_dtypes_are_not_taken():
    assert not cpu_layers.usable(torch.zeros(2, dtype=torch.float64))
    assert not cpu_layers.usable(torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16))
