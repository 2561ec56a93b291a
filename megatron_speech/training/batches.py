"""The global batches of a stage from where the run stands, also while their size grows."""

from __future__ import annotations

import itertools
from collections.abc import Generator

from megatron_speech.data.loading.loader import GlobalBatch
from megatron_speech.data.stage import StageData
from megatron_speech.recipe.stage import StageConfig


def stage_batches(
    stage: StageConfig, data: StageData, taken: int, dp_rank: int, dp_size: int
) -> Generator[GlobalBatch, None, None]:
    """This rank's share of every global batch after `taken` steps of the stage; to be closed."""
    while taken < stage.steps:
        sequences, until = stage.batch_at(taken)
        first = stage.sequences_after(taken)
        with data.loader(first, stage.micro_batch_size, sequences, dp_rank, dp_size) as batches:
            yield from itertools.islice(batches, until - taken)
        taken = until
