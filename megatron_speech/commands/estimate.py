"""`megatron-speech estimate RECIPE.yaml`: what each layout would take of a GPU, without one."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_speech.console import output
from megatron_speech.errors import InputError
from megatron_speech.files import write_json
from megatron_speech.model.memory import GIB, Memory, MemoryLayout, divided, max_rank_memory
from megatron_speech.recipe.load import load_recipe
from megatron_speech.recipe.recipe import Recipe
from megatron_speech.recipe.recompute import RecomputeConfig
from megatron_speech.training.plan import peak_stage, scaled

# Cheapest first: what is tried when a layout does not fit.
_RECOMPUTE = (RecomputeConfig(), RecomputeConfig(mode="selective", modules=("mlp",)), RecomputeConfig(mode="full"))
_NODE = 8  # GPUs that tensor parallelism spans at most: those of one machine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add = parser.add_argument
    add("recipe", type=Path, metavar="RECIPE.yaml", help="the recipe; its datasets need not be there")
    add("overrides", nargs="*", metavar="key=value", help="replace values of the recipe")
    add("--gpus", type=int, default=8, metavar="N", help="GPUs of the run (8)")
    add("--gpu-memory", type=float, default=80.0, metavar="GIB", help="memory of one GPU (80)")
    add("--vocab-size", type=int, metavar="V", help="ids, instead of those of the recipe's token space")
    add("--all", action="store_true", help="show layouts that do not fit, too")
    add("--json", type=Path, metavar="F", help="write the table to F")


def run(args: argparse.Namespace) -> int:
    """Print the table of layouts."""
    for name in ("gpus", "vocab_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}; it has to be at least 1")
    if args.gpu_memory <= 0:
        raise InputError(f"--gpu-memory is {args.gpu_memory:g}; it has to be above 0 (GiB)")
    recipe = load_recipe(args.recipe, args.overrides)
    vocab_size = args.vocab_size or _ids(recipe)
    rows = [_row(layout, found, args.gpu_memory) for layout, found in layouts(recipe, vocab_size, args.gpus)]
    rows = _best(rows)
    shown = [row for row in rows if row["fits"] or args.all]
    output(_heading(recipe, vocab_size, args))
    if shown:
        output(_table(shown))
    hidden = len(rows) - len(shown)
    if hidden:
        output(f"{hidden} of {len(rows)} layouts do not fit{'' if shown else ': none does'} (--all shows them)")
    if args.json is not None:
        write_json(args.json, {"recipe": recipe.model_dump(mode="json"), "vocab_size": vocab_size, "layouts": rows})
    return 0


def _ids(recipe: Recipe) -> int:
    from megatron_speech.tokens.space import TokenSpace

    return TokenSpace.load(recipe.token_space).padded_size


def layouts(recipe: Recipe, vocab_size: int, gpus: int) -> Iterator[tuple[MemoryLayout, Memory]]:
    """Every layout of powers of two over `gpus`, with each kind of recomputation, and its fullest rank.

    Batches stay the recipe's. The optimizer's state is shared out wherever there is someone to share it with; tensor
    parallelism comes with sequence parallelism. A layout that leaves a data-parallel rank without a micro-batch, or
    divides what cannot be divided, is left out.
    """
    model = recipe.model
    stage, base, _ = peak_stage(recipe, vocab_size, 1, device="cuda")
    rows = stage.global_batch_sequences // stage.micro_batch_size
    for tensor in _powers(min(gpus, _NODE)):
        if model.num_query_groups % tensor or model.ffn_hidden_size % tensor:
            continue
        for pipeline in _powers(min(gpus // tensor, model.num_layers)):
            ranks = tensor * pipeline * base.context
            if gpus % ranks or rows % (gpus // ranks):
                continue
            data = gpus // ranks
            layout = replace(
                base,
                tensor=tensor,
                pipeline=pipeline,
                virtual_pipeline=1,
                data=data,
                split=(),
                sequence_parallel=tensor > 1,
                distributed_optimizer=data * base.context > 1,
                micro_batches=rows // data,
            )
            for recompute in _RECOMPUTE:
                found = divided(model, vocab_size, stage.seq_length, replace(layout, recompute=recompute))
                yield found, max_rank_memory(model, vocab_size, found)


def _powers(limit: int) -> list[int]:
    return [2**power for power in range(limit.bit_length()) if 2**power <= limit]


def _row(layout: MemoryLayout, found: Memory, gpu_memory: float) -> dict[str, Any]:
    recompute = layout.recompute
    return {
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "context": layout.context,
        "data": layout.data,
        "micro_batches": layout.micro_batches,
        "bubble": (layout.pipeline - 1) / (layout.micro_batches + layout.pipeline - 1),
        "split": list(layout.split),
        "recompute": "mlp" if recompute.mode == "selective" else recompute.mode,
        "parameters": found.parameters,
        **{
            f"{name}_gib": getattr(found, name) / GIB
            for name in ("weights", "gradients", "optimizer", "activations", "head", "total")
        },
        "fits": found.total / GIB <= gpu_memory,
    }


def _best(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each division of the model the cheapest recomputation that fits, or the most thorough one if none does."""
    best: dict[tuple[int, int], dict[str, Any]] = {}
    for row in rows:
        kept = best.get((row["tensor"], row["pipeline"]))
        if kept is None or not kept["fits"]:
            best[row["tensor"], row["pipeline"]] = row
    return list(best.values())


def _heading(recipe: Recipe, vocab_size: int, args: argparse.Namespace) -> str:
    stage, _, _ = peak_stage(recipe, vocab_size, 1, device="cuda")
    model = recipe.model
    total = sum(model.flops_per_token(one.seq_length, vocab_size) * one.tokens for one in recipe.stages)
    return (
        f"{recipe.name}: {model.parameters(vocab_size) / 1e6:,.1f} M parameters with {vocab_size:,} ids; "
        f"{recipe.precision}, {stage.micro_batch_size} × {stage.seq_length} positions a micro-batch, "
        f"{stage.global_batch_tokens:,} a step (stage {stage.name}); at most "
        f"{scaled(model.flops_per_token(stage.seq_length, vocab_size))}FLOP a token, {scaled(total)}FLOP the run\n"
        f"{args.gpus} GPUs of {args.gpu_memory:g} GiB; GiB of the fullest rank, at least:"
    )


def _table(rows: list[dict[str, Any]]) -> str:
    kinds = ("weights", "gradients", "optimizer", "activations", "head", "total")
    head = ["TP", "PP", "CP", "DP", "bubble", "layers", "recompute", "M params", *kinds, ""]
    lines = [head]
    for row in rows:
        lines.append(
            [
                *(str(row[name]) for name in ("tensor", "pipeline", "context", "data")),
                f"{row['bubble']:.0%}",
                _runs(row["split"]),
                row["recompute"],
                f"{row['parameters'] / 1e6:,.0f}",
                *(f"{row[f'{name}_gib']:.1f}" for name in kinds),
                "" if row["fits"] else "does not fit",
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _runs(split: list[int]) -> str:
    """Layers of the pipeline's pieces, equal neighbours together: 3×9+5."""
    runs: list[list[int]] = []
    for count in split:
        if runs and runs[-1][1] == count:
            runs[-1][0] += 1
        else:
            runs.append([1, count])
    return "+".join(f"{times}×{count}" if times > 1 else str(count) for times, count in runs)
