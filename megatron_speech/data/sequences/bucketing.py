"""Length buckets: rectangular batches of whole documents of about the same target length.

The alternative to packing for models or kernels that want rectangles. A batch is n documents with
n × (longest of them) <= max_tokens; the loader lays each of them at a multiple of that longest length inside one
row, so that the shapes of a micro-batch stay [B, S] (`loader.RowSource`).

Documents are grouped by their *target* length, never by that of their prompt: prompts of one length are prompts of
one speaker or one reference, and such batches would cluster speakers.
"""

from __future__ import annotations

import numpy as np

from megatron_speech.data.dataset.split import splitmix64
from megatron_speech.data.sequences.packing_kernels import PackedSegments, _checked, pack_windows
from megatron_speech.errors import InputError
from megatron_speech.ops.extension import extension

_MAX_WINDOW = 2**30


def pack_bucket(
    lengths: np.ndarray, targets: np.ndarray, *, max_tokens: int, window: int
) -> tuple[PackedSegments, np.ndarray]:
    """Group whole documents of similar target length into batches of at most `max_tokens` padded tokens.

    A window is the next run of documents with at most `window * max_tokens` tokens. Its documents are taken by
    ascending target length (of equals the earlier first) and a batch is closed when one more document would make
    n × longest exceed `max_tokens`. The batches of a window come out shuffled by a hash of the place of their
    first document in the window, so their order says nothing about length; every window is through before the next
    begins, and what comes out of it depends on its documents alone.

    Args:
        lengths: int32 [N], tokens of each document in the order of training; documents of length 0 are skipped.
        targets: int32 [N], target tokens of each document, what documents are grouped by.
        max_tokens: of a batch, padding to its longest document included.
        window: the look-ahead, in batches' worth of tokens, at least 1.

    Returns:
        The batches as sequences of segments (each a whole document, start 0; inside a batch by ascending target
        length), and the positions, int64 [M], of the documents that are longer than `max_tokens` and lie in no
        batch: the caller has to refuse or report them.

    Raises:
        InputError: a negative length or target, another number of targets than lengths, a max_tokens outside
            1..2^24, or a window outside 1..2^30.
    """
    if not 1 <= window <= _MAX_WINDOW:
        raise InputError(f"window is {window}; it must lie between 1 and {_MAX_WINDOW} batches")
    lengths, targets = _checked(lengths, max_tokens), _checked(targets, max_tokens)
    if len(lengths) != len(targets):
        raise InputError(f"{len(lengths)} document lengths but {len(targets)} target lengths; one of each is needed")
    compiled = extension()
    if compiled is not None:
        *segments, oversize = compiled.pack_bucket(lengths, targets, max_tokens, window)
        return PackedSegments(*segments), oversize
    return _pack_bucket_python(lengths, targets, max_tokens, window)


def _pack_bucket_python(
    lengths: np.ndarray, targets: np.ndarray, max_tokens: int, window: int
) -> tuple[PackedSegments, np.ndarray]:
    def pack(documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        members = documents[np.argsort(targets[documents], kind="stable")]
        first = _batches(lengths[members].tolist(), max_tokens)
        batches = np.split(members, first[1:])
        order = np.argsort(splitmix64((members[first] - documents[0]).astype(np.uint64)), kind="stable")
        return np.concatenate([batches[k] for k in order.tolist()]), np.diff([*first, len(members)])[order]

    return pack_windows(lengths, max_tokens, window, pack)


def _batches(lengths: list[int], max_tokens: int) -> list[int]:
    """Where each batch begins in a run of documents that fit."""
    first = [0]
    longest = 0
    for k, length in enumerate(lengths):
        longest = max(longest, length)
        if (k - first[-1] + 1) * longest > max_tokens:
            first.append(k)
            longest = length
    return first
