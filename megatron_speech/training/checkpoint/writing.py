"""How a checkpoint reaches the disk, in two halves.

    plan_save   in the training step, on every rank: who writes which shard; this rank's shards copied to host memory
    write_save  at any time after it, on every rank, in any thread: written and hashed in one pass, synced,
                described, renamed

The second half uses its own process group, or it would mix its messages with those of the training step.
The format is megatron-core's torch_dist; its own writer starts processes for each save, which this one does not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    distribute_main_replicas_with_precomputed_distribution,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from megatron_speech.files import fsync_path, write_json
from megatron_speech.recipe.recipe import Recipe
from megatron_speech.tokens.space import TokenSpace
from megatron_speech.training.checkpoint.contents import METADATA, quiet
from megatron_speech.training.checkpoint.store import FORMAT_VERSION
from megatron_speech.training.optim.ranges import Range, write_items


class HostBuffers:
    """Host memory that a save copies this rank's shards into, and the next one again: pinned where there is a GPU.

    The copies of a GPU's tensors run on a stream of their own. They may be read after `wait_for_copies`, and the
    tensors changed by what the training stream does after `block_training_stream`.
    """

    def __init__(self) -> None:
        self._buffers: dict[MetadataIndex, torch.Tensor] = {}
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None

    def copy(self, tensors: dict[MetadataIndex, torch.Tensor]) -> dict[MetadataIndex, torch.Tensor]:
        """Copies of `tensors`; those of a GPU's are still under way. Copies of an earlier call are overwritten."""
        self._buffers = {
            index: buffer
            for index, buffer in self._buffers.items()
            if index in tensors and tensors[index].shape == buffer.shape and tensors[index].dtype == buffer.dtype
        }
        on_gpu = any(tensor.is_cuda for tensor in tensors.values())
        stream = (self._stream or torch.cuda.Stream()) if on_gpu else None
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
            for index, tensor in tensors.items():
                if index not in self._buffers:
                    self._buffers[index] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._buffers[index].copy_(tensor, non_blocking=True)
                if stream is not None and tensor.is_cuda:
                    tensor.record_stream(stream)
        if stream is not None:
            self._stream, self._copied = stream, stream.record_event()
        return self._buffers

    def block_training_stream(self) -> None:
        """Before tensors that were copied are changed: the GPU's next work waits for the copies, the host does not."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)

    def wait_for_copies(self) -> None:
        """Before the copies are read: wait, on the host, until they are there."""
        if self._copied is not None:
            self._copied.synchronize()


class Sharing:
    """Which data-parallel rank writes which of the shards that several hold: evenly, agreed on once.

    Computed again when the state of any rank has changed its shape, as when weights are frozen or a stage drops its
    moments; then the shards are also checked to make up every tensor exactly once.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """`group`: of all ranks, what they agree over; None: the default one."""
        self._group = group
        self._signature: object = None
        self._distribution: Any = None

    def apply(self, sharded: ShardedStateDict, common: dict[str, Any]) -> None:
        """Mark, in place, what this rank writes. A collective."""
        signature = [
            (base.key, base.global_offset, base.local_shape, str(base.dtype), base.replica_id)
            for base in nested_values(sharded)
            if hasattr(base, "local_shape")
        ]
        changed = _any_rank(signature != self._signature, self._group)
        data_parallel = parallel_state.get_data_parallel_group(with_context_parallel=True)
        if changed:
            self._distribution = determine_main_replica_uniform_distribution(sharded, data_parallel)
            self._signature = signature
        distribute_main_replicas_with_precomputed_distribution(sharded, data_parallel, self._distribution)
        if changed:
            validate_sharding_integrity(determine_global_metadata(sharded)[1], common_state_dict=common)


@dataclass
class PlannedSave:
    """This rank's part of a checkpoint, apart from the model: training may continue."""

    plan: SavePlan
    planner: MCoreSavePlanner
    data: dict[MetadataIndex, torch.Tensor | io.BytesIO]
    common: bytes
    buffers: HostBuffers | None

    @property
    def bytes(self) -> int:
        """Size of this rank's shards."""
        return sum(value.nbytes for value in self.data.values() if isinstance(value, torch.Tensor))

    def resolve_data(self, item: WriteItem) -> torch.Tensor | io.BytesIO:
        """What the writer asks a planner for."""
        return self.data[item.index]


def plan_save(
    contents: ShardedStateDict, sharing: Sharing, buffers: HostBuffers | None, ranges: Sequence[Range] = ()
) -> PlannedSave:
    """Find out what this rank writes, and take it out of the model's hands. A collective.

    Args:
        contents: see :mod:`.contents`; small state in it is equal on all ranks.
        sharing: of all saves of this run.
        buffers: where the shards are copied to; None: the save reads the model's own, which must not change until
            it has been written.
        ranges: of flattened parameters, what this rank's optimizer holds.
    """
    contents["content_metadata"] = dict(METADATA)  # what megatron-core looks up when it loads
    with quiet():
        sharded, common = save_preprocess(contents, validate_access_integrity=False)
        sharing.apply(sharded, common)
        main_replicas, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, True)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        planner.set_up_planner(mcore_to_pyt_state_dict(main_replicas, False), is_coordinator=dist.get_rank() == 0)
        plan = planner.create_local_plan()
        data: dict[MetadataIndex, Any] = {item.index: planner.resolve_data(item) for item in plan.items}
        items, values = write_items(ranges)
        plan = dataclasses.replace(plan, items=[*plan.items, *items])
        data.update(values)
    tensors = {item.index: data[item.index] for item in plan.items if item.type != WriteItemType.BYTE_IO}
    if buffers is not None:
        data.update(buffers.copy(tensors))
        planner.state_dict = {}  # the model's own tensors are not held on to
    serialized = io.BytesIO()
    torch.save(common, serialized)
    return PlannedSave(plan, planner, data, serialized.getvalue(), buffers)


def write_save(
    save: PlannedSave,
    final: Path,
    *,
    described: dict[str, Any],
    space: TokenSpace,
    recipe: Recipe | None,
    group: dist.ProcessGroup | None,
) -> str | None:
    """Write the directory `final`: all of it in a hidden one beside it, then renamed. A collective over `group`.

    Args:
        save: this rank's part.
        described: checkpoint.json, without what is known only when the files are written.
        space, recipe: saved beside the weights.
        group: of all ranks, used by nothing else meanwhile; None: the default one.

    Returns:
        Why it could not be written, the same on all ranks (a full disk; nothing of it is left), or None.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    building = final.parent / f".{final.name}.tmp"
    files = _HashingFiles()
    results: list[WriteResult] = []
    plan = save.plan
    problem: str | None = None
    writer = FileSystemWriter(building, sync_files=False, per_thread_copy_ahead=0)
    writer.fs, writer.save_id = files, final.name
    try:
        building.mkdir(parents=True, exist_ok=True)
        if save.buffers is not None:
            save.buffers.wait_for_copies()
        plan = writer.prepare_global_plan([plan] * world)[rank]  # names this rank's file
        if plan.items:
            results = writer.write_data(plan, cast(MCoreSavePlanner, save)).value()  # resolves data, no more
    except OSError as error:
        problem = _sentence(error)
    parts = _gather((problem, plan, results, files.written), group)
    if rank == 0:
        assert parts is not None
        problem = next((part[0] for part in parts if part[0]), None)
        try:
            if problem is None:
                _, metadata = save.planner.create_global_plan([part[1] for part in parts])
                writer.finish(metadata, [part[2] for part in parts])
                written = {name: entry for part in parts for name, entry in part[3].items()}
                _finish(building, final, save.common, written, described, space, recipe)
        except OSError as error:
            problem = _sentence(error)
        if problem is not None:
            shutil.rmtree(building, ignore_errors=True)
    return _broadcast(problem, group)


def _finish(
    building: Path,
    final: Path,
    common: bytes,
    written: dict[str, Any],
    described: dict[str, Any],
    space: TokenSpace,
    recipe: Recipe | None,
) -> None:
    """What rank 0 adds once all shards are on the disk, and the name."""
    (building / "common.pt").write_bytes(common)
    save_config(CheckpointingConfig("torch_dist", 1), str(building))
    if recipe is not None:
        recipe.save(building / "recipe.yaml")
    space.save(building / "token_space.json")
    for path in building.iterdir():
        if path.name not in written:
            data = path.read_bytes()
            fsync_path(path)
            written[path.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_json(
        building / "checkpoint.json",
        {
            **described,
            "format_version": FORMAT_VERSION,
            "token_space_hash": space.hash,
            "codec": {"name": space.codec.name, "hash": space.codec.hash},
            "files": dict(sorted(written.items())),
        },
    )
    fsync_path(building)
    if final.exists():  # one that was skipped on resume, or that a rollback discarded
        replaced = final.parent / f".{final.name}.replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
        shutil.rmtree(replaced)
    os.rename(building, final)
    fsync_path(final.parent)


class _HashingFiles(FileSystem):
    """Files whose size and SHA-256 are known when they are closed: `written`, by name. They are synced to the disk."""

    def __init__(self) -> None:
        self.written: dict[str, dict[str, Any]] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with open(path, mode) as handle:
            stream = _HashingStream(handle)
            yield stream
            if stream.error is not None:
                raise stream.error
            handle.flush()
            os.fsync(handle.fileno())
            # Read back, it shall come from the disk; and the datasets' pages are worth more in memory than these.
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        name = Path(path).name
        if not name.endswith(".tmp"):  # of .metadata, which is renamed and then hashed with the other small files
            self.written[name] = {"bytes": stream.size, "sha256": stream.digest.hexdigest()}


class _HashingStream(io.RawIOBase):
    """Passes on what is written. After an error it swallows the rest: torch's writer would hide what went wrong."""

    def __init__(self, handle: IO[bytes]) -> None:
        self.digest = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None
        self._handle = handle

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.size

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if self.error is None:
            try:
                self._handle.write(view)
            except OSError as error:
                self.error = error
        self.digest.update(view)
        self.size += len(view)
        return len(view)

    def flush(self) -> None:
        """Nothing to do before the end."""

    def close(self) -> None:
        """The file is closed by its owner."""


def _sentence(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"


def _any_rank(value: bool, group: dist.ProcessGroup | None) -> bool:
    """Whether it is true on any rank. A collective over `group`."""
    if dist.get_world_size() == 1:
        return value
    answers: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(answers, value, group=group)
    return any(answers)


def _gather(value: Any, group: dist.ProcessGroup | None) -> list[Any] | None:
    """Everybody's value on rank 0, None elsewhere. A collective over `group`."""
    if dist.get_world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values, dst=0, group=group)
    return values


def _broadcast(value: Any, group: dist.ProcessGroup | None) -> Any:
    """Rank 0's value. A collective over `group`."""
    if dist.get_world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=group)
    return values[0]
