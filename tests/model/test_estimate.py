"""Estimates of one process against what is really kept; published sizes; remedies that help."""

from dataclasses import replace

import pytest
import torch

from megatron_speech.model.builder import build_model
from megatron_speech.model.memory import (
    GIB,
    MemoryLayout,
    divided,
    in_flight,
    layer_activations,
    max_rank_memory,
    memory,
    rank_parameters,
    remedies,
)
from megatron_speech.model.packed import PackedSequences
from megatron_speech.model.targets import HeadTargets
from megatron_speech.ops import cpu_layers
from megatron_speech.recipe.model import ModelConfig
from megatron_speech.recipe.recompute import RecomputeConfig

VOCAB, POSITIONS = 300, 256


def shape(**fields):
    return ModelConfig(**{"preset": "tiny", **fields})


@pytest.mark.parametrize(
    ("preset", "ids", "published"),
    [
        ("0.6b", 151_936, 596_049_920),
        ("1b", 128_256, 1_235_814_400),
        ("1.7b", 151_936, 1_720_574_976),
        ("8b", 128_256, 8_030_261_248),
    ],
)
def test_a_preset_has_the_parameters_of_the_checkpoint_it_is_named_after(preset, ids, published):
    """Counts of the checkpoints' own safetensors files (Qwen3-0.6B, Llama-3.2-1B, Qwen3-1.7B, Llama-3.1-8B)."""
    config = ModelConfig(preset=preset)
    assert config.parameters(ids) == published
    # The pieces of a layout together: the table's padding and, where it is tied, its second copy aside.
    layout = divided(config, ids, 2048, MemoryLayout(pipeline=4))
    rows = -(-ids // 128) * 128
    trained_tables = 1 if config.tie_embeddings else 2
    besides = config.hidden_size * (2 * rows - trained_tables * ids)
    assert sum(rank_parameters(config, ids, layout, stage) for stage in range(4)) == published + besides


def test_smoke_has_ten_million_parameters():
    assert 9e6 < ModelConfig(preset="smoke").parameters(1408) < 11e6


@pytest.mark.parametrize("fields", [{}, {"tie_embeddings": False, "qkv_bias": True}, {"qk_norm": True}])
def test_parameters_are_those_of_the_built_model(fields):
    config = shape(**fields)
    (model,) = build_model(config, VOCAB)
    layout = divided(config, VOCAB, 64, MemoryLayout())
    assert rank_parameters(config, VOCAB, layout) == sum(p.numel() for p in model.parameters())


def kept_for_backward(config, precision, recompute, learned=1.0):
    """Bytes of all that autograd keeps of a forward pass, parameters and what came from outside aside."""
    (model,) = build_model(config, VOCAB, precision=precision, recompute=recompute)
    ids = torch.randint(0, VOCAB, (1, POSITIONS))
    weights = (torch.arange(POSITIONS) < learned * POSITIONS).float()
    packed, targets = PackedSequences.build(torch.tensor([0, 100, POSITIONS])), HeadTargets.build(ids, weights)
    outside = [*model.parameters(), ids, packed.position_ids, targets.rows, packed.segments]
    outside = {tensor.untyped_storage().data_ptr() for tensor in outside}
    found = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in outside:
            found[storage.data_ptr()] = tensor, storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(ids, None, None, targets, packed)
    return sum(size for _, size in found.values())


@pytest.mark.slow
@pytest.mark.skipif(not cpu_layers.built(), reason="without the compiled layers a CPU keeps other tensors")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("fields", [{}, {"num_query_groups": 4}, {"qk_norm": True, "qkv_bias": True}])
def test_activations_are_what_autograd_keeps(fields, precision):
    two, four = (shape(num_layers=layers, **fields) for layers in (2, 4))
    for recompute in (
        RecomputeConfig(),
        RecomputeConfig(mode="selective", modules=("mlp",)),
        RecomputeConfig(mode="selective"),
        RecomputeConfig(mode="full"),
    ):
        layout = MemoryLayout(precision=precision, recompute=recompute, positions=POSITIONS, device="cpu")
        per_layer, _ = layer_activations(two, layout)
        kept = [kept_for_backward(config, precision, recompute) for config in (two, four)]
        # A recomputed part keeps a few scalars of its own.
        assert 0 <= kept[1] - kept[0] - 2 * POSITIONS * per_layer <= 16
        if recompute.mode == "none":
            # Labels, indices of rows and the like besides: under 64 bytes a position.
            estimate = memory(two, VOCAB, divided(two, VOCAB, POSITIONS, layout)).activations
            assert 0 <= kept[0] - estimate <= 64 * POSITIONS
        # What is not learned goes no further than the last layer's attention.
        quarter = replace(divided(two, VOCAB, POSITIONS, layout), learned=0.25)
        whole, less = (memory(two, VOCAB, replace(quarter, learned=share)).activations for share in (1.0, 0.25))
        found = kept[0] - kept_for_backward(two, precision, recompute, learned=0.25)
        assert found == whole - less


def test_a_micro_batch_twice_as_large_keeps_twice_as_much():
    config = ModelConfig(preset="1b")
    one, two = (
        memory(config, 193_856, divided(config, 193_856, 2048, MemoryLayout(positions=positions)))
        for positions in (2048, 4096)
    )
    assert two.activations == 2 * one.activations
    assert (two.weights, two.gradients, two.optimizer) == (one.weights, one.gradients, one.optimizer)


def test_the_first_pipeline_rank_holds_most_micro_batches():
    plain = MemoryLayout(pipeline=4, micro_batches=16)
    assert [in_flight(plain, stage) for stage in range(4)] == [4, 3, 2, 1]
    assert in_flight(MemoryLayout(pipeline=4, micro_batches=2), 0) == 2
    interleaved = MemoryLayout(pipeline=4, virtual_pipeline=2, micro_batches=16)
    assert [in_flight(interleaved, stage) for stage in range(4)] == [5.5, 4.5, 3.5, 2.5]


def test_an_8b_model_on_one_gpu_is_helped_by_what_is_named():
    config = ModelConfig(preset="8b")
    layout = divided(config, 193_856, 2048, MemoryLayout(data=8))
    limit = 80 * GIB
    assert max_rank_memory(config, 193_856, layout).total > limit
    found = remedies(config, 193_856, layout, limit)
    assert found and all(remedy.enough and remedy.total <= limit for remedy in found)
    assert found[0].change == "parallel.distributed_optimizer: true"
    assert {"parallel.tensor: 4", "parallel.pipeline: 4"} <= {remedy.change for remedy in found}


def test_where_nothing_is_enough_the_nearest_are_named():
    config = ModelConfig(preset="8b")
    layout = divided(config, 193_856, 2048, MemoryLayout())
    found = remedies(config, 193_856, layout, 4 * GIB)
    assert not any(remedy.enough for remedy in found)
    assert [remedy.total for remedy in found] == sorted(remedy.total for remedy in found)
