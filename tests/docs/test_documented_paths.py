"""The files, tests and modules that the pages name exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

PAGES = ("README.md", "CONTRIBUTING.md", "docs/*.md")  # docs/benchmarks: dated records of the tree as it was
NAMED = re.compile(r"`([\w.*/-]+\.(?:py|sh|sbatch|cpp|cu|h))(?:::(\w+)[^`]*)?`")
MODULE = re.compile(r"\bmegatron_speech(?:\.[a-z_0-9]+)+\b(?!\.\w)")
ENTRY_POINTS = {"megatron_speech.codecs"}  # a group of entry points too


def pages(repository: Path) -> list[Path]:
    found = [page for pattern in PAGES for page in sorted(repository.glob(pattern))]
    assert len(found) > 10
    return found


def files_named(repository: Path, name: str) -> list[Path]:
    """The files that `name` may mean: from the root, from the package, or, a bare name, anywhere in the checkout."""
    found = [*repository.glob(name), *(repository / "megatron_speech").glob(name)]
    if not found and "/" not in name:
        for folder in ("megatron_speech", "preprocess", "tests", "examples", "benchmarks", "csrc", "tools"):
            found += (repository / folder).rglob(name)
    return found


def test_every_file_and_test_that_a_page_names_exists(repository: Path) -> None:
    missing = []
    for page in pages(repository):
        for name, test in NAMED.findall(page.read_text(encoding="utf-8")):
            found = files_named(repository, name)
            if test:
                found = [path for path in found if f"def {test}" in path.read_text(encoding="utf-8")]
            if not found:
                missing.append(f"{page.name}: {name}{f'::{test}' if test else ''}")
    assert not missing


def test_every_module_that_a_page_names_exists(repository: Path) -> None:
    named = {(page.name, name) for page in pages(repository) for name in MODULE.findall(page.read_text("utf-8"))}
    assert named
    for page, name in named:
        if name.endswith(".json") or name in ENTRY_POINTS:
            continue
        assert importlib.util.find_spec(name) is not None, f"{page} names {name}"


@pytest.mark.parametrize(("name", "there"), [("preprocess/prepass.py", True), ("training/ranges.py", False)])
def test_a_path_is_looked_for_below_the_root_and_the_package(repository: Path, name: str, there: bool) -> None:
    assert bool(files_named(repository, name)) == there
