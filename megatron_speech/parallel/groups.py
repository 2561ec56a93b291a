"""Process groups of a run: who holds which part of the model and of the data."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_speech.environment import rank_and_size
from megatron_speech.errors import InputError
from megatron_speech.parallel import cpu_runtime, rendezvous


@dataclass(frozen=True)
class Layout:
    """How one model is spread: `world_size = data × tensor × pipeline × context`."""

    world_size: int = 1
    rank: int = 0
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None
    context: int = 1

    @property
    def data(self) -> int:
        """Copies of the model that share the global batch."""
        return self.world_size // (self.tensor * self.pipeline * self.context)


def device() -> torch.device:
    """The device of this process."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def initialize(
    tensor: int = 1,
    pipeline: int = 1,
    context: int = 1,
    *,
    virtual_pipeline: int | None = None,
    seed: int = 1234,
    backend: str | None = None,
    init_method: str | None = None,
    timeout_minutes: float = 30.0,
    stopped: Callable[[], bool] | None = None,
) -> Layout:
    """Start torch.distributed and megatron-core's parallel state, and seed this rank's generators.

    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are read when `torchrun` (or a launcher like it) has
    set them; without them the run is one process, which needs no port. NCCL where CUDA is present, else gloo after
    :func:`cpu_runtime.install`. A process group that is already up is used as it is.

    Args:
        tensor, pipeline, context: sizes of the model-parallel groups.
        virtual_pipeline: model chunks per pipeline stage (interleaved schedule), None for one.
        seed: of the run; TP and PP ranks get generators of their own, data-parallel ranks the same ones.
        backend: "nccl" or "gloo"; by default whichever the device needs.
        init_method: torch.distributed init method (e.g. `file:///path`) instead of MASTER_ADDR and MASTER_PORT.
        timeout_minutes: of a collective.
        stopped: whether a signal has asked this process to end; while it waits for others, signals end it.

    Raises:
        InputError: the layout does not divide the world size, or needs what this machine lacks; the processes do not
            find each other.
    """
    cpu_runtime.install()
    from megatron.core import parallel_state, tensor_parallel

    if parallel_state.model_parallel_is_initialized():
        raise RuntimeError("parallel groups exist already: call destroy() first")
    world_size = dist.get_world_size() if dist.is_initialized() else rank_and_size()[1]
    check_layout(world_size, tensor, pipeline, context, virtual_pipeline)
    start(backend=backend, init_method=init_method, timeout_minutes=timeout_minutes, stopped=stopped)
    rank = dist.get_rank()
    with rendezvous.watched(f"the {world_size} processes form groups", timedelta(minutes=timeout_minutes), stopped):
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            virtual_pipeline_model_parallel_size=virtual_pipeline,
            context_parallel_size=context,
            distributed_timeout_minutes=max(1, round(timeout_minutes)),
        )
    # Sampled streams (dropout) must differ between pipeline stages; megatron-core adds the tensor rank itself.
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(
        seed + 100 * parallel_state.get_pipeline_model_parallel_rank(), force_reset_rng=True
    )
    return Layout(world_size, rank, tensor, pipeline, virtual_pipeline, context)


def start(
    *,
    backend: str | None = None,
    init_method: str | None = None,
    timeout_minutes: float = 30.0,
    stopped: Callable[[], bool] | None = None,
) -> None:
    """Start torch.distributed, where it is not up yet, and take this process's device; :func:`initialize` does it too.

    Args: as those of :func:`initialize`.
    """
    cpu_runtime.install()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else rank_and_size()
    if torch.cuda.is_available():
        # Under `srun --gpus-per-task=1` a process sees one GPU, whatever its number on the node.
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
    if dist.is_initialized():
        return
    backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    timeout = timedelta(minutes=timeout_minutes)
    if world_size == 1 and init_method is None:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        rendezvous.join(backend, rank, world_size, init_method=init_method, timeout=timeout, stopped=stopped)


def check_layout(
    world_size: int, tensor: int = 1, pipeline: int = 1, context: int = 1, virtual_pipeline: int | None = None
) -> None:
    """Raise InputError for a layout that `world_size` processes cannot hold; names the nearest that they can."""
    for name, size in (("tensor", tensor), ("pipeline", pipeline), ("context", context)):
        if size < 1:
            raise InputError(f"parallel.{name} is {size}: it needs to be 1 or more")
    model = tensor * pipeline * context
    if world_size % model:
        divisors = [d for d in range(1, world_size + 1) if world_size % d == 0]
        near = sorted(divisors, key=lambda d: abs(d - model))[:2]
        below, above = world_size // model * model, (world_size // model + 1) * model
        sizes = f"{below} or {above}" if below else f"{above}"
        raise InputError(
            f"parallel: tensor {tensor} × pipeline {pipeline} × context {context} = {model} does not divide the "
            f"{world_size} processes of this run; start {sizes} processes, or choose sizes whose product is "
            f"{' or '.join(str(d) for d in sorted(near))}"
        )
    if virtual_pipeline is not None and (virtual_pipeline < 2 or pipeline < 2):
        raise InputError(
            f"parallel.virtual_pipeline is {virtual_pipeline} with pipeline {pipeline}: interleaving needs 2 or more "
            "chunks per stage and 2 or more stages; leave it out for one chunk per stage"
        )


def destroy() -> None:
    """Take the parallel groups and torch.distributed down; does nothing where they are not up."""
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    destroy_num_microbatches_calculator()
    if dist.is_initialized():
        dist.destroy_process_group()
