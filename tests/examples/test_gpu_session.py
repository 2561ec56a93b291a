"""The GPU session without a GPU: what it refuses, how it keeps its time, and its parts that need no device."""

import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SESSION = ROOT / "benchmarks" / "gpu_session.sh"
sys.path.insert(0, str(ROOT))


def session(*arguments, **environment):
    return subprocess.run(
        ["bash", SESSION, *arguments], capture_output=True, text=True, env={**os.environ, **environment}, timeout=60
    )


@pytest.mark.slow
def test_without_a_gpu_it_is_refused_in_one_line(tmp_path):
    done = session(str(tmp_path / "out"), PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert done.stderr == f"no CUDA device is visible to {sys.executable}: these checks need one\n"


def test_called_wrongly_it_says_how_to_call_it():
    done = session()
    assert done.returncode == 2 and "gpu_session.sh OUT_DIR" in done.stderr and "BUDGET" in done.stderr


@pytest.mark.slow
def test_it_ends_in_time_whatever_its_steps_do(tmp_path):
    """An interpreter that claims a GPU: the build succeeds, loss masks fail, everything else would take a minute."""
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        "  -) exit 0 ;;\n"
        "  setup.py*) echo built ;;\n"
        "  *tests/ops/test_loss_mask.py*) exit 0 ;;\n"
        "  *loss-mask*) echo wrong; exit 3 ;;\n"
        "  *gpu_table.py*) echo table ;;\n"
        "  *) exec sleep 60 ;;\n"
        "esac\n"
    )
    python.chmod(0o755)
    begin = time.monotonic()
    done = session(str(tmp_path / "out"), PYTHON=str(python), BUDGET="8")
    assert time.monotonic() - begin < 20
    assert done.returncode == 1
    results = {line.split()[0]: line for line in done.stdout.splitlines() if line[:1].islower()}
    assert "ok" in results["build"] and "built" in results["build"]
    assert "FAILED" in results["loss_mask_pt"] and "wrong" in results["loss_mask_pt"]
    assert "TOO LONG" in results["cuda_vs_cpu"]
    assert "skipped" in results["transformer_engine"] and "skipped" in results["optimizer"]
    assert done.stdout.endswith("table\n") and (tmp_path / "out" / "table.md").read_text() == "table\n"


@pytest.mark.slow
def test_waits_are_counted_by_place_in_the_watched_steps(toy_recipe_file, tmp_path):
    from benchmarks.gpu_check import waits_in_steps

    modes = []

    def set_mode(mode):
        modes.append(mode)
        if mode == "warn":
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    overrides = [f"run_dir={tmp_path / 'run'}", "logging.interval_steps=4"]
    found = waits_in_steps(toy_recipe_file, overrides, set_mode)
    assert found["steps"] == 4 and modes == ["warn", "default"] * 4
    ((place, count),) = found["waits"].items()
    assert place.startswith(__file__) and count == 4


@pytest.fixture
def toy_recipe_file(tmp_path, monkeypatch):
    """A recipe of two stages of four steps on toy data."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "training"))
    from toy_runs import make_toy_datasets, toy_recipe, write_recipe

    recipe = toy_recipe(make_toy_datasets(tmp_path), validation={"interval_steps": 0}, checkpoint={"interval_steps": 0})
    for stage in recipe["stages"]:
        stage["tokens"] = 4 * stage["global_batch_tokens"]
    return write_recipe(tmp_path / "toy.yaml", recipe)


def test_the_table_has_a_row_for_every_figure_that_is_there(tmp_path):
    (tmp_path / "syncs.json").write_text(json.dumps({"steps": 12, "waits": {"a.py:3": 2}, "failures": ["2 waits"]}))
    mask = {"tokens_per_second": {"median": 5e9}, "ratio_to_reference": {"median": 4.0}}
    (tmp_path / "loss_mask_pt.json").write_text(json.dumps({"devices": {"cpu": {}, "cuda": {"kernel": mask}}}))
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/gpu_table.py", tmp_path], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[2:] == [
        "| loss mask, pt, kernel on cuda | 5.00 G tokens/s, 160 GB/s, 4.00 × PyTorch |",
        "| waits for the device within a step | 2 in 12 steps |",
        "| **syncs** | 2 waits |",
    ]
