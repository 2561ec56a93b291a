"""The decoding loop: legal speech only, results that belong to a request, honest stops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_speech.errors import InputError
from megatron_speech.generation.engine import GenerationResult, SpeechGenerator
from megatron_speech.generation.requests import GenerationRequest
from megatron_speech.generation.sampling import SamplingConfig, probabilities, sample, uniform_noise

REFERENCE = np.array([[0, 1, 2], [4, 2, 3]], dtype=np.int32)


def requests(count: int) -> list[GenerationRequest]:
    """Prompts of several lengths, with and without a reference."""
    rows = []
    for i in range(count):
        reference = {"reference_codes": REFERENCE, "reference_text": "ab"} if i % 3 == 0 else {}
        rows.append(GenerationRequest("word" * (1 + i % 4), seed=i, **reference))  # type: ignore[arg-type]
    return rows


def same(a: GenerationResult, b: GenerationResult) -> bool:
    return np.array_equal(a.codes, b.codes) and a.ended == b.ended and a.stop_reason == b.stop_reason


@pytest.mark.slow
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    order=st.permutations(range(12)),
    batch_size=st.integers(1, 12),
    config=st.sampled_from(
        [
            SamplingConfig(temperature=1.0, max_seconds=1.0),
            SamplingConfig(temperature=0.7, top_k=3, max_seconds=1.0),
            SamplingConfig(temperature=1.3, top_p=0.8, repetition_penalty=1.5, max_seconds=1.0),
        ]
    ),
)
def test_a_request_sounds_the_same_in_any_batch(
    toy_generator: SpeechGenerator, order: list[int], batch_size: int, config: SamplingConfig
) -> None:
    rows = requests(12)
    alone = [toy_generator.generate([row], config)[0] for row in rows]
    together = toy_generator.generate([rows[i] for i in order], config, batch_size=batch_size)
    assert all(same(alone[i], result) for i, result in zip(order, together, strict=True))


def test_seeds_decide_and_nothing_else(toy_generator: SpeechGenerator) -> None:
    config = SamplingConfig(max_seconds=1.0)
    row = GenerationRequest("hello", seed=5)
    first, again, other = toy_generator.generate([row, row, GenerationRequest("hello", seed=6)], config)
    assert same(first, again)
    assert not same(first, other)
    assert toy_generator.generate([GenerationRequest("hello", seed=2**70 - 1)], config)


def test_generation_equals_a_plain_loop_over_one_request(toy_generator: SpeechGenerator, leaky_model: Any) -> None:
    space = toy_generator.space
    config = SamplingConfig(temperature=0.9, top_p=0.9, repetition_penalty=1.2, max_seconds=1.0)
    request = requests(4)[3]
    session = leaky_model.open_session(1, 0)
    logits = session.prefill([toy_generator.prompt(request)])[0]
    ids: list[int] = []
    illegal, ended = [], False
    for position in range(25 * 3 + 1):
        book = space.codebooks[position % 3]
        legal = list(range(book.offset, book.offset + book.size))
        if position and position % 3 == 0:
            legal.append(space.special("<speech_end>"))
        illegal.append(1 - float(logits.softmax(0)[legal].sum()))
        seen = torch.tensor([[i in ids for i in legal]])
        probs = probabilities(logits[legal].unsqueeze(0), config, seen)
        chosen = legal[int(sample(probs, uniform_noise(torch.tensor([request.seed]), position)))]
        if chosen == space.special("<speech_end>"):
            ended = True
            break
        if position == 25 * 3:
            break
        ids.append(chosen)
        logits = session.step(torch.tensor([chosen]))[0]
    result = toy_generator.generate([request], config)[0]
    np.testing.assert_array_equal(result.codes, space.decode_codes(np.array(ids)))
    assert result.ended == ended
    assert result.generated_tokens == len(ids) + ended
    assert result.invalid_token_rate == pytest.approx(np.mean(illegal), abs=1e-6)


def test_ended_requests_leave_the_batch(toy_generator: SpeechGenerator, leaky_model: Any) -> None:
    results = toy_generator.generate(requests(60), SamplingConfig(temperature=1.5, max_seconds=1.0))
    assert {result.ended for result in results} == {True, False}  # some end, some run into the limit
    assert leaky_model.batch_sizes[0] == 60
    assert leaky_model.batch_sizes[-1] <= 30


def test_speech_that_does_not_end_is_cut_at_the_limit_and_says_so(toy_space: Any, leaky_model: Any) -> None:
    leaky_model.bias[toy_space.special("<speech_end>")] = -1e9
    generator = SpeechGenerator(leaky_model.open_session, toy_space, max_sequence_length=60, device=torch.device("cpu"))
    short, long = generator.generate(
        [GenerationRequest("a"), GenerationRequest("a" * 30)], SamplingConfig(max_seconds=0.4)
    )
    assert (short.stop_reason, len(short.codes), short.ended) == ("max_seconds", 10, False)
    # 60 positions - 34 of the prompt leave room for 8 frames of 3 tokens.
    assert (long.stop_reason, len(long.codes), long.prompt_tokens) == ("context", 8, 34)
    assert short.generated_tokens == 30


def test_an_end_right_at_the_limit_is_an_end(toy_space: Any, leaky_model: Any) -> None:
    leaky_model.bias[toy_space.special("<speech_end>")] = 1e9
    generator = SpeechGenerator(leaky_model.open_session, toy_space, max_sequence_length=60, device=torch.device("cpu"))
    result = generator.generate([GenerationRequest("a")], SamplingConfig(max_seconds=0.04))[0]
    assert (result.ended, result.stop_reason, len(result.codes), result.generated_tokens) == (True, "end", 1, 4)


def test_a_model_of_several_streams_is_refused(
    toy_generator: SpeechGenerator, leaky_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leaky_model.open_session(1, 1).__class__, "streams", 4)
    with pytest.raises(InputError, match=r"takes 4 ids a step \(streams\), but generation samples one"):
        toy_generator.generate(requests(1))


def test_a_model_that_wants_illegal_ids_is_found_out_but_stays_legal(toy_space: Any, leaky_model: Any) -> None:
    leaky_model.bias[: toy_space.text_size] = 50.0
    generator = SpeechGenerator(
        leaky_model.open_session, toy_space, max_sequence_length=400, device=torch.device("cpu")
    )
    results = generator.generate(requests(6), SamplingConfig(max_seconds=0.5))
    for result in results:
        assert result.invalid_token_rate > 0.99
        assert result.invalid_argmax_rate == 1.0
        toy_space.encode_codes(result.codes)  # refuses a code outside its codebook


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (GenerationRequest("  \n"), "text to be spoken is empty"),
        (GenerationRequest("a", reference_text="b"), "reference text was given without a reference audio"),
        (GenerationRequest("a", reference_codes=REFERENCE), "reference audio was given without a reference text"),
        (GenerationRequest("a", reference_codes=REFERENCE, reference_text=" "), "reference text is empty"),
        (GenerationRequest("a", reference_codes=REFERENCE + 9, reference_text="b"), "outside codebook"),
        (GenerationRequest("a" * 500), "no room for speech"),
    ],
)
def test_a_request_that_cannot_be_spoken_is_refused_before_any_is(
    toy_generator: SpeechGenerator, leaky_model: Any, request_: GenerationRequest, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        toy_generator.generate([request_])
    with pytest.raises(InputError, match="request 1: "):
        toy_generator.generate([GenerationRequest("fine"), request_])
    assert leaky_model.batch_sizes == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("config", [SamplingConfig(max_seconds=1.0), SamplingConfig(temperature=0.0, max_seconds=1.0)])
@pytest.mark.parametrize("after", [0, 7])
def test_logits_that_are_not_finite_are_refused_with_their_place(
    toy_generator: SpeechGenerator,
    leaky_model: Any,
    monkeypatch: pytest.MonkeyPatch,
    value: float,
    config: SamplingConfig,
    after: int,
) -> None:
    """Of the third request, from audio token `after` on; the first codebook's first id is legal at frame edges."""
    leaky_model.bias[toy_generator.space.special("<speech_end>")] = -1e9  # nobody ends before
    session = leaky_model.open_session(0, 0)
    fed = 0
    logits_of = type(session)._logits

    def spoiled(self: Any) -> torch.Tensor:
        nonlocal fed
        logits = logits_of(self)
        if fed >= after:
            logits[2] = value
        fed += 1
        return logits

    monkeypatch.setattr(type(session), "_logits", spoiled)
    rows = [GenerationRequest("word", seed=i) for i in range(4)]
    sentence = rf"request 2: the model's logits are NaN or infinite at token {after} .*\(frame {after // 3}\)"
    with pytest.raises(InputError, match=sentence):
        toy_generator.generate(rows, config)


def test_an_index_past_the_end_is_never_drawn() -> None:
    broken = torch.full((2, 5), math.nan, dtype=torch.float64)
    assert sample(broken, torch.tensor([0.0, 0.5], dtype=torch.float64)).tolist() == [4, 4]
