"""The gates before a launch: they do what a run would do, find what would fail, and leave nothing behind."""

from __future__ import annotations

import importlib.util
import itertools
import math
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_runs import toy_recipe, train, write_recipe

from megatron_speech import cli
from megatron_speech.errors import InputError
from megatron_speech.recipe.loss import LossConfig
from megatron_speech.remote import check_writable
from megatron_speech.training.rehearsal import unavoidable_loss


@pytest.fixture(scope="module")
def recipe(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("rehearsal") / "recipe.yaml", toy_recipe(toy))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, but the index cache."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "index_cache" not in path.parts
    }


def test_a_dry_run_leaves_the_index_cache_and_nothing_else(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "a"
    assert cli.main(["train", str(recipe), "--dry-run", f"run_dir={run}"]) == 0
    out = capsys.readouterr().out
    assert "dry run: ready for step 1 (stage pt): its batch has 512 tokens and 0 of padding" in out
    assert (
        f"477 labels carry loss\ndry run: written: sequence indices (4 in {run / 'index_cache'}); nothing else" in out
    )
    assert {path.name for path in run.iterdir()} == {"index_cache"} and contents(run) == {}
    elsewhere = ["data.cache_dir=" + str(tmp_path / "cache")]
    assert cli.main(["train", str(recipe), "--dry-run", f"run_dir={tmp_path / 'b' / 'c'}", *elsewhere]) == 0
    assert not (tmp_path / "b").exists()


def test_a_dry_run_says_what_it_has_written(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache, copies = tmp_path / "cache", tmp_path / "copies"
    command = ["train", str(recipe), "--dry-run", f"run_dir={tmp_path / 'run'}", f"data.cache_dir={cache}"]
    command += ["data.stage_datasets=true", f"checkpoint.upload=file://{copies}"]
    assert cli.main(command) == 0
    indices, datasets = f"sequence indices (4 in {cache / 'indices'})", f"staged datasets (3 in {cache / 'datasets'})"
    assert f"dry run: written: {indices}, {datasets}; nothing else" in capsys.readouterr().out
    assert len(list((cache / "datasets").glob("*/data.bin"))) == 3
    assert cli.main(command) == 0
    assert "dry run: nothing was written\n" in capsys.readouterr().out
    assert not copies.exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("checkpoint.upload=file:///proc/copies", "file:///proc/copies cannot be written to (FileNotFoundError"),
        ("checkpoint.upload=memoria://copies", "names the protocol memoria, which is unknown"),
        pytest.param(
            "logging.wandb={project: a}", "logging.wandb is set and the package wandb is not installed",
            marks=pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed"),
        ),
    ],
)  # fmt: skip
def test_a_dry_run_refuses_what_the_run_would_stumble_over(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, sentence: str
) -> None:
    assert cli.main(["train", str(recipe), "--dry-run", f"run_dir={tmp_path / 'run'}", override]) == 2
    assert sentence in capsys.readouterr().err


def test_storage_that_does_not_answer_is_refused_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    answers = threading.Event()
    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "pipe_file", lambda *_: answers.wait())
    try:
        with pytest.raises(InputError, match=r"memory://copies did not answer within 0\.01 s"):
            check_writable("memory://copies", seconds=0.01)
    finally:
        answers.set()


def test_a_port_that_is_taken_is_refused_in_a_dry_run(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = f"logging.prometheus_port={taken.getsockname()[1]}"
        assert cli.main(["train", str(recipe), "--dry-run", f"run_dir={tmp_path / 'run'}", port]) == 2
    assert "cannot be opened" in capsys.readouterr().err


@pytest.mark.slow
def test_a_dry_run_of_a_run_loads_its_checkpoint_and_changes_nothing(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    short = ["stages.pt.tokens=2048", "stages.sft.tokens=2048"]
    assert train(recipe, run, *short, "--through", "pt") == 0
    (run / "checkpoints" / ".step_00000099.tmp").mkdir()  # another job may be writing it
    before = contents(run)
    capsys.readouterr()
    assert train(recipe, run, *short, "--dry-run") == 0
    assert "dry run: ready for step 5 (stage sft)" in capsys.readouterr().out
    assert contents(run) == before and (run / "checkpoints" / ".step_00000099.tmp").is_dir()
    # What a run would be refused for, a dry run is refused for, and the run's status stays as it was.
    assert train(recipe, run, *short, "model.num_layers=3", "--dry-run") == 2
    assert "model.num_layers was 2" in capsys.readouterr().err and contents(run) == before
    assert train(recipe, run, *short) == 0
    capsys.readouterr()
    assert train(recipe, run, *short, "--dry-run") == 0
    assert "there is no next step" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_can_end_after_a_stage_and_go_on(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    def state() -> tuple[str, int]:
        status = json.loads((tmp_path / "run" / "status.json").read_text())
        return status["state"], status["step"]

    short = ["stages.pt.tokens=2048", "stages.sft.tokens=1024"]
    assert train(recipe, tmp_path / "run", *short, "--through", "pt") == 0 and state() == ("paused", 4)
    capsys.readouterr()
    assert train(recipe, tmp_path / "run", *short, "--through", "pt") == 0 and state() == ("paused", 4)
    assert "toy through pt is finished: nothing left to do" in capsys.readouterr().out
    assert train(recipe, tmp_path / "run", *short, "--through", "sft") == 0 and state() == ("finished", 6)
    assert train(recipe, tmp_path / "run", *short, "--through", "pt") == 0 and state() == ("finished", 6)
    assert train(recipe, tmp_path / "run", *short, "--through", "s9") == 2
    assert "--through s9: the stages of" in capsys.readouterr().err


# ---- overfitting a few sequences


@pytest.mark.slow
def test_a_few_sequences_are_overfitted(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert train(recipe, run, "--overfit", "8") == 0
    out = capsys.readouterr().out
    assert "overfit check passed: 8 sequences of stage pt, after " in out
    assert contents(run) == {}
    # Speech from its text: nothing in it is left to chance, and the loss itself goes to zero.
    assert train(recipe, run, "--overfit", "32", "stages.pt.skip=true", "stages.sft.lr.peak=5e-3") == 0
    last = capsys.readouterr().out.splitlines()[-2]
    assert "unavoidable 0.0000" in last and float(last.split()[3]) < 0.05


@pytest.mark.slow
def test_a_model_that_does_not_learn_fails_the_gate(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--overfit", "8", "--overfit-steps", "20", "stages.pt.lr.peak=1e-6", "stages.pt.lr.end=1e-7",
             "stages.sft.lr.peak=1e-6", "stages.sft.lr.end=1e-7"]  # fmt: skip
    assert train(recipe, tmp_path / "run", *words) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("error: overfit: after 20 steps the loss on 8 sequences of stage pt is 5.")
    assert train(recipe, tmp_path / "run", "--overfit", "7") == 2
    assert "needed is a multiple of 2" in capsys.readouterr().err
    assert train(recipe, tmp_path / "run", "--overfit", "0") == 2


def micro_batch(documents: list[list[int]], learned_from: int = 1) -> object:
    """A row of documents; each token after the first `learned_from` is learned, with weight 1."""
    from types import SimpleNamespace

    tokens, labels, groups = [], [], []
    for document in documents:
        tokens += document
        labels += [*document[1:], -100]
        groups += [0 if learned_from <= at + 1 < len(document) else -1 for at in range(len(document))]
    return SimpleNamespace(
        tokens=torch.tensor([tokens]),
        labels=torch.tensor([labels]),
        loss_weights=torch.tensor([[float(group >= 0) for group in groups]]),
        group_ids=torch.tensor([groups]),
        cu_seqlens=torch.tensor([0, *itertools.accumulate(map(len, documents))]),
    )


def test_the_unavoidable_loss_is_the_entropy_of_what_follows_equal_beginnings() -> None:
    loss = LossConfig()
    # Four documents begin alike and then differ: ln 4 once each, and nothing after that.
    apart = micro_batch([[1, 10 + i, 20 + i, 30] for i in range(4)])
    assert unavoidable_loss([apart], loss, np.array([[12.0], [12.0]])) == pytest.approx(4 * math.log(4) / 12)
    # Over two micro-batches it is the same set; equal documents cost nothing more.
    twice = [micro_batch([[1, 5, 6]] * 3), micro_batch([[1, 7, 8]])]
    expected = -(3 * math.log(3 / 4) + math.log(1 / 4)) / 8
    assert unavoidable_loss(twice, loss, np.array([[8.0], [8.0]])) == pytest.approx(expected)  # type: ignore[list-item]
    # A prompt that tells them apart is no loss.
    told = micro_batch([[1, 10 + i, 3, 20 + i] for i in range(4)], learned_from=2)
    assert unavoidable_loss([told], loss, np.array([[8.0], [8.0]])) == 0.0
