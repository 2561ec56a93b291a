"""Control tags in what is to be spoken."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_speech.errors import InputError
from megatron_speech.evaluation.canaries import load_canaries
from megatron_speech.generation.engine import SpeechGenerator
from megatron_speech.generation.prompts import read_prompts
from megatron_speech.generation.requests import GenerationRequest
from megatron_speech.tokens.space import CodecDescription, TokenSpace

CODEC = CodecDescription("toy", "0" * 64, 8000, 25.0, ("a",), (5,))


@pytest.fixture
def generator() -> SpeechGenerator:
    space = TokenSpace.build("bytes", CODEC, controls=["pause"])
    return SpeechGenerator(lambda rows, capacity: None, space, max_sequence_length=99, device=torch.device("cpu"))  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("codes", [None, np.array([[1], [2]])])
def test_a_prompt_holds_the_token_only_where_it_was_asked_for(generator: SpeechGenerator, codes: np.ndarray) -> None:
    reference = None if codes is None else "c[[pause]]"
    pause = generator.space.controls["pause"]
    request = GenerationRequest("a[[pause]]b", reference_codes=codes, reference_text=reference, control_tags=True)
    assert (generator.prompt(request) == pause).sum() == (1 if codes is None else 2)
    plain = GenerationRequest("a[[pause]]b", reference_codes=codes, reference_text=reference)
    assert (generator.prompt(plain) == pause).sum() == 0
    with pytest.raises(InputError, match="did you mean 'pause'"):
        generator.prompt(GenerationRequest("[[pausse]]", control_tags=True))


def test_prompts_and_canaries_carry_the_wish_and_a_scorer_hears_no_tag(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps({"text": "a [[pause]]"}) + "\n")
    assert read_prompts(tmp_path / "p.jsonl", 0, control_tags=True)[0].control_tags
    assert not read_prompts(tmp_path / "p.jsonl", 0)[0].control_tags
    canaries = "items: [{id: x, text: 'one [[pause]] two'}]\n"
    (tmp_path / "c.yaml").write_text(canaries)
    assert load_canaries(tmp_path / "c.yaml").items[0].expected_text == "one [[pause]] two"
    (tmp_path / "c.yaml").write_text("control_tags: true\n" + canaries)
    loaded = load_canaries(tmp_path / "c.yaml")
    assert loaded.items[0].expected_text == "one two"
    assert [utterance.control_tags for _, utterance in loaded.utterances("c.yaml")] == [True]
