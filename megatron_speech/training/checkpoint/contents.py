"""What a checkpoint holds of a process: weights, optimizer state, random generators, as megatron-core shards them."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict

from megatron_speech.training.optim.optimizer import Optimizer

# Every layer under a key of its own, since a frozen one has no optimizer state beside it.
METADATA = {"non_homogeneous_layers": True}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without torch's notices to megatron-core about the ShardedTensor that its format is made of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield


def run_state(chunks: list[Any], optimizer: Optimizer | None, state: dict[str, Any]) -> ShardedStateDict:
    """Everything that a run continues from, but for the ranges that its optimizer holds. A collective."""
    contents = model_state(chunks)
    if optimizer is not None:
        contents["optimizer"] = optimizer.counts()
    contents["rng"] = ShardedObject("rng", rng_state(), (dist.get_world_size(),), (dist.get_rank(),))
    contents["state"] = state
    return contents


def model_state(chunks: list[Any]) -> ShardedStateDict:
    """Sharded state of this rank's chunks: `model`, or `model0` … `modelN` with virtual pipeline stages."""
    names = _chunk_names(chunks)
    return {name: chunk.sharded_state_dict(metadata=dict(METADATA)) for name, chunk in zip(names, chunks, strict=True)}


def merged(contents: ShardedStateDict) -> ShardedStateDict:
    """What the optimizer looks parameters up in."""
    return contents["model"] if "model" in contents else dict(contents)


def load_model_state(chunks: list[Any], loaded: dict[str, Any]) -> None:
    """Put what a load filled in into the chunks."""
    for name, chunk in zip(_chunk_names(chunks), chunks, strict=True):
        chunk.load_state_dict(loaded[name], strict=True)


def _chunk_names(chunks: list[Any]) -> list[str]:
    return ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]


def rng_state() -> dict[str, Any]:
    """This process's random generators."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def restore_rng_state(state: dict[str, Any]) -> None:
    """Set the generators to what :func:`rng_state` returned."""
    random.setstate(state["python"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])
