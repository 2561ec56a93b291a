"""A run whose blend changes on the way: refused by default, explicit and without repetition where it is allowed."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from toy_runs import (
    copy_until,
    make_dataset,
    make_token_space,
    read_metrics,
    toy_recipe,
    train,
    without_timing,
    write_recipe,
)

from megatron_speech.data.dataset.indexed import TokenDataset
from megatron_speech.data.sequences.index_cache import open_table
from megatron_speech.recipe.data import dataset_prefixes
from megatron_speech.recipe.load import load_recipe

pytestmark = pytest.mark.slow

STEPS, BATCH = 24, 8


def one_stage(toy: Path, **changes: Any) -> dict[str, Any]:
    recipe = toy_recipe(toy, validation={"interval_steps": 0}, **changes)
    recipe["stages"] = [{**recipe["stages"][0], "task_mass": {"speech_lm": 0.6, "tts": 0.4}}]
    recipe["data"] = {**recipe["data"], "datasets": [str(toy / "speech"), str(toy / "tts")]}
    recipe["checkpoint"] = {"interval_steps": 8, "keep_last": 10}
    recipe["logging"] = {"interval_steps": 4, "tensorboard": False}
    return recipe


@pytest.fixture(scope="module")
def own_toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("changing")
    space = make_token_space(folder / "ts.json")
    make_dataset(folder / "speech", space, "speech_lm", documents=60, seed=0)
    make_dataset(folder / "tts", space, "tts", documents=40, seed=1)
    make_dataset(folder / "more", space, "speech_lm", documents=50, seed=5)
    return folder


@pytest.fixture(scope="module")
def recipe_file(own_toy: Path) -> Path:
    return write_recipe(own_toy / "recipe.yaml", one_stage(own_toy))


@pytest.fixture(scope="module")
def reference(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "reference"
    assert train(recipe_file, run) == 0
    return run


def history(run: Path, step: int) -> list[dict[str, Any]]:
    fields = json.loads((run / "checkpoints" / f"step_{step:08d}" / "checkpoint.json").read_text())
    entries: list[dict[str, Any]] = fields["blend"]["pt"]
    return entries


def trained_documents(run: Path, step: int) -> dict[str, list[tuple[str, int]]]:
    """By stratum, the (dataset, document) that the whole of a run finished, in the order of its sequences."""
    drawn: dict[str, list[tuple[str, int]]] = {}
    prefixes = dataset_prefixes(load_recipe(run / "recipe.yaml").data)
    lengths = {name: TokenDataset(prefix).lengths for name, prefix in prefixes.items()}
    for entry in history(run, step):
        table, content = open_table(run / "index_cache" / entry["key"], entry["key"])
        first = entry["from_sequence"]
        last = entry["to_sequence"] if entry["to_sequence"] is not None else step * BATCH
        segments = slice(int(table.seq_ptr[first]), int(table.seq_ptr[last]))
        strata = content["strata"]
        ended: dict[tuple[int, int], int] = {}
        for k, document, start, length in zip(
            table.stratum[segments], table.document[segments], table.start[segments], table.length[segments],
            strict=True,
        ):  # fmt: skip
            key = (int(k), int(document))
            ended[key] = int(start) + int(length)
            if ended[key] == lengths[strata[k]["dataset"]][document]:
                drawn.setdefault(strata[k]["name"], []).append((strata[k]["dataset"], int(document)))
    return drawn


WEIGHTS = ["data.on_change=continue", "stages.pt.task_mass.tts=0.1"]


def test_a_changed_weight_is_refused_and_the_sentence_says_what_to_do(
    recipe_file: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_until(reference, tmp_path / "run", 8)
    assert train(recipe_file, run, "stages.pt.task_mass.tts=0.1") == 2
    error = capsys.readouterr().err
    assert "stages.0.task_mass.tts was 0.4, the recipe now says 0.1" in error
    assert "data.on_change: continue" in error


def test_changed_weights_repeat_nothing_before_its_turn_and_resuming_changes_nothing(
    recipe_file: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_until(reference, tmp_path / "run", 8)
    assert train(recipe_file, run, *WEIGHTS) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("pt goes on from sequence 64")]
    assert "with a changed blend: task_mass.tts 0.4 → 0.1; " in line and line.endswith("still due and come first")
    before = [line for line in without_timing(read_metrics(reference)) if line["step"] <= 8]
    assert without_timing(read_metrics(run))[: len(before)] == before

    entries = history(run, STEPS)
    assert [(e["from_sequence"], e["to_sequence"]) for e in entries] == [(0, 64), (64, None)]
    (stage,) = json.loads((run / "blend.json").read_text())["stages"]
    assert [e["reason"] for e in stage["history"]] == ["the stage's first blend", "task_mass.tts 0.4 → 0.1"]
    for name, documents in trained_documents(run, STEPS).items():
        counts = Counter(documents)
        available = next(s["documents_available"] for s in stage["strata"] if s["name"] == name)
        counts.update(dict.fromkeys(range(available - len(counts)), 0))  # those that were never drawn
        assert max(counts.values()) - min(counts.values()) <= 1, name

    # Killed after the change: at step 16 the run knows which index it was on.
    again = copy_until(run, tmp_path / "again", 16)
    assert train(recipe_file, again, *WEIGHTS) == 0
    assert without_timing(read_metrics(again)) == without_timing(read_metrics(run))


def test_an_added_dataset_comes_in_with_the_documents_that_are_due(
    own_toy: Path, recipe_file: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_until(reference, tmp_path / "run", 8)
    names = ", ".join(str(own_toy / name) for name in ("speech", "tts", "more"))
    overrides = [f"data.datasets=[{names}]"]
    assert train(recipe_file, run, *overrides) == 2
    assert "the run has the datasets speech, tts, the recipe now names more, speech, tts" in capsys.readouterr().err
    overrides.append("data.on_change=continue")
    assert train(recipe_file, run, *overrides) == 0
    assert "dataset more added (50 documents)" in capsys.readouterr().out
    again = copy_until(run, tmp_path / "again", 16)
    assert train(recipe_file, again, *overrides) == 0
    assert without_timing(read_metrics(again)) == without_timing(read_metrics(run))

    # A second change, after the first: weights too. The key of the index in use was in the checkpoint.
    twice = copy_until(run, tmp_path / "twice", 16)
    assert train(recipe_file, twice, *overrides, "stages.pt.task_mass.tts=0.2") == 0
    entries = history(twice, STEPS)
    assert [(e["from_sequence"], e["to_sequence"]) for e in entries] == [(0, 64), (64, 128), (128, None)]
    for name, documents in trained_documents(twice, STEPS).items():
        counts = Counter(documents)
        assert max(counts.values()) - min(counts.values()) <= 1, name
    # And without the index of before: it is built again from what the checkpoint says.
    lost = copy_until(run, tmp_path / "lost", 16)
    shutil.rmtree(lost / "index_cache" / history(run, 16)[-1]["key"])
    assert train(recipe_file, lost, *overrides, "stages.pt.task_mass.tts=0.2") == 0
    assert without_timing(read_metrics(lost)) == without_timing(read_metrics(twice))


def test_a_dataset_may_grow_but_not_be_replaced(
    own_toy: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grown = tmp_path / "grown"
    shutil.copytree(own_toy, grown)
    space = make_token_space(grown / "ts.json")
    make_dataset(grown / "tts", space, "tts", documents=70, seed=1)
    recipe = write_recipe(tmp_path / "grown.yaml", one_stage(grown))
    run = copy_until(reference, tmp_path / "run", 8)
    assert train(recipe, run) == 2
    assert "the contents of data.datasets.tts have changed" in capsys.readouterr().err
    assert train(recipe, run, "data.on_change=continue") == 0
    assert "dataset tts grown (40 → 70 documents)" in capsys.readouterr().out

    make_dataset(grown / "tts", space, "tts", documents=70, seed=2)
    other = copy_until(reference, tmp_path / "other", 8)
    assert train(recipe, other, "data.on_change=continue") == 2
    assert "its documents are not those that the run began with" in capsys.readouterr().err


def test_a_dataset_may_be_taken_out_and_a_filter_put_in(
    own_toy: Path, recipe_file: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_until(reference, tmp_path / "run", 8)
    strata = "[{task: speech_lm, mass: 1, languages: [xx], where: {tokens: {min: 10}}}]"
    overrides = [
        f"data.datasets=[{own_toy / 'speech'}]", "stages.pt.task_mass=null", f"stages.pt.strata={strata}",
        "data.on_change=continue",
    ]  # fmt: skip
    assert train(recipe_file, run, *overrides) == 0
    out = capsys.readouterr().out
    assert "dataset tts removed" in out and "strata.0.where.tokens.min not set → 10" in out
    (stage,) = json.loads((run / "blend.json").read_text())["stages"]
    assert stage["first_sequence"] == 64
    assert {s["task"] for s in stage["strata"]} == {"speech_lm"}
    last = [line for line in read_metrics(run) if "split" not in line][-1]
    assert "loss/language/yy" not in last and "loss/task/tts" not in last
