"""Runs the commands in forked children, and kills them at the k-th time that they are about to change the disk.

Started by the tests as a process of its own, with one thread, so that forking is safe and costs milliseconds. Reads
requests and writes answers, one JSON object a line.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import dateutil.relativedelta  # noqa: F401 - as the next two: pyarrow and rich would import them in every child
import numpy.ma  # noqa: F401
import rich._emoji_codes  # noqa: F401

from megatron_speech.data.dataset import journal
from megatron_speech.preprocess import merge_datasets, preprocess_data
from megatron_speech.preprocess.readers import jsonl

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}


def run(request: dict[str, Any], result: int) -> int:
    """Run the command in this (forked) process; writes the number of changes to `result`."""
    journal.COMMIT_SECONDS = 0.0 if request["often"] else 1e9
    jsonl.BATCH_ROWS = 30
    changes = 0

    def changing() -> None:
        nonlocal changes
        if changes == request["kill_at"]:
            os.kill(os.getpid(), signal.SIGKILL)
        changes += 1

    def audit(event: str, values: tuple[Any, ...]) -> None:
        if event in CHANGES or (event == "open" and isinstance(values[2], int) and values[2] & WRITING):
            inside = event in ("os.remove", "os.rmdir") and values[1] != -1  # within a folder that is being removed
            if inside or request["folder"] in str(values[0]):
                changing()

    def fsync(descriptor: int) -> None:
        changing()  # and no more: a kill, unlike a power cut, takes nothing that was written

    os.fsync = fsync
    sys.addaudithook(audit)
    mains = {"preprocess_data": preprocess_data.main, "merge_datasets": merge_datasets.main}
    if request["command"] == "encode_audio":
        from megatron_speech.preprocess import encode_audio

        encode_audio.COMMIT_SECONDS = 0.0 if request["often"] else 1e9
        mains["encode_audio"] = encode_audio.main
    status = mains[request["command"]](request["argv"])
    os.write(result, str(changes).encode())
    return status


def serve() -> None:
    """Answer requests until there are no more."""
    for line in sys.stdin:
        request = json.loads(line)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            output = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            status = 1
            try:
                status = run(request, writing)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        os.close(writing)
        changes = os.read(reading, 100)
        os.close(reading)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        answer = {"status": status, "changes": int(changes or -1), "log": Path(request["log"]).read_text()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
