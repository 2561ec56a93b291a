"""Recipe section `init`: a run that begins with the weights of a checkpoint, an imported backbone for instance."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from megatron_speech.errors import InputError
from megatron_speech.files import read_json
from megatron_speech.recipe.base import StrictConfig
from megatron_speech.remote import fetch_checkpoint, is_url

if TYPE_CHECKING:
    pass


class InitConfig(StrictConfig):
    """Recipe section `init`: where the weights of step 0 come from."""

    checkpoint: str = Field(
        min_length=1,
        description="a checkpoint, a run directory for its newest, or a URL; the section `model` is left out, or "
        "agrees; null drops the section",
    )
    mode: Literal["transfer", "fine-tune"] = Field(
        default="transfer",
        description="transfer: weights alone; fine-tune: the optimizer's moments too, if stages.0.carry_optimizer",
    )


def fill_model(values: dict[Any, Any], source: str) -> None:
    """Complete the section `model` of a recipe from the checkpoint that `init` names, in place.

    A section with a preset or with layers is complete and is left as it is; `start_from` compares it.

    Args:
        values: the recipe, not checked yet.
        source: its file, for errors.

    Raises:
        InputError: there is no such checkpoint.
    """
    init, model = values.get("init"), values.get("model")
    if not isinstance(init, dict) or not isinstance(init.get("checkpoint"), str):
        return
    if model is not None and (not isinstance(model, dict) or model.get("preset") or model.get("num_layers")):
        return
    path = fetch_checkpoint(init["checkpoint"]) if is_url(init["checkpoint"]) else Path(init["checkpoint"])
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = [path] if (path / "checkpoint.json").is_file() else sorted(folder.glob("step_*/checkpoint.json"))
    if not found:
        raise InputError(
            f"recipe {source}: init.checkpoint {path} holds no checkpoint; name a run directory, one of its "
            "checkpoints, or what `megatron-speech convert import-hf` wrote"
        )
    described = found[0] if found[0].is_dir() else found[-1].parent
    fields = read_json(described / "checkpoint.json", "checkpoint description")
    values["model"] = {**fields["model"], **{key: value for key, value in (model or {}).items() if value is not None}}
