"""Parquet: columns of codes in every layout that writers choose, without becoming Python integers."""

from __future__ import annotations

import datetime
import decimal
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from fsspec.implementations.memory import MemoryFileSystem

from megatron_speech.errors import InputError
from megatron_speech.preprocess.readers import source
from megatron_speech.preprocess.readers.base import ReadOptions, Row
from megatron_speech.preprocess.readers.open import InputFiles
from megatron_speech.preprocess.readers.parquet import recording

ReadRows = Callable[..., list[Row]]
FILES = Path(__file__).parent / "files"
COUNT = 1300


def make_codes() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 500, n).astype(np.int32) for n in random.integers(0, 30, COUNT)]


FLAT: dict[str, tuple[str, Callable[[list[np.ndarray]], pa.Array]]] = {
    "list": ("codes", lambda codes: pa.array([c.tolist() for c in codes], pa.list_(pa.int32()))),
    "large list": ("codes", lambda codes: pa.array([c.tolist() for c in codes], pa.large_list(pa.uint16()))),
    "int16 bytes": ("codes_int16", lambda codes: pa.array([c.astype("<i2").tobytes() for c in codes], pa.binary())),
    "int32 bytes": ("codes_int32", lambda codes: pa.array([c.tobytes() for c in codes], pa.large_binary())),
}


@pytest.mark.parametrize("layout", FLAT)
def test_codes_in_every_layout_are_the_same_codes(tmp_path: Path, read_rows: ReadRows, layout: str) -> None:
    codes = make_codes()
    name, make = FLAT[layout]
    language = pa.array(["hi", "en"] * (COUNT // 2)).dictionary_encode()
    texts = pa.array([f"text {i}" for i in range(COUNT)], pa.large_string())
    table = pa.table({name: make(codes), "language": language, "transcript": texts})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=300)
    fsspec.filesystem("memory").pipe("/parquet/a.parquet", (tmp_path / "a.parquet").read_bytes())
    for url in (tmp_path / "a.parquet", "memory://parquet/a.parquet"):
        for i, row in enumerate(read_rows(url)):
            found = row.fields.pop("codes")
            assert isinstance(found, np.ndarray) and np.issubdtype(found.dtype, np.integer)
            assert np.array_equal(found, codes[i])
            assert row.fields == {"language": ["hi", "en"][i % 2], "transcript": f"text {i}"}
    assert InputFiles(["memory://parquet/a.parquet"]).known_rows is None


def test_codes_of_several_codebooks(tmp_path: Path, read_rows: ReadRows) -> None:
    grids = [np.arange(6).reshape(3, 2), np.arange(2).reshape(1, 2), np.zeros((0, 0))]
    pq.write_table(
        pa.table({"codes": pa.array([g.tolist() for g in grids], pa.list_(pa.list_(pa.int16())))}), tmp_path / "a.pq"
    )
    for row, grid in zip(read_rows(tmp_path / "a.pq"), grids, strict=True):
        assert row.fields["codes"].shape == grid.shape and np.array_equal(row.fields["codes"], grid)
    data = [grid.astype("<i2").tobytes() for grid in grids]
    pq.write_table(pa.table({"codes_int16": data, "code_len": [3, 1, 0]}), tmp_path / "b.pq")
    shapes = [row.fields["codes"].shape for row in read_rows(tmp_path / "b.pq")]
    assert shapes == [(3, 2), (1, 2), (0,)]  # code_len says how many frames the bytes are


def test_empty_cells_are_fields_that_are_not_there_and_nulls_inside_never_become_codes(
    tmp_path: Path, read_rows: ReadRows
) -> None:
    codes = pa.array([[1, 2], None, [1, None], []], pa.list_(pa.int32()))
    table = pa.table({"codes": codes, "mos": pa.array([1.0, None, float("nan"), 2.0]), "text_ids": codes})
    pq.write_table(table, tmp_path / "a.parquet")
    first, none, hole, empty = read_rows(tmp_path / "a.parquet")
    assert first.fields["codes"].tolist() == first.fields["text_ids"].tolist() == [1, 2]
    assert none.fields == {} and none.rejected is None
    assert not np.issubdtype(hole.fields["codes"].dtype, np.integer)
    assert (
        hole.rejected is not None and hole.rejected.rule == "not_finite" and "field mos is nan" in hole.rejected.reason
    )
    assert len(empty.fields["codes"]) == 0 and empty.rejected is None


def test_bytes_that_are_no_whole_numbers_reject_their_row(tmp_path: Path, read_rows: ReadRows) -> None:
    pq.write_table(pa.table({"codes_int32": [b"\1\0\0\0", b"\1\0\0"]}), tmp_path / "a.parquet")
    good, bad = read_rows(tmp_path / "a.parquet")
    assert good.fields["codes"].tolist() == [1]
    assert bad.rejected is not None and "holds 3 bytes, needed a multiple of 4" in bad.rejected.reason


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"codes": [b"\1\0"]}, "column codes holds bytes of unknown meaning; rename it to what they are: codes_int16"),
        (
            {"codes": [[1]], "codes_int16": [b"\1\0"]},
            "has the columns codes and codes_int16; needed one column of codes",
        ),
    ],
)
def test_columns_that_could_be_misread_are_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(InputError) as error:
        list(InputFiles([str(tmp_path / "a.parquet")]).batches(0))
    assert message in str(error.value)


def test_a_truncated_or_flipped_file_is_refused(tmp_path: Path) -> None:
    codes = pa.array([c.tolist() for c in make_codes()], pa.list_(pa.int32()))
    pq.write_table(pa.table({"codes": codes}), tmp_path / "a.parquet", write_page_checksum=True, compression="zstd")
    data = (tmp_path / "a.parquet").read_bytes()
    for spoiled in (data[:-1], data[: len(data) // 2], data[:400] + b"\xff" * 40 + data[440:]):
        (tmp_path / "a.parquet").write_bytes(spoiled)
        with pytest.raises(InputError, match=r"a.parquet (is not a readable parquet file|cannot be read after row)"):
            list(InputFiles([str(tmp_path / "a.parquet")]).batches(0))


# ---- bytes, and types that JSON lacks


class CountingFileSystem(MemoryFileSystem):
    """Counts the bytes that are read of its files."""

    protocol = "counting"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    count: ClassVar[int] = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("counting://", "memory://"))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        handle = super()._open(path, mode, **options)
        if mode != "rb":
            return handle
        file_system = type(self)

        class Handle(io.BytesIO):
            def read(self, size: int | None = -1) -> bytes:
                data = super().read(size)
                file_system.count += len(data)
                return data

        return Handle(handle.getvalue())


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def test_columns_of_bytes_are_counted_and_never_read(read_rows: ReadRows, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = 40
    table = pa.table(
        {
            "audio": pa.array([{"bytes": noise(1 << 18, i), "path": f"{i}.wav"} for i in range(rows)], kind),
            "text": [f"text {i}" for i in range(rows)],
            "image": pa.array([noise(1 << 17, i) for i in range(rows)]).dictionary_encode(),
            "parts": pa.array([[{"raw": b"x", "n": i}] for i in range(rows)]),
            "tags": pa.array([[("a", b"x")]] * rows, pa.map_(pa.string(), pa.binary())),
            "decoded": pa.array([{"array": [0.5, 0.25], "sampling_rate": 8000}] * rows),
        }
    )
    fsspec.register_implementation("counting", CountingFileSystem, clobber=True)
    with fsspec.open("counting://a/a.parquet", "wb") as handle:
        pq.write_table(table, handle, row_group_size=10, compression="none")
    monkeypatch.setattr(source, "BUFFER_BYTES", 1 << 12)
    monkeypatch.setattr(source, "_REMOTE_BLOCK_BYTES", 1 << 12)
    CountingFileSystem.count = 0
    found = [row for batch in InputFiles(["counting://a/a.parquet"]).batches(0) for row in batch.read()]
    assert CountingFileSystem.count < 200_000 < table.nbytes / 50
    names = ("audio.bytes", "image", "parts.raw", "tags", "tags", "decoded.array")
    for i, row in enumerate(found):
        assert row.fields == {
            "audio": {"path": f"{i}.wav"},
            "text": f"text {i}",
            "parts": [{"n": i}],
            "decoded": {"sampling_rate": 8000},
        }
        assert row.notices == tuple(dict.fromkeys(f"parquet_column:{name}" for name in names))
    assert len(found) == rows


def test_rows_of_nothing_but_bytes_are_rows_without_fields(tmp_path: Path, read_rows: ReadRows) -> None:
    pq.write_table(pa.table({"wav": [b"x"] * COUNT}), tmp_path / "a.parquet")
    rows = read_rows(tmp_path / "a.parquet")
    assert len(rows) == COUNT and not any(row.fields for row in rows)


def test_the_documents_table_holds_json_of_the_right_types_and_no_bytes(corpus: Any) -> None:
    rows = 300
    columns = {
        "audio": pa.array([{"bytes": noise(4096, i), "path": f"{i}.wav"} for i in range(rows)]),
        "text": [f"text {i}" for i in range(rows)],
        "day": [datetime.date(2024, 2, 29)] * rows,
        "at": [datetime.datetime(2024, 2, 29, 12, 30, tzinfo=datetime.UTC)] * rows,
        "for": [datetime.timedelta(seconds=1.5)] * rows,
        "mos": pa.array([decimal.Decimal("3.25")] * rows, pa.decimal128(5, 2)),
        "exact": pa.array([decimal.Decimal("1234567890123456789.5")] * rows, pa.decimal128(20, 1)),
        "tags": pa.array([[("a", 1), ("b", None)]] * rows, pa.map_(pa.string(), pa.int64())),
        "deep": [{"n": [1, None], "ok": True}] * rows,
        "small": pa.array([0.5] * rows, pa.float16()),
    }
    path = corpus.folder / "a.parquet"
    pq.write_table(pa.table(columns), path)
    dataset = corpus.convert("text_lm", inputs=[path])
    extra = {json.dumps({**json.loads(x), "audio": 0}) for x in dataset.columns("extra")["extra"].to_pylist()}
    assert [json.loads(value) for value in extra] == [
        {
            "audio": 0,
            "at": "2024-02-29T12:30:00+00:00",
            "day": "2024-02-29",
            "deep": {"n": [1, None], "ok": True},
            "exact": "1234567890123456789.5",
            "for": 1.5,
            "mos": 3.25,
            "small": 0.5,
            "tags": {"a": 1, "b": None},
        }
    ]
    assert dataset.manifest.notices["parquet_column:audio.bytes"] == rows
    assert len(corpus.files()["docs.parquet"]) < 60_000 < path.stat().st_size / 20


def test_text_as_bytes_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"transcript": [b"hello"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="column transcript holds bytes, needed text; write it as a string column"):
        list(InputFiles([str(tmp_path / "a.parquet")]).batches(0))


def test_class_labels_of_hugging_face_are_their_names(read_rows: ReadRows) -> None:
    rows = read_rows(FILES / "hf_audio.parquet")
    assert [row.fields["language"] for row in rows] == ["en"] * 3


# ---- recordings


def rows_to_encode(path: Path) -> list[Row]:
    options = ReadOptions(recordings=True)
    return [row for batch in InputFiles([str(path)], options).batches(0) for row in batch.read()]


def test_recordings_are_read_in_any_order(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    (tmp_path / "outside.wav").write_bytes(b"outside")
    cells: list[Any] = [{"bytes": noise(300, i), "path": None} for i in range(90)]
    cells[40] = {"bytes": None, "path": "outside.wav"}
    cells[41] = None
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"audio": pa.array(cells, kind)}), path, row_group_size=35)
    rows = rows_to_encode(path)
    assert all(row.fields["wav_path"] == "a.parquet" and row.fields["wav_column"] == "audio" for row in rows)
    assert [row.fields["wav_row"] for row in rows] == list(range(90)) and not any(row.notices for row in rows)
    for i in [*range(90), 3, 2, 89, 36, 34, 35, 0]:
        if i == 41:
            with pytest.raises(InputError, match=r"column audio of row 41 .* holds no recording"):
                recording(str(path), i, "audio")
        else:
            assert recording(str(path), i, "audio") == (b"outside" if i == 40 else noise(300, i))
    with pytest.raises(InputError, match="has 90 rows, needed row 90; it was replaced"):
        recording(str(path), 90, "audio")


def test_each_row_group_of_recordings_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"wav": [noise(100, i) for i in range(70)]}), path, row_group_size=35)
    read: list[int] = []
    whole = pq.ParquetFile.iter_batches

    def counting(self: pq.ParquetFile, **options: Any) -> Any:
        read.extend(options["row_groups"])
        return whole(self, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counting)
    assert [recording(str(path), i, "wav") for i in range(70)] == [noise(100, i) for i in range(70)]
    assert read == [0, 1]


def test_recordings_beside_the_file_and_decoded_ones(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(
        pa.table({"audio": pa.array([{"bytes": None, "path": "clips/a.wav"}], kind)}), tmp_path / "a.parquet"
    )
    (row,) = rows_to_encode(tmp_path / "a.parquet")
    assert row.fields["wav_path"] == "clips/a.wav" and "wav_row" not in row.fields
    samples = np.linspace(-0.5, 0.5, 800, dtype=np.float32)
    cell = {"array": samples.tolist(), "sampling_rate": 8000, "path": "x.wav"}
    pq.write_table(pa.table({"audio": [cell]}), tmp_path / "b.parquet")
    (row,) = rows_to_encode(tmp_path / "b.parquet")
    wav = recording(str(tmp_path / "b.parquet"), row.fields["wav_row"], row.fields["wav_column"])
    found, rate = soundfile.read(io.BytesIO(wav), dtype="float32")
    assert rate == 8000 and np.array_equal(found, samples)


def test_of_several_columns_of_recordings_one_has_to_be_named_audio(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"wav": [b"w"], "flac": [b"f"]}), path)
    (row,) = rows_to_encode(path)
    with pytest.raises(
        InputError, match=r"several columns of recordings \(wav, flac\); rename the one to read to audio"
    ):
        recording(str(path), row.fields["wav_row"], row.fields.get("wav_column"))
    pq.write_table(pa.table({"wav": [b"w"], "audio": [b"a"]}), path)
    (row,) = rows_to_encode(path)
    assert recording(str(path), row.fields["wav_row"], row.fields["wav_column"]) == b"a"
    pq.write_table(pa.table({"audio": [b"a"], "wav_path": ["x.wav"]}), path)
    assert rows_to_encode(path)[0].fields == {"wav_path": "x.wav"}  # the row says it itself
