"""Two processes train; something happens to the second one. A script, so that torch is imported once for all of it.

argv[1]: JSON {"recipe": path, "scenarios": [{"name", "overrides", "fault"}]}. `fault`: USR1, STOP or KILL, sent to
rank 1 when rank 0 has printed its first line of training; "raise": it raises an error in its fourth step; "seed": it
has another seed; "none": nothing happens.
Prints a JSON line per scenario: {"name", "codes": [rank 0, rank 1], "errors": [stderr of rank 0, of rank 1], "last":
last line read of rank 0}. No port is chosen here: the store takes a free one, as torchrun's does.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch.distributed as dist

sys.path.append(str(Path(__file__).parents[1]))

from processes import end_with_parent

from megatron_speech import cli
from megatron_speech.environment import prepare_imports


def child(rank: int, port: int, scenario: dict[str, Any], recipe: str, out: int, errors: Path) -> None:
    end_with_parent()
    os.dup2(out, 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    if scenario["fault"] == "raise" and rank == 1:
        from megatron_speech.training.step import TrainStep

        take, steps = TrainStep.take, itertools.count()

        def raising(self: TrainStep, *arguments: Any) -> Any:
            if next(steps) == 3:
                raise ValueError("a page of this dataset cannot be read")
            return take(self, *arguments)

        TrainStep.take = raising  # type: ignore[method-assign]
    own = ["seed=8"] if scenario["fault"] == "seed" and rank == 1 else []
    try:
        code = cli.main(["train", recipe, *scenario["overrides"], *own])
    except BaseException as error:
        print(f"raised {type(error).__name__}: {error}", file=sys.stderr)
        code = 1
    os._exit(code)


def run(scenario: dict[str, Any], recipe: str, folder: Path) -> dict[str, Any]:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    reader, writer = os.pipe()
    silent = os.open(os.devnull, os.O_WRONLY)
    pids = []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            child(rank, store.port, scenario, recipe, (writer, silent)[rank], folder / f"{scenario['name']}.{rank}")
        pids.append(pid)
    os.close(writer)
    line = ""
    with os.fdopen(reader) as lines:
        for line in lines:
            if line.startswith("pt ") and scenario["fault"] in ("USR1", "STOP", "KILL"):
                os.kill(pids[1], signal.Signals[f"SIG{scenario['fault']}"])
                break
        codes = [os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1])]
    if scenario["fault"] == "STOP":
        os.kill(pids[1], signal.SIGKILL)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(pids[1], 0)[1]))
    texts = [(folder / f"{scenario['name']}.{rank}").read_text() for rank in range(2)]
    return {"name": scenario["name"], "codes": codes, "errors": texts, "last": line}


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    prepare_imports()
    importlib.import_module("megatron_speech.training.trainer")
    with tempfile.TemporaryDirectory() as errors:
        for each in request["scenarios"]:
            print(json.dumps(run(each, request["recipe"], Path(errors))), flush=True)
