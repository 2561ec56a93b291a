"""The same samples in every format become the same dataset, whatever the number of workers."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from fsspec.implementations.memory import MemoryFileSystem

from megatron_speech.preprocess import preprocess_data
from megatron_speech.tokens.space import TokenSpace

FIELDS = ("sample_id", "source_id", "segment_order", "transcript", "language", "speaker_id", "dataset_source")


def write_all(corpus: Any) -> dict[str, Path]:
    """The corpus in every format that holds codes of two codebooks."""
    folder = corpus.folder
    rows = [{name: row[name] for name in FIELDS} for row in corpus.rows]
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    inline = b"".join(
        json.dumps({**row, "codes": codes.tolist()}).encode() + b"\n"
        for row, codes in zip(rows, corpus.codes, strict=True)
    )
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(inline))
    (folder / "a.jsonl.zst").write_bytes(zstandard.compress(inline))
    np.save(folder / "x.codes.npy", np.concatenate(corpus.codes))
    np.save(folder / "x.offsets.npy", np.cumsum([0, *map(len, corpus.codes)]))
    (folder / "x.jsonl").write_bytes(lines)
    column = pa.array([codes.tolist() for codes in corpus.codes], pa.list_(pa.list_(pa.uint16())))
    pq.write_table(pa.Table.from_pylist(rows).append_column("codes", column), folder / "a.parquet")
    packed = pa.array([codes.astype("<i2").tobytes() for codes in corpus.codes], pa.binary())
    frames = pa.array([len(codes) for codes in corpus.codes])
    table = pa.Table.from_pylist(rows).append_column("codes_int16", packed).append_column("code_len", frames)
    pq.write_table(table, folder / "b.parquet")
    with tarfile.open(folder / "a.tar", "w") as archive:
        for row, codes in zip(rows, corpus.codes, strict=True):
            handle = io.BytesIO()
            np.save(handle, codes)
            for ending, data in (("json", json.dumps(row).encode()), ("npy", handle.getvalue())):
                member = tarfile.TarInfo(f"{row['sample_id']}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    (folder / "a.tar.zst").write_bytes(zstandard.compress((folder / "a.tar").read_bytes()))
    names = "a.jsonl.gz a.jsonl.zst x.offsets.npy a.parquet b.parquet a.tar a.tar.zst".split()
    return {name: folder / name for name in names}


def tokens(corpus: Any, prefix: str) -> tuple[bytes, bytes]:
    files = corpus.files(prefix)
    return files["bin"], files["idx"]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["tts", "speech_lm"])
def test_every_format_becomes_the_same_dataset(corpus: Any, task: str) -> None:
    corpus.convert(task, prefix="out/expected")
    expected = tokens(corpus, "out/expected")
    memory = fsspec.filesystem("memory")
    for name, path in write_all(corpus).items():
        corpus.convert(task, inputs=[path], prefix=f"out/{name}")
        assert tokens(corpus, f"out/{name}") == expected, name
        for file in corpus.folder.glob("[abx].*"):
            memory.pipe(f"/conversion/{file.name}", file.read_bytes())
        corpus.convert(task, inputs=[f"memory://conversion/{name}"], prefix="out/remote")
        assert tokens(corpus, "out/remote") == expected, name


@pytest.mark.slow
def test_references_workers_and_shards_work_on_streams_too(make_corpus: Any) -> None:
    corpus = make_corpus(700)
    corpus.convert("tts", "--cloning", "same-speaker", prefix="out/expected")
    path = write_all(corpus)["a.tar.zst"]
    assert corpus.run("tts", "--cloning", "same-speaker", "--workers", 2, inputs=[path]) == 0
    assert tokens(corpus, "out/data") == tokens(corpus, "out/expected")
    parts = b""
    for shard in range(3):
        corpus.convert(
            "tts", "--cloning", "same-speaker", "--shard", f"{shard}/3", inputs=[path], prefix=f"out/{shard}"
        )
        parts += tokens(corpus, f"out/{shard}")[0]
    assert parts == tokens(corpus, "out/expected")[0]


def test_foreign_members_are_in_the_manifest(corpus: Any) -> None:
    path = write_all(corpus)["a.tar"]
    with tarfile.open(path, "a") as archive:
        member = tarfile.TarInfo("s59.wav")
        archive.addfile(member, io.BytesIO())
    dataset = corpus.convert("tts", inputs=[path])
    assert len(dataset) == 60 and dataset.manifest.notices["tar_member:.wav"] == 1


def test_a_dataset_of_upstreams_tool_becomes_the_text_it_was_made_of(corpus: Any) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    space = TokenSpace.load(corpus.folder / "ts.json")
    texts = [f"text {i} é" for i in range(700)]
    builder = IndexedDatasetBuilder(str(corpus.folder / "up.bin"), dtype=np.uint16)
    for text in texts:
        ids = np.append(space.encode_text(text), 255)
        builder.add_document(torch.from_numpy(ids.astype(np.int64)), [len(ids)])
    builder.finalize(str(corpus.folder / "up.idx"))
    corpus.write([{"text": text} for text in texts], "text.jsonl")
    corpus.convert("text_lm", inputs=[corpus.folder / "text.jsonl"], prefix="out/expected")
    corpus.convert("text_lm", "--input-eod", 255, "--language", "en", inputs=[corpus.folder / "up.idx"])
    assert tokens(corpus, "out/data") == tokens(corpus, "out/expected")


def test_a_stream_that_breaks_in_the_middle_leaves_no_dataset(corpus: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_all(corpus)["a.jsonl.zst"]
    path.write_bytes(path.read_bytes()[:-5])
    assert corpus.run("tts", inputs=[path]) == 2
    error = capsys.readouterr().err
    assert "a.jsonl.zst is cut off" in error and error.count("\n") == 1
    assert corpus.left() == []


def test_the_command_names_the_flag_that_an_input_needs(corpus: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (corpus.folder / "train_input_ids.memmap").write_bytes(b"")
    np.save(corpus.folder / "train_input_ids_shape.npy", (0, 0))
    assert corpus.run("tts", inputs=[corpus.folder / "train_input_ids.memmap"]) == 2
    assert "name its folder with --input-tokenizer" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        preprocess_data.main(["--help"])
    assert "--input-tokenizer" in capsys.readouterr().out


class FlakyFileSystem(MemoryFileSystem):
    """Memory as a server whose transfers break off after some bytes."""

    protocol = "flaky"
    breaks_after: int | None = None

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        handle = super()._open(path, mode, **options)
        if mode != "rb" or self.breaks_after is None:
            return handle
        limit = self.breaks_after

        class Handle(io.BytesIO):
            def read(self, size: int | None = -1) -> bytes:
                if self.tell() >= limit:
                    raise TimeoutError("no answer")
                return super().read(min(size or 0, limit - self.tell()))

        return Handle(handle.getvalue())

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("flaky://", "memory://"))


def test_a_transfer_that_breaks_off_keeps_what_is_done(make_corpus: Any, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = make_corpus(1100)
    path = write_all(corpus)["a.jsonl.zst"]
    corpus.convert("tts", inputs=[path], prefix="out/expected")
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    data = path.read_bytes()
    fsspec.filesystem("memory").pipe("/flaky/a.jsonl.zst", data)
    FlakyFileSystem.breaks_after = len(data) * 3 // 4
    assert corpus.run("tts", inputs=["flaky://flaky/a.jsonl.zst"]) == 1
    error = capsys.readouterr().err
    assert "a.jsonl.zst broke off: TimeoutError: no answer; run the same command again" in error
    assert "Traceback" not in error and "what is done so far is kept" in error
    FlakyFileSystem.breaks_after = None
    assert corpus.run("tts", inputs=["flaky://flaky/a.jsonl.zst"]) == 0
    assert tokens(corpus, "out/data") == tokens(corpus, "out/expected")
