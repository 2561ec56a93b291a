"""From a recipe to speech: a model that was trained says what it was taught, straight from its checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_speech import cli
from megatron_speech.errors import InputError
from megatron_speech.generation.engine import SpeechGenerator
from megatron_speech.generation.requests import GenerationRequest
from megatron_speech.generation.sampling import SamplingConfig

sys.path.insert(0, str(Path(__file__).parent.parent / "training"))

from toy_runs import make_dataset, make_token_space, spoken, toy_recipe, write_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in which every letter is spoken as three codes of its own, and such codes are written down."""
    folder = tmp_path_factory.mktemp("trained")
    space = make_token_space(folder / "ts.json")
    for task in ("tts", "asr"):
        make_dataset(folder / task, space, task, documents=2000)
    stage = {
        "name": "sft", "task_mass": {"tts": 0.6, "asr": 0.4}, "tokens": 350 * 1024,
        "seq_length": 64, "micro_batch_size": 16,
        "global_batch_tokens": 1024, "max_epochs": 1000, "lr": {"peak": 1e-2, "end": 1e-4, "warmup": 10},
        "loss": {"prompt": 0.0},
    }  # fmt: skip
    recipe = toy_recipe(folder, stages=[stage], checkpoint={"interval_steps": 1000, "keep_last": 1})
    recipe["data"]["datasets"] = [str(folder / "tts"), str(folder / "asr")]
    recipe["validation"] = {"interval_steps": 1000, "tokens": 1024}
    run = folder / "run"
    assert cli.main(["train", str(write_recipe(folder / "recipe.yaml", recipe)), f"run_dir={run}"]) == 0
    return run


@pytest.mark.slow
def test_a_trained_model_says_what_it_is_asked_and_stops(run: Path) -> None:
    generator = SpeechGenerator.from_checkpoint(run)
    words = ["ab", "bad", "face", "cafe", "hag", "egg", "bead", "dab"]
    requests = [GenerationRequest(word, seed=i) for i, word in enumerate(words)]
    for config in (SamplingConfig(temperature=0, max_seconds=1.2), SamplingConfig(temperature=0.5, max_seconds=1.2)):
        results = generator.generate(requests, config)
        right = [np.array_equal(result.codes, spoken(word)) for word, result in zip(words, results, strict=True)]
        assert np.mean(right) >= 0.75, [result.codes[:, 0].tolist() for result in results]
        assert all(result.ended for result, good in zip(results, right, strict=True) if good)
        assert max(result.invalid_token_rate for result in results) < 0.1
    assert generator.checkpoint["step"] == 350


@pytest.mark.slow
def test_a_trained_model_writes_down_what_it_hears_and_stops(run: Path) -> None:
    generator = SpeechGenerator.from_checkpoint(run)
    words = ["ab", "bad", "face", "cafe", "hag", "egg", "bead", "dab"]
    results = generator.transcribe([spoken(word) for word in words], batch_size=3)
    right = [result.text == word for result, word in zip(results, words, strict=True)]
    assert np.mean(right) >= 0.75, [result.text for result in results]
    assert all(result.ended for result, good in zip(results, right, strict=True) if good)
    assert [result.prompt_tokens for result in results] == [len(spoken(word)) + 4 for word in words]
    assert max(result.invalid_token_rate for result in results) < 0.1
    short = generator.transcribe([spoken("face")], max_tokens=2)[0]
    assert short.stop_reason == "max_tokens" and not short.ended and short.generated_tokens == 2
    with pytest.raises(InputError, match=r"recording 1: its \d+ tokens leave no room for text"):
        generator.transcribe([spoken("a"), np.zeros((64, 1), np.int32)])


@pytest.mark.slow
def test_a_codec_that_is_not_here_is_named(run: Path) -> None:
    generator = SpeechGenerator.from_checkpoint(run)
    with pytest.raises(InputError, match="no codec 'toy'"):
        generator.decode_audio(spoken("a"))


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no complete checkpoint"):
        SpeechGenerator.from_checkpoint(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        SpeechGenerator.from_checkpoint(tmp_path / "none")
