"""A run that is continued under another layout goes on as if it had never stopped: weights, optimizer, data."""

from __future__ import annotations

import numpy as np
import pytest
import train_worker
from toy_runs import copy_until, make_toy_datasets, read_metrics, toy_recipe, write_recipe

HALF, STEPS, BATCH = 4, 8, 512

# Processes, and what the recipe's section `parallel` says.
LAYOUTS = {
    "one": (1, {}),
    "tensor": (2, {"tensor": 2, "sequence_parallel": True}),
    "pipeline": (2, {"pipeline": 2}),
    "uneven": (2, {"pipeline": 2, "pipeline_layout": [4, 0]}),
    "interleaved": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "data": (2, {}),
    "sharded": (2, {"distributed_optimizer": True}),
    "tensor x pipeline": (4, {"tensor": 2, "pipeline": 2}),
    "data of four": (4, {}),
    "sharded by four": (4, {"distributed_optimizer": True, "overlap_grad_reduce": True}),
    "tensor x sharded": (4, {"tensor": 2, "distributed_optimizer": True}),
    "context x tensor": (4, {"context": 2, "tensor": 2, "sequence_parallel": True}),
    "context x pipeline": (4, {"context": 2, "pipeline": 2}),
    "context x sharded": (4, {"context": 2, "distributed_optimizer": True}),
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    toy = make_toy_datasets(tmp_path_factory.mktemp("toy"))
    values = toy_recipe(
        toy,
        model={"preset": "tiny", "num_layers": 4, "num_query_groups": 4, "qk_norm": True},
        # As in the layout matrix: Adam's smallest denominator above what rounding leaves of a gradient.
        optimizer={"eps": 1e-6},
        checkpoint={"interval_steps": HALF, "keep_last": 10},
        validation={"interval_steps": 0},
        logging={"interval_steps": 1, "tensorboard": False},
    )
    stage = values["stages"][0]
    stage.update(tokens=STEPS * BATCH, micro_batch_size=1, lr={"peak": 1e-3, "end": 1e-4, "warmup": 3})
    values["stages"] = [stage]
    return write_recipe(toy / "recipe.yaml", values)


@pytest.fixture(scope="module")
def train(run_ranks, recipe, tmp_path_factory):
    """`train(layout, run, more…)` runs the recipe in `run` under a layout."""

    def run(layout, directory, *overrides):
        processes, section = LAYOUTS[layout]
        worker = train_worker.train_on_stand_ins if section.get("context", 1) > 1 else train_worker.train
        words = [f"parallel={section}", *overrides]
        logs = tmp_path_factory.mktemp("logs")
        try:
            run_ranks(worker, processes, str(logs), [str(recipe), f"run_dir={directory}", *words])
        except AssertionError as error:
            raise AssertionError((logs / "0.log").read_text()) from error
        return directory

    return run


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """Runs without an interruption, each trained once."""
    done = {}

    def run(layout, *overrides):
        if (layout, *overrides) not in done:
            done[layout, *overrides] = train(layout, tmp_path_factory.mktemp("runs") / "run", *overrides)
        return done[layout, *overrides]

    return run


def check_continued(run, reference):
    ours, theirs = read_metrics(run), read_metrics(reference)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(1, STEPS + 1))
    for line, other in zip(ours, theirs, strict=True):
        for key in ("loss", "loss/modality/audio", "grad_norm"):
            assert line[key] == pytest.approx(other[key], rel=1e-5), (line["step"], key)
        assert line["consumed_sequences"] == other["consumed_sequences"]


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ("tensor", "pipeline"),
        ("pipeline", "data"),
        ("tensor x pipeline", "one"),
        ("one", "data of four"),
        ("interleaved", "pipeline"),
        ("uneven", "interleaved"),
        ("sharded", "sharded by four"),
        ("sharded", "tensor"),
        ("pipeline", "tensor x sharded"),
    ],
)
def test_a_checkpoint_goes_on_under_another_layout(train, whole, tmp_path, saved, loaded):
    run = copy_until(whole(saved), tmp_path / "run", HALF)
    train(loaded, run)
    check_continued(run, whole("one"))


def test_masters_of_bf16_move_between_kinds_of_optimizer_to_the_bit(train, whole, tmp_path):
    """The weights are rounded, what is rounded is not: it has to come along.

    The first step under the other kind sees the same weights, so its loss is the same. After it, updates over a flat
    buffer may round the ends of tensors otherwise than updates tensor by tensor do, in the last bit, on some CPUs.
    Rounded masters would show: they differ by a part in 500.
    """
    LAYOUTS["one, sharded"] = (1, {"distributed_optimizer": True})
    for saved, loaded in (("one", "one, sharded"), ("one, sharded", "one")):
        run = copy_until(whole(saved, "precision=bf16"), tmp_path / loaded, HALF)
        train(loaded, run, "precision=bf16")
        mine, plain = ([line["loss"] for line in read_metrics(path)] for path in (run, whole(saved, "precision=bf16")))
        assert mine[: HALF + 1] == plain[: HALF + 1]
        np.testing.assert_allclose(mine, plain, rtol=2e-5)


@pytest.mark.parametrize("layout", ["context x tensor", "context x pipeline", "context x sharded"])
def test_context_parallel_ranks_train_what_one_process_trains(whole, layout):
    """With stand-ins for Transformer Engine's modules; shares of documents, sums and counts are the trainer's."""
    ours, theirs = read_metrics(whole(layout)), read_metrics(whole("one"))
    check_continued(whole(layout), whole("one"))
    for line, other in zip(ours, theirs, strict=True):
        for key in other:
            if key.startswith("loss") or key == "pad_fraction":
                assert line[key] == pytest.approx(other[key], rel=1e-5), (line["step"], key)


def test_a_checkpoint_goes_on_with_another_back_end_and_context_parallelism(train, whole, tmp_path):
    for saved, loaded in (("pipeline", "context x sharded"), ("context x tensor", "data")):
        run = copy_until(whole(saved), tmp_path / loaded, HALF)
        train(loaded, run)
        check_continued(run, whole("one"))
