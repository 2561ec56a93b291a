"""What one rank of a layout does: a few optimizer steps through megatron-core's own schedule, DDP and optimizer.

Runs in processes of a fork server that has imported it once; results go to files, as tensors do not outlive them.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_speech.model.builder import build_model, global_named_parameters
from megatron_speech.model.packed import PackedSequences
from megatron_speech.model.targets import TOKENS, HeadTargets, Losses
from megatron_speech.parallel import groups
from megatron_speech.recipe.model import ModelConfig

VOCAB, REAL = 256, 130
ROWS, LENGTH, MICRO_BATCHES, STEPS = 2, 48, 4, 20


def micro_batch(step: int, number: int) -> dict[str, torch.Tensor]:
    """Two rows of documents with a padded tail, a third of the tokens without loss."""
    generator = np.random.default_rng([step, number])
    cut = generator.integers(4, 20, size=(ROWS, 2))
    bounds = [0]
    for row in range(ROWS):
        bounds += [row * LENGTH + int(cut[row, 0]), row * LENGTH + int(cut[row].sum()), (row + 1) * LENGTH]
    weights = (generator.random(ROWS * LENGTH) > 0.3).astype(np.float32)
    for row in range(ROWS):
        weights[bounds[3 * row + 2] : bounds[3 * row + 3]] = 0
    tokens = generator.integers(0, REAL, ROWS * LENGTH)
    return {
        "tokens": torch.from_numpy(tokens),
        "labels": torch.from_numpy((tokens * 3 + 1) % REAL),
        "weights": torch.from_numpy(weights),
        "cu_seqlens": torch.tensor(bounds, dtype=torch.int32),
        "row_pointers": torch.tensor([0, 2, 4]),
    }


def forward_step(data: Any, model: Any, total: float) -> tuple[torch.Tensor, Any]:
    batch = next(data)
    packed = PackedSequences.build(batch["cu_seqlens"], row_pointers=batch["row_pointers"])
    targets = HeadTargets.build(batch["labels"], batch["weights"] / total)
    output = model(batch["tokens"][None], None, None, targets, packed_seq_params=packed)

    def loss(losses: Losses) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        return losses.total, torch.ones((), dtype=torch.int), {"loss": losses.total.detach()}

    return output, loss


def train(
    rank: int,
    world_size: int,
    directory: str,
    layout: dict[str, Any],
    shape: dict[str, Any] | None = None,
    model_options: dict[str, Any] | None = None,
    optimizer_options: dict[str, Any] | None = None,
    steps: int = STEPS,
) -> None:
    """Write losses and gradient norms of `steps` steps to `directory`/losses.json, each rank's weights beside them."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    groups.initialize(**layout, init_method=f"file://{directory}/store", seed=11)
    config = ModelConfig(**{"preset": "tiny", "num_layers": 4, **(shape or {})})
    models = build_model(config, VOCAB, valid_vocab_size=REAL, seed=5, **(model_options or {}))
    core = models[0].config
    ddp = DistributedDataParallelConfig(
        overlap_grad_reduce=False, use_distributed_optimizer=bool((optimizer_options or {}).get("use_distributed"))
    )
    wrapped = [DistributedDataParallel(core, ddp, model) for model in models]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-3,
            adam_eps=1e-6,  # Adam blows up what rounding leaves of a gradient that is a sum to zero
            weight_decay=0.1,
            clip_grad=1.0,
            bf16=core.bf16,
            params_dtype=core.params_dtype,
            use_distributed_optimizer=ddp.use_distributed_optimizer,
        ),
        wrapped,
    )
    # The loss is already divided by the weight of the global batch: nothing is left to scale.
    core.finalize_model_grads_func = lambda chunks, tokens=None, **rest: finalize_model_grads(chunks, None, **rest)
    step_function = get_forward_backward_func()
    data_rank = parallel_state.get_data_parallel_rank()
    data_size = parallel_state.get_data_parallel_world_size()
    history = []
    for step in range(steps):
        batches = [micro_batch(step, number) for number in range(MICRO_BATCHES)]
        total = sum(float(batch["weights"].sum()) for batch in batches)
        for model in wrapped:
            model.zero_grad_buffer()
        optimizer.zero_grad()
        own = batches[data_rank::data_size]
        results = step_function(
            forward_step_func=functools.partial(forward_step, total=total),
            data_iterator=[iter(own) for _ in wrapped] if len(wrapped) > 1 else iter(own),
            model=wrapped if len(wrapped) > 1 else wrapped[0],
            num_microbatches=len(own),
            # Rows are flattened into one: this is the shape that travels between stages.
            seq_length=ROWS * LENGTH,
            micro_batch_size=1,
            forward_only=False,
        )
        _, norm, _ = optimizer.step()
        loss = torch.tensor(sum(float(result["loss"]) for result in results), dtype=torch.float64)
        torch.distributed.all_reduce(loss)
        # Tensor-parallel ranks hold the same loss.
        history.append([loss.item() / parallel_state.get_tensor_model_parallel_world_size(), float(norm)])
    if rank == 0:
        Path(directory, "losses.json").write_text(json.dumps(history))
    np.savez(
        Path(directory, f"weights_{parallel_state.get_tensor_model_parallel_rank()}_{rank}.npz"),
        **{name: value.detach().float().numpy() for model in models for name, value in global_named_parameters(model)},
    )
    groups.destroy()


def whole_weights(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor of the model under its global name, put together from what the ranks of :func:`train` hold.

    Ranks that hold the same part must agree: data-parallel copies to the bit, norms that every tensor-parallel rank
    has and a tied head on another stage than its table too.
    """
    parts: dict[str, dict[int, np.ndarray]] = {}
    for path in sorted(directory.glob("weights_*.npz")):
        tensor_rank = int(path.stem.split("_")[1])
        for name, weight in np.load(path).items():
            known = parts.setdefault(name, {}).setdefault(tensor_rank, weight)
            assert np.array_equal(known, weight), f"{name} of {path.name} differs from another copy of it"
    return {name: _join(name, [own[rank] for rank in sorted(own)]) for name, own in parts.items()}


def _join(name: str, parts: list[np.ndarray]) -> np.ndarray:
    if parts[0].ndim == 1 and not name.endswith(".bias"):
        assert all(np.array_equal(parts[0], other) for other in parts), f"{name} differs between tensor ranks"
        return parts[0]
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return np.concatenate(parts, axis=1)
    if name.endswith("linear_fc1.weight"):  # gate | linear, each split
        return np.concatenate([np.split(part, 2)[half] for half in (0, 1) for part in parts])
    return np.concatenate(parts)


def predict(rank: int, world_size: int, directory: str, layout: dict[str, Any], options: dict[str, Any]) -> None:
    """Write the logits of one micro-batch to `directory`/logits.npy."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    groups.initialize(**layout, init_method=f"file://{directory}/store")
    (model,) = build_model(ModelConfig(preset="tiny"), VOCAB, valid_vocab_size=REAL, seed=5, **options)
    batch = micro_batch(0, 0)
    with torch.no_grad():
        logits = model.eval()(batch["tokens"][None], packed_seq_params=PackedSequences.build(batch["cu_seqlens"]))
    if rank == world_size - 1:
        np.save(Path(directory, "logits.npy"), logits.numpy())
    groups.destroy()


FIRST, SECOND = 40, 56  # lengths of the two documents of :func:`two_documents`


def two_documents(rank: int, world_size: int, directory: str, layout: dict[str, Any], leaking: int | None) -> None:
    """Write the losses of the second document, for two texts of the first one, to `directory`/losses.npy.

    The pipeline stage `leaking` is told of one document instead of two.
    """
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    groups.initialize(**layout, init_method=f"file://{directory}/store", seed=11)
    models = build_model(ModelConfig(preset="tiny", num_layers=4), VOCAB, valid_vocab_size=REAL, seed=5)
    bounds = [0, FIRST, FIRST + SECOND]
    if parallel_state.get_pipeline_model_parallel_rank() == leaking:
        del bounds[1]
    packed = PackedSequences.build(torch.tensor(bounds))
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, REAL, (FIRST,), generator=generator) for _ in range(2)]
    second = torch.randint(0, REAL, (SECOND,), generator=generator)
    inputs = [torch.cat((text, second))[None] for text in texts]
    losses: list[torch.Tensor] = []

    def step(data: Any, model: Any) -> tuple[Any, Any]:
        tokens = next(data)
        output = model(tokens, None, None, HeadTargets.build(tokens), packed_seq_params=packed)

        def keep(found: Losses) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            losses.append(found[TOKENS].losses[FIRST:].detach().clone())
            return found.total, torch.ones((), dtype=torch.int), {}

        return output, keep

    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(inputs) for _ in models] if len(models) > 1 else iter(inputs),
        model=models if len(models) > 1 else models[0],
        num_microbatches=len(inputs),
        seq_length=FIRST + SECOND,
        micro_batch_size=1,
        forward_only=True,
    )
    if losses:
        np.save(Path(directory, "losses.npy"), torch.stack(losses).numpy())
    groups.destroy()
