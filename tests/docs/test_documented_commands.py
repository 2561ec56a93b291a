"""Every command that a page of docs/ shows is run here, as written, in the order of the pages."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# One road: each page goes on from the files of the page before it.
PAGES = ("data.md", "training.md", "generation.md")
BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(path: Path) -> list[str]:
    return BLOCK.findall(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def checkout(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the root of the checkout, so that the pages' `work/` lands outside it."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("examples", "preprocess"):
        (folder / name).symlink_to(repository / name)
    return folder


@pytest.mark.xdist_group("docs")
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run_as_written(page: str, repository: Path, checkout: Path) -> None:
    commands = blocks(repository / "docs" / page)
    assert commands, f"{page} shows no command"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    for command in commands:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=checkout,
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
