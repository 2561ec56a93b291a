"""`inspect`: distributions without holding the columns, and their picture."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_speech.commands import inspect as inspect_command
from megatron_speech.data.dataset.distributions import (
    QUANTILES,
    Distribution,
    bulk_limit,
    length_bins,
    mass_curve,
)
from megatron_speech.errors import InputError
from megatron_speech.tokens.space import TokenSpace

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(values=LENGTHS, cuts=st.lists(st.integers(0, 60), max_size=4))
def test_a_distribution_in_pieces_has_the_quantiles_of_the_whole(values: list[int], cuts: list[int]) -> None:
    distribution = Distribution()
    for piece in np.split(np.array(values), np.sort(np.minimum(cuts, len(values)))):
        distribution.add(piece)
    assert distribution.total == len(values)
    assert np.allclose(distribution.quantiles(QUANTILES), np.quantile(values, QUANTILES))
    edges = np.array([0, 7, 20, 41])
    assert distribution.histogram(edges).tolist() == np.histogram(values, edges)[0].tolist()


def distribution_of(values: list[int]) -> Distribution:
    distribution = Distribution()
    distribution.add(np.array(values))
    return distribution


def test_an_outlier_does_not_squeeze_the_bins() -> None:
    lengths = [*range(100, 200), 50_000]
    bins = length_bins(distribution_of(lengths))
    assert bulk_limit(distribution_of(lengths)) == 199
    assert len(bins) == 12
    assert sum(entry["documents"] for entry in bins) == 101
    assert [entry["documents"] for entry in bins[:-1]] == [8, 8, 9, 8, 8, 9, 8, 8, 9, 8, 8]
    assert bins[-1]["below"] == 50_001


@settings(max_examples=100, deadline=None)
@given(values=st.lists(st.integers(0, 10**6), min_size=1, max_size=60))
def test_bins_hold_every_document_and_nine_tenths_lie_within_the_limit(values: list[int]) -> None:
    distribution = distribution_of(values)
    assert sum(entry["documents"] for entry in length_bins(distribution)) == len(values)
    assert sum(value <= bulk_limit(distribution) for value in values) >= 0.9 * (len(values) - 1)


def test_the_curve_of_the_mass_ends_at_one() -> None:
    found = distribution_of([10, 10, 20, 1000])
    curve = mass_curve(found, 20.0)
    assert curve is not None
    assert curve[0].tolist() == [10, 20, 20]
    assert np.allclose(curve[1], [20 / 1040, 40 / 1040, 1.0])
    assert mass_curve(distribution_of([0, 0]), 1.0) is None


def inspect(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    inspect_command.add_arguments(parser)
    return inspect_command.run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["png", "svg"])
def test_lengths_are_drawn(
    tmp_path: Path, make_dataset: Any, document: Any, toy_space: TokenSpace, ending: str, capsys: Any
) -> None:
    documents = [document(codes=n % 50, text=1 + n % 7) for n in range(300)]
    dataset = make_dataset(tmp_path / "data", toy_space, "tts", documents)
    picture = tmp_path / f"lengths.{ending}"
    assert inspect(dataset.prefix, "--plot", picture) == 0
    assert f"picture: {picture}" in capsys.readouterr().out
    assert picture.read_bytes()[:5] == {"png": b"\x89PNG\r", "svg": b"<?xml"}[ending]
    assert inspect(dataset.prefix, "--plot", picture, "--json") == 0
    value = json.loads(capsys.readouterr().out)
    assert sum(entry["documents"] for entry in value["histogram_tokens"]) == 300
    assert set(value["quantiles"]) == {"tokens", "target_tokens", "duration_seconds"}


def test_text_alone_is_drawn_without_seconds(
    tmp_path: Path, make_dataset: Any, document: Any, toy_space: TokenSpace
) -> None:
    dataset = make_dataset(tmp_path / "data", toy_space, "text_lm", [document(text=n) for n in (1, 1, 1)])
    assert inspect(dataset.prefix, "--plot", tmp_path / "lengths.png") == 0
    with pytest.raises(InputError, match=r"lengths\.txt: the ending names no picture; needed \.png"):
        inspect(dataset.prefix, "--plot", tmp_path / "lengths.txt")
    assert not (tmp_path / "lengths.txt").exists()
