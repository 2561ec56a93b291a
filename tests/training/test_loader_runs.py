"""Runs over what the loader offers: threads and staging change no number, rectangles train, and waiting is measured."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from toy_runs import copy_until, read_metrics, toy_recipe, without_timing, write_recipe

from megatron_speech import cli
from megatron_speech.data.dataset import staging
from megatron_speech.data.dataset.shard_table import SPARSE, TABLE, ShardTable
from megatron_speech.data.loading.loader import StageLoader
from megatron_speech.training import loop


def short_recipe(toy: Path, **data: Any) -> dict[str, Any]:
    """Six steps of the toy recipe's first stage, without validation."""
    recipe = toy_recipe(toy, validation={"interval_steps": 0})
    recipe["stages"] = [recipe["stages"][0] | {"tokens": 6 * 512}]
    recipe["data"] |= data
    return recipe


def train(folder: Path, name: str, recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """metrics.jsonl of a run to the end."""
    path = write_recipe(folder / f"{name}.yaml", recipe)
    assert cli.main(["train", str(path), f"run_dir={folder / name}"]) == 0
    return read_metrics(folder / name)


@pytest.mark.slow
def test_threads_and_staging_change_no_number_of_a_run(toy: Path, tmp_path: Path) -> None:
    plain = train(tmp_path, "plain", short_recipe(toy))
    staged = short_recipe(toy, workers=3, cache_dir=str(tmp_path / "cache"), stage_datasets=True, cache_gib=1.0)
    other = train(tmp_path, "staged", staged)
    staging.release()
    assert without_timing(other) == without_timing(plain)
    assert len(list((tmp_path / "cache" / "datasets").glob("*/data.bin"))) == 3
    assert list((tmp_path / "cache" / "indices").iterdir())


def shards_recipe(toy: Path, cache: Path) -> dict[str, Any]:
    """The toy recipe with windows, in a cache that holds a part of the datasets' shards of 256 bytes."""
    recipe = toy_recipe(toy)
    for stage in recipe["stages"]:
        stage["shuffle_window"] = {"shards": 1, "shard_mib": 2**-12}
    suffixes = (".idx", ".docs.parquet", ".manifest.json")
    beside = sum((toy / f"{name}{suffix}").stat().st_size for name in ("speech", "tts", "text") for suffix in suffixes)
    room = {"cache_dir": str(cache), "cache_gib": (beside + 24 * 2**8) / 2**30}
    recipe["data"] |= room | {"stage_datasets": "shards"}
    return recipe


@pytest.mark.slow
def test_staging_by_the_shard_changes_no_number_of_a_run_nor_of_one_that_is_continued(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "_SHARD_BYTES", 2**8)
    recipe = shards_recipe(toy, tmp_path / "cache")
    plain = recipe | {"data": toy_recipe(toy)["data"]}
    lines = without_timing(train(tmp_path, "plain", plain))
    assert without_timing(train(tmp_path, "shards", recipe)) == lines
    sizes = sum((toy / f"{name}.bin").stat().st_size for name in ("speech", "tts", "text"))
    taken = sum(ShardTable(path.parent).bytes_taken() for path in (tmp_path / "cache").glob(f"datasets/*/{TABLE}"))
    assert 0 < taken <= 24 * 2**8 < sizes / 2
    # As if it had been killed after step 10 and started again on a node that has nothing.
    copy_until(tmp_path / "shards", tmp_path / "continued", 10)
    staging.release()
    recipe["data"]["cache_dir"] = str(tmp_path / "other")
    assert without_timing(train(tmp_path, "continued", recipe))[-len(lines) :] == lines
    staging.release()


@pytest.mark.slow
def test_datasets_can_be_staged_before_a_run(toy: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", short_recipe(toy))
    command = [sys.executable, "-m", "megatron_speech.cli", "stage-datasets", str(recipe)]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "data.cache_dir is null" in refused.stderr
    done = subprocess.run([*command, f"data.cache_dir={tmp_path / 'cache'}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == ["speech", "tts", "text"]
    assert len(list((tmp_path / "cache" / "datasets").glob("*/data.bin"))) == 3
    shards = [*command, f"data.cache_dir={tmp_path / 'other'}", "data.stage_datasets=shards", "data.cache_gib=1"]
    done = subprocess.run(shards, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("nothing of it is fetched before it is needed") == 3
    assert all(path.stat().st_blocks == 0 for path in (tmp_path / "other" / "datasets").glob(f"*/{SPARSE}"))


def test_looking_at_a_blend_copies_nothing(toy: Path, tmp_path: Path) -> None:
    data = {"cache_dir": str(tmp_path / "cache"), "stage_datasets": True}
    recipe = write_recipe(tmp_path / "recipe.yaml", short_recipe(toy, **data))
    assert cli.main(["blend", str(recipe), f"run_dir={tmp_path / 'run'}"]) == 0
    assert not (tmp_path / "cache" / "datasets").exists()


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [1.0, 0.0])
def test_a_run_trains_on_rectangles(toy: Path, tmp_path: Path, prompt: float) -> None:
    recipe = short_recipe(toy)
    recipe["stages"][0] |= {"packing": {"mode": "bucket"}, "loss": {"prompt": prompt}, "task_mass": {"tts": 1.0}}
    lines = train(tmp_path, "rectangles", recipe)
    losses = [line["loss"] for line in lines if "split" not in line]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
    assert all(0 < line["pad_fraction"] < 0.6 for line in lines if "split" not in line)


@pytest.mark.slow
def test_the_time_that_a_step_waits_for_data_is_what_next_took(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    take = StageLoader.__next__

    def slow(loader: StageLoader) -> Any:
        batch = take(loader)
        now[0] += 5.0
        return batch

    class Clock:
        """Stands still but where the loader is waited for."""

        @staticmethod
        def perf_counter() -> float:
            now[0] += 1e-6
            return now[0]

    monkeypatch.setattr(StageLoader, "__next__", slow)
    monkeypatch.setattr(loop, "time", Clock)
    for workers in (1, 4):
        lines = train(tmp_path, f"waiting-{workers}", short_recipe(toy, workers=workers))
        waits = [line["data_wait_seconds"] for line in lines if "split" not in line]
        assert len(waits) == 2
        assert waits == pytest.approx([5.0, 5.0], abs=1e-4)
