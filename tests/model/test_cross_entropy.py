"""The chunked head is the full-logit cross-entropy: in loss, gradients and label smoothing, on one rank and on two."""

import pytest
import torch

from megatron_speech.ops.cross_entropy import linear_cross_entropy

PLAIN = {"label_smoothing": 0.0, "z_loss": 0.0}
BOTH = {"label_smoothing": 0.1, "z_loss": 1e-3}


def full_logits(hidden, table, labels, vocab_size, label_smoothing=0.0, z_loss=0.0):
    """Loss by row, every logit in memory: softmax, smoothed target and z-loss as they are written in papers."""
    log_z = (hidden @ table[:vocab_size].t()).float().logsumexp(-1)
    log_p = (hidden @ table[:vocab_size].t()).float() - log_z[:, None]
    target = torch.nn.functional.one_hot(labels, vocab_size) * (1 - label_smoothing) + label_smoothing / vocab_size
    return -(target * log_p).sum(-1) + z_loss * log_z**2


def inputs(rows, dtype=torch.float32, vocab=96, width=24, real=80):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
    table = (0.3 * torch.randn(vocab, width, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(0, real, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator)
    return hidden, table, labels, weights


def apart(ours, theirs):
    """Largest difference, relative to the largest element."""
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)).item()


@pytest.mark.parametrize("options", [PLAIN, {"label_smoothing": 0.1}, {"z_loss": 1e-3}, BOTH], ids=str)
@pytest.mark.parametrize("masked", [0.0, 0.5, 0.95, 1.0])
def test_loss_and_gradients_are_the_full_softmax_s(masked, options):
    """The rows that the model takes out by their weight, against the weighted sum over all of them."""
    hidden, table, labels, weights = inputs(400, vocab=1000, width=64, real=970)
    weights[: int(400 * masked)] = 0
    rows = weights.nonzero().squeeze(1)
    expected = full_logits(hidden, table, labels, 970, **options)
    wanted = torch.autograd.grad((expected * weights).sum(), (hidden, table))
    ours = linear_cross_entropy(
        hidden[rows], table, labels[rows], weights[rows], vocab_size=970, chunk_rows=64, **options
    )
    found = torch.autograd.grad(ours.total, (hidden, table))
    if masked == 1.0:
        assert ours.total == 0.0 and not found[0].any() and not found[1].any()
        return
    assert apart(ours.losses, expected[rows]) <= 1e-6
    assert apart(ours.total, (expected * weights).sum()) <= 1e-6
    assert apart(ours.cross_entropy, full_logits(hidden, table, labels, 970)[rows]) <= 1e-6
    for mine, other in zip(found, wanted, strict=True):
        assert apart(mine, other) <= 1e-6
    assert not found[1][970:].any()


def test_smoothing_is_pytorch_s():
    hidden, table, labels, _ = inputs(37)
    expected = torch.nn.functional.cross_entropy(hidden @ table[:80].t(), labels, label_smoothing=0.2, reduction="none")
    ours = linear_cross_entropy(hidden, table, labels, vocab_size=80, label_smoothing=0.2)
    torch.testing.assert_close(ours.losses, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("chunk_rows", [1, 8, 37, 64])
def test_the_chunk_changes_nothing(chunk_rows):
    hidden, table, labels, weights = inputs(37)
    ours = linear_cross_entropy(hidden, table, labels, weights, vocab_size=80, chunk_rows=chunk_rows, **BOTH)
    (3.0 * ours.total).backward()
    expected = (full_logits(hidden, table, labels, 80, **BOTH) * weights).sum()
    for mine, other in zip(
        (hidden.grad, table.grad), torch.autograd.grad(3.0 * expected, (hidden, table)), strict=True
    ):
        assert apart(mine, other) <= 1e-6


@pytest.mark.parametrize("chunk_rows", [64, 600, 2000])
def test_bf16_differs_from_fp32_by_the_rounding_of_bf16(chunk_rows):
    """bf16 rounds to 1/256 of the value: on a CPU the logits, everywhere the elements of the gradients."""
    hidden, table, labels, weights = inputs(1200, torch.bfloat16, vocab=1000, width=64, real=970)
    ours = linear_cross_entropy(hidden, table, labels, weights, vocab_size=970, chunk_rows=chunk_rows, **BOTH)
    found = torch.autograd.grad(ours.total, (hidden, table))
    exact = (hidden.detach().float().requires_grad_(), table.detach().float().requires_grad_())
    expected = full_logits(*exact, labels, 970, **BOTH)
    assert ours.total.dtype == ours.losses.dtype == torch.float32
    assert [gradient.dtype for gradient in found] == [torch.bfloat16] * 2
    largest = (exact[0] @ exact[1].t()).abs().max()
    assert (ours.losses - expected).abs().max() <= 2 * largest / 256
    for mine, other in zip(found, torch.autograd.grad((expected * weights).sum(), exact), strict=True):
        assert apart(mine.float(), other) <= 1e-2


@pytest.mark.parametrize(("spread", "chunk_rows"), [(1.0, 1), (10.0, 1), (10.0, 600)])
def test_the_error_of_bf16_is_bounded_by_the_largest_logit_where_the_target_is_smooth(spread, chunk_rows):
    """A CPU rounds a logit to 1/512 of its value: what is left of p - ε/K is off by as much."""
    hidden, table, labels, weights = inputs(6 if chunk_rows == 1 else 600, torch.bfloat16)
    with torch.no_grad():
        hidden.mul_(spread)
    ours = linear_cross_entropy(
        hidden, table, labels, weights, vocab_size=80, chunk_rows=chunk_rows, label_smoothing=0.99
    )
    found = torch.autograd.grad(ours.total, (hidden, table))
    exact = (hidden.detach().float().requires_grad_(), table.detach().float().requires_grad_())
    expected = torch.autograd.grad((full_logits(*exact, labels, 80, 0.99) * weights).sum(), exact)
    largest = (exact[0] @ exact[1][:80].t()).abs().max().item()
    for mine, other in zip(found, expected, strict=True):
        assert apart(mine.float(), other) <= 1e-2 + largest / 256


def test_extreme_logits_stay_finite():
    hidden, table, labels, _ = inputs(4)
    with torch.no_grad():
        hidden.mul_(1e4)
    loss = linear_cross_entropy(hidden, table, labels, vocab_size=80)
    loss.total.backward()
    assert torch.isfinite(loss.losses).all()
    assert torch.isfinite(table.grad).all()


def test_what_needs_no_gradient_gets_none():
    hidden, table, labels, _ = inputs(9)
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, table, labels, vocab_size=80).total.requires_grad
    frozen = linear_cross_entropy(hidden, table.detach(), labels, vocab_size=80)
    frozen.total.backward()
    assert hidden.grad is not None and table.grad is None
    assert not frozen.losses.requires_grad and not frozen.cross_entropy.requires_grad


def test_a_second_backward_pass_is_refused():
    hidden, table, labels, _ = inputs(9)
    total = linear_cross_entropy(hidden, table, labels, vocab_size=80).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be taken once"):
        total.backward()


@pytest.mark.parametrize("label", [-100, 80])
def test_a_label_that_is_no_id_is_an_error(label):
    hidden, table, labels, _ = inputs(3)
    labels[1] = label
    with pytest.raises(ValueError, match=r"ids in 0…79"):
        linear_cross_entropy(hidden, table, labels, vocab_size=80)


# ---- objectives


def likelihood(log_p, rows):
    return -log_p, torch.full_like(log_p, -1.0)


def clipped_ratio(old_log_p, advantages, epsilon=0.2):
    """GRPO's −min(ratio · advantage, clip(ratio) · advantage) of a chunk, and its derivative, by hand."""

    def objective(log_p, rows):
        ratio, advantage = (log_p - old_log_p[rows]).exp(), advantages[rows]
        plain, clipped = ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage
        return -torch.minimum(plain, clipped), torch.where(plain <= clipped, -plain, 0.0)

    return objective


def naive_clipped_ratio(log_p, old_log_p, advantages, epsilon=0.2):
    ratio = (log_p - old_log_p).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)


@pytest.mark.parametrize("chunk_rows", [8, 64])
def test_the_likelihood_as_an_objective_is_the_cross_entropy(chunk_rows):
    hidden, table, labels, weights = inputs(37)
    found = []
    for objective in (None, likelihood):
        loss = linear_cross_entropy(
            hidden, table, labels, weights, vocab_size=80, chunk_rows=chunk_rows, objective=objective
        )
        found.append((loss.total, *loss, *torch.autograd.grad(loss.total, (hidden, table))))
    for plain, ours in zip(*found, strict=True):
        assert apart(ours, plain) <= 1e-6


@pytest.mark.parametrize("signs", ["positive", "mixed", "sum to zero", "negative"])
@pytest.mark.parametrize("kind", ["cross-entropy", "clipped ratio"])
def test_losses_and_gradients_are_those_of_autograd_in_double_precision_for_weights_of_any_sign(kind, signs):
    hidden, table, labels, weights = inputs(200, vocab=1000, width=64, real=970)
    generator = torch.Generator().manual_seed(2)
    if signs == "mixed":
        weights[::3] *= -1
    elif signs == "sum to zero":
        weights[1::2] = -weights[::2]
        assert weights.sum().abs() < 1e-5
    elif signs == "negative":
        weights.neg_()
    exact = hidden.detach().double().requires_grad_(), table.detach().double().requires_grad_()
    log_p = (exact[0] @ exact[1][:970].t()).log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
    # Some rows lie beyond either end of the clip, with advantages of both signs.
    old = log_p.detach() + 0.3 * torch.randn(200, generator=generator).double()
    advantages = torch.randn(200, generator=generator).double()
    ratio = (log_p.detach() - old).exp()
    assert (ratio > 1.2).any() and (ratio < 0.8).any() and ((ratio < 1.2) & (ratio > 0.8)).any()
    expected = -log_p if kind == "cross-entropy" else naive_clipped_ratio(log_p, old, advantages)
    objective = None if kind == "cross-entropy" else clipped_ratio(old.float(), advantages.float())
    ours = linear_cross_entropy(hidden, table, labels, weights, vocab_size=970, chunk_rows=48, objective=objective)
    assert apart(ours.losses, expected) <= 1e-5 and apart(ours.cross_entropy, -log_p) <= 1e-6
    total = (expected * weights).sum()
    assert (ours.total - total).abs() <= 1e-5 * (expected * weights).abs().sum()
    wanted = torch.autograd.grad(total, exact)
    for mine, other in zip(torch.autograd.grad(ours.total, (hidden, table)), wanted, strict=True):
        assert apart(mine, other) <= 1e-5


def test_an_objective_sees_every_row_once_in_order_and_scores_without_gradients():
    hidden, table, labels, weights = inputs(37)
    seen = []

    def objective(log_p, rows):
        assert not torch.is_grad_enabled() and log_p.shape == (rows.stop - rows.start,)
        seen.extend(range(rows.start, rows.stop))
        return log_p.square(), 2 * log_p

    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            loss = linear_cross_entropy(
                hidden, table, labels, weights, vocab_size=80, chunk_rows=8, objective=objective
            )
        assert loss.total.requires_grad == grad
        torch.testing.assert_close(loss.losses, loss.cross_entropy.square())
        torch.testing.assert_close(loss.total.detach(), (loss.losses * weights).sum())
    assert seen == 2 * list(range(37))


@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {"z_loss": 1e-3}])
def test_an_objective_beside_smoothing_or_z_loss_is_refused(options):
    hidden, table, labels, _ = inputs(3)
    with pytest.raises(ValueError, match="set both to 0 or leave the objective out"):
        linear_cross_entropy(hidden, table, labels, vocab_size=80, objective=likelihood, **options)


def test_an_objective_that_gives_no_number_a_row_is_refused():
    hidden, table, labels, _ = inputs(3)
    with pytest.raises(ValueError, match=r"gave shapes \[\(\), \(3,\)\] for rows 0 to 3"):
        linear_cross_entropy(
            hidden, table, labels, vocab_size=80, objective=lambda log_p, rows: (-log_p.sum(), -torch.ones(3))
        )
