"""An exponential moving average of the weights, in fp32, split over the ranks as the optimizer's masters are.

After an update number n (from 0 on), average ← d·average + (1 - d)·weights with d = min(decay, (1 + n)/(10 + n)): the
warm-up of the ExponentialMovingAverage of TensorFlow, so that the first weights are soon forgotten.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from torch import Tensor

from megatron_speech.training.optim.masters import Master
from megatron_speech.training.optim.ranges import Parameters, Range

PREFIX = "ema"
"""What the average of a parameter has before the parameter's key in a checkpoint."""


class Ema:
    """The average of what this rank's optimizer updates. Frozen parameters are not in it: they are their own.

    Args:
        decay: d above.
        owned: this rank's masters.
    """

    def __init__(self, decay: float, owned: list[Master]) -> None:
        self.decay = decay
        self._owned = owned
        self._averages = [master.values.detach().clone() for master in owned]
        # On the device, since only there it is known whether a step was skipped. float64 counts exactly.
        self._updates = torch.zeros((), dtype=torch.float64, device=torch.cuda.current_device())

    @torch.no_grad()
    def update(self, taken: Tensor | None) -> None:
        """Move towards the weights; no device sync.

        Args:
            taken: 1, or 0 where the step was skipped and nothing moves; a scalar on the device. None: 1.
        """
        decay = ((1.0 + self._updates) / (10.0 + self._updates)).clamp(max=self.decay)
        weight = 1.0 - decay if taken is None else (1.0 - decay) * taken
        self._updates += 1.0 if taken is None else taken
        weight = weight.float()
        for average, master in zip(self._averages, self._owned, strict=True):
            average.lerp_(master.values, weight)

    @torch.no_grad()
    def restart(self) -> None:
        """Restart the average from the current weights."""
        for average, master in zip(self._averages, self._owned, strict=True):
            average.copy_(master.values)
        self._updates.zero_()

    @contextlib.contextmanager
    def in_place_of_weights(self, publish: Callable[[], None]) -> Iterator[None]:
        """While inside, the model computes with the average; the weights come back bit for bit. A collective.

        Args:
            publish: makes the model's parameters those of the masters, on all ranks.
        """
        self._swap()
        publish()
        try:
            yield
        finally:
            self._swap()
            publish()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, master in zip(self._averages, self._owned, strict=True):
            weights = master.values.clone()
            master.values.copy_(average)
            average.copy_(weights)

    # ---- checkpoints

    def ranges(self, parameters: Parameters, written: list[bool]) -> list[Range]:
        """The average as this rank holds it, to be saved or to be filled by a load.

        Args:
            parameters: how those of the chunks are sharded.
            written: for each master whether this rank writes it.
        """
        return [
            Range(PREFIX, parameters[id(master.parameter)], master.start, average, own)
            for master, average, own in zip(self._owned, self._averages, written, strict=True)
        ]

    @property
    def updates(self) -> Tensor:
        """How many the average has seen: a float64 scalar on the device, to be saved and set."""
        return self._updates


def averaged_state(model_state: ShardedStateDict, saved: set[str]) -> ShardedStateDict:
    """Places for the averages of the parameters of `model_state`, or for a parameter itself where none is saved.

    Args:
        model_state: sharded state of model chunks.
        saved: keys of the tensors of the checkpoint to be loaded.
    """

    def averaged(sharded: Any) -> Any:
        if not isinstance(sharded, ShardedTensor | ShardedTensorFactory) or f"{PREFIX}.{sharded.key}" not in saved:
            return sharded
        return make_sharded_optimizer_tensor(sharded, torch.empty(sharded.data.shape, dtype=torch.float32), PREFIX)

    return dict_list_map_outplace(averaged, model_state)
