"""Ranges of flattened parameters: as boxes they are the same elements, and any cutting of them reads any other."""

from __future__ import annotations

import itertools
import math
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.planner import SavePlan

from megatron_speech.training.optim.ranges import (
    Range,
    box_bounds,
    missing_key,
    parameters_of,
    read_ranges,
    write_items,
)

shapes = st.lists(st.integers(1, 5), min_size=0, max_size=4)


@given(shape=shapes, cut=st.tuples(st.integers(0, 700), st.integers(0, 700)))
def test_the_boxes_of_a_range_are_its_elements_in_order(shape: list[int], cut: tuple[int, int]) -> None:
    tensor = np.arange(math.prod(shape)).reshape(shape)
    start, stop = sorted(min(point, tensor.size) for point in cut)
    boxes = list(box_bounds(shape, start, stop))
    found: list[int] = []
    for begin, offset, size in boxes:
        assert begin == start + len(found)
        found += tensor[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))].reshape(-1).tolist()
    assert found == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


def plain(key: str, parameter: torch.Tensor, *offsets: tuple[int, int, int], **options: bool) -> ShardedTensor:
    return ShardedTensor.from_rank_offsets(key, parameter, *offsets, replica_id=(0, 0, 3), **options)


def fused(key: str, parameter: torch.Tensor, rank: int, ranks: int) -> ShardedTensorFactory:
    """Gate and up of an MLP in one parameter: in the checkpoint all gates stand before all ups."""

    def build(key: str, tensor: torch.Tensor, replica: object, _: object) -> list[ShardedTensor]:
        halves = enumerate(tensor.chunk(2))
        return [
            ShardedTensor.from_rank_offsets(key, half, (0, number * ranks + rank, 2 * ranks), replica_id=replica)
            for number, half in halves
        ]

    return ShardedTensorFactory(key, parameter, build, lambda loaded: torch.cat(loaded), replica_id=(0, 0, 3))


def write(path: Path, *ranks: list[Range]) -> None:
    """A checkpoint of what each of `ranks` writes."""
    written = [write_items(ranges) for ranges in ranks]
    plans = [SavePlan(items) for items, _ in written]
    writer = FileSystemWriter(path, sync_files=False)
    writer.set_up_storage_writer(True)
    plans, metadata = create_default_global_save_plan(writer.prepare_global_plan(plans))
    results = [
        writer.write_data(plan, SimpleNamespace(resolve_data=lambda item, data=data: data[item.index])).value()
        for plan, (_, data) in zip(plans, written, strict=True)
    ]
    writer.finish(metadata, results)


def cut(parameter: torch.Tensor, points: list[int]) -> list[tuple[int, torch.Tensor]]:
    """(start, flat values) of the pieces of a tensor."""
    flat = parameter.reshape(-1)
    at = [0, *sorted(min(point, flat.numel()) for point in points), flat.numel()]
    return [(start, flat[start:stop].clone()) for start, stop in itertools.pairwise(at)]


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 5),
    tensor_ranks=st.sampled_from([(1, 2), (2, 1), (2, 4), (4, 2)]),
    points=st.tuples(*[st.lists(st.integers(0, 80), max_size=4)] * 2),
)
def test_what_one_cutting_wrote_another_reads(
    rows: int, columns: int, tensor_ranks: tuple[int, int], points: tuple[list[int], list[int]]
) -> None:
    """Weights cut along the rows and gates fused with ups, under two numbers of tensor-parallel ranks."""
    whole = torch.arange(8 * rows * columns, dtype=torch.float32).view(8 * rows, columns)

    def slices(ranks: int, rank: int) -> list[tuple[str, torch.Tensor]]:
        gates, ups = (half.chunk(ranks)[rank] for half in whole.chunk(2))
        return [("plain", whole.chunk(ranks)[rank].clone()), ("fused", torch.cat([gates, ups]))]

    def ranges(ranks: int, at: list[int], *, filled: bool) -> list[list[Range]]:
        made = []
        for rank in range(ranks):
            own = []
            for name, parameter in slices(ranks, rank):
                sharded = (
                    fused("w", parameter, rank, ranks) if name == "fused" else plain("w", parameter, (0, rank, ranks))
                )
                outline = parameters_of({"w": sharded})[id(parameter)]
                for start, values in cut(parameter, at):
                    own.append(Range(name, outline, start, values if filled else torch.full_like(values, -1.0)))
            made.append(own)
        return made

    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), *ranges(tensor_ranks[0], points[0], filled=True))
        filled, empty = (ranges(tensor_ranks[1], points[1], filled=filled) for filled in (True, False))
        for wanted, own in zip(filled, empty, strict=True):
            read_ranges(Path(folder), own)
            assert all(torch.equal(a.values, b.values) for a, b in zip(wanted, own, strict=True))


def test_padding_rows_of_a_token_table_stay_as_they_are(tmp_path: Path) -> None:
    saved, wanted = torch.arange(12.0).view(6, 2), torch.full((8, 2), -1.0)
    for parameter, reads in ((saved, False), (wanted, True)):
        outline = parameters_of({"w": plain("w", parameter, allow_shape_mismatch=True)})[id(parameter)]
        one = [Range("m", outline, start, values) for start, values in [(0, parameter[:3]), (6, parameter[3:])]]
        if reads:
            read_ranges(tmp_path, one)
        else:
            write(tmp_path, one)
    assert torch.equal(wanted[:6], saved) and (wanted[6:] == -1.0).all()


def test_copies_are_written_once_and_what_is_not_there_is_named(tmp_path: Path) -> None:
    parameter = torch.arange(6.0).view(2, 3)
    copy = ShardedTensor.from_rank_offsets("w", parameter, replica_id=(0, 1, 0))  # of another tensor-parallel rank
    main = parameters_of({"w": plain("w", parameter)})[id(parameter)]
    assert write_items([Range("m", parameters_of({"w": copy})[id(parameter)], 0, parameter)]) == ([], {})
    assert write_items([Range("m", main, 0, parameter, written=False)]) == ([], {})
    write(tmp_path, [Range("m", main, 0, parameter.reshape(-1)[:4])])
    assert missing_key(tmp_path, [Range("m", main, 0, parameter)]) is None
    assert missing_key(tmp_path, [Range("v", main, 0, parameter)]) == "v.w"
    with pytest.raises(ValueError, match=r"m\.w is not all there"):
        read_ranges(tmp_path, [Range("m", main, 0, torch.empty(6))])
    other = torch.empty(2, 4)
    with pytest.raises(ValueError, match=r"m\.w is torch.Size\(\[2, 3\]\); needed: torch.Size\(\[2, 4\]\)"):
        read_ranges(tmp_path, [Range("m", parameters_of({"w": plain("w", other)})[id(other)], 0, other)])
    with pytest.raises(ValueError, match="not contiguous"):
        read_ranges(tmp_path, [Range("m", main, 0, torch.empty(3, 2).t())])
