"""The chunked head is the full-logit cross-entropy, in loss and gradients."""

import pytest
import torch

from megatron_speech.ops.cross_entropy import linear_cross_entropy, reference_cross_entropy


def inputs(rows, dtype=torch.float32, vocab=96, width=24):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
    table = (0.3 * torch.randn(vocab, width, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(0, 80, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator)
    return hidden, table, labels, weights


@pytest.mark.parametrize("keep_bytes", [0, 1 << 30])
@pytest.mark.parametrize("rows", [1, 37])
def test_loss_and_gradients_are_the_full_softmax_s(rows, keep_bytes):
    hidden, table, labels, weights = inputs(rows)
    expected = reference_cross_entropy(hidden, table, labels, 80)
    wanted = torch.autograd.grad((expected * weights).sum(), (hidden, table))
    loss = linear_cross_entropy(hidden, table, labels, vocab_size=80, chunk_rows=8, keep_bytes=keep_bytes)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(torch.autograd.grad((loss * weights).sum(), (hidden, table)), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert not wanted[1][80:].any()


def test_bf16_rows_have_an_fp32_loss_near_the_fp32_one():
    hidden, table, labels, _ = inputs(37, torch.bfloat16)
    loss = linear_cross_entropy(hidden, table, labels, vocab_size=80)
    exact = reference_cross_entropy(hidden.float(), table.float(), labels, 80)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=2e-2)


def test_extreme_logits_stay_finite():
    hidden, table, labels, _ = inputs(4)
    with torch.no_grad():
        hidden.mul_(1e4)
    loss = linear_cross_entropy(hidden, table, labels, vocab_size=80)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(table.grad).all()


def test_no_rows_give_no_loss_and_zero_gradients():
    hidden, table, labels, _ = inputs(0)
    loss = linear_cross_entropy(hidden, table, labels, vocab_size=80)
    loss.sum().backward()
    assert loss.shape == (0,)
    assert not table.grad.any()


@pytest.mark.parametrize("label", [-100, 80])
def test_a_label_that_is_no_id_is_an_error(label):
    hidden, table, labels, _ = inputs(3)
    labels[1] = label
    with pytest.raises(ValueError, match=r"ids in 0…79"):
        linear_cross_entropy(hidden, table, labels, vocab_size=80)
