"""How a checkpoint reaches the disk, in two halves.

    plan_save   in the training step, on every rank: who writes which shard; this rank's shards copied to host memory
    write_save  at any time after it, on every rank, in any thread: written and hashed in one pass, synced,
                described, renamed

The second half uses its own process group, or it would mix its messages with those of the training step.
The format is megatron-core's torch_dist. The save itself is `torch.distributed.checkpoint.save`, given a planner and a
writer of ours: megatron-core's own writer starts processes for each save, which a killed run would leave behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, ShardedStateDict, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    distribute_main_replicas_with_precomputed_distribution,
)
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, mcore_to_pyt_state_dict
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity
from torch.distributed import checkpoint
from torch.distributed.checkpoint import CheckpointException, DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

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
    data: dict[MetadataIndex, torch.Tensor | io.BytesIO]
    common: bytes
    buffers: HostBuffers | None

    @property
    def bytes(self) -> int:
        """Size of this rank's shards."""
        return sum(value.nbytes for value in self.data.values() if isinstance(value, torch.Tensor))


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
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        state = mcore_to_pyt_state_dict(_written_here(sharded), False)
        planner.set_up_planner(state, is_coordinator=dist.get_rank() == 0)
        plan = planner.create_local_plan()
        data: dict[MetadataIndex, Any] = {item.index: planner.resolve_data(item) for item in plan.items}
        items, values = write_items(ranges)
        plan = dataclasses.replace(plan, items=[*plan.items, *items])
        data.update(values)
    tensors = {item.index: data[item.index] for item in plan.items if item.type != WriteItemType.BYTE_IO}
    if buffers is not None:
        data.update(buffers.copy(tensors))
    serialized = io.BytesIO()
    torch.save(common, serialized)
    return PlannedSave(plan, data, serialized.getvalue(), buffers)


def _written_here(sharded: ShardedStateDict) -> dict[str, list[ShardedBase]]:
    """The shards that this rank writes, by key, in the order of the model."""
    by_key: dict[str, list[ShardedBase]] = {}
    for base in nested_values(sharded):
        if is_main_replica(base.replica_id):
            key = base.unique_key if isinstance(base, ShardedObject) else base.key
            by_key.setdefault(key, []).append(base)
    return by_key


@dataclass(frozen=True)
class SaveProblem:
    """Why a checkpoint was not written.

    Attributes:
        reason: what a sentence ends with.
        not_finite: its weights, moments or averages hold NaN or infinity: it would be no place to go on from.
    """

    reason: str
    not_finite: bool = False


class _NotFiniteError(Exception):
    """A rank's part of a checkpoint holds NaN or infinity."""


def _check_finite(save: PlannedSave) -> None:
    """Raise _NotFiniteError for floating-point shards that hold NaN or infinity. One pass, without a copy."""
    bad = []
    for index, value in save.data.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.itemsize > 1 and value.numel():
            lowest, highest = torch.aminmax(value.detach())  # which pass NaN on
            if not (torch.isfinite(lowest) & torch.isfinite(highest)):
                bad.append(str(index.fqn))
    if bad:
        names = sorted(set(bad))
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise _NotFiniteError(f"{names[0]}{more} hold{'s' * (len(names) == 1)} NaN or infinity")


def write_save(
    save: PlannedSave,
    final: Path,
    *,
    described: dict[str, Any],
    space: TokenSpace,
    recipe: Recipe | None,
    group: dist.ProcessGroup | None,
) -> SaveProblem | None:
    """Write the directory `final`: all of it in a hidden one beside it, then renamed. A collective over `group`.

    Args:
        save: this rank's part.
        described: checkpoint.json, without what is known only when the files are written.
        space, recipe: saved beside the weights.
        group: of all ranks, used by nothing else meanwhile; None: the default one.

    Returns:
        Why it was not written, the same on all ranks (a full disk; values that are not finite), or None. Nothing is
        left of it then.
    """
    building = final.parent / f".{final.name}.tmp"

    def finish(written: dict[str, Any]) -> None:
        _finish(building, final, save.common, written, described, space, recipe)

    try:
        planner = _Planner(save)
        checkpoint.save(
            {},
            storage_writer=_Writer(building, final.name, planner, finish),
            planner=planner,
            process_group=group,
            no_dist=dist.get_world_size() == 1,
        )
    except CheckpointException as failed:  # of any rank, raised on all of them
        if dist.get_rank() == 0:
            shutil.rmtree(building, ignore_errors=True)
        errors = [error for error, _ in failed.failures.values()]
        for error in errors:
            if not isinstance(error, OSError | _NotFiniteError):
                raise error from failed
        if bad := next((error for error in errors if isinstance(error, _NotFiniteError)), None):
            return SaveProblem(str(bad), not_finite=True)
        return SaveProblem(_sentence(cast(OSError, errors[0])))
    return None


class _Planner(DefaultSavePlanner):
    """Hands torch's save what :func:`plan_save` has found out, and the copies in place of the model.

    Attributes:
        save: this rank's part.
        indices: of the shards of all ranks, as the plans name them; on rank 0.
    """

    def __init__(self, save: PlannedSave) -> None:
        super().__init__(flatten_state_dict=False)
        self.save = save
        self.indices: dict[MetadataIndex, MetadataIndex] = {}

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Nothing: the plan is there."""

    def create_local_plan(self) -> SavePlan:
        return self.save.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        _, metadata = super().create_global_plan(all_plans)
        self.indices = {item.index: item.index for plan in all_plans for item in plan.items}
        return all_plans, metadata  # who writes what was agreed on in `Sharing`

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        return self.save.data[write_item.index]


@dataclass(frozen=True)
class _FileResult(WriteResult):
    """Where a shard is, and what rank 0 is to know of its file: name, bytes, sha256."""

    file: dict[str, dict[str, Any]]


class _Writer(FileSystemWriter):
    """torch's files, hashed and synced as they are written; `finish` is called on rank 0 once all of them are there."""

    def __init__(self, building: Path, name: str, planner: _Planner, finish: Callable[[dict[str, Any]], None]) -> None:
        super().__init__(building, sync_files=False, per_thread_copy_ahead=0)
        self._building, self._name, self._planner, self._finish = building, name, planner, finish
        self.fs = self._files = _HashingFiles()

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(checkpoint_id=self.checkpoint_id, save_id=self._name)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        self._building.mkdir(parents=True, exist_ok=True)
        return plan

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        buffers = self._planner.save.buffers
        if buffers is not None:
            buffers.wait_for_copies()
        _check_finite(self._planner.save)
        results = super().write_data(plan, planner).value() if plan.items else []
        done: Future[list[WriteResult]] = Future()
        written = self._files.written
        done.set_result([_FileResult(r.index, r.size_in_bytes, r.storage_data, written) for r in results])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        written: dict[str, Any] = {}
        for of_rank in results:
            for result in of_rank[:1]:  # of one rank they all name its one file
                written |= cast(_FileResult, result).file
        # The indices of the plans again: names that came to rank 0 a second time would be stored a second time.
        indices = self._planner.indices
        named = [[dataclasses.replace(result, index=indices[result.index]) for result in rank] for rank in results]
        super().finish(metadata, named)
        self._finish(written)


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
