"""Every layout trains the same model: twenty steps through megatron-core's schedules, DDP and optimizers on gloo."""

import json

import layout_worker
import numpy as np
import pytest


@pytest.fixture(scope="module")
def train(run_ranks, tmp_path_factory):
    done = {}

    def run(world_size, layout, shape=None, model=None, optimizer=None):
        key = json.dumps([world_size, layout, shape, model, optimizer])
        if key not in done:
            directory = tmp_path_factory.mktemp("layout")
            run_ranks(layout_worker.train, world_size, str(directory), layout, shape, model, optimizer)
            done[key] = json.loads((directory / "losses.json").read_text())
        return done[key]

    return run


SEQUENCE = {"sequence_parallel": True}


def check_same(one, other):
    assert len(one) == len(other) == layout_worker.STEPS
    for (loss, norm), (other_loss, other_norm) in zip(one, other, strict=True):
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert other_norm == pytest.approx(norm, rel=1e-4)


def test_the_model_learns(train):
    losses = [loss for loss, _ in train(1, {})]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("layout", "model"),
    [
        pytest.param({}, None, id="data-parallel"),
        pytest.param({"tensor": 2}, None, id="tensor-parallel"),
        pytest.param({"tensor": 2}, SEQUENCE, id="tensor-and-sequence-parallel"),
        pytest.param({"pipeline": 2}, None, id="pipeline-parallel"),
        pytest.param({"pipeline": 2, "virtual_pipeline": 2}, None, id="interleaved-pipeline"),
    ],
)
def test_two_ranks_have_the_losses_of_one(train, layout, model):
    check_same(train(1, {}), train(2, layout, None, model))


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}], ids=["tensor", "pipeline"])
def test_an_untied_head_and_query_norms_keep_the_losses(train, layout):
    shape = {"tie_embeddings": False, "qk_norm": True, "qkv_bias": True}
    check_same(train(1, {}, shape), train(2, layout, shape, SEQUENCE if "tensor" in layout else None))


def test_the_distributed_optimizer_keeps_the_losses(train):
    check_same(train(1, {}), train(2, {}, None, None, {"use_distributed": True}))


def test_bf16_with_the_distributed_optimizer_learns(train):
    losses = [loss for loss, _ in train(2, {}, None, {"precision": "bf16"}, {"use_distributed": True})]
    reference = [loss for loss, _ in train(1, {})]
    assert losses[-1] == pytest.approx(reference[-1], rel=0.03)


def test_every_tensor_parallel_rank_has_all_logits(run_ranks, tmp_path):
    logits = []
    for number, (layout, options) in enumerate([({}, {}), ({"tensor": 2}, {}), ({"tensor": 2}, SEQUENCE)]):
        directory = tmp_path / str(number)
        directory.mkdir()
        run_ranks(layout_worker.predict, layout.get("tensor", 1), str(directory), layout, options)
        logits.append(np.load(directory / "logits.npy"))
    real = layout_worker.REAL
    for other in logits[1:]:
        np.testing.assert_allclose(other[:, :real], logits[0][:, :real], rtol=1e-4, atol=1e-5)
        assert np.isneginf(other[:, real:]).all()
