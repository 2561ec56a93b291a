"""The real model behind the engine: its cache, its checkpoints, its speech."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_speech.codecs import describe_codec
from megatron_speech.generation.engine import CachedSession, SpeechGenerator
from megatron_speech.generation.requests import GenerationRequest
from megatron_speech.generation.sampling import SamplingConfig
from megatron_speech.model.builder import build_model
from megatron_speech.model.gpt import SpeechGPTModel
from megatron_speech.model.packed import PackedSequences
from megatron_speech.parallel import groups
from megatron_speech.recipe.model import ModelConfig
from megatron_speech.tokens.space import TokenSpace

REFERENCE = np.array([[7, 8, 9, 10], [511, 0, 15, 63], [3, 1, 4, 1]], dtype=np.int32)


class RecomputedSession:
    """No cache: every step runs the whole of every sequence again, alone. The reference for `CachedSession`."""

    streams = 1

    def __init__(self, model: SpeechGPTModel, rows: int, capacity: int) -> None:
        self.model = model
        self.sequences: list[list[int]] = []

    def _logits(self) -> Tensor:
        rows = []
        for sequence in self.sequences:
            packed = PackedSequences.build(torch.tensor([0, len(sequence)], dtype=torch.int32))
            assert packed.position_ids is not None
            ids = torch.tensor([sequence])
            rows.append(self.model(ids, packed.position_ids.unsqueeze(0), packed_seq_params=packed)[-1])
        return torch.stack(rows)

    def prefill(self, prompts: Sequence[np.ndarray]) -> Tensor:
        self.sequences = [prompt.tolist() for prompt in prompts]
        return self._logits()

    def step(self, ids_B: Tensor) -> Tensor:
        for sequence, i in zip(self.sequences, ids_B.tolist(), strict=True):
            sequence.append(i)
        return self._logits()

    def keep(self, rows: Tensor) -> None:
        self.sequences = [self.sequences[i] for i in rows.tolist()]


@pytest.fixture(scope="module")
def space() -> TokenSpace:
    pytest.importorskip("pycodec2", reason="Codec2 is not installed")
    return TokenSpace.build("bytes", describe_codec("codec2"))


@pytest.fixture(scope="module")
def model(space: TokenSpace) -> Iterator[SpeechGPTModel]:
    groups.destroy()
    groups.initialize()
    (chunk,) = build_model(
        ModelConfig(preset="tiny", init_std=0.3),
        space.padded_size,
        valid_vocab_size=space.size,
        max_sequence_length=256,
        seed=3,
    )
    yield chunk.eval()
    groups.destroy()


@pytest.fixture(scope="module")
def generator(model: SpeechGPTModel, space: TokenSpace) -> SpeechGenerator:
    return SpeechGenerator(
        functools.partial(CachedSession, model), space, max_sequence_length=256, device=torch.device("cpu")
    )


def requests(count: int) -> list[GenerationRequest]:
    rows = []
    for i in range(count):
        if i % 2:
            rows.append(GenerationRequest("one " * (1 + i % 3), seed=i))
        else:
            rows.append(
                GenerationRequest("two", seed=i, reference_codes=REFERENCE[: 1 + i % 3], reference_text="three")
            )
    return rows


def test_the_cache_changes_nothing(model: SpeechGPTModel, space: TokenSpace, generator: SpeechGenerator) -> None:
    plain = SpeechGenerator(
        functools.partial(RecomputedSession, model), space, max_sequence_length=256, device=torch.device("cpu")
    )
    config = SamplingConfig(temperature=1.0, max_seconds=0.2)
    for cached, recomputed in zip(
        generator.generate(requests(6), config), plain.generate(requests(6), config), strict=True
    ):
        np.testing.assert_array_equal(cached.codes, recomputed.codes)
        assert cached.ended == recomputed.ended
        assert cached.invalid_token_rate == pytest.approx(recomputed.invalid_token_rate, abs=1e-5)


def test_the_cache_may_grow(generator: SpeechGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SamplingConfig(temperature=1.0, max_seconds=0.8)
    wide = generator.generate(requests(6), config)
    monkeypatch.setattr(CachedSession, "ROOM_TOKENS", 1)
    for a, b in zip(wide, generator.generate(requests(6), config), strict=True):
        np.testing.assert_array_equal(a.codes, b.codes)


def test_batches_of_the_real_model_do_not_mix(generator: SpeechGenerator) -> None:
    config = SamplingConfig(temperature=1.0, top_p=0.95, max_seconds=0.4)
    together = generator.generate(requests(9), config)
    alone = [generator.generate([request], config)[0] for request in requests(9)]
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_array_equal(a.codes, b.codes)


def test_speech_of_a_random_model_becomes_sound_of_its_length(generator: SpeechGenerator) -> None:
    for result in generator.generate(requests(4), SamplingConfig(max_seconds=0.5)):
        audio = generator.decode_audio(result.codes)
        assert audio.shape == (len(result.codes) * generator.codec.sample_rate_hz // 25,)
        assert np.isfinite(audio).all()
        assert 0 < len(result.codes) <= 12
