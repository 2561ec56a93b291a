from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_speech.codecs import describe_codec
from megatron_speech.generation.engine import SpeechGenerator
from megatron_speech.tokens.space import TokenSpace


class NoiseSession:
    """A model that says anything legal, and ends now and then: reports need speech, not sense."""

    streams = 1

    def __init__(self, vocabulary: int, end_id: int) -> None:
        self.logits = torch.zeros(vocabulary)
        self.logits[end_id] = 4.0
        self.rows = 0

    def prefill(self, prompts: Sequence[np.ndarray]) -> Tensor:
        self.rows = len(prompts)
        return self.logits.expand(self.rows, -1)

    def step(self, ids_B: Tensor) -> Tensor:
        return self.logits.expand(self.rows, -1)

    def keep(self, rows: Tensor) -> None:
        self.rows = len(rows)


@pytest.fixture
def babbler() -> SpeechGenerator:
    """A generator of Codec2 babble."""
    pytest.importorskip("pycodec2", reason="Codec2 is not installed")
    space = TokenSpace.build("bytes", describe_codec("codec2"))
    end_id = space.special("<speech_end>")
    return SpeechGenerator(
        lambda rows, capacity: NoiseSession(space.padded_size, end_id),
        space,
        max_sequence_length=512,
        device=torch.device("cpu"),
    )
