"""Full disks, two writers, and input whose length nobody knows: nothing lost, nothing half."""

from __future__ import annotations

import gzip
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from megatron_speech.data.dataset import journal
from megatron_speech.data.dataset.dataset_writer import DatasetWriter
from megatron_speech.data.dataset.documents_table import SCHEMA
from megatron_speech.data.dataset.indexed import TokenDataset
from megatron_speech.data.dataset.verify import verify_dataset
from megatron_speech.errors import InputError, OutputError
from megatron_speech.preprocess import merge_datasets, preprocess_data
from megatron_speech.preprocess.readers import jsonl


def hidden(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".")]


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal entry after every batch, and small batches."""
    monkeypatch.setattr(journal, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(jsonl, "BATCH_ROWS", 16)


@pytest.mark.slow
@pytest.mark.usefixtures("often")
def test_wherever_the_disk_is_full_the_same_command_goes_on(
    corpus: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit of the size of files stands for the disk: the write that crosses it fails, whichever file's it is."""
    corpus.convert("tts", "--cloning", "same-speaker", prefix="out/data")
    expected = corpus.files()
    largest = max(len(data) for data in expected.values())
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    seen = set()
    for limit in (0, *range(200, largest + 2000, 2500)):
        shutil.rmtree(corpus.folder / "out")
        (corpus.folder / "out").mkdir()
        capsys.readouterr()
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
        try:
            status = corpus.run("tts", "--cloning", "same-speaker")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        error = capsys.readouterr().err
        if status == 0:
            assert limit >= largest
        else:
            assert status == 1 and error.startswith("error: cannot write ") and error.count("\n") == 1
            assert "File too large" in error
            seen.add(error.split(".data.partial/")[1].split(":")[0])
            assert corpus.files() == {}
            assert corpus.run("tts", "--cloning", "same-speaker") == 0
        assert corpus.files() == expected, limit
        assert hidden(corpus.folder / "out") == []
    assert {"journal.json", "look/records", "rows.arrow"} <= seen


def test_a_disk_that_is_full_when_the_table_is_encoded_keeps_the_work(
    make_corpus: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = make_corpus(3)  # of so few rows the encoded table is larger than what it is made of
    corpus.convert("tts", prefix="whole/data")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(corpus.files("whole/data")["docs.parquet"]) - 1, old[1]))
    try:
        assert corpus.run("tts", prefix="out/data") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "docs.parquet: File too large; what is done so far is kept" in capsys.readouterr().err
    assert corpus.run("tts", prefix="out/data") == 0
    assert "every row was converted before" in capsys.readouterr().err
    assert corpus.files("out/data") == corpus.files("whole/data")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True, check=False)
        if shutil.which("mount")
        else None
    )
    if done is None or done.returncode:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.usefixtures("often")
def test_a_full_file_system_is_one_sentence_and_the_journal_stays(
    make_corpus: Any, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = make_corpus(300)
    corpus.convert("tts", prefix="whole/data")
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(20 << 10))
    assert corpus.run("tts", prefix="disk/data") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: cannot write ") and error.count("\n") == 1
    assert "No space left on device" in error and "run the same command again, which resumes from there" in error
    assert corpus.files("disk/data") == {}
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    assert corpus.run("tts", prefix="disk/data") == 0
    assert "resumes after" in capsys.readouterr().err
    assert corpus.files("disk/data") == corpus.files("whole/data")


@pytest.mark.slow
@pytest.mark.usefixtures("often")
def test_a_merge_on_a_full_disk_leaves_no_dataset_and_goes_on(corpus: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(3):
        corpus.convert("tts", "--shard", f"{i}/3", prefix=f"out/{i}")
    corpus.convert("tts", prefix="out/whole")
    out = corpus.folder / "out"
    arguments = ["--input", *(str(out / str(i)) for i in range(3)), "--output-prefix", str(out / "data")]
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * (out / "0.bin").stat().st_size + 100, old[1]))
    try:
        assert merge_datasets.main(arguments) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "what is done so far is kept in" in capsys.readouterr().err
    assert corpus.files("out/data") == {}
    assert merge_datasets.main(arguments) == 0
    assert corpus.files("out/data") == corpus.files("out/whole") and hidden(out) == []


@pytest.mark.usefixtures("often")
def test_a_second_writer_is_refused_and_leaves_the_first_one_its_work(
    corpus: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = corpus.convert("tts", prefix="out/whole")
    row = whole.columns().to_batches()[0].slice(0, 1)
    with DatasetWriter(corpus.folder / "out" / "data", whole.dtype, fingerprint={"of": "the first"}) as writer:
        writer.add(whole.tokens[: int(whole.lengths[0])], whole.lengths[:1], row)
        writer.commit({"at": 1})
        assert corpus.run("tts") == 2
        assert "another process is writing" in capsys.readouterr().err
        for part in ("0", "1"):
            corpus.convert("tts", "--shard", f"{part}/2", prefix=f"out/{part}")
        parts = [str(corpus.folder / "out" / part) for part in ("0", "1")]
        assert merge_datasets.main(["--input", *parts, "--output-prefix", str(corpus.folder / "out" / "data")]) == 2
        writer.finish(whole.manifest)
    dataset = TokenDataset(corpus.folder / "out" / "data")
    assert len(dataset) == 1


def test_a_failing_network_keeps_the_work_and_bad_input_does_not(tmp_path: Path) -> None:
    rows = pa.RecordBatch.from_pylist([dict.fromkeys(SCHEMA.names)], schema=SCHEMA)

    def stopped(error: Exception, documents: int = 1) -> Any:
        with pytest.raises(type(error)), DatasetWriter(tmp_path / "data", "<u2", fingerprint={"of": 1}) as writer:
            for _ in range(documents):
                writer.add(np.arange(3), np.array([3]), rows)
            writer.commit({"at": 1})
            raise error
        return hidden(tmp_path)

    reset = InputError("input s3://b/k cannot be read")
    reset.__cause__ = ConnectionResetError()
    assert stopped(reset) == [".data.partial"]
    with DatasetWriter(tmp_path / "data", "<u2", fingerprint={"of": 1}) as writer:
        assert writer.state == {"at": 1} and writer.documents == 1 and writer.tokens == 3
    assert stopped(InputError("too many rows are rejected")) == []
    assert stopped(reset, documents=0) == []  # of work that never began there is nothing to keep
    assert stopped(OutputError("cannot write")) == [".data.partial"]


def test_input_of_unknown_length_is_converted_in_one_pass(
    corpus: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus.convert("tts", prefix="out/plain")
    stream = corpus.folder / "samples.jsonl.gz"
    stream.write_bytes(gzip.compress(corpus.samples.read_bytes()))
    opened = []
    real = jsonl.JsonlStream.batches

    def batches(self: Any, start: int, stop: int | None = None) -> Any:
        opened.append(start)
        return real(self, start, stop)

    monkeypatch.setattr(jsonl.JsonlStream, "batches", batches)
    dataset = corpus.convert("tts", prefix="out/stream", inputs=[stream])
    assert opened == [0]
    plain, streamed = corpus.files("out/plain"), corpus.files("out/stream")
    assert plain["bin"] == streamed["bin"] and plain["docs.parquet"] == streamed["docs.parquet"]
    assert [(entry.rows, entry.bytes) for entry in dataset.manifest.inputs] == [(60, stream.stat().st_size)]
    corpus.write([*corpus.rows, "{"])
    stream.write_bytes(gzip.compress(corpus.samples.read_bytes()))
    assert corpus.run("tts", prefix="out/refused", inputs=[stream]) == 2  # at the end, when the share is known
    assert "1 of the 61 rows" in capsys.readouterr().err
    assert not [name for name in corpus.left() if "refused" in name]


@pytest.mark.slow
def test_a_killed_stream_goes_on_and_still_knows_its_rows(corpus: Any, killer: Any) -> None:
    stream = corpus.folder / "samples.jsonl.gz"
    stream.write_bytes(gzip.compress(corpus.samples.read_bytes()))
    argv = corpus.arguments("tts", inputs=[stream])
    whole = killer.run("preprocess_data", argv)
    assert whole["status"] == 0, whole["log"]
    expected = corpus.files()
    for k in range(10, whole["changes"], 15):
        shutil.rmtree(corpus.folder / "out")
        assert killer.run("preprocess_data", argv, kill_at=k)["status"] == -9
        assert killer.run("preprocess_data", argv)["status"] == 0
        assert corpus.files() == expected, k


# ---- shards and workers


@pytest.mark.slow
@pytest.mark.parametrize("workers", [(1,), (2, 1), (1, 3, 1)], ids=str)
def test_neither_shards_nor_workers_show_in_the_bytes(
    make_corpus: Any, workers: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With references and the filter of duplicates, which both index the whole input."""
    monkeypatch.setattr(jsonl, "BATCH_ROWS", 50)
    monkeypatch.setattr(preprocess_data, "BATCH_ROWS", 50)
    corpus = make_corpus(400)
    rows: list[Any] = list(corpus.rows)
    for i in range(10, 400, 7):  # the same again, in this shard or another
        rows[i] = {**rows[(i * 13) % 400], "sample_id": f"again{i}"}
    rows[5], rows[390] = "{", "["
    corpus.write(rows)
    (corpus.folder / "filters.yaml").write_text("filters:\n  - {rule: duplicate}\n")
    flags = ("--cloning", "same-speaker", "--references", 2, "--filters", corpus.folder / "filters.yaml")
    one = corpus.convert("tts", *flags, "--max-rejected", 0.1, prefix="out/one")
    assert one.manifest.filters.dropped["duplicate"] > 30
    for i, count in enumerate(workers):
        shard = ("--shard", f"{i}/{len(workers)}", "--workers", count)
        corpus.convert("tts", *flags, "--max-rejected", 0.1, *shard, prefix=f"out/{i}")
    parts = [str(corpus.folder / "out" / str(i)) for i in range(len(workers))]
    assert merge_datasets.main(["--input", *parts, "--output-prefix", str(corpus.folder / "out" / "all")]) == 0
    assert corpus.files("out/all") == corpus.files("out/one")
    assert verify_dataset(corpus.folder / "out" / "all").findings == []


# ---- dry run


def test_a_dry_run_writes_nothing_at_all(
    corpus: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path_factory: Any
) -> None:
    corpus.write([*corpus.rows, "{"])
    temporary = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    before = sorted(corpus.folder.rglob("*"))
    assert corpus.run("tts", "--dry-run", "--cloning", "same-speaker", "--max-rejected", 0.5) == 0
    text = capsys.readouterr().out
    assert "bad_json" in text and "document 2: " in text and "tokens/character" in text
    assert sorted(corpus.folder.rglob("*")) == before and list(temporary.iterdir()) == []
    assert corpus.run("tts", "--dry-run", "--first-rows", 12) == 0
    assert "12 rows" in capsys.readouterr().out
    assert corpus.run("tts", "--first-rows", 12) == 2
    assert "--first-rows 12 is only for --dry-run" in capsys.readouterr().err
