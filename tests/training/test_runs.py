"""A run from recipe to checkpoint: what it writes, how it ends, how it continues, what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from toy_runs import (
    LaunchTwo,
    at_record,
    copy_until,
    make_dataset,
    make_token_space,
    read_metrics,
    toy_recipe,
    train,
    without_timing,
    write_recipe,
)

from megatron_speech import cli
from megatron_speech.errors import InputError
from megatron_speech.recipe.load import load_recipe
from megatron_speech.tokens.space import CodecDescription

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def recipe_file(toy: Path) -> Path:
    return write_recipe(toy / "recipe.yaml", toy_recipe(toy))


@pytest.fixture(scope="session")
def reference(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of the toy recipe, trained to the end in this process without an interruption."""
    run = tmp_path_factory.mktemp("runs") / "reference"
    assert train(recipe_file, run) == 0
    return run


# ---- what a run writes


def test_a_run_directory_holds_everything_about_the_run(recipe_file: Path, reference: Path) -> None:
    names = {path.name for path in reference.iterdir()}
    assert {"recipe.yaml", "environment.json", "blend.json", "metrics.jsonl", "checkpoints", "status.json"} <= names
    assert load_recipe(reference / "recipe.yaml") == load_recipe(recipe_file, [f"run_dir={reference}"])
    environment = json.loads((reference / "environment.json").read_text())
    assert environment["torch"] == torch.__version__ and "foreign-apex" in environment
    assert json.loads((reference / "status.json").read_text()) == {
        "state": "finished", "step": 36, "stage": "sft", "consumed_sequences": 288, "consumed_tokens": 36 * 512,
        "message": "",
    }  # fmt: skip
    checkpoints = sorted(path.name for path in (reference / "checkpoints").glob("step_*"))
    assert checkpoints == [f"step_{step:08d}" for step in (10, 20, 24, 30, 36)]
    assert {path.name for path in (reference / "checkpoints" / checkpoints[0]).iterdir()} >= {
        "checkpoint.json", "recipe.yaml", "token_space.json", "common.pt", ".metadata",
    }  # fmt: skip


def test_every_training_line_has_the_fields_that_tools_rely_on(reference: Path) -> None:
    lines = [line for line in read_metrics(reference) if "split" not in line]
    assert [line["step"] for line in lines] == list(range(3, 37, 3))
    needed = {
        "step", "stage", "consumed_sequences", "consumed_tokens", "loss", "loss/modality/audio", "lr", "grad_norm",
        "tokens_per_second", "tokens_per_second_per_gpu", "tflops_per_gpu", "mfu", "pad_fraction", "data_wait_seconds",
        "step_seconds", "memory_gib", "loss/task/tts", "loss/language/xx", "loss/language/yy", "loss/source/studio",
        "loss/source/street",
    }  # fmt: skip
    for line in lines:
        assert needed <= set(line)
        assert line["consumed_sequences"] == 8 * line["step"] and line["tokens_per_second"] > 0
    # Pretraining learns every kind of token; fine-tuning only what follows the prompt.
    assert {"loss/modality/text", "loss/task/speech_lm", "loss/task/text_lm"} <= set(lines[0])
    assert not {"loss/modality/text", "loss/task/text_lm"} & set(lines[-1])


def test_the_model_learns(reference: Path) -> None:
    lines = [line for line in read_metrics(reference) if "split" not in line]
    assert lines[0]["loss"] > 5.0 and lines[-1]["loss"] < 2.2


def test_validation_scores_held_out_sources_at_every_checkpoint(reference: Path) -> None:
    lines = [line for line in read_metrics(reference) if line.get("split") == "validation"]
    assert [(line["step"], line["stage"]) for line in lines] == [
        (10, "pt"), (20, "pt"), (24, "pt"), (30, "sft"), (36, "sft"),
    ]  # fmt: skip
    assert len({line["tokens"] for line in lines[:3]}) == 1
    assert lines[2]["loss/modality/audio"] < lines[0]["loss/modality/audio"]


def test_the_best_checkpoint_of_the_stage_is_the_one_with_the_lowest_audio_loss(
    reference: Path, tmp_path: Path
) -> None:
    from megatron_speech.recipe.checkpoint import CheckpointConfig
    from megatron_speech.training.checkpoint.retention import promote_best, prune
    from megatron_speech.training.checkpoint.store import FORMAT_VERSION

    scores = {line["step"]: line["loss/modality/audio"] for line in read_metrics(reference) if "split" in line}
    best = min((30, 36), key=lambda step: scores[step])
    assert os.readlink(reference / "checkpoints" / "best") == f"step_{best:08d}"

    directory = tmp_path / "checkpoints"
    for step, stage, loss in ((1, "pt", 0.1), (2, "sft", 2.0), (3, "sft", 1.0), (4, "sft", 1.5), (5, "sft", None)):
        folder = directory / f"step_{step:08d}"
        folder.mkdir(parents=True)
        validation = {} if loss is None else {"loss/modality/audio": loss}
        fields = {"format_version": FORMAT_VERSION, "files": {}, "step": step, "stage": stage, "validation": validation}
        (folder / "checkpoint.json").write_text(json.dumps(fields))
    promoted = promote_best(directory, "sft")
    assert promoted is not None and promoted.step == 3
    prune(directory, CheckpointConfig(keep_last=1), problem=lambda path: None)
    assert sorted(path.name for path in directory.iterdir()) == ["best", "step_00000003", "step_00000005"]


def test_a_finished_run_says_so_and_changes_nothing(
    recipe_file: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (reference / "metrics.jsonl").read_bytes()
    assert train(recipe_file, reference) == 0
    assert "toy is finished: nothing left to do" in capsys.readouterr().out
    assert (reference / "metrics.jsonl").read_bytes() == before


# ---- continuing


def test_resume_is_bit_identical_after_kill(recipe_file: Path, reference: Path, tmp_path: Path) -> None:
    run = tmp_path / "killed"
    command = [sys.executable, "-m", "megatron_speech.cli", "train", str(recipe_file), f"run_dir={run}"]
    with processes.started(command, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("pt 15/24"):
                process.kill()
                break
        process.wait()
    assert [line["step"] for line in read_metrics(run)][-1] > 10
    assert json.loads((run / "status.json").read_text())["state"] == "running"
    assert train(recipe_file, run) == 0
    assert without_timing(read_metrics(run)) == without_timing(read_metrics(reference))


@pytest.mark.parametrize("step", [20, 24])
def test_resume_is_bit_identical_within_a_stage_and_between_stages(
    recipe_file: Path, reference: Path, tmp_path: Path, step: int
) -> None:
    run = copy_until(reference, tmp_path / "copy", step)
    assert train(recipe_file, run) == 0
    assert without_timing(read_metrics(run)) == without_timing(read_metrics(reference))


def test_a_run_that_is_asked_to_stop_saves_and_continues(
    recipe_file: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "stopped"
    with monkeypatch.context() as patched:
        at_record(patched, step_6=lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(recipe_file, run) == 0
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"]) == ("preempted", 6)
    assert train(recipe_file, run) == 0
    mine = [line for line in without_timing(read_metrics(run)) if "split" not in line]
    theirs = [line for line in without_timing(read_metrics(reference)) if "split" not in line]
    # The stop added a checkpoint at step 6: it validates nothing, and the sums of that line were added up in two parts.
    assert [line["step"] for line in mine] == [line["step"] for line in theirs]
    for line, other in zip(mine, theirs, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-12)
        assert line["grad_norm"] == other["grad_norm"]


def test_a_stop_at_a_checkpoint_that_is_due_leaves_no_trace(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That checkpoint is validated as without the stop, though validation is due at other steps only."""
    overrides = ("checkpoint.interval_steps=7", "logging.interval_steps=7", "validation.interval_steps=10")
    assert train(recipe_file, tmp_path / "undisturbed", *overrides) == 0
    run = tmp_path / "stopped"
    with monkeypatch.context() as patched:
        at_record(patched, step_7=lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(recipe_file, run, *overrides) == 0
    assert json.loads((run / "status.json").read_text())["step"] == 7
    assert train(recipe_file, run, *overrides) == 0
    lines = without_timing(read_metrics(run))
    assert (7, "validation") in [(line["step"], line.get("split")) for line in lines]
    assert lines == without_timing(read_metrics(tmp_path / "undisturbed"))


def test_a_damaged_checkpoint_is_skipped_with_a_notice(
    recipe_file: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_until(reference, tmp_path / "damaged", 30)
    checkpoints = run / "checkpoints"
    shard = checkpoints / "step_00000030" / "__0_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    (checkpoints / "step_00000024" / "common.pt").unlink()
    (checkpoints / ".step_00000026.tmp").mkdir()
    assert train(recipe_file, run) == 0
    captured = capsys.readouterr()
    assert "step_00000030 is skipped: __0_0.distcp does not have the SHA-256" in captured.err
    assert "step_00000024 is skipped: common.pt is missing" in captured.err
    assert f"continuing from {checkpoints / 'step_00000020'}" in captured.out
    assert not (checkpoints / ".step_00000026.tmp").exists()
    assert without_timing(read_metrics(run)) == without_timing(read_metrics(reference))


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("seed=8", "seed was 7, the recipe now says 8"),
        ("model.num_layers=3", "model.num_layers was 2, the recipe now says 3"),
        ("optimizer.beta2=0.99", "optimizer.beta2 was 0.95"),
        ("stages.pt.lr.end=2e-3", "stages.0.lr.end was 0.001"),
        ("data.validation_fraction=0.2", "data.validation_fraction was 0.1"),
        ("stages.pt.tokens=5120", "has taken 20 steps, its tokens 5120 now pay for 10"),
        ("data.datasets.0={folder}/tts", "the run has the datasets speech, text, tts"),
    ],
)
def test_a_recipe_that_means_another_run_is_refused(
    recipe_file: Path,
    reference: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    override: str,
    field: str,
) -> None:
    run = copy_until(reference, tmp_path / "changed", 20)
    before = (run / "metrics.jsonl").read_bytes()
    if override.startswith("data.datasets"):
        override = f"data.datasets=[{recipe_file.parent / 'speech'}, {recipe_file.parent / 'tts'}]"
        run_overrides = (override, "stages.pt.task_mass={speech_lm: 1, tts: 1}")
    else:
        run_overrides = (override,)
    assert train(recipe_file, run, *run_overrides) == 2
    error = capsys.readouterr().err
    assert field in error and "run_dir" in error
    assert (run / "metrics.jsonl").read_bytes() == before


def test_changes_that_leave_the_past_alone_are_named_and_allowed(
    recipe_file: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_until(reference, tmp_path / "extended", 20)
    overrides = ["stages.pt.tokens=14336", "stages.sft.tokens=1024", "logging.interval_steps=2"]
    assert train(recipe_file, run, *overrides) == 0
    out = capsys.readouterr().out
    for change in ("stages.0.tokens: 12288 → 14336", "stages.1.tokens: 6144 → 1024", "logging.interval_steps: 3 → 2"):
        assert f"changed since it was written: {change}" in out
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", 30)


def test_a_dataset_that_was_made_anew_in_place_is_refused(
    toy: Path, recipe_file: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "toy"
    shutil.copytree(toy, copy)
    space = make_token_space(copy / "ts.json")
    make_dataset(copy / "tts", space, "tts", seed=99)
    run = copy_until(reference, tmp_path / "other_data", 20)
    recipe = write_recipe(tmp_path / "r.yaml", toy_recipe(copy))
    assert train(recipe, run) == 2
    assert "the contents of data.datasets.tts have changed" in capsys.readouterr().err


# ---- refusing to start


def test_a_dataset_of_another_token_space_is_refused_before_anything_is_written(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_token_space(tmp_path / "ts.json", CodecDescription("toy", "toy-2", 8000, 25.0, ("q0",), (64,)))
    recipe = write_recipe(tmp_path / "r.yaml", toy_recipe(toy, token_space=str(tmp_path / "ts.json")))
    assert train(recipe, tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "hash" in error
    assert not (tmp_path / "run").exists()


def test_a_run_that_cannot_start_says_why_in_its_status(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(recipe_file, tmp_path / "run", "model.num_query_groups=2", "stages.pt.task_mass={songs: 1}") == 2
    message = capsys.readouterr().err.removeprefix("error: ").strip()
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed" and status["message"] == message and "songs" in message


def test_an_unwritable_run_directory_is_refused(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert train(recipe_file, tmp_path / "file" / "run") == 2
    assert "cannot write to" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_the_run_as_failed(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(recipe_file, tmp_path / "run", "optimizer.weight_decay=1e38") == 1
    error = capsys.readouterr().err
    assert "are not both finite; continue from the beginning, since there is no checkpoint, with half" in error
    assert "Traceback" not in error
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed" and "not both finite" in status["message"]


# ---- layouts


LAYOUTS = {
    "data_parallel": [],
    "tensor_parallel": ["parallel.tensor=2", "parallel.sequence_parallel=true"],
    "pipeline_parallel": ["parallel.pipeline=2"],
    "distributed_optimizer": ["parallel.distributed_optimizer=true", "parallel.overlap_grad_reduce=true"],
}
ONE_HEAD = ["model.num_attention_heads=1", "model.num_query_groups=1", "model.kv_channels=64", "parallel.tensor=2"]


@pytest.fixture(scope="session")
def two_processes(
    recipe_file: Path, reference: Path, launch_two: LaunchTwo, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Runs of the toy recipe on two processes: every layout, a change of layout, a refusal, a resumption."""
    folder = tmp_path_factory.mktemp("two")
    for name in ("moved", "spread"):
        copy_until(reference, folder / name, 20)
    commands = [[str(recipe_file), f"run_dir={folder / name}", *extra] for name, extra in LAYOUTS.items()]
    commands += [
        [str(recipe_file), f"run_dir={folder / 'moved'}", "parallel.tensor=2"],
        [str(recipe_file), f"run_dir={folder / 'refused'}", *ONE_HEAD],
        [str(recipe_file), f"run_dir={folder / 'sharded'}", *LAYOUTS["distributed_optimizer"], "stages.sft.tokens=512"],
        [str(recipe_file), f"run_dir={folder / 'sharded'}", *LAYOUTS["distributed_optimizer"]],
        [str(recipe_file), f"run_dir={folder / 'spread'}", "stages.pt.micro_batch_size=1"],
        ["benchmark", "train", str(recipe_file), "--steps", "4", "--warmup-steps", "2", "--interval", "2", "--json",
         str(folder / "figure.json")],
    ]  # fmt: skip
    return folder, launch_two(*commands)


def test_two_processes_end_their_runs_as_they_should(
    two_processes: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    _, done = two_processes
    assert done.returncode == 0, done.stderr
    assert "exit codes [0, 0, 0, 0, 0, 2, 0, 0, 0, 0]" in done.stdout


def test_a_recipe_is_measured_on_two_processes(
    two_processes: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = two_processes
    result = json.loads((folder / "figure.json").read_text())
    assert result["measurements"] == 2 and result["tokens_per_second"] > result["tokens_per_second_per_gpu"] > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_train_like_one(
    two_processes: tuple[Path, subprocess.CompletedProcess[str]], reference: Path, layout: str
) -> None:
    run = two_processes[0] / layout
    ours, theirs = read_metrics(run), read_metrics(reference)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for line, other in zip(ours, theirs, strict=True):
        assert set(line) == set(other)
        for key in other:
            if key.startswith("loss") or key == "grad_norm":
                assert line[key] == pytest.approx(other[key], rel=1e-5), (line["step"], key)
        assert line["consumed_sequences"] == other["consumed_sequences"]
        assert line.get("pad_fraction") == pytest.approx(other.get("pad_fraction"))


def test_what_two_processes_saved_is_read_by_one(
    two_processes: tuple[Path, subprocess.CompletedProcess[str]], reference: Path
) -> None:
    from megatron_speech.parallel import groups
    from megatron_speech.training.checkpoint.load import load_for_inference

    def weights(path: Path) -> torch.Tensor:
        model, _, _ = load_for_inference(path)
        return torch.cat([p.detach().flatten() for _, p in sorted(model.named_parameters())])

    try:
        expected = weights(reference)
        for layout in LAYOUTS:
            torch.testing.assert_close(weights(two_processes[0] / layout), expected, rtol=0, atol=2e-4)
    finally:
        groups.destroy()


def test_a_run_goes_on_under_another_layout(
    two_processes: tuple[Path, subprocess.CompletedProcess[str]], reference: Path
) -> None:
    folder, done = two_processes
    assert "changed since it was written: parallel.tensor: 1 → 2" in done.stdout
    for line, other in zip(read_metrics(folder / "moved"), read_metrics(reference), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)


@pytest.mark.parametrize("saved_by", [1, 2])
def test_a_run_goes_on_with_another_number_of_data_parallel_ranks(
    two_processes: tuple[Path, subprocess.CompletedProcess[str]],
    recipe_file: Path,
    reference: Path,
    tmp_path: Path,
    saved_by: int,
) -> None:
    """That these are the same sequences in the same order, whatever the ranks, is claimed by the loader's tests."""
    run = two_processes[0] / "spread"
    if saved_by == 2:
        run = copy_until(two_processes[0] / "data_parallel", tmp_path / "gathered", 20)
        assert {path.name for path in (run / "checkpoints" / "step_00000020").glob("*.distcp")} == {
            "__0_0.distcp", "__1_0.distcp",
        }  # fmt: skip
        assert train(recipe_file, run) == 0
    ours, theirs = read_metrics(run), read_metrics(reference)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for line, other in zip(ours, theirs, strict=True):
        assert line["consumed_sequences"] == other["consumed_sequences"]
        for key in other:
            if key.startswith("loss"):
                assert line[key] == pytest.approx(other[key], rel=1e-5), (line["step"], key)


def test_a_sharded_optimizer_continues_from_its_shards(
    two_processes: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = two_processes
    # The run was ended after one step of its second stage and continued with the whole budget: the first stage is
    # the same, and the second begins with the same loss.
    ours, theirs = (without_timing(read_metrics(folder / name)) for name in ("sharded", "distributed_optimizer"))
    assert [line for line in ours if line["step"] <= 24] == [line for line in theirs if line["step"] <= 24]
    assert ours[-1]["step"] == theirs[-1]["step"] == 36


def test_an_error_of_the_input_is_one_sentence_of_all_processes(
    two_processes: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = two_processes
    sentences = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1 and "multiple of parallel.tensor 2" in sentences[0]
    assert json.loads((folder / "refused" / "status.json").read_text())["state"] == "failed"


# ---- reading checkpoints


def test_a_checkpoint_scores_the_same_when_it_is_loaded_for_inference(reference: Path) -> None:
    from megatron_speech.model.packed import PackedSequences
    from megatron_speech.parallel import groups
    from megatron_speech.tokens.templates import compile_document
    from megatron_speech.training.checkpoint.load import load_for_inference

    try:
        model, space, info = load_for_inference(reference)
        assert info.step == 36 and not model.training
        ids = compile_document(
            space, "tts", text_ids=space.encode_text("abc"), code_ids=space.encode_codes(np.zeros((4, 1), np.int32))
        )
        packed = PackedSequences.build(torch.tensor([0, len(ids)], dtype=torch.int32))
        tokens = torch.from_numpy(ids.astype(np.int64))[None]
        with torch.no_grad():
            logits = model(tokens, packed_seq_params=packed)
        assert logits.shape == (len(ids), space.padded_size)
        assert torch.isinf(logits[:, space.size :]).all()
    finally:
        groups.destroy()


@pytest.mark.parametrize("fault", ["missing", "truncated", "version", "foreign space"])
def test_a_checkpoint_that_is_not_sound_is_refused_for_inference(reference: Path, tmp_path: Path, fault: str) -> None:
    from megatron_speech.training.checkpoint.load import load_for_inference

    path = tmp_path / "step_00000036"
    shutil.copytree(reference / "checkpoints" / "step_00000036", path)
    description = path / "checkpoint.json"
    fields = json.loads(description.read_text())
    if fault == "missing":
        shutil.rmtree(path)
        sentence = "holds no complete checkpoint"
    elif fault == "truncated":
        os.truncate(path / "__0_0.distcp", 1000)
        sentence = "__0_0.distcp has 1000 bytes instead of"
    elif fault == "version":
        description.write_text(json.dumps({**fields, "format_version": 99}))
        sentence = "format_version 99, this version reads"
    else:
        description.write_text(json.dumps({**fields, "token_space_hash": "x"}))
        sentence = "put together from two runs"
    with pytest.raises(InputError, match=sentence):
        load_for_inference(path)


def test_the_benchmark_reports_a_rate_and_leaves_nothing_behind(recipe_file: Path, tmp_path: Path) -> None:
    figure = tmp_path / "figure.json"
    words = ["benchmark", "train", str(recipe_file), f"data.cache_dir={tmp_path / 'cache'}", "--stage", "sft",
             "--steps", "4", "--warmup-steps", "2", "--interval", "2", "--json", str(figure)]  # fmt: skip
    assert cli.main(words) == 0
    result = json.loads(figure.read_text())
    assert result["stage"] == "sft" and result["tokens_per_second"] > 0 and result["measurements"] == 2
    assert set(result["environment"]) >= {"torch", "megatron-core", "git", "devices"}
