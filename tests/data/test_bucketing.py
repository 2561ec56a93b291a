"""Length buckets: every document once and whole, rectangles within max_tokens, grouped by target and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_speech.data.sequences.bucketing import _pack_bucket_python, pack_bucket
from megatron_speech.data.sequences.packing_kernels import PackedSegments
from megatron_speech.errors import InputError

DOCUMENTS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 30)), max_size=120)


def batches_of(packed: PackedSegments) -> list[list[int]]:
    return [
        packed.position[a:b].tolist() for a, b in zip(packed.seq_ptr[:-1].tolist(), packed.seq_ptr[1:], strict=True)
    ]


def speech(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and targets as of cloning documents: prompts and targets of independent lengths."""
    random = np.random.default_rng(seed)
    targets = np.clip(random.lognormal(5.3, 0.6, count), 20, 1200).astype(np.int32)
    return targets + random.integers(10, 400, count).astype(np.int32), targets


@settings(deadline=None, max_examples=200)
@given(DOCUMENTS, st.integers(1, 64), st.integers(1, 6))
def test_each_document_lies_whole_in_one_rectangle(
    documents: list[tuple[int, int]], max_tokens: int, window: int
) -> None:
    targets = np.array([target for target, _ in documents], dtype=np.int32)
    lengths = targets + np.array([prompt for _, prompt in documents], dtype=np.int32)
    packed, oversize = pack_bucket(lengths, targets, max_tokens=max_tokens, window=window)
    assert oversize.tolist() == np.flatnonzero(lengths > max_tokens).tolist()
    assert sorted(packed.position.tolist()) == np.flatnonzero((lengths > 0) & (lengths <= max_tokens)).tolist()
    assert (packed.start == 0).all()
    assert (packed.length == lengths[packed.position]).all()
    for batch in batches_of(packed):
        assert 0 < len(batch) * lengths[batch].max() <= max_tokens
        assert targets[batch].tolist() == sorted(targets[batch].tolist())


@settings(deadline=None, max_examples=100)
@given(DOCUMENTS, st.integers(1, 64), st.integers(1, 6))
def test_the_kernel_and_the_reference_agree(documents: list[tuple[int, int]], max_tokens: int, window: int) -> None:
    targets = np.array([target for target, _ in documents], dtype=np.int32)
    lengths = targets + np.array([prompt for _, prompt in documents], dtype=np.int32)
    packed, oversize = pack_bucket(lengths, targets, max_tokens=max_tokens, window=window)
    expected, expected_oversize = _pack_bucket_python(lengths, targets, max_tokens, window)
    for found, needed in zip((*packed, oversize), (*expected, expected_oversize), strict=True):
        assert found.dtype == needed.dtype
        assert found.tolist() == needed.tolist()


def test_windows_come_one_after_the_other() -> None:
    lengths, targets = speech(4000)
    packed, _ = pack_bucket(lengths, targets, max_tokens=2048, window=32)
    tokens = np.cumsum(lengths)
    reach = 0
    for batch in batches_of(packed):
        # No document comes after one that lies more than a window's tokens behind it.
        assert tokens[max(batch)] >= reach - 32 * 2048 - lengths.max()
        reach = max(reach, int(tokens[max(batch)]))


def test_batches_hold_one_target_length_and_any_prompt_length() -> None:
    lengths, targets = speech(20_000)
    packed, _ = pack_bucket(lengths, targets, max_tokens=4096, window=256)
    batches = [batch for batch in batches_of(packed) if len(batch) > 1]
    prompts = lengths - targets
    spread = np.mean([np.ptp(targets[batch]) for batch in batches])
    assert spread < 0.05 * np.ptp(targets)
    assert np.mean([np.ptp(prompts[batch]) for batch in batches]) > 10 * spread
    inside = np.mean([prompts[batch].mean() for batch in batches])
    assert inside == pytest.approx(prompts.mean(), rel=0.02)


def test_the_order_of_batches_says_nothing_about_their_length() -> None:
    lengths, targets = speech(50_000)
    packed, _ = pack_bucket(lengths, targets, max_tokens=2048, window=256)
    longest = np.array([targets[batch].max() for batch in batches_of(packed)], dtype=float)
    place_in_window = np.arange(len(longest)) % 256
    assert abs(np.corrcoef(longest[:-1], longest[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(longest, place_in_window)[0, 1]) < 0.05


def test_what_cannot_be_packed_is_refused() -> None:
    some = np.array([3, 4], dtype=np.int32)
    with pytest.raises(InputError, match="2 document lengths but 1 target lengths"):
        pack_bucket(some, some[:1], max_tokens=8, window=1)
    with pytest.raises(InputError, match="window is 0"):
        pack_bucket(some, some, max_tokens=8, window=0)
    with pytest.raises(InputError, match="document 1 has length -1"):
        pack_bucket(some, np.array([3, -1], dtype=np.int32), max_tokens=8, window=1)
