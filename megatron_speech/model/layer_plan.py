"""Which layer stands where in a model, and what the one below the head leaves out. Light to import: no torch."""

from __future__ import annotations

from megatron_speech.recipe.model import ModelConfig

# Attention and an MLP, each behind a norm and added to the residual stream.
ATTENTION_MLP = "attention_mlp"


def layer_kinds(config: ModelConfig) -> tuple[str, ...]:
    """The kind of every layer of the whole model, in its order; how each is built: `specs.LAYER_SPECS`."""
    return (ATTENTION_MLP,) * config.num_layers


def last_mlp_on_learned_only(kind: str, *, torch_backend: bool, sequence_parallel: bool, layers: int) -> bool:
    """Whether the layer below the head computes its MLP for the rows that the head reads, see `specs.LastLayer`.

    Args:
        kind: of the model's last layer.
        torch_backend: the layers run on the torch back-end. FP8, which needs the other, wants the number of rows round.
        sequence_parallel: it splits rows over more than one tensor-parallel rank: none of them has all the head reads.
        layers: of the pipeline chunk that has the head; with none the head reads what another rank sends, all rows.
    """
    return kind == ATTENTION_MLP and torch_backend and not sequence_parallel and layers > 0
