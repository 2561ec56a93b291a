"""Context-parallel ranks share every document evenly, and each token is somebody's once."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_speech.data.loading import context_parallel
from megatron_speech.data.loading.loader import MicroBatch
from megatron_speech.model.packed import PackedSequences
from megatron_speech.model.targets import HeadTargets


def by_hand(lengths, ranks, rank, total):
    """Tokens of a rank, document by document and piece by piece."""
    tokens, start, padded_total = [], 0, 0
    for length in lengths:
        padded = -(-length // (2 * ranks)) * 2 * ranks
        document = [start + position if position < length else -1 for position in range(padded)]
        pieces = np.split(np.array(document, dtype=np.int64), 2 * ranks)
        tokens += [*pieces[rank], *pieces[2 * ranks - 1 - rank]]
        start += length
        padded_total += padded
    return tokens + [-1] * ((total - padded_total) // ranks)


@pytest.mark.slow
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=8), ranks=st.integers(1, 4), more=st.integers(0, 3))
def test_a_rank_holds_its_two_pieces_of_every_document(lengths, ranks, more):
    cu_seqlens = np.concatenate(([0], np.cumsum(lengths)))
    total = context_parallel.padded_length(cu_seqlens, ranks) + more * 2 * ranks
    shares = [context_parallel.share(cu_seqlens, ranks, rank, total) for rank in range(ranks)]
    for rank, own in enumerate(shares):
        assert own.source.tolist() == by_hand(lengths, ranks, rank, total)
        assert own.source.size == total // ranks and own.cu_seqlens[-1] == total
        assert not (np.diff(own.cu_seqlens) % (2 * ranks)).any()
    held = np.concatenate([own.source for own in shares])
    assert np.sort(held[held >= 0]).tolist() == list(range(sum(lengths)))


@given(lengths=st.lists(st.integers(1, 200), min_size=1, max_size=6), ranks=st.sampled_from([2, 4]))
def test_under_causality_all_ranks_have_the_same_work(lengths, ranks):
    cu_seqlens = np.concatenate(([0], np.cumsum(lengths)))
    total = context_parallel.padded_length(cu_seqlens, ranks)
    work = []
    for rank in range(ranks):
        own = context_parallel.share(cu_seqlens, ranks, rank, total)
        ends = own.cu_seqlens // ranks
        scores = 0
        for first, last in itertools.pairwise(ends):
            half = (last - first) // 2
            # Keys that each query sees: its place in the padded document, plus one.
            scores += sum(rank * half + i + 1 + (2 * ranks - 1 - rank) * half + i + 1 for i in range(half))
        work.append(scores)
    assert len(set(work)) == 1


def micro_batch(lengths):
    tokens = torch.arange(1, sum(lengths) + 1)[None]
    return MicroBatch(
        tokens=tokens,
        labels=tokens + 1,
        loss_weights=tokens.float() / 7,
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        group_ids=tokens.int() % 3,
        cu_seqlens=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        row_pointers=torch.tensor([0, len(lengths)], dtype=torch.int32),
        max_seqlen=max(lengths),
        counts=torch.zeros(3, dtype=torch.int64),
        sequences=np.zeros(1, dtype=np.int64),
        documents=np.zeros((len(lengths), 2), dtype=np.int32),
    )


def test_what_the_ranks_compute_together_is_the_micro_batch():
    batches = [micro_batch([5, 12, 3]), micro_batch([30])]
    shared = [context_parallel.share_micro_batches(batches, 2, rank, multiple=16) for rank in range(2)]
    assert {part.tokens.shape for parts in shared for part in parts} == {(1, 16)}
    for number, batch in enumerate(batches):
        parts = [parts[number] for parts in shared]
        for name in ("tokens", "labels", "loss_weights", "group_ids", "position_ids"):
            # Tokens are numbered from 1: they say where everything else belongs.
            place = torch.cat([part.tokens for part in parts], dim=1)[0]
            values = torch.cat([getattr(part, name) for part in parts], dim=1)[0]
            real = values[place > 0][place[place > 0].argsort()]
            assert torch.equal(real, getattr(batch, name)[0]), name
            padding = {"tokens": 0, "labels": -100, "loss_weights": 0, "group_ids": -1, "position_ids": 0}[name]
            assert (values[place == 0] == padding).all()
        assert torch.equal(parts[0].cu_seqlens, parts[1].cu_seqlens)


def test_fused_attention_is_told_of_the_padded_documents():
    (part,) = context_parallel.share_micro_batches([micro_batch([5, 12, 3])], 2, 1)
    packed = PackedSequences.build(
        part.cu_seqlens,
        position_ids=part.position_ids,
        row_pointers=part.row_pointers,
        fused=True,
        context=2,
    )
    assert packed.qkv_format == "thd" and packed.layout is None
    assert packed.cu_seqlens_q.tolist() == [0, 8, 20, 24] and packed.cu_seqlens_q.dtype == torch.int32
    # The same tensor: comparing it with itself costs Transformer Engine no wait for the device.
    assert packed.cu_seqlens_q_padded is packed.cu_seqlens_q
    assert packed.max_seqlen_q == packed.max_seqlen_kv == 64
    targets = HeadTargets.build(part.labels, part.loss_weights, part.group_ids)
    assert targets.rows.numel() == int((part.loss_weights > 0).sum())


def test_without_context_parallelism_empty_documents_are_left_out():
    packed = PackedSequences.build(torch.tensor([0, 4, 4, 90]), fused=True)
    assert packed.cu_seqlens_q.tolist() == [0, 4, 90] and packed.cu_seqlens_q_padded is None
    assert packed.max_seqlen_q == 128


def test_a_row_too_short_for_its_documents_is_an_error():
    with pytest.raises(ValueError, match="8 positions do not hold 12"):
        context_parallel.share(np.array([0, 12]), 2, 0, 8)


def test_a_share_keeps_what_is_counted_for_the_whole():
    batch = dataclasses.replace(micro_batch([6]), counts=torch.tensor([6, 0, 6]))
    (part,) = context_parallel.share_micro_batches([batch], 2, 0)
    assert torch.equal(part.counts, batch.counts)
