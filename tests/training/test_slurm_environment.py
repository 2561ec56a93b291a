"""What `train` takes from SLURM under a plain srun."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_speech.commands.train import adopt_slurm_environment, first_host
from megatron_speech.errors import InputError

TASK = {
    "SLURM_STEP_ID": "3", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[003-006]", "SLURM_JOB_ID": "17",
}  # fmt: skip
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def adopted(monkeypatch: pytest.MonkeyPatch, **variables: str) -> list[str | None]:
    for name in (*NAMES, *(name for name in os.environ if name.startswith("SLURM_"))):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    adopt_slurm_environment()
    found = [os.environ.get(name) for name in NAMES]
    for name in NAMES:  # what was adopted is not in monkeypatch's books
        os.environ.pop(name, None)
    return found


def test_a_task_of_srun_knows_its_rank_and_where_to_meet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\necho "NodeName=$3"\necho "   NodeAddr=10.0.0.3 NodeHostName=$3"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert adopted(monkeypatch, **TASK) == ["5", "8", "1", "10.0.0.3", "20530"]
    assert adopted(monkeypatch, **TASK, MASTER_ADDR="head", MASTER_PORT="99") == ["5", "8", "1", "head", "99"]
    monkeypatch.setenv("PATH", "/nowhere")
    assert adopted(monkeypatch, **TASK)[3] == "gpu003"


@pytest.mark.parametrize(
    "variables",
    [
        {name: value for name, value in TASK.items() if not name.startswith("SLURM_STEP")},
        {**TASK, "SLURM_STEP_NUM_TASKS": "1"},
        {},
    ],
    ids=["a batch script", "a step of one task", "no SLURM"],
)
def test_elsewhere_a_process_is_alone(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    assert adopted(monkeypatch, **variables) == [None] * 5


def test_torchruns_environment_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    assert adopted(monkeypatch, **TASK, RANK="1", WORLD_SIZE="2") == ["1", "2", None, None, None]


LISTS = [
    ("n1", "n1"),
    ("n1,n2", "n1"),
    ("gpu[003-006,9],login1", "gpu003"),
    ("a,gpu[1-2]", "a"),
    ("gpu[7,9]", "gpu7"),
    ("node[1-2]-ib", "node1-ib"),
    ("rack[1-2]node[01-16]", "rack1node01"),
    ("r[2,4]n[09-10]-ib,login[1-2]", "r2n09-ib"),
    ("node[08-11].cluster.example,a", "node08.cluster.example"),
]


@pytest.mark.parametrize(("nodes", "host"), LISTS)
def test_the_first_host_of_a_list(monkeypatch: pytest.MonkeyPatch, nodes: str, host: str) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert first_host(nodes) == host


@pytest.mark.parametrize(("nodes", "host"), LISTS)
def test_slurm_reads_its_lists_likewise(nodes: str, host: str) -> None:
    if shutil.which("scontrol") is None:
        pytest.skip("SLURM's scontrol is not here")
    shown = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    assert shown.stdout.split()[0] == host == first_host(nodes)


def test_scontrol_is_asked_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$1 $2" = "show hostnames" ] && echo "first-of-$3" && echo second\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert first_host("x[1-2]") == "first-of-x[1-2]"


@pytest.mark.parametrize("nodes", ["gpu[1-2", "gpu]1", "", "[a-b]"])
def test_what_is_no_list_is_refused(monkeypatch: pytest.MonkeyPatch, nodes: str) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InputError, match="no list of hosts such as"):
        first_host(nodes)
