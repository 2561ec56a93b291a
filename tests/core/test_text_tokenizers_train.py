"""Claims about training: any text stream, in bounded memory, always the same bytes, text that comes back as it was."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece
import text_corpora
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_speech.cli import main
from megatron_speech.errors import InputError
from megatron_speech.text_tokenizers.corpus import PASSAGE_CHARACTERS, Corpus, draw_sample, passages
from megatron_speech.text_tokenizers.train import TrainOptions, train
from megatron_speech.tokens.normalization import NORMALIZATION_VERSION, normalize_document
from megatron_speech.tokens.space import SPECIALS, CodecDescription, TokenSpace

LANGUAGES = tuple(text_corpora.LETTERS)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    return text_corpora.write_texts(tmp_path_factory.mktemp("texts") / "texts.jsonl", *LANGUAGES, count=200)


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def model(request: pytest.FixtureRequest, texts: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / f"{request.param}.model"
    command = ["tokenizer", "train", "--input", texts, "--model", request.param, "--vocab-size", "700"]
    command += ["--character-coverage", "1"]
    assert main([*command, "--output", str(path)]) == 0
    return path


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"]), max_size=80))
def test_text_comes_back_as_it_was_normalised(model: Path, text: str) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    text = normalize_document(text)
    assert processor.decode(processor.encode(text)) == text


def test_sentences_of_every_script_come_back_in_whole_pieces(model: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for language in LANGUAGES:
        for text in text_corpora.sentences(language, 50, seed=0):
            ids = processor.encode(text)
            assert processor.decode(ids) == text
            assert not any(processor.is_byte(i) or processor.is_unknown(i) for i in ids)
            assert len(ids) < len(text)


def test_the_model_brings_no_control_pieces_of_its_own(model: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert (processor.unk_id(), processor.bos_id(), processor.eos_id(), processor.pad_id()) == (0, -1, -1, -1)
    assert not any(processor.is_control(i) for i in range(processor.vocab_size()))
    assert not set(SPECIALS) & {processor.id_to_piece(i) for i in range(processor.vocab_size())}
    space = TokenSpace.build(model, CodecDescription("toy", "c0ffee", 8000, 25.0, ("a",), (5,)))
    assert space.text_size == 700 and space.special_ids["<pad>"] == 700


def test_line_ends_are_pieces(model: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    pieces = processor.encode("ሀሁ\nकख\n\nab", out_type=str)
    assert pieces.count("\n") == 3
    assert all(piece == "\n" or "\n" not in piece for piece in pieces)


def test_the_same_text_makes_the_same_bytes_from_every_container(model: Path, texts: str, tmp_path: Path) -> None:
    kind = model.stem
    packed = tmp_path / "t.jsonl.gz"
    packed.write_bytes(gzip.compress(Path(texts).read_bytes()))
    rows = [json.loads(line) for line in Path(texts).read_text().splitlines()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=77)
    for source in (texts, str(packed), str(tmp_path / "t.parquet")):
        output = tmp_path / "again.model"
        command = ["tokenizer", "train", "--input", source, "--model", kind, "--vocab-size", "700"]
        assert main([*command, "--character-coverage", "1", "--output", str(output)]) == 0
        assert output.read_bytes() == model.read_bytes()


def test_transcripts_are_read_as_what_is_spoken(tmp_path: Path) -> None:
    spoken = [{"transcript": text.replace(" ", "\n "), "language": "hi"} for text in text_corpora.sentences("hi", 80)]
    written = [{"text": text, "language": "hi"} for text in text_corpora.sentences("hi", 80)]
    inputs = [
        text_corpora.write_rows(tmp_path / "samples.jsonl", spoken),
        text_corpora.write_rows(tmp_path / "t.jsonl", written),
    ]
    outputs = [tmp_path / "a.model", tmp_path / "b.model"]
    for source, key, output in zip(inputs, ("transcript", "text"), outputs, strict=True):
        command = ["tokenizer", "train", "--input", source, "--json-keys", key, "--vocab-size", "330"]
        assert main([*command, "--output", str(output)]) == 0
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_a_record_says_what_the_model_was_made_of(model: Path) -> None:
    record = json.loads(Path(f"{model}.json").read_text())
    assert record["made_by"] == "train" and record["model"] == model.stem and record["ids"] == 700
    assert record["normalization_version"] == NORMALIZATION_VERSION
    assert set(record["sample"]["characters_read"]) == set(LANGUAGES)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_a_vocabulary_too_large_names_the_largest_that_works(kind: str) -> None:
    lines = text_corpora.sentences("am", 100)
    with pytest.raises(InputError, match=r"--vocab-size is 9,000, but this text yields at most") as error:
        train(lines, TrainOptions(kind, 9000))
    found = re.search(r"ask for ([\d,]+) or fewer", str(error.value))
    assert found is not None
    largest = int(found[1].replace(",", ""))
    payload = train(lines, TrainOptions(kind, largest))
    assert sentencepiece.SentencePieceProcessor(model_proto=payload).vocab_size() == largest


def test_up_to_takes_what_the_text_yields(tmp_path: Path) -> None:
    source, output = tmp_path / "words.jsonl", tmp_path / "words.model"
    words = ["one", "two", "three"]
    source.write_text("".join(json.dumps({"text": " ".join(words)}) + "\n" for _ in range(50)))
    command = ["tokenizer", "train", "--input", str(source), "--model", "bpe", "--vocab-size", "400"]
    assert main([*command, "--output", str(output)]) == 2
    assert main([*command, "--up-to", "--output", str(output)]) == 0
    processor = sentencepiece.SentencePieceProcessor(model_file=str(output))
    assert json.loads(Path(f"{output}.json").read_text())["ids"] == processor.vocab_size() < 400
    assert [len(processor.encode(word)) for word in words] == [1, 1, 1]


def test_a_vocabulary_without_room_for_the_letters_is_a_sentence() -> None:
    with pytest.raises(InputError, match=r"the vocabulary of 270 pieces has no room for the \d+ letters and bytes"):
        train(text_corpora.sentences("am", 100), TrainOptions("bpe", 270))


def test_without_byte_fallback_foreign_letters_are_unknown(texts: str, tmp_path: Path) -> None:
    output = tmp_path / "t.model"
    source = text_corpora.write_texts(tmp_path / "en.jsonl", "en")
    command = ["tokenizer", "train", "--input", source, "--vocab-size", "120", "--no-byte-fallback"]
    assert main([*command, "--output", str(output)]) == 0
    processor = sentencepiece.SentencePieceProcessor(model_file=str(output))
    assert processor.unk_id() in processor.encode("ሰላም") and processor.unk_id() not in processor.encode("\n")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no rows"),
        ([{"text": 5}], "holds no text"),
        ([{"text": " \n"}], "field text is empty"),
        ([{"transcript": "ሰላም"}], "field text is missing"),
    ],
)
def test_input_without_text_is_a_sentence(
    rows: list[dict[str, object]], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = text_corpora.write_rows(tmp_path / "t.jsonl", rows)
    command = ["tokenizer", "train", "--input", source, "--vocab-size", "300", "--output", str(tmp_path / "t.model")]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "t.model").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vocab-size", "0"], "--vocab-size is 0"),
        (["--temperature", "2"], "--temperature is 2.0"),
        (["--sample-characters", "0"], "--sample-characters is 0"),
        (["--character-coverage", "0"], "--character-coverage is 0.0"),
        (["--output", "t.bin"], "ends in .model"),
    ],
)
def test_flags_out_of_range_are_sentences(
    flags: list[str], message: str, texts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["tokenizer", "train", "--input", texts, "--vocab-size", "700", "--output", str(tmp_path / "t.model")]
    assert main([*command, *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_rows_without_text_are_counted_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": text} for text in text_corpora.sentences("en", 100)] + [{"text": ""}, {"other": "x"}]
    source = text_corpora.write_rows(tmp_path / "t.jsonl", rows)
    command = ["tokenizer", "train", "--input", source, "--vocab-size", "300", "--output", str(tmp_path / "t.model")]
    assert main(command) == 0
    assert "note: 2 of 102 rows hold no usable text (1 empty_text, 1 missing_field)" in capsys.readouterr().err


# ---- samples


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("ab \n字"), max_size=5000))
def test_passages_are_the_text_but_for_the_blanks_between_them(text: str) -> None:
    parts = passages(text)
    assert all(len(part) <= PASSAGE_CHARACTERS for part in parts)
    position = 0
    for i, part in enumerate(parts):
        if i and not text.startswith(part, position):
            assert text[position] in " \n"
            position += 1
        assert text.startswith(part, position)
        position += len(part)
    assert text[position:].strip(" \n") == "" and len(text) - position <= 1


def test_a_sample_is_bounded_whatever_the_input(tmp_path: Path) -> None:
    source = text_corpora.write_texts(tmp_path / "t.jsonl", "en", "hi", count=600)
    sample = draw_sample(Corpus([source]), 5_000, seed=3)
    longest = max(len(text) for text in text_corpora.sentences("en", 600) + text_corpora.sentences("hi", 600))
    assert 5_000 <= sum(map(len, sample.passages)) < 5_000 + longest
    assert sum(sample.characters_read.values()) > 20_000
    assert draw_sample(Corpus([source]), 5_000, seed=3).passages == sample.passages
    assert draw_sample(Corpus([source]), 5_000, seed=4).passages != sample.passages


def test_a_sample_takes_from_all_parts_of_the_input(tmp_path: Path) -> None:
    rows = [{"text": f"row {i:05d}"} for i in range(4_000)]
    sample = draw_sample(Corpus([text_corpora.write_rows(tmp_path / "t.jsonl", rows)]), 9_000, seed=0)
    numbers = [int(passage.split()[1]) for passage in sample.passages]
    assert numbers == sorted(numbers)
    quarters = [sum(i // 1000 == quarter for i in numbers) for quarter in range(4)]
    assert min(quarters) > 200 and sum(quarters) == 1_000


@pytest.mark.parametrize(("temperature", "ratio"), [(1.0, 10.0), (0.5, 10.0**0.5), (0.0, 1.0)])
def test_temperature_weighs_languages(temperature: float, ratio: float, tmp_path: Path) -> None:
    rows = [{"text": "x" * 20, "tongue": "en"}] * 2_000 + [{"text": "ሀ" * 20, "tongue": "am"}] * 200
    corpus = Corpus([text_corpora.write_rows(tmp_path / "t.jsonl", rows)], language_field="tongue")
    for budget in (8_000, 44_000):  # less than all of one language; all there is, so that the other is repeated
        text = "".join(draw_sample(corpus, budget, 0, temperature).passages)
        assert text.count("x") / text.count("ሀ") == pytest.approx(ratio, rel=0.15)
        assert len(text) == pytest.approx(budget, rel=0.02)
