"""Backbones made once, and commands that must succeed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# For backbones and toy_runs: tests are imported without their folders.
sys.path.insert(0, str(Path(__file__).parent.parent / "training"))
sys.path.insert(0, str(Path(__file__).parent))

from backbones import CODEC

from megatron_speech import cli
from megatron_speech.tokens.space import TokenSpace

Import = Callable[..., Path]


@pytest.fixture
def space_of(tmp_path: Path) -> Callable[[Path], Path]:
    """The file of a token space for a folder's tokenizer and rows, and the toy codec."""

    def make(folder: Path, layout: str = "own", base: bool = True) -> Path:
        path = tmp_path / f"ts-{folder.name}-{layout}.json"
        TokenSpace.build(folder, CODEC, base=folder if base else None, layout=layout).save(path)
        return path

    return make


@pytest.fixture
def imported(space_of: Callable[..., Path]) -> Import:
    """A checkpoint of a folder, by the command."""

    def run(folder: Path, *flags: str, layout: str = "own", name: str = "checkpoint") -> Path:
        output = folder.parent / f"{folder.name}-{name}"
        arguments = ["--input", str(folder), "--token-space", str(space_of(folder, layout)), "--output", str(output)]
        assert cli.main(["convert", "import-hf", *arguments, *flags]) == 0
        return output

    return run
