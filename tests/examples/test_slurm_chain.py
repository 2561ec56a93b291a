"""A schedule of three stages as a chain of SLURM jobs, preempted twice, against a run that nothing disturbs.

Two minutes on two cores, so it runs on request only (docs/training.md):

    SLURM_CHAIN=1 .venv/bin/python -m pytest tests/examples/test_slurm_chain.py
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from toy_runs import make_toy_datasets, read_metrics, toy_recipe, without_timing, write_recipe

pytestmark = [
    pytest.mark.skipif("SLURM_CHAIN" not in os.environ, reason="two minutes; on request by SLURM_CHAIN=1"),
    pytest.mark.slow,
]

STAGES = ("s1", "s2", "sft")


def recipe(folder):
    """The toy recipe with a second stage of pretraining; 60 + 60 + 20 steps."""
    sections = toy_recipe(folder)
    pretraining, tuning = sections["stages"]
    sections["stages"] = [
        {**pretraining, "name": "s1", "tokens": 60 * 512},
        {**pretraining, "name": "s2", "tokens": 60 * 512, "task_mass": {"speech_lm": 60, "tts": 35, "text_lm": 5},
         "lr": {"peak": 1e-3, "end": 5e-4}},
        {**tuning, "tokens": 20 * 512, "lr": {"peak": 5e-4, "end": 1e-4, "warmup": 0.05}},
    ]  # fmt: skip
    return {**sections, "checkpoint": {"interval_steps": 25, "keep_last": 3}, "logging": {"interval_steps": 5}}


def read_until(log, pattern):
    """Follow a job's log until a line matches; blocks on the file, as `tail -F` does."""
    command = ["tail", "-n", "+1", "-F", str(log)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as tail:
        for line in tail.stdout:
            if re.match(pattern, line):
                tail.kill()
                return line
    raise AssertionError(f"{log} ended without a line like {pattern}")


def test_a_chain_of_jobs_preempted_twice_ends_with_the_losses_of_an_undisturbed_run(
    slurm, launch_two, repository, tmp_path
):
    file = write_recipe(tmp_path / "recipe.yaml", recipe(make_toy_datasets(tmp_path)))
    environment = {**slurm, "PYTHON": sys.executable, "LOGS": str(tmp_path / "logs"), "OMP_NUM_THREADS": "1"}
    submit = ["bash", repository / "examples/slurm/submit_train.sh", file, ",".join(STAGES), "--nodes=2",
              "--ntasks-per-node=1", "--time=10", "--", f"run_dir={tmp_path / 'chain'}"]  # fmt: skip
    done = subprocess.run(submit, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    jobs = re.findall(r"^job (\d+) trains stage (\w+)", done.stdout, re.MULTILINE)
    assert [stage for _, stage in jobs] == list(STAGES)
    logs = {stage: tmp_path / "logs" / f"{stage}-{job}.log" for job, stage in jobs}

    # The first job is requeued from outside, as a preempting partition does it; the second one's time is up.
    read_until(logs["s1"], r"s1 +[1-9]\d*/60 ")
    subprocess.run(["scontrol", "requeue", jobs[0][0]], env=slurm, check=True)
    read_until(logs["s2"], r"s2 +[1-9]\d*/60 ")
    subprocess.run(["scancel", "--signal=USR1", jobs[1][0]], env=slurm, check=True)
    subprocess.run(
        ["sbatch", "--wait", "--output=/dev/null", f"--dependency=afterany:{jobs[-1][0]}", "--wrap=true"],
        env=slurm, cwd=tmp_path, check=True, timeout=300, capture_output=True,
    )  # fmt: skip
    texts = {stage: log.read_text() for stage, log in logs.items()}
    status = json.loads((tmp_path / "chain" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", 140), texts
    for stage in ("s1", "s2"):
        assert "start 1 of job" in texts[stage], texts[stage]
    assert "REQUEUE" in texts["s1"] and "saved at step" in texts["s2"]

    reference = launch_two([str(file), f"run_dir={tmp_path / 'reference'}"])
    assert reference.returncode == 0, reference.stderr
    ours, theirs = (without_timing(read_metrics(tmp_path / run)) for run in ("chain", "reference"))
    assert [(line["step"], line.get("split")) for line in ours] == [
        (line["step"], line.get("split")) for line in theirs
    ]
    for line, other in zip(ours, theirs, strict=True):
        assert set(line) == set(other)
        # A checkpoint that the stop added splits the sum of an interval in two: the last bit of its means may differ.
        for key, value in other.items():
            same = line[key] == (pytest.approx(value, rel=1e-12) if key.startswith("loss") else value)
            assert same, (line["step"], key, line[key], value)
