from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from megatron_speech.data.sequences import packing_kernels
from megatron_speech.data.sequences.packing_kernels import PackedSegments, pack_cut, pack_fit
from megatron_speech.errors import InputError
from megatron_speech.ops.extension import extension, extension_status

needs_extension = pytest.mark.skipif(extension() is None, reason=f"compiled extension {extension_status()}")

lengths_arrays = hnp.arrays(np.int32, st.integers(0, 60), elements=st.integers(0, 45))
seq_lengths = st.integers(1, 40)


def cut(lengths: np.ndarray, seq_length: int, kernel: str) -> PackedSegments:
    return (
        pack_cut(lengths, seq_length)
        if kernel == "dispatched"
        else packing_kernels._pack_cut_numpy(lengths, seq_length)
    )


def fit(lengths: np.ndarray, seq_length: int, open_bins: int, kernel: str) -> tuple[PackedSegments, np.ndarray]:
    if kernel == "dispatched":
        return pack_fit(lengths, seq_length, open_bins=open_bins)
    return packing_kernels._pack_fit_python(lengths, seq_length, open_bins)


def assert_well_formed(packed: PackedSegments) -> None:
    assert [array.dtype for array in packed] == [np.int64, np.int64, np.int32, np.int32]
    assert packed.seq_ptr[0] == 0 and packed.seq_ptr[-1] == packed.position.size
    assert (np.diff(packed.seq_ptr) > 0).all(), "a sequence without tokens"
    assert packed.position.size == packed.start.size == packed.length.size
    assert (packed.length > 0).all()


def assert_equal(found: PackedSegments, expected: PackedSegments) -> None:
    for name, array in expected._asdict().items():
        np.testing.assert_array_equal(getattr(found, name), array, err_msg=name, strict=True)


def tokens_of_sequences(packed: PackedSegments) -> np.ndarray:
    return np.add.reduceat(packed.length.astype(np.int64), packed.seq_ptr[:-1]) if packed.length.size else np.zeros(0)


@pytest.mark.parametrize("kernel", ["dispatched", "fallback"])
@given(lengths=lengths_arrays, seq_length=seq_lengths)
@settings(max_examples=150, deadline=None)
def test_cutting_keeps_the_stream_as_it_is_and_fills_every_sequence_but_the_last(kernel, lengths, seq_length):
    packed = cut(lengths, seq_length, kernel)
    assert_well_formed(packed)
    stream = [(document, token) for document, length in enumerate(lengths) for token in range(length)]
    laid = [
        (document, start + token)
        for document, start, length in zip(packed.position, packed.start, packed.length, strict=True)
        for token in range(length)
    ]
    assert laid == stream
    tokens = tokens_of_sequences(packed)
    assert (tokens[:-1] == seq_length).all() and (tokens <= seq_length).all()
    # A sequence holds at most one segment of a document.
    for begin, end in zip(packed.seq_ptr, packed.seq_ptr[1:], strict=False):
        assert len(set(packed.position[begin:end])) == end - begin


@pytest.mark.parametrize("kernel", ["dispatched", "fallback"])
@given(lengths=lengths_arrays, seq_length=seq_lengths, open_bins=st.integers(1, 12))
@settings(max_examples=150, deadline=None)
def test_fitting_holds_every_document_once_and_whole_or_reports_it(kernel, lengths, seq_length, open_bins):
    packed, oversize = fit(lengths, seq_length, open_bins, kernel)
    assert_well_formed(packed)
    assert oversize.dtype == np.int64 and oversize.tolist() == np.flatnonzero(lengths > seq_length).tolist()
    assert sorted(packed.position) == np.flatnonzero((lengths > 0) & (lengths <= seq_length)).tolist()
    assert (packed.start == 0).all() and (packed.length == lengths[packed.position]).all()
    assert (tokens_of_sequences(packed) <= seq_length).all()
    for begin, end in zip(packed.seq_ptr, packed.seq_ptr[1:], strict=False):
        assert (np.diff(packed.position[begin:end]) > 0).all(), "segments of a sequence stand in document order"


@pytest.mark.slow
@needs_extension
@given(lengths=lengths_arrays, seq_length=seq_lengths, open_bins=st.integers(1, 12))
@settings(max_examples=300, deadline=None)
def test_kernels_and_fallbacks_give_the_same_arrays(lengths, seq_length, open_bins):
    assert_equal(cut(lengths, seq_length, "dispatched"), cut(lengths, seq_length, "fallback"))
    (found, oversize), (expected, expected_oversize) = (
        fit(lengths, seq_length, open_bins, kernel) for kernel in ("dispatched", "fallback")
    )
    assert_equal(found, expected)
    np.testing.assert_array_equal(oversize, expected_oversize, strict=True)


@needs_extension
@pytest.mark.parametrize("seq_length", [2048, 5000, 300_000])
def test_kernels_and_fallbacks_agree_at_realistic_sizes(seq_length):
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(6, 1.2, 20_000)).astype(np.int32)  # the set of rooms has up to four levels here
    assert_equal(cut(lengths, seq_length, "dispatched"), cut(lengths, seq_length, "fallback"))
    for open_bins in (3, 200):
        assert_equal(
            fit(lengths, seq_length, open_bins, "dispatched")[0], fit(lengths, seq_length, open_bins, "fallback")[0]
        )


@pytest.mark.parametrize(("median_tokens", "spread"), [(330, 0.7), (735, 0.5), (60, 0.3)])
def test_fitting_fills_99_percent_on_lengths_like_those_of_speech(median_tokens, spread):
    rng = np.random.default_rng(0)
    lengths = np.clip(median_tokens * np.exp(rng.normal(0, spread, 40_000)), 1, 2048).astype(np.int32)
    packed, _ = pack_fit(lengths, 2048, open_bins=512)
    sequences = packed.seq_ptr.size - 1
    # The last sequences of the last window have nothing left to take: a matter of a few, not of the rate.
    assert lengths.sum() / ((sequences - 1) * 2048) >= 0.99


def test_fitting_packs_window_after_window_so_that_no_document_is_put_off():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 300, 5000).astype(np.int32)
    packed, _ = pack_fit(lengths, 512, open_bins=8)
    in_order = np.cumsum(lengths) - lengths
    laid_at = np.empty(lengths.size, np.int64)
    laid_at[packed.position] = np.cumsum(packed.length) - packed.length
    assert np.abs(laid_at - in_order).max() <= 8 * 512


def test_documents_that_fill_a_sequence_exactly_stay_alone_and_in_order():
    packed, oversize = pack_fit(np.array([8, 8, 9, 8], np.int32), 8, open_bins=4)
    assert packed.position.tolist() == [0, 1, 3] and packed.seq_ptr.tolist() == [0, 1, 2, 3]
    assert oversize.tolist() == [2]
    packed = pack_cut(np.array([8, 16, 0, 4], np.int32), 8)
    assert packed.seq_ptr.tolist() == [0, 1, 2, 3, 4] and packed.start.tolist() == [0, 0, 8, 0]


@pytest.mark.parametrize(
    ("lengths", "seq_length", "open_bins", "message"),
    [
        ([3, -1], 8, 4, "document 1 has length -1"),
        ([3], 0, 4, "seq_length is 0"),
        ([3], 8, 0, "open_bins is 0"),
        ([2**31], 8, 4, "documents hold at most"),
        ([1.5], 8, 4, "a row of integers is needed"),
        ([[1]], 8, 4, "a row of integers is needed"),
    ],
)
def test_impossible_arguments_are_refused(lengths, seq_length, open_bins, message):
    with pytest.raises(InputError, match=message):
        pack_fit(np.array(lengths), seq_length, open_bins=open_bins)
