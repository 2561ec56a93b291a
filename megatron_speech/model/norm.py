"""RMSNorm and SwiGLU: what stands between the matrix products.

Both are autograd functions that pass over memory as seldom as they can (at the size of a laptop model these passes, not
arithmetic, are what the layers around the matrix products cost) and keep their input only. On CUDA the norm is torch's
fused kernel; on a CPU both are compiled ones (`ops.cpu_layers`) where they were built.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_speech.ops import cpu_layers


class _RMSNormCPU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, weight_H: Tensor, epsilon: float) -> Tensor:
        x = x_TH.float()
        # ‖x‖ in one pass; rsqrt(mean(x²) + ε) from it.
        scale_T1 = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x_TH, weight_H, scale_T1)
        return (x * scale_T1).mul_(weight_H).to(x_TH.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x_TH, weight_H, scale_T1 = ctx.saved_tensors
        gradient, x = gradients[0].float(), x_TH.float()
        normed = x * scale_T1
        weighted = gradient * normed
        # dx = s·(w·g − n·mean(w·g·n)), n = s·x
        mean_T1 = (weighted @ weight_H.float()).div_(x.shape[-1]).unsqueeze(-1)
        d_weight = weighted.sum(0)
        d_x = torch.mul(gradient, weight_H.float(), out=weighted).sub_(normed.mul_(mean_T1)).mul_(scale_T1)
        return d_x.to(x_TH.dtype), d_weight.to(weight_H.dtype), None


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm (arXiv:1910.07467) over the last dimension, in fp32 inside.

    Built by megatron-core's specs. Under sequence parallelism its weight is marked `sequence_parallel`, so that
    gradients of the ranks, each of which saw a part of the sequence, are summed.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__()
        self.epsilon = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] → the same shape and dtype."""
        if x.device.type == "cpu":
            rows = x.reshape(-1, x.shape[-1])
            norm = cpu_layers.rms_norm if cpu_layers.usable(x, self.weight) else _RMSNormCPU.apply
            normed: Tensor = norm(rows, self.weight, self.epsilon)
            return normed.view(x.shape)
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.epsilon)


class _TorchSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, linear = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(linear)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, linear = x.chunk(2, dim=-1)
        d_x = torch.empty_like(x)
        d_gate, d_linear = d_x.chunk(2, dim=-1)
        torch.mul(F.silu(gate), gradients[0], out=d_linear)
        torch.ops.aten.silu_backward.grad_input(gradients[0] * linear, gate, grad_input=d_gate)
        return d_x


class SwiGLU(torch.nn.Module):
    """silu(gate)·linear (arXiv:2002.05202) of `[..., 2·ffn]` = gate | linear → `[..., ffn]`."""

    def __init__(self, config: Any = None) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """[..., 2·ffn] → [..., ffn]."""
        if cpu_layers.usable(x):
            return cpu_layers.swiglu(x)
        result: Tensor = _TorchSwiGLU.apply(x)
        return result

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Nothing to save; megatron-core's MLP asks every child for its shards."""
        return {}
