"""Runs that are killed, at places chosen here; `python tests/training/kill_harness.py` draws as many as one likes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import processes
import pytest

# Of one process and of two: (signal, place, which time it is come by, rank).
TRIALS = [
    [1, [["KILL", "step", 9, 0]]],
    [1, [["TERM", "step", 6, 0], ["KILL", "validation", 2, 0]]],
    [1, [["KILL", "disk", 17, 0], ["KILL", "disk", 23, 0], ["KILL", "disk", 29, 0]]],
    [2, [["KILL", "disk", 3, 1], ["TERM", "stage", 1, 0]], True],
]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_that_is_killed_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    harness = [sys.executable, str(Path(__file__).with_name("kill_harness.py")), "--trials", json.dumps(TRIALS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = processes.run([*harness, "--folder", str(tmp_path)], timeout=600, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    outcomes = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(outcomes) == len(TRIALS) and not any(outcome["problems"] for outcome in outcomes)
    # Every one of them did end a run, and some of them in the middle of writing.
    assert all(end["landed"] for outcome in outcomes for end in outcome["ends"][:-1])
    assert any(end["half"] for outcome in outcomes for end in outcome["ends"])
