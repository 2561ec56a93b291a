"""What one rank of a run does: `megatron-speech train`, as torchrun would start it, over a store in a file."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import te_stand_ins
import torch
import torch.distributed as dist

from megatron_speech import cli
from megatron_speech.model import specs
from megatron_speech.parallel import groups
from megatron_speech.training import execution, trainer  # noqa: F401  imported once, by the fork server


def train(rank: int, world_size: int, directory: str, arguments: list[str]) -> None:
    """One process of `megatron-speech train ARGUMENTS`; its output goes to `directory`/RANK.log."""
    torch.set_num_threads(1)
    log = open(Path(directory, f"{rank}.log"), "w", buffering=1)
    sys.stdout = sys.stderr = log
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=world_size)
    status = cli.main(["train", *arguments])
    groups.destroy()
    log.close()
    sys.exit(status)


def train_on_stand_ins(rank: int, world_size: int, directory: str, arguments: list[str]) -> None:
    """The same with Transformer Engine's place taken by stand-ins, in fp32 and with megatron-core's own RoPE."""
    te_stand_ins.install(setattr)
    execution.choose_backend = lambda *_: specs.Backend("te", "stand-ins")
    specs.core_fields = lambda backend: {"cp_comm_type": "p2p"}
    train(rank, world_size, directory, arguments)
