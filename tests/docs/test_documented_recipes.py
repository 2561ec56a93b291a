"""The pieces of recipes that docs/training.md shows are pieces of recipes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from megatron_speech.recipe.load import parse_recipe

BLOCK = re.compile(r"^```yaml\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_every_piece_of_a_recipe_on_the_training_page_is_valid(repository: Path) -> None:
    pieces = BLOCK.findall((repository / "docs" / "training.md").read_text(encoding="utf-8"))
    assert len(pieces) >= 4
    recipe: dict[str, Any] = {"name": "page", "token_space": "ts.json", "model": {"preset": "tiny"}}
    recipe |= {"data": {"datasets": ["a"]}}
    for piece in pieces:
        recipe |= yaml.safe_load(piece)
    stages = parse_recipe(recipe, "docs/training.md").stages
    assert stages[0].lr.schedule == "wsd" and stages[0].n_sequences > 0
