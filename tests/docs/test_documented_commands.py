"""Every command that a page of docs/ shows is run here, as written: a test for each page, all in one folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import processes
import pytest

# The page, and those whose files it goes on from.
NEEDS: dict[str, tuple[str, ...]] = {
    "data.md": (),
    "tokenizers.md": ("data.md",),
    "blend.md": ("data.md",),
    "training.md": ("data.md",),
    "parallelism.md": (),
    "checkpoints.md": ("data.md",),
    "running.md": ("data.md",),
    "generation.md": ("data.md", "training.md"),
    "backbones.md": ("data.md", "training.md"),
}
BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(path: Path) -> list[str]:
    return BLOCK.findall(path.read_text(encoding="utf-8"))


class Road:
    """A folder that looks like the root of the checkout, so that the `work/` of the pages lands outside it."""

    def __init__(self, repository: Path, folder: Path) -> None:
        self._pages, self._folder = repository / "docs", folder
        self._outcomes: dict[str, str] = {}
        for name in ("examples", "preprocess"):
            (folder / name).symlink_to(repository / name)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self._environment = {**os.environ, "PATH": path, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}

    def walk(self, page: str) -> str:
        """Run the commands of the page once, after those of the pages that it needs; returns what failed, or ""."""
        if page not in self._outcomes:
            self._outcomes[page] = self._failure(page)
        return self._outcomes[page]

    def _failure(self, page: str) -> str:
        for needed in NEEDS[page]:
            if failure := self.walk(needed):
                return f"{page} goes on from what {needed} makes, which failed: {failure}"
        for command in blocks(self._pages / page):
            done = processes.run(
                ["bash", "-euo", "pipefail", "-c", command],
                cwd=self._folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
            )
            if done.returncode != 0:
                return f"{page}:\n{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return ""


@pytest.fixture(scope="module")
def road(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Road:
    """The folder that the pages share."""
    return Road(repository, tmp_path_factory.mktemp("road"))


@pytest.mark.slow
@pytest.mark.xdist_group("docs")
@pytest.mark.parametrize("page", NEEDS)
def test_the_commands_of_a_page_run_as_written(repository: Path, road: Road, page: str) -> None:
    assert blocks(repository / "docs" / page), f"{page} shows no command"
    failure = road.walk(page)
    assert not failure, failure


def test_no_other_page_shows_a_command_that_is_not_run(repository: Path) -> None:
    # digits.md and the README show the long roads, which `make` targets and their own tests run.
    for page in (repository / "docs").rglob("*.md"):
        if page.name not in (*NEEDS, "digits.md"):
            assert not blocks(page), f"{page.name} shows commands that no test runs"
