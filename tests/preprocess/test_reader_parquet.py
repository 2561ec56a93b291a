"""Parquet: columns of codes in every layout that writers choose, without becoming Python integers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_speech.errors import InputError
from megatron_speech.preprocess.readers.base import Row
from megatron_speech.preprocess.readers.open import InputFiles

ReadRows = Callable[..., list[Row]]
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
