"""One process, one small model for the tests of the model room."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def single_process() -> Iterator[None]:
    """megatron-core's parallel state of one process, taken down afterwards."""
    from megatron_speech.parallel import groups

    groups.destroy()
    groups.initialize(seed=7)
    torch.manual_seed(0)
    yield
    groups.destroy()
