"""The README's commands: the short road, as a new user walks it, made small; and installing without a compiler."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import processes
import pytest

from megatron_speech.data.dataset.indexed import TokenDataset

# Every command that the README shows, and where it is run.
RUN_BY = {
    "make quickstart": "test_quickstart_leaves_speech_a_report_and_a_picture",
    "make test": "the run that this test is part of",
    "pip install .": "test_the_package_installs_and_runs_without_a_compiler",
    "pip install '.[codec2,evaluation]'": "make venv, before this test",
}


def test_the_readme_shows_no_other_command(repository: Path) -> None:
    blocks = re.findall(r"^```bash\n(.*?)^```$", (repository / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    shown = {line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()}
    assert shown == set(RUN_BY)


@pytest.mark.slow
@pytest.mark.xdist_group("quickstart")
def test_quickstart_leaves_speech_a_report_and_a_picture(repository: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if not (repository / ".venv" / "bin" / "python").exists():
        pytest.skip("make quickstart uses the checkout's .venv, and there is none: run `make venv` first")
    flags = "--utterances 150 --canaries 2 stages.pt.tokens=20k stages.sft.tokens=30k"
    done = processes.run(["make", "quickstart", f"OUT={out}", f"ARGS={flags}"], timeout=1800, cwd=repository)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    for task in ("speech", "tts", "text"):
        assert TokenDataset(out / "data" / task).total_tokens > 0
    report = json.loads((out / "report/report.json").read_text())
    assert {item["language"] for item in report["items"]} == {"en", "hi", "am"}
    assert all((out / "report" / item["wav_path"]).stat().st_size > 600 for item in report["items"])
    assert "<audio" in (out / "report/report.html").read_text()
    assert (out / "picture.png").read_bytes().startswith(b"\x89PNG")
    stages = [json.loads(line)["stage"] for line in (out / "run/metrics.jsonl").read_text().splitlines()]
    assert stages[0] == "pt" and stages[-1] == "sft"
    # What is trained follows from the recipe alone, not from how fast or how busy the machine is.
    last = json.loads((out / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert 50_000 <= last["consumed_tokens"] < 50_000 + 2 * 2048
    # The summary names what it made, and the command that it suggests is one that works.
    assert str(out / "report/report.html") in done.stdout


@pytest.mark.slow
def test_the_package_installs_and_runs_without_a_compiler(repository: Path, tmp_path: Path) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=repository,
        capture_output=True,
        check=True,
    ).stdout.split(b"\0")
    for name in filter(None, files):
        target = source / os.fsdecode(name)
        if (repository / os.fsdecode(name)).is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((repository / os.fsdecode(name)).read_bytes())
    no_compiler = {**os.environ, "CC": "/bin/false", "CXX": "/bin/false"}
    installed = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--no-deps",
            "--no-build-isolation",
            "--no-index",
            "--target",
            site,
            ".",
        ],
        cwd=source,
        env=no_compiler,
        capture_output=True,
        text=True,
    )
    assert installed.returncode == 0, installed.stderr[-3000:]
    assert not list(site.glob("megatron_speech/_C*.so"))
    # The checkout's own editable install would lend its extension to the copy.
    program = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import torch, megatron_speech
from megatron_speech.ops.loss_mask import LossPolicy, loss_mask
for _ in range(2):
    batch = loss_mask(torch.tensor([[1, 2, 3]]), torch.tensor([3], dtype=torch.int32),
                      torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0], dtype=torch.int32),
                      torch.zeros(8, dtype=torch.uint8), LossPolicy())
print(megatron_speech.__file__, batch.labels.tolist())
"""
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert str(site) in ran.stdout and "[[2, 3]]" in ran.stdout
    assert ran.stderr.lower().count("reference") == 1, ran.stderr
