"""JSON lines: local, compressed and remote files give the same rows, and damage is named."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_speech.errors import InputError
from megatron_speech.preprocess.readers import jsonl
from megatron_speech.preprocess.readers.base import BATCH_ROWS, Row
from megatron_speech.preprocess.readers.jsonl import JsonlBatch, parse_lines, parse_row
from megatron_speech.preprocess.readers.open import InputFiles

ReadRows = Callable[..., list[Row]]


def lines(count: int) -> bytes:
    """Rows with blank lines among them."""
    rows = [json.dumps({"text": f"row {i} é", "i": i}, ensure_ascii=False).encode() for i in range(count)]
    return b"\xef\xbb\xbf" + b"".join(row + (b"\r\n\n  \n" if i % 7 == 0 else b"\n") for i, row in enumerate(rows))


def test_every_way_to_the_same_bytes_gives_the_same_rows(tmp_path: Path, read_rows: ReadRows) -> None:
    data = lines(2000)
    memory = fsspec.filesystem("memory")
    for name, packed in (
        ("a.jsonl", data),
        ("a.jsonl.gz", gzip.compress(data)),
        ("a.jsonl.zst", zstandard.compress(data)),
    ):
        (tmp_path / name).write_bytes(packed)
        memory.pipe(f"/jsonl/{name}", packed)
    expected = read_rows(tmp_path / "a.jsonl")
    assert [row.fields["i"] for row in expected] == list(range(2000))
    assert expected[1].number == 4  # the line in the file, blank ones counted
    for url in (
        tmp_path / "a.jsonl.gz",
        tmp_path / "a.jsonl.zst",
        "memory://jsonl/a.jsonl",
        "memory://jsonl/a.jsonl.gz",
    ):
        assert read_rows(url) == expected
    together = read_rows(tmp_path / "a.jsonl", "memory://jsonl/a.jsonl.zst", tmp_path / "a.jsonl.gz")
    assert together == [*expected, *expected, *expected]


def test_streams_are_counted_only_when_asked_or_passed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(1700)))
    inputs = InputFiles([str(tmp_path / "a.jsonl.gz")])
    assert inputs.known_rows is None
    assert sum(batch.rows for batch in inputs.batches(100, 200)) == 100 and inputs.known_rows is None
    assert sum(batch.rows for batch in inputs.batches(100)) == 1600 and inputs.known_rows == inputs.rows == 1700


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_a_truncated_stream_names_the_row_reached(tmp_path: Path, ending: str) -> None:
    data = lines(3000)
    packed = gzip.compress(data, mtime=0) if ending == "gz" else zstandard.compress(data)
    path = tmp_path / f"a.jsonl.{ending}"
    path.write_bytes(packed[: len(packed) * 3 // 4])
    with pytest.raises(InputError, match=r"is cut off: .*; [\d,]+ rows were read before that; restore the file"):
        list(InputFiles([str(path)]).batches(0))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.tar", "a.tar.gz"])
def test_a_file_of_0_bytes_is_refused_also_among_others(tmp_path: Path, name: str) -> None:
    (tmp_path / "good.jsonl").write_bytes(lines(3))
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=name):
        list(InputFiles([str(tmp_path / "good.jsonl"), str(tmp_path / name)]).batches(0))


def test_a_file_that_shrinks_under_the_readers_hands_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(600))
    batches = list(InputFiles([str(path)]).batches(0))
    path.write_bytes(lines(500))
    with pytest.raises(InputError, match="became shorter while it was read"):
        [batch.read() for batch in batches]


def test_a_file_without_line_ends_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_speech.preprocess.readers.jsonl.MAX_LINE_BYTES", 1000)
    (tmp_path / "a.json").write_text(json.dumps({"text": "x" * 10_000}))
    with pytest.raises(InputError, match="line 1 is longer than"):
        _ = InputFiles([str(tmp_path / "a.json")]).rows


def test_a_byte_order_mark_alone_is_no_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(InputError, match=r"a.jsonl holds no rows"):
        _ = InputFiles([str(tmp_path / "a.jsonl")]).rows


def test_a_large_file_is_not_counted_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_speech.preprocess.readers.jsonl.COUNTED_BYTES", 1000)
    (tmp_path / "a.jsonl").write_bytes(lines(BATCH_ROWS + 700))
    inputs = InputFiles([str(tmp_path / "a.jsonl")])
    batches = inputs.batches(0)
    assert next(batches).rows == BATCH_ROWS and inputs.known_rows is None
    assert sum(batch.rows for batch in batches) == 700 and inputs.known_rows == BATCH_ROWS + 700


REFUSED: dict[bytes, tuple[str, str]] = {
    b'{"a": NaN}': ("not_finite", "NaN is not JSON"),
    b'{"a": -Infinity}': ("not_finite", "-Infinity is not JSON"),
    b'{"a": "\\ud83d"}': ("bad_json", "surrogates not allowed"),
    b'{"a": "\xff"}': ("bad_json", "invalid start byte"),
    b'{"a": "\xed\xa0\x80"}': ("bad_json", "can't decode"),
    b"[" * 100_000: ("bad_json", "nested too deeply"),
    b'{"a": 1} {"b": 2}': ("bad_json", "Extra data"),
    b"[1]": ("bad_json", "holds a list, needed an object"),
    b"3": ("bad_json", "holds a int, needed an object"),
    b"null": ("bad_json", "holds a NoneType"),
    b'{"a": ' + b"9" * 5000 + b"}": ("bad_json", "Exceeds the limit"),
}


@pytest.mark.parametrize("line", REFUSED)
def test_lines_that_are_no_row_say_why(line: bytes) -> None:
    row = parse_row(3, line)
    assert row.number == 3 and row.fields == {} and row.rejected is not None
    rule, reason = REFUSED[line]
    assert row.rejected.rule == rule and reason in row.rejected.reason


def test_integers_keep_every_digit() -> None:
    for number in (2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63) - 1, 10**40 + 1):
        assert parse_row(1, json.dumps({"id": number, "deep": [{"x": number}]}).encode()).fields["id"] == number


LINE = st.sampled_from(
    [
        *(line for line in REFUSED if len(line) < 100),
        *(b'{"text": "x"}', b'{"i": %d}' % 2**64, b'{"a": [1', b"2]}", b'{"a": 1},{"b": 2}', b'{"text": "\\u00e9"}\r'),
        *(b"", b" ", b"\t\r", b"\x0c", b"\xef\xbb\xbf", b"\xc2\xa0", b" {}", b"{}"),
    ]
)


def shown(row: Row) -> tuple[object, ...]:
    """A row, comparable."""
    return row.number, repr(row.fields), row.rejected and (row.rejected.rule, row.rejected.reason), row.notices


@settings(max_examples=300, deadline=None)
@given(st.lists(LINE, max_size=8), st.integers(0, 3), st.integers(0, 8))
def test_lines_are_parsed_together_as_each_alone(lines: list[bytes], skip: int, rows: int) -> None:
    alone = [parse_row(5 + i, line) for i, line in enumerate(lines) if line and not line.isspace()]
    together = parse_lines(b"\n".join(lines), 5, skip, rows)
    assert [shown(row) for row in together] == [shown(row) for row in alone[skip : skip + rows]]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(LINE, max_size=12), st.booleans(), st.booleans(), st.integers(1, 40), st.integers(1, 4), st.integers(1, 60)
)
def test_runs_of_lines_hold_every_row_once_wherever_blocks_and_runs_end(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[bytes],
    mark: bool,
    closed: bool,
    block: int,
    most: int,
    size: int,
) -> None:
    path = tmp_path_factory.mktemp("runs") / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" * mark + b"\n".join(lines) + b"\n" * (closed and bool(lines)))
    if mark and not lines[:1]:
        lines = [b""]
    elif lines and lines[0].startswith(b"\xef\xbb\xbf") and not mark:
        lines = [lines[0][3:], *lines[1:]]
    expected = [parse_row(i, line) for i, line in enumerate(lines, start=1) if line and not line.isspace()]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("_BLOCK_BYTES", block), ("BATCH_ROWS", most), ("BATCH_BYTES", size)):
            patch.setattr(jsonl, name, value)
        reader = jsonl.JsonlReader(str(path))
        if not expected:
            with pytest.raises(InputError, match="holds no rows"):
                _ = reader.rows
            return
        scanned, indexed = list(reader._scan()), list(reader._runs())
    assert scanned == indexed and all(isinstance(run, JsonlBatch) and run.rows <= most for run in scanned)
    assert [shown(row) for run in scanned for row in run.read()] == [shown(row) for row in expected]
    assert all(run.size < size + max(map(len, lines)) + 1 for run in scanned)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(), JSON, max_size=4), st.booleans())
def test_what_the_standard_library_writes_is_read_as_it_reads_it(fields: dict[str, Any], ascii_only: bool) -> None:
    text = json.dumps(fields, ensure_ascii=ascii_only)
    row = parse_row(1, text.encode())
    assert row.rejected is None
    assert json.dumps(row.fields) == json.dumps(json.loads(text))  # types too: 1 is not 1.0 is not true


def test_text_in_every_script_and_control_signs_survive(read_rows: ReadRows, tmp_path: Path) -> None:
    texts = ["नमस्ते", "\u2028\u2029\x85", "\x1c\x0b", "😀", "\x00"]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8", newline=""
    )
    assert [row.fields.get("text") for row in read_rows(tmp_path / "a.jsonl")] == texts
