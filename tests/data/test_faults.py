"""Damage to a dataset's files: no flipped bit and no cut goes unseen, and what is damaged is named."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_speech.commands import inspect as inspect_command
from megatron_speech.data.dataset.indexed import TokenDataset, file_of
from megatron_speech.data.dataset.verify import verify_dataset
from megatron_speech.errors import InputError
from megatron_speech.preprocess import merge_datasets, preprocess_data
from megatron_speech.tokens.space import CodecDescription, TokenSpace

SUFFIXES = (".bin", ".idx", ".docs.parquet", ".manifest.json", ".rejected.jsonl")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 30 pairs in two languages, with two rejected rows; never changed."""
    folder = tmp_path_factory.mktemp("faults")
    TokenSpace.build("bytes", CodecDescription("toy", "c" * 64, 8000, 25.0, ("codes",), (300,))).save(
        folder / "ts.json"
    )
    rows: list[Any] = [
        {
            "sample_id": f"s{i}",
            "transcript": f"number {i}",
            "language": ("en", "hi")[i % 2],
            "dataset_source": ("a", "b", "c")[i % 3],
            "codes": [(7 * i + k) % 300 for k in range(5 + i)],
        }
        for i in range(30)
    ]
    lines = [*map(json.dumps, rows), "{", "["]
    (folder / "samples.jsonl").write_text("\n".join(lines))
    files = ["--input", f"{folder}/samples.jsonl", "--token-space", f"{folder}/ts.json", "--max-rejected", "0.5"]
    arguments = ["--task", "tts", *files, "--workers", "1", "--output-prefix", f"{folder}/data"]
    assert preprocess_data.main(arguments) == 0
    assert verify_dataset(folder / "data").findings == []
    return folder / "data"


@pytest.fixture
def prefix(whole: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return copy(whole, tmp_path)


def copy(whole: Path, folder: Path) -> Path:
    for suffix in SUFFIXES:
        shutil.copy(file_of(whole, suffix), folder)
    return folder / whole.name


def flip(path: Path, position: int, mask: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= mask
    path.write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=60, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_of_any_file_is_found(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, suffix: str, place: float, bit: int
) -> None:
    prefix = copy(whole, tmp_path_factory.mktemp("flip"))
    path = file_of(prefix, suffix)
    flip(path, int(place * path.stat().st_size), 1 << bit)
    found = {finding.file for finding in verify_dataset(prefix).findings}
    assert str(path) in found
    shutil.rmtree(prefix.parent)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=40, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True))
def test_any_cut_of_any_file_is_found_and_refused_on_opening(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, suffix: str, place: float
) -> None:
    prefix = copy(whole, tmp_path_factory.mktemp("cut"))
    path = file_of(prefix, suffix)
    kept = int(place * path.stat().st_size)
    path.write_bytes(path.read_bytes()[:kept])
    assert str(path) in {finding.file for finding in verify_dataset(prefix).findings}
    # Without its last line break a manifest still says all there is to say; nothing that trains reads rejected rows.
    if suffix != ".rejected.jsonl" and not (
        suffix == ".manifest.json" and kept == file_of(whole, suffix).stat().st_size - 1
    ):
        with pytest.raises(InputError, match=r"data(\.bin|\.idx|\.docs\.parquet|\.manifest\.json)"):
            TokenDataset(prefix)
    shutil.rmtree(prefix.parent)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_is_gone_is_found(prefix: Path, suffix: str) -> None:
    file_of(prefix, suffix).unlink()
    assert str(file_of(prefix, suffix)) in {finding.file for finding in verify_dataset(prefix).findings}


def test_damaged_documents_are_named(prefix: Path) -> None:
    dataset = TokenDataset(prefix)
    for document in (3, 4, 29):
        flip(file_of(prefix, ".bin"), int(dataset.pointers[document]) + 2)
    found = verify_dataset(prefix)
    assert [(entry["document"], entry["sample_id"]) for entry in found.damaged] == [(3, "s3"), (4, "s4"), (29, "s29")]
    assert found.damaged_documents == 3
    with pytest.raises(InputError, match=r"3 of 30 documents are not those .*: 3 \(s3\), 4 \(s4\), 29 \(s29\)"):
        found.require()


def test_documents_behind_a_cut_are_named_and_counted(prefix: Path) -> None:
    dataset = TokenDataset(prefix)
    path = file_of(prefix, ".bin")
    path.write_bytes(path.read_bytes()[: int(dataset.pointers[15]) + 1])
    found = verify_dataset(prefix)
    assert found.damaged_documents == 15 and found.damaged[0] == {"document": 15, "sample_id": "s15"}
    assert len(found.damaged) == 10  # named; the others are counted


def test_all_that_disagrees_is_listed_not_the_first(prefix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(file_of(prefix, ".bin"), 10)
    flip(file_of(prefix, ".idx"), 34 + 4 * 30 + 8 * 5)
    flip(file_of(prefix, ".rejected.jsonl"), 5)
    parser = argparse.ArgumentParser()
    inspect_command.add_arguments(parser)
    with pytest.raises(InputError, match="is damaged: 5 findings") as error:
        inspect_command.run(parser.parse_args([str(prefix), "--verify"]))
    assert "\n" not in str(error.value)
    text = capsys.readouterr().out
    for part in ("data.bin: SHA-256", "1 of 30 documents", "byte offset of document 5 does", "data.idx: SHA-256"):
        assert part in text
    assert "data.rejected.jsonl: SHA-256" in text
    with pytest.raises(InputError):
        inspect_command.run(parser.parse_args([str(prefix), "--verify", "--json"]))
    value = json.loads(capsys.readouterr().out)
    assert value["verified"] is False and len(value["findings"]) == 5
    assert value["damaged"] == [{"document": 0, "sample_id": "s0"}]


def resign(prefix: Path, change: Any) -> None:
    """Change the manifest as a writer that errs would: its own hash is right."""
    from megatron_speech.data.dataset.manifest import read_manifest, write_manifest

    path = file_of(prefix, ".manifest.json")
    manifest = read_manifest(path)
    change(manifest)
    write_manifest(path, manifest)


LIES: dict[str, tuple[Any, str]] = {
    "a language's tokens": (
        lambda m: setattr(m.languages["hi"], "tokens", 1),
        "tokens is 1, but the language hi of the documents table adds up to",
    ),
    "a source's frames": (
        lambda m: setattr(m.sources["b"], "frames", 1),
        "frames is 1, but the source b of the documents table adds up to",
    ),
    "a language that is not there": (
        lambda m: m.languages.update(xx=m.languages["hi"].model_copy()),
        "the language xx of the documents table adds up to 0",
    ),
    "seconds": (lambda m: setattr(m.totals, "seconds", 1.0), "seconds is 1.0, but the documents table adds up to"),
    "characters": (
        lambda m: setattr(m.totals, "characters", 7),
        "characters is 7, but the sum of languages adds up to",
    ),
    "rows": (lambda m: setattr(m.filters, "rows", 40), "filters.rows is 40, but 30 were kept and 2 dropped"),
    "a rule": (
        lambda m: m.filters.dropped.update(bad_json=1, no_tokens=1),
        "holds 0 rows of rule no_tokens, but the manifest says 1",
    ),
    "forms": (lambda m: m.forms.update(plain=29), "forms add up to 29, needed 30"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_manifest_that_does_not_add_up_is_found(prefix: Path, name: str) -> None:
    change, message = LIES[name]
    resign(prefix, change)
    assert message in "; ".join(finding.problem for finding in verify_dataset(prefix).findings)


def test_ids_outside_the_token_space_are_counted(prefix: Path, whole: Path) -> None:
    space = TokenSpace.load(whole.parent / "ts.json")
    path = file_of(prefix, ".bin")
    ids = np.fromfile(path, np.uint16)
    ids[[7, 9]] = space.size
    ids.tofile(path)
    problems = [finding.problem for finding in verify_dataset(prefix, space).findings]
    assert f"2 ids are outside the token space (0 to {space.size - 1})" in problems


# ---- documents of extreme length


def test_documents_of_no_and_of_a_million_tokens_are_written_opened_merged_and_verified(
    tmp_path: Path, make_dataset: Any, toy_space: TokenSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One million ids in a document are more than verify reads at a time; none at all are no document to skip."""
    import pyarrow as pa

    from megatron_speech.data.dataset import verify
    from megatron_speech.data.dataset.dataset_writer import DatasetWriter
    from megatron_speech.data.dataset.documents_table import SCHEMA, derive_columns
    from megatron_speech.data.dataset.manifest import FilterStatistics, Totals

    monkeypatch.setattr(verify, "_READ_BYTES", 1 << 16)
    random = np.random.default_rng(0)
    template = make_dataset(tmp_path / "template", toy_space, "speech_lm", [])
    for name, lengths in (("a", [0, 1_000_000, 0, 5]), ("b", [0]), ("c", [1_000_000, 3])):
        ids = random.integers(0, toy_space.size, sum(lengths)).astype(toy_space.dtype)
        rows = [dict.fromkeys(SCHEMA.names) | {"language": "en", "dataset_source": "x", "tokens": n} for n in lengths]
        table = pa.RecordBatch.from_pylist(
            [{**row, "sample_id": f"{name}{i}", "source_id": name} for i, row in enumerate(rows)], schema=SCHEMA
        )
        sums = Totals(documents=len(lengths), tokens=sum(lengths))
        fields = {"totals": sums, "languages": {"en": sums}, "sources": {"x": sums}, "forms": {"plain": len(lengths)}}
        statistics = FilterStatistics(rows=len(lengths), kept=len(lengths))
        with DatasetWriter(tmp_path / name, toy_space.dtype) as writer:
            writer.add(ids, np.array(lengths), derive_columns(table, ids, np.array(lengths)))
            writer.finish(template.manifest.model_copy(update={**fields, "filters": statistics}))
        dataset = TokenDataset(tmp_path / name)
        assert [len(dataset.document(i)) for i in range(len(dataset))] == lengths
        assert np.array_equal(dataset.tokens, ids)
        verify_dataset(dataset.prefix, require_manifest=dataset.manifest is not None).require()
    parts = [str(tmp_path / name) for name in "abc"]
    assert merge_datasets.main(["--input", *parts, "--output-prefix", str(tmp_path / "all")]) == 0
    merged = TokenDataset(tmp_path / "all")
    verify_dataset(merged.prefix, require_manifest=merged.manifest is not None).require()
    assert merged.lengths.tolist() == [0, 1_000_000, 0, 5, 0, 1_000_000, 3]
    assert np.array_equal(merged.tokens, np.concatenate([TokenDataset(part).tokens for part in parts]))
    flip(tmp_path / "all.bin", 2 * 1_500_000)
    assert verify.verify_dataset(tmp_path / "all").damaged == [{"document": 5, "sample_id": "c0"}]


def test_a_dataset_without_documents_is_whole(tmp_path: Path, make_dataset: Any, toy_space: TokenSpace) -> None:
    dataset = make_dataset(tmp_path / "none", toy_space, "speech_lm", [])
    assert len(dataset) == 0 and dataset.total_tokens == 0
    verify_dataset(dataset.prefix, require_manifest=dataset.manifest is not None).require()
