"""The SLURM scripts under a real SLURM: two nodes on this machine, a requeued task, the bytes of one run."""

import json
import os
import subprocess
import sys

import pytest

from megatron_speech.tokens.space import CodecDescription, TokenSpace

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

ROWS = 4000

# The first start of task 1 never ends: it begins the conversion, says so, and is killed by the requeue.
PYTHON = """#!/usr/bin/env bash
if [[ ${SLURM_ARRAY_TASK_ID:-} == 1 && -z ${SLURM_RESTART_COUNT:-} ]]; then
  %(python)s "$@" > held.log 2>&1 &
  echo started > %(started)s
  wait
  exec tail -f /dev/null
fi
exec %(python)s "$@"
"""


def test_an_array_with_a_requeued_task_gives_the_bytes_of_one_run(slurm, repository, tmp_path):
    with open(tmp_path / "text.jsonl", "w") as handle:
        for i in range(ROWS):
            handle.write(json.dumps({"sample_id": f"d{i}", "language": "en", "text": f"row {i} " * 20}) + "\n")
    TokenSpace.build("bytes", CodecDescription("toy", "c" * 64, 8000, 25.0, ("codes",), (32,))).save(
        tmp_path / "ts.json"
    )
    flags = ["--task", "text_lm", "--input", "text.jsonl", "--token-space", "ts.json"]
    python, started = tmp_path / "python", tmp_path / "started"
    os.mkfifo(started)
    python.write_text(PYTHON % {"python": sys.executable, "started": started})
    python.chmod(0o755)
    submit = ["bash", repository / "examples/slurm/submit.sh", "4", "out/t", "--cpus-per-task=1", "--time=5", "--"]
    done = subprocess.run(
        [*submit, *flags], env={**slurm, "PYTHON": str(python)}, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    array, merge = words[2], words[words.index("job", 3) + 1]
    assert started.read_text() == "started\n"  # waits for it
    subprocess.run(["scontrol", "requeue", f"{array}_1"], env=slurm, check=True)
    # A job that depends on the merge ends when it does: `sbatch --wait` is the clock.
    subprocess.run(
        ["sbatch", "--wait", "--output=/dev/null", f"--dependency=afterany:{merge}", "--wrap=true"],
        env=slurm,
        cwd=tmp_path,
        check=True,
        timeout=120,
        capture_output=True,
    )
    log = (tmp_path / f"out/t.logs/preprocess-{array}_1.log").read_text()
    assert "start 0" in log and "start 1" in log and "REQUEUE" in log
    subprocess.run(
        [sys.executable, repository / "preprocess/preprocess_data.py", *flags, "--output-prefix", "one/t"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    for suffix in (".bin", ".idx", ".docs.parquet"):
        assert (tmp_path / f"out/t{suffix}").read_bytes() == (tmp_path / f"one/t{suffix}").read_bytes()
