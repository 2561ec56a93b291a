"""Checkpoints at a URL: copied to a real server that speaks S3, complete or invisible, again until it is done."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
from toy_runs import toy_recipe, train, write_recipe

from megatron_speech.errors import InputError
from megatron_speech.recipe.checkpoint import CheckpointConfig
from megatron_speech.recipe.load import parse_recipe
from megatron_speech.remote import fetch_checkpoint, list_copies, open_url, put_checkpoint, remove_copy
from megatron_speech.training.checkpoint import upload


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a server process with S3's protocol, on a port that it chose."""
    with processes.started(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        address = next(found[0] for line in process.stdout if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
        reader = threading.Thread(target=process.stdout.read, daemon=True)
        reader.start()
        yield address
        process.kill()
        reader.join()


@pytest.fixture
def s3(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A file system on the server, which the environment names; the bucket `speech` exists."""
    for name, value in {
        "AWS_ENDPOINT_URL": server, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION":
        "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "MEGATRON_SPEECH_CACHE": str(tmp_path / "cache"),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()  # one that was made without these credentials keeps to that
    system = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
    system.mkdir("speech")
    yield system
    for bucket in ("speech", "later"):
        if system.exists(bucket):
            system.rm(bucket, recursive=True)


@pytest.fixture(scope="module")
def recipe_file(toy: Path) -> Path:
    """Six steps, a checkpoint after every second one."""
    recipe = toy_recipe(toy, validation={"interval_steps": 0}, checkpoint={"interval_steps": 2, "keep_last": 1})
    recipe["stages"] = [recipe["stages"][0] | {"tokens": 6 * 512}]
    return write_recipe(toy / "upload.yaml", recipe)


def make_checkpoint(path: Path, content: bytes = b"weights") -> Path:
    path.mkdir(parents=True)
    files = {}
    for name, data in (("common.pt", b"common" + content), ("__0_0.distcp", content)):
        (path / name).write_bytes(data)
        files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "checkpoint.json").write_text(json.dumps({"step": int(path.name[5:]), "files": files}))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- with a server


@pytest.mark.slow
def test_a_run_copies_its_checkpoints_to_s3_and_they_are_read_from_there(
    recipe_file: Path, tmp_path: Path, s3: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    from megatron_speech.training.checkpoint.load import open_checkpoint

    run = tmp_path / "run"
    assert train(recipe_file, run, "checkpoint.upload=s3://speech/run1") == 0
    copies = list_copies(s3, "speech/run1")
    assert list(copies) == ["step_00000006", "step_00000004", "step_00000002"]
    assert (run / "uploads").is_dir() and list((run / "uploads").glob("step_*")) == []
    assert [path.name for path in (run / "checkpoints").glob("step_*")] == ["step_00000006"]
    assert "upload: step_00000006 is at s3://speech/run1" in capfd.readouterr().err

    for url in ("s3://speech/run1", "s3://speech/run1/step_00000006"):
        info, _ = open_checkpoint(url)
        assert info.step == 6 and tmp_path / "cache" in info.path.parents
        ours = contents(run / "checkpoints" / "step_00000006")
        theirs = contents(info.path)
        assert json.loads(theirs.pop("checkpoint.json")) == json.loads(ours.pop("checkpoint.json"))
        assert theirs == ours
    with pytest.raises(InputError, match="holds no complete checkpoint"):
        fetch_checkpoint("s3://speech/run1/step_00000007")


@pytest.mark.slow
def test_what_could_not_be_copied_is_copied_by_the_next_process_of_the_run(
    recipe_file: Path, tmp_path: Path, s3: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    settings = "checkpoint.upload={url: 's3://later/run2', wait_minutes: 0, max_waiting: 2, keep_last: 1}"
    assert train(recipe_file, run, settings) == 0  # there is no such bucket
    error = capfd.readouterr().err
    assert "ALARM: step_00000004, step_00000006: not copied yet; run the same command again" in error
    assert "ALARM: step_00000002 is not copied: more than checkpoint.upload.max_waiting are waiting" in error
    # Not pruned, though only one is asked for: it waits.
    assert len(list((run / "checkpoints").glob("step_*"))) == 2
    s3.mkdir("later")
    assert train(recipe_file, run, settings.replace("wait_minutes: 0", "wait_minutes: 5")) == 0
    assert list((run / "uploads").glob("step_*")) == []
    copies = list_copies(s3, "later/run2")
    assert list(copies) == ["step_00000006"]  # keep_last of the copies
    assert s3.ls("later/run2", detail=False) == ["later/run2/step_00000006"]


@pytest.mark.slow
def test_a_copying_process_ends_with_the_training_and_another_goes_on(tmp_path: Path, s3: Any) -> None:
    """Whichever of the two is killed: what is in the queue is copied, once."""
    run = tmp_path / "run"
    make_checkpoint(run / "checkpoints" / "step_00000002")
    config = CheckpointConfig.model_validate({"upload": {"url": "s3://later/x"}})  # which is not there
    uploader = upload.Uploader(run, config)
    assert uploader.add("step_00000002") == []
    process = uploader._process
    assert process is not None and process.stdin is not None
    process.stdin.close()  # as when the training is killed
    assert process.wait(60) == 0
    s3.mkdir("later")
    again = upload.Uploader(run, config)
    assert again._process is not None
    again._process.send_signal(signal.SIGTERM)  # meant for the training, which says when to end
    again._process.send_signal(signal.SIGKILL)
    again._process.wait()
    assert again.finish() == []
    assert list(list_copies(s3, "later/x")) == ["step_00000002"]


# ---- wherever it fails


class Failing:
    """A file system whose `fail_at`-th change fails; a copy breaks off after half of its bytes where it can."""

    def __init__(self, system: Any, fail_at: int) -> None:
        self._system, self._left = system, fail_at

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._system, name)
        if name not in ("put_file", "pipe_file", "rm_file", "makedirs"):
            return found

        def changing(*arguments: Any, **options: Any) -> Any:
            self._left -= 1
            if self._left < 0:
                if name == "put_file":
                    data = Path(arguments[0]).read_bytes()
                    self._system.pipe_file(arguments[1], data[: len(data) // 2])
                raise ConnectionResetError("broke off")
            return found(*arguments, **options)

        return changing


@pytest.mark.parametrize("before", ["nothing", "another of the same name"])
def test_wherever_copying_breaks_off_the_copy_is_complete_or_invisible(tmp_path: Path, before: str) -> None:
    local = make_checkpoint(tmp_path / "step_00000002")
    for fail_at in range(20):
        root = f"{tmp_path}/there{fail_at}"
        system, _ = open_url(f"file://{root}")
        if before != "nothing":
            put_checkpoint(system, root, make_checkpoint(tmp_path / f"{fail_at}" / "step_00000002", b"Weights"))
        try:
            put_checkpoint(Failing(system, fail_at), root, local)
            ended = True
        except ConnectionResetError:
            ended = False
        # Visible is only what is whole: the old one until it is taken away, the new one when all of it is there.
        for name, fields in list_copies(system, root).items():
            for file, entry in fields["files"].items():
                data = Path(root, name, file).read_bytes()
                assert hashlib.sha256(data).hexdigest() == entry["sha256"]
        put_checkpoint(system, root, local)
        assert contents(Path(root, "step_00000002")).items() >= contents(local).items()
        if ended:
            assert fail_at >= 5 and put_checkpoint(system, root, local) is False
            return
    raise AssertionError("copying takes more changes than were tried")


def test_an_attempt_goes_on_with_the_files_of_the_one_before(tmp_path: Path) -> None:
    local = make_checkpoint(tmp_path / "step_00000002")
    system, root = open_url(f"file://{tmp_path}/there")
    with pytest.raises(ConnectionResetError):
        put_checkpoint(Failing(system, 4), root, local)  # makedirs, the mark, two files: the description fails
    (local / "common.pt").unlink()  # and is not needed again
    assert put_checkpoint(system, root, local)
    remove_copy(system, root, "step_00000002")
    assert list_copies(system, root) == {} and list((tmp_path / "there").iterdir()) == []


def test_a_checkpoint_that_is_damaged_is_not_copied(tmp_path: Path) -> None:
    local = make_checkpoint(tmp_path / "step_00000002")
    (local / "common.pt").write_bytes(b"commonWEIGHTS")
    system, root = open_url("memory://damaged")
    with pytest.raises(InputError, match=r"common\.pt does not have the SHA-256"):
        put_checkpoint(system, root, local)
    assert list_copies(system, root) == {}


def test_the_queue_is_emptied_in_spite_of_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    for step in (2, 4, 6):
        make_checkpoint(run / "checkpoints" / f"step_{step:08d}")
    shutil.rmtree(run / "checkpoints" / "step_00000004")
    queue = upload.Queue(run / "uploads")
    queue.folder.mkdir()
    config = CheckpointConfig.model_validate({"upload": f"file://{tmp_path}/there"})
    (queue.folder / "settings.json").write_text(config.model_dump_json())
    for step in (2, 4, 6):
        queue.add(f"step_{step:08d}")
    pauses: list[float] = []
    failures = iter([True] * 10)
    put = upload.put_checkpoint

    def failing(*arguments: Any) -> bool:
        if next(failures, False):
            raise TimeoutError("no answer")
        return put(*arguments)

    monkeypatch.setattr(upload, "put_checkpoint", failing)
    monkeypatch.setattr(upload.time, "sleep", pauses.append)
    finish = threading.Event()
    finish.set()
    upload.copy_all(run, finish=finish, woken=threading.Event())
    assert queue.names() == []
    system, root = open_url(f"file://{tmp_path}/there")
    assert list(list_copies(system, root)) == ["step_00000006", "step_00000002"]
    assert len(pauses) == 10 and all(min(2**n, 300) / 2 <= pause <= min(2**n, 300) for n, pause in enumerate(pauses))
    error = capsys.readouterr().err
    assert error.count("failed (TimeoutError: no answer); again in") == 10
    assert "step_00000004 is not copied: it is no longer there" in error


# ---- what is refused


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ({"url": "s3://b/r", "options": {"secret": "x"}}, "options.secret looks like a credential"),
        ({"url": "s3://b/r", "options": {"key": "x"}}, "leave it to the environment"),
        ("bucket/prefix", r"checkpoint\.upload\.url"),
    ],
)
def test_a_section_that_would_leak_or_cannot_work_is_refused(toy: Path, section: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        parse_recipe(toy_recipe(toy, checkpoint={"upload": section}), "r")


def test_an_unknown_protocol_is_refused_before_training(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(recipe_file, tmp_path / "run", "checkpoint.upload=s33://bucket/x") == 2
    assert "names the protocol s33, which is unknown (did you mean 's3'?)" in capsys.readouterr().err
