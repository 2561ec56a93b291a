"""Every layout trains the same model: twenty steps through megatron-core's schedules, DDP and optimizers on gloo."""

import json

import layout_worker
import numpy as np
import pytest


@pytest.fixture(scope="module")
def train(run_ranks, tmp_path_factory):
    """Losses, gradient norms and final weights of a layout; each is trained once."""
    done = {}

    def run(world_size, layout, shape=None, model=None, optimizer=None):
        key = json.dumps([world_size, layout, shape, model, optimizer])
        if key not in done:
            directory = tmp_path_factory.mktemp("layout")
            run_ranks(layout_worker.train, world_size, str(directory), layout, shape, model, optimizer)
            history = json.loads((directory / "losses.json").read_text())
            done[key] = history, layout_worker.whole_weights(directory)
        return done[key]

    return run


SEQUENCE = {"sequence_parallel": True}
SHARDED = {"use_distributed": True}


def split(*layers):
    return {"pipeline_layout": layers}


def check_same(one, other):
    (history, weights), (other_history, other_weights) = one, other
    assert len(history) == len(other_history) == layout_worker.STEPS
    for (loss, norm), (other_loss, other_norm) in zip(history, other_history, strict=True):
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert other_norm == pytest.approx(norm, rel=1e-5)
    assert weights.keys() == other_weights.keys()
    for name, weight in weights.items():
        other_weight = other_weights[name][: len(weight)]  # the table is padded to what the tensor ranks divide
        assert np.linalg.norm(other_weight - weight) <= 1e-5 * np.linalg.norm(weight), name


def test_the_model_learns(train):
    history, _ = train(1, {})
    assert history[-1][0] < 0.8 * history[0][0]


@pytest.mark.parametrize(
    ("processes", "layout", "model", "optimizer"),
    [
        pytest.param(2, {}, None, None, id="data-parallel"),
        pytest.param(2, {}, None, SHARDED, id="distributed-optimizer"),
        pytest.param(2, {"tensor": 2}, None, None, id="tensor-parallel"),
        pytest.param(2, {"tensor": 2}, SEQUENCE, None, id="tensor-and-sequence-parallel"),
        pytest.param(2, {"pipeline": 2}, None, None, id="pipeline-parallel"),
        pytest.param(2, {"pipeline": 2, "virtual_pipeline": 2}, None, None, id="interleaved-pipeline"),
        pytest.param(2, {"pipeline": 2}, split(3, 1), None, id="uneven-pipeline"),
        pytest.param(2, {"pipeline": 2, "virtual_pipeline": 2}, split(1, 2, 1, 0), None, id="uneven-interleaved"),
        pytest.param(4, {}, None, SHARDED, id="distributed-optimizer-of-four"),
        pytest.param(4, {"pipeline": 4}, None, None, id="pipeline-of-four"),
        pytest.param(4, {"pipeline": 4}, split(0, 2, 2, 0), None, id="ends-without-layers"),
        pytest.param(4, {"tensor": 2}, None, None, id="tensor-times-data"),
        pytest.param(4, {"tensor": 2}, SEQUENCE, SHARDED, id="sequence-times-distributed-optimizer"),
        pytest.param(4, {"tensor": 2, "pipeline": 2}, None, None, id="tensor-times-pipeline"),
        pytest.param(4, {"tensor": 2, "pipeline": 2}, SEQUENCE, None, id="sequence-times-pipeline"),
        pytest.param(4, {"pipeline": 2}, None, None, id="pipeline-times-data"),
        pytest.param(4, {"pipeline": 2, "virtual_pipeline": 2}, None, SHARDED, id="interleaved-times-sharded"),
    ],
)
def test_every_layout_trains_what_one_process_trains(train, processes, layout, model, optimizer):
    check_same(train(1, {}), train(processes, layout, None, model, optimizer))


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}], ids=["tensor", "pipeline"])
def test_an_untied_head_and_query_norms_keep_the_losses(train, layout):
    shape = {"tie_embeddings": False, "qk_norm": True, "qkv_bias": True}
    check_same(train(1, {}, shape), train(2, layout, shape, SEQUENCE if "tensor" in layout else None))


def test_bf16_with_the_distributed_optimizer_learns(train):
    losses = [loss for loss, _ in train(2, {}, None, {"precision": "bf16"}, SHARDED)[0]]
    reference = [loss for loss, _ in train(1, {})[0]]
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


PIPELINES = [
    pytest.param(4, {"pipeline": 4}, id="four-stages"),
    pytest.param(2, {"pipeline": 2, "virtual_pipeline": 2}, id="interleaved"),
]


def second_document(run_ranks, directory, processes, layout, leaking=None):
    directory.mkdir()
    run_ranks(layout_worker.two_documents, processes, str(directory), layout, leaking)
    return np.load(directory / "losses.npy")


@pytest.mark.parametrize(("processes", "layout"), PIPELINES)
def test_documents_stay_apart_on_every_stage(run_ranks, tmp_path, processes, layout):
    one, other = second_document(run_ranks, tmp_path / "apart", processes, layout)
    assert np.array_equal(one, other)
    for stage in range(1, processes):
        # One stage that does not know where documents begin is enough to be seen: the check is able to fail.
        one, other = second_document(run_ranks, tmp_path / str(stage), processes, layout, stage)
        assert not np.allclose(one, other, rtol=0, atol=1e-4)
