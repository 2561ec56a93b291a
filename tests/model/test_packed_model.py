"""A packed batch is its documents: same losses, no leak; the head, the cache and the initial weights."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from megatron_speech.model.builder import build_model
from megatron_speech.model.packed import PackedSequences, PaddedLayout
from megatron_speech.model.state import GenerationState
from megatron_speech.model.targets import TOKENS, HeadTargets
from megatron_speech.ops import cpu_layers
from megatron_speech.recipe.model import PRESETS, ModelConfig

VOCAB, REAL = 256, 200


def model_of(precision="fp32", **shape):
    (model,) = build_model(
        ModelConfig(**{"preset": "tiny", **shape}), VOCAB, valid_vocab_size=REAL, precision=precision, seed=3
    )
    return model


@pytest.fixture(params=["compiled", "pytorch"])
def layers(request, monkeypatch):
    """The layers between the matrix products: those of `ops.cpu_layers`, and plain PyTorch."""
    if request.param == "pytorch":
        monkeypatch.setattr(cpu_layers, "_kernels", lambda: None)
    elif not cpu_layers.built():
        pytest.skip("the compiled layers were not built")


def batch(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    ids = torch.randint(0, REAL, (1, total), generator=generator)
    labels = torch.randint(0, REAL, (1, total), generator=generator)
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    return ids, labels, cu_seqlens


def head(model, ids, labels, cu_seqlens, weights=None, **kwargs):
    packed = PackedSequences.build(cu_seqlens, **kwargs)
    return model(ids, None, None, HeadTargets.build(labels, weights), packed)[TOKENS]


def losses(*args):
    return head(*args).losses


@pytest.mark.parametrize("shape", [{}, {"num_query_groups": 4}, {"qk_norm": True, "qkv_bias": True}])
def test_a_packed_batch_has_the_losses_of_its_documents_apart(layers, shape):
    model = model_of(**shape)
    lengths = [5, 0, 31, 64, 1, 17, 130]
    ids, labels, cu_seqlens = batch(lengths)
    packed = losses(model, ids, labels, cu_seqlens)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        if length:
            alone = losses(model, ids[:, part], labels[:, part], torch.tensor([0, length]))
            torch.testing.assert_close(packed[part], alone, rtol=0, atol=1e-5)
        start += length


def test_the_model_is_the_plain_formula(layers):
    """Against attention, RoPE, norm and SwiGLU written out in a few lines of PyTorch."""
    model = model_of(tie_embeddings=False)
    ids, labels, cu_seqlens = batch([23])
    config, weights = model.model_config, dict(model.named_parameters())
    heads, groups, width = config.num_attention_heads, config.num_query_groups, config.kv_channels
    angle = torch.arange(23)[:, None] * 10_000.0 ** (-torch.arange(0, width, 2) / width)
    cos, sin = (torch.cat((f(angle), f(angle)), -1)[:, None] for f in (torch.cos, torch.sin))

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + config.norm_epsilon).sqrt() * weights[name]

    def turn(x):
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    x = weights["embedding.word_embeddings.weight"][ids[0]]
    for layer in range(config.num_layers):
        prefix = f"decoder.layers.{layer}."
        qkv = norm(x, prefix + "input_layernorm.weight") @ weights[prefix + "self_attention.linear_qkv.weight"].t()
        qkv = qkv.view(23, groups, heads // groups + 2, width)
        query, key, value = turn(qkv[:, :, :-2].reshape(23, heads, width)), turn(qkv[:, :, -2]), qkv[:, :, -1]
        key, value = (t.repeat_interleave(heads // groups, 1) for t in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, key) / width**0.5
        scores = scores.masked_fill(torch.ones(23, 23).triu(1).bool(), float("-inf")).softmax(-1)
        attended = torch.einsum("hqk,khd->qhd", scores, value).reshape(23, -1)
        x = x + attended @ weights[prefix + "self_attention.linear_proj.weight"].t()
        hidden = norm(x, prefix + "pre_mlp_layernorm.weight") @ weights[prefix + "mlp.linear_fc1.weight"].t()
        gate, linear = hidden.chunk(2, -1)
        x = x + (torch.nn.functional.silu(gate) * linear) @ weights[prefix + "mlp.linear_fc2.weight"].t()
    logits = norm(x, "decoder.final_layernorm.weight") @ weights["output_layer.weight"][:REAL].t()
    expected = torch.nn.functional.cross_entropy(logits, labels[0], reduction="none")
    parameters = list(weights.values())
    actual = head(model, ids, labels, cu_seqlens)
    torch.testing.assert_close(actual.losses, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(actual.total / 23, parameters),
        torch.autograd.grad(expected.mean(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_document_changes_nothing_in_its_neighbours(layers, precision):
    model = model_of(precision)
    lengths = [40, 9, 77, 30]
    ids, labels, cu_seqlens = batch(lengths)
    before = losses(model, ids, labels, cu_seqlens)
    changed = ids.clone()
    changed[:, 40:49] = (changed[:, 40:49] + 1) % REAL
    after = losses(model, changed, labels, cu_seqlens)
    assert torch.equal(before[:40], after[:40])
    assert torch.equal(before[49:], after[49:])
    assert not torch.equal(before[40:49], after[40:49])


def test_a_document_sends_no_gradient_to_its_neighbours():
    model = model_of(tie_embeddings=False)
    ids, labels, cu_seqlens = batch([20, 30])
    ids[:, :20] = ids[:, :20] % 100
    ids[:, 20:] = 100 + ids[:, 20:] % 100
    head(model, ids, labels, cu_seqlens, weights=(torch.arange(50) < 20).float()).total.backward()
    gradient = model.embedding.word_embeddings.weight.grad
    assert gradient[:100].abs().sum() > 0
    assert gradient[100:].abs().sum() == 0


def test_known_padding_and_zero_weights_change_no_other_loss(layers):
    model = model_of()
    # Two rows of 100: documents 30 + 50, 90; then padding 20 and 10.
    cu_seqlens = torch.tensor([0, 30, 80, 100, 190, 200], dtype=torch.int32)
    ids, labels, _ = batch([200])
    weights = (torch.rand(2, 100) > 0.4).float()
    weights[0, 80:], weights[1, 90:] = 0, 0
    full = model(ids, packed_seq_params=PackedSequences.build(cu_seqlens))[:, :REAL]
    full = torch.nn.functional.cross_entropy(full, labels[0], reduction="none")
    packed = PackedSequences.build(cu_seqlens, row_pointers=torch.tensor([0, 2, 3]))
    if packed.layout is not None:
        assert packed.layout.area <= 2 * (30**2 + 50**2 + 90**2)
    selected = model(ids, None, None, HeadTargets.build(labels, weights), packed)[TOKENS]
    torch.testing.assert_close(selected.losses, full[weights.view(-1) != 0], rtol=0, atol=1e-5)
    selected.total.backward()
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    (full * weights.view(-1)).sum().backward()
    for mine, other in zip(ours, (p.grad for p in model.parameters()), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_a_batch_without_any_loss_has_a_zero_loss_and_zero_gradients():
    model = model_of()
    ids, labels, cu_seqlens = batch([10])
    loss = head(model, ids, labels, cu_seqlens, weights=torch.zeros(10))
    loss.total.backward()
    assert loss.total.item() == 0.0 and loss.losses.tolist() == []
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=40),
    padded=st.lists(st.booleans(), min_size=40, max_size=40),
)
def test_the_padded_layout_holds_every_token_once(lengths, padded):
    bounds = np.concatenate(([0], np.cumsum(lengths)))
    padding = np.array(padded[: len(lengths)])
    layout = PaddedLayout.build(bounds, padding)
    assert torch.equal(layout.slots[layout.inverse], torch.arange(bounds[-1]))
    assert layout.inverse.unique().numel() == bounds[-1]
    read = sum(length * length for length, pad in zip(lengths, padding, strict=True) if not pad)
    skipped = sum(64 * length for length, pad in zip(lengths, padding, strict=True) if pad)
    # Every rectangle is paid for by what it saves, so the area stays near the sum of squares.
    assert layout.area <= 1.35 * (read + skipped) + 2048 * 40


def test_documents_lie_in_their_rectangles_in_order():
    layout = PaddedLayout.build(np.array([0, 3, 3, 8]))
    for start, length in ((0, 3), (3, 5)):
        assert (layout.inverse[start : start + length].diff() == 1).all()


@pytest.mark.parametrize("shape", [{}, {"num_query_groups": 1}, {"qk_norm": True}])
def test_greedy_decoding_with_the_cache_is_the_full_forward(shape):
    model = model_of(**shape).eval()
    prompts = [torch.arange(n) * 7 % REAL for n in (3, 11, 1)]
    steps = 6
    with torch.no_grad():
        state = GenerationState(3, max_length=11 + steps)
        packed = state.prefill([len(p) for p in prompts])
        logits = model(torch.cat(prompts)[None], packed.position_ids[None], packed_seq_params=packed)
        sequences = [p.tolist() for p in prompts]
        for _ in range(steps):
            assert logits.shape == (3, VOCAB)
            expected = []
            for sequence in sequences:
                whole = PackedSequences.build(torch.tensor([0, len(sequence)]))
                expected.append(model(torch.tensor([sequence]), packed_seq_params=whole)[-1])
            torch.testing.assert_close(logits, torch.stack(expected), rtol=1e-4, atol=1e-5)
            chosen = logits.argmax(-1)
            for sequence, token in zip(sequences, chosen.tolist(), strict=True):
                sequence.append(token)
            packed = state.decode()
            logits = model(chosen[None], packed.position_ids[None], packed_seq_params=packed)


def test_sequences_can_leave_the_cache():
    model = model_of().eval()
    with torch.no_grad():
        both, one = GenerationState(2, 16), GenerationState(1, 16)
        packed = both.prefill([4, 9])
        model(torch.arange(13)[None], packed_seq_params=packed)
        packed = one.prefill([9])
        model(torch.arange(4, 13)[None], packed_seq_params=packed)
        both.keep([1])
        results = []
        for state in (both, one):
            packed = state.decode()
            results.append(model(torch.tensor([[42]]), packed_seq_params=packed))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_a_full_state_says_so():
    state = GenerationState(1, 4)
    state.prefill([4])
    with pytest.raises(ValueError, match="does not fit a state of 4"):
        state.decode()


def test_padding_ids_are_never_predicted():
    model = model_of().eval()
    with torch.no_grad():
        logits = model(torch.arange(8)[None], packed_seq_params=PackedSequences.build(torch.tensor([0, 8])))
    assert torch.isneginf(logits[:, REAL:]).all()
    assert torch.isfinite(logits[:, :REAL]).all()


def test_weights_follow_the_seed_and_the_name_only():
    first, again = model_of(), model_of()
    deeper = model_of(num_layers=3)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, dict(again.named_parameters())[name])
        if "linear_proj" not in name and "linear_fc2" not in name:  # these shrink with depth
            assert torch.equal(parameter, dict(deeper.named_parameters())[name])
    table = first.embedding.word_embeddings.weight
    assert abs(table[:REAL].std().item() - 0.02) < 1e-3
    assert not table[REAL:].any()


@pytest.mark.parametrize("name", ["tiny", "digits", "smoke"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_parameter_count_is_the_model_s(name, tied):
    config = ModelConfig(preset=name, tie_embeddings=tied, qk_norm=True, qkv_bias=True)
    (model,) = build_model(config, 1536)
    assert sum(p.numel() for p in model.parameters()) == config.parameters(1536)


def test_published_shapes_have_their_published_size():
    assert ModelConfig(preset="llama-3.2-1b").parameters(128_256) == 1_235_814_400
    assert ModelConfig(preset="qwen2.5-0.5b").parameters(151_936) == 494_032_768
    assert ModelConfig(preset="qwen3-1.7b").parameters(151_936) == 1_720_574_976
    assert 9e6 < ModelConfig(preset="smoke").parameters(1536) < 11e6
    assert all(ModelConfig(preset=name).flops_per_token(2048, 1000) > 0 for name in PRESETS)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"preset": "smok"}, "nearest: 'smoke'"),
        ({"preset": "tiny", "num_query_groups": 3}, "not a multiple of model.num_query_groups 3"),
        ({"num_layers": 2, "hidden_size": 50, "num_attention_heads": 4}, "not a multiple of model.num_attention_heads"),
        ({"preset": "tiny", "kv_channels": 7}, "must be even"),
    ],
)
def test_an_impossible_shape_is_refused_with_a_sentence(shape, message):
    with pytest.raises(ValidationError, match=message):
        ModelConfig(**shape)


def test_recomputation_changes_no_loss_and_no_gradient():
    ids, labels, cu_seqlens = batch([30, 50])
    results = []
    for overrides in ({}, dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)):
        (model,) = build_model(ModelConfig(preset="tiny"), VOCAB, seed=3, **overrides)
        loss = head(model, ids, labels, cu_seqlens)
        loss.total.backward()
        results.append((loss.losses, [p.grad for p in model.parameters()]))
    assert torch.equal(results[0][0], results[1][0])
    for plain, recomputed in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(plain, recomputed)
