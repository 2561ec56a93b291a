from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_speech.codecs import describe_codec
from megatron_speech.generation.engine import SpeechGenerator
from megatron_speech.tokens.space import CodecDescription, TokenSpace


class LeakySum:
    """The smallest model with a memory: a decaying sum of embeddings.

    Its state depends on every id and on their order: a row that is dropped, swapped or fed wrongly shows. In float64,
    so that the shape of a batch changes no bit that counts.
    """

    def __init__(self, space: TokenSpace, end_bias: float = 0.0, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.embedding = torch.randn(space.padded_size, 16, generator=generator, dtype=torch.float64)
        self.head = torch.randn(16, space.padded_size, generator=generator, dtype=torch.float64)
        self.bias = torch.zeros(space.padded_size, dtype=torch.float64)
        self.bias[space.special("<speech_end>")] = end_bias
        self.batch_sizes: list[int] = []

    def open_session(self, rows: int, capacity: int) -> LeakySession:
        return LeakySession(self)


class LeakySession:
    streams = 1

    def __init__(self, model: LeakySum) -> None:
        self.model = model
        self.state = torch.zeros(0, 16, dtype=torch.float64)

    def _logits(self) -> Tensor:
        self.model.batch_sizes.append(len(self.state))
        return self.state @ self.model.head + self.model.bias

    def prefill(self, prompts: Sequence[np.ndarray]) -> Tensor:
        rows = []
        for prompt in prompts:
            state = torch.zeros(16, dtype=torch.float64)
            for i in prompt.tolist():
                state = 0.8 * state + 0.3 * self.model.embedding[i]
            rows.append(state)
        self.state = torch.stack(rows)
        return self._logits()

    def step(self, ids_B: Tensor) -> Tensor:
        self.state = 0.8 * self.state + 0.3 * self.model.embedding[ids_B]
        return self._logits()

    def keep(self, rows: Tensor) -> None:
        self.state = self.state[rows]


@pytest.fixture(scope="session")
def toy_space() -> TokenSpace:
    codec = CodecDescription("toy", "0" * 64, 8000, 25.0, ("a", "b", "c"), (5, 3, 4))
    return TokenSpace.build("bytes", codec)


@pytest.fixture
def leaky_model(toy_space: TokenSpace) -> LeakySum:
    return LeakySum(toy_space, end_bias=-1.0)


@pytest.fixture
def toy_generator(toy_space: TokenSpace, leaky_model: LeakySum) -> SpeechGenerator:
    return SpeechGenerator(leaky_model.open_session, toy_space, max_sequence_length=400, device=torch.device("cpu"))


@pytest.fixture
def codec2_generator() -> SpeechGenerator:
    """A toy model that speaks Codec2."""
    pytest.importorskip("pycodec2", reason="Codec2 is not installed")
    space = TokenSpace.build("bytes", describe_codec("codec2"))
    model = LeakySum(space, end_bias=1.0)
    return SpeechGenerator(model.open_session, space, max_sequence_length=400, device=torch.device("cpu"))


@pytest.fixture
def checkpoint(tmp_path: Path, codec2_generator: SpeechGenerator, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A path that exists; the toy model is what is found there."""
    path = tmp_path / "checkpoint"
    path.mkdir()
    monkeypatch.setattr(SpeechGenerator, "from_checkpoint", classmethod(lambda cls, found, ema: codec2_generator))
    return path
