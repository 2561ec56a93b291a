"""Every command that a page of docs/ shows is run here, as written, in the order of the pages."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# One road: each page goes on from the files of the page before it.
PAGES = (
    "data.md", "tokenizers.md", "blend.md", "training.md", "parallelism.md", "checkpoints.md", "running.md",
    "generation.md", "backbones.md",
)  # fmt: skip
BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(path: Path) -> list[str]:
    return BLOCK.findall(path.read_text(encoding="utf-8"))


@pytest.mark.xdist_group("docs")
def test_the_commands_of_the_pages_run_as_written(repository: Path, tmp_path: Path) -> None:
    # A folder that looks like the root of the checkout, so that the pages' `work/` lands outside it.
    for name in ("examples", "preprocess"):
        (tmp_path / name).symlink_to(repository / name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    for page in PAGES:
        commands = blocks(repository / "docs" / page)
        assert commands, f"{page} shows no command"
        for command in commands:
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", command],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                stdin=subprocess.DEVNULL,
            )
            assert done.returncode == 0, f"{page}:\n{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def test_no_other_page_shows_a_command_that_is_not_run(repository: Path) -> None:
    # digits.md and the README show the long roads, which `make` targets and their own tests run.
    for page in (repository / "docs").rglob("*.md"):
        if page.name not in (*PAGES, "digits.md"):
            assert not blocks(page), f"{page.name} shows commands that no test runs"
