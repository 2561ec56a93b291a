"""The head's memory does not grow with the rows, and on a GPU it never makes the host wait."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_speech.benchmark.head import peak_bytes
from megatron_speech.ops import cross_entropy
from megatron_speech.ops.cross_entropy import linear_cross_entropy
from megatron_speech.recipe.loss import LossConfig
from megatron_speech.training.telemetry.metrics import LossMeter

IDS, WIDTH = 193_856, 8
CPU = torch.device("cpu")


def head_of(rows, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, WIDTH, generator=generator).to(dtype).requires_grad_()
    table = torch.randn(IDS, WIDTH, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, IDS, (rows,), generator=generator)
    return hidden, table, labels


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peak_memory_at_194_k_ids_does_not_depend_on_the_sequence_length(dtype):
    """Forward and backward, every allocation counted: only hidden states, losses and labels are longer."""

    def peak(rows):
        hidden, table, labels = head_of(rows, dtype)
        return peak_bytes(
            lambda: linear_cross_entropy(hidden, table, labels, vocab_size=IDS, label_smoothing=0.1).total.backward(),
            CPU,
        )

    chunk = cross_entropy._MIN_CHUNK_ROWS * IDS * 4
    short, long = peak(256), peak(1024)
    # A row of hidden states, and a handful of numbers and indices per row; its logits alone would be 775 kB.
    assert long - short <= (1024 - 256) * (4 * WIDTH + 200)
    assert long <= 2.6 * chunk


def test_the_peak_sees_what_is_inside_of_an_operation():
    logits = torch.zeros(100, 1000)
    assert peak_bytes(lambda: torch.logsumexp(logits, -1), CPU) >= 4 * 100 * 1000
    assert peak_bytes(lambda: logits.exp_(), CPU) == 0


class Asked(TorchDispatchMode):
    """Names of the operations that ran."""

    def __init__(self, names):
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.add(operation.overloadpacket.__name__)
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk_rows", [16, 1000])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_gpu_is_never_waited_for(dtype, chunk_rows, smoothing):
    """Every operation of forward, backward and the sums by group is queued without knowing a value.

    Meta tensors take the way of a GPU's through the code; they have no values, and who asks for one gets an error.
    """
    names = set()
    with Asked(names), torch.device("meta"):
        hidden = torch.empty(50, 24, dtype=dtype, requires_grad=True)
        table = torch.empty(96, 24, dtype=dtype, requires_grad=True)
        labels = torch.zeros(50, dtype=torch.int64)
        weights = torch.ones(50)
        found = linear_cross_entropy(
            hidden,
            table,
            labels,
            weights,
            vocab_size=90,
            label_smoothing=smoothing,
            z_loss=smoothing,
            chunk_rows=chunk_rows,
        )
        found.total.backward()
        meter = LossMeter([("tts", "en", "studio")], "meta", LossConfig(normalize="modality"))
        meter.add_losses(found.losses, found.cross_entropy, weights, labels.int())
    assert hidden.grad.dtype == table.grad.dtype == dtype and found.losses.dtype == torch.float32
    assert hidden.grad.shape == (50, 24) and table.grad.shape == (96, 24) and found.losses.shape == (50,)
    assert {"mm", "index_add_"} <= names
    # bf16 products are summed up in fp32 without a tensor of their own.
    assert ("addmm" in names) == (chunk_rows == 16 and dtype == torch.bfloat16)
    assert not names & {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2"}
    with pytest.raises(RuntimeError):
        found.total.item()
