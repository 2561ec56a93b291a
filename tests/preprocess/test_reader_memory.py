"""Memory does not grow with the input: a child process reads far more than it may keep."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

MIB = 1 << 20
TOTAL_MIB = 192
MAY_GROW_MIB = 32

# Reads every row of an input and prints by how much the peak grew after the first fifth; `web://` is a server that
# answers range requests, as http does: no path on this machine, no seeking but by another request.
CHILD = """
import resource, sys
import fsspec
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem
from megatron_speech.preprocess.readers.open import InputFiles

class WebFile(AbstractBufferedFile):
    def _fetch_range(self, start, end):
        with open(self.path, "rb") as handle:
            handle.seek(start)
            return handle.read(end - start)

class WebFileSystem(AbstractFileSystem):
    protocol = "web"

    @classmethod
    def _strip_protocol(cls, path):
        return path.removeprefix("web:/")

    def info(self, path, **options):
        import os
        return {"name": path, "size": os.stat(path).st_size, "type": "file", "ETag": "1"}

    def _open(self, path, mode="rb", block_size=None, **options):
        return WebFile(self, path, mode, block_size=block_size)

fsspec.register_implementation("web", WebFileSystem)

def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

path, total = sys.argv[1], int(sys.argv[2])
rows, start = 0, None
for batch in InputFiles([path]).batches(0):
    for row in batch.read():
        assert row.rejected is None, row.rejected
        rows += 1
    del row
    if start is None and rows >= total // 5:
        start = peak_mib()
assert rows == total, rows
print(peak_mib() - start)
"""


def jsonl(folder: Path) -> tuple[str, int]:
    lines = b"".join(json.dumps({"text": "x" * 4000, "i": i}).encode() + b"\n" for i in range(256))
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines, 1) * TOTAL_MIB)  # one member after another
    return "a.jsonl.gz", 256 * TOTAL_MIB


def plain_jsonl(folder: Path) -> tuple[str, int]:
    lines = b"".join(json.dumps({"text": "x" * 4000, "i": i}).encode() + b"\n" for i in range(256))
    with open(folder / "a.jsonl", "wb") as handle:
        handle.writelines(lines for _ in range(TOTAL_MIB))
    return "a.jsonl", 256 * TOTAL_MIB


def tar(folder: Path) -> tuple[str, int]:
    handle = io.BytesIO()
    np.save(handle, np.zeros(8000, np.int16))
    data = handle.getvalue().ljust(16 * 1024, b"\0")[: 128 + 16000]
    count = TOTAL_MIB * MIB // len(data)
    with open(folder / "a.tar", "wb") as archive:
        for i in range(count):
            member = tarfile.TarInfo(f"{i}.npy")
            member.size = len(data)
            archive.write(member.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512))
        archive.write(bytes(1024))
    return "a.tar", count


def tar_zst(folder: Path) -> tuple[str, int]:
    name, count = tar(folder)
    with open(folder / name, "rb") as plain, open(folder / "a.tar.zst", "wb") as packed:
        zstandard.ZstdCompressor(level=1).copy_stream(plain, packed)
    return "a.tar.zst", count


def offsets(folder: Path) -> tuple[str, int]:
    frames = TOTAL_MIB * MIB // 2
    np.lib.format.open_memmap(folder / "a.codes.npy", "w+", np.int16, (frames,))
    bounds = np.append(np.arange(0, frames, 2000), frames)
    np.save(folder / "a.offsets.npy", bounds)
    return "a.offsets.npy", len(bounds) - 1


def parquet(folder: Path) -> tuple[str, int]:
    codes = pa.ListArray.from_arrays(np.arange(0, 2_000_001, 2000, dtype=np.int32), np.zeros(2_000_000, np.int32))
    table = pa.table({"codes": codes})
    groups = TOTAL_MIB * MIB // codes.nbytes
    with pq.ParquetWriter(folder / "a.parquet", table.schema, use_dictionary=False, compression="none") as writer:
        for _ in range(groups):
            writer.write_table(table)
    return "a.parquet", 1000 * groups


def parquet_of_recordings(folder: Path) -> tuple[str, int]:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    audio = pa.array([{"bytes": bytes(TOTAL_MIB * MIB // 300), "path": "a.wav"}] * 100, kind)
    table = pa.table({"audio": audio, "text": ["a"] * 100})
    with pq.ParquetWriter(folder / "a.parquet", table.schema, use_dictionary=False, compression="none") as writer:
        for _ in range(3):
            writer.write_table(table)
    return "a.parquet", 300


@pytest.mark.slow
@pytest.mark.parametrize(
    ("write", "remote"),
    [
        (plain_jsonl, False),
        (jsonl, True),
        (tar, False),
        (tar_zst, True),
        (offsets, False),
        (offsets, True),
        (parquet, True),
        (parquet_of_recordings, False),
    ],
    ids=lambda value: value.__name__ if callable(value) else ("local", "remote")[value],
)
def test_memory_stays_while_the_input_passes(tmp_path: Path, repository: Path, write: object, remote: bool) -> None:
    assert callable(write)
    name, rows = write(tmp_path)
    url = f"{'web:/' if remote else ''}{tmp_path}/{name}"
    done = subprocess.run(
        [sys.executable, "-c", CHILD, url, str(rows)], capture_output=True, text=True, cwd=repository, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < MAY_GROW_MIB < TOTAL_MIB / 4
