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


class TensorFolder:
    """The tensors of a Hugging Face folder: all headers are read and checked at once, tensors on demand.

    Raises:
        InputError: there are no safetensors files, one is damaged, or the index names what is not there.
    """

    def __init__(self, folder: Path) -> None:
        if (folder / INDEX).is_file():
            index = read_json(folder / INDEX, "index of the weights")
            where: Any = index.get("weight_map") if isinstance(index, dict) else None
            if not isinstance(where, dict) or not where:
                raise InputError(f"{folder / INDEX} is no index: it has no weight_map")
            names = sorted(set(where.values()))
        elif (folder / SINGLE).is_file():
            where, names = None, [SINGLE]
        else:
            raise InputError(
                f"{folder} holds neither {SINGLE} nor {INDEX}; save the model with save_pretrained, which writes them"
            )
        self.entries: dict[str, TensorEntry] = {}
        for name in names:
            for entry in self._header(folder / name):
                if entry.name in self.entries:
                    raise InputError(f"tensor {entry.name} is in {self.entries[entry.name].path} and in {entry.path}")
                self.entries[entry.name] = entry
        if where is not None:
            astray = [tensor for tensor, name in where.items() if self._file_of(tensor) != name]
            if astray:
                raise InputError(f"{folder / INDEX}: {astray[0]} is not in {where[astray[0]]}, where the index has it")

    def _file_of(self, tensor: str) -> str | None:
        entry = self.entries.get(tensor)
        return None if entry is None else entry.path.name

    def _header(self, path: Path) -> Iterator[TensorEntry]:
        with _opened(path) as file:
            for name in file.keys():
                part = file.get_slice(name)
                yield TensorEntry(name, path, tuple(part.get_shape()), part.get_dtype())

    def dtypes(self) -> set[str]:
        """Types of the tensors, as safetensors calls them."""
        return {entry.dtype for entry in self.entries.values()}

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor), file by file; only one tensor is in memory unless the caller keeps it."""
        by_file: dict[Path, list[str]] = {}
        for entry in self.entries.values():
            by_file.setdefault(entry.path, []).append(entry.name)
        for path, names in by_file.items():
            with _opened(path) as file:
                for name in names:
                    yield name, file.get_tensor(name)

    def tensor(self, name: str) -> Tensor:
        """One tensor."""
        with _opened(self.entries[name].path) as file:
            result: Tensor = file.get_tensor(name)
        return result


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist, but the index names it; copy the folder again") from error
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
