"""The fp32 values that this rank's optimizer updates, and which parameter they belong to.

fp32: the parameters themselves. bf16: copies in fp32. Distributed optimizer: this rank's range of either.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor


@dataclass(frozen=True)
class Master:
    """What the optimizer holds of one parameter.

    Attributes:
        parameter: of the model, fp32 or bf16, this tensor-parallel rank's slice.
        values: fp32; `parameter`'s shape, or one-dimensional where it is a range of it.
        start: of that range in the flattened parameter.
    """

    parameter: Tensor
    values: Tensor
    start: int


def masters(part: MegatronOptimizer, chunks: list[DistributedDataParallel]) -> list[Master]:
    """The masters of `part`, in the order of the parameters of `chunks`; parameters that it does not own are left out.

    Args:
        part: one of megatron-core's optimizers (not a chain of them).
        chunks: the model chunks that it was made for.
    """
    trained = [p for chunk in chunks for p in chunk.parameters() if p.requires_grad]
    if isinstance(part, DistributedOptimizer):
        if part.is_stub_optimizer:
            return []
        owned = []
        for p in trained:
            if p in part.model_param_group_index_map:
                group, order = part.model_param_group_index_map[p]
                values = part.optimizer.param_groups[group]["params"][order]
                owned.append(Master(p, values, part._get_model_param_range_map(p)["param"].start))
        return owned
    own = {id(values) for values in part.get_parameters()}
    pairs = [(p, getattr(p, "main_param", p)) for p in trained]
    return [Master(p, values, 0) for p, values in pairs if id(values) in own]
