"""Started under torchrun: several `megatron-speech train` commands, one after the other, in the same processes.

An argument list that begins with `benchmark` is that command.

Importing torch and megatron-core takes most of the time of a run of a toy. argv[1]: JSON list of argument lists.

The first command meets the environment as torchrun made it. The later ones would find the keys of the earlier ones in
the launcher's store: each gets a prefix of its own in it. No port is chosen here, so none can be taken by another.
"""

from __future__ import annotations

import json
import os
import sys

import torch.distributed as dist

from megatron_speech import cli
from megatron_speech.environment import prepare_imports
from megatron_speech.parallel import groups


def join(attempt: int) -> None:
    """Start torch.distributed over the launcher's store, apart from every other attempt."""
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore(f"command {attempt}", store),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )


if __name__ == "__main__":
    codes = []
    prepare_imports()
    for attempt, arguments in enumerate(json.loads(sys.argv[1])):
        if attempt:
            join(attempt)
        codes.append(cli.main(arguments if arguments[0] == "benchmark" else ["train", *arguments]))
        groups.destroy()
    if os.environ["RANK"] == "0":
        print("exit codes", json.dumps(codes), flush=True)
