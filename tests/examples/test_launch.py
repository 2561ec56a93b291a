"""examples/launch.sh lets a run save when it is asked to end."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import processes
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from toy_runs import make_toy_datasets, toy_recipe, write_recipe

pytestmark = pytest.mark.slow


def test_a_signal_to_the_launcher_saves_and_ends_the_run(repository, tmp_path):
    changes = {"logging": {"interval_steps": 1, "tensorboard": False}}
    recipe = write_recipe(tmp_path / "recipe.yaml", toy_recipe(make_toy_datasets(tmp_path), **changes))
    words = ["bash", repository / "examples/launch.sh", recipe, f"run_dir={tmp_path / 'run'}", "stages.pt.tokens=1M"]
    environment = {**os.environ, "PYTHON": sys.executable, "NPROC": "1", "OMP_NUM_THREADS": "1"}
    with processes.started([*map(str, words)], stdout=subprocess.PIPE, env=environment) as process:
        for line in process.stdout:
            if line.startswith("pt "):
                process.send_signal(signal.SIGUSR1)
                break
        process.communicate(timeout=processes.TIMEOUT_SECONDS)
    assert process.returncode == 0
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["state"] == "preempted"
    assert (tmp_path / f"run/checkpoints/step_{status['step']:08d}").is_dir()
