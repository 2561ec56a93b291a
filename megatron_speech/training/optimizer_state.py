"""AdamW's state in a checkpoint: by parameter, whole, the same whatever layout and kind of optimizer wrote it.

    optimizer.state.exp_avg.KEY  optimizer.state.exp_avg_sq.KEY  optimizer.state.fp32_param.KEY (masters of bf16)

for the KEY of each trained parameter, and one count of steps. Nothing of the parameter groups is saved: they follow
from the recipe, and a pipeline stage has those of its own layers only. So a plain optimizer continues what a
distributed one saved, and the other way round.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_speech.training.masters import Master

_PREFIX = "optimizer.state"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_MASTER = "fp32_param"


def sharded_places(trained: list[Tensor], model_state: ShardedStateDict, *, masters: bool) -> dict[str, Any]:
    """Places that a load fills: for every trained parameter of this rank whole tensors, in fp32 on the CPU.

    Args:
        trained: the trained parameters of this rank's model chunks.
        model_state: sharded state of the chunks.
        masters: whether the weights are bf16 and have masters in fp32.
    """
    of_parameter = _by_parameter(model_state)
    return {
        "values": {
            number: {
                name: make_sharded_optimizer_tensor(
                    of_parameter[id(parameter)], torch.empty(parameter.shape, dtype=torch.float32), f"{_PREFIX}.{name}"
                )
                for name in (*_MOMENTS, *([_MASTER] if masters else []))
            }
            for number, parameter in enumerate(trained)
        }
    }


@torch.no_grad()
def sharded_values(
    part: MegatronOptimizer, owned: list[Master], model_state: ShardedStateDict, metadata: dict[str, Any]
) -> dict[str, Any]:
    """The state to be saved. A collective.

    Args:
        part: megatron-core's optimizer.
        owned: this rank's masters.
        model_state: sharded state of the chunks.
        metadata: megatron-core's, how a distributed optimizer is to be gathered.
    """
    _begin(part, owned)
    state: dict[str, Any] = {"step": _steps(part, owned)}
    if isinstance(part, DistributedOptimizer):
        state["values"] = {}
        if not part.is_stub_optimizer:
            gathered = part.sharded_param_state_fully_reshardable(model_state, metadata=metadata) or {}
            state["values"] = {number: _renamed(tensors, part.config.bf16) for number, tensors in gathered.items()}
        return state
    of_parameter = _by_parameter(model_state)
    state["values"] = {
        number: {
            name: make_sharded_optimizer_tensor(of_parameter[id(master.parameter)], values, f"{_PREFIX}.{name}")
            for name, values in _of_master(part, master).items()
        }
        for number, master in enumerate(owned)
    }
    return state


@torch.no_grad()
def load_values(part: MegatronOptimizer, owned: list[Master], trained: list[Tensor], state: dict[str, Any]) -> None:
    """Take over what a load filled into :func:`sharded_places`."""
    numbers = {id(parameter): number for number, parameter in enumerate(trained)}
    for master in owned:
        values = master.values
        moments = {}
        for name, whole in state["values"][numbers[id(master.parameter)]].items():
            own = whole.reshape(-1)[master.start : master.start + values.numel()].view(values.shape)
            if name == _MASTER:
                values.copy_(own)
            else:
                moments[name] = own.to(values.device, copy=True)
        if isinstance(part.optimizer, torch.optim.AdamW):
            moments["step"] = torch.tensor(float(state["step"]), dtype=torch.float32, device=values.device)
        part.optimizer.state[values] = moments
    if owned and not isinstance(part.optimizer, torch.optim.AdamW):
        for group in part.optimizer.param_groups:  # Transformer Engine's FusedAdam counts here
            group["step"] = int(state["step"])


def _begin(part: MegatronOptimizer, owned: list[Master]) -> None:
    """Give what has not been updated yet the moments that its first update would begin with."""
    for master in owned:
        entry = part.optimizer.state[master.values]
        if isinstance(part.optimizer, torch.optim.AdamW):
            entry.setdefault("step", torch.zeros((), dtype=torch.float32, device=master.values.device))
        for name in _MOMENTS:
            if name not in entry:
                entry[name] = torch.zeros_like(master.values, dtype=torch.float32)


def _steps(part: MegatronOptimizer, owned: list[Master]) -> int:
    """Updates taken, on all ranks; those of which everything is frozen count none."""
    taken = 0.0
    if owned and isinstance(part.optimizer, torch.optim.AdamW):
        taken = float(part.optimizer.state[owned[0].values]["step"])
    elif owned:
        taken = max(float(group.get("step", 0)) for group in part.optimizer.param_groups)
    count = torch.tensor([taken], dtype=torch.float64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(count, op=torch.distributed.ReduceOp.MAX)
    return int(count.item())


def _of_master(part: MegatronOptimizer, master: Master) -> dict[str, Tensor]:
    entry = part.optimizer.state[master.values]
    values = {name: entry[name] for name in _MOMENTS}
    return values if master.values is master.parameter else {**values, _MASTER: master.values}


def _renamed(tensors: dict[str, Any], masters: bool) -> dict[str, Any]:
    """megatron-core's gathered state of a parameter under our names; without masters `param` is the weight itself."""
    renamed = {name: tensors[name] for name in _MOMENTS}
    if masters:
        master = tensors["param"]
        key = master.key.removeprefix(f"{_PREFIX}.param.")
        renamed[_MASTER] = dataclasses.replace(master, key=f"{_PREFIX}.{_MASTER}.{key}")
    return renamed


def _by_parameter(model_state: ShardedStateDict) -> dict[int, Any]:
    tensors, _ = extract_sharded_tensors_and_factories(model_state)
    return {id(sharded.data): sharded for sharded in nested_values(tensors)}
