"""Checks before the first step: do all processes run the same thing, and has every one what it needs?

Each finding is a sentence that names the rank, its host and what to do. All ranks compare the same gathered facts, so
all of them find the same, and none waits for one that has gone.
"""

from __future__ import annotations

import collections
import hashlib
import os
import platform
import shutil
import statistics
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megatron_speech
from megatron_speech.data.dataset.indexed import TokenDataset
from megatron_speech.environment import OPTIONAL, REQUIRED, installed_version
from megatron_speech.errors import InputError
from megatron_speech.files import canonical_json, sha256_hex
from megatron_speech.recipe.recipe import Recipe
from megatron_speech.tokens.space import TokenSpace
from megatron_speech.training.health.agreement import raise_on_all_ranks
from megatron_speech.training.health.control import Control

_EDGE_BYTES = 4096


class Preflight:
    """The checks of one run. Every method is a collective that raises the same InputError on all ranks.

    Args:
        recipe: what is about to be run.
        control: the run's control group.
        hosts: host of each rank.
        device: of this process.
    """

    def __init__(self, recipe: Recipe, control: Control, hosts: Sequence[str], device: torch.device) -> None:
        self._recipe, self._control, self._hosts, self._device = recipe, control, hosts, device

    def processes(self) -> None:
        """The same versions, code and recipe everywhere; clocks that agree; a collective on the device works."""
        if self._control.world_size == 1:
            return
        self._equal(versions(), "install the same versions on all nodes")
        self._equal(
            {"the recipe": sha256_hex(canonical_json(self._recipe.model_dump(mode="json")))},
            "start all processes with the same recipe and overrides",
        )
        self._control.barrier()
        clocks = self._control.gather([time.time()])[:, 0].tolist()
        with raise_on_all_ranks():
            check_clocks(clocks, self._hosts, self._recipe.preflight.max_clock_skew_seconds)
        total = torch.tensor([self._control.rank + 1.0], device=self._device)
        dist.all_reduce(total)
        with raise_on_all_ranks():
            check_sum(float(total.item()), self._control.world_size, dist.get_backend())

    def data(self, datasets: Mapping[str, TokenDataset], space: TokenSpace) -> None:
        """Every rank reads the same datasets and the same token space."""
        if self._control.world_size == 1:
            return
        facts = {"the token space": space.hash}
        with raise_on_all_ranks():
            for name, dataset in datasets.items():
                facts |= {f"dataset {name}: {file}": fact for file, fact in dataset_facts(dataset).items()}
        self._equal(facts, "let all nodes read the same files; clear data.cache_dir where it holds another version")

    def storage(self, directory: Path, parameters: int) -> None:
        """The run directory is one for all ranks, and has room for the checkpoints that are kept.

        Args:
            directory: the run directory, which exists.
            parameters: of the model, the padded tables included.
        """
        if self._control.world_size > 1:
            (token, *_) = self._control.gather_objects(uuid.uuid4().hex)
            path = directory / f".preflight-{token}"
            if self._control.rank == 0:
                path.touch()
            self._control.barrier()
            seen = self._control.gather_objects(path.exists())
            if self._control.rank == 0:
                path.unlink()
            with raise_on_all_ranks():
                if not all(seen):
                    raise InputError(
                        f"run_dir {directory} is not the same folder on all nodes: "
                        f"{self._name(r for r, there in enumerate(seen) if not there)} cannot see a file that rank 0 "
                        f"on {self._hosts[0]} has just written there; name a folder on storage that all nodes share"
                    )
        with raise_on_all_ranks():
            if self._control.rank == 0:
                check_space(self._recipe, directory, parameters)

    def _equal(self, mine: dict[str, Any], remedy: str) -> None:
        """Raise unless these facts are the same on all ranks that know them (None: this one does not)."""
        gathered = self._control.gather_objects(mine)
        with raise_on_all_ranks():
            for key in gathered[0]:
                values = [facts.get(key) for facts in gathered]
                known = [value for value in values if value is not None]
                if len(set(known)) <= 1:
                    continue
                usual, _ = collections.Counter(known).most_common(1)[0]
                other = next(value for value in known if value != usual)
                odd = [rank for rank, value in enumerate(values) if value == other]
                raise InputError(
                    f"{key} differs between the processes: {self._name(odd)} has {other}, "
                    f"{self._name([values.index(usual)])} has {usual}; {remedy}"
                )

    def _name(self, ranks: Iterable[int]) -> str:
        """`rank 3 on n2`; of many the first three."""
        listed = list(ranks)
        more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
        return ", ".join(f"rank {rank} on {self._hosts[rank]}" for rank in listed[:3]) + more


def versions() -> dict[str, Any]:
    """What has to be the same on all ranks to train the same model. The code is hashed once per node."""
    found: dict[str, Any] = {"Python": platform.python_version(), "CUDA": torch.version.cuda or "none"}
    if torch.cuda.is_available() and dist.get_backend() == "nccl":
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["the kind of GPU"] = torch.cuda.get_device_name()
    found |= {name: installed_version(name) or "not installed" for name in (*REQUIRED, *OPTIONAL)}
    if os.environ.get("LOCAL_RANK", "0") == "0":
        found["the code of megatron_speech"] = code_hash()
    return found


def code_hash() -> str:
    """Hash of the Python files of this package, as they lie there."""
    root = Path(megatron_speech.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def check_clocks(clocks: Sequence[float], hosts: Sequence[str], limit: float) -> None:
    """Raise when a clock (Unix seconds, all read at one moment) is off the median by more than `limit` seconds."""
    median = statistics.median(clocks)
    rank = max(range(len(clocks)), key=lambda r: abs(clocks[r] - median))
    skew = clocks[rank] - median
    if abs(skew) > limit:
        raise InputError(
            f"the clock of rank {rank} on {hosts[rank]} is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} "
            f"the others', and preflight.max_clock_skew_seconds allows {limit:g}; set it (NTP): uploads need it"
        )


def check_sum(total: float, world_size: int, backend: str) -> None:
    """Raise unless `total` is what the sum of rank + 1 over the ranks has to be."""
    needed = world_size * (world_size + 1) / 2
    if total != needed:
        raise InputError(
            f"a sum over the {world_size} ranks with {backend} gave {total:g} instead of {needed:g}: the "
            "network or its library is broken; run its own test (nccl-tests) on these nodes"
        )


def dataset_facts(dataset: TokenDataset) -> dict[str, str]:
    """Size and the first and last 4 KiB of a dataset's files: as good as equal when these are.

    Raises:
        InputError: a file cannot be read.
    """
    facts = {}
    size = dataset.total_tokens * dataset.dtype.itemsize
    ends = dataset.read_bin(0, _EDGE_BYTES) + dataset.read_bin(max(0, size - _EDGE_BYTES), _EDGE_BYTES)
    facts[f"{Path(dataset.prefix).name}.bin"] = f"{size} bytes, SHA-256 of its ends {sha256_hex(ends)[:16]}"
    for suffix in (".idx", ".manifest.json"):
        path = Path(f"{dataset.prefix}{suffix}")
        try:
            with open(path, "rb") as handle:
                size = os.fstat(handle.fileno()).st_size
                head = handle.read(_EDGE_BYTES)
                handle.seek(max(0, size - _EDGE_BYTES))
                tail = handle.read()
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}; check the path and its rights") from error
        facts[path.name] = f"{size} bytes, SHA-256 of its ends {sha256_hex(head + tail)[:16]}"
    return facts


def checkpoint_bytes(recipe: Recipe, parameters: int) -> int:
    """Bytes of a checkpoint: weights, fp32 masters where weights are not fp32, two moments, the moving average."""
    weights = 4 if recipe.precision == "fp32" else 2 + 4
    return parameters * (weights + 8 + (4 if recipe.ema is not None else 0))


def check_space(recipe: Recipe, directory: Path, parameters: int) -> None:
    """Raise when the disk of the run directory has no room for what a run keeps besides milestones.

    That is `checkpoint.keep_last`, the best one and the one being written, less what lies there already.
    """
    size, count = checkpoint_bytes(recipe, parameters), recipe.checkpoint.keep_last + 2
    there = sum(1 for path in (directory / "checkpoints").glob("step_*") if path.is_dir())
    needed, free = max(1, count - there) * size, shutil.disk_usage(directory).free
    if free < needed:
        raise InputError(
            f"run_dir {directory}: {free / 2**30:.1f} GiB are free, and {max(1, count - there)} more checkpoints of "
            f"{size / 2**30:.1f} GiB need {needed / 2**30:.1f}; free some space, name another disk, or lower "
            "checkpoint.keep_last"
        )
