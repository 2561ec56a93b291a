"""A batch gives the documents, table and counts that its rows give one by one, whatever the rows hold."""

from __future__ import annotations

import json
import unicodedata
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_speech.data.dataset.split import name_hash
from megatron_speech.files import sha256_hex
from megatron_speech.preprocess.columns import VALUES, read_samples
from megatron_speech.preprocess.compile_batch import compile_batch
from megatron_speech.preprocess.documents import ConversionJob, Converter, Documents, Work
from megatron_speech.preprocess.filters import Filters
from megatron_speech.preprocess.readers.base import Row, RowRejected
from megatron_speech.preprocess.samples import SampleRules
from megatron_speech.tokens.normalization import (
    normalize_document,
    normalize_documents,
    normalize_transcript,
    normalize_transcripts,
)
from megatron_speech.tokens.space import CodecDescription, TokenSpace
from megatron_speech.tokens.templates import TEMPLATES, compile_document, count_target_tokens

ONE = TokenSpace.build("bytes", CodecDescription("one", "1" * 64, 16000, 50.0, ("a",), (70_000,)))
TWO = TokenSpace.build("bytes", CodecDescription("two", "2" * 64, 8000, 25.0, ("a", "b"), (512, 64)))


class Rows:
    """A batch of rows that are there already."""

    def __init__(self, fields: list[Any], path: str = "/nowhere/corpus.jsonl") -> None:
        self.path = path
        self.rows = len(fields)
        self._rows = [
            value if isinstance(value, Row) else Row(number, value) for number, value in enumerate(fields, start=1)
        ]

    def read(self) -> list[Row]:
        return self._rows


def convert(space: TokenSpace, task: str, fields: list[Any], **job: Any) -> Documents:
    rules = SampleRules(task, language="und")
    return Converter(ConversionJob(space, rules, **job)).convert(Work(Rows(fields)))


NOT_SURROGATE = st.characters(exclude_categories=["Cs"])
TEXT = st.text(NOT_SURROGATE, max_size=12)
ODD = st.one_of(st.none(), st.just(""), st.integers(-3, 3), st.just(10**400), st.floats(), st.booleans(), TEXT)
CODES = st.one_of(
    st.lists(st.integers(-1, 520), max_size=4),
    st.lists(st.lists(st.integers(0, 63), min_size=2, max_size=2), max_size=4),
    st.lists(st.lists(st.integers(-1, 70), min_size=1, max_size=3), max_size=3),
    st.just([2**63 + 5]),
    ODD,
)
ROW = st.fixed_dictionaries(
    {},
    optional={
        "text": st.one_of(TEXT, ODD),
        "transcript": st.one_of(TEXT, ODD),
        "transcript_native": st.one_of(TEXT, ODD),
        "language": st.one_of(st.sampled_from(["hi", "en"]), ODD),
        "sample_id": st.one_of(TEXT, ODD),
        "source_id": st.one_of(TEXT, ODD),
        "dataset_source": st.one_of(st.sampled_from(["x", "y"]), ODD),
        "speaker_id": ODD,
        "speaker": st.one_of(TEXT, ODD),
        "sentence": st.one_of(TEXT, ODD),
        "lang": st.one_of(st.sampled_from(["hi", "en"]), ODD),
        "id": st.one_of(TEXT, ODD),
        "offset": st.one_of(st.floats(0, 9), ODD),
        "duration": ODD,
        "segment_order": ODD,
        "start_time": ODD,
        "code_len": st.one_of(st.integers(0, 4), ODD),
        "checksum": st.one_of(st.none(), TEXT),
        "codes": CODES,
        "text_ids": st.one_of(st.none(), st.lists(st.integers(-1, 258), max_size=4)),
        "messages": st.one_of(st.none(), st.just([["user", "hi"], ["assistant", "yes"]]), ODD),
        "mood": st.one_of(ODD, st.dictionaries(TEXT, ODD, max_size=2), st.lists(ODD, max_size=2)),
    },
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(task=st.sampled_from(["speech_lm", "tts", "text_lm"]), fields=st.lists(ROW, max_size=6))
def test_columns_hold_what_each_row_gives_alone(task: str, fields: list[dict[str, Any]]) -> None:
    rules = SampleRules(task, language="und")
    rows = Rows(fields).read()
    samples = read_samples(rules, rows, "/a/corpus.jsonl")
    for i, row in enumerate(rows):
        try:
            expected = rules.sample(row, "/a/corpus.jsonl")
        except RowRejected as error:
            assert (samples.rejected[i].rule, samples.rejected[i].reason) == (error.rule, error.reason)
            continue
        assert i not in samples.rejected
        for name in VALUES:
            assert repr(getattr(samples, name)[i]) == repr(getattr(expected, name)), name


@pytest.mark.slow
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    space=st.sampled_from([ONE, TWO]),
    task=st.sampled_from(["speech_lm", "tts", "text_lm"]),
    fields=st.lists(ROW, min_size=1, max_size=8),
    append_eod=st.booleans(),
)
def test_a_batch_gives_what_its_rows_give_one_by_one(
    space: TokenSpace, task: str, fields: list[dict[str, Any]], append_eod: bool
) -> None:
    fields = [{"sample_id": f"s{i}", **row} for i, row in enumerate(fields)]
    together = convert(space, task, fields, append_eod=append_eod)
    alone = [convert(space, task, [Row(i, row)], append_eod=append_eod) for i, row in enumerate(fields, start=1)]
    assert np.array_equal(together.flat, np.concatenate([one.flat for one in alone]))
    assert together.table.to_pylist() == [row for one in alone for row in one.table.to_pylist()]
    assert together.rejected == [row for one in alone for row in one.rejected]
    for name in ("dropped", "notices", "forms"):
        assert getattr(together, name) == sum((getattr(one, name) for one in alone), Counter())
    assert together.kept == sum(one.kept for one in alone) == len(fields) - len(together.rejected)
    begin = 0
    for row, length in zip(together.table.to_pylist(), together.lengths.tolist(), strict=True):
        document = together.flat[begin : begin + length]
        assert row["tokens"] == length and row["target_tokens"] == count_target_tokens(space, document)
        assert row["crc32"] == zlib.crc32(document.tobytes())
        assert row["split_hash"] == int(name_hash(pa.array([row["source_id"] or row["sample_id"]]))[0])
        begin += length


ARRAY = st.lists(st.integers(0, 200), max_size=5).map(lambda ids: np.array(ids, np.int32))


@settings(max_examples=80, deadline=None)
@given(data=st.data(), task=st.sampled_from(["speech_lm", "tts", "text_lm"]), append_eod=st.booleans())
def test_compiling_a_batch_is_compiling_each_document(data: st.DataObject, task: str, append_eod: bool) -> None:
    names = {"{text}": "text_ids", "{codes}": "code_ids", "{prompt_codes}": "prompt_code_ids",
             "{ref_text}": "ref_text_ids", "{ref_codes}": "ref_code_ids"}  # fmt: skip
    kinds = [form for form in TEMPLATES[task] if form != "turns"]
    forms = data.draw(st.lists(st.sampled_from(kinds), max_size=5))
    fields: dict[str, list[np.ndarray | None]] = {
        part: [] for form in kinds for part in TEMPLATES[task][form] if part.startswith("{")
    }
    expected = []
    for form in forms:
        mine = {}
        for part, column in fields.items():
            column.append(data.draw(ARRAY) if part in TEMPLATES[task][form] else None)
            if column[-1] is not None:
                mine[names[part]] = column[-1]
        expected.append(compile_document(ONE, task, append_eod=append_eod, **mine))
    compiled = compile_batch(ONE, task, forms, fields, append_eod=append_eod)
    assert compiled.flat.tolist() == [token for document in expected for token in document.tolist()]
    assert compiled.tokens.tolist() == [len(document) for document in expected]
    assert compiled.target.tolist() == [count_target_tokens(ONE, document) for document in expected]


# ---- codes


def test_npy_files_of_every_kind_give_the_same_codes(tmp_path: Path) -> None:
    codes = np.arange(12).reshape(6, 2)
    np.save(tmp_path / "int64.npy", codes)
    np.save(tmp_path / "big-endian.npy", codes.astype(">i2"))
    np.save(tmp_path / "columns.npy", np.asfortranarray(codes.astype(np.uint8)))
    with open(tmp_path / "version2.npy", "wb") as handle:
        np.lib.format.write_array(handle, codes.astype(np.uint64), version=(2, 0))
    np.save(tmp_path / "copy-of-header.npy", codes + 1)
    names = ["int64.npy", "big-endian.npy", "columns.npy", "version2.npy"]
    rows = [{"codes_path": str(tmp_path / name)} for name in [*names, "copy-of-header.npy"]]
    result = convert(TWO, "speech_lm", [*rows, {"codes": codes.tolist()}])
    assert result.dropped == {}
    documents = np.split(result.flat, np.cumsum(result.lengths)[:-1])
    for i in (0, 1, 2, 3, 5):
        assert np.array_equal(TWO.decode_codes(documents[i][2:-1]), codes)
    assert np.array_equal(TWO.decode_codes(documents[4][2:-1]), codes + 1)
    needed = sha256_hex(codes.astype("<i4").tobytes())
    assert [row["checksum"] == needed for row in result.table.to_pylist()] == [True] * 4 + [False, True]


@pytest.mark.parametrize("cut", [5, 100, 130, -1])
def test_a_cut_npy_file_is_refused_and_its_neighbours_are_not(tmp_path: Path, cut: int) -> None:
    np.save(tmp_path / "good.npy", np.arange(12).reshape(6, 2))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "good.npy").read_bytes()[:cut])
    paths = [str(tmp_path / name) for name in ("good.npy", "cut.npy", "good.npy", "none.npy")]
    result = convert(TWO, "speech_lm", [{"codes_path": path} for path in paths])
    assert result.kept == 2 and result.dropped == {"codes_unreadable": 1, "codes_missing": 1}


def test_codes_beyond_any_integer_type_are_outside_the_codebook() -> None:
    rows = [{"codes": np.array([1, 2**64 - 1], np.uint64)}, {"codes": np.array([3, -4])}, {"codes": np.array([5, 6])}]
    result = convert(ONE, "speech_lm", rows)
    assert (
        result.dropped == {"code_outside_codebook": 2}
        and result.flat[2:4].tolist() == ONE.encode_codes(np.array([5, 6])).tolist()
    )


# ---- text


def test_pretokenised_text_is_taken_as_it_is_and_checked() -> None:
    rows = [
        {"text_ids": np.array([104, 105])},
        {"text_ids": [256]},
        {"text_ids": [-1]},
        {"text_ids": []},
        {"text": "x"},
    ]
    result = convert(ONE, "text_lm", rows)
    assert result.dropped == {"text_id_outside_tokenizer": 2, "no_tokens": 1}
    assert result.flat.tolist() == [
        *compile_document(ONE, "text_lm", text_ids=np.array([104, 105])),
        *compile_document(ONE, "text_lm", text_ids=np.array([120])),
    ]
    totals = result.totals["und", "corpus"]
    assert (totals.text_tokens, totals.characters, totals.target_text_tokens) == (3, 1, 1)


# Devanagari, Bengali and Tamil with joiners, Amharic, Arabic with marks, Chinese: what normalisation must not touch.
SAMPLES = {
    "hi": "क्‍ष और क्‌ष, ज़िंदगी।",
    "bn": "র‍্যাব ও বাংলা ভাষা",
    "ta": "தமிழ் க்‌ஷ மொழி",
    "am": "ሰላም፣ እንዴት ነህ።",
    "ar": "اَلسَّلَامُ عَلَيْكُمْ می‌خواهم",
    "zh": "你好,世界。",
}


@pytest.mark.parametrize("language", SAMPLES)
def test_normalisation_keeps_every_letter_mark_and_joiner(language: str) -> None:
    text = unicodedata.normalize("NFC", SAMPLES[language])
    for normalize in (normalize_transcript, normalize_document):
        assert normalize(text) == text
        assert normalize(unicodedata.normalize("NFD", text)) == text
        assert normalize("\ufeff" + text.replace(" ", " \u3000\t\u00a0") + "\x00\r\n") == text


@settings(max_examples=150, deadline=None)
@given(
    st.text(
        st.one_of(
            st.sampled_from(" \n\r\t\x00\x1c\x85\ufeff\u2028\u3000e\u0301a"), st.characters(exclude_categories=["Cs"])
        )
    )
)
def test_normalisation_is_done_once_and_leaves_no_control_characters(text: str) -> None:
    for normalize in (normalize_transcript, normalize_document):
        once = normalize(text)
        assert normalize(once) == once and unicodedata.is_normalized("NFC", once)
        assert once == once.strip() and "  " not in once and "\n\n\n" not in once and "\ufeff" not in once
        assert not any(unicodedata.category(letter) == "Cc" for letter in once.replace("\n", ""))
    assert "\n" not in normalize_transcript(text)


BLANKS_AND_MARKS = st.text(
    st.sampled_from(" \n\r\t\x00\x85\u00a0\ufeff\u200d\u3000e\u0301a\u09c7\u09be😀\ud800"), max_size=6
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(BLANKS_AND_MARKS, st.sampled_from(["two words", "é", "a\n\nb", "", "ab  c"])), max_size=6))
def test_texts_are_normalised_together_as_each_alone(texts: list[str]) -> None:
    assert normalize_documents(texts) == [normalize_document(text) for text in texts]
    assert normalize_transcripts(texts) == [normalize_transcript(text) for text in texts]


def test_extra_fields_are_json_with_sorted_keys() -> None:
    row = {"text": "x", "b": [1.5, None], "a": {"d": 1, "c": "é"}, "big": 2**70}
    extra = convert(ONE, "text_lm", [row], filters=Filters()).table.to_pylist()[0]["extra"]
    assert extra == '{"a":{"c":"é","d":1},"b":[1.5,null],"big":1180591620717411303424}'
    assert json.loads(extra) == {name: value for name, value in row.items() if name != "text"}
