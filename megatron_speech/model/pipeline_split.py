"""How many layers every pipeline stage gets: the head of a speech model weighs as much as several of them.

Light to import: no torch.

A model of n layers runs on `stages` pipeline ranks in `stages × chunks` pieces (chunks > 1: the interleaved schedule),
in the order of the model: piece c lies on rank c mod stages. The first piece holds the token table, the last one the
final norm and the output head. In the steady state of 1F1B and of the interleaved schedule every rank computes all
the time but for waiting on the slowest one, so the split minimises the work of the busiest rank; among the ranks that
could take one more layer equally well the later one takes it, since it keeps fewer micro-batches alive.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_speech.errors import InputError
from megatron_speech.recipe.model import ModelConfig

# One optimizer step reads and writes about 40 bytes per parameter (fp32 gradient, master weight and two moments, bf16
# weight). At the 184 FLOP per byte of an H200 (790 TFLOP/s bf16, 4.3 TB/s) and 65,536 tokens per step and copy of the
# model that is 0.11 FLOP per token and parameter: all that a table of embeddings costs, since a look-up computes
# nothing.
_UPDATE_FLOPS_PER_PARAMETER = 0.11
# Logits, and two products for their gradients (ops/cross_entropy.py). Every token is taken to have a loss, as in
# pretraining; fine-tuning, which computes fewer logits, would put a layer or two more on the last stage.
_HEAD_FLOPS_PER_PARAMETER = 6.0


def split_layers(
    config: ModelConfig, vocab_size: int, stages: int, chunks: int | None, seq_length: float
) -> tuple[int, ...]:
    """Layers of every piece of the model, in the order of the model, balanced by FLOPs per token.

    Args:
        config: shape of the model.
        vocab_size: rows of the token table.
        stages: pipeline ranks.
        chunks: pieces per rank (`parallel.virtual_pipeline`), None for one.
        seq_length: tokens that a token can see, an upper bound (see :meth:`ModelConfig.flops_per_token`).

    Raises:
        InputError: the model has too few layers for so many pieces.
    """
    layer = config.flops_per_token(seq_length, 0) / config.num_layers
    layer += _UPDATE_FLOPS_PER_PARAMETER * layer / 6.0
    table = vocab_size * config.hidden_size
    return balance(
        config.num_layers,
        stages,
        chunks or 1,
        first=_UPDATE_FLOPS_PER_PARAMETER * table / layer,
        last=(_UPDATE_FLOPS_PER_PARAMETER + _HEAD_FLOPS_PER_PARAMETER) * table / layer,
    )


def balance(num_layers: int, stages: int, chunks: int, *, first: float, last: float) -> tuple[int, ...]:
    """The split of `num_layers` equal layers whose busiest rank has the least to do.

    Args:
        num_layers: layers of the model.
        stages: pipeline ranks.
        chunks: pieces per rank.
        first: work of the token table, on the first rank, in layers.
        last: work of the output head, on the last rank, in layers.

    Every piece has a layer or more, but for the last one, whose head may be work enough.
    """
    pieces = stages * chunks
    if pieces == 1:
        return (num_layers,)
    if num_layers < pieces - 1:
        raise InputError(
            f"model.num_layers is {num_layers}: parallel.pipeline {stages} × virtual_pipeline {chunks} makes {pieces} "
            f"pieces of the model, and every piece but the last needs a layer; use {num_layers + 1} pieces or fewer"
        )
    counts = [1] * (pieces - 1) + [0]
    extra = [0.0] * pieces
    extra[0], extra[-1] = first, last
    rank_work = [sum(counts[piece] + extra[piece] for piece in range(rank, pieces, stages)) for rank in range(stages)]
    for _ in range(num_layers - (pieces - 1)):
        rank = min(range(stages), key=lambda rank: (rank_work[rank], -rank))
        piece = min(range(rank, pieces, stages), key=lambda piece: (counts[piece] + extra[piece], -piece))
        counts[piece] += 1
        rank_work[rank] += 1
    return tuple(counts)


def core_layout(split: Sequence[int]) -> list[list[str]]:
    """megatron-core's `pipeline_model_parallel_layout` of a split."""
    pieces = [["decoder"] * count for count in split]
    pieces[0].insert(0, "embedding")
    pieces[-1].append("loss")
    return pieces
