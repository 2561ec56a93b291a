"""Checkpoints copied to a URL in the background, again and again until it is done.

    rank 0 ── RUN/uploads/step_00000100.json ──► this module, as a process of its own ──► URL/step_00000100/

A file in RUN/uploads stands for a checkpoint that is still to be copied. It outlives a kill: the run's next process
takes it up. The copying is not done in the training's process, so that neither its threads nor its encryption take time
from it. Light to import: no torch.
"""

from __future__ import annotations

import fcntl
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from megatron_speech.console import install_handler
from megatron_speech.errors import InputError
from megatron_speech.files import read_json, write_json
from megatron_speech.recipe.checkpoint import CheckpointConfig, UploadConfig
from megatron_speech.remote import list_copies, open_url, put_checkpoint, remove_copy
from megatron_speech.training.checkpoint.background import Queue, with_this_package

logger = logging.getLogger("megatron_speech.training.checkpoint.upload")  # __name__ is __main__ in its process

FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 300.0


class Uploader:
    """Rank 0's end: queues copies, and owns the process that makes them.

    Args:
        run: the run directory.
        config: its `upload` section is set.

    Raises:
        InputError: the URL's protocol is unknown, or its package is not installed.
    """

    def __init__(self, run: Path, config: CheckpointConfig) -> None:
        assert config.upload is not None
        self._config = config.upload
        open_url(self._config.url, self._config.options)
        self._run, self._queue = run, Queue(run / "uploads")
        self._queue.folder.mkdir(exist_ok=True)
        write_json(self._queue.folder / "settings.json", config.model_dump(mode="json"))
        self._process: subprocess.Popen[str] | None = None
        if self._queue.names():
            self._send("go on")

    def waiting(self) -> list[str]:
        """Names of the checkpoints that are still to be copied."""
        return self._queue.names()

    def add(self, name: str) -> list[str]:
        """Queue a copy of a checkpoint; returns those that are given up, since too many are waiting."""
        self._queue.add(name)
        given_up = self._queue.names()[: -self._config.max_waiting]
        for old in given_up:
            self._queue.remove(old)
        self._send("go on")
        return given_up

    def finish(self) -> list[str]:
        """Wait for the copies that are still due, for `wait_minutes`; returns those that are not made."""
        if self._queue.names():
            self._send("finish")
            assert self._process is not None
            try:
                self._process.wait(60.0 * self._config.wait_minutes)
            except subprocess.TimeoutExpired:
                pass
        self.close()
        return self._queue.names()

    def close(self) -> None:
        """End the process; what it has not copied stays in the queue."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()
            self._process = None

    def _send(self, word: str) -> None:
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, "-m", "megatron_speech.training.checkpoint.upload", str(self._run)]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, text=True, env=with_this_package(os.environ)
            )
        assert self._process.stdin is not None
        try:
            print(word, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            pass  # it has just ended; the queue is kept, and the next word starts another


def copy_all(run: Path, *, finish: threading.Event, woken: threading.Event) -> None:
    """Copy what is in the queue of `run`, as often as it takes, until it is empty and `finish` is set."""
    queue = Queue(run / "uploads")
    config = CheckpointConfig.model_validate(read_json(queue.folder / "settings.json", "upload settings"))
    assert config.upload is not None
    failures = 0
    while True:
        woken.clear()
        names = queue.names()
        if not names:
            if finish.is_set():
                return
            woken.wait()
            continue
        name = names[0]
        try:
            if not _copy(run, name, config, config.upload):
                continue
        except InputError as error:
            logger.warning("upload: %s is not copied: %s", name, error)
        except Exception as error:
            # The libraries behind fsspec have no error in common. None of them may end this loop; all are logged.
            failures += 1
            pause = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2.0 ** (failures - 1)) * random.uniform(0.5, 1.0)
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            logger.warning(
                "upload: copying %s to %s failed (%s); again in %.1f s", name, config.upload.url, reason, pause
            )
            time.sleep(pause)
            continue
        failures = 0
        queue.remove(name)


def _copy(run: Path, name: str, config: CheckpointConfig, upload: UploadConfig) -> bool:
    """Copy one checkpoint; False when another one took its name meanwhile."""
    local = run / "checkpoints" / name
    description = local / "checkpoint.json"
    if not description.is_file():
        logger.warning("upload: %s is not copied: it is no longer there", name)
        return True
    began, before = time.monotonic(), description.stat().st_ino
    system, root = open_url(upload.url, upload.options)
    if put_checkpoint(system, root, local):
        logger.info("upload: %s is at %s (in %.1f s)", name, upload.url, time.monotonic() - began)
    if upload.keep_last is not None:
        _prune(system, root, run, config, upload.keep_last)
    return not description.is_file() or description.stat().st_ino == before


def _prune(system: Any, root: str, run: Path, config: CheckpointConfig, keep_last: int) -> None:
    """Remove copies that no rule keeps."""
    best = run / "checkpoints" / "best"
    kept = os.readlink(best) if best.is_symlink() else None
    for name, fields in list(list_copies(system, root).items())[keep_last:]:
        milestone = config.keep_every and int(fields["step"]) % config.keep_every == 0
        if not (name == kept or milestone or (config.keep_stage_ends and fields.get("stage_ended"))):
            remove_copy(system, root, name)


def main(run: Path) -> None:
    """Copy for the process at the other end of stdin, and end with it."""
    install_handler()
    # A signal that stops the run reaches all of its processes: this one ends when stdin does.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    finish, woken = threading.Event(), threading.Event()

    def listen() -> None:
        for word in sys.stdin:
            if word.strip() == "finish":
                finish.set()
            woken.set()
        os._exit(0)  # the run has ended, or was killed

    threading.Thread(target=listen, daemon=True).start()
    with open(Queue(run / "uploads").folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the process of a run that was killed may still be here for a moment
        copy_all(run, finish=finish, woken=woken)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
