"""A kind of layer goes to the layer of that number in the whole model, wherever the pipeline has it."""

import json

import layer_kinds_worker
import layout_worker
import numpy as np
import pytest

GAIN = f"decoder.layers.{layer_kinds_worker.AT}.gain"


@pytest.fixture(scope="module")
def one_process(run_ranks, tmp_path_factory):
    directory = tmp_path_factory.mktemp("one")
    run_ranks(layer_kinds_worker.train, 1, str(directory), {}, None)
    return json.loads((directory / "losses.json").read_text()), layout_worker.whole_weights(directory)


@pytest.mark.parametrize(
    ("layout", "split", "rank"),
    [
        # Chunk c lies on rank c mod 2; layers are numbered from 0.
        pytest.param({"pipeline": 2}, [2, 3], 1, id="first of the second stage"),
        pytest.param({"pipeline": 2}, [3, 2], 0, id="last of the first stage"),
        pytest.param({"pipeline": 2, "virtual_pipeline": 2}, [1, 1, 2, 1], 0, id="second chunk of the first stage"),
    ],
)
def test_the_layer_of_that_number_is_of_that_kind_on_its_pipeline_rank(
    run_ranks, tmp_path, one_process, layout, split, rank
):
    run_ranks(layer_kinds_worker.train, 2, str(tmp_path), layout, split)
    for number in range(2):
        names = np.load(tmp_path / f"weights_0_{number}.npz").files
        assert [name for name in names if name.endswith("gain")] == ([GAIN] if number == rank else [])
    losses, weights = one_process
    np.testing.assert_allclose(json.loads((tmp_path / "losses.json").read_text()), losses, rtol=1e-5)
    found = layout_worker.whole_weights(tmp_path)
    assert found.keys() == weights.keys() and (weights[GAIN] != 1).any()
    for name, weight in weights.items():
        assert np.linalg.norm(found[name] - weight) <= 1e-5 * np.linalg.norm(weight), name
