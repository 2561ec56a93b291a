"""What one rank does with a model one layer of which is of another kind."""

from __future__ import annotations

import operator
from typing import Any

import layout_worker
import toy_layers

LAYERS, AT, STEPS = 5, 2, 3


def train(rank: int, world_size: int, directory: str, layout: dict[str, Any], split: list[int] | None) -> None:
    """:func:`layout_worker.train` of it; the process ends with it, and the layer's registration too."""
    toy_layers.install(operator.setitem, setattr, AT)
    options = {"pipeline_layout": split} if split else {}
    layout_worker.train(rank, world_size, directory, layout, {"num_layers": LAYERS}, options, steps=STEPS)
