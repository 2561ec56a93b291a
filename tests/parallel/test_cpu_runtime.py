"""Without CUDA, megatron-core's own code runs on the CPU; with it, nothing is touched."""

import importlib
import logging
import types

import pytest
import torch

from megatron_speech.parallel import cpu_runtime, groups

pytestmark = pytest.mark.skipif(not cpu_runtime.needed(), reason="this machine has CUDA")


@pytest.fixture(autouse=True)
def one_process():
    groups.destroy()
    groups.initialize(seed=3)
    yield
    groups.destroy()


def named(entry):
    owner = torch.Tensor if entry.owner == "torch.Tensor" else importlib.import_module(entry.owner)
    return getattr(owner, entry.name)


@pytest.mark.parametrize("entry", cpu_runtime.SUPPLIED + cpu_runtime.REPLACED, ids=lambda e: f"{e.owner}.{e.name}")
def test_each_listed_call_is_supplied_and_says_why(entry):
    assert named(entry) is entry.replacement
    assert entry.reason


@pytest.mark.parametrize("literal", cpu_runtime.LITERALS, ids=lambda e: f"{e.module}.{e.function}")
def test_each_listed_function_no_longer_names_cuda(literal):
    def constants(value):
        if isinstance(value, tuple):
            for item in value:
                yield from constants(item)
        elif isinstance(value, str):
            yield value

    code = cpu_runtime._find(literal).__code__
    names = [text for text in constants(code.co_consts) if text == "cuda" or text.startswith("torch.cuda.")]
    assert not names
    assert literal.reason


def test_installing_again_changes_nothing():
    before = [cpu_runtime._find(literal).__code__ for literal in cpu_runtime.LITERALS]
    assert cpu_runtime.install()
    assert all(
        cpu_runtime._find(entry).__code__ is code for entry, code in zip(cpu_runtime.LITERALS, before, strict=True)
    )


def test_a_machine_with_cuda_is_left_alone(monkeypatch):
    monkeypatch.setattr(cpu_runtime, "_installed", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    own = object()
    for entry in cpu_runtime.SUPPLIED:
        monkeypatch.setattr(torch.Tensor if entry.owner == "torch.Tensor" else torch.cuda, entry.name, own)
    assert not cpu_runtime.install()
    assert all(named(entry) is own for entry in cpu_runtime.SUPPLIED)


def test_another_megatron_core_is_refused(monkeypatch):
    gone = cpu_runtime.Literal("megatron.core.utils", "gone", "")
    with pytest.raises(RuntimeError, match="gone does not exist"):
        cpu_runtime._find(gone)
    with pytest.raises(RuntimeError, match="no longer names CUDA"):
        cpu_runtime._rewrite(test_another_megatron_core_is_refused.__code__.replace(co_consts=(None,)), gone)


def test_only_the_named_constants_change():
    def function():
        return "cuda", ("torch.cuda.FloatTensor", "torch.FloatTensor"), "not cuda", 3, {"device": "cuda"}

    code = cpu_runtime._rewrite(function.__code__, cpu_runtime.LITERALS[0])
    assert types.FunctionType(code, {})() == (
        "cpu",
        ("torch.FloatTensor", "torch.FloatTensor"),
        "not cuda",
        3,
        {"device": "cpu"},
    )


def test_the_generator_tracker_forks_and_comes_back(caplog):
    from megatron.core import tensor_parallel

    tracker = tensor_parallel.get_cuda_rng_tracker()
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    with caplog.at_level(logging.WARNING), tracker.fork():
        first = torch.rand(2)
    assert torch.equal(torch.rand(2), expected)
    with tracker.fork():
        assert not torch.equal(torch.rand(2), first)
    assert not caplog.records


def test_timers_and_the_rerun_machine_run():
    from megatron.core.rerun_state_machine import RerunStateMachine
    from megatron.core.timers import Timers

    timers = Timers(log_level=1, log_option="minmax")
    timers("step", log_level=0).start(barrier=True)
    timers("step").stop()
    assert timers("step").elapsed() >= 0
    machine = RerunStateMachine()
    assert machine._reduce_any([True, False]) == (True, False)
    machine._save_state()
    machine._restore_state()


def test_gradients_are_clipped_and_counted():
    from megatron.core.optimizer import clip_grads

    group = torch.distributed.group.WORLD
    parameter = torch.nn.Parameter(torch.zeros(4))
    parameter.grad = torch.tensor([3.0, 0.0, 4.0, 0.0])
    assert clip_grads.get_grad_norm_fp32([parameter.grad], grad_stats_parallel_group=group) == 5.0
    assert clip_grads.get_grad_norm_fp32([parameter.grad], float("inf"), group) == 4.0
    assert clip_grads.count_zeros_fp32([parameter], group) == 2
    clip_grads.clip_grad_by_total_norm_fp32([parameter], max_norm=1.0, total_norm=5.0)
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.0, 0.8, 0.0]))


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.slow
def test_a_checkpoint_saves_and_loads(tmp_path, asynchronous):
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

    from megatron_speech.model.builder import build_model
    from megatron_speech.recipe.model import ModelConfig

    (model,) = build_model(ModelConfig(preset="tiny"), 256, seed=1)
    request = dist_checkpointing.save(model.sharded_state_dict(), str(tmp_path), async_sharded_save=asynchronous)
    if asynchronous:
        queue = AsyncCallsQueue()
        queue.schedule_async_request(request)
        queue.maybe_finalize_async_calls(blocking=True)
        queue.close()
    (other,) = build_model(ModelConfig(preset="tiny"), 256, seed=2)
    other.load_state_dict(dist_checkpointing.load(other.sharded_state_dict(), str(tmp_path)))
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
