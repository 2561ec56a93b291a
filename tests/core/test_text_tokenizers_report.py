"""Claims about the report: its figures are counted right, and a tokenizer that loses text is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import text_corpora
import tokenizers

from megatron_speech.cli import main
from megatron_speech.text_tokenizers.corpus import Corpus
from megatron_speech.text_tokenizers.fertility import by_language, byte_table, measure, total
from megatron_speech.tokens.encoders import open_text_tokenizer


def _measure(tokenizer: str | Path, *rows: tuple[str, str], folder: Path) -> dict[tuple[str, str], object]:
    source = text_corpora.write_rows(folder / "t.jsonl", ({"text": text, "language": name} for name, text in rows))
    return measure(Corpus([source]), *open_text_tokenizer(tokenizer))


@pytest.fixture(scope="module")
def english(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model without byte fallback that knows Latin letters only."""
    folder = tmp_path_factory.mktemp("english")
    source = text_corpora.write_texts(folder / "t.jsonl", "en")
    command = ["tokenizer", "train", "--input", source, "--vocab-size", "120", "--no-byte-fallback"]
    assert main([*command, "--output", str(folder / "en.model")]) == 0
    return folder / "en.model"


def test_bytes_are_counted_by_hand(tmp_path: Path) -> None:
    found = _measure("bytes", ("en", "one two"), ("hi", "एक दो"), ("hi", "three"), folder=tmp_path)
    assert list(found) == [("en", "Latin"), ("hi", "Devanagari"), ("hi", "Latin")]
    hindi = found["hi", "Devanagari"].to_json()
    assert (hindi["texts"], hindi["characters"], hindi["words"], hindi["bytes"]) == (1, 5, 2, 13)
    assert (hindi["tokens"], hindi["byte_tokens"], hindi["unknown_tokens"]) == (13, 12, 0)
    assert hindi["tokens_per_character"] == 13 / 5 and hindi["tokens_per_word"] == 13 / 2
    assert hindi["tokens_per_byte"] == 1.0 and hindi["byte_rate"] == 12 / 13
    assert by_language(found)["hi"].texts == 2
    assert total(list(found.values())).characters == 17


def test_unknown_tokens_and_lost_texts_are_counted(english: Path, tmp_path: Path) -> None:
    rows = [("am", "ሰላም"), ("en", text_corpora.sentences("en", 1)[0])]
    found = _measure(english, *rows, folder=tmp_path)
    amharic, latin = found["am", "Ethiopic"].to_json(), found["en", "Latin"].to_json()
    assert amharic["unknown_tokens"] == 1 and amharic["round_trip_failures"] == 1
    assert amharic["round_trip_example"][0] == "ሰላም" and amharic["round_trip_example"][1] != "ሰላም"
    assert amharic["unknown_characters"] == {"ላ": 1, "ም": 1, "ሰ": 1}
    assert latin["unknown_tokens"] == latin["round_trip_failures"] == 0 and latin["unknown_characters"] == {}


def test_byte_fallback_is_told_from_pieces(tmp_path: Path) -> None:
    source = text_corpora.write_texts(tmp_path / "en.jsonl", "en")
    output = tmp_path / "en.model"
    assert main(["tokenizer", "train", "--input", source, "--vocab-size", "340", "--output", str(output)]) == 0
    found = _measure(output, ("am", "ሰላም"), folder=tmp_path)["am", "Ethiopic"].to_json()
    assert (found["byte_tokens"], found["tokens"]) == (9, 10)  # three letters of three bytes, and the space before
    assert found["unknown_tokens"] == found["round_trip_failures"] == 0


def test_byte_level_tokens_without_whole_characters_are_bytes(tmp_path: Path) -> None:
    alphabet = {letter: i for i, letter in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    whole = {"áĪ": 256, "áĪ°": 257}  # E1 88, and E1 88 B0: ሰ
    merges = [("á", "Ī"), ("áĪ", "°")]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(alphabet | whole, merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    kind, payload, encoder = open_text_tokenizer(tmp_path)
    table = byte_table(kind, payload, encoder.size)
    assert table[256] and not table[257] and table.sum() == 128 + 1
    found = _measure(tmp_path, ("am", "ሰላ"), folder=tmp_path)["am", "Ethiopic"].to_json()
    assert (found["tokens"], found["byte_tokens"], found["round_trip_failures"]) == (3, 2, 0)


def test_too_many_unknown_tokens_are_refused_by_name(
    english: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = text_corpora.write_texts(tmp_path / "t.jsonl", "en", "am", "hi", count=50)
    command = ["tokenizer", "report", "--tokenizer", str(english), "--input", source]
    assert main(command) == 0
    assert "Ethiopic" in capsys.readouterr().out
    assert main([*command, "--max-unknown", "0.05"]) == 2
    output = capsys.readouterr()
    assert "Ethiopic" in output.out  # the table is there all the same
    assert output.err.count("\n") == 1
    assert "unknown tokens in" in output.err and "needed at most 5.00%" in output.err
    assert " am " in output.err and " hi " in output.err and " en " not in output.err
    assert any(letter in output.err for letter in text_corpora.LETTERS["am"][0])
    assert main([*command, "--max-unknown", "1"]) == 0
    assert main([*command, "--max-unknown", "-1"]) == 2


def test_the_report_is_one_json_object(english: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"transcript": "one two", "tongue": "en"}, {"transcript": "ሰላም", "tongue": "am"}, {"transcript": 5}]
    source = text_corpora.write_rows(tmp_path / "samples.jsonl", rows)
    command = ["tokenizer", "report", "--tokenizer", str(english), "--input", source, "--json-keys", "transcript"]
    assert main([*command, "--language-field", "tongue", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["rows"], report["rows_without_text"]) == (3, {"bad_field": 1})
    assert set(report["languages"]) == {"en", "am"} and report["total"]["texts"] == 2
    assert [(group["language"], group["script"]) for group in report["groups"]] == [("en", "Latin"), ("am", "Ethiopic")]


@pytest.mark.parametrize("tokenizer", ["missing.model", "damaged.model"])
def test_an_unreadable_tokenizer_is_a_sentence(
    tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "damaged.model").write_bytes(b"\xff" * 100)
    source = text_corpora.write_texts(tmp_path / "t.jsonl", "en", count=3)
    assert main(["tokenizer", "report", "--tokenizer", str(tmp_path / tokenizer), "--input", source]) == 2
    error = capsys.readouterr().err
    assert tokenizer in error and error.count("\n") == 1
