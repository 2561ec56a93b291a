"""`make quick` leaves out what is marked slow or distributed, and looks into every room all the same."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

LEAST = 3  # quick tests of a folder


@pytest.fixture(scope="module")
def quick(collected: list[pytest.Item]) -> list[pytest.Item]:
    return [item for item in collected if not any(map(item.get_closest_marker, ("slow", "distributed")))]


def imported_by(module: Path) -> set[str]:
    """The dotted names that a file imports, wherever it does."""
    names = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_folder_of_tests_has_quick_ones(repository: Path, quick: list[pytest.Item]) -> None:
    tests = repository / "tests"
    count = Counter(item.path.parent.relative_to(tests).as_posix() for item in quick)
    folders = {path.parent.relative_to(tests).as_posix() for path in tests.rglob("test_*.py")} - {"."}
    assert len(folders) >= 10
    assert not {folder: count[folder] for folder in folders if count[folder] < LEAST}


def test_every_package_is_imported_by_a_module_with_quick_tests(repository: Path, quick: list[pytest.Item]) -> None:
    root = repository / "megatron_speech"
    packages = {".".join(path.parent.relative_to(repository).parts) for path in root.rglob("__init__.py")}
    assert len(packages) >= 10
    names = {name for module in {item.path for item in quick} for name in imported_by(module)}
    assert not {package for package in packages if not any(f"{name}.".startswith(f"{package}.") for name in names)}
