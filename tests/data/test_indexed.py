"""The indexed format: bit-compatible with megatron-core's, whole or not at all, and damage is told by name."""

from __future__ import annotations

import argparse
import json
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_speech.commands import inspect as inspect_command
from megatron_speech.data.dataset.documents_table import ROWS_PER_GROUP, SCHEMA, DocumentsTableWriter
from megatron_speech.data.dataset.indexed import TokenDataset, file_of
from megatron_speech.data.dataset.indexed_writer import disk_dtype, ids_on_disk, write_index
from megatron_speech.data.dataset.verify import verify_dataset
from megatron_speech.errors import InputError
from megatron_speech.files import canonical_json, sha256_hex
from megatron_speech.preprocess import preprocess_data
from megatron_speech.tokens.space import CodecDescription, TokenSpace

DOCUMENTS = st.lists(st.lists(st.integers(0, 65_499), max_size=7), min_size=1, max_size=12)


def write_pair(prefix: Path, documents: list[list[int]], dtype: type) -> None:
    """P.bin and P.idx alone, by the functions that write every dataset's."""
    flat = np.array([i for document in documents for i in document], dtype=np.int64)
    lengths = np.array([len(document) for document in documents], dtype=np.int32)
    file_of(prefix, ".bin").write_bytes(ids_on_disk(flat, lengths, disk_dtype(dtype)))
    with open(file_of(prefix, ".idx"), "wb") as handle:
        write_index(handle.write, disk_dtype(dtype), lengths)


@settings(max_examples=40, deadline=None)
@given(documents=DOCUMENTS, dtype=st.sampled_from([np.uint16, np.int32]))
def test_upstream_opens_what_is_written_here(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], dtype: type
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    documents = [*documents, [1]]  # upstream cannot map an empty .bin
    prefix = tmp_path_factory.mktemp("indexed") / "p.q"
    write_pair(prefix, documents, dtype)
    upstream = IndexedDataset(str(prefix))  # kept alive: its end unmaps what it returned
    assert len(upstream) == len(documents)
    assert upstream.index.dtype == dtype
    assert [upstream[i].tolist() for i in range(len(documents))] == documents
    assert upstream.document_indices.tolist() == list(range(len(documents) + 1))


@settings(max_examples=40, deadline=None)
@given(documents=DOCUMENTS, dtype=st.sampled_from([np.uint16, np.int32]))
def test_same_bytes_as_upstream_builder(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], dtype: type
) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    folder = tmp_path_factory.mktemp("indexed")
    builder = IndexedDatasetBuilder(str(folder / "theirs.bin"), dtype=dtype)
    for document in documents:
        builder.add_document(torch.tensor(document, dtype=torch.int64), [len(document)])
    builder.finalize(str(folder / "theirs.idx"))
    write_pair(folder / "ours", documents, dtype)
    for suffix in (".bin", ".idx"):
        assert file_of(folder / "ours", suffix).read_bytes() == file_of(folder / "theirs", suffix).read_bytes()


@settings(max_examples=40, deadline=None)
@given(documents=st.lists(st.lists(st.lists(st.integers(0, 99), max_size=4), max_size=3), max_size=6))
def test_upstream_documents_of_several_sequences_open_only_when_allowed(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[list[int]]]
) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = tmp_path_factory.mktemp("indexed") / "p"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    whole = [[i for sequence in document for i in sequence] for document in documents]
    for document, ids in zip(documents, whole, strict=True):
        builder.add_document(torch.tensor(ids, dtype=torch.int64), [len(sequence) for sequence in document])
    builder.finalize(f"{prefix}.idx")
    with pytest.raises(InputError, match=r"p\.manifest\.json does not exist"):
        TokenDataset(prefix)
    dataset = TokenDataset(prefix, require_manifest=False)
    assert dataset.manifest is None
    assert [dataset.document(i).tolist() for i in range(len(dataset))] == whole
    assert dataset.total_tokens == len(dataset.tokens) == sum(map(len, whole))
    verify_dataset(dataset.prefix, require_manifest=dataset.manifest is not None).require()


def test_ids_that_do_not_fit_are_refused() -> None:
    for ids in ([65_536], [-1]):
        with pytest.raises(ValueError, match="do not fit uint16"):
            ids_on_disk(np.array(ids), np.array([1]), disk_dtype(np.uint16))
    with pytest.raises(ValueError, match="do not cut"):
        ids_on_disk(np.arange(3), np.array([1, 1]), disk_dtype(np.uint16))
    with pytest.raises(InputError, match="dtype uint32 cannot be stored"):
        disk_dtype(np.uint32)


def test_row_groups_do_not_depend_on_how_rows_arrive(tmp_path: Path) -> None:
    import pyarrow as pa

    rows = ROWS_PER_GROUP + 10
    columns = {name: [None] * rows for name in SCHEMA.names}
    columns["sample_id"] = [f"s{i % 977}" for i in range(rows)]
    columns["tokens"] = list(range(rows))
    batch = pa.record_batch([pa.array(columns[field.name], field.type) for field in SCHEMA], schema=SCHEMA)
    for name, step in (("whole", rows), ("pieces", 9973)):
        writer = DocumentsTableWriter(tmp_path / name)
        for start in range(0, rows, step):
            writer.add(batch.slice(start, step))
        writer.close()
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "pieces").read_bytes()
    metadata = pq.ParquetFile(tmp_path / "whole").metadata
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [ROWS_PER_GROUP, 10]


# ---- a whole dataset, and what can be wrong with one


def make_space(codec_hash: str = "c" * 64, size: int = 300) -> TokenSpace:
    return TokenSpace.build("bytes", CodecDescription("toy", codec_hash, 8000, 25.0, ("codes",), (size,)))


@pytest.fixture
def dataset_prefix(tmp_path: Path) -> Path:
    """A dataset of ten pairs, and its token space ts.json beside it."""
    make_space().save(tmp_path / "ts.json")
    with open(tmp_path / "samples.jsonl", "w") as handle:
        for i in range(10):
            row = {
                "transcript": f"number {i}",
                "language": "en",
                "codes": list(range(i, 3 * i + 5)),
                "speaker_id": i % 2,
            }
            handle.write(json.dumps(row) + "\n")
    prefix = tmp_path / "data.v1"  # a dot in the prefix is no suffix
    files = [
        "--input",
        f"{tmp_path}/samples.jsonl",
        "--token-space",
        f"{tmp_path}/ts.json",
        "--output-prefix",
        str(prefix),
    ]
    assert preprocess_data.main(["--task", "tts", "--workers", "1", *files]) == 0
    return prefix


def test_documents_offsets_and_columns_agree(dataset_prefix: Path) -> None:
    dataset = TokenDataset(dataset_prefix)
    space = TokenSpace.load(dataset_prefix.parent / "ts.json")
    dataset.check(space)
    verify_dataset(dataset.prefix, require_manifest=dataset.manifest is not None).require()
    assert len(dataset) == 10 and dataset.tokens.dtype == np.uint16
    for i in range(len(dataset)):
        whole = dataset.document(i)
        start = dataset.offsets[i]
        assert np.array_equal(whole, dataset.tokens[start : start + dataset.lengths[i]])
        assert np.array_equal(dataset.document(i, 2, 3), whole[2:5])
        assert whole[0] == space.special("<bos>") and whole[-1] == space.special("<speech_end>")
    assert np.array_equal(pickle.loads(pickle.dumps(dataset)).tokens, dataset.tokens)
    assert len(pickle.dumps(dataset)) < 1000  # the files are opened again, not sent
    for bad in ((10,), (-1,), (0, 0, 10_000), (0, -1)):
        with pytest.raises(IndexError):
            dataset.document(*bad)
    table = dataset.columns("tokens", "code_len")
    assert table.column_names == ["tokens", "code_len"]
    assert table["code_len"].to_pylist() == [2 * i + 5 for i in range(10)]
    with pytest.raises(InputError, match="column mood is missing"):
        dataset.columns("mood")


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as handle:
        handle.seek(offset)
        handle.write(data)


def cut(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:-count])


def edit_manifest(prefix: Path, signed: bool = True, **changes: object) -> None:
    """Change fields of the manifest; `signed`: and its hash, as another writer would."""
    path = file_of(prefix, ".manifest.json")
    value = {**json.loads(path.read_text()), **changes}
    if signed:
        del value["sha256"]
        value["sha256"] = sha256_hex(canonical_json(value))
    path.write_text(json.dumps(value))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated .bin": (lambda p: cut(file_of(p, ".bin"), 2), r"data\.v1\.bin: holds .* needed .*truncated"),
    "longer .bin": (lambda p: file_of(p, ".bin").open("ab").write(b"xx"), r"data\.v1\.bin: holds .* longer"),
    "truncated .idx": (lambda p: cut(file_of(p, ".idx"), 8), r"data\.v1\.idx: holds .* needed .*truncated"),
    "a stump of an .idx": (
        lambda p: file_of(p, ".idx").write_bytes(b"MMIDIDX\0\0"),
        r"\.idx: holds 9 bytes, needed a header",
    ),
    "empty .idx": (lambda p: file_of(p, ".idx").write_bytes(b""), r"\.idx: magic is b''"),
    "wrong magic": (
        lambda p: overwrite(file_of(p, ".idx"), 0, b"TNTIDX"),
        r"\.idx: magic is b'TNTIDX.*needed b'MMIDIDX",
    ),
    "wrong version": (
        lambda p: overwrite(file_of(p, ".idx"), 9, struct.pack("<Q", 2)),
        r"\.idx: version is 2, needed 1",
    ),
    "unknown dtype": (lambda p: overwrite(file_of(p, ".idx"), 17, b"\x09"), r"\.idx: dtype code is 9, needed one of 1"),
    "another dtype": (lambda p: overwrite(file_of(p, ".idx"), 17, b"\x04"), r"\.bin: holds .*, needed|dtype is int32"),
    "no .bin": (lambda p: file_of(p, ".bin").unlink(), r"data\.v1\.bin does not exist"),
    "no .idx": (lambda p: file_of(p, ".idx").unlink(), r"data\.v1\.idx does not exist"),
    "no table": (lambda p: file_of(p, ".docs.parquet").unlink(), r"docs\.parquet does not exist"),
    "truncated table": (lambda p: cut(file_of(p, ".docs.parquet"), 3), r"docs\.parquet: holds .* needed"),
    "no manifest": (lambda p: file_of(p, ".manifest.json").unlink(), r"manifest\.json does not exist"),
    "manifest not JSON": (lambda p: file_of(p, ".manifest.json").write_text("{"), r"manifest\.json is not valid JSON"),
    "manifest of another format": (
        lambda p: edit_manifest(p, format_version=9),
        r"format_version is 9, this version reads 2",
    ),
    "manifest of another dataset": (lambda p: edit_manifest(p, documents=9), r"documents is 10, but .* says 9"),
    "manifest edited by hand": (
        lambda p: edit_manifest(p, signed=False, split_seed=1),
        r"manifest\.json: its fields have SHA-256 .* needed .*edited or damaged",
    ),
    "manifest of fewer than no documents": (lambda p: edit_manifest(p, documents=-1), r"field documents: .*equal to 0"),
    "manifest with a number that is none": (
        lambda p: edit_manifest(p, signed=False, totals={"seconds": float("nan")}),
        r"field totals.seconds: .*finite",
    ),
    "manifest that names no table": (
        lambda p: edit_manifest(p, files={"bin": {"bytes": 1, "sha256": "0" * 64}}),
        r"manifest\.json: field files names no \.bin",
    ),
    "manifest with half a hash": (
        lambda p: edit_manifest(p, files={".bin": {"bytes": 1, "sha256": "00"}}),
        r"field files\.\.bin\.sha256",
    ),
    "manifest without a field": (lambda p: edit_manifest(p, totals=None), r"field totals: "),
    "manifest with a bad field": (lambda p: edit_manifest(p, tokens="many"), r"field tokens: "),
    "manifest with an unknown field": (lambda p: edit_manifest(p, mood=1), r"field mood: "),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused_on_opening(dataset_prefix: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    damage(dataset_prefix)
    with pytest.raises(InputError, match=message):
        TokenDataset(dataset_prefix)


HIDDEN_DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped id": (lambda p: overwrite(file_of(p, ".bin"), 40, b"\xff"), r"data\.v1\.bin: SHA-256 is"),
    "a moved pointer": (
        lambda p: overwrite(file_of(p, ".idx"), 34 + 40 + 8, b"\x02"),
        r"\.idx: byte offset of document 1 does not follow",
    ),
    "a moved boundary": (
        lambda p: overwrite(file_of(p, ".idx"), 34 + 120 + 16, b"\x07"),
        r"\.idx: first sequence of document 2",
    ),
    "a changed table": (
        lambda p: overwrite(file_of(p, ".docs.parquet"), 60, b"\xff\xfe"),
        r"docs\.parquet: SHA-256 is",
    ),
    "an edited total": (
        lambda p: edit_manifest(p, totals={**TokenDataset(p).manifest.totals.model_dump(), "tokens": 5}),
        r"manifest\.json: tokens is 5, but the documents table adds up to",
    ),
}


@pytest.mark.parametrize("name", HIDDEN_DAMAGES)
def test_verify_finds_what_opening_cannot_see(dataset_prefix: Path, name: str) -> None:
    damage, message = HIDDEN_DAMAGES[name]
    damage(dataset_prefix)
    with pytest.raises(InputError, match=message):
        verify_dataset(dataset_prefix).require()


def test_another_token_space_or_codec_is_refused(dataset_prefix: Path) -> None:
    dataset = TokenDataset(dataset_prefix)
    with pytest.raises(InputError, match=f"codec hash is {'c' * 64} .* needed {'d' * 64}"):
        dataset.check(make_space("d" * 64))
    with pytest.raises(InputError, match=r"token_space_hash is .*, needed"):
        dataset.check(make_space(size=301))
    with pytest.raises(InputError, match=r"does not exist .*name the prefix"):
        TokenDataset(dataset_prefix.parent / "nothing")


# ---- inspect


def inspect(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    inspect_command.add_arguments(parser)
    return inspect_command.run(parser.parse_args([str(argument) for argument in arguments]))


def test_inspect_tells_what_a_dataset_is(dataset_prefix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    space = dataset_prefix.parent / "ts.json"
    capsys.readouterr()
    assert inspect(dataset_prefix, "--verify", "--sample", 2, "--token-space", space) == 0
    text = capsys.readouterr().out
    for part in ("10 tts documents", "language en", "source samples", "median", "<target_text> number", "verified"):
        assert part in text
    assert inspect(dataset_prefix, "--json", "--sample", 3, "--token-space", space) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["manifest"]["documents"] == 10 and value["schema"]["tokens"] == "int32"
    assert len(value["samples"]) == 3
    assert sum(entry["documents"] for entry in value["histogram_tokens"]) == 10
    assert value["quantiles"]["tokens"]["1"] == max(TokenDataset(dataset_prefix).lengths)


def test_inspect_needs_the_token_space_for_samples(dataset_prefix: Path) -> None:
    with pytest.raises(InputError, match=r"--sample .* needed --token-space"):
        inspect(dataset_prefix, "--sample", 1)
    make_space("d" * 64).save(dataset_prefix.parent / "other.json")
    with pytest.raises(InputError, match="codec hash"):
        inspect(dataset_prefix, "--token-space", dataset_prefix.parent / "other.json")


def test_inspect_verify_exits_2_on_a_damaged_dataset(dataset_prefix: Path) -> None:
    overwrite(file_of(dataset_prefix, ".bin"), 40, b"\xff")
    code = (
        "import argparse, sys\n"
        "from megatron_speech.commands import inspect as inspect_command\n"
        "from megatron_speech.errors import command\n"
        "parser = argparse.ArgumentParser(); inspect_command.add_arguments(parser)\n"
        "sys.exit(command(inspect_command.run)(parser.parse_args()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(dataset_prefix), "--verify"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "data.v1.bin: SHA-256" in done.stderr
    assert "Traceback" not in done.stderr
