"""What the checks before the first step find, in a sentence that names the rank and its host."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toy_runs import toy_recipe, train, write_recipe

from megatron_speech.data.dataset.indexed import TokenDataset
from megatron_speech.errors import InputError
from megatron_speech.recipe.load import parse_recipe
from megatron_speech.training.health import preflight
from megatron_speech.training.health.preflight import (
    Preflight,
    check_clocks,
    check_space,
    check_sum,
    checkpoint_bytes,
    dataset_facts,
)


class Others:
    """A control group whose rank 0 is here; what the others say is given."""

    rank = 0

    def __init__(self, *others: Any) -> None:
        self.others = others
        self.world_size = 1 + len(others)

    def gather_objects(self, value: Any) -> list[Any]:
        return [value, *self.others]

    def barrier(self) -> None:
        pass


def check(toy: Path, *others: Any) -> Preflight:
    recipe = parse_recipe(toy_recipe(toy), "test")
    hosts = [f"n{rank // 2}" for rank in range(1 + len(others))]
    return Preflight(recipe, Others(*others), hosts, torch.device("cpu"))  # type: ignore[arg-type]


def test_the_rank_that_differs_is_named_and_what_it_has(toy: Path) -> None:
    usual, odd = {"torch": "2.13.0", "code": "a"}, {"torch": "2.11.0", "code": "a"}
    check(toy, usual, {**usual, "code": None}, usual)._equal(usual, "")
    with pytest.raises(InputError) as found:
        check(toy, usual, odd, usual)._equal(usual, "install the same")
    assert str(found.value) == (
        "torch differs between the processes: rank 2 on n1 has 2.11.0, rank 0 on n0 has 2.13.0; install the same"
    )
    with pytest.raises(InputError, match=r"rank 1 on n0, rank 2 on n1, rank 3 on n1 and 1 more has 2\.11\.0"):
        check(toy, odd, odd, odd, odd, *[usual] * 5)._equal(usual, "")


def test_a_clock_that_is_off_is_named() -> None:
    check_clocks([1000.0, 1000.4, 1030.0], ["n1", "n1", "n2"], 60.0)
    with pytest.raises(InputError, match=r"the clock of rank 2 on n2 is 100 s behind the others'"):
        check_clocks([1000.0, 1000.0, 900.0], ["n1", "n1", "n2"], 60.0)


def test_a_wrong_sum_is_the_networks_fault() -> None:
    check_sum(10.0, 4, "nccl")
    with pytest.raises(InputError, match="sum over the 4 ranks with nccl gave 9 instead of 10"):
        check_sum(9.0, 4, "nccl")


def test_another_copy_of_a_dataset_is_told_apart(toy: Path, tmp_path: Path) -> None:
    for path in toy.glob("tts.*"):
        shutil.copy(path, tmp_path)
    same, copy = TokenDataset(toy / "tts"), TokenDataset(tmp_path / "tts")
    assert dataset_facts(same) == dataset_facts(copy)
    data = bytearray((tmp_path / "tts.bin").read_bytes())
    data[-1] ^= 1
    (tmp_path / "tts.bin").write_bytes(data)
    ours, theirs = dataset_facts(same), dataset_facts(TokenDataset(tmp_path / "tts"))
    assert [name for name in ours if ours[name] != theirs[name]] == ["tts.bin"]
    (tmp_path / "tts.manifest.json").unlink()
    with pytest.raises(InputError, match=r"tts\.manifest\.json cannot be read: No such file"):
        dataset_facts(copy)


def test_a_run_directory_that_a_node_does_not_share_is_refused(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="rank 2 on n1 cannot see a file that rank 0 on n0 has just written"):
        check(toy, True, False, True).storage(tmp_path, 1000)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_disk_without_room_for_the_checkpoints_is_refused_before_the_first_step(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = parse_recipe({**toy_recipe(toy), "checkpoint": {"keep_last": 3}}, "test")
    size = checkpoint_bytes(recipe, 10**6)
    assert size == 12 * 10**6
    for free, step in ((5 * size, 0), (3 * size, 2)):
        if step:
            (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
            (tmp_path / "checkpoints" / "step_00000002").mkdir()
        monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        check_space(recipe, tmp_path, 10**6)
        monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free - 1))
        with pytest.raises(InputError, match=r"GiB are free, and . more checkpoints of .* GiB need"):
            check_space(recipe, tmp_path, 10**6)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    file = write_recipe(tmp_path / "recipe.yaml", toy_recipe(toy))
    assert train(file, tmp_path / "run", "data.cache_dir=" + str(tmp_path / "cache")) == 2
    assert "GiB are free" in capsys.readouterr().err


@pytest.mark.slow
def test_the_size_of_a_checkpoint_is_that_of_the_files(toy: Path, tmp_path: Path) -> None:
    file = write_recipe(tmp_path / "recipe.yaml", toy_recipe(toy))
    one_step = ["stages.pt.tokens=512", "stages.sft.tokens=512", "model.hidden_size=256", "model.kv_channels=64"]
    assert train(file, tmp_path / "run", *one_step) == 0
    from megatron_speech.recipe.load import load_recipe
    from megatron_speech.tokens.space import TokenSpace

    recipe = load_recipe(tmp_path / "run" / "recipe.yaml")
    parameters = recipe.model.parameters(TokenSpace.load(recipe.token_space).padded_size)
    files = (tmp_path / "run" / "checkpoints" / "step_00000001").iterdir()
    assert sum(file.stat().st_size for file in files) == pytest.approx(checkpoint_bytes(recipe, parameters), rel=0.05)
