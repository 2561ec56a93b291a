"""Layouts that fit are set up; others are refused with what would fit."""

import pytest
import torch

from megatron_speech.errors import InputError
from megatron_speech.parallel import groups


@pytest.fixture(autouse=True)
def taken_down():
    groups.destroy()
    yield
    groups.destroy()


def test_one_process_needs_no_port_and_can_start_again():
    for _ in range(2):
        layout = groups.initialize()
        assert (layout.world_size, layout.rank, layout.data) == (1, 0, 1)
        assert torch.distributed.get_world_size() == 1
        groups.destroy()
    assert not torch.distributed.is_initialized()


def test_a_second_start_without_an_end_is_an_error():
    groups.initialize()
    with pytest.raises(RuntimeError, match="call destroy"):
        groups.initialize()


@pytest.mark.parametrize(
    ("world_size", "layout", "message"),
    [
        (8, dict(tensor=3), r"= 3 does not divide the 8 processes.*start 6 or 9 processes.*2 or 4"),
        (2, dict(tensor=2, pipeline=2), r"= 4 does not divide the 2 processes.*start 4 processes.*1 or 2"),
        (4, dict(tensor=0), "parallel.tensor is 0"),
        (4, dict(virtual_pipeline=2), "virtual_pipeline is 2 with pipeline 1"),
    ],
)
def test_a_layout_that_does_not_divide_names_the_nearest_that_does(world_size, layout, message):
    with pytest.raises(InputError, match=message):
        groups.check_layout(world_size, **layout)


@pytest.mark.parametrize("layout", [dict(tensor=2, pipeline=2), dict(context=4), dict(pipeline=4, virtual_pipeline=2)])
def test_layouts_that_divide_are_accepted(layout):
    groups.check_layout(8, **layout)


def test_the_layout_of_the_environment_is_refused_before_anything_starts(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match="does not divide"):
        groups.initialize(tensor=3)
    assert not torch.distributed.is_initialized()


def test_the_seed_decides_the_generators():
    draws = []
    for seed in (5, 5, 6):
        groups.initialize(seed=seed)
        draws.append(torch.rand(3))
        groups.destroy()
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
