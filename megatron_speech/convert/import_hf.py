"""A Hugging Face folder → a checkpoint of weights, tensor by tensor.

One tensor of the file is in memory beside the model, which has the type of the file: bf16 stays bf16, and every row
and matrix of the file is in the checkpoint bit by bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megatron_speech.convert import tensors
from megatron_speech.convert.architectures import read_config
from megatron_speech.convert.new_rows import NewRows, draw_rows
from megatron_speech.convert.safetensors_folder import TensorFolder, torch_dtype
from megatron_speech.convert.tensors import Slot, slots
from megatron_speech.convert.vocabulary import check_vocabulary
from megatron_speech.errors import InputError
from megatron_speech.model.builder import build_model, global_named_parameters
from megatron_speech.parallel import groups
from megatron_speech.recipe.model import ModelConfig
from megatron_speech.tokens.space import TokenSpace
from megatron_speech.training.checkpoint.save import save_weights

_SHOWN = 3
_PRECISION: dict[str, Literal["fp32", "bf16"]] = {"F32": "fp32", "BF16": "bf16"}


@dataclass(frozen=True)
class Imported:
    """What an import did.

    Attributes:
        model: shape.
        precision: of the checkpoint.
        tensors: of the folder, all of them.
        rows: ids that the backbone had.
        new_rows: ids that were drawn.
        vocabulary: what was compared of the tokenizers.
    """

    model: ModelConfig
    precision: str
    tensors: int
    rows: int
    new_rows: int
    vocabulary: str


def import_hf(
    folder: Path,
    token_space: Path,
    output: Path,
    *,
    new_rows: NewRows = "covariance",
    seed: int = 0,
    precision: Literal["fp32", "bf16"] | None = None,
) -> Imported:
    """Write the checkpoint `output` with the weights of `folder` and the ids of `token_space`.

    Args:
        folder: config.json and safetensors files, as `save_pretrained` writes them.
        token_space: file; its first ids must be the backbone's.
        output: directory that does not exist yet.
        new_rows: how the rows of ids are drawn that the backbone does not have (:mod:`new_rows`).
        seed: of that draw.
        precision: of the checkpoint; None: as the file has it.

    Raises:
        InputError: the folder is damaged, incomplete or of another model, or the ids do not go together.
    """
    if output.exists():
        raise InputError(f"--output {output} exists; name a directory that does not, or remove it")
    if not folder.is_dir():
        raise InputError(f"--input {folder} is no folder; name one with config.json and model.safetensors")
    space = TokenSpace.load(token_space)
    model, config = read_config(folder)
    rows = int(config["vocab_size"])
    weights = TensorFolder(folder)
    wanted = slots(model, rows)
    copies = _check_names(folder, model, weights, wanted)
    kept = precision or _precision(folder, weights)
    trained, compared = check_vocabulary(space, str(token_space), folder, rows)

    if not torch.distributed.is_initialized():
        groups.initialize()
    (built,) = build_model(
        model,
        space.padded_size,
        precision=kept,
        max_sequence_length=int(config["max_position_embeddings"]),
        seed=None,
        valid_vocab_size=space.size,
        backend="torch",
    )
    parameters = dict(global_named_parameters(built))
    by_name = {slot.name: slot for slot in wanted}
    with torch.no_grad():
        for name, tensor in weights.read():
            if name not in copies:
                by_name[name].read_into(parameters[by_name[name].parameter], tensor)
        for name in copies:
            _check_copy(folder, name, weights.tensor(name), parameters[_TABLES[0]][:rows])
        for table in _TABLES:
            if table in parameters and space.size > rows:
                whole = parameters[table]
                draw_rows(whole[:trained], whole[rows : space.size], kind=new_rows, seed=seed, name=table)
    save_weights(
        output,
        space=space,
        model=model,
        precision=kept,
        max_seq_length=int(config["max_position_embeddings"]),
        chunks=[built],
        fields={
            "source": {
                "folder": str(folder.resolve()),
                "architecture": config["architectures"][0],
                "rows": rows,
                "new_rows": {"kind": new_rows, "seed": seed, "count": space.size - rows},
            }
        },
    )
    return Imported(model, kept, len(weights.entries), rows, space.size - rows, compared)


_TABLES = ("embedding.word_embeddings.weight", "output_layer.weight")


def _check_names(folder: Path, model: ModelConfig, weights: TensorFolder, wanted: list[Slot]) -> set[str]:
    """Refuse a file that lacks a tensor, has one too many, or one of another shape or type; returns tied copies."""
    names = {slot.name for slot in wanted}
    if missing := sorted(names - weights.entries.keys()):
        raise InputError(f"{folder} lacks {_listed(missing)}, which config.json's model has; copy the folder again")
    copies = {tensors.HEAD} & weights.entries.keys() if model.tie_embeddings else set()
    if extra := sorted(weights.entries.keys() - names - copies):
        raise InputError(
            f"{folder} has {_listed(extra)}, which a model of its config.json does not have: it is another model, and "
            "what it computes would be lost"
        )
    for slot in wanted:
        found = weights.entries[slot.name]
        if found.shape != slot.shape:
            raise InputError(
                f"{found.path}: {slot.name} is of shape {list(found.shape)}, config.json needs {list(slot.shape)}"
            )
        if torch_dtype(found.dtype) is None:
            raise InputError(f"{found.path}: {slot.name} is of type {found.dtype}; needed: F32, BF16 or F16")
    return copies


def _precision(folder: Path, weights: TensorFolder) -> Literal["fp32", "bf16"]:
    found = weights.dtypes()
    if len(found) == 1 and (name := next(iter(found))) in _PRECISION:
        return _PRECISION[name]
    raise InputError(
        f"{folder} has weights of type {' and '.join(sorted(found))}; a checkpoint is fp32 or bf16: choose with "
        "--precision"
    )


def _check_copy(folder: Path, name: str, tensor: Tensor, table: Tensor) -> None:
    if not torch.equal(tensor.to(table.dtype), table.cpu()):
        raise InputError(
            f"{folder}: {name} differs from {tensors.EMBEDDING}, but config.json ties them; set tie_word_embeddings to "
            "false there if the head is its own"
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def describe(found: Imported, output: Path) -> str:
    """One sentence for the console."""
    return (
        f"{output}: {found.tensors} tensors in {found.precision}, {found.rows:,} rows kept and {found.new_rows:,} "
        f"drawn; {found.vocabulary}"
    )
