"""A SLURM of two nodes for the tests of the launch scripts."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def slurm(repository):
    """Environment with a SLURM_CONF whose controller answers: the one that is there, else one of our own."""
    for program in ("sbatch", "scontrol", "squeue"):
        if shutil.which(program) is None:
            pytest.skip(f"SLURM is not installed: no {program}")
    if "SLURM_CONF" in os.environ:
        if subprocess.run(["scontrol", "ping"], capture_output=True, check=False).returncode:
            pytest.skip("the SLURM controller of SLURM_CONF does not answer")
        yield dict(os.environ)
        return
    script = repository / "tests" / "examples" / "slurm_cluster.sh"
    folder = Path(tempfile.mkdtemp(prefix="slurm"))  # tmp_path may be too long for a socket
    done = subprocess.run(["bash", script, "start", folder], capture_output=True, text=True, check=False)
    if done.returncode:
        shutil.rmtree(folder, ignore_errors=True)
        pytest.skip(f"no SLURM can be brought up here: {done.stderr.strip()}")
    yield {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    subprocess.run(["bash", script, "stop", folder], check=True)
    shutil.rmtree(folder, ignore_errors=True)
