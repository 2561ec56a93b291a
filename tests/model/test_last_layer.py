"""The layer below the head computes its MLP for the rows that the head reads: losses and gradients are the same."""

import pytest
import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_speech.model import specs
from megatron_speech.model.builder import build_model
from megatron_speech.model.packed import PackedSequences
from megatron_speech.model.targets import HeadTargets
from megatron_speech.recipe.model import ModelConfig
from megatron_speech.recipe.recompute import RecomputeConfig

VOCAB, POSITIONS = 300, 256
BOUNDS = torch.tensor([0, 100, 180, POSITIONS])


class WholeLayer(TransformerLayer):
    """A last layer like any other."""


def build(**options):
    (model,) = build_model(ModelConfig(preset="tiny", qk_norm=True), VOCAB, seed=5, **options)
    for name, parameter in model.named_parameters():  # norms begin as ones
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    return model


@pytest.fixture
def both(monkeypatch):
    """build(**options) → the model, and the same with a whole last layer."""

    def make(**options):
        ours = build(**options)
        with monkeypatch.context() as patched:
            patched.setattr(specs, "LastLayer", WholeLayer)
            whole = build(**options)
        assert type(ours.decoder.layers[-1]) is specs.LastLayer
        assert [type(layer) for layer in whole.decoder.layers] == [TransformerLayer, WholeLayer]
        return ours, whole

    return make


def loss_and_gradients(model, ids, weights):
    targets = HeadTargets.build(ids.roll(-1, 1), weights)
    loss = model(ids, None, None, targets, PackedSequences.build(BOUNDS))
    loss.total.backward()
    return loss.total.detach(), {
        name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()
    }


@pytest.mark.parametrize(
    "recompute", [None, RecomputeConfig(mode="full"), RecomputeConfig(mode="selective", modules=("mlp",))]
)
@pytest.mark.parametrize("learned", [0, 1, 37, 128, POSITIONS])
def test_losses_and_gradients_are_those_of_a_whole_last_layer(both, learned, recompute):
    ids = torch.randint(0, VOCAB, (1, POSITIONS), generator=torch.Generator().manual_seed(1))
    weights = torch.zeros(POSITIONS)
    weights[torch.randperm(POSITIONS, generator=torch.Generator().manual_seed(2))[:learned]] = 0.5
    (loss, gradients), (whole_loss, whole_gradients) = (
        loss_and_gradients(model, ids, weights) for model in both(recompute=recompute)
    )
    torch.testing.assert_close(loss, whole_loss, rtol=1e-6, atol=0)
    assert gradients.keys() == whole_gradients.keys()
    for name, gradient in gradients.items():
        largest = whole_gradients[name].abs().max()
        assert (gradient - whole_gradients[name]).abs().max() <= 1e-6 * largest, name
        assert learned == 0 or largest > 0, name


@pytest.mark.parametrize("rows", [None, [0], [3, 99, 255]])
def test_logits_are_those_of_a_whole_last_layer(both, rows):
    ids = torch.randint(0, VOCAB, (1, POSITIONS), generator=torch.Generator().manual_seed(1))
    found = []
    for model in both():
        packed = PackedSequences.build(BOUNDS)
        packed.head_rows = None if rows is None else torch.tensor(rows)
        found.append(model(ids, None, packed_seq_params=packed))
    assert found[0].shape[0] == (POSITIONS if rows is None else len(rows))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_the_last_mlp_sees_no_other_rows():
    model, seen = build(), []
    for layer in model.decoder.layers:
        layer.mlp.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[0]))
    weights = (torch.arange(POSITIONS) % 4 == 0).float()
    loss_and_gradients(model, torch.zeros(1, POSITIONS, dtype=torch.int64), weights)
    assert seen == [POSITIONS, POSITIONS // 4]
