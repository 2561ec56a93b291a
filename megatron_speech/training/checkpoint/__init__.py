"""Checkpoints: written whole or not at all, beside the training; checked on open, readable under any parallel layout.

store: names, descriptions, links, damage. contents: what is saved of a process. writing: from the model to the disk,
in two halves. save: the two halves at once, or the second beside the training. retention: which ones stay. run: all of
it, as a run's recipe configures it. load: into a run, or for inference. resume: what may change when a run continues.
"""

from megatron_speech.training.checkpoint.load import (
    load_checkpoint,
    load_for_inference,
    load_moments,
    load_weights,
    open_checkpoint,
)
from megatron_speech.training.checkpoint.resume import check_resumable, log_resume
from megatron_speech.training.checkpoint.retention import promote_best, prune
from megatron_speech.training.checkpoint.run import RunCheckpoints, newest_checkpoint
from megatron_speech.training.checkpoint.save import save_checkpoint, save_weights
from megatron_speech.training.checkpoint.store import (
    FORMAT_VERSION,
    CheckpointInfo,
    checkpoint_name,
    clean_leftovers,
    find_latest,
    list_checkpoints,
    read_info,
)

__all__ = [
    "FORMAT_VERSION", "CheckpointInfo", "RunCheckpoints", "check_resumable", "checkpoint_name", "clean_leftovers",
    "find_latest", "list_checkpoints", "load_checkpoint", "load_for_inference", "load_moments", "load_weights",
    "newest_checkpoint", "open_checkpoint", "promote_best", "prune", "read_info", "save_checkpoint", "save_weights",
    "log_resume",
]  # fmt: skip
