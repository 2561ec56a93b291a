"""A head split over ranks is the whole head: loss, smoothing, z-loss, objectives and gradients, padding included."""

import head_worker
import pytest
import torch


@pytest.mark.parametrize(
    ("ranks", "real", "padded"),
    [
        pytest.param(2, 250, 256, id="two ranks, the last with padding"),
        pytest.param(3, 128, 384, id="three ranks, two of them with nothing but padding"),
    ],
)
def test_ranks_have_the_losses_and_gradients_of_one(run_ranks, tmp_path, ranks, real, padded):
    run_ranks(head_worker.head, ranks, str(tmp_path), real, padded)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    for (dtype, kind), first in parts[0].items():
        everyone = [part[dtype, kind] for part in parts]
        for name in ("total", "losses", "cross_entropy"):
            assert all(torch.equal(first[name], other[name]) for other in everyone), "ranks differ"
        bf16 = dtype == "torch.bfloat16"
        hidden, table, labels, weights = head_worker.inputs(torch.bfloat16 if bf16 else torch.float32, real, padded)
        hidden, table = hidden.float().requires_grad_(), table.float().requires_grad_()
        log_z = (hidden @ table[:real].t()).logsumexp(-1)
        log_p = hidden @ table[:real].t() - log_z[:, None]
        smoothing = 0.1 if kind == "smoothed" else 0.0
        plain = -log_p.gather(1, labels[:, None]).squeeze(1)
        losses = (1 - smoothing) * plain - smoothing * log_p.mean(-1) + 1e-3 * (smoothing > 0) * log_z**2
        if kind == "objective":
            losses = torch.arange(len(labels)) * plain.square()
        total = (losses * weights).sum()
        total.backward()
        expected = {
            "total": total,
            "losses": losses,
            "cross_entropy": plain,
            "hidden": hidden.grad,
            "table": table.grad,
        }
        found = {**first, "table": torch.cat([part["table"] for part in everyone])}
        # bf16: logits of up to 8 and the elements of the gradients are rounded to 1/256 of themselves.
        tolerance = 1e-2 if bf16 else 1e-6
        for name, other in expected.items():
            difference = (found[name].float() - other).abs().max() / other.abs().max()
            assert difference <= tolerance, (dtype, kind, name, difference)
        assert not found["table"][real:].any()
