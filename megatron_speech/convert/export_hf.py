"""A checkpoint → a folder that `transformers` loads and that gives the same logits."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_speech.convert.architectures import architecture_of, write_config
from megatron_speech.convert.export_guide import write_guide
from megatron_speech.convert.export_tokenizer import write_tokenizer
from megatron_speech.convert.safetensors_folder import write_shards
from megatron_speech.convert.tensors import slots
from megatron_speech.errors import InputError
from megatron_speech.files import fsync_path, write_json
from megatron_speech.model.builder import build_model, global_named_parameters
from megatron_speech.parallel import groups
from megatron_speech.recipe.model import ModelConfig
from megatron_speech.recipe.precision import Precision
from megatron_speech.training.checkpoint.load import load_weights, open_checkpoint


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        architecture: of the folder.
        dtype: of its weights.
        tensors, shards: how many.
        rows: of its tables: the ids of the token space, without the padding.
        tokenizer: what was written of it.
        max_position, trained: longest sequence that the folder is for, and that the checkpoint's run had, in tokens.
    """

    architecture: str
    dtype: str
    tensors: int
    shards: int
    rows: int
    tokenizer: str
    max_position: int
    trained: int


def export_hf(
    checkpoint: Path,
    output: Path,
    *,
    max_shard_bytes: int = 4 * 10**9,
    ema: bool = False,
    max_position: int | None = None,
) -> Exported:
    """Write the model of `checkpoint` as the Hugging Face folder `output`, whole or not at all.

    Args:
        checkpoint: a checkpoint, or a run directory for its newest; of any parallel layout.
        output: folder that does not exist yet.
        max_shard_bytes: of a safetensors file.
        ema: the moving average of the weights instead.
        max_position: `max_position_embeddings` of the folder, in tokens. None: what the backbone was for
            (`model.max_position_embeddings`), or the run's longest sequence if that is longer or all that is known.

    Raises:
        InputError: there is no sound checkpoint, or no Hugging Face architecture computes what it does.
    """
    if output.exists():
        raise InputError(f"--output {output} exists; name a folder that does not, or remove it")
    if max_position is not None and max_position < 1:
        raise InputError(f"--max-position-embeddings is {max_position}; needed: 1 or more, in tokens")
    info, space = open_checkpoint(checkpoint)
    model = ModelConfig.model_validate(info.fields["model"])
    architecture = architecture_of(model)
    trained = int(info.fields["max_seq_length"])
    longest = max_position or max(trained, model.max_position_embeddings or 0)
    precision: Precision = "fp32" if info.fields["precision"] == "fp32" else "bf16"  # parameters of fp8 are bf16
    if not torch.distributed.is_initialized():
        groups.initialize()
    chunks = build_model(
        model,
        space.padded_size,
        precision=precision,
        max_sequence_length=trained,
        seed=None,
        valid_vocab_size=space.size,
        backend="torch",
    )
    load_weights(info, chunks, ema=ema)
    parameters = {name: parameter.detach() for name, parameter in global_named_parameters(chunks[0])}
    wanted = slots(model, space.size)
    dtype = "float32" if precision == "fp32" else "bfloat16"

    building = output.parent / f".{output.name}.tmp"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        shards = write_shards(building, wanted, parameters, max_shard_bytes)
        config = write_config(
            model, vocab_size=space.size, dtype=dtype, max_position=longest, special_ids=space.special_ids
        )
        write_json(building / "config.json", config)
        written, names = write_tokenizer(building, space, longest, architecture)
        write_guide(building, space, names, architecture=architecture, max_position=longest, trained=trained)
        space.save(building / "token_space.json")
        for path in building.iterdir():
            fsync_path(path)
        fsync_path(building)
        os.rename(building, output)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    fsync_path(output.parent)
    return Exported(architecture, dtype, len(wanted), shards, space.size, written, longest, trained)


def describe(found: Exported, output: Path) -> str:
    """One sentence for the console."""
    files = "one file" if found.shards == 1 else f"{found.shards} files"
    return (
        f"{output}: {found.architecture}, {found.tensors} tensors in {found.dtype} in {files}, {found.rows:,} rows; "
        f"{found.tokenizer}; for up to {found.max_position:,} tokens (this run's sequences had {found.trained:,}); "
        f"speak.py and README.md say how it speaks"
    )
