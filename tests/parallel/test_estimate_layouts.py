"""The estimate of a layout is what its ranks hold."""

import json

import estimate_worker
import pytest

UNTIED = {"tie_embeddings": False, "qk_norm": True, "qkv_bias": True}


def case(precision="bf16", sharded=False, shape=None, **groups):
    return {"groups": groups, "precision": precision, "sharded": sharded, "shape": shape or {}}


CASES = {
    "data-parallel": case(),
    "distributed-optimizer": case(sharded=True),
    "distributed-optimizer-fp32": case("fp32", sharded=True),
    "tensor-parallel": case(tensor=2, shape=UNTIED),
    "pipeline-of-four": case("fp32", pipeline=4),
    "pipeline-of-four-untied": case(pipeline=4, shape=UNTIED),
    "interleaved": case(pipeline=2, virtual_pipeline=2, sharded=True),
    "tensor-times-pipeline": case(tensor=2, pipeline=2),
}


@pytest.fixture(scope="module")
def ranks(run_ranks, tmp_path_factory):
    """What each of four ranks found, by case."""
    directory = tmp_path_factory.mktemp("estimate")
    run_ranks(estimate_worker.measure, 4, str(directory), list(CASES.values()))
    found = [json.loads((directory / f"rank_{rank}.json").read_text()) for rank in range(4)]
    return {name: [rank[number] for rank in found] for number, name in enumerate(CASES)}


@pytest.mark.parametrize("name", CASES)
def test_every_rank_holds_what_the_estimate_says(ranks, name):
    for rank in ranks[name]:
        measured, estimated = rank["measured"], rank["estimated"]
        assert measured["parameters"] == estimated["parameters"]
        assert measured["weights"] == estimated["weights"]
        # The distributed optimizer's buffers begin every parameter at a multiple of 64 elements and divide evenly
        # among the ranks; a rank's share is of the buffer, which a parameter's edge need not respect.
        slack = 4 * 64 * (rank["tensors"] + 4) if CASES[name]["sharded"] else 0
        assert abs(measured["gradients"] - estimated["gradients"]) <= slack
        assert abs(measured["optimizer"] - estimated["optimizer"]) <= 3 * slack


def test_shares_of_the_distributed_optimizer_add_up(ranks):
    whole = sum(rank["measured"]["optimizer"] for rank in ranks["distributed-optimizer"])
    assert whole == ranks["data-parallel"][0]["measured"]["optimizer"]
