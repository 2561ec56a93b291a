"""What gives the training step its global batches.

A stage's data is one source; whatever makes batches while it trains (rollouts of the model, say) can be another.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from megatron_speech.data.loading.loader import GlobalBatch
from megatron_speech.data.stage import StageData
from megatron_speech.recipe.stage import StageConfig
from megatron_speech.training.telemetry.metrics import Group


class BatchSource(Protocol):
    """Global batches of one stage, as this data-parallel rank sees them."""

    @property
    def groups(self) -> Sequence[Group]:
        """(task, language, source) of each document group that `group_ids` of the batches number."""
        ...

    @property
    def reach(self) -> float:
        """Tokens that attention sees, on average over tokens: for the count of FLOPs."""
        ...

    def speakers(self, step: int) -> int | None:
        """How many speakers are in the global batch of the `step`-th step of the stage, from 1; None: not known."""
        ...

    def batches(self, taken: int) -> AbstractContextManager[Iterator[GlobalBatch]]:
        """This rank's share of every global batch after `taken` steps of the stage, in order.

        Batch k is a function of the run and k alone, so that a run that is continued goes on with the same ones.
        """
        ...


class StageBatches:
    """The batches of a stage's datasets, also while their size grows (`batch_ramp`).

    Args:
        stage, data: the stage and its sequences.
        dp_rank, dp_size: of this data-parallel rank.
    """

    def __init__(self, stage: StageConfig, data: StageData, dp_rank: int, dp_size: int) -> None:
        self._stage, self._data = stage, data
        self._dp_rank, self._dp_size = dp_rank, dp_size

    @property
    def groups(self) -> Sequence[Group]:
        """Of the data."""
        return self._data.groups

    @property
    def reach(self) -> float:
        """Of the data."""
        return self._data.reach

    def speakers(self, step: int) -> int | None:
        """Of the data."""
        return self._data.speakers(self._stage.sequences_after(step - 1), self._stage.sequences_after(step))

    @contextlib.contextmanager
    def batches(self, taken: int) -> Iterator[Iterator[GlobalBatch]]:
        """See :meth:`BatchSource.batches`."""
        with contextlib.closing(self._after(taken)) as batches:
            yield batches

    def _after(self, taken: int) -> Generator[GlobalBatch, None, None]:
        stage = self._stage
        while taken < stage.steps:
            sequences, until = stage.batch_at(taken)
            first = stage.sequences_after(taken)
            with self._data.loader(first, stage.micro_batch_size, sequences, self._dp_rank, self._dp_size) as batches:
                yield from itertools.islice(batches, until - taken)
            taken = until
