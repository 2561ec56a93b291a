"""Rows to documents: what each task's documents hold, and that nothing but the input and the seed decides the bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_speech.data.dataset.indexed import TokenDataset
from megatron_speech.data.dataset.verify import verify_dataset
from megatron_speech.files import sha256_hex
from megatron_speech.tokens.space import TokenSpace
from megatron_speech.tokens.templates import compile_document, render


def table(dataset: TokenDataset) -> list[dict[str, Any]]:
    return dataset.columns().to_pylist()


# ---- documents


def test_plain_pairs_are_compiled_row_by_row(corpus: Any) -> None:
    dataset = corpus.convert("tts")
    rows = table(dataset)
    assert len(dataset) == len(corpus.rows)
    for i, (row, codes) in enumerate(zip(corpus.rows, corpus.codes, strict=True)):
        text = unicodedata.normalize("NFC", f"utterance number {i} é")  # one space of the two
        expected = compile_document(
            corpus.space, "tts", text_ids=corpus.space.encode_text(text), code_ids=corpus.space.encode_codes(codes)
        )
        assert np.array_equal(dataset.document(i), expected)
        for name in ("sample_id", "source_id", "segment_order", "speaker_id", "language", "dataset_source"):
            assert rows[i][name] == row[name]
        assert rows[i]["transcript_native"] == row["transcript"]
        assert rows[i]["checksum"] == sha256_hex(codes.astype("<i4").tobytes())
        assert rows[i]["audio_tokens"] == 2 * len(codes) and rows[i]["code_len"] == len(codes)
        assert rows[i]["target_tokens"] == 2 * len(codes) + 1
        assert rows[i]["duration_seconds"] == len(codes) / 25
        assert json.loads(rows[i]["extra"]) == {"mood": row["mood"]}


def test_manifest_adds_up(corpus: Any) -> None:
    dataset = corpus.convert("tts", "--split-seed", 7, "--seed", 3)
    manifest, rows = dataset.manifest, table(dataset)
    frames = sum(map(len, corpus.codes))
    assert manifest.split_seed == 7 and manifest.seed == 3
    assert manifest.totals.seconds == frames / 25 and manifest.totals.audio_tokens == 2 * frames
    for field, groups in (("language", manifest.languages), ("dataset_source", manifest.sources)):
        assert Counter(row[field] for row in rows) == {name: total.documents for name, total in groups.items()}
        assert sum(total.tokens for total in groups.values()) == manifest.tokens == dataset.total_tokens
    assert manifest.filters.rows == manifest.filters.kept == 60 and manifest.filters.dropped == {}


def test_speech_lm_needs_no_transcript(corpus: Any) -> None:
    corpus.write([{key: value for key, value in row.items() if "transcript" not in key} for row in corpus.rows])
    dataset = corpus.convert("speech_lm")
    expected = compile_document(corpus.space, "speech_lm", code_ids=corpus.space.encode_codes(corpus.codes[5]))
    assert np.array_equal(dataset.document(5), expected)


def test_append_eod_ends_every_document(corpus: Any) -> None:
    dataset = corpus.convert("speech_lm", "--append-eod")
    ends = dataset.tokens[dataset.offsets + dataset.lengths - 1]
    assert set(ends.tolist()) == {corpus.space.special("<eos>")}


def test_continuation_prompts_with_the_segment_before(corpus: Any) -> None:
    rows = [row for row in corpus.rows if row["sample_id"] != "s4"]  # a gap: s5 has no neighbour any more
    corpus.write(rows)
    dataset = corpus.convert("speech_lm", "--continuation")
    prompts = {row["sample_id"]: row["reference_sample_id"] for row in table(dataset)}
    for i in range(60):
        if i != 4:
            expected = None if i % 3 == 0 or i == 5 else f"s{i - 1}"
            assert prompts[f"s{i}"] == expected
    i = next(i for i, row in enumerate(rows) if row["sample_id"] == "s8")
    encode = corpus.space.encode_codes
    expected = compile_document(
        corpus.space, "speech_lm", prompt_code_ids=encode(corpus.codes[7]), code_ids=encode(corpus.codes[8])
    )
    assert np.array_equal(dataset.document(i), expected)
    assert dataset.manifest.forms == {"continuation": 38, "plain": 21}


def test_continuation_does_not_cross_speakers(corpus: Any) -> None:
    corpus.write([{**row, "speaker_id": f"speaker{i}"} for i, row in enumerate(corpus.rows)])
    assert corpus.convert("speech_lm", "--continuation").manifest.forms == {"plain": 60}


def test_a_reference_is_another_recording_of_the_same_speaker(corpus: Any) -> None:
    dataset = corpus.convert("tts", "--cloning", "same-speaker", "--references", 2)
    by_id = {row["sample_id"]: (row, codes) for row, codes in zip(corpus.rows, corpus.codes, strict=True)}
    used: dict[str, list[str]] = {}
    for i, row in enumerate(table(dataset)):
        target, codes = by_id[row["sample_id"]]
        reference, reference_codes = by_id[row["reference_sample_id"]]
        assert reference["speaker_id"] == target["speaker_id"]
        assert reference["dataset_source"] == target["dataset_source"]
        assert reference["source_id"] != target["source_id"]
        used.setdefault(row["sample_id"], []).append(reference["source_id"])
        number = int(reference["sample_id"][1:])
        expected = compile_document(
            corpus.space,
            "tts",
            text_ids=corpus.space.encode_text(f"utterance number {row['sample_id'][1:]} é"),
            code_ids=corpus.space.encode_codes(codes),
            ref_text_ids=corpus.space.encode_text(f"utterance number {number} é"),
            ref_code_ids=corpus.space.encode_codes(reference_codes),
        )
        assert np.array_equal(dataset.document(i), expected)
    assert len(used) == 60
    assert all(len(sources) == len(set(sources)) == 2 for sources in used.values())


def test_references_prefer_the_language_of_the_target(corpus: Any) -> None:
    dataset = corpus.convert("tts", "--cloning", "same-speaker")
    language = {row["sample_id"]: row["language"] for row in corpus.rows}
    sources: dict[tuple[str, str], set[str]] = {}
    for row in corpus.rows:
        sources.setdefault((row["speaker_id"], row["language"]), set()).add(row["source_id"])
    checked = 0
    for row in table(dataset):
        if len(sources[row["speaker_id"], row["language"]]) > 1:
            assert language[row["reference_sample_id"]] == row["language"]
            checked += 1
    assert checked > 20


def test_variants_of_a_recording_are_no_references_of_each_other(corpus: Any) -> None:
    rows = [{**row, "source_id": f"recording{i // 30}", "speaker_id": "one"} for i, row in enumerate(corpus.rows)]
    rows = [{**row, "dataset_source": "toy", "language": "en"} for row in rows]
    corpus.write(rows)
    dataset = corpus.convert("tts", "--cloning", "same-speaker", "--references", 3)
    assert len(dataset) == 60  # one other recording: one reference, however many variants it has
    for row in table(dataset):
        assert (int(row["sample_id"][1:]) < 30) != (int(row["reference_sample_id"][1:]) < 30)


def test_samples_without_a_partner_are_plain_or_dropped(corpus: Any) -> None:
    rows = [dict(row) for row in corpus.rows]
    del rows[0]["speaker_id"]
    rows[1]["speaker_id"] = "lonely"
    corpus.write(rows)
    manifest = corpus.convert("tts", "--cloning", "same-speaker").manifest
    assert manifest.forms == {"cloning": 58, "plain": 2} and manifest.notices == {"rows_without_reference": 2}
    manifest = corpus.convert("tts", "--cloning", "same-speaker", "--without-reference", "drop").manifest
    assert manifest.forms == {"cloning": 58}
    assert manifest.filters.dropped == {"no_reference": 2} and manifest.filters.kept == 58
    listed = [json.loads(line) for line in corpus.files()["rejected.jsonl"].splitlines()]
    assert [(row["sample_id"], row["rule"], row["filtered"]) for row in listed] == [
        ("s0", "no_reference", True),
        ("s1", "no_reference", True),
    ]


def test_an_unusable_reference_is_replaced_by_another(corpus: Any) -> None:
    rows = [dict(row) for row in corpus.rows]
    for i in range(0, 60, 3):  # every third utterance cannot be read, which shows only when its codes are
        rows[i] |= {"codes_path": "nowhere.npy"}
    corpus.write(rows)
    dataset = corpus.convert("tts", "--cloning", "same-speaker", "--max-rejected", 0.5)
    assert dataset.manifest.filters.dropped == {"codes_missing": 20}
    assert all(int(row["reference_sample_id"][1:]) % 3 for row in table(dataset) if row["reference_sample_id"])
    assert dataset.manifest.forms["cloning"] >= 36


def test_plain_fraction_keeps_that_share_plain(make_corpus: Any) -> None:
    manifest = make_corpus(600).convert("tts", "--cloning", "same-speaker", "--plain-fraction", 0.3).manifest
    assert 140 < manifest.forms["plain"] < 220
    assert manifest.forms["plain"] + manifest.forms["cloning"] == 600


def test_other_transcripts_are_used_only_when_asked_for(corpus: Any) -> None:
    dataset = corpus.convert("tts", "--transcript", "romanized")
    assert "<target_text> romanized 3 </target_text>" in render(corpus.space, dataset.document(3))
    assert table(dataset)[3]["transcript_romanized"] == "romanized 3"


# ---- text


def test_text_keeps_lines_and_conversations_keep_turns(corpus: Any) -> None:
    path = corpus.write(
        [
            {"text": "  one\ttwo \n\n\n\n three\r\nfour ", "url": "x"},
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
            {"turns": [["user", "Bye"]], "language": "fr"},
        ],
        "text.jsonl",
    )
    dataset = corpus.convert("text_lm", inputs=[path])
    shown = [render(corpus.space, dataset.document(i)) for i in range(3)]
    assert shown == [
        "<bos> one two\n\nthree\nfour <eos>",
        "<bos> <user> Hi </user> <assistant> Hello </assistant>",
        "<bos> <user> Bye </user>",
    ]
    rows = table(dataset)
    assert [row["language"] for row in rows] == ["und", "und", "fr"]
    assert rows[0]["extra"] == '{"url":"x"}' and rows[0]["dataset_source"] == "text"
    assert dataset.manifest.forms == {"plain": 1, "turns": 2}
    assert [row["text_tokens"] for row in rows] == [19, 7, 3]


def test_json_keys_give_a_document_each(corpus: Any) -> None:
    path = corpus.write([{"title": "T", "body": "B", "text": "unused"}], "text.jsonl")
    dataset = corpus.convert(
        "text_lm", "--json-keys", "title", "body", "--language", "en", "--source", "w", inputs=[path]
    )
    assert [render(corpus.space, dataset.document(i)) for i in range(2)] == ["<bos> T <eos>", "<bos> B <eos>"]
    assert dataset.manifest.languages["en"].documents == dataset.manifest.sources["w"].documents == 2


# ---- readers


def test_codes_come_from_one_file_each_from_lists_and_from_parquet_alike(corpus: Any) -> None:
    reference = corpus.convert("tts")
    without = [
        {key: value for key, value in row.items() if key not in ("codes_path", "code_offset")} for row in corpus.rows
    ]
    for i, codes in enumerate(corpus.codes):
        np.save(corpus.folder / f"{i}.npy", codes)
    single = corpus.write([{**row, "codes_path": f"{i}.npy"} for i, row in enumerate(without)], "single.jsonl")
    inline = corpus.write([{**row, "codes": corpus.codes[i].tolist()} for i, row in enumerate(without)], "inline.jsonl")
    paths = corpus.folder / "paths.parquet"
    pq.write_table(pa.Table.from_pylist(corpus.rows), paths, row_group_size=17)
    lists = corpus.folder / "lists.parquet"
    column = pa.array([codes.tolist() for codes in corpus.codes], pa.list_(pa.list_(pa.uint16())))
    pq.write_table(pa.Table.from_pylist(without).append_column("codes", column), lists, row_group_size=23)
    for path in (single, inline, paths, lists):
        dataset = corpus.convert("tts", prefix=f"out/{path.name}", inputs=[path])
        assert np.array_equal(dataset.tokens, reference.tokens), path
        assert dataset.columns().equals(reference.columns()), path
    both = corpus.convert("tts", "--cloning", "same-speaker", prefix="out/two", inputs=[lists])
    files = corpus.convert("tts", "--cloning", "same-speaker", prefix="out/three", inputs=[corpus.samples])
    assert np.array_equal(both.tokens, files.tokens)


def test_one_codebook_takes_flat_codes(tmp_path: Path) -> None:
    from megatron_speech.preprocess import preprocess_data
    from megatron_speech.tokens.space import CodecDescription

    space = TokenSpace.build("bytes", CodecDescription("flat", "f" * 64, 16000, 50.0, ("codes",), (70_000,)))
    space.save(tmp_path / "ts.json")
    np.save(tmp_path / "a.npy", np.arange(69_990, 70_000))
    (tmp_path / "s.jsonl").write_text(
        '{"codes_path": "a.npy", "language": "en"}\n{"codes": [1, 2, 69999], "language": "en"}\n'
    )
    rows = pa.table({"codes": pa.array([[5, 6]], pa.list_(pa.int32())), "language": ["en"]})
    pq.write_table(rows, tmp_path / "s.parquet")
    arguments = ["--task", "speech_lm", "--token-space", f"{tmp_path}/ts.json", "--output-prefix", f"{tmp_path}/p"]
    inputs = ["--input", f"{tmp_path}/s.jsonl", f"{tmp_path}/s.parquet", "--workers", "1"]
    assert preprocess_data.main([*arguments, *inputs]) == 0
    dataset = TokenDataset(tmp_path / "p")
    assert dataset.dtype == np.int32 and dataset.manifest is not None
    decoded = [space.decode_codes(dataset.document(i)[2:-1])[:, 0].tolist() for i in range(3)]
    assert decoded == [list(range(69_990, 70_000)), [1, 2, 69_999], [5, 6]]
    assert dataset.manifest.notices == {"rows_without_codec_hash": 3}


# ---- invariance


@pytest.mark.slow
def test_bytes_do_not_depend_on_workers(make_corpus: Any, repository: Path) -> None:
    flags = ("tts", "--cloning", "same-speaker", "--references", "2")
    corpus = make_corpus(2600)  # several batches for each worker
    rows: list[Any] = list(corpus.rows)
    rows[700] = "not json"
    rows[2000] = {**rows[2000], "code_offset": 10**9}
    corpus.write(rows)
    corpus.convert(*flags, prefix="out/one")
    arguments = corpus.arguments(*flags, prefix="elsewhere/one")
    arguments[arguments.index("--workers") + 1] = "3"
    script = repository / "preprocess" / "preprocess_data.py"
    subprocess.run([sys.executable, script, *arguments], check=True, capture_output=True, cwd=corpus.folder)
    one, three = corpus.files("out/one"), corpus.files("elsewhere/one")
    assert set(one) == {"bin", "idx", "docs.parquet", "manifest.json", "rejected.jsonl"}
    assert one == three
    rejected = [json.loads(line) for line in one["rejected.jsonl"].splitlines()]
    assert [(row["line"], row["rule"]) for row in rejected] == [(701, "bad_json"), (2001, "codes_length")]


def test_references_depend_on_the_seed_and_not_on_the_order_of_rows(corpus: Any) -> None:
    def references(*flags: object) -> dict[str, str]:
        dataset = corpus.convert("tts", "--cloning", "same-speaker", *flags)
        return {row["sample_id"]: row["reference_sample_id"] for row in table(dataset)}

    first = references()
    assert references("--seed", 1) != first
    corpus.write(corpus.rows[::-1])
    assert references() == first


def test_running_again_replaces_the_dataset_and_its_rejected_rows(corpus: Any) -> None:
    corpus.write([*corpus.rows, "{"])
    corpus.convert("tts", "--max-rejected", 0.5)
    assert "rejected.jsonl" in corpus.files()
    corpus.write(corpus.rows)
    corpus.convert("tts")
    first = corpus.files()
    assert "rejected.jsonl" not in first
    corpus.convert("tts")
    assert corpus.files() == first
    assert not [name for name in corpus.left() if name.startswith(".")]


def test_blank_lines_and_a_byte_order_mark_are_no_rows(corpus: Any) -> None:
    before = corpus.convert("tts", prefix="out/before")
    lines = corpus.samples.read_bytes().split(b"\n")
    corpus.samples.write_bytes(b"\xef\xbb\xbf" + b"\n  \n\n".join(lines[:-1]))  # no newline at the end either
    after = corpus.convert("tts", prefix="out/after")
    assert np.array_equal(before.tokens, after.tokens)
    assert after.manifest.filters.rows == 60


# ---- dry run, interruption


def test_dry_run_shows_documents_and_writes_nothing(corpus: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert corpus.run("tts", "--dry-run", "--cloning", "same-speaker") == 0
    text = capsys.readouterr().out
    assert "document 2: <bos> <ref_text> utterance number" in text
    assert "language hi" in text and "source other" in text and "nothing was written" in text
    assert corpus.left() == []


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_a_stopped_conversion_leaves_no_dataset(make_corpus: Any, repository: Path, stop: signal.Signals) -> None:
    corpus = make_corpus(1100)
    gate = corpus.folder / "gate.npy"
    os.mkfifo(gate)  # a worker that opens it waits for a writer: the conversion stands still in the middle
    last = {key: value for key, value in corpus.rows[-1].items() if key not in ("code_offset", "code_len")}
    corpus.write([*corpus.rows[:-1], {**last, "codes_path": gate.name}])
    arguments = corpus.arguments("speech_lm")
    arguments[arguments.index("--workers") + 1] = "2"
    script = repository / "preprocess" / "preprocess_data.py"
    process = subprocess.Popen([sys.executable, script, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    with open(gate, "wb"):
        assert corpus.left() == [".data.partial"]
        process.send_signal(stop)
        gate.unlink()  # a reader that looks a second time shall not wait again
        if stop == signal.SIGKILL:
            # Its workers hold the pipe too: this ends only when none outlives it.
            process.communicate(timeout=60)
    process.communicate(timeout=60)
    assert process.returncode == (-9 if stop == signal.SIGKILL else 130)
    assert corpus.files() == {}
    assert corpus.left() == [".data.partial"]
    corpus.write(corpus.rows)
    corpus.convert("speech_lm")  # of another input: what was kept is cleared up
    assert not [name for name in corpus.left() if name.startswith(".")]


def test_two_writers_of_one_output_are_told_apart(corpus: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_speech.data.dataset.dataset_writer import DatasetWriter

    with DatasetWriter(corpus.folder / "out" / "data", np.uint16):
        assert corpus.run("tts") == 2
        assert "another process is writing" in capsys.readouterr().err
    corpus.convert("tts")


# ---- real recordings


@pytest.mark.slow
def test_real_recordings_from_wav_to_documents(fsdd: Path, tmp_path: Path, repository: Path) -> None:
    pytest.importorskip("pycodec2", reason="the Codec2 codec is an extra")
    from megatron_speech.codecs import describe_codec
    from megatron_speech.preprocess import preprocess_data

    rows = [json.loads(line) for line in fsdd.read_text().splitlines()][::25]
    with open(tmp_path / "samples.jsonl", "w") as handle:
        for row in rows:
            handle.write(json.dumps({**row, "wav_path": str(fsdd.parent / row["wav_path"])}) + "\n")
    encode = [sys.executable, repository / "preprocess" / "encode_audio.py", "--codec", "codec2", "--workers", "1"]
    files = ["--input", tmp_path / "samples.jsonl", "--output-dir", tmp_path / "codes"]
    subprocess.run([*encode, *files], check=True, capture_output=True)
    space = TokenSpace.build("bytes", describe_codec("codec2"))
    space.save(tmp_path / "ts.json")
    arguments = ["--task", "tts", "--cloning", "same-speaker", "--token-space", f"{tmp_path}/ts.json", "--workers", "1"]
    files = ["--input", f"{tmp_path}/codes/samples.jsonl", "--output-prefix", f"{tmp_path}/digits"]
    assert preprocess_data.main([*arguments, *files]) == 0
    dataset = TokenDataset(tmp_path / "digits")
    verify_dataset(dataset.prefix, require_manifest=dataset.manifest is not None).require()
    assert len(dataset) == len(rows) and dataset.manifest is not None
    assert dataset.manifest.forms == {"cloning": len(rows)}
    # The recordings lie outside of the folder of their list.
    assert dataset.manifest.notices == {"source_id:absolute path outside the list's folder": len(rows)}
    assert dataset.manifest.sources["fsdd"].seconds == pytest.approx(sum(row["duration"] for row in rows), rel=0.2)
