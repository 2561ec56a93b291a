"""One process, one small model for the tests of the model room."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for te_stand_ins


@pytest.fixture(autouse=True)
def single_process() -> Iterator[None]:
    """megatron-core's parallel state of one process, taken down afterwards."""
    from megatron_speech.parallel import groups

    groups.destroy()
    groups.initialize(seed=7)
    torch.manual_seed(0)
    yield
    groups.destroy()
