"""Filters drop what their rules say and nothing else, each row under one name, whatever the workers and shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import yaml

from megatron_speech.data.dataset.indexed import TokenDataset
from megatron_speech.errors import InputError
from megatron_speech.preprocess import merge_datasets
from megatron_speech.preprocess.filters import Filters, find_duplicates, for_language, matches
from megatron_speech.tokens.space import CodecDescription, TokenSpace


def write_filters(folder: Path, *rules: dict[str, Any]) -> Path:
    path = folder / "filters.yaml"
    path.write_text(yaml.safe_dump({"filters": list(rules)}, allow_unicode=True), encoding="utf-8")
    return path


def kept_ids(dataset: TokenDataset) -> list[int]:
    return [int(row[1:]) for row in dataset.columns("sample_id")["sample_id"].to_pylist()]


def rejected(corpus: Any, prefix: str = "out/data") -> dict[int, dict[str, Any]]:
    path = corpus.folder / f"{prefix}.rejected.jsonl"
    return {row["line"] - 1: row for row in map(json.loads, path.read_text().splitlines())}


def change(corpus: Any, changes: dict[int, dict[str, Any]]) -> None:
    corpus.write([{**row, **changes.get(i, {})} for i, row in enumerate(corpus.rows)])


# ---- the rules, one by one: rule → changed rows → those dropped


@pytest.mark.parametrize(
    ("rule", "changes", "dropped"),
    [
        ({"rule": "language", "keep": ["hi", "en-IN"]}, "languages", {2, 3}),
        ({"rule": "language", "drop": ["EN"]}, "languages", {1, 2}),
        ({"rule": "duration", "min_seconds": 0.08}, {0: {"codes": [[1, 1]]}, 1: {"codes": [[1, 1]] * 2}}, {0}),
        ({"rule": "duration", "max_seconds": 1.2}, {0: {"codes": [[1, 1]] * 30}, 1: {"codes": [[1, 1]] * 31}}, {1}),
        ({"rule": "code_length", "max_frames": 30}, {5: {"codes": [[1, 1]] * 31}}, {5}),
        ({"rule": "text_length", "max_characters": 30},
         {4: {"transcript": "a" * 31}, 6: {"transcript": "a" * 30}}, {4}),
        ({"rule": "field", "field": "mos", "min": 3}, {i: {"mos": i % 5} for i in range(60)}, {
            i for i in range(60) if i % 5 < 3}),
        ({"rule": "field", "field": "mos", "max": 3, "missing": "keep"}, {7: {"mos": 3.5}, 8: {"mos": 3}}, {7}),
        ({"rule": "field", "field": "quality.mos", "min": 3, "missing": "keep"}, {7: {"quality": {"mos": 1}}}, {7}),
        ({"rule": "script", "allow": ["Latin"]}, {3: {"transcript": "नमस्ते"}, 4: {"transcript": "12!"}}, {3}),
        ({"rule": "script", "allow": ["Latin"], "without_letters": "drop"}, {4: {"transcript": "12!"}}, {4}),
        ({"rule": "script", "allow": ["Latin"], "min_share": 0.5}, {3: {"transcript": "abक"}, 4: {"transcript": "aकक"}},
         {4}),
        ({"rule": "script", "by_language": {"zz": ["Devanagari"]}},
         {1: {"language": "zz-IN", "transcript": "क्‍ष"}, 2: {"language": "zz", "transcript": "क a"}}, {2}),
        ({"rule": "characters_per_second", "max": 250}, {2: {"codes": [[1, 1]], "transcript": "a" * 11}}, {2}),
        ({"rule": "characters_per_second", "by_language": {"zz": {"min": 5.0}}},
         {2: {"language": "zz", "codes": [[1, 1]] * 25, "transcript": "abcd"},
          3: {"language": "zz", "codes": [[1, 1]] * 25, "transcript": "abcde"}}, {2}),
        ({"rule": "duplicate"}, {40: {"codes": [[1, 1]] * 3}, 41: {"codes": [[1, 1]] * 3}}, {41}),
        ({"rule": "duplicate", "of": "text"}, {40: {"transcript": "one  é"}, 41: {"transcript": "one é"}}, {41}),
        ({"rule": "duplicate", "of": "both"}, {40: {"codes": [[1, 1]]}, 41: {"codes": [[1, 1]]}}, set()),
    ],
)  # fmt: skip
def test_a_rule_drops_exactly_its_rows(corpus: Any, rule: dict[str, Any], changes: Any, dropped: set[int]) -> None:
    if changes == "languages":
        changes = {
            0: {"language": "hi-Latn"},
            1: {"language": "en-IN-x"},
            2: {"language": "en"},
            3: {"language": "eng"},
        }
        corpus.rows = corpus.rows[:4]
    for fields in changes.values():
        if "codes" in fields:
            fields |= {"code_len": None, "code_offset": None}
    change(corpus, changes)
    path = write_filters(corpus.folder, {"name": "mine", **rule})
    dataset = corpus.convert("tts", "--filters", path)
    assert set(range(len(corpus.rows))) - set(kept_ids(dataset)) == dropped
    assert dataset.manifest.filters.dropped == ({"mine": len(dropped)} if dropped else {})
    assert dataset.manifest.options["filters"][0]["rule"] == rule["rule"]
    if dropped:
        lines = rejected(corpus)
        assert set(lines) == dropped
        assert all(line["rule"] == "mine" and line["filtered"] and line["reason"] for line in lines.values())


def test_a_row_is_counted_under_the_first_rule_that_drops_it(corpus: Any) -> None:
    change(corpus, {5: {"mos": 1, "language": "zz"}, 6: {"mos": 1}, 7: {"language": "zz"}})
    rules = ({"rule": "field", "field": "mos", "min": 2, "missing": "keep"}, {"rule": "language", "drop": ["zz"]})
    one = corpus.convert("tts", "--filters", write_filters(corpus.folder, *rules))
    other = corpus.convert("tts", "--filters", write_filters(corpus.folder, *reversed(rules)), prefix="out/other")
    assert one.manifest.filters.dropped == {"field": 2, "language": 1}
    assert other.manifest.filters.dropped == {"field": 1, "language": 2}
    assert kept_ids(one) == kept_ids(other)


def test_filtered_rows_are_not_unusable_ones(corpus: Any) -> None:
    path = write_filters(corpus.folder, {"rule": "language", "keep": ["hi"]})
    dataset = corpus.convert("tts", "--filters", path, "--max-rejected", 0)
    assert 0 < dataset.manifest.filters.kept < 30


@pytest.mark.parametrize(("value", "rule"), [("high", "bad_field"), (True, "bad_field"), (10**400, "not_finite")])
def test_a_number_that_cannot_be_judged_is_an_unusable_row(corpus: Any, value: object, rule: str) -> None:
    change(corpus, {9: {"mos": value}})
    path = write_filters(corpus.folder, {"rule": "field", "field": "mos", "min": 1, "missing": "keep"})
    dataset = corpus.convert("speech_lm", "--filters", path, "--max-rejected", 0.1)
    assert dataset.manifest.filters.dropped == {rule: 1} and rejected(corpus)[9].get("filtered") is None


def test_nan_durations_are_refused_rows(corpus: Any) -> None:
    rows = [json.dumps({"text": f"line {i}", "duration": 1.0 + i}) for i in range(20)]
    rows[3] = '{"text": "x", "duration": NaN}'
    rows[4] = '{"text": "x", "duration": -1}'
    path = corpus.write(rows, "text.jsonl")
    filters = write_filters(corpus.folder, {"rule": "duration", "min_seconds": 2.5})
    dataset = corpus.convert("text_lm", "--filters", filters, "--max-rejected", 0.1, inputs=[path])
    assert dataset.manifest.filters.dropped == {"bad_field": 1, "duration": 2, "not_finite": 1}


# ---- duplicates


@pytest.mark.slow
def test_duplicates_are_the_same_for_all_workers_and_shards(make_corpus: Any) -> None:
    corpus = make_corpus(1300)
    random = np.random.default_rng(1)
    places = random.integers(0, 1300, 400)
    fields = ("code_offset", "code_len")
    rows = list(corpus.rows)
    for i in places.tolist():  # many copies of few, some of them rows that another rule drops first
        rows[i] = {**rows[i], **{name: corpus.rows[i % 17][name] for name in fields}, "mos": i % 3}
    rows[20] = {**rows[20], "checksum": "0" * 64, **{name: corpus.rows[30][name] for name in fields}}  # a lie
    corpus.write(rows)
    rules = ({"rule": "field", "field": "mos", "min": 1, "missing": "keep"}, {"rule": "duplicate"})
    flags = ("--filters", write_filters(corpus.folder, *rules))
    whole = corpus.convert("speech_lm", *flags, prefix="out/whole")
    corpus.convert("speech_lm", *flags, "--workers", 2, prefix="out/two")
    assert {k: v for k, v in corpus.files("out/whole").items()} == corpus.files("out/two")
    for shard in range(3):
        corpus.convert("speech_lm", *flags, "--shard", f"{shard}/3", prefix=f"out/part{shard}")
    parts = [str(corpus.folder / f"out/part{i}") for i in range(3)]
    assert merge_datasets.main(["--input", *parts, "--output-prefix", str(corpus.folder / "out/joined")]) == 0
    assert corpus.files("out/joined")["bin"] == corpus.files("out/whole")["bin"]
    seen: set[bytes] = set()
    expected = []
    for i, row in enumerate(rows):
        content = np.load(corpus.folder / "codes.npy")[row["code_offset"] : row["code_offset"] + row["code_len"]]
        if row.get("mos", 1) >= 1 and i != 20 and content.tobytes() not in seen:
            seen.add(content.tobytes())
            expected.append(i)
    assert kept_ids(whole) == expected


def test_what_is_filtered_is_not_quoted(corpus: Any) -> None:
    change(corpus, {i: {"mos": 1} for i in range(0, 60, 2)})
    rules = ({"rule": "field", "field": "mos", "min": 2, "missing": "keep"}, {"rule": "duplicate"})
    dataset = corpus.convert("tts", "--cloning", "same-speaker", "--filters", write_filters(corpus.folder, *rules))
    quoted = [name for name in dataset.columns("reference_sample_id")["reference_sample_id"].to_pylist() if name]
    assert quoted and all(int(name[1:]) % 2 for name in quoted)


def test_find_duplicates_keeps_the_first_in_every_part() -> None:
    random = np.random.default_rng(0)
    low, high = random.integers(0, 40, 3000).astype(np.uint64), random.integers(0, 40, 3000).astype(np.uint64)
    seen: set[tuple[int, int]] = set()
    expected = []
    for pair in zip(low.tolist(), high.tolist(), strict=True):
        expected.append(pair in seen and pair != (0, 0))
        seen.add(pair)
    assert find_duplicates(low, high).tolist() == expected


# ---- unknown tokens


@pytest.fixture
def latin_space(corpus: Any) -> Path:
    """A token space whose tokenizer knows nothing but the corpus's Latin letters and digits."""
    text = corpus.folder / "latin.txt"
    text.write_text("\n".join(f"utterance number {i} romanized with letters" for i in range(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(corpus.folder / "latin"), vocab_size=50, character_coverage=1.0,
        minloglevel=2,
    )  # fmt: skip
    codec = CodecDescription("toy", "c" * 64, 8000, 25.0, ("a", "b"), (512, 64))
    corpus.space = TokenSpace.build(corpus.folder / "latin.model", codec)
    corpus.space.save(corpus.folder / "ts.json")
    return corpus.folder / "ts.json"


def test_unknown_tokens_are_counted_by_language_and_refused(
    corpus: Any, latin_space: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus.write([{**row, "transcript": "नमस्ते" if row["language"] == "hi" else "utterance"} for row in corpus.rows])
    assert corpus.run("tts") == 2
    assert "hi " in (message := capsys.readouterr().err) and "--max-unknown 0.01" in message
    assert corpus.left() == []
    totals = corpus.convert("tts", "--max-unknown", 1).manifest.languages
    assert totals["en"].unknown_tokens == 0 < totals["hi"].unknown_tokens
    assert totals["hi"].unknown_rate > 0.4 and totals["en"].fertility == totals["en"].text_tokens / (
        9 * totals["en"].documents
    )
    path = write_filters(corpus.folder, {"rule": "unsupported", "name": "cannot_spell", "max_share": 0.2})
    dataset = corpus.convert("tts", "--filters", path)
    assert dataset.manifest.filters.dropped == {"cannot_spell": totals["hi"].documents}


# ---- the file


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "filters: [{rule: duration, min_secnds: 1}]",
            r"rule 1: unknown key 'min_secnds'; did you mean 'min_seconds'\?",
        ),
        ("filters: [{rule: durations, min_seconds: 1}]", r"unknown rule 'durations'; did you mean 'duration'\?"),
        ("filter: []", r"unknown key 'filter'; did you mean 'filters'\?"),
        ("filters: [{min_seconds: 1}]", r"key 'rule' is missing; needed one of language, duration"),
        ("filters: [{rule: duration}]", r"neither a least nor a greatest value"),
        ("filters: [{rule: duration, min_seconds: .nan}]", r"min_seconds is nan"),
        ("filters: [{rule: duration, min_seconds: 2, max_seconds: 1}]", r"2 to 1 holds no value"),
        ("filters: [{rule: duplicate}, {rule: duplicate, name: b}]", r"two rules duplicate"),
        ("filters: [{rule: field, field: a, min: 1}, {rule: field, field: b, min: 1}]", r"two rules are named 'field'"),
        ("filters: [{rule: language, keep: [a], name: checksum}]", r"name 'checksum' is what rows that cannot be used"),
        ("filters: [{rule: script, allow: [Klingon]}]", r"Unicode has no script 'Klingon'"),
        ("filters: [{rule: language}]", r"needs either keep or drop"),
        ("filters: [{rule: duplicate, of: codes}]", r"rule duplicate of codes is not for --task text_lm"),
        ("filters: [{rule: code_length, max_frames: 3}]", r"rule code_length is not for --task text_lm"),
        ("- a", r"holds no mapping"),
        ("filters: [", r"is not YAML"),
    ],
)
def test_a_wrong_file_is_a_sentence(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "filters.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as error:
        Filters.load(path, "text_lm")
    assert "\n" not in str(error.value)


def test_language_ranges() -> None:
    assert matches("zh-Hant-TW", "zh_hant") and not matches("zh", "zh-Hant") and not matches("eng", "en")
    assert matches("anything", "*")
    assert for_language({"*": 1, "zh": 2, "zh-Hant": 3}, "zh-hant-tw") == 3
    assert for_language({"*": 1, "zh": 2}, "am") == 1 and for_language({"zh": 2}, "am") is None


def test_differently_filtered_shards_are_not_merged(corpus: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for shard, limit in ((0, 1), (1, 2)):
        path = write_filters(corpus.folder, {"rule": "code_length", "max_frames": 20 + limit})
        corpus.convert("speech_lm", "--filters", path, "--shard", f"{shard}/2", prefix=f"out/part{shard}")
    parts = [str(corpus.folder / f"out/part{i}") for i in range(2)]
    assert merge_datasets.main(["--input", *parts, "--output-prefix", str(corpus.folder / "out/joined")]) == 2
    assert "filters_hash" in (message := capsys.readouterr().err) and "one --filters file" in message
