"""AdamW's state in a checkpoint: ranges of each parameter, the same whatever layout and kind of optimizer wrote it.

    optimizer.state.exp_avg.KEY  optimizer.state.exp_avg_sq.KEY  optimizer.state.fp32_param.KEY (masters of bf16)

for the KEY of each trained parameter, and one count of steps. Nothing of the parameter groups is saved: they follow
from the recipe, and a pipeline stage has those of its own layers only. So a plain optimizer continues what a
distributed one saved, and the other way round.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_speech.training.optim.masters import Master
from megatron_speech.training.optim.ranges import Parameters, Range

_PREFIX = "optimizer.state"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_MASTER = "fp32_param"


@torch.no_grad()
def state_ranges(
    part: MegatronOptimizer, owned: list[Master], parameters: Parameters, written: list[bool]
) -> list[Range]:
    """What this rank's optimizer holds, to be saved or to be filled by a load.

    Args:
        part: megatron-core's optimizer.
        owned: this rank's masters.
        parameters: how those of the chunks are sharded.
        written: for each master whether this rank writes it, see :func:`writers`.
    """
    _begin(part, owned)
    return [
        Range(f"{_PREFIX}.{name}", parameters[id(master.parameter)], master.start, values, own)
        for master, own in zip(owned, written, strict=True)
        for name, values in _of_master(part, master).items()
    ]


def writers(part: MegatronOptimizer, owned: list[Master]) -> list[bool]:
    """For each master whether this rank writes it: its own range of a distributed optimizer, else an even share.

    Where the data-parallel ranks hold the same, each takes some parameters, the largest first, and all of them know
    without a word who takes which.
    """
    if isinstance(part, DistributedOptimizer):
        return [True] * len(owned)
    loads = [0] * parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    own = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    written = [False] * len(owned)
    for number in sorted(range(len(owned)), key=lambda number: -owned[number].values.numel()):
        taker = loads.index(min(loads))
        loads[taker] += owned[number].values.numel()
        written[number] = taker == own
    return written


def step_count(part: MegatronOptimizer, owned: list[Master]) -> int:
    """Updates taken, on all ranks; those of which everything is frozen count none. A collective."""
    taken = 0.0
    if owned and isinstance(part.optimizer, torch.optim.AdamW):
        taken = float(part.optimizer.state[owned[0].values].get("step", 0.0))  # none before the first update
    elif owned:
        taken = max(float(group.get("step", 0)) for group in part.optimizer.param_groups)
    count = torch.tensor([taken], dtype=torch.float64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(count, op=torch.distributed.ReduceOp.MAX)
    return int(count.item())


@torch.no_grad()
def set_step_count(part: MegatronOptimizer, owned: list[Master], count: int) -> None:
    """Go on from `count` updates."""
    if isinstance(part.optimizer, torch.optim.AdamW):
        for master in owned:
            part.optimizer.state[master.values]["step"].fill_(float(count))
    elif owned:
        for group in part.optimizer.param_groups:  # Transformer Engine's FusedAdam counts here
            group["step"] = count


def _begin(part: MegatronOptimizer, owned: list[Master]) -> None:
    """Give what has not been updated yet the moments that its first update would begin with."""
    for master in owned:
        entry = part.optimizer.state[master.values]
        if isinstance(part.optimizer, torch.optim.AdamW):
            entry.setdefault("step", torch.zeros((), dtype=torch.float32, device=master.values.device))
        for name in _MOMENTS:
            if name not in entry:
                entry[name] = torch.zeros_like(master.values, dtype=torch.float32)


def _of_master(part: MegatronOptimizer, master: Master) -> dict[str, Tensor]:
    entry = part.optimizer.state[master.values]
    values = {name: entry[name] for name in _MOMENTS}
    return {**values, _MASTER: master.values} if part.config.bf16 else values
