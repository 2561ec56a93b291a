"""Damage anywhere in a file is an InputError or a row that says why, never another exception and never an early end."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_speech.data.dataset.indexed import HEADER
from megatron_speech.errors import InputError
from megatron_speech.preprocess.readers.open import InputFiles

ROWS = 40


def _tar(form: int) -> bytes:
    handle = io.BytesIO()
    with tarfile.open(fileobj=handle, mode="w", format=form) as archive:
        for i in range(ROWS):
            data = io.BytesIO()
            np.save(data, np.arange(i))
            name = f"{'folder/' * (i % 30)}é{i}"
            for ending, part in (("json", json.dumps({"i": i}).encode()), ("npy", data.getvalue())):
                member = tarfile.TarInfo(f"{name}.{ending}")
                member.size = len(part)
                archive.addfile(member, io.BytesIO(part))
    return handle.getvalue()


def _npy(array: np.ndarray) -> bytes:
    handle = io.BytesIO()
    np.save(handle, array)
    return handle.getvalue()


def _parquet() -> bytes:
    handle = io.BytesIO()
    codes = pa.array([list(range(i)) for i in range(ROWS)], pa.list_(pa.int32()))
    pq.write_table(pa.table({"codes": codes}), handle, write_page_checksum=True)
    return handle.getvalue()


def _parquet_of_recordings() -> bytes:
    handle = io.BytesIO()
    audio = pa.array([{"bytes": bytes(i), "path": f"{i}.wav"} for i in range(ROWS)])
    pq.write_table(pa.table({"audio": audio, "n": list(range(ROWS))}), handle, write_page_checksum=True)
    return handle.getvalue()


def _cuts() -> bytes:
    lines = gzip.decompress((Path(__file__).parent / "files" / "lhotse_cuts.jsonl.gz").read_bytes())
    return lines * (ROWS // 4)


def _idx() -> bytes:
    lengths = np.full(ROWS, 3, "<i4")
    offsets, documents = np.arange(ROWS, dtype="<i8") * 12, np.arange(ROWS + 1, dtype="<i8")
    return (
        HEADER.pack(b"MMIDIDX\0\0", 1, 4, ROWS, ROWS + 1) + lengths.tobytes() + offsets.tobytes() + documents.tobytes()
    )


LINES = b"".join(json.dumps({"text": f"é {i}"}, ensure_ascii=False).encode() + b"\n" for i in range(ROWS))
BOUNDS = np.arange(ROWS + 1) * 3
FILES: dict[str, tuple[bytes, dict[str, bytes]]] = {
    "a.jsonl": (LINES, {}),
    "a.jsonl.gz": (gzip.compress(LINES), {}),
    "a.jsonl.zst": (zstandard.ZstdCompressor(write_checksum=True).compress(LINES), {}),
    "gnu.tar": (_tar(tarfile.GNU_FORMAT), {}),
    "pax.tar": (_tar(tarfile.PAX_FORMAT), {}),
    "pax.tar.gz": (gzip.compress(_tar(tarfile.PAX_FORMAT)), {}),
    "a.parquet": (_parquet(), {}),
    "x.offsets.npy": (_npy(BOUNDS), {"x.codes.npy": _npy(np.arange(ROWS * 3))}),
    "a.json": (json.dumps([{"text": f"é {i}"} for i in range(ROWS)], ensure_ascii=False).encode(), {}),
    "cuts.jsonl": (_cuts(), {}),
    "train.tsv": (b"path\tsentence\n" + b"".join(f"{i}.mp3\té {i}\n".encode() for i in range(ROWS)), {}),
    "metadata.csv": (b"".join(f"{i}|é {i}\n".encode() for i in range(ROWS)), {}),
    "wav.scp": (b"".join(b"r%d r%d.wav\n" % (i, i) for i in range(ROWS)), {"text": b"r1 one\n", "utt2dur": b"r1 2\n"}),
    "audio.parquet": (_parquet_of_recordings(), {}),
    "p.idx": (_idx(), {"p.bin": np.zeros(ROWS * 3, "<i4").tobytes()}),
}


@pytest.mark.parametrize("name", FILES)
def test_damage_never_surprises(tmp_path: Path, name: str) -> None:
    data, others = FILES[name]
    for other, content in others.items():
        (tmp_path / other).write_bytes(content)
    path = tmp_path / name

    def read() -> int:
        inputs = InputFiles([str(path)])
        rows = sum(len(batch.read()) for batch in inputs.batches(0))
        assert inputs.known_rows == rows
        return rows

    path.write_bytes(data)
    assert read() == ROWS

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.integers(0, len(data) - 1), st.binary(max_size=6), st.integers(0, 6), st.booleans())
    def spoil(position: int, bytes_: bytes, removed: int, cut: bool) -> None:
        spoiled = data[:position] + bytes_ + (b"" if cut else data[position + removed :])
        path.write_bytes(spoiled)
        try:
            rows = read()
        except InputError as error:
            assert str(path) in str(error) or any(other in str(error) for other in others)
            return
        if not name.endswith((".jsonl", ".json", ".tsv", ".csv", ".scp")):  # a cut line is a row all the same
            assert rows == ROWS or "tar" in name

    spoil()
