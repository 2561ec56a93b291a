"""`megatron-speech compare`: a change is judged by paired losses, speed and memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_speech import cli
from megatron_speech.errors import InputError
from megatron_speech.evaluation.compare import compare_runs

STEPS = 20


def record(step: int, *, loss: float, speed: float, memory: float) -> dict[str, Any]:
    return {
        "step": step, "stage": "pt", "consumed_tokens": 1000 * step, "loss": loss, "loss/modality/audio": 2 * loss,
        "grad_norm": 1.0, "tokens_per_second_per_gpu": speed, "memory_gib": memory,
    }  # fmt: skip


def make_run(
    path: Path, *, shift: float = 0.0, speed: float = 100.0, memory: float = 10.0, lr: float = 1e-3, stride: int = 1
) -> Path:
    """Losses of a noisy descent, all of them `shift` higher; the first record's speed is that of a cold start."""
    path.mkdir()
    rows = []
    for step in range(1, STEPS + 1, stride):
        loss = 5 - 0.1 * step + 0.3 * (step * 7 % 5) + shift
        rows.append(record(step, loss=loss, speed=1.0 if step == 1 else speed, memory=memory))
    end = {"step": STEPS, "stage": "pt", "consumed_tokens": 1000 * STEPS}
    rows.append({**end, "split": "validation", "loss": 3 + shift})
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "recipe.yaml").write_text(f"name: {path.name}\nstages: [{{name: pt, lr: {{peak: {lr}}}}}]\n")
    (path / "environment.json").write_text(json.dumps({"torch": "2.13.0", "git": {"commit": path.name}}))
    return path


def test_equal_runs_are_equal_bit_for_bit(tmp_path: Path) -> None:
    found = compare_runs(make_run(tmp_path / "a"), make_run(tmp_path / "b"))
    assert found["worse"] == []
    assert found["records"] == STEPS and found["steps"] == [1, STEPS]
    assert found["recipe"] == {}  # names of runs are their own
    assert found["environment"] == {"git.commit": ["a", "b"]}
    assert found["losses"]["loss"]["first_difference"] is None
    assert found["verdict"].startswith("B is no worse than A. Over steps 1 to 20 every loss is the same bit for bit")


def test_a_shift_far_below_the_noise_of_steps_is_found_by_pairs(tmp_path: Path) -> None:
    found = compare_runs(make_run(tmp_path / "a"), make_run(tmp_path / "b", shift=0.01))
    loss = found["losses"]["loss"]
    assert loss["mean"] == pytest.approx(0.01) and loss["error"] < 1e-9
    assert found["losses"]["loss/modality/audio"]["mean"] == pytest.approx(0.02)
    assert found["validation"]["mean"] == pytest.approx(0.01)
    assert len(found["worse"]) == 2 and "loss is higher by 0.01 nats" in found["worse"][0]
    assert compare_runs(tmp_path / "b", tmp_path / "a")["worse"] == []  # lower is not worse


def test_rounding_is_no_difference(tmp_path: Path) -> None:
    found = compare_runs(make_run(tmp_path / "a"), make_run(tmp_path / "b", shift=1e-6))
    assert "the same up to rounding" in found["verdict"]
    assert found["losses"]["loss"]["first_difference"] == 1


def test_speed_and_memory_are_judged_without_the_cold_start(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a")
    slower = compare_runs(a, make_run(tmp_path / "slower", speed=90.0, memory=11.0))
    assert slower["speed"]["ratio"] == pytest.approx(0.9) and slower["memory"]["ratio"] == pytest.approx(1.1)
    assert [sentence.split()[0] for sentence in slower["worse"]] == ["speed", "memory"]
    assert compare_runs(a, make_run(tmp_path / "faster", speed=120.0))["worse"] == []


def test_what_the_recipes_do_otherwise_is_named(tmp_path: Path) -> None:
    found = compare_runs(make_run(tmp_path / "a"), make_run(tmp_path / "b", lr=2e-3))
    assert found["recipe"] == {"stages.pt.lr.peak": [0.001, 0.002]}


def test_runs_that_log_at_other_steps_share_what_they_share(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", stride=3)
    assert compare_runs(a, b)["records"] == 7
    assert compare_runs(a, b, from_step=4)["steps"] == [7, 19]
    with pytest.raises(InputError, match="no record at the same number of tokens after step 30"):
        compare_runs(a, b, from_step=30)


def test_the_exit_status_is_the_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = str(make_run(tmp_path / "a")), str(make_run(tmp_path / "b", shift=0.01))
    assert cli.main(["compare", a, b]) == 1
    assert "B is worse: loss is higher by 0.01 nats on average (tolerance 0.005)" in capsys.readouterr().out
    assert cli.main(["compare", a, b, "--loss-tolerance", "0.02", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["records"] == STEPS
    assert cli.main(["compare", a, str(tmp_path)]) == 2
    assert "is not a run directory" in capsys.readouterr().err
    assert cli.main(["compare", a, b, "--speed-tolerance=-1"]) == 2
