"""The head on a GPU: the losses and gradients of the CPU, no wait for the device, memory that rows do not move."""

import pytest
import torch

from megatron_speech.ops.cross_entropy import linear_cross_entropy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

ROWS, WIDTH, IDS, REAL = 1000, 128, 4096, 4000


def run(device, dtype, chunk_rows, smoothing):
    """Losses and both gradients, on the CPU in fp32; the same values go in whatever the dtype."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(ROWS, WIDTH, generator=generator).bfloat16().to(device, dtype).requires_grad_()
    table = (torch.randn(IDS, WIDTH, generator=generator) / 8).bfloat16().to(device, dtype).requires_grad_()
    labels = torch.randint(0, REAL, (ROWS,), generator=generator).to(device)
    weights = (torch.rand(ROWS, generator=generator) / ROWS).to(device)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error" if device == "cuda" else mode)
    try:
        found = linear_cross_entropy(
            hidden,
            table,
            labels,
            weights,
            vocab_size=REAL,
            label_smoothing=smoothing,
            z_loss=smoothing / 100,
            chunk_rows=chunk_rows,
        )
        found.total.backward()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return [tensor.detach().float().cpu() for tensor in (found.losses, hidden.grad, table.grad)]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk_rows", [256, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
def test_a_gpu_agrees_with_the_cpu_and_never_makes_it_wait(dtype, tolerance, chunk_rows, smoothing):
    """fp32 logits are made of bf16 products without a rounding in between: only gradients are rounded, to 1/256."""
    for ours, theirs in zip(
        run("cuda", dtype, chunk_rows, smoothing), run("cpu", torch.float32, None, smoothing), strict=True
    ):
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_peak_memory_at_194_k_ids_does_not_depend_on_the_rows():
    def peak(rows):
        hidden = torch.randn(rows, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        table = torch.randn(193_856, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        labels = torch.zeros(rows, dtype=torch.int64, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_cross_entropy(hidden, table, labels, vocab_size=193_856).total.backward()
        return torch.cuda.max_memory_allocated() - before

    peak(4096)  # the library's own workspace is made once
    assert peak(16_384) - peak(4096) <= (16_384 - 4096) * (2 * 64 + 200)
