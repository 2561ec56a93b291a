"""What megatron-core 0.16.1 asks of CUDA, supplied on a machine that has none.

megatron-core takes the device for granted: it calls `torch.cuda` without asking and writes `device="cuda"` in
its code. :func:`install` makes the same code run on CPU, and does nothing at all where CUDA is present. Three
tables say everything that it changes, with the reason; the tests iterate over them:

- `SUPPLIED`: calls of torch that raise without CUDA, replaced by what they mean on a CPU.
- `LITERALS`: functions of megatron-core whose compiled constants name CUDA. The constants are rewritten in place
  (`"cuda"` → `"cpu"`, `"torch.cuda.FloatTensor"` → `"torch.FloatTensor"`), so nothing is wrapped and a call costs
  what it did before.
- `REPLACED`: functions of megatron-core that cannot work without a CUDA generator.

A CPU has one stream and one generator: streams and events are empty, and the "CUDA" generator is the default one.
Async checkpoints: use megatron-core's forking caller (`AsyncCallsQueue(persistent=False)`, its default); the
persistent one spawns a process that asks for a CUDA device by number before this module could be installed there.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

_CPU = torch.device("cpu")


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


class Stream:
    """A CPU runs in order: its only stream has nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = _CPU

    synchronize = wait_stream = wait_event = record_event = _nothing


class CompletedEvent:
    """An event of the one stream has always happened already."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    record = wait = synchronize = _nothing


_STREAM = Stream()


@contextmanager
def _stream(stream: Stream | None) -> Iterator[None]:
    yield


def _cuda(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return tensor


def _current_device() -> torch.device:
    return _CPU


def _current_stream(device: Any = None) -> Stream:
    return _STREAM


def _get_rng_state(device: Any = None) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, device: Any = None) -> None:
    torch.set_rng_state(state)


def _manual_seed(seed: int) -> None:
    torch.manual_seed(seed)


def _set_cuda_rng_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _get_cuda_rng_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


class Supplied(NamedTuple):
    """One call of torch that megatron-core makes and that fails without CUDA."""

    owner: str
    name: str
    replacement: Callable[..., Any]
    reason: str


class Literal(NamedTuple):
    """One function of megatron-core with CUDA written into its code."""

    module: str
    function: str
    reason: str


SUPPLIED: tuple[Supplied, ...] = (
    Supplied("torch.cuda", "current_device", _current_device, "the device of almost every buffer and parameter"),
    Supplied("torch.cuda", "synchronize", _nothing, "point-to-point communication, timers, checkpoint saving"),
    Supplied("torch.cuda", "get_rng_state", _get_rng_state, "RNG tracker, recomputation, rerun machine"),
    Supplied("torch.cuda", "set_rng_state", _set_rng_state, "rerun machine, restoring a checkpoint"),
    Supplied("torch.cuda", "manual_seed", _manual_seed, "model_parallel_cuda_manual_seed"),
    Supplied("torch.cuda", "Stream", Stream, "DDP with overlapped communication"),
    Supplied("torch.cuda", "Event", CompletedEvent, "straggler and schedule timing"),
    Supplied("torch.cuda", "stream", _stream, "gradient reduction on a side stream"),
    Supplied("torch.cuda", "current_stream", _current_stream, "gradient reduction, schedules"),
    Supplied("torch.cuda", "default_stream", _current_stream, "gradient reduction waits for the default stream"),
    Supplied("torch.cuda", "empty_cache", _nothing, "optimizer offload and checkpoint loading"),
    Supplied("torch.Tensor", "cuda", _cuda, "tied embeddings across pipeline stages, loaded checkpoint shards"),
)

_SCHEDULES = "megatron.core.pipeline_parallel.schedules"
_CLIP = "megatron.core.optimizer.clip_grads"
_OPTIMIZER = "megatron.core.optimizer.optimizer"
_DISTRIBUTED_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer"
_EXCHANGE = "megatron.core.dist_checkpointing.exchange_utils"

LITERALS: tuple[Literal, ...] = (
    Literal(_SCHEDULES, "forward_backward_no_pipelining", "token count of the step"),
    Literal(_SCHEDULES, "forward_backward_pipelining_with_interleaving", "token count of the step"),
    Literal(_SCHEDULES, "forward_backward_pipelining_without_interleaving", "token count of the step"),
    Literal(_CLIP, "get_grad_norm_fp32", "overflow buffer and norm"),
    Literal(_CLIP, "clip_grad_by_total_norm_fp32", "overflow buffer; type of the gradients by name"),
    Literal(_CLIP, "count_zeros_fp32", "counter"),
    Literal("megatron.core.utils", "local_multi_tensor_l2_norm", "norm without apex or Transformer Engine"),
    Literal(_OPTIMIZER, "MixedPrecisionOptimizer.__init__", "overflow flag and unit scale of bf16 training"),
    Literal(_OPTIMIZER, "Float16OptimizerWithFloat16Params.__init__", "type of the parameters by name"),
    Literal(_OPTIMIZER, "FP32Optimizer.__init__", "unit scale"),
    Literal(_DISTRIBUTED_OPTIMIZER, "DistributedOptimizer.__init__", "type of the parameters by name"),
    Literal(
        _DISTRIBUTED_OPTIMIZER,
        "DistributedOptimizer._build_model_and_main_param_groups",
        "type of the parameters by name",
    ),
    Literal("megatron.core.rerun_state_machine", "RerunStateMachine._reduce_any", "agreement between ranks"),
    Literal(
        "megatron.core.dist_checkpointing.strategies.state_dict_saver",
        "verify_global_md_reuse",
        "agreement between ranks on cached checkpoint metadata",
    ),
    Literal(_EXCHANGE, "_get_empty_tensor_for_exchange", "shards exchanged while loading in parallel"),
    Literal(_EXCHANGE, "exchange_loaded_tensors_gather_rounds", "shards exchanged while loading in parallel"),
)

REPLACED: tuple[Supplied, ...] = (
    Supplied(
        "megatron.core.tensor_parallel.random",
        "_set_cuda_rng_state",
        _set_cuda_rng_state,
        "queues the call until CUDA starts, which is never",
    ),
    Supplied(
        "megatron.core.tensor_parallel.random",
        "_get_cuda_rng_state",
        _get_cuda_rng_state,
        "asks for the generator of a CUDA device",
    ),
)

_installed = False


def needed() -> bool:
    """True on a machine without CUDA."""
    return not torch.cuda.is_available()


def install() -> bool:
    """Let megatron-core run on this machine's CPU; returns False, and changes nothing, where CUDA is present.

    May be called any number of times. Raises RuntimeError if the installed megatron-core is not the one that the
    tables describe (a listed function is gone, or no longer names CUDA).
    """
    global _installed
    if _installed:
        return True
    if not needed():
        return False
    for entry in SUPPLIED + REPLACED:
        owner: Any = torch.Tensor if entry.owner == "torch.Tensor" else importlib.import_module(entry.owner)
        if not hasattr(owner, entry.name):
            raise RuntimeError(f"{entry.owner}.{entry.name} does not exist: the CPU runtime fits megatron-core 0.16.1")
        setattr(owner, entry.name, entry.replacement)
    for literal in LITERALS:
        function = _find(literal)
        function.__code__ = _rewrite(function.__code__, literal)
    # The tracker warns when the CPU generator moves inside a fork; here it is the generator that is forked.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed within GPU RNG context" not in record.getMessage()
    )
    _installed = True
    return True


def _find(literal: Literal) -> types.FunctionType:
    found: Any = importlib.import_module(literal.module)
    for part in literal.function.split("."):
        found = getattr(found, part, None)
    if found is None:
        raise RuntimeError(
            f"{literal.module}.{literal.function} does not exist: the CPU runtime fits megatron-core 0.16.1"
        )
    function = found.__func__ if inspect.ismethod(found) else inspect.unwrap(found)  # classmethods arrive bound
    assert isinstance(function, types.FunctionType), literal
    return function


def _on_cpu(constant: object) -> object:
    """A constant of compiled code with CUDA's names exchanged for the CPU's."""
    if constant == "cuda":
        return "cpu"
    if isinstance(constant, str):
        return constant.replace("torch.cuda.", "torch.") if constant.startswith("torch.cuda.") else constant
    if isinstance(constant, tuple):
        return tuple(_on_cpu(item) for item in constant)
    return constant


def _rewrite(code: types.CodeType, literal: Literal) -> types.CodeType:
    constants = tuple(_on_cpu(constant) for constant in code.co_consts)
    if constants == code.co_consts:
        raise RuntimeError(
            f"{literal.module}.{literal.function} no longer names CUDA: the CPU runtime fits megatron-core 0.16.1"
        )
    return code.replace(co_consts=constants)
