"""What a recipe will take of every rank, said before the run and refused where it cannot fit.

Light to import: no torch, no megatron-core.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_speech.errors import InputError
from megatron_speech.model.memory import GIB, Memory, MemoryLayout, divided, max_rank_memory, remedies
from megatron_speech.recipe.recipe import Recipe
from megatron_speech.recipe.recompute import RecomputeConfig
from megatron_speech.recipe.stage import StageConfig

if TYPE_CHECKING:
    import torch

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_SHOWN_REMEDIES = 3


def layout_of(
    recipe: Recipe, stage: StageConfig, vocab_size: int, data_parallel: int, *, device: str, learned: float = 1.0
) -> MemoryLayout:
    """How the recipe divides the model, and what goes through it in one stage.

    Args:
        recipe: what is run.
        stage: one of its stages.
        vocab_size: rows of the token table, `TokenSpace.padded_size`.
        data_parallel: data-parallel ranks.
        device: "cuda" or "cpu".
        learned: share of the positions that carry loss.

    Raises:
        InputError: the pipeline has more pieces than the model layers.
    """
    parallel = recipe.parallel
    layout = MemoryLayout(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual_pipeline=parallel.virtual_pipeline or 1,
        context=parallel.context,
        data=data_parallel,
        split=parallel.pipeline_layout or (),
        sequence_parallel=parallel.sequence_parallel,
        distributed_optimizer=parallel.distributed_optimizer,
        precision=recipe.precision,
        recompute=recipe.recompute,
        positions=stage.micro_batch_size * stage.seq_length,
        learned=learned,
        micro_batches=max(1, stage.global_batch_sequences // (stage.micro_batch_size * data_parallel)),
        ema=recipe.ema is not None,
        device=device,
    )
    return divided(recipe.model, vocab_size, max(one.seq_length for one in recipe.stages), layout)


def peak_stage(
    recipe: Recipe, vocab_size: int, data_parallel: int, *, device: str, learned: Sequence[float] | None = None
) -> tuple[StageConfig, MemoryLayout, Memory]:
    """The stage that needs most memory, with its layout and what its fullest rank holds."""
    shares = learned or [1.0] * len(recipe.stages)
    found = []
    for stage, share in zip(recipe.stages, shares, strict=True):
        layout = layout_of(recipe, stage, vocab_size, data_parallel, device=device, learned=share)
        found.append((stage, layout, max_rank_memory(recipe.model, vocab_size, layout)))
    return max(found, key=lambda entry: entry[2].total)


def check_fits(
    recipe: Recipe, vocab_size: int, data_parallel: int, device: torch.device, limit: float | None = None
) -> None:
    """Refuse a recipe that a rank's memory cannot hold.

    Args:
        recipe: what is about to be run.
        vocab_size: rows of the token table.
        data_parallel: data-parallel ranks.
        device: of this rank.
        limit: bytes that it has; None: what the device or the machine says.

    Raises:
        InputError: the estimate, which counts only what must be there, is above the limit; names what would help.
    """
    limit = rank_bytes(device) if limit is None else limit
    if limit is None:
        return
    # How much of an SFT batch is learned is not known yet, and its head is the smaller part: it counts as none.
    learned = [0.0 if stage.is_sft else 1.0 for stage in recipe.stages]
    stage, layout, found = peak_stage(recipe, vocab_size, data_parallel, device=device.type, learned=learned)
    if found.total <= limit:
        return
    helps = remedies(recipe.model, vocab_size, layout, limit)
    one_alone = "any one of these is enough" if helps[0].enough else "no single change is enough; the nearest"
    shown = ", ".join(str(remedy) for remedy in helps[:_SHOWN_REMEDIES])
    raise InputError(
        f"recipe {recipe.name}, stage {stage.name}: a rank needs at least {found.total / GIB:.1f} GiB "
        f"({found.describe()}), and its {'GPU' if device.type == 'cuda' else 'share of this machine'} has "
        f"{limit / GIB:.1f} GiB; {one_alone}: {shown}"
    )


def lines(
    recipe: Recipe,
    vocab_size: int,
    data_parallel: int,
    device: torch.device,
    reaches: Sequence[float],
    blends: Sequence[Mapping[str, Any]],
) -> list[str]:
    """What a run will take, for its log.

    Args:
        recipe: what is about to be run.
        vocab_size: rows of the token table.
        data_parallel: data-parallel ranks.
        device: of this rank.
        reaches: by stage, tokens that a token sees on average.
        blends: by stage, `StageData.blend_report`: how many of its positions are learned.
    """
    learned = [
        blend["counted_tokens"] / max(1, (blend["n_sequences"] - blend["first_sequence"]) * blend["seq_length"])
        for blend in blends
    ]
    stage, layout, found = peak_stage(recipe, vocab_size, data_parallel, device=device.type, learned=learned)
    limit = rank_bytes(device)
    of = "" if limit is None else f" of {limit / GIB:.1f}"
    said = [
        f"memory of the fullest rank, at least {found.total / GIB:.2f}{of} GiB (stage {stage.name}): "
        f"{found.describe()}; {found.parameters / 1e6:.2f} M parameters"
    ]
    if recipe.recompute.mode != "none":
        without = max_rank_memory(recipe.model, vocab_size, replace(layout, recompute=RecomputeConfig()))
        said.append(
            f"recomputation: activations {found.activations / GIB:.3g} GiB, {without.activations / GIB:.3g} without it"
        )
    split = layout.split
    flops = [recipe.model.flops_per_token(reach, vocab_size) for reach in reaches]
    again = [recipe.recompute.flops_per_token(recipe.model, reach, split) for reach in reaches]
    total = sum((a + b) * one.tokens for a, b, one in zip(flops, again, recipe.stages, strict=True))
    each = ", ".join(f"{one.name} {scaled(value)}".strip() for one, value in zip(recipe.stages, flops, strict=True))
    said.append(f"FLOP per token: {each}; of the whole run {scaled(total)}FLOP, recomputation included")
    return said


def stage_lines(recipe: Recipe, blends: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each stage does, for the run's log; `blends` as for :func:`lines`."""
    said = []
    for stage, blend in zip(recipe.stages, blends, strict=True):
        tasks = ", ".join(
            f"{task} {row['realised']:.1%} (asked {row['target']:.1%})" for task, row in blend["by_task"].items()
        )
        ramp = "" if stage.batch_ramp is None else f"{stage.batch_ramp.start} to "
        trained = stage.n_sequences * stage.seq_length
        budget = "" if trained == stage.tokens else f" = {trained:,} tokens, nearest to the {stage.tokens:,} asked for"
        scaled_by = ""
        if stage.lr.reference_batch_tokens is not None:
            factor = stage.lr.batch_factor(stage.global_batch_tokens)
            rule = "" if stage.lr.scale_with_batch == "linear" else "√"
            scaled_by = (
                f" times {rule}(batch / {stage.lr.reference_batch_tokens:,}), {factor:.4g} at the full batch: peak "
                f"{stage.peak_learning_rate:g}"
            )
        said.append(
            f"{stage.name}: {stage.steps} steps × {ramp}{stage.global_batch_tokens} tokens{budget}, seq_length "
            f"{stage.seq_length}, lr {stage.lr.peak:g} → {stage.lr.floor:g}{scaled_by}; {tasks}; "
            f"padding {blend['pad_fraction']:.1%}"
        )
    return said


def scaled(value: float) -> str:
    """A number with its SI prefix, for a unit to follow: `1.23 G`, `5 `."""
    power = max(0, min(7, math.floor(math.log10(max(value, 1.0)) / 3)))
    return f"{value / 1000**power:.3g} {('', 'k', 'M', 'G', 'T', 'P', 'E', 'Z')[power]}"


def machine_bytes() -> float | None:
    """Memory of this machine, or of the control group that this process is in; None where nobody says."""
    found: list[float] = []
    if hasattr(os, "sysconf") and {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= set(os.sysconf_names):
        found.append(float(os.sysconf("SC_PAGE_SIZE")) * os.sysconf("SC_PHYS_PAGES"))
    for path in _CGROUP_LIMITS:
        try:
            text = Path(path).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():  # "max": no limit
            found.append(float(text))
    return min(found, default=None)


def rank_bytes(device: torch.device) -> float | None:
    """Memory that one rank may fill: of its GPU, or its share of this machine among the ranks on it."""
    if device.type == "cuda":
        import torch

        return float(torch.cuda.get_device_properties(device).total_memory)
    machine = machine_bytes()
    return None if machine is None else machine / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
