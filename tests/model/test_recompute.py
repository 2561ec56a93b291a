"""Recomputation changes no loss and no gradient; its cost is what the log says."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from megatron_speech.model.attention import PackedSdpaAttention
from megatron_speech.model.builder import build_model
from megatron_speech.model.packed import PackedSequences
from megatron_speech.model.targets import TOKENS, HeadTargets
from megatron_speech.recipe.model import ModelConfig
from megatron_speech.recipe.recompute import RecomputeConfig

CONFIG = ModelConfig(preset="tiny", num_layers=3)
LENGTHS = [5, 31, 1, 40, 12]


def run(section):
    """Losses, gradients by name and calls of the attention core of one packed step."""
    (model,) = build_model(CONFIG, 256, valid_vocab_size=200, seed=3, recompute=RecomputeConfig(**section))
    calls = []
    for module in model.modules():
        if isinstance(module, PackedSdpaAttention):
            module.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    generator = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(0, 200, (2, 1, sum(LENGTHS)), generator=generator)
    bounds = torch.tensor([0, *np.cumsum(LENGTHS)], dtype=torch.int32)
    weights = torch.rand(sum(LENGTHS), generator=generator).masked_fill_(torch.arange(sum(LENGTHS)) % 3 == 0, 0.0)
    losses = model(ids, None, None, HeadTargets.build(labels, weights), PackedSequences.build(bounds))
    losses.total.backward()
    return losses[TOKENS].losses.detach(), {name: p.grad for name, p in model.named_parameters()}, len(calls)


@pytest.mark.parametrize(
    ("section", "attention_runs"),
    [
        ({"mode": "selective"}, 6),
        ({"mode": "selective", "modules": ["mlp"]}, 3),
        ({"mode": "selective", "modules": ["mlp", "core_attn"]}, 6),
        ({"mode": "full"}, 6),
        ({"mode": "full", "layers": 1}, 4),
    ],
)
def test_losses_and_gradients_stay_the_same_to_the_bit(section, attention_runs):
    losses, gradients, plain_runs = run({})
    again_losses, again_gradients, runs = run(section)
    assert (plain_runs, runs) == (3, attention_runs)
    assert torch.equal(again_losses, losses)
    for name, gradient in gradients.items():
        assert torch.equal(again_gradients[name], gradient), name


def test_full_recomputation_adds_the_forward_pass_of_the_layers():
    config, seq, vocab = ModelConfig(preset="llama-3.2-1b"), 1024, 193_856
    full = RecomputeConfig(mode="full")
    assert full.flops_per_token(config, seq, (16,)) == pytest.approx(config.flops_per_token(seq, 0) / 3)
    some = RecomputeConfig(mode="full", layers=3)
    assert some.recomputed_layers((12, 4)) == 6 and some.recomputed_layers((12, 2)) == 5
    share = full.flops_per_token(config, seq, (16,)) / config.flops_per_token(seq, vocab)
    assert f"16 of 16 layers are computed again in the backward pass, +{share:.1%} FLOPs" in full.describe(
        config, seq, vocab, (16,)
    )


def test_selective_recomputation_adds_what_it_names():
    config, seq = ModelConfig(preset="llama-3.2-1b"), 1024
    attention = RecomputeConfig(mode="selective").flops_per_token(config, seq, (16,))
    # Scores and values of a causal triangle: 2 products of 2·seq/2 per head channel.
    assert attention == 16 * 32 * 64 * 2 * seq
    mlp = RecomputeConfig(mode="selective", modules=("mlp",)).flops_per_token(config, seq, (16,))
    assert mlp == 16 * 3 * 2048 * 8192 * 2
    both = RecomputeConfig(mode="selective", modules=("core_attn", "mlp"))
    assert both.flops_per_token(config, seq, (16,)) == attention + mlp
    assert "core_attn and mlp of 16 of 16 layers are computed again" in both.describe(config, seq, 1000, (16,))
    assert RecomputeConfig().describe(config, seq, 1000, (16,)) == "nothing is recomputed in the backward pass"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"mode": "selective", "layers": 2}, "recompute.layers is 2, but mode selective does not read it"),
        ({"mode": "full", "modules": ["mlp"]}, r"recompute.modules is \['mlp'\] with mode full"),
        ({"mode": "selective", "modules": []}, "name one or more"),
        ({"mode": "partial"}, "none"),
    ],
)
def test_a_section_that_says_nothing_is_refused(section, message):
    with pytest.raises(ValidationError, match=message):
        RecomputeConfig(**section)
