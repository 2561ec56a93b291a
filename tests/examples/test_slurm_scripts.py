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

from megatron_speech.token_space import CodecDescription, TokenSpace

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
