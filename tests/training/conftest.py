"""Toy datasets for runs that take seconds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for toy_runs: tests are imported without their folders

from toy_runs import make_toy_datasets


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ts.json and the datasets speech, tts and text."""
    return make_toy_datasets(tmp_path_factory.mktemp("toy"))
