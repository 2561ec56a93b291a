"""Checkpoints beside the training: what is written, what a failure leaves, what stays."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_runs import at_record, read_metrics, toy_recipe, train, without_timing, write_recipe

from megatron_speech.errors import InputError
from megatron_speech.recipe.checkpoint import CheckpointConfig, is_due
from megatron_speech.recipe.load import parse_recipe


@pytest.fixture(scope="module")
def recipe_file(toy: Path) -> Path:
    """Ten steps and then six, a checkpoint every four; nothing is removed."""
    recipe = toy_recipe(toy, checkpoint={"interval_steps": 4, "keep_last": 10})
    recipe["stages"][0]["tokens"], recipe["stages"][1]["tokens"] = 10 * 512, 6 * 512
    recipe["validation"]["interval_steps"] = 4
    return write_recipe(toy / "checkpoints.yaml", recipe)


@pytest.fixture(scope="module")
def reference(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That run, saved as usual: beside the training."""
    run = tmp_path_factory.mktemp("beside") / "run"
    assert train(recipe_file, run) == 0
    return run


def steps(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_*"))


def hidden(run: Path) -> list[str]:
    return [name for name in os.listdir(run / "checkpoints") if name.startswith(".")]


# ---- what is written


@pytest.mark.slow
def test_what_is_written_beside_the_training_is_what_a_run_that_waits_writes(
    recipe_file: Path, reference: Path, tmp_path: Path
) -> None:
    waiting = tmp_path / "waiting"
    assert train(recipe_file, waiting, "checkpoint.asynchronous=false") == 0
    assert steps(waiting) == steps(reference) == [4, 8, 10, 12, 16]
    assert hidden(waiting) == hidden(reference) == []
    for step in steps(reference):
        ours, theirs = (run / "checkpoints" / f"step_{step:08d}" for run in (reference, waiting))
        assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
        for name in ("__0_0.distcp", "common.pt", "token_space.json"):
            assert (ours / name).read_bytes() == (theirs / name).read_bytes(), (step, name)
    assert without_timing(read_metrics(waiting)) == without_timing(read_metrics(reference))


@pytest.mark.slow
def test_training_goes_on_while_a_checkpoint_is_written(
    recipe_file: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_speech.training.checkpoint import save

    write_save, go_on, seen = save.write_save, threading.Event(), []

    def held_back(*args: Any, **options: Any) -> str | None:
        assert go_on.wait(60)
        return write_save(*args, **options)

    def look() -> None:
        # Step 4's checkpoint is being held back, two more steps have been taken: it is not there, nor half.
        seen.append(steps(run))
        go_on.set()

    run = tmp_path / "run"
    monkeypatch.setattr(save, "write_save", held_back)
    at_record(monkeypatch, step_6=look)
    assert train(recipe_file, run) == 0
    assert seen == [[]]
    assert steps(run) == steps(reference)
    for step in steps(run):  # of the moment it was taken in, not of the one it was written in
        name = f"checkpoints/step_{step:08d}/__0_0.distcp"
        assert (run / name).read_bytes() == (reference / name).read_bytes()


def test_latest_and_best_resolve_and_are_read(reference: Path) -> None:
    from megatron_speech.training.checkpoint.load import open_checkpoint

    assert os.readlink(reference / "checkpoints" / "latest") == "step_00000016"
    scores = {line["step"]: line["loss/modality/audio"] for line in read_metrics(reference) if "split" in line}
    best = min((12, 16), key=lambda step: scores[step])
    for name, step in (("latest", 16), ("best", best)):
        info, _ = open_checkpoint(reference / "checkpoints" / name)
        assert info.step == step


def test_a_link_resolves_at_every_moment(tmp_path: Path) -> None:
    from megatron_speech.training.checkpoint.store import point_link

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    link, ended, missing = tmp_path / "latest", threading.Event(), []
    point_link(link, "a")

    def read() -> None:
        while not ended.is_set():
            if not link.exists():
                missing.append(1)

    reader = threading.Thread(target=read)
    reader.start()
    for turn in range(100):
        point_link(link, "ba"[turn % 2])
    ended.set()
    reader.join()
    assert not missing and os.readlink(link) == "a" and sorted(os.listdir(tmp_path)) == ["a", "b", "latest"]


# ---- a disk that is full


def limit_files(size: int) -> None:
    """No file of this process grows beyond `size` bytes: the write that would fails, as on a full disk."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size if size else hard, hard))


@pytest.fixture
def unlimited() -> Any:
    yield
    limit_files(0)


@pytest.mark.slow
@pytest.mark.usefixtures("unlimited")
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_full_disk_costs_the_checkpoint_and_not_the_run(
    recipe_file: Path,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    asynchronous: str,
) -> None:
    run = tmp_path / "run"
    at_record(monkeypatch, step_6=lambda: limit_files(500_000), step_9=lambda: limit_files(0))
    assert train(recipe_file, run, f"checkpoint.asynchronous={asynchronous}") == 0
    captured = capsys.readouterr()
    assert "ALARM: step_00000008 could not be written: " in captured.err and "File too large" in captured.err
    assert "The newest checkpoint is step_00000004; training continues" in captured.err
    assert steps(run) == [4, 10, 12, 16] and hidden(run) == []
    assert without_timing(read_metrics(run)) == without_timing(read_metrics(reference))


@pytest.mark.slow
@pytest.mark.usefixtures("unlimited")
def test_a_run_whose_last_checkpoint_cannot_be_written_says_so_and_is_repeated(
    recipe_file: Path,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_record(patch, step_15=lambda: limit_files(500_000))
        assert train(recipe_file, run) == 1
    limit_files(0)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: step_00000016 could not be written: ")
    assert error.endswith("The newest checkpoint is step_00000012; free some space and start the same command again")
    assert json.loads((run / "status.json").read_text())["state"] == "failed"
    assert train(recipe_file, run) == 0
    assert steps(run) == steps(reference)
    assert without_timing(read_metrics(run)) == without_timing(read_metrics(reference))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MB, which holds three checkpoints and not four."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", place], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("this user may not mount a small disk")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.slow
def test_a_disk_that_is_really_full_keeps_training_and_the_last_checkpoint(
    recipe_file: Path, reference: Path, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run, ballast = small_disk / "run", small_disk / "ballast"
    flags = ["checkpoint.keep_last=1", "checkpoint.keep_stage_ends=false", f"data.cache_dir={tmp_path / 'cache'}"]

    def fill() -> None:
        with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as handle:
            while True:
                handle.write(bytes(1 << 16))

    at_record(monkeypatch, step_6=fill, step_9=ballast.unlink)
    assert train(recipe_file, run, *flags) == 0
    error = capsys.readouterr().err
    assert "ALARM: step_00000008 could not be written: " in error and "No space left on device" in error
    assert "The newest checkpoint is step_00000004" in error
    assert hidden(run) == [] and 16 in steps(run) and 8 not in steps(run)
    assert without_timing(read_metrics(run)) == without_timing(read_metrics(reference))


def test_an_error_of_the_writing_thread_ends_the_run(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_speech.training.checkpoint import save

    def broken(*args: Any, **options: Any) -> str | None:
        raise ZeroDivisionError("not the disk")

    monkeypatch.setattr(save, "write_save", broken)
    with pytest.raises(ZeroDivisionError, match="not the disk"):
        train(recipe_file, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"


# ---- when one is due


@pytest.mark.slow
def test_a_stage_saves_densely_at_first(toy: Path, tmp_path: Path) -> None:
    recipe = toy_recipe(toy, validation={"interval_steps": 0}, checkpoint={"interval_steps": 4, "keep_last": 20})
    recipe["stages"][0] |= {"tokens": 10 * 512, "checkpoint": [{"until": 4, "every": 2}, {"every": "0.003k"}]}
    recipe["stages"][1] |= {"tokens": 5 * 512, "checkpoint": 2}
    run = tmp_path / "run"
    assert train(write_recipe(tmp_path / "r.yaml", recipe), run) == 0
    assert steps(run) == [2, 4, 6, 9, 10, 12, 14, 15]


def test_a_cadence_ends_with_its_last_part() -> None:
    stage = {"checkpoint": [{"until": 20_000, "every": 2000}, {"until": "30k", "every": 5000}]}
    recipe = parse_recipe(_recipe_with(stage), "r")
    cadence = recipe.stages[0].checkpoint
    assert cadence is not None
    due = [step for step in range(1, 50_000) if is_due(cadence, step)]
    assert due == [*range(2000, 20_001, 2000), 25_000, 30_000]


@pytest.mark.parametrize(
    "cadence",
    [[{"every": 5}, {"every": 10}], [{"every": 5, "until": 10}, {"every": 10, "until": 10}], [], [{"every": 0}]],
)
def test_a_cadence_that_makes_no_sense_is_refused(cadence: Any) -> None:
    with pytest.raises(InputError, match=r"stages\.0\.checkpoint"):
        parse_recipe(_recipe_with({"checkpoint": cadence}), "r")


def _recipe_with(stage: dict[str, Any]) -> dict[str, Any]:
    recipe = toy_recipe(Path("/toy"))
    recipe["stages"] = [recipe["stages"][0] | stage]
    return recipe


# ---- which ones stay


def make_checkpoint(folder: Path, step: int, **fields: Any) -> None:
    from megatron_speech.training.checkpoint.store import FORMAT_VERSION

    path = folder / f"step_{step:08d}"
    path.mkdir(parents=True)
    (path / "data").write_bytes(b"x" * step)
    files = {"data": {"bytes": step, "sha256": hashlib.sha256(b"x" * step).hexdigest()}}
    description = {"format_version": FORMAT_VERSION, "files": files, "step": step, "stage": "pt", **fields}
    (path / "checkpoint.json").write_text(json.dumps(description))


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_whatever_is_damaged_the_last_good_one_and_all_that_is_asked_for_stay(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    from megatron_speech.training.checkpoint.retention import Soundness, prune

    folder = tmp_path_factory.mktemp("prune")
    all_steps = sorted(data.draw(st.sets(st.integers(1, 30), min_size=1, max_size=8)))
    ends = data.draw(st.sets(st.sampled_from(all_steps)))
    damaged = data.draw(st.sets(st.sampled_from(all_steps)))
    waiting = data.draw(st.sets(st.sampled_from(all_steps)))
    best = data.draw(st.sampled_from([*all_steps, None]))
    config = CheckpointConfig(keep_last=data.draw(st.integers(1, 3)), keep_every=data.draw(st.sampled_from([0, 5])))
    for step in all_steps:
        make_checkpoint(folder, step, stage_ended=step in ends)
        if step in damaged:
            (folder / f"step_{step:08d}" / "data").write_bytes(b"y" * step)
    if best is not None:
        (folder / "best").symlink_to(f"step_{best:08d}")
    alarms = prune(folder, config, problem=Soundness().problem, waiting={f"step_{step:08d}" for step in waiting})
    left = {int(path.name.removeprefix("step_")) for path in folder.glob("step_*")}
    good = sorted(set(all_steps) - damaged, reverse=True)
    newest = set(good[: config.keep_last])
    asked = {step for step in all_steps if config.keep_every and step % config.keep_every == 0}
    oldest_counted = min(newest) if len(newest) == config.keep_last else 0
    looked_at = {step for step in damaged if step > oldest_counted}
    assert left == newest | asked | ends | waiting | looked_at | ({best} if best is not None else set())
    assert len(alarms) == len(looked_at)
    assert [name for name in os.listdir(folder) if name.startswith(".")] == []


@pytest.mark.slow
def test_a_newest_one_that_is_damaged_does_not_cost_the_only_good_one(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_speech.training.checkpoint import save

    point_link = save.point_link

    def damage_it(link: Path, target: str) -> None:
        point_link(link, target)
        if target == "step_00000008":
            with open(link.parent / target / "__0_0.distcp", "r+b") as handle:
                handle.seek(1000)
                handle.write(b"\0\0damage")

    run, seen = tmp_path / "run", []
    monkeypatch.setattr(save, "point_link", damage_it)
    at_record(monkeypatch, step_9=lambda: seen.append(steps(run)))
    flags = ["checkpoint.keep_last=1", "stages.sft.tokens=512", "checkpoint.keep_stage_ends=false",
             "validation.interval_steps=0", "checkpoint.asynchronous=false"]  # fmt: skip
    assert train(recipe_file, run, *flags) == 0
    assert seen == [[4, 8]]
    assert "step_00000008 is damaged: __0_0.distcp does not have the SHA-256" in capsys.readouterr().err
    assert steps(run) == [11]
