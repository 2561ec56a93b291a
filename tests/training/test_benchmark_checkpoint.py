"""`benchmark checkpoint`: which steps count as disturbed, and a run of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from toy_runs import toy_recipe, write_recipe

from megatron_speech import cli
from megatron_speech.benchmark.checkpoint import Step, compare
from megatron_speech.errors import InputError


def made(*steps: tuple[float, bool, str | None]) -> list[Step]:
    """Steps by their length (of which a tenth waiting for a core), and what is so at the beginning of the next one."""
    clock, found = 0.0, [Step(0.0, 0.0, False, None)]
    for seconds, busy, saved in steps:
        clock += seconds
        found.append(Step(clock, clock / 10, busy, saved))
    return found


def test_a_save_is_compared_with_the_undisturbed_steps_after_it() -> None:
    figures = compare(
        made(
            (9.0, False, None),  # before the first save: counts for nothing
            (1.5, True, "beside"), (1.1, True, None), (1.0, False, None), (1.0, False, None), (3.0, False, None),
            (1.0, False, None), (5.0, False, "waited"), (2.0, False, None), (2.0, False, None),
        )
    )  # fmt: skip
    assert figures["ratio"]["values"] == [1.2] and figures["ratio_with_cores"]["values"] == [pytest.approx(1.2)]
    assert figures["steps_during_save"]["values"] == [3.0]
    assert figures["synchronous_seconds"]["values"] == [3.0]
    assert figures["step_seconds"]["values"] == [1.0, 3.0, 1.0, 2.0, 2.0]


def test_saves_without_a_pause_between_them_are_no_comparison() -> None:
    with pytest.raises(InputError, match="as long as --interval steps; give it more"):
        compare(made((1.0, True, "beside"), (1.0, True, None), (2.0, False, "waited"), (1.0, False, None)))


@pytest.mark.slow
def test_a_run_of_it_reports_and_leaves_nothing_behind(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # the disk of a busy machine is not the matter here
    recipe = write_recipe(tmp_path / "r.yaml", toy_recipe(toy))
    words = ["benchmark", "checkpoint", str(recipe), f"data.cache_dir={tmp_path / 'cache'}", "--saves", "1",
             "--interval", "40", "--warmup-steps", "2", "--json", str(tmp_path / "f.json")]  # fmt: skip
    assert cli.main(words) == 0
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["bytes"] > 1e6 and figures["ratio"]["median"] > 0 and len(figures["ratio"]["values"]) == 1
    assert figures["load_bytes_per_second"]["median"] > 0 and figures["waited_seconds"]["median"] > 0
    assert set(figures["environment"]) >= {"torch", "git", "devices"}
    assert list((tmp_path / "scratch").glob("megatron-speech-*")) == []
