"""Checkpoints exported as Hugging Face folders beside the training, one at a time.

    rank 0 ── RUN/exports/step_00000100.json ──► megatron-speech convert export-hf ──► RUN/hf/step_00000100/

A file in RUN/exports stands for an export that is still due. It outlives a kill: the run's next process takes it up.
The export is a process of its own on the CPU: it takes neither memory of the GPU nor time of the training's threads.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import IO

from megatron_speech.recipe.checkpoint import ExportConfig
from megatron_speech.training.checkpoint.background import Queue, with_this_package
from megatron_speech.training.checkpoint.store import point_link, step_of_name

_COMMAND = (sys.executable, "-m", "megatron_speech.cli", "convert", "export-hf")

# What a launcher tells a process about the run that it is part of; an export is no part of it.
_OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT",
                 "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE", "SLURM_STEP_ID")  # fmt: skip


class HuggingFaceExports:
    """Rank 0's exports: queued, made one after the other, pruned.

    Args:
        run: the run directory.
        config: what is exported.
    """

    def __init__(self, run: Path, config: ExportConfig) -> None:
        self._run, self._config = run, config
        self._queue, self.folder = Queue(run / "exports"), run / "hf"
        self._queue.folder.mkdir(exist_ok=True)
        self.folder.mkdir(exist_ok=True)
        self._process: subprocess.Popen[bytes] | None = None
        self._name = ""
        self._log: IO[bytes] | None = None

    def due(self, name: str, *, stage_ended: bool) -> bool:
        """Whether the checkpoint `name` is to be exported."""
        return (self._config.stage_ends and stage_ended) or (step_of_name(name) or 0) % self._config.every == 0

    def add(self, name: str) -> None:
        """Queue an export."""
        self._queue.add(name)

    def waiting(self) -> list[str]:
        """Names of the checkpoints whose export is due or under way: they have to stay."""
        return self._queue.names()

    def advance(self) -> list[str]:
        """Take note of an export that has ended and begin the next one; returns what went wrong. Waits for nothing."""
        problems = [] if self._process is None or self._process.poll() is None else self._end()
        if self._process is None:
            problems += self._begin()
        return problems

    def finish(self) -> list[str]:
        """Make all exports that are due; returns what went wrong."""
        problems = self.advance()
        while self._process is not None:
            self._process.wait()
            problems += self.advance()
        return problems

    def close(self) -> None:
        """End the export under way; it is made again by the run's next process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._close_log()
            self._process = None

    def _begin(self) -> list[str]:
        problems = []
        for name in self.waiting():
            checkpoint, output = self._run / "checkpoints" / name, self.folder / name
            if not (checkpoint / "checkpoint.json").is_file():
                problems.append(f"{name} is not exported: it is no longer there")
                self._queue.remove(name)
                continue
            # One export at a time, also where that of a process which was killed goes on: it holds the lock too.
            lock = os.open(self._queue.folder / "lock", os.O_CREAT | os.O_WRONLY, 0o644)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(lock)
                return problems
            shutil.rmtree(output, ignore_errors=True)  # of a checkpoint that was written anew since
            words = [*_COMMAND, "--checkpoint", str(checkpoint), "--output", str(output)]
            words += ["--ema"] if self._config.ema else []
            outside = {key: value for key, value in os.environ.items() if key not in _OF_LAUNCHERS}
            self._log = open(self._queue.folder / f"{name}.log", "wb")
            try:
                self._process = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=self._log,
                    stderr=subprocess.STDOUT,
                    env=with_this_package(outside) | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
                    pass_fds=(lock,),
                    start_new_session=True,  # an interrupt of the run is none of the export
                )
            finally:
                os.close(lock)
            self._name = name
            return problems
        return problems

    def _end(self) -> list[str]:
        assert self._process is not None
        status, name = self._process.returncode, self._name
        self._process = None
        self._close_log()
        log = self._queue.folder / f"{name}.log"
        problems = []
        if status == 0:
            point_link(self.folder / "latest", name)
            log.unlink(missing_ok=True)
            self._prune()
        else:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines() or [f"exit status {status}"]
            problems.append(f"{name} is not exported: {lines[-1]} (see {log})")
        self._queue.remove(name)
        return problems

    def _prune(self) -> None:
        if self._config.keep_last is None:
            return
        found = [path for path in self.folder.glob("step_*") if step_of_name(path.name) is not None]
        found.sort(key=lambda path: step_of_name(path.name) or 0)
        for path in found[: -self._config.keep_last]:
            shutil.rmtree(path)

    def _close_log(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None
