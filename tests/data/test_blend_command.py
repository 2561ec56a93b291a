"""`megatron-speech blend`: the table a person reads and the JSON a script reads, from a recipe file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_speech import cli
from megatron_speech.tokens.space import TokenSpace

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


def test_verify_reads_the_whole_index_and_names_what_is_damaged(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["blend", str(recipe), "--stage", "pt", "--verify"]) == 0
    assert "every byte is as it was built" in capsys.readouterr().out
    (column,) = recipe.parent.rglob("document.npy")
    data = bytearray(column.read_bytes())
    data[-1] ^= 1
    column.write_bytes(data)
    assert cli.main(["blend", str(recipe), "--stage", "pt"]) == 0
    capsys.readouterr()
    assert cli.main(["blend", str(recipe), "--stage", "pt", "--verify"]) == 2
    assert f"{column}: SHA-256" in capsys.readouterr().err


def test_overrides_change_the_blend(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["blend", str(recipe), "stages.pt.task_mass.tts=2.25", "--stage", "pt", "--json"]) == 0
    (stage,) = json.loads(capsys.readouterr().out)["stages"]
    assert stage["by_task"]["tts"]["target"] == pytest.approx(0.75)


def test_the_report_says_what_each_part_is_in_tokens_in_seconds_and_in_epochs(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["blend", str(recipe), "--stage", "pt", "stages.pt.max_epochs=1", "--json"]) == 0
    (stage,) = json.loads(capsys.readouterr().out)["stages"]
    for field in ("by_task", "by_language", "by_source"):
        rows = stage[field].values()
        assert sum(row["tokens"] for row in rows) == stage["tokens"]
        assert sum(row["audio_share"] for row in rows) == pytest.approx(1.0)
    speech = stage["by_task"]["speech_lm"]
    assert speech["audio_seconds"] == pytest.approx(speech["audio_share"] * stage["audio_seconds"])
    (stratum,) = (s for s in stage["strata"] if s["task"] == "speech_lm")
    assert stratum["epochs"] == pytest.approx(3072 / (50 * 43), rel=0.02)
    assert stratum["repeated_too_often"] and "repeated more than 1 epochs" in stage["warnings"][0]
    assert stage["history"] == [
        {"key": stage["key"], "from_sequence": 0, "to_sequence": None, "reason": "the stage's first blend"}
    ]


def test_a_limit_of_epochs_is_kept_by_the_index_and_named(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    strata = "[{task: speech_lm, mass: 1, epoch_limit: 1}, {task: tts, mass: 3, name: pairs}]"
    arguments = ["stages.pt.task_mass=null", f"stages.pt.strata={strata}", "stages.pt.tokens=8192", "--stage", "pt"]
    # Nothing but the one stratum in its group: it cannot be held back.
    assert cli.main(["blend", str(recipe), *arguments, "stages.pt.strata.0.epoch_limit=0.5"]) == 2
    assert "epoch limits leave" in capsys.readouterr().err
    assert cli.main(["blend", str(recipe), *arguments, "--json"]) == 0
    (stage,) = json.loads(capsys.readouterr().out)["stages"]
    assert max(s["epochs"] for s in stage["strata"] if s["task"] == "speech_lm") <= 1.0


@pytest.mark.slow
def test_the_picture_is_written_whole_and_a_bad_name_is_refused(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["blend", str(recipe), "--plot", str(tmp_path / "out" / "blend.png")]) == 0
    assert (tmp_path / "out" / "blend.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["blend.png"]
    assert cli.main(["blend", str(recipe), "--plot", str(tmp_path / "blend.jpeg")]) == 2
    assert "needed one of .png, .svg, .pdf" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "ptt"], "has no stage 'ptt'; did you mean 'pt'?"),
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
