"""What a conversion refuses, and what it says: one sentence, exit status 2, nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest


def change(**fields: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda row: {**row, **fields}


def without(*names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda row: {name: value for name, value in row.items() if name not in names}


BAD_ROWS: dict[str, tuple[Callable[[dict[str, Any]], Any], str, str]] = {
    "not JSON": (lambda row: "{", "bad_json", "not a line of JSON"),
    "not an object": (lambda row: "[1]", "bad_json", "holds a list, needed an object"),
    "NaN": (lambda row: json.dumps({**row, "start_time": float("nan")}), "not_finite", "NaN is not JSON"),
    "too large a number": (
        lambda row: json.dumps(row)[:-1] + ', "gain": 1e999}',
        "not_finite",
        "holds NaN or infinity",
    ),
    "infinite time": (lambda row: json.dumps(row)[:-1] + ', "end_time": 1e999}', "not_finite", "field end_time is inf"),
    "half a surrogate pair": (
        lambda row: json.dumps({**row, "transcript": "\ud83d"}),
        "bad_json",
        "surrogates not allowed",
    ),
    "no transcript": (without("transcript"), "missing_field", "field transcript is missing"),
    "empty transcript": (change(transcript=" \t "), "empty_text", "field transcript is empty"),
    "transcript a number": (change(transcript=5), "bad_field", "field transcript is 5, needed text"),
    "no language": (without("language"), "missing_field", "field language is missing"),
    "no codes": (without("codes_path"), "missing_field", "field codes_path or codes is missing"),
    "no length": (without("code_len"), "missing_field", "field code_len is missing"),
    "missing file": (change(codes_path="no.npy"), "codes_missing", "no.npy does not exist"),
    "not an npy": (change(codes_path="samples.jsonl"), "codes_unreadable", "is not a readable .npy file"),
    "beyond the end": (change(code_len=10**6), "codes_length", "holds "),
    "negative offset": (change(code_offset=-1), "bad_field", "must not be negative"),
    "fractional order": (change(segment_order=1.5), "bad_field", "field segment_order is 1.5, needed a whole number"),
    "another checksum": (change(checksum="0" * 64), "checksum", "but the row says 0000"),
    "outside its codebook": (
        change(codes=[[1, 2], [3, 64]], code_len=2),
        "code_outside_codebook",
        "code 64 at frame 1",
    ),
    "negative code": (change(codes=[[-1, 2]], code_len=1), "code_outside_codebook", "code -1 at frame 0"),
    "fractional codes": (change(codes=[[1.0, 2.0]], code_len=1), "codes_shape", "float64 of shape [1, 2]"),
    "one codebook short": (change(codes=[[1], [2]], code_len=2), "codes_shape", "needed integers [frames, 2]"),
    "ragged codes": (change(codes=[[1, 2], [3]], code_len=2), "codes_shape", "frames differ in length"),
    "no frames": (change(codes=[], code_len=0), "codes_empty", "holds no frames"),
    "another length": (change(codes=[[1, 2]], code_len=2), "codes_length", "holds 1 frames, but code_len is 2"),
}


def test_bad_rows_are_counted_by_rule_and_written_with_their_reason(corpus: Any) -> None:
    rows: list[Any] = list(corpus.rows)
    for i, (spoil, _, _) in enumerate(BAD_ROWS.values()):
        rows[2 * i] = spoil(rows[2 * i])
    corpus.write(rows)
    dataset = corpus.convert("tts", "--max-rejected", 0.5)
    rejected = [json.loads(line) for line in corpus.files()["rejected.jsonl"].splitlines()]
    for i, (found, (name, (_, rule, reason))) in enumerate(zip(rejected, BAD_ROWS.items(), strict=True)):
        assert found["line"] == 2 * i + 1 and found["rule"] == rule, (name, found)
        assert reason in found["reason"], (name, found)
    filters = dataset.manifest.filters
    assert sum(filters.dropped.values()) == len(BAD_ROWS) and filters.kept == len(dataset) == 60 - len(BAD_ROWS)


def test_bad_text_rows_are_rejected(corpus: Any) -> None:
    rows = [
        {"text": ""},
        {"content": "x"},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": []},
        {"turns": [["user", ""]]},
        {"turns": [["user"]]},
        {"text": "fine"},
    ]
    path = corpus.write(rows, "text.jsonl")
    dataset = corpus.convert("text_lm", "--max-rejected", 0.9, inputs=[path])
    assert len(dataset) == 1
    assert dataset.manifest.filters.dropped == {"bad_turns": 3, "empty_text": 2, "missing_field": 1}


def test_bad_cells_of_a_parquet_file_are_rejected(corpus: Any) -> None:
    rows = [{key: row[key] for key in ("sample_id", "transcript", "language", "speaker_id")} for row in corpus.rows[:6]]
    column = pa.array([[[1, 2]], [[1, None]], [[1, 2], [3]], [], None, [[511, 63]]], pa.list_(pa.list_(pa.int32())))
    times = pa.array([0.5, 0, 0, 0, 0, float("nan")], pa.float64())
    table = pa.Table.from_pylist(rows).append_column("codes", column).append_column("start_time", times)
    pq.write_table(table, corpus.folder / "s.parquet")
    dataset = corpus.convert("tts", "--max-rejected", 0.9, inputs=[corpus.folder / "s.parquet"])
    assert dataset.columns("sample_id")["sample_id"].to_pylist() == ["s0"]
    dropped = {"codes_empty": 1, "codes_shape": 2, "missing_field": 1, "not_finite": 1}
    assert dataset.manifest.filters.dropped == dropped


def test_more_bad_rows_than_allowed_leave_no_output(corpus: Any, capsys: pytest.CaptureFixture[str]) -> None:
    corpus.write([*corpus.rows, "{"])
    assert corpus.run("tts") == 2  # 1 of 61 is more than 1 %
    error = capsys.readouterr().err
    assert error.startswith("error: 1 of the 61 rows") and "bad_json 1" in error and "samples.jsonl line 61" in error
    assert corpus.left() == []


def test_refused_input_leaves_the_dataset_that_was_there(corpus: Any) -> None:
    corpus.convert("tts")
    before = corpus.files()
    corpus.write(["{"])
    assert corpus.run("tts") == 2
    assert corpus.files() == before


def test_an_input_without_a_usable_row_is_refused(corpus: Any, capsys: pytest.CaptureFixture[str]) -> None:
    corpus.write([{**row, "codes_path": "no.npy"} for row in corpus.rows])
    assert corpus.run("tts", "--max-rejected", 1) == 2
    assert "no row is left" in capsys.readouterr().err
    assert corpus.left() == []


def test_a_tokenizer_that_yields_nothing_is_named(
    corpus: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_speech.tokens.space import TokenSpace

    # A tokenizer that knows nothing of these texts; building a space with one that knows nothing at all is refused.
    monkeypatch.setattr(TokenSpace, "encode_text_batch", lambda self, texts: [np.zeros(0, np.int32) for _ in texts])
    assert corpus.run("tts") == 2
    assert "the text tokenizer yields nothing" in capsys.readouterr().err
    assert corpus.left() == []


REFUSALS: dict[str, tuple[tuple[str, ...], str]] = {
    "missing input": (("--input", "{folder}/no.jsonl"), "no.jsonl does not exist"),
    "a folder": (("--input", "{folder}"), "is a folder"),
    "tar shards": (("--input", "{folder}/codes.tar"), "codes.tar is empty (0 bytes)"),
    "codes alone": (("--input", "{folder}/codes.npy"), "is codes without the samples' fields; name "),
    "compressed": (("--input", "{folder}/s.jsonl.gz"), "is empty (0 bytes), needed a gzip stream"),
    "empty input": (("--input", "{folder}/empty.jsonl"), "holds no rows"),
    "not parquet": (("--input", "{folder}/bad.parquet"), "is not a readable parquet file"),
    "no token space": (("--token-space", "{folder}/no.json"), "no.json does not exist"),
    "not a token space": (("--token-space", "{folder}/other.json"), "other.json"),
    "shard out of range": (("--shard", "3/3"), "--shard is '3/3', needed I/N"),
    "shard of nothing": (("--shard", "0/1000"), "holds none of the 60 rows"),
    "no workers": (("--workers", "0"), "--workers is 0, needed 1 to"),
    "a share above one": (("--max-rejected", "2"), "--max-rejected is 2.0, needed 0 to 1"),
    "a flag of another task": (("--continuation",), "--continuation is only for --task speech_lm"),
    "references without cloning": (("--references", "2"), "--references is only for --cloning same-speaker"),
    "a folder as prefix": (("--output-prefix", "{folder}/out/"), "names a folder; name a prefix in it"),
    "output on a file": (("--output-prefix", "{folder}/ts.json/p"), "cannot write to"),
    "output over a folder": (("--output-prefix", "{folder}/taken"), "a folder of that name exists"),
    "output over the input": (
        ("--output-prefix", "{folder}/in", "--input", "{folder}/in.rejected.jsonl"),
        "overwritten",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_unusable_arguments_are_refused(corpus: Any, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = corpus.folder
    for file in ("empty.jsonl", "codes.tar", "s.jsonl.gz", "bad.parquet", "in.rejected.jsonl"):
        (folder / file).write_bytes(b"")
    (folder / "other.json").write_text("{}")
    (folder / "taken.bin").mkdir()
    flags, message = REFUSALS[name]
    before = sorted(path.name for path in folder.rglob("*"))
    assert corpus.run("tts", *(flag.format(folder=folder) for flag in flags)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert [name for name in sorted(path.name for path in folder.rglob("*")) if name not in before] in ([], ["out"])


def test_codes_of_another_codec_are_refused_with_both_hashes(corpus: Any, capsys: pytest.CaptureFixture[str]) -> None:
    corpus.write([*corpus.rows[:-1], {**corpus.rows[-1], "codec_hash": "e" * 64}])
    for flags in (("tts",), ("tts", "--cloning", "same-speaker"), ("speech_lm",)):
        assert corpus.run(*flags, "--max-rejected", 1) == 2
        error = capsys.readouterr().err
        assert "line 60: codec_hash is " + "e" * 64 in error and "needed " + "c" * 64 in error
        assert corpus.left() == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused_before_the_work(corpus: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (corpus.folder / "out").mkdir(mode=0o555)
    assert corpus.run("tts") == 2
    assert "cannot write to" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_script_exits_2_with_one_sentence_from_anywhere(make_corpus: Any, repository: Path, workers: str) -> None:
    corpus = make_corpus(1100)
    corpus.write([{**row, "codes": [[512, 0]], "code_len": 1} for row in corpus.rows])
    arguments = corpus.arguments("tts")
    arguments[arguments.index("--workers") + 1] = workers
    script = repository / "preprocess" / "preprocess_data.py"
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "code 512 at frame 0 is outside codebook 'a' (0 to 511)" in done.stderr
    assert corpus.left() == []


@pytest.mark.slow
def test_help_names_units_and_defaults(repository: Path) -> None:
    for script in ("preprocess_data.py", "merge_datasets.py"):
        done = subprocess.run(
            [sys.executable, repository / "preprocess" / script, "--help"], capture_output=True, text=True, check=True
        )
        assert "--output-prefix" in done.stdout
