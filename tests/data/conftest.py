"""Small datasets made of random ids, written by the project's own writer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from megatron_speech.data.dataset.dataset_writer import DatasetWriter
from megatron_speech.data.dataset.documents_table import SCHEMA, derive_columns
from megatron_speech.data.dataset.indexed import TokenDataset
from megatron_speech.data.dataset.manifest import CodecEntry, FilterStatistics, Manifest, Totals
from megatron_speech.data.dataset.staging import release
from megatron_speech.tokens.space import CodecDescription, TokenSpace
from megatron_speech.tokens.templates import TEMPLATE_HASH, compile_document, count_target_tokens


@dataclass(frozen=True)
class Document:
    """A document to be made: `codes` frames and `text` bytes of random content."""

    codes: int = 0
    text: int = 0
    language: str = "en"
    source: str = "toy"
    source_id: str = ""
    columns: dict[str, object] = field(default_factory=dict)  # further columns of the documents table


@pytest.fixture
def no_entry_held() -> Iterator[None]:
    """Staged datasets are let go after the test, which this process would hold until it ends."""
    yield
    release()


@pytest.fixture(scope="session")
def toy_space() -> TokenSpace:
    codec = CodecDescription("toy", "c" * 64, 8000, 25.0, ("codes",), (32,))
    return TokenSpace.build("bytes", codec)


def write_dataset(
    prefix: Path, space: TokenSpace, task: str, documents: Sequence[Document], seed: int = 0, **manifest: object
) -> TokenDataset:
    """Write `documents` as a dataset of `task`; `manifest` overrides fields of the manifest."""
    random = np.random.default_rng(seed)
    ids, rows = [], []
    for number, wanted in enumerate(documents):
        fields = {}
        if task != "speech_lm":
            fields["text_ids"] = random.integers(97, 123, wanted.text).astype(np.int32)
        if task != "text_lm":
            fields["code_ids"] = space.encode_codes(random.integers(0, 32, (wanted.codes, 1)))
        tokens = compile_document(space, task, **fields)
        ids.append(tokens)
        row = dict.fromkeys(SCHEMA.names)
        row |= {
            "sample_id": f"sample-{number}",
            "source_id": wanted.source_id or f"recording-{number}",
            "language": wanted.language,
            "dataset_source": wanted.source,
            "task": task,
            "tokens": len(tokens),
            "target_tokens": count_target_tokens(space, tokens),
            "duration_seconds": wanted.codes / 25.0,
        } | wanted.columns
        rows.append(row)
    entry = {
        "task": task,
        "dtype": np.dtype(space.dtype).name,
        "documents": 0,
        "tokens": 0,
        "token_space_hash": space.hash,
        "template_hash": TEMPLATE_HASH,
        "codec": CodecEntry(name="toy", hash=space.codec.hash, frame_rate_hz=25.0, codebooks=1),
        "tokenizer_version": "1",
        "normalization_version": "1",
        "split_seed": 0,
        "seed": 0,
        "totals": Totals(),
        "languages": {},
        "sources": {},
        "filters": FilterStatistics(),
        "inputs": [],
        "files": {},
    }
    with DatasetWriter(prefix, space.dtype) as writer:
        flat = np.concatenate([*ids, np.zeros(0, np.int32)])
        lengths = np.array([len(tokens) for tokens in ids], dtype=np.int32)
        flat = flat.astype(space.dtype)
        writer.add(flat, lengths, derive_columns(pa.RecordBatch.from_pylist(rows, schema=SCHEMA), flat, lengths))
        writer.finish(Manifest(**{**entry, **manifest}))
    return TokenDataset(prefix)


@pytest.fixture(scope="session")
def make_dataset() -> Callable[..., TokenDataset]:
    return write_dataset


@pytest.fixture(scope="session")
def document() -> type[Document]:
    return Document
