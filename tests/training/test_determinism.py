"""Two runs of a deterministic recipe agree in every bit, and torch is held to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toy_runs import read_metrics, toy_recipe, train, without_timing, write_recipe

from megatron_speech.training.determinism import ENVIRONMENT


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.slow
def test_two_runs_are_bit_identical_with_deterministic_kernels_only(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_speech.parallel import groups
    from megatron_speech.training.checkpoint.load import load_for_inference
    from megatron_speech.training.step import TrainStep

    seen = []
    run_batch = TrainStep.run_batch

    def look(self: TrainStep, *arguments: object, **options: object) -> None:
        seen.append((torch.are_deterministic_algorithms_enabled(), self._engine.chunks[0].config.deterministic_mode))
        run_batch(self, *arguments, **options)

    monkeypatch.setattr(TrainStep, "run_batch", look)
    values = toy_recipe(toy, deterministic=True, spikes={"grad_norm_above": 5.0}, ema={})
    values["stages"][0]["tokens"], values["stages"][1]["tokens"] = 8 * 512, 4 * 512
    recipe = write_recipe(tmp_path / "r.yaml", values)
    weights = []
    for name in ("first", "second"):
        assert train(recipe, tmp_path / name) == 0
        for average in (False, True):
            model, _, _ = load_for_inference(tmp_path / name, ema=average)
            weights.append([parameter.detach().clone() for parameter in model.parameters()])
            groups.destroy()
    assert set(seen) == {(True, True)}
    for mine, theirs in zip(weights[0] + weights[1], weights[2] + weights[3], strict=True):
        assert torch.equal(mine.view(torch.int32), theirs.view(torch.int32))
    ours, theirs_lines = (without_timing(read_metrics(tmp_path / name)) for name in ("first", "second"))
    assert ours == theirs_lines
    seen.clear()
    assert (
        train(recipe, tmp_path / "loose", "deterministic=false", "stages.pt.tokens=512", "stages.sft.tokens=512") == 0
    )
    assert set(seen) == {(False, False)}


def test_an_environment_that_lets_results_vary_is_refused(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")
    recipe = write_recipe(tmp_path / "r.yaml", toy_recipe(toy, deterministic=True))
    assert train(recipe, tmp_path / "run") == 2
    assert "the environment has NVTE_ALLOW_NONDETERMINISTIC_ALGO=1; unset it, or set it to 0" in capsys.readouterr().err
