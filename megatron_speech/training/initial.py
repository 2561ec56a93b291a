"""Recipe section `init`: a run that begins with the weights of a checkpoint, an imported backbone for instance.

Three ways to go on from a checkpoint:

- continue: a run directory that holds checkpoints goes on from its newest; nothing in the recipe asks for it.
- `init.mode: transfer`: a new run from the weights alone.
- `init.mode: fine-tune`: a new run, with new schedules, data and step 0, from the weights; the first stage's
  `carry_optimizer` decides on the optimizer's moments, as between two stages of one run.

Any parallel layout reads any other's. A run that continues does not read `init` again.
"""

from __future__ import annotations

from typing import Any

from megatron_speech.errors import InputError
from megatron_speech.recipe.init import InitConfig
from megatron_speech.recipe.model import ModelConfig
from megatron_speech.recipe.stage import StageConfig
from megatron_speech.tokens.space import TokenSpace
from megatron_speech.training.checkpoint.load import load_moments, load_weights, open_checkpoint
from megatron_speech.training.checkpoint.store import CheckpointInfo
from megatron_speech.training.optim.optimizer import Optimizer

# Fields of `model` that do not change what the weights mean.
_FREE = ("preset", "init_std", "backend", "max_position_embeddings")


def start_from(
    init: InitConfig, model: ModelConfig, space: TokenSpace, chunks: list[Any]
) -> tuple[CheckpointInfo, str]:
    """Load the weights into this rank's model chunks; returns the checkpoint, and a line for the log. A collective.

    Args:
        init: the recipe's section.
        model: the recipe's shape.
        space: the run's ids.
        chunks: of this rank, as they were built; before the optimizer takes its copies.

    Raises:
        InputError: there is no sound checkpoint, or it has another shape or other ids.
    """
    info, theirs = open_checkpoint(init.checkpoint)
    where = f"init.checkpoint {info.path}"
    if theirs.hash != space.hash:
        raise InputError(
            f"{where} has the token space {theirs.hash}, the run {space.hash}: its rows stand for other ids; train "
            f"with {info.path / 'token_space.json'}, or import the backbone with the run's"
        )
    saved = ModelConfig.model_validate(info.fields["model"])
    for name in ModelConfig.model_fields:
        ours, found = getattr(model, name), getattr(saved, name)
        if name not in _FREE and ours != found:
            raise InputError(
                f"model.{name} is {ours}, but {where} has {found}; leave the section model out of the recipe, or make "
                "it agree"
            )
    load_weights(info, chunks)
    origin = (info.fields.get("source") or {}).get("folder")
    of = f"imported from {origin}" if origin else f"step {info.step} of a run"
    return info, f"{init.mode}: weights from {info.path} ({of}, {info.fields['precision']})"


def carry_moments(
    init: InitConfig, stage: StageConfig, info: CheckpointInfo, *, chunks: list[Any], optimizer: Optimizer
) -> str:
    """Take over the optimizer's moments where the recipe asks for it; returns the rest of the line. A collective.

    Args:
        init: the recipe's section.
        stage: the first one.
        info: the checkpoint that the weights came from.
        chunks, optimizer: of this rank.

    Raises:
        InputError: the checkpoint has not got them.
    """
    if init.mode == "transfer" or not stage.carry_optimizer:
        return "the optimizer starts afresh"
    if missing := load_moments(info, chunks=chunks, optimizer=optimizer):
        raise InputError(
            f"init.checkpoint {info.path} lacks {missing}, which stage {stage.name} would carry over: it holds weights "
            "alone, or was trained with another precision or other frozen parameters; set "
            f"stages.{stage.name}.carry_optimizer: false, or init.mode: transfer"
        )
    return "the optimizer's moments too; schedules, data and steps start at 0"
