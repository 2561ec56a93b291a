"""Who speaks in each document of a dataset: a hash, read once from the documents table and kept beside the indices."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa

from megatron_speech.data.dataset.documents_table import document_batches
from megatron_speech.data.dataset.indexed import TokenDataset, file_of
from megatron_speech.data.dataset.split import name_hash, splitmix64
from megatron_speech.files import atomic_write

NOBODY = 0  # the document names no speaker


def speaker_hashes(dataset: TokenDataset, key: str, folder: Path) -> np.ndarray:
    """A 32-bit hash of the speaker of every document, uint32 [D], mapped from `folder`; `NOBODY` where there is none.

    A speaker's name means something within its source alone. Two speakers share a hash once in four thousand million.

    Args:
        dataset: opened.
        key: hash of its manifest; names the file.
        folder: where it is kept, made the first time. Other processes may make the same file at the same time.
    """
    path = folder / f"speakers-{key[:32]}.npy"
    if not path.exists():
        found = np.empty(len(dataset), dtype=np.uint32)
        begin = 0
        columns = ("speaker_id", "dataset_source")
        for batch in document_batches(file_of(dataset.prefix, ".docs.parquet"), columns, len(dataset)):
            speakers, sources = (batch[name].cast(pa.large_string()) for name in columns)
            hashes = splitmix64(name_hash(speakers) ^ splitmix64(name_hash(sources))).astype(np.uint32)
            named = speakers.is_valid().to_numpy(zero_copy_only=False)
            found[begin : begin + len(hashes)] = np.where(named, np.maximum(hashes, 1), NOBODY)
            begin += len(hashes)
        os.makedirs(folder, exist_ok=True)
        with atomic_write(path) as handle:
            np.save(handle, found)
    mapped: np.ndarray = np.load(path, mmap_mode="r")
    return mapped
