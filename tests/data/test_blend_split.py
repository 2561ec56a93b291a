"""The split: by source, stable for ever, the same in every dataset."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_speech.data.dataset.split import held_out, is_held_out, name_hash, quotes_held_out

MASK = (1 << 64) - 1


def mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def reference(name: str) -> int:
    data, total, power = name.encode(), 0, 1
    for byte in data:
        power = power * 0x9E3779B97F4A7C15 & MASK
        total = (total + (byte + 1) * power) & MASK
    return mix((mix(total) + len(data)) & MASK)


@settings(deadline=None)
@given(st.lists(st.none() | st.text(max_size=12), max_size=20), st.floats(0.001, 0.999), st.integers(-(2**63), 2**63))
def test_the_hash_is_the_same_function_of_the_bytes_as_its_plain_reference(
    names: list[str | None], fraction: float, seed: int
) -> None:
    array = pa.array(names, pa.string())
    expected = [reference(name or "") for name in names]
    assert name_hash(array).tolist() == expected
    assert name_hash(array.slice(1)).tolist() == expected[1:]  # a view into a longer array
    sides = [mix(value ^ mix(seed & MASK)) < int(fraction * 2**64) for value in expected]
    assert is_held_out(name_hash(array), fraction, seed).tolist() == sides


def test_names_hash_alike_for_ever() -> None:
    # Datasets hold these hashes: they must not change.
    assert name_hash(pa.array(["", "recording-1", "जयपुर"])).tolist() == NAME_HASHES


NAME_HASHES = [12035550249420947055, 10070271271558380177, 17766116273080350714]


def columns(sources: list[str | None], samples: list[str]) -> pa.Table:
    return pa.table({"source_id": pa.array(sources, pa.string()), "sample_id": pa.array(samples, pa.string())})


def test_all_documents_of_a_source_are_on_one_side_in_every_dataset() -> None:
    sources = [f"book-{k % 40}" for k in range(400)]
    one = held_out(columns(sources, [f"a{k}" for k in range(400)]), 0.3, 7)
    other = held_out(columns(sources[::-1], [f"b{k}" for k in range(400)]), 0.3, 7)
    side = dict(zip(sources, one.tolist(), strict=True))
    assert all(side[source] == held for source, held in zip(sources, one.tolist(), strict=True))
    assert other[::-1].tolist() == one.tolist()
    assert 0 < len({source for source, held in side.items() if held}) < 40


def test_a_document_without_a_source_is_its_own_source() -> None:
    samples = [f"s{k}" for k in range(2000)]
    for missing in (None, ""):
        held = held_out(columns([missing] * 2000, samples), 0.25, 0)
        assert held.tolist() == held_out(columns(samples, ["x"] * 2000), 0.25, 0).tolist()
        assert held.mean() == pytest.approx(0.25, abs=0.04)


def test_the_fraction_is_met_and_a_larger_one_keeps_what_a_smaller_one_held_out() -> None:
    table = columns([f"recording {k}" for k in range(20_000)], [""] * 20_000)
    small, large = held_out(table, 0.01, 3), held_out(table, 0.05, 3)
    assert small.mean() == pytest.approx(0.01, abs=0.004)
    assert large.mean() == pytest.approx(0.05, abs=0.008)
    assert not (small & ~large).any()
    assert (held_out(table, 0.05, 4) != large).any()
    assert not held_out(table, 0.0, 3).any()


def test_names_longer_than_a_chunk_of_rows_hash_alike_wherever_they_stand() -> None:
    names = pa.chunked_array([["a" * 3000, "é", ""], ["b", "a" * 3000]]).combine_chunks()
    hashes = name_hash(names)
    assert hashes[0] == hashes[4]
    assert len(np.unique(hashes)) == 4


def test_a_document_that_quotes_a_held_out_source_is_known_by_its_reference() -> None:
    sources = [f"recording-{k}" for k in range(500)]
    held = held_out(columns(sources, sources), 0.1, 5)
    assert held.any()
    quoting = pa.table({"reference_source_id": pa.array([*sources, None, None], pa.string())})
    assert quotes_held_out(quoting, 0.1, 5).tolist() == [*held.tolist(), False, False]
    assert not quotes_held_out(pa.table({"reference_source_id": pa.nulls(3, pa.string())}), 0.999, 5).any()


def test_stored_hashes_decide_as_the_names_do() -> None:
    names = pa.array([f"recording-{k // 3}" for k in range(600)])
    quoted = pa.array([f"recording-{k}" if k % 2 else None for k in range(600)])
    by_name = pa.table({"source_id": names, "sample_id": names, "reference_source_id": quoted})
    hashes = pa.array([int(value) if k % 2 else None for k, value in enumerate(name_hash(quoted))], pa.uint64())
    by_hash = pa.table({"split_hash": name_hash(names), "reference_split_hash": hashes})
    for rule in (held_out, quotes_held_out):
        assert rule(by_hash, 0.2, 9).tolist() == rule(by_name, 0.2, 9).tolist()
        assert rule(by_hash, 0.2, 9).any()
