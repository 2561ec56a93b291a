"""Errors that concern all ranks of a run are raised on all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from megatron_speech.environment import host_name
from megatron_speech.errors import InputError


class AllRanksError(InputError):
    """An InputError that every rank has raised; the main process reports it for all."""


@contextlib.contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Make an InputError of any rank an AllRanksError of all ranks, so that none waits for one that has gone.

    What runs inside must hold no collective that only some ranks reach.
    """
    import torch.distributed as dist

    problem: InputError | None = None
    try:
        yield
    except InputError as error:
        problem = error
    messages: list[tuple[str | None, str]] = [(str(problem) if problem else None, host_name())]
    if dist.is_initialized() and dist.get_world_size() > 1:
        (mine,), messages = messages, [(None, "")] * dist.get_world_size()
        dist.all_gather_object(messages, mine)
    for rank, (message, host) in enumerate(messages):
        if message:
            everywhere = all(text == message for text, _ in messages)
            raise AllRanksError(message if everywhere else f"rank {rank} on {host}: {message}") from problem
