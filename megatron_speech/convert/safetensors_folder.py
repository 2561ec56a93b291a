"""Folders of safetensors files: read by name, one tensor at a time; written in shards with an index."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_speech.convert.tensors import Slot
from megatron_speech.errors import InputError
from megatron_speech.files import fsync_path, read_json, write_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class TensorEntry:
    """A tensor as the header of its file describes it."""

    name: str
    path: Path
    shape: tuple[int, ...]
    dtype: str
    stored: str
    """Its name in the file, which is another where the parts that wrappers add are left out."""


_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def unwrapped(name: str) -> str:
    """The name of a tensor without the parts that torch.compile, DDP, FSDP and recomputation add to it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


class TensorFolder:
    """The tensors of a Hugging Face folder: all headers are read and checked at once, tensors on demand.

    Args:
        folder: as `save_pretrained` writes it.
        unwrap: read names without the parts that wrappers add (:func:`unwrapped`).

    Raises:
        InputError: there are no safetensors files, one is damaged, the index names what is not there, or transformers
            would read other weights.
    """

    def __init__(self, folder: Path, *, unwrap: bool = False) -> None:
        self.folder, self.unwrap = folder, unwrap
        where = _weight_map(folder)
        names = [SINGLE] if where is None else sorted(set(where.values()))
        self.entries: dict[str, TensorEntry] = {}
        for name in names:
            for entry in self._header(folder / name):
                if entry.name in self.entries:
                    raise InputError(f"tensor {entry.name} is in {self.entries[entry.name].path} and in {entry.path}")
                self.entries[entry.name] = entry
        if where is not None:
            astray = [tensor for tensor, name in where.items() if self._file_of(tensor) != name]
            if astray:
                raise InputError(
                    f"{folder / INDEX}: {astray[0]} is not in {where[astray[0]]}, where the index has it: it is the "
                    f"index of other files; {_without_index(folder)}"
                )

    def _file_of(self, tensor: str) -> str | None:
        entry = self.entries.get(unwrapped(tensor) if self.unwrap else tensor)
        return None if entry is None else entry.path.name

    def _header(self, path: Path) -> Iterator[TensorEntry]:
        with _opened(path) as file:
            for name in file.keys():
                part = file.get_slice(name)
                known = unwrapped(name) if self.unwrap else name
                yield TensorEntry(known, path, tuple(part.get_shape()), part.get_dtype(), name)

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor), file by file; only one tensor is in memory unless the caller keeps it."""
        by_file: dict[Path, list[TensorEntry]] = {}
        for entry in self.entries.values():
            by_file.setdefault(entry.path, []).append(entry)
        for path, entries in by_file.items():
            with _opened(path) as file:
                for entry in entries:
                    yield entry.name, file.get_tensor(entry.stored)

    def tensor(self, name: str) -> Tensor:
        """One tensor."""
        with _opened(self.entries[name].path) as file:
            result: Tensor = file.get_tensor(self.entries[name].stored)
        return result


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Which file each tensor is in, by the index; None for a folder of one file.

    transformers reads `model.safetensors` where it is there, whatever an index says, and other programs the index: a
    folder with both is two models, unless the index names that file alone.
    """
    if (folder / "adapter_config.json").is_file():
        raise InputError(
            f"{folder} holds adapter_config.json: a model and an adapter, which transformers adds to it where peft is "
            "installed; save the merged model (peft's merge_and_unload), or delete that file"
        )
    single, index = folder / SINGLE, folder / INDEX
    if not index.is_file():
        if not single.is_file():
            raise InputError(f"{folder} holds neither {SINGLE} nor {INDEX}; {_what_to_save(folder)}")
        return None
    content = read_json(index, "index of the weights")
    where: Any = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise InputError(f"{index} is no index: it has no weight_map; {_without_index(folder)}")
    named = sorted(set(where.values()))
    outside = [name for name in named if Path(name).name != name]
    if outside:
        raise InputError(f"{index} names {outside[0]!r}, which is not a file of its folder; {_without_index(folder)}")
    missing = [name for name in named if not (folder / name).is_file()]
    if single.is_file() and named != [SINGLE]:
        if missing:
            raise InputError(
                f"{folder} holds {SINGLE} and {INDEX}, and the index is out of date: it names {_some(missing)}, which "
                f"{'does' if len(missing) == 1 else 'do'} not exist; delete {index}"
            )
        raise InputError(
            f"{folder} holds two models: {SINGLE}, which transformers reads, and the files of {INDEX} "
            f"({_some(named)}), which other programs read; delete {single}, or {index}"
        )
    if missing:
        raise InputError(
            f"{index} names {_some(missing)}, which {'does' if len(missing) == 1 else 'do'} not exist; copy the folder "
            "again, or save the model with save_pretrained into an empty one"
        )
    return where


def _without_index(folder: Path) -> str:
    """What helps against an index that is not the files'."""
    if (folder / SINGLE).is_file():
        return f"delete {folder / INDEX}: {SINGLE} is read without"
    return "copy the folder again, or save the model with save_pretrained into an empty one"


def _what_to_save(folder: Path) -> str:
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if shards:
        return f"it holds {_some(shards)}, which need their index; copy {INDEX} too, or save the model again"
    if pickled:
        return (
            f"{pickled[0]} is a pickle, which is not read: load it with transformers and save it with save_pretrained, "
            f"which writes {SINGLE}"
        )
    return "save the model with save_pretrained, which writes them"


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a readable safetensors file ({error}); copy it again") from error


def torch_dtype(name: str) -> torch.dtype | None:
    """The torch type of a safetensors type; None for those that no weight of a model has here."""
    return _DTYPES.get(name)


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB or 200MB (powers of 1000).

    Raises:
        InputError: not of that form.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(KB|MB|GB)", text.strip().upper())
    if match is None or not (size := int(float(match[1]) * _UNITS[match[2]])):
        raise InputError(f"--max-shard-size is {text!r}; needed: a size such as 5GB or 200MB")
    return size


def write_shards(folder: Path, slots: list[Slot], parameters: dict[str, Tensor], max_bytes: int) -> int:
    """Write the model's tensors as safetensors files of at most `max_bytes` (a larger tensor has one of its own).

    One shard is in memory beside the model. Files are synced. Returns how many there are.
    """
    shards: list[list[Slot]] = [[]]
    filled = total = 0
    for slot in slots:
        size = math.prod(slot.shape) * parameters[slot.parameter].element_size()
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(slot)
        filled, total = filled + size, total + size
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {slot.name: slot.taken_from(parameters[slot.parameter]) for slot in shard}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        fsync_path(folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    return len(shards)
