"""`megatron-speech blend`: the table a person reads and the JSON a script reads, from a recipe file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_speech import cli
from megatron_speech.token_space import TokenSpace

RECIPE = """
name: toy
token_space: space.json
model: {preset: PRESET}
data: {datasets: {speech: speech, pairs: pairs}, validation_fraction: 0.0}
stages:
  - {name: pt, task_mass: {speech_lm: 0.75, tts: 0.25}, tokens: 4096, seq_length: 64, global_batch_tokens: 512,
     lr: {peak: 1.0e-3}}
  - {name: sft, task_mass: {tts: 1}, tokens: 1024, seq_length: 64, global_batch_tokens: 512,
     lr: {peak: 1.0e-4}, loss: {prompt: 0}}
"""


@pytest.fixture
def recipe(tmp_path: Path, toy_space: TokenSpace, make_dataset: Any, document: Any) -> Path:
    toy_space.save(tmp_path / "space.json")
    make_dataset(tmp_path / "speech", toy_space, "speech_lm", [document(codes=40, language="hi")] * 50)
    make_dataset(tmp_path / "pairs", toy_space, "tts", [document(codes=20, text=8)] * 50)
    model = "{num_layers: 1, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 2}"
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("{preset: PRESET}", model))
    return path


def test_the_tables_name_every_task_and_stage(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["blend", str(recipe)]) == 0
    out = capsys.readouterr().out
    for words in (
        "stage pt: 64 sequences of 64",
        "cut packing, 0.00% padding",
        "stage sft: 16",
        "fit packing",
        "75.00%",
    ):
        assert words in out
    assert "shares are of target_tokens" in out
    assert "speech_lm/speech/hi/toy" in out


def test_json_is_one_document_with_the_stage_asked_for(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["blend", str(recipe), "--stage", "pt", "--json"]) == 0
    (stage,) = json.loads(capsys.readouterr().out)["stages"]
    assert stage["stage"] == "pt"
    assert stage["by_task"]["tts"]["target"] == 0.25
    assert stage["by_task"]["tts"]["realised"] == pytest.approx(0.25, abs=0.01)
    assert stage["tokens"] == 4096


def test_overrides_change_the_blend(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["blend", str(recipe), "stages.pt.task_mass.tts=2.25", "--stage", "pt", "--json"]) == 0
    (stage,) = json.loads(capsys.readouterr().out)["stages"]
    assert stage["by_task"]["tts"]["target"] == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "ptt"], "has no stage 'ptt'; did you mean pt?"),
        (["stages.pt.task_mass.text_lm=1"], "no dataset of that task"),
        (["stages.sft.seq_length=32", "stages.sft.global_batch_tokens=512"], "longer than seq_length 32"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_exit_2(
    recipe: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main(["blend", str(recipe), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
