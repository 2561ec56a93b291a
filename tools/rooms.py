"""Who imports whom in `megatron_speech`, as pictures: `python tools/rooms.py` prints them for docs/design.md.

Imports are read from the source, those inside functions and under TYPE_CHECKING included. A picture shows what lies
in one folder: its files and its sub-folders, and an arrow from each to what it imports, left out where a longer way
says it already.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGE = "megatron_speech"
ROOT = Path(__file__).resolve().parents[1]
BASE = ("console", "errors", "files", "modalities", "ragged", "remote", "wording")
"""Modules below everything else; one box in the picture of the rooms."""

Graph = dict[str, set[str]]


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Name → file of every module of the package; a package's name stands for its `__init__.py`."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(path: Path, known: Iterable[str]) -> Iterator[tuple[str, int, bool]]:
    """(module, line, whether inside a function) of every import of the package's own modules in a file."""
    known = set(known)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else node.module for name in whole]
        for name in names:
            if name in known:
                assert isinstance(node, ast.stmt)
                yield name, node.lineno, id(node) in inside


def module_graph(root: Path = ROOT) -> Graph:
    """Module → modules that it imports."""
    found = modules(root)
    return {name: {other for other, _, _ in imports_of(path, found)} - {name} for name, path in found.items()}


def folder_graph(graph: Graph, folder: str) -> Graph:
    """The same between what lies directly in a folder (`megatron_speech.data`): files, and sub-folders as a whole."""
    depth = folder.count(".") + 1

    def child(module: str) -> str | None:
        parts = module.split(".")
        return parts[depth] if module.startswith(f"{folder}.") else None

    result: Graph = {}
    for module, imported in graph.items():
        own = child(module)
        if own is None:
            continue
        others = result.setdefault(own, set())
        others |= {other for name in imported if (other := child(name)) is not None and other != own}
    return result


def merged(graph: Graph, names: Iterable[str], into: str) -> Graph:
    """The graph with some of its nodes as one."""
    names = set(names)
    result: Graph = {}
    for node, others in graph.items():
        own = into if node in names else node
        result.setdefault(own, set()).update(into if other in names else other for other in others)
    return {node: others - {node} for node, others in result.items()}


def circles(graph: Graph) -> list[list[str]]:
    """Groups of nodes that reach each other."""
    reach = {node: reachable(graph, node) for node in graph}
    found = {frozenset({node, *(other for other in reach[node] if node in reach[other])}) for node in graph}
    return sorted(sorted(group) for group in found if len(group) > 1)


def reachable(graph: Graph, node: str) -> set[str]:
    """What can be reached from a node, without itself unless on a circle."""
    seen: set[str] = set()
    waiting = list(graph.get(node, ()))
    while waiting:
        other = waiting.pop()
        if other not in seen:
            seen.add(other)
            waiting += graph.get(other, ())
    return seen


def picture(graph: Graph) -> str:
    """A mermaid flowchart of an acyclic graph; what a longer way says already is left out."""
    lines = ["flowchart BT"]
    for node in sorted(graph):
        direct = graph[node]
        shown = {other for other in direct if not any(other in reachable(graph, via) for via in direct - {other})}
        lines += [f"    {node} --> {other}" for other in sorted(shown)]
        if not shown and not any(node in others for others in graph.values()):
            lines.append(f"    {node}")
    return "\n".join(lines)


def pictures(root: Path = ROOT) -> dict[str, str]:
    """Folder → its picture, of those that docs/design.md shows."""
    graph = module_graph(root)
    rooms = merged(folder_graph(graph, PACKAGE), BASE, "base")
    return {
        PACKAGE: picture(rooms),
        f"{PACKAGE}.data": picture(folder_graph(graph, f"{PACKAGE}.data")),
        f"{PACKAGE}.training": picture(folder_graph(graph, f"{PACKAGE}.training")),
    }


def main() -> None:
    """Print the pictures."""
    for folder, drawn in pictures().items():
        sys.stdout.write(f"```mermaid\n%% {folder}\n{drawn}\n```\n\n")


if __name__ == "__main__":
    main()
