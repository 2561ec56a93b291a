"""A layer of another kind stands where the plan says, and what it keeps of a generation lives beside the keys."""

import pytest
import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from toy_layers import RunningSum, RunningSumLayer, install

from megatron_speech.model.builder import build_model, global_named_parameters
from megatron_speech.model.kv_cache import KeyValueCache
from megatron_speech.model.layer_plan import ATTENTION_MLP, last_mlp_on_learned_only, layer_kinds
from megatron_speech.model.packed import PackedSequences
from megatron_speech.model.specs import LastLayer
from megatron_speech.model.state import GenerationState
from megatron_speech.model.targets import TOKENS, HeadTargets
from megatron_speech.recipe.model import ModelConfig

VOCAB, LAYERS = 256, 3
CONFIG = ModelConfig(preset="tiny", num_layers=LAYERS)


@pytest.fixture
def build(monkeypatch):
    """build(at) → a model whose layer `at` is a RunningSumLayer."""

    def make(at):
        install(monkeypatch.setitem, monkeypatch.setattr, at)
        (model,) = build_model(CONFIG, VOCAB, seed=3)
        return model

    return make


def test_every_layer_is_of_one_kind_today():
    assert layer_kinds(CONFIG) == (ATTENTION_MLP,) * LAYERS


@pytest.mark.parametrize(
    ("at", "types"),
    [
        (0, [RunningSumLayer, TransformerLayer, LastLayer]),
        (1, [TransformerLayer, RunningSumLayer, LastLayer]),
        (2, [TransformerLayer, TransformerLayer, RunningSumLayer]),
    ],
)
def test_one_layer_of_another_kind_is_that_layer_and_no_other(build, at, types):
    model = build(at)
    assert [type(layer) for layer in model.decoder.layers] == types
    names = [name for name, _ in global_named_parameters(model)]
    assert [name for name in names if name.endswith("gain")] == [f"decoder.layers.{at}.gain"]


def test_where_the_last_layer_is_another_kind_it_keeps_all_rows_and_the_head_reads_its_own(build):
    model = build(LAYERS - 1)
    ids = torch.arange(50)[None]
    weights = (torch.arange(50) % 3 == 0).float()
    found = [
        model(ids, None, None, HeadTargets.build(ids, w), PackedSequences.build(torch.tensor([0, 20, 50])))[TOKENS]
        for w in (None, weights)
    ]
    torch.testing.assert_close(found[1].losses, found[0].losses[::3])


@pytest.mark.parametrize(
    ("changed", "expected"),
    [({}, True), ({"torch_backend": False}, False), ({"sequence_parallel": True}, False), ({"layers": 0}, False)],
    ids=str,
)
def test_what_keeps_the_last_layer_whole(changed, expected):
    options = {"torch_backend": True, "sequence_parallel": False, "layers": 2} | changed
    assert last_mlp_on_learned_only(ATTENTION_MLP, **options) is expected
    assert last_mlp_on_learned_only("another", **options) is False


@pytest.mark.parametrize("at", [0, 2])
def test_a_layer_s_own_state_goes_on_beside_the_keys_through_prefill_decode_and_keep(build, at):
    model = build(at).eval()
    sequences = [(torch.arange(n) * 7 % VOCAB).tolist() for n in (3, 11, 1)]
    state = GenerationState(3, max_length=12)
    with torch.no_grad():
        prompts = torch.tensor([[token for sequence in sequences for token in sequence]])
        logits = model(prompts, packed_seq_params=state.prefill([len(s) for s in sequences]))
        for step in range(8):
            for sequence, row in zip(sequences, logits, strict=True):
                whole = PackedSequences.build(torch.tensor([0, len(sequence)]))
                expected = model(torch.tensor([sequence]), packed_seq_params=whole)[-1]
                torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)
            chosen = logits.argmax(-1)
            if step in (2, 4):  # the middle one ends, then the first of the two that are left
                kept = [2, 0] if step == 2 else [1]
                state.keep(kept)
                sequences, chosen = [sequences[i] for i in kept], chosen[kept]
            for sequence, token in zip(sequences, chosen.tolist(), strict=True):
                sequence.append(token)
            if state.lengths.max() == state.max_length:
                state.grow(20)
            logits = model(chosen[None], packed_seq_params=state.decode())
    assert state.lengths.tolist() == [len(s) for s in sequences] == [3 + 8]


def test_a_layer_finds_what_it_keeps_by_its_number_and_kind():
    state = GenerationState(2, 8)
    keys, sums = state.of(1, KeyValueCache), state.of(1, RunningSum)
    assert state.of(1, KeyValueCache) is keys and state.of(1, RunningSum) is sums
    assert state.of(2, KeyValueCache) is not keys
