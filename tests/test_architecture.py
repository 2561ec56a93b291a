"""The plan of the house: no circles, one stated order of rooms, and a picture in the design that shows what is so."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

# A room imports rooms that stand before it, and none that stand beside or behind it.
ORDER = (
    ("base",),  # errors, files, wording and the other modules that BASE in tools/rooms.py names
    ("ops",),
    ("environment", "tokens"),
    ("codecs", "parallel", "recipe"),
    ("data", "model"),
    ("preprocess", "training"),
    ("convert", "generation", "text_tokenizers"),
    ("evaluation",),
    ("benchmark",),
    ("commands",),
    ("cli",),
)
# Inside of data/ and of training/.
DATA_ORDER = (("dataset",), ("blend",), ("sequences",), ("loading",), ("stage",))

# Imports of the project's own modules inside of functions: commands and benchmarks answer --help without torch, and
# a blend is looked at without it.
LAZY_ROOMS = ("commands", "benchmark", "cli")
LAZY = {("megatron_speech.data.stage", "megatron_speech.data.loading.loader"),
        ("megatron_speech.data.stage", "megatron_speech.ops.loss_mask")}  # fmt: skip


@pytest.fixture(scope="session")
def rooms(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("rooms", repository / "tools" / "rooms.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["rooms"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def graph(rooms: ModuleType) -> dict[str, set[str]]:
    """Module → modules that it imports, of this checkout."""
    found: dict[str, set[str]] = rooms.module_graph()
    return found


def later_imports(graph: dict[str, set[str]], order: tuple[tuple[str, ...], ...]) -> list[str]:
    """`a imports b` for every import that the order forbids."""
    place = {room: number for number, together in enumerate(order) for room in together}
    assert set(graph) == set(place), "a room without a place in the order, or a place without a room"
    return [f"{room} imports {other}" for room in graph for other in graph[room] if place[other] >= place[room]]


def test_the_analysis_sees_imports_in_functions_and_for_types_only(rooms: ModuleType, tmp_path: Path) -> None:
    package = tmp_path / "megatron_speech"
    (package / "a").mkdir(parents=True)
    (package / "b").mkdir()
    (package / "a" / "one.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from megatron_speech.b.two import C\n"
    )
    (package / "b" / "two.py").write_text(
        "import megatron_speech.b.three\ndef f():\n    from megatron_speech.a import one\n"
    )
    (package / "b" / "three.py").write_text("")
    graph = rooms.module_graph(tmp_path)
    assert graph["megatron_speech.a.one"] == {"megatron_speech.b.two"}
    assert graph["megatron_speech.b.two"] == {"megatron_speech.b.three", "megatron_speech.a.one"}
    assert rooms.circles(graph) == [["megatron_speech.a.one", "megatron_speech.b.two"]]
    assert rooms.circles(rooms.folder_graph(graph, "megatron_speech")) == [["a", "b"]]
    inside = [line[0] for line in rooms.imports_of(package / "b" / "two.py", graph) if line[2]]
    assert inside == ["megatron_speech.a.one"]


def test_no_circle_between_files_or_between_what_lies_in_a_folder(
    rooms: ModuleType, graph: dict[str, set[str]]
) -> None:
    assert len(graph) > 150
    assert rooms.circles(graph) == []
    folders = sorted({name.rpartition(".")[0] for name in graph if "." in name})
    assert {folder: found for folder in folders if (found := rooms.circles(rooms.folder_graph(graph, folder)))} == {}


def test_no_room_imports_a_later_one(rooms: ModuleType, graph: dict[str, set[str]]) -> None:
    whole = rooms.merged(rooms.folder_graph(graph, "megatron_speech"), rooms.BASE, "base")
    assert later_imports(whole, ORDER) == []
    assert later_imports(rooms.folder_graph(graph, "megatron_speech.data"), DATA_ORDER) == []


def test_own_modules_are_imported_at_the_top_of_a_file(rooms: ModuleType) -> None:
    found = rooms.modules()
    late = {
        (name, imported)
        for name, path in found.items()
        if name.split(".")[1:2] != [] and name.split(".")[1] not in LAZY_ROOMS
        for imported, _, inside in rooms.imports_of(path, found)
        if inside
    }
    assert late == LAZY


def test_the_pictures_of_the_design_show_what_is_so(rooms: ModuleType, repository: Path) -> None:
    text = (repository / "docs" / "design.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"```mermaid\n%% ([\w.]+)\n(.*?)\n```", text, re.DOTALL))
    drawn = rooms.pictures()
    assert shown.keys() == drawn.keys()
    for folder in drawn:
        assert shown[folder] == drawn[folder], f"docs/design.md, {folder}: put in what `python tools/rooms.py` prints"


def test_no_two_classes_have_one_name(rooms: ModuleType) -> None:
    named: dict[str, list[str]] = {}
    for module, path in rooms.modules().items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                named.setdefault(node.name, []).append(module)
    assert {name: modules for name, modules in named.items() if len(modules) > 1} == {}


def test_nothing_outside_of_the_package_is_installed(repository: Path) -> None:
    scripts = sorted(path.name for path in (repository / "preprocess").iterdir() if path.suffix == ".py")
    assert scripts == ["encode_audio.py", "merge_datasets.py", "preprocess_data.py"]
    assert not (repository / "preprocess" / "__init__.py").exists()
    assert 'include = ["megatron_speech*"]' in (repository / "pyproject.toml").read_text()
