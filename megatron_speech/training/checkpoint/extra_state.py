"""What Transformer Engine keeps beside its weights, and a checkpoint of another back-end lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject, ShardedStateDict


def only_saved_extra_state(contents: ShardedStateDict, chunks: list[Any], path: Path) -> ShardedStateDict:
    """`contents` to load from the checkpoint at `path`, without the `_extra_state` that is not there.

    Transformer Engine's modules (norms too) keep FP8's scales as `_extra_state`; those of the torch back-end have
    none, or an empty one. What is absent is loaded as None, which leaves a module as it was built.
    """
    if not any(chunk.fused_attention for chunk in chunks):
        return contents
    saved = serialization.load_sharded_metadata(str(path))

    def checked(value: Any) -> Any:
        if isinstance(value, ShardedObject) and value.key.endswith("_extra_state") and value.unique_key not in saved:
            return LocalNonpersistentObject(None)
        return value

    return {
        name: {key: checked(value) for key, value in part.items()} if name.startswith("model") else part
        for name, part in contents.items()
    }
