"""A Hugging Face folder → a checkpoint of weights, tensor by tensor.

One tensor of the file is in memory beside the model, which has the type of the file: bf16 stays bf16, and every row
and matrix of the file is in the checkpoint bit by bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megatron_speech.convert import probe, tensors
from megatron_speech.convert.architectures import read_config
from megatron_speech.convert.new_rows import NewRows, draw_rows
from megatron_speech.convert.safetensors_folder import SINGLE, TensorFolder, torch_dtype, unwrapped
from megatron_speech.convert.tensors import Slot, slots
from megatron_speech.convert.vocabulary import check_vocabulary
from megatron_speech.errors import InputError
from megatron_speech.model.builder import build_model, global_named_parameters
from megatron_speech.parallel import groups
from megatron_speech.recipe.model import ModelConfig
from megatron_speech.tokens.space import TokenSpace
from megatron_speech.training.checkpoint.save import save_weights

_SHOWN = 3
_ROUNDING = {"BF16": (2**-7, 0.0), "F16": (2**-10, 1e-7)}  # relative, absolute
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
        probe: what was compared of the logits, or why nothing was; "" if nobody asked.
    """

    model: ModelConfig
    precision: str
    tensors: int
    rows: int
    new_rows: int
    vocabulary: str
    probe: str


def import_hf(
    folder: Path,
    token_space: Path,
    output: Path,
    *,
    new_rows: NewRows = "covariance",
    seed: int = 0,
    precision: Literal["fp32", "bf16"] | None = None,
    unwrap: bool = False,
    compare_logits: bool = True,
) -> Imported:
    """Write the checkpoint `output` with the weights of `folder` and the ids of `token_space`.

    Args:
        folder: config.json and safetensors files, as `save_pretrained` writes them.
        token_space: file; its first ids must be the backbone's.
        output: directory that does not exist yet.
        new_rows: how the rows of ids are drawn that the backbone does not have (:mod:`new_rows`).
        seed: of that draw.
        precision: of the checkpoint; None: as the file has it.
        unwrap: the names of tensors have parts that wrappers added, such as `_orig_mod`, which are left out.
        compare_logits: with those of transformers, where it is installed and memory suffices (:mod:`probe`).

    Raises:
        InputError: the folder is damaged, incomplete or of another model, a weight is not finite, the ids do not go
            together, or transformers computes something else.
    """
    if output.exists():
        raise InputError(f"--output {output} exists; name a directory that does not, or remove it")
    if not folder.is_dir():
        raise InputError(f"--input {folder} is no folder; name one with config.json and model.safetensors")
    space = TokenSpace.load(token_space)
    model, config = read_config(folder)
    rows = int(config["vocab_size"])
    if config.get("transformers_weights") not in (None, SINGLE):
        raise InputError(
            f"{folder / 'config.json'}: transformers_weights is {config['transformers_weights']!r}, which transformers "
            f"reads in place of {SINGLE}; supported: {SINGLE} or its index"
        )
    weights = TensorFolder(folder, unwrap=unwrap)
    wanted = slots(model, rows)
    copies = _check_names(folder, model, weights, wanted)
    ignored = _check_frequencies(folder, model, weights)
    kept = precision or _precision(folder, weights)
    trained, compared = check_vocabulary(space, str(token_space), folder, rows)
    sizes = [math.prod(slot.shape) for slot in wanted]
    theirs: probe.ReferenceLogits | str = ""
    if compare_logits and unwrap:
        theirs = "transformers does not read these names of tensors"
    elif compare_logits:
        theirs = probe.reference(
            folder,
            config["architectures"][0],
            config,
            precision=kept,
            trained=trained,
            parameters=sum(sizes),
            largest=max(sizes),
        )

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
            if name not in copies and name not in ignored:
                slot = by_name[name]
                slot.read_into(parameters[slot.parameter], tensor)
                _check_finite(weights, name, slot.view(parameters[slot.parameter]), kept)
        for name in copies:
            _check_copy(folder, name, weights.tensor(name), parameters[_TABLES[0]][:rows])
        for table in _TABLES:
            if table in parameters and space.size > rows:
                whole = parameters[table]
                draw_rows(whole[:trained], whole[rows : space.size], kind=new_rows, seed=seed, name=table)
    if isinstance(theirs, probe.ReferenceLogits):
        seen = probe.compare(built, theirs, folder)
    else:
        seen = theirs and f"logits were not compared with those of transformers: {theirs}"
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
    return Imported(model, kept, len(weights.entries), rows, space.size - rows, compared, seen)


_TABLES = ("embedding.word_embeddings.weight", "output_layer.weight")


def _check_names(folder: Path, model: ModelConfig, weights: TensorFolder, wanted: list[Slot]) -> set[str]:
    """Refuse a file that lacks a tensor, has one too many, or one of another shape or type; returns tied copies."""
    names = {slot.name for slot in wanted}
    if missing := sorted(names - weights.entries.keys()):
        if advice := _other_names(weights, names):
            raise InputError(f"{folder} {advice}")
        raise InputError(f"{folder} lacks {_listed(missing)}, which config.json's model has; copy the folder again")
    copies = {tensors.HEAD} & weights.entries.keys() if model.tie_embeddings else set()
    if extra := sorted(name for name in weights.entries.keys() - names - copies if not _is_frequencies(name)):
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


def _other_names(weights: TensorFolder, names: set[str]) -> str | None:
    """What became of the names of all tensors, and what helps; None where that is not clear."""
    found = sorted(name for name in weights.entries if not _is_frequencies(name))
    clear = [unwrapped(name) for name in found]
    if names <= set(clear) and len(set(clear)) == len(clear):
        wrapped = next(name for name in found if unwrapped(name) != name)
        return (
            f"was saved from a wrapped model: it has {wrapped} for {unwrapped(wrapped)}, and transformers would not "
            "find it; import it with --unwrap, or save the model inside the wrapper (model._orig_mod of torch.compile, "
            "model.module of DDP and FSDP) with save_pretrained"
        )
    if any(".lora_A." in name or name.startswith("base_model.model.") for name in found):
        return (
            f"holds an adapter and not a model ({found[0]}); merge it into its model (peft's merge_and_unload) and "
            "save that with save_pretrained"
        )
    return None


def _is_frequencies(name: str) -> bool:
    """Whether it is a buffer of rotary frequencies, which older versions of transformers saved."""
    return name.endswith("rotary_emb.inv_freq")


def _check_frequencies(folder: Path, model: ModelConfig, weights: TensorFolder) -> set[str]:
    """The buffers of rotary frequencies; they are not read, but must be those of config.json."""
    names = {name for name in weights.entries if _is_frequencies(name)}
    ours = model.inverse_frequencies()
    for name in sorted(names):
        found = weights.tensor(name).float()
        # Rounded to the type of the weights; small ones are subnormal numbers in fp16.
        relative, absolute = _ROUNDING.get(weights.entries[name].dtype, (1e-5, 0.0))
        if found.shape != ours.shape or not torch.allclose(found, ours, rtol=relative, atol=absolute):
            raise InputError(
                f"{weights.entries[name].path}: {name} is not what follows from the rotary base {model.rope_base:g} "
                f"{'and scaling ' if model.rope_scaling else ''}of config.json; transformers ignores it and goes by "
                "config.json: correct rope_theta and the scaling there, or, if they are right, take the tensor out"
            )
    return names


def _check_finite(weights: TensorFolder, name: str, part: Tensor, precision: str) -> None:
    if not torch.isfinite(part).all():
        bad = int(part.numel() - torch.isfinite(part).sum())
        entry = weights.entries[name]
        raise InputError(
            f"{entry.path}: {entry.stored} has {bad:,} of {part.numel():,} values that are not finite in {precision}: "
            "the model was saved after its training had failed, or the file is damaged; take an earlier one"
        )


def _precision(folder: Path, weights: TensorFolder) -> Literal["fp32", "bf16"]:
    found = {entry.dtype for name, entry in weights.entries.items() if not _is_frequencies(name)}
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
        f"drawn; {found.vocabulary}{'; ' * bool(found.probe)}{found.probe}"
    )
