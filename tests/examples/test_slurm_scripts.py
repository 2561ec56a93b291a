"""The bodies of the SLURM scripts, run with SLURM's variables and without SLURM."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from megatron_speech.tokens.space import CodecDescription, TokenSpace

SUFFIXES = (".bin", ".idx", ".docs.parquet")


@pytest.fixture
def run(repository, tmp_path):
    """`run(script, *arguments, **SLURM_variables)` as a finished process, in `tmp_path`, without SLURM's programs."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}

    def run(name, *arguments, expect=0, **variables):
        environment = {**outside, "PYTHON": sys.executable, "MEGATRON_SPEECH": str(repository), **variables}
        done = subprocess.run(
            ["bash", repository / "examples" / "slurm" / name, *map(str, arguments)],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == expect, done.stdout + done.stderr
        return done

    return run


def array(index, count):
    names = {"ID": index, "COUNT": count, "MIN": 0, "MAX": count - 1}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in names.items()} | {"SLURM_CPUS_PER_TASK": "1"}


@pytest.fixture
def text(tmp_path):
    rows = [{"sample_id": f"d{i}", "language": "en", "text": f"row {i} " + "word " * (i % 7)} for i in range(50)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    TokenSpace.build("bytes", CodecDescription("toy", "c" * 64, 8000, 25.0, ("codes",), (32,))).save(
        tmp_path / "ts.json"
    )
    return ("--task", "text_lm", "--input", "text.jsonl", "--token-space", "ts.json")


@pytest.mark.slow
def test_the_tasks_of_an_array_and_the_merge_give_the_bytes_of_one_run(run, repository, text, tmp_path):
    for index in (2, 0, 1):
        run("preprocess.sbatch", "out/t", *text, **array(index, 3))
    # The task that was preempted after it had finished runs again.
    run("preprocess.sbatch", "out/t", *text, **array(1, 3))
    run("merge.sbatch", 3, "out/t")
    subprocess.run(
        [sys.executable, repository / "preprocess" / "preprocess_data.py", *text, "--output-prefix", "one/t"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    for suffix in SUFFIXES:
        assert (tmp_path / f"out/t{suffix}").read_bytes() == (tmp_path / f"one/t{suffix}").read_bytes()


@pytest.mark.slow
def test_a_part_of_an_array_runs_again_only_with_the_number_of_shards(run, text, tmp_path):
    alone = {**array(1, 1), "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "1"}
    refused = run("preprocess.sbatch", "out/t", *text, expect=2, **alone)
    assert "SHARDS=N" in refused.stderr and not (tmp_path / "out").exists()
    run("preprocess.sbatch", "out/t", *text, SHARDS="3", **alone)
    assert (tmp_path / "out/t.shard-00001-of-00003.bin").is_file()


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (("out/t",), {}, "SLURM_ARRAY_TASK_ID"),
        (("out/t",), array(3, 3), "outside of the 3 shards"),
        (("--task",), array(0, 3), "output prefix"),
        (("out/t",), {**array(0, 3), "MEGATRON_SPEECH": "/nowhere"}, "no checkout"),
    ],
    ids=["no array", "task beyond the shards", "no prefix", "no checkout"],
)
def test_a_wrong_submission_is_one_sentence(run, arguments, variables, message):
    done = run("preprocess.sbatch", *arguments, expect=2, **variables)
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1


def test_merge_wants_the_number_of_shards(run):
    assert "number of shards" in run("merge.sbatch", "out/t", expect=2).stderr


@pytest.mark.slow
def test_recordings_are_encoded_as_an_array_and_the_last_task_joins_the_lists(run, tmp_path):
    pytest.importorskip("pycodec2")
    rows = []
    for i in range(4):
        sound = np.random.default_rng(i).normal(0, 0.1, 4000)
        soundfile.write(tmp_path / f"{i}.wav", sound, 8000)
        rows.append({"wav_path": f"{i}.wav", "transcript": "noise", "language": "en"})
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--input", "samples.jsonl", "--codec", "codec2", "--output-dir", "codes")
    run("encode.sbatch", *flags, **array(1, 2))
    assert not (tmp_path / "codes/samples.jsonl").exists()
    run("encode.sbatch", *flags, **array(0, 2))
    assert len((tmp_path / "codes/samples.jsonl").read_text().splitlines()) == 4


COMMAND = """
import os, pathlib, signal, sys
state = pathlib.Path("state")
if state.exists():
    print("goes on after", state.read_text(), *sys.argv[1:])
    sys.exit(0)
def stop(*_):
    state.write_text("7")
    os._exit(130)
signal.signal(signal.SIGTERM, stop)
os.write(int(os.environ["READY"]), b"x")
signal.pause()
"""


def test_a_task_close_to_its_time_limit_stops_requeues_itself_and_goes_on(run, repository, tmp_path):
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "scontrol").write_text('#!/bin/sh\necho "$@" > requeued\n')
    (programs / "scontrol").chmod(0o755)
    reader, writer = os.pipe()
    variables = {**os.environ, **array(1, 4), "SLURM_ARRAY_JOB_ID": "99", "READY": str(writer)}
    variables["PATH"] = f"{programs}:{os.environ['PATH']}"
    first = subprocess.Popen(
        ["bash", repository / "examples/slurm/shard.sh", sys.executable, "-c", COMMAND],
        env=variables,
        cwd=tmp_path,
        pass_fds=[writer],
    )
    os.close(writer)
    assert os.read(reader, 1) == b"x"  # the command is at work
    first.send_signal(signal.SIGUSR1)
    assert first.wait(30) == 0
    assert (tmp_path / "requeued").read_text() == "requeue 99_1\n"
    again = run("shard.sh", sys.executable, "-c", COMMAND, **array(1, 4))
    assert "goes on after 7 --shard 1/4" in again.stdout


def test_the_commands_status_is_the_tasks(run):
    run("shard.sh", sys.executable, "-c", "raise SystemExit(2)", expect=2, **array(0, 1))


def test_submit_makes_the_merge_wait_for_every_shard(run, tmp_path):
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "sbatch").write_text('#!/bin/sh\necho "$@" >> submitted\necho "$(wc -l < submitted);cluster"\n')
    (programs / "sbatch").chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}"
    done = run("submit.sh", 8, "out/t", "--partition=cpu", "--time=60", "--", "--task", "tts", PATH=path)
    first, second = (tmp_path / "submitted").read_text().splitlines()
    assert "--partition=cpu --time=60 --array=0-7" in first and first.endswith("preprocess.sbatch out/t --task tts")
    assert "--partition=cpu --time=60" in second and "--dependency=afterok:1 " in second
    assert second.endswith("merge.sbatch 8 out/t")
    assert (tmp_path / "out/t.logs").is_dir() and "job 2 joins them" in done.stdout
    assert "usage" not in done.stdout
    (tmp_path / "submitted").unlink()
    assert "--" in run("submit.sh", 8, "out/t", "--partition=cpu", expect=2, PATH=path).stderr
    assert not (tmp_path / "submitted").exists()


def test_each_script_is_valid_shell(repository):
    for script in [*sorted((repository / "examples/slurm").iterdir()), repository / "tests/examples/slurm_cluster.sh"]:
        assert Path(script).read_text().startswith("#!/usr/bin/env bash\n")
        subprocess.run(["bash", "-n", script], check=True)


# ---- training


SRUN = """#!/usr/bin/env bash
echo "$@" >> srun.calls
[[ $* == *--dry-run* ]] && exit "${GATE_STATUS:-0}"
mkdir -p run/checkpoints
[[ -z ${CHECKPOINT:-} ]] || mkdir -p "run/checkpoints/$CHECKPOINT"
[[ -z ${STATE:-} ]] || echo "{\\"state\\": \\"$STATE\\", \\"step\\": 7}" > run/status.json
[[ -z ${TERM_BATCH:-} ]] || kill -TERM "$PPID"
exit "${STATUS:-0}"
"""


@pytest.fixture
def train(run, repository, tmp_path):
    """`train(*arguments, **variables)`: train.sbatch over an srun that does what the variables say."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "srun").write_text(SRUN)
    (programs / "scontrol").write_text('#!/bin/sh\necho "$@" >> requeued\n')
    (programs / "sleep").write_text("#!/bin/sh\n")  # SLURM ends the job while the script sleeps
    for program in programs.iterdir():
        program.chmod(0o755)
    recipe = repository / "examples/recipes/smoke.yaml"

    def train(*arguments, expect=0, **variables):
        (tmp_path / "requeued").unlink(missing_ok=True)
        path = f"{programs}:{os.environ['PATH']}"
        words = (recipe, "run_dir=run", *arguments)
        done = run("train.sbatch", *words, expect=expect, PATH=path, SLURM_JOB_ID="5", **variables)
        requeued = tmp_path / "requeued"
        return done, requeued.read_text() if requeued.exists() else None

    return train


@pytest.mark.slow
def test_a_finished_run_ends_the_job_and_a_preempted_one_requeues_it(train, tmp_path):
    done, requeued = train("--through", "pt", STATE="paused")
    assert requeued is None
    (call,) = (tmp_path / "srun.calls").read_text().splitlines()
    assert call.startswith("--kill-on-bad-exit=1 ") and call.endswith("smoke.yaml run_dir=run --through pt")
    # The job never ends as done, or the next one of a chain would begin: SLURM ends it when it takes the requeue.
    done, requeued = train(STATE="preempted", expect=1)
    assert requeued == "requeue 5\n" and "saved at step 7; back into the queue" in done.stdout


@pytest.mark.slow
def test_a_failure_is_tried_again_only_after_progress(train):
    done, requeued = train(STATE="failed", STATUS="1", CHECKPOINT="step_00000010", expect=1)
    assert requeued == "requeue 5\n" and "after step_00000010; back into the queue" in done.stdout
    done, requeued = train(STATE="failed", STATUS="137", CHECKPOINT="step_00000010", expect=137)
    assert requeued is None and "no checkpoint was written since the start; not requeued" in done.stderr
    _, requeued = train(STATE="failed", STATUS="2", CHECKPOINT="step_00000020", expect=2)
    assert requeued is None


def test_a_job_that_slurm_ends_is_neither_done_nor_requeued_by_itself(train):
    done, requeued = train(STATE="preempted", TERM_BATCH="1", expect=1)
    assert requeued is None and "SLURM ends this job; the run is preempted at step 7" in done.stdout


@pytest.mark.slow
def test_a_gate_stands_before_the_first_start_only(train, tmp_path):
    train(STATE="finished", GATE="--dry-run")
    assert [line.endswith("--dry-run") for line in (tmp_path / "srun.calls").read_text().splitlines()] == [True, False]
    (tmp_path / "srun.calls").unlink()
    train(STATE="finished", GATE="--dry-run", SLURM_RESTART_COUNT="2")
    assert "--dry-run" not in (tmp_path / "srun.calls").read_text()
    (tmp_path / "srun.calls").unlink()
    train(STATE="finished", GATE="--dry-run", GATE_STATUS="2", expect=2)
    assert len((tmp_path / "srun.calls").read_text().splitlines()) == 1


def test_a_recipe_that_is_wrong_is_refused_before_srun(train, tmp_path):
    done, requeued = train("stages.pt.tokenz=5", expect=2)
    assert "did you mean 'tokens'" in done.stderr and requeued is None
    assert not (tmp_path / "srun.calls").exists()


def test_a_chain_is_conversions_then_stages_each_after_the_one_before(run, tmp_path):
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "sbatch").write_text('#!/bin/sh\necho "$@" >> submitted\necho "$(wc -l < submitted);cluster"\n')
    (programs / "sbatch").chmod(0o755)
    (tmp_path / "conversions.txt").write_text(
        "# pairs\n4 out/tts --task tts --input a.jsonl\n\n2 out/text --task text_lm\n"
    )
    words = ("conversions.txt", "recipe.yaml", "s1,sft", "--nodes=2", "--", "run_dir=run")
    variables = {"PATH": f"{programs}:{os.environ['PATH']}", "CONVERT_OPTIONS": "--partition=cpu --time=60"}
    done = run("chain.sh", *words, **variables)
    lines = (tmp_path / "submitted").read_text().splitlines()
    assert len(lines) == 6
    assert "--partition=cpu --time=60 --array=0-3" in lines[0] and lines[0].endswith(
        "out/tts --task tts --input a.jsonl"
    )
    assert "--dependency=afterok:1 " in lines[1] and "--dependency=afterok:3 " in lines[3]
    assert "--nodes=2 --dependency=afterok:2:4 " in lines[4]
    assert lines[4].endswith("train.sbatch recipe.yaml --through s1 run_dir=run")
    assert "--dependency=afterok:5 " in lines[5] and "--kill-on-invalid-dep=yes" in lines[5]
    assert lines[5].endswith("train.sbatch recipe.yaml --through sft run_dir=run")
    assert "job 6 trains stage sft" in done.stdout and (tmp_path / "logs").is_dir()
    (tmp_path / "empty.txt").write_text("# nothing\n")
    assert "names no conversion" in run("chain.sh", "empty.txt", *words[1:], expect=2, **variables).stderr
    assert "--" in run("submit_train.sh", "recipe.yaml", "s1", "--nodes=2", expect=2, **variables).stderr
