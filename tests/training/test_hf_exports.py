"""Checkpoints that become Hugging Face folders while the run goes on."""

from __future__ import annotations

import fcntl
import json
import os
import sys
from pathlib import Path

import pytest
from toy_runs import make_toy_datasets, toy_recipe, write_recipe

from megatron_speech import cli
from megatron_speech.errors import InputError
from megatron_speech.recipe.checkpoint import ExportConfig
from megatron_speech.recipe.load import parse_recipe
from megatron_speech.training.checkpoint import hf_exports
from megatron_speech.training.checkpoint.hf_exports import HuggingFaceExports

# Stands for `convert export-hf`: writes its arguments where it was told to, and what it knows of a launcher.
SCRIPT = """
import json, os, pathlib, sys
words = sys.argv[1:]
if "step_00000013" in words[1]:
    sys.exit("error: an unlucky number")
folder = pathlib.Path(words[words.index("--output") + 1])
folder.mkdir()
(folder / "words.json").write_text(json.dumps([words, os.environ.get("RANK"), os.environ["CUDA_VISIBLE_DEVICES"]]))
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run directory with checkpoints, of which only what the queue looks at is there."""
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.setattr(hf_exports, "_COMMAND", (sys.executable, str(tmp_path / "script.py")))
    monkeypatch.setenv("RANK", "0")
    for step in (10, 13, 20, 30):
        checkpoint = tmp_path / f"checkpoints/step_{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "checkpoint.json").write_text("{}")
    return tmp_path


def name(step: int) -> str:
    return f"step_{step:08d}"


def test_exports_are_made_in_order_and_only_the_newest_are_kept(run: Path) -> None:
    exports = HuggingFaceExports(run, ExportConfig(every=10, keep_last=2))
    for step in (10, 20, 30):
        exports.add(name(step))
    assert exports.waiting() == [name(10), name(20), name(30)]
    assert exports.finish() == []
    assert exports.waiting() == []
    assert sorted(path.name for path in (run / "hf").iterdir()) == ["latest", name(20), name(30)]
    assert os.readlink(run / "hf/latest") == name(30)
    words, rank, devices = json.loads((run / "hf" / name(30) / "words.json").read_text())
    assert words == ["--checkpoint", str(run / "checkpoints" / name(30)), "--output", str(run / "hf" / name(30))]
    assert (rank, devices) == (None, "")


def test_what_fails_is_said_and_does_not_stand_in_the_way(run: Path) -> None:
    exports = HuggingFaceExports(run, ExportConfig(every=1))
    for step in (13, 20, 99):
        exports.add(name(step))
    problems = exports.finish()
    assert [problem.split(" (see")[0] for problem in problems] == [
        f"{name(13)} is not exported: error: an unlucky number",
        f"{name(99)} is not exported: it is no longer there",
    ]
    assert [path.name for path in (run / "hf").glob("step_*")] == [name(20)]


def test_a_killed_run_s_exports_are_taken_up_but_not_made_twice_at_a_time(run: Path) -> None:
    HuggingFaceExports(run, ExportConfig(every=10)).add(name(10))
    (run / "hf" / name(10)).mkdir()  # of the same step, before the run went back and came here again
    with open(run / "exports/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # an export of the killed run goes on
        later = HuggingFaceExports(run, ExportConfig(every=10))
        assert later.advance() == [] and later.waiting() == [name(10)]
        fcntl.flock(lock, fcntl.LOCK_UN)
    assert later.finish() == []
    assert (run / "hf" / name(10) / "words.json").is_file()


def test_steps_and_ends_of_stages_are_due(tmp_path: Path) -> None:
    exports = HuggingFaceExports(tmp_path, ExportConfig(every=10))
    ends = [(20, False), (25, False), (25, True)]
    assert [exports.due(name(step), stage_ended=ended) for step, ended in ends] == [True, False, True]
    only = HuggingFaceExports(tmp_path, ExportConfig(every=10, stage_ends=False))
    assert not only.due(name(25), stage_ended=True)
    with pytest.raises(InputError, match=r"export_hf.ema is true, but the run keeps no moving average"):
        parse_recipe({**toy_recipe(Path("x")), "checkpoint": {"export_hf": {"every": 1, "ema": True}}}, "toy")


@pytest.mark.slow
def test_a_run_leaves_a_folder_that_transformers_opens(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    stage = {**toy_recipe(tmp_path)["stages"][0], "tokens": 4 * 512}
    recipe = toy_recipe(make_toy_datasets(tmp_path), stages=[stage], checkpoint={"export_hf": 3, "interval_steps": 4})
    path = write_recipe(tmp_path / "recipe.yaml", recipe)
    assert cli.main(["train", str(path), f"run_dir={tmp_path / 'run'}"]) == 0
    (folder,) = (tmp_path / "run/hf").glob("step_*")
    assert folder.name == (tmp_path / "run/hf/latest").readlink().name == name(4)  # the end of the stage
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.model_type == "llama"
