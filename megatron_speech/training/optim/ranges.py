"""Ranges of flattened parameters in a checkpoint: every rank writes and reads what its optimizer holds, and no more.

A distributed optimizer cuts the flattened parameters wherever its share ends, in the middle of a row if need be. Such
a range is a few boxes of the tensor: the end of a row, whole rows, the beginning of one. As boxes they are shards of
torch's checkpoint format like any other, so that nothing is gathered when they are saved and any layout reads them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, TensorWriteData, WriteItem
from torch.distributed.checkpoint.planner import WriteItemType as Kind
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

Parameters = dict[int, ShardedTensor | ShardedTensorFactory]
"""id of a parameter → how megatron-core shards it, see :func:`parameters_of`."""


@dataclass(frozen=True)
class Range:
    """Values of a part of one parameter, as this rank's optimizer holds them.

    Attributes:
        prefix: what its key in the checkpoint has before the parameter's.
        parameter: outline of this tensor-parallel rank's slice, as megatron-core shards it.
        start: of the range in the flattened slice.
        values: contiguous, of any shape.
        written: False where another rank holds the same values and writes them.
    """

    prefix: str
    parameter: ShardedTensor | ShardedTensorFactory
    start: int
    values: Tensor
    written: bool = True


@dataclass(frozen=True)
class _Box:
    """A part of a tensor of the checkpoint, and the values of a range that it is made of."""

    index: MetadataIndex
    whole: torch.Size
    values: Tensor
    is_main: bool
    may_differ: bool  # in the number of rows: that of a token table is padded to the layout


def parameters_of(model_state: ShardedStateDict) -> Parameters:
    """How megatron-core shards each parameter of this rank's model chunks: outlines, with data that has no storage."""
    tensors, _ = extract_sharded_tensors_and_factories(model_state)
    return {
        id(sharded.data): dataclasses.replace(sharded, data=torch.empty_like(sharded.data, device="meta"))
        for sharded in nested_values(tensors)
    }


def box_bounds(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Cut a range of a flattened tensor into boxes of the tensor, at most 2·len(shape) - 1 of them.

    Args:
        shape: of the tensor.
        start, stop: of the range, in elements.

    Yields:
        Where in the flattened tensor a box begins, its offset in the tensor, its shape; in rising order.
    """
    if start >= stop:
        return
    if not shape:
        yield start, (), ()
        return
    inner = math.prod(shape[1:])
    row = start // inner
    if start % inner == 0 and stop % inner == 0:
        yield start, (row, *[0] * (len(shape) - 1)), ((stop - start) // inner, *shape[1:])
    elif stop <= (row + 1) * inner:
        base = row * inner
        for begin, offset, size in box_bounds(shape[1:], start - base, stop - base):
            yield base + begin, (row, *offset), (1, *size)
    else:
        first, last = -(-start // inner) * inner, stop // inner * inner
        yield from box_bounds(shape, start, first)
        yield from box_bounds(shape, first, last)
        yield from box_bounds(shape, last, stop)


def write_items(ranges: Sequence[Range]) -> tuple[list[WriteItem], dict[MetadataIndex, Tensor]]:
    """What this rank writes of its ranges, for a plan of torch's checkpoints, and the values of it (views)."""
    items, data = [], {}
    for one in ranges:
        if not one.written:
            continue
        for box in _boxes(one):
            if box.is_main:
                chunk = ChunkStorageMetadata(offsets=_offset(box), sizes=box.values.size())
                properties = TensorProperties.create_from_tensor(box.values)
                items.append(
                    WriteItem(box.index, Kind.SHARD, tensor_data=TensorWriteData(chunk, properties, box.whole))
                )
                data[box.index] = box.values
    return items, data


def missing_key(path: Path, ranges: Sequence[Range]) -> str | None:
    """The first tensor of `ranges`, by name, that the checkpoint directory `path` lacks; None: it has them all."""
    saved = FileSystemReader(path).read_metadata().state_dict_metadata
    return min((box.index.fqn for one in ranges for box in _boxes(one) if box.index.fqn not in saved), default=None)


@torch.no_grad()
def read_ranges(path: Path, ranges: Sequence[Range]) -> None:
    """Fill `ranges` from the checkpoint directory `path`, whatever layout wrote it. Every rank for itself.

    Rows that pad a token table, and that the checkpoint lacks, stay as they are.

    Raises:
        KeyError: a tensor is not in the checkpoint.
        ValueError: it has another shape there, or is not all there.
    """
    reader = FileSystemReader(path)
    metadata: Metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, is_coordinator=False)
    boxes = {box.index: box for one in ranges for box in _boxes(one)}
    items: list[ReadItem] = []
    for box in boxes.values():
        saved = metadata.state_dict_metadata[box.index.fqn]
        if not isinstance(saved, TensorStorageMetadata) or (saved.size != box.whole and not box.may_differ):
            raise ValueError(f"{path}: {box.index.fqn} is {getattr(saved, 'size', saved)}; needed: {box.whole}")
        offset, size = _offset(box), box.values.size()
        found = create_read_items_for_chunk_list(box.index.fqn, saved, [ChunkStorageMetadata(offset, size)])
        there = math.prod(max(0, min(o + n, most) - o) for o, n, most in zip(offset, size, saved.size, strict=True))
        if sum(math.prod(item.lengths) for item in found) != there:
            raise ValueError(f"{path}: {box.index.fqn} is not all there")
        items += found
    reader.read_data(LoadPlan(_in_order_of_storage(items, metadata)), _Filling(boxes)).wait()


def _boxes(one: Range) -> Iterator[_Box]:
    """The boxes of a range in the whole tensors that its parameter is saved as: several where they are fused."""
    sharded = one.parameter
    flat = one.values.detach().reshape(-1)
    if flat.numel() and flat.data_ptr() != one.values.data_ptr():
        raise ValueError(f"{sharded.key}: its values are not contiguous")
    built = sharded.build() if isinstance(sharded, ShardedTensorFactory) else sharded
    parts: list[ShardedTensor] = [built] if isinstance(built, ShardedTensor) else list(nested_values(built))
    for part in parts:
        data = part.data
        begins = data.storage_offset()  # where a part that a factory makes of the parameter is in it
        if not data.is_contiguous() or data.dim() != len(part.local_shape) or part.prepend_axis_num:
            raise ValueError(f"{part.key}: a parameter saved as {part} cannot be cut into ranges")
        first = max(one.start, begins) - begins
        last = min(one.start + flat.numel(), begins + data.numel()) - begins
        for begin, offset, size in box_bounds(tuple(part.local_shape), first, last):
            at = begin + begins - one.start
            place = torch.Size(o + whole for o, whole in zip(offset, part.global_offset, strict=True))
            yield _Box(
                MetadataIndex(f"{one.prefix}.{part.key}", place),
                torch.Size(part.global_shape),
                flat[at : at + math.prod(size)].view(size),
                # The last number is that of the data-parallel rank, and those share by ranges.
                not any(part.replica_id[:-1]) if isinstance(part.replica_id, tuple) else part.replica_id == 0,
                part.allow_shape_mismatch,
            )


def _offset(box: _Box) -> torch.Size:
    assert box.index.offset is not None
    return box.index.offset


def _in_order_of_storage(items: list[ReadItem], metadata: Metadata) -> list[ReadItem]:
    """Read files from their beginning to their end."""
    places = metadata.storage_data
    return sorted(items, key=lambda item: (places[item.storage_index].relative_path, places[item.storage_index].offset))


class _Filling(DefaultLoadPlanner):
    """Tells torch's reader where a piece that it has read belongs."""

    def __init__(self, boxes: dict[MetadataIndex, _Box]) -> None:
        super().__init__()
        self._boxes = boxes

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        target = self._boxes[read_item.dest_index].values
        for dimension, (begin, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(dimension, begin, length)
        return target
