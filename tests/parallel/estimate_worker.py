"""What one rank of several layouts really holds, beside what the estimate says it does."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from megatron_speech.model.builder import build_model
from megatron_speech.model.memory import MemoryLayout, divided, memory
from megatron_speech.parallel import groups
from megatron_speech.recipe.model import ModelConfig

VOCAB, SEQ_LENGTH = 300, 64


def measure(rank: int, world_size: int, directory: str, cases: list[dict[str, Any]]) -> None:
    """Write, for each case, this rank's bytes and their estimate to `directory`/rank_N.json."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    found = []
    for number, case in enumerate(cases):
        groups.initialize(**case["groups"], init_method=f"file://{directory}/store_{number}")
        found.append(_one(case))
        groups.destroy()
    Path(directory, f"rank_{rank}.json").write_text(json.dumps(found))


def _one(case: dict[str, Any]) -> dict[str, Any]:
    config = ModelConfig(**{"preset": "tiny", "num_layers": 6, **case["shape"]})
    precision, sharded = case["precision"], case["sharded"]
    chunks = build_model(config, VOCAB, precision=precision, max_sequence_length=SEQ_LENGTH)
    core = chunks[0].config
    wrapping = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=sharded)
    wrapped = [DistributedDataParallel(core, wrapping, chunk) for chunk in chunks]
    bf16 = precision == "bf16"
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=1e-3, bf16=bf16, params_dtype=core.params_dtype, use_distributed_optimizer=sharded
        ),
        wrapped,
    )
    optimizer.step()  # moments are there from the first step on
    parameters = {p.data_ptr(): p for chunk in chunks for p in chunk.parameters()}.values()
    states = [state for part in optimizer.chained_optimizers for state in part.optimizer.state.values()]
    moments = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
    masters = [p for part in optimizer.chained_optimizers for p in part.get_parameters()] if bf16 else []
    layout = divided(
        config,
        VOCAB,
        SEQ_LENGTH,
        MemoryLayout(
            tensor=parallel_state.get_tensor_model_parallel_world_size(),
            pipeline=parallel_state.get_pipeline_model_parallel_world_size(),
            virtual_pipeline=parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
            data=parallel_state.get_data_parallel_world_size(),
            distributed_optimizer=sharded,
            precision=precision,
            device="cpu",
        ),
    )
    estimate = memory(config, VOCAB, layout, parallel_state.get_pipeline_model_parallel_rank())
    return {
        "tensors": len(parameters),
        "measured": {
            "parameters": sum(p.numel() for p in parameters),
            "weights": _bytes(parameters),
            "gradients": sum(_bytes([buffer.grad_data]) for ddp in wrapped for buffer in ddp.buffers),
            "optimizer": _bytes(moments) + _bytes(masters),
        },
        "estimated": {name: getattr(estimate, name) for name in ("parameters", "weights", "gradients", "optimizer")},
    }


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
