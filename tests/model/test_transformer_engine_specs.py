"""The Transformer Engine back-end, without its kernels: megatron-core's spec with stand-ins of the same structure.

The wiring is real: spec, initial weights, RoPE per document, checkpoints to and from the torch back-end.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from te_stand_ins import Norm, install

from megatron_speech.errors import InputError
from megatron_speech.model import specs
from megatron_speech.model.builder import build_model, global_named_parameters, transformer_config
from megatron_speech.model.packed import PackedSequences
from megatron_speech.model.targets import TOKENS, HeadTargets
from megatron_speech.recipe.model import ModelConfig
from megatron_speech.recipe.precision import Fp8Config
from megatron_speech.training.checkpoint.contents import METADATA
from megatron_speech.training.checkpoint.extra_state import only_saved_extra_state

SHAPE = {"preset": "tiny", "qk_norm": True, "qkv_bias": True, "tie_embeddings": False}
LENGTHS = [5, 31, 1, 40, 12]


@pytest.fixture
def engine(monkeypatch):
    """Transformer Engine seems to be there."""
    install(monkeypatch.setattr)


def build(backend, seed=3):
    # TE's RoPE kernel is replaced by the loop over documents that megatron-core has beside it.
    options = {"apply_rope_fusion": False} if backend == "te" else {}
    (model,) = build_model(
        ModelConfig(**SHAPE), 256, valid_vocab_size=200, seed=seed, max_sequence_length=64, backend=backend, **options
    )
    return model


def losses(model):
    generator = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(0, 200, (2, 1, sum(LENGTHS)), generator=generator)
    bounds = torch.tensor([0, *np.cumsum(LENGTHS)], dtype=torch.int32)
    packed = PackedSequences.build(bounds, fused=model.fused_attention)
    return model(ids, None, None, HeadTargets.build(labels), packed)[TOKENS].losses


def test_both_back_ends_start_from_the_same_weights_and_have_the_same_losses(engine):
    fused, plain = build("te"), build("torch")
    theirs = dict(global_named_parameters(plain))
    ours = dict(global_named_parameters(fused))
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert torch.equal(parameter, theirs[name]), name
    assert "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in dict(fused.named_parameters())
    torch.testing.assert_close(losses(fused), losses(plain), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("saved", "loaded"), [("torch", "te"), ("te", "torch"), ("te", "te")])
def test_a_checkpoint_of_one_back_end_loads_into_the_other(engine, tmp_path, saved, loaded):
    source, target = build(saved), build(loaded, seed=4)
    with torch.no_grad():
        for number, parameter in enumerate(source.parameters()):
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    dist_checkpointing.save({"model": source.sharded_state_dict(metadata=dict(METADATA))}, str(tmp_path))
    contents = only_saved_extra_state({"model": target.sharded_state_dict(metadata=dict(METADATA))}, [target], tmp_path)
    target.load_state_dict(dist_checkpointing.load(contents, str(tmp_path))["model"], strict=True)
    norms = [module for module in target.modules() if isinstance(module, Norm)]
    assert all((module.restored is not None) == (saved == "te") for module in norms)
    expected = dict(global_named_parameters(source))
    for name, parameter in global_named_parameters(target):
        assert torch.equal(parameter, expected[name]), name
    torch.testing.assert_close(losses(target), losses(source), rtol=0, atol=1e-5)


def test_a_batch_of_the_wrong_kind_is_an_error(engine):
    model = build("te")
    ids = torch.zeros(1, 8, dtype=torch.int64)
    with pytest.raises(TypeError, match="fused=True"):
        model(ids, None, None, HeadTargets.build(ids), PackedSequences.build(torch.tensor([0, 8])))


# ---- the choice of a back-end


@pytest.mark.parametrize(
    ("pinned", "precision", "context", "name", "reason"),
    [
        ("auto", "bf16", 1, "torch", "nothing here needs"),
        ("auto", "fp8", 1, "te", "precision fp8 needs it"),
        ("auto", "bf16", 2, "te", "parallel.context 2 needs it"),
        ("te", "bf16", 1, "te", "model.backend: te"),
        ("torch", "bf16", 1, "torch", "model.backend: torch"),
    ],
)
def test_the_choice_says_why(engine, pinned, precision, context, name, reason):
    backend = specs.choose_backend(pinned, precision, context)
    assert backend.name == name and reason in backend.reason and str(backend).startswith(f"{name} (")


@pytest.mark.parametrize(
    ("pinned", "precision", "context", "message"),
    [
        ("auto", "fp8", 1, "precision fp8 needs Transformer Engine, but it is not installed; .* precision to bf16"),
        ("auto", "bf16", 2, r"parallel.context 2 needs Transformer Engine, but .* set parallel.context to 1"),
        ("te", "bf16", 1, "model.backend te needs Transformer Engine, but .* set it to torch"),
        ("torch", "fp8", 1, "precision fp8 needs Transformer Engine, but model.backend is torch; set it to auto or te"),
    ],
)
def test_what_only_transformer_engine_can_do_is_refused_without_it(monkeypatch, pinned, precision, context, message):
    monkeypatch.setattr(specs, "transformer_engine_missing", lambda: "it is not installed")
    with pytest.raises(InputError, match=message):
        specs.choose_backend(pinned, precision, context)


def test_transformer_engine_has_no_fp32_attention(engine):
    with pytest.raises(InputError, match="needs precision bf16 or fp8"):
        specs.choose_backend("te", "fp32", 1)


def test_without_transformer_engine_the_model_is_the_torch_one():
    if specs.transformer_engine_missing() is None:
        pytest.skip("Transformer Engine is here")
    backend = specs.choose_backend("auto", "bf16", 1)
    assert backend.name == "torch" and backend.reason == "no Transformer Engine: it is not installed"


# ---- FP8, as megatron-core names it


@pytest.mark.parametrize(
    ("section", "fields"),
    [
        ({}, {"fp8": "hybrid", "fp8_recipe": "tensorwise", "fp8_amax_history_len": 1, "first_last_layers_bf16": False}),
        ({"recipe": "delayed"}, {"fp8": "hybrid", "fp8_recipe": "delayed", "fp8_amax_history_len": 1024,
                                 "fp8_amax_compute_algo": "max"}),
        ({"recipe": "delayed", "amax_history": 16, "format": "e4m3"}, {"fp8": "e4m3", "fp8_amax_history_len": 16}),
        ({"recipe": "blockwise"}, {"fp8": "e4m3", "fp8_recipe": "blockwise"}),
        ({"recipe": "tensorwise", "bf16_ends": 1}, {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 1,
                                                    "num_layers_at_end_in_bf16": 1}),
    ],
)  # fmt: skip
def test_fp8_is_what_megatron_core_understands(section, fields):
    core = transformer_config(ModelConfig(**SHAPE), precision="fp8", fp8=Fp8Config(**section))
    assert {name: getattr(core, name) for name in fields} == fields
    assert core.bf16 and core.params_dtype == torch.bfloat16 and not core.fp8_param


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_without_fp8_there_is_none(precision, dtype):
    core = transformer_config(ModelConfig(**SHAPE), precision=precision)
    assert core.fp8 is None and core.params_dtype == dtype and core.bf16 == (precision == "bf16")


def test_a_delayed_scale_cannot_leave_layers_out():
    with pytest.raises(ValueError, match=r"fp8\.bf16_ends is 2, but a delayed scale"):
        Fp8Config(recipe="delayed", bf16_ends=2)


def test_the_te_back_end_asks_for_the_fused_rope():
    assert specs.core_fields("te")["apply_rope_fusion"] is True
    assert specs.core_fields("torch") == {}
    assert parallel_state.get_context_parallel_world_size() == 1
