"""Claims about extending: old ids and old text stay as they are, new scripts get shorter, and all comes back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import sentencepiece
import text_corpora
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as pb
from tokenizers import pre_tokenizers

from megatron_speech.cli import main
from megatron_speech.errors import InputError
from megatron_speech.files import sha256_file
from megatron_speech.text_tokenizers.corpus import Corpus
from megatron_speech.text_tokenizers.extend import ExtendOptions, extend
from megatron_speech.text_tokenizers.merges import Merge, learn_merges
from megatron_speech.text_tokenizers.scripts import main_script, parse_scripts, script_of, shared_with
from megatron_speech.tokens.encoders import TextEncoder, encoder_of, open_text_tokenizer
from megatron_speech.tokens.normalization import normalize_document
from megatron_speech.tokens.space import CodecDescription, TokenSpace

CODEC = CodecDescription("toy", "c0ffee", 8000, 25.0, ("a",), (5,))
NEW = ("hi", "am", "ta")  # the base knows en and zh
PIECES = 260

# LLaMA-3's and Qwen's way of cutting text into words, and GPT-2's.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(folder: Path, *, words: bool, config_rows: int | None = None) -> Path:
    """A byte-level BPE folder as Hugging Face models have it, with added tokens after the vocabulary."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=words))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if words:
        split = pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(text_corpora.sentences("en", 200) + text_corpora.sentences("zh", 200), trainer)
    tokenizer.add_special_tokens(["<|begin|>", "<|end|>"])
    tokenizer.add_tokens([tokenizers.AddedToken("<think>", normalized=False)])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "vocab.json").write_text("{}")  # of a slow tokenizer: outdated once there are new ids
    if config_rows is not None:
        (folder / "config.json").write_text(json.dumps({"vocab_size": config_rows, "model_type": "llama"}))
    return folder


def _sentencepiece(folder: Path, kind: str, *flags: str) -> Path:
    folder.mkdir()
    source = text_corpora.write_texts(folder / "t.jsonl", "en", "zh", count=200)
    output = folder / "base.model"
    command = ["tokenizer", "train", "--input", source, "--model", kind, "--character-coverage", "1", *flags]
    assert main([*command, "--output", str(output)]) == 0
    return output


BASES: dict[str, Callable[[Path], Path]] = {
    "unigram": lambda folder: _sentencepiece(folder, "unigram", "--vocab-size", "420"),
    "unigram-unknown": lambda folder: _sentencepiece(folder, "unigram", "--vocab-size", "200", "--no-byte-fallback"),
    "bpe": lambda folder: _sentencepiece(folder, "bpe", "--vocab-size", "450"),
    "bpe-unknown": lambda folder: _sentencepiece(folder, "bpe", "--vocab-size", "250", "--no-byte-fallback"),
    "llama-3": lambda folder: byte_level(folder, words=True, config_rows=640),
    "gpt-2": lambda folder: byte_level(folder, words=False),
}


@dataclass(frozen=True)
class Case:
    name: str
    base: Path
    extended: Path
    old: TextEncoder
    new: TextEncoder
    record: dict

    @property
    def loses_text(self) -> bool:
        return self.name.endswith("unknown")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    return text_corpora.write_texts(tmp_path_factory.mktemp("texts") / "texts.jsonl", *text_corpora.LETTERS)


def _paths(name: str, folder: Path) -> tuple[Path, Path, Path]:
    """(base, extended, record)"""
    base = BASES[name](folder / "base")
    if base.is_dir():
        return base, folder / "extended", folder / "extended" / "extension.json"
    return base, folder / "extended.model", folder / "extended.model.json"


@pytest.fixture(scope="module", params=list(BASES))
def case(request: pytest.FixtureRequest, texts: str, tmp_path_factory: pytest.TempPathFactory) -> Case:
    base, extended, record = _paths(request.param, tmp_path_factory.mktemp(request.param))
    command = ["tokenizer", "extend", "--base", str(base), "--input", texts, "--pieces", str(PIECES)]
    assert main([*command, "--output", str(extended)]) == 0
    encoders = [open_text_tokenizer(path)[2] for path in (base, extended)]
    return Case(request.param, base, extended, *encoders, json.loads(record.read_text()))


def _ids(encoder: TextEncoder, text: str) -> list[int]:
    return encoder.encode_batch([text])[0].tolist()


# Text of scripts that the base covers, and of some that it spells in bytes: none of the new ones.
OLD_CHARACTERS = st.one_of(
    st.sampled_from("etaoin shrdlu\n.,!?0123456789()'\"的一是不了。"),
    st.characters(min_codepoint=0x20, max_codepoint=0x24F),
    st.characters(min_codepoint=0x370, max_codepoint=0x5FF),
    st.characters(min_codepoint=0x10A0, max_codepoint=0x10FF),
    st.characters(min_codepoint=0x2000, max_codepoint=0x206F),
    st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF),
    st.characters(min_codepoint=0x1F300, max_codepoint=0x1F6FF),
)
NEW_CHARACTERS = st.sampled_from("".join(a + b for a, b in (text_corpora.LETTERS[name] for name in NEW)))


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(text=st.text(OLD_CHARACTERS, max_size=60))
def test_text_without_new_characters_keeps_its_ids(case: Case, text: str) -> None:
    assert _ids(case.new, text) == _ids(case.old, text)


def test_sentences_of_old_languages_keep_their_ids(case: Case) -> None:
    for language in ("en", "zh"):
        for seed in (0, 1):  # seen and unseen
            for text in text_corpora.sentences(language, 100, seed):
                assert _ids(case.new, text) == _ids(case.old, text)


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.one_of(OLD_CHARACTERS, NEW_CHARACTERS, NEW_CHARACTERS), max_size=60))
def test_mixed_text_comes_back(case: Case, text: str) -> None:
    text = normalize_document(text.replace("▁", ""))
    if case.old.unknown_id is not None and case.loses_text:
        return  # what the base loses of other scripts is lost still
    assert case.new.decode(_ids(case.new, text)) == text


@pytest.mark.slow
def test_new_scripts_come_back_and_get_shorter(case: Case) -> None:
    for language in NEW:
        seen = text_corpora.sentences(language, 300)
        before = sum(len(_ids(case.old, text)) for text in seen)
        after = sum(len(_ids(case.new, text)) for text in seen)
        assert after < sum(map(len, seen))  # less than one token per character
        if not case.loses_text:
            assert after < before / 2
        back = [case.new.decode(_ids(case.new, text)) == text for text in seen]
        assert all(back) or (case.loses_text and sum(back) > 0.9 * len(back))  # a rare letter may be left unknown


def test_new_ids_begin_after_the_base(case: Case) -> None:
    record = case.record
    assert record["base"]["ids"] == case.old.size
    assert record["first_new_id"] == (640 if case.name == "llama-3" else case.old.size)
    assert record["new_ids"] == PIECES and case.new.size == record["first_new_id"] + PIECES
    used = {i for name in NEW for text in text_corpora.sentences(name, 300) for i in _ids(case.new, text)}
    new = {i for i in used if i >= case.old.size}
    assert min(new) >= record["first_new_id"]
    assert len(new) > 0.5 * PIECES  # most are used; some are steps on the way to longer ones
    assert set(record["scripts"]) == {"Devanagari", "Ethiopic", "Tamil"}


def test_the_record_names_both_files(case: Case) -> None:
    files = [path / "tokenizer.json" if path.is_dir() else path for path in (case.base, case.extended)]
    assert case.record["base"]["sha256"] == sha256_file(files[0])
    assert case.record["sha256"] == sha256_file(files[1])


def test_ids_pieces_and_scores_of_the_base_stay(case: Case) -> None:
    if case.base.is_dir():
        old, new = (json.loads((path / "tokenizer.json").read_text()) for path in (case.base, case.extended))
        assert old["model"]["vocab"].items() <= new["model"]["vocab"].items()
        assert new["model"]["merges"][: len(old["model"]["merges"])] == old["model"]["merges"]
        assert new["added_tokens"] == old["added_tokens"]
        loaded = tokenizers.Tokenizer.from_file(str(case.extended / "tokenizer.json"))
        for token in old["added_tokens"]:
            assert loaded.token_to_id(token["content"]) == token["id"]
    else:
        old, new = (pb.ModelProto.FromString(path.read_bytes()) for path in (case.base, case.extended))
        assert [p.SerializeToString() for p in new.pieces[: len(old.pieces)]] == [
            p.SerializeToString() for p in old.pieces
        ]
        assert new.normalizer_spec == old.normalizer_spec


@pytest.mark.slow
def test_extending_again_makes_the_same_bytes(case: Case, texts: str, tmp_path: Path) -> None:
    result = extend(case.base, Corpus([texts]), ExtendOptions(PIECES))
    path = case.extended / "tokenizer.json" if case.extended.is_dir() else case.extended
    assert result.payload == path.read_bytes()


def test_the_token_space_takes_the_extended_tokenizer(case: Case) -> None:
    base = case.base if (case.base / "config.json").is_file() else None
    space = TokenSpace.build(case.extended, CODEC, base=base)
    assert space.text_size == case.record["first_new_id"] + PIECES
    text = "hello ሰላም"
    assert space.decode_text(space.encode_text(text)) == case.new.decode(_ids(case.new, text))


# ---- choices


def test_scripts_can_be_named(texts: str, tmp_path: Path) -> None:
    base = BASES["bpe"](tmp_path / "base")
    result = extend(base, Corpus([texts]), ExtendOptions(80, parse_scripts(["tamil"])))
    old, new = (pb.ModelProto.FromString(payload) for payload in (base.read_bytes(), result.payload))
    pieces = [piece.piece.lstrip("▁") for piece in new.pieces[len(old.pieces) :]]
    assert {script_of(c) for piece in pieces for c in piece} == {"Tamil"}


def test_a_script_that_the_base_knows_gets_shorter_where_it_is_named(tmp_path: Path) -> None:
    for kind in ("unigram", "bpe"):
        base = _sentencepiece(tmp_path / kind, kind, "--vocab-size", "400")
        source = text_corpora.write_texts(tmp_path / "en.jsonl", "en", count=800, seed=7)
        result = extend(base, Corpus([source]), ExtendOptions(60, ("Latin",)))
        one = result.fertility["Latin"]
        assert one.after < 0.9 * one.before


def test_the_first_new_id_can_be_set(texts: str, tmp_path: Path) -> None:
    base = BASES["unigram"](tmp_path / "base")
    result = extend(base, Corpus([texts]), ExtendOptions(PIECES, first_id=512))
    processor = sentencepiece.SentencePieceProcessor(model_proto=result.payload)
    assert processor.vocab_size() == 512 + PIECES
    assert all(processor.is_unused(i) for i in range(420, 512)) and not processor.is_unused(512)
    assert min(i for i in processor.encode("कख ሀሁ") if i >= 420) >= 512


def test_an_extended_tokenizer_can_be_extended(tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "base", words=True, config_rows=640)
    for language, output in (("am", "first"), ("ta", "second")):
        source = text_corpora.write_texts(tmp_path / f"{language}.jsonl", language)
        command = ["tokenizer", "extend", "--base", str(folder), "--input", source, "--pieces", "90"]
        folder = tmp_path / output
        assert main([*command, "--output", str(folder)]) == 0
    first, second = (json.loads((tmp_path / name / "extension.json").read_text()) for name in ("first", "second"))
    assert (first["first_new_id"], second["first_new_id"]) == (640, 730)
    for text in text_corpora.sentences("am", 50):
        encoders = [open_text_tokenizer(tmp_path / name)[2] for name in ("first", "second")]
        assert _ids(encoders[0], text) == _ids(encoders[1], text)


def test_naming_the_file_of_a_folder_is_naming_the_folder(texts: str, tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "base", words=True, config_rows=640)
    by_folder, by_file = (
        extend(path, Corpus([texts]), ExtendOptions(60)) for path in (folder, folder / "tokenizer.json")
    )
    assert by_folder.payload == by_file.payload and by_file.record["first_new_id"] == 640


def test_a_control_token_that_is_one_word_stays_text_in_the_extended_vocabulary(texts: str, tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "base", words=True)
    file = json.loads((folder / "tokenizer.json").read_text())
    file["pre_tokenizer"] = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(file))  # a text is one word, and a known word is one token
    (_, _, before) = open_text_tokenizer(folder)
    extended = encoder_of("huggingface", extend(folder, Corpus([texts]), ExtendOptions(10)).payload)
    for text in ("<|begin|>", "a<|end|>", "etaoin"):
        ids = extended.encode_batch([text])[0].tolist()
        assert ids == before.encode_batch([text])[0].tolist() and extended.decode(ids) == text
        assert not extended.control_ids[ids].any() and extended.control_ids.sum() == len(base_added(folder))


def test_a_folder_holds_what_loads_and_nothing_outdated(case: Case) -> None:
    if case.base.is_dir():
        names = {path.name for path in case.extended.iterdir()}
        assert names == {"tokenizer.json", "tokenizer_config.json", "extension.json"}


@pytest.mark.slow
def test_transformers_loads_the_extended_folder(case: Case, tmp_path: Path) -> None:
    if not case.base.is_dir():
        return  # sentencepiece models are read by sentencepiece
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: `make venv` installs it")
    base, extended = (transformers.AutoTokenizer.from_pretrained(str(path)) for path in (case.base, case.extended))
    assert extended.bos_token_id == base.bos_token_id and extended.eos_token_id == base.eos_token_id
    for language in text_corpora.LETTERS:
        for text in text_corpora.sentences(language, 40):
            ids = extended.encode(text, add_special_tokens=False)
            assert ids == _ids(case.new, text) and extended.decode(ids) == text
    assert extended.encode("<|begin|>etaoin<think>") == base.encode("<|begin|>etaoin<think>")
    extended.save_pretrained(str(tmp_path / "saved"))
    saved = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "saved"))
    text = "<|begin|>etaoin ሀሁ कख<think>"
    assert saved.encode(text) == extended.encode(text)


def base_added(folder: Path) -> list[str]:
    return [token["content"] for token in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]]


# ---- refusals


def _refuse(base: Path | str, source: str, match: str, pieces: int = 50, **options: object) -> None:
    with pytest.raises(InputError, match=match):
        extend(base, Corpus([source]), ExtendOptions(pieces, **options))  # type: ignore[arg-type]


def _save(folder: Path, tokenizer: tokenizers.Tokenizer) -> Path:
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_other_kinds_of_tokenizer_are_refused(texts: str, tmp_path: Path) -> None:
    pieces = tokenizers.models.WordPiece({"[UNK]": 0, "a": 1, "hello": 2}, unk_token="[UNK]")
    _refuse(_save(tmp_path / "wordpiece", tokenizers.Tokenizer(pieces)), texts, "is a WordPiece tokenizer")
    unigram = tokenizers.models.Unigram([("<unk>", 0.0), ("hello", -1.0)], unk_id=0)
    _refuse(
        _save(tmp_path / "unigram", tokenizers.Tokenizer(unigram)), texts, "is a Unigram tokenizer.*tokenizer.model"
    )
    bpe = tokenizers.models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>", byte_fallback=True)
    _refuse(_save(tmp_path / "bpe", tokenizers.Tokenizer(bpe)), texts, "is a BPE with byte fallback tokenizer")
    _refuse("bytes", texts, "bytes spells every script already")


def test_a_damaged_base_is_a_sentence(texts: str, tmp_path: Path) -> None:
    model = BASES["bpe"](tmp_path / "base")
    model.write_bytes(model.read_bytes()[:300])
    _refuse(model, texts, "base.model is not a usable sentencepiece tokenizer")
    folder = byte_level(tmp_path / "folder", words=True)
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:500])
    _refuse(folder, texts, "folder is not a usable huggingface tokenizer")
    _refuse(tmp_path / "nothing", texts, "does not exist")


def test_a_base_whose_ids_mean_something_else_when_loaded_is_refused(texts: str, tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "folder", words=True)
    file = json.loads((folder / "tokenizer.json").read_text())
    # A byte of no text leaves a hole: the library gives the added tokens other ids than the file says.
    del file["model"]["vocab"]["À"]
    (folder / "tokenizer.json").write_text(json.dumps(file))
    _refuse(folder, texts, r"token '<\|begin\|>' has id 500 in the file but 499 when it is loaded")
    file = json.loads((byte_level(tmp_path / "twice", words=True) / "tokenizer.json").read_text())
    file["model"]["vocab"]["À"] = 7
    (tmp_path / "twice" / "tokenizer.json").write_text(json.dumps(file))
    _refuse(tmp_path / "twice", texts, "id 7 stands for more than one token")


def test_a_base_with_holes_that_loads_as_written_is_extended(texts: str, tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "folder", words=True)
    file = json.loads((folder / "tokenizer.json").read_text())
    file["model"]["vocab"] |= {token["content"]: token["id"] + 100 for token in file["added_tokens"]}
    for token in file["added_tokens"]:
        token["id"] += 100
    (folder / "tokenizer.json").write_text(json.dumps(file))
    result = extend(folder, Corpus([texts]), ExtendOptions(PIECES))
    assert result.record["first_new_id"] == 603
    loaded = tokenizers.Tokenizer.from_str(result.payload.decode())
    assert loaded.token_to_id("<|begin|>") == 600


@pytest.mark.slow
def test_what_the_input_does_not_yield_is_named(texts: str, tmp_path: Path) -> None:
    for name in ("unigram", "bpe", "gpt-2"):
        base = BASES[name](tmp_path / name)
        with pytest.raises(InputError, match=r"--pieces is 90,000, but the input yields at most [\d,]+ new") as error:
            extend(base, Corpus([texts]), ExtendOptions(90_000))
        largest = int(str(error.value).split("ask for ")[1].split(", or")[0].replace(",", ""))
        assert extend(base, Corpus([texts]), ExtendOptions(largest)).record["new_ids"] == largest
    for name in ("unigram", "bpe"):
        _refuse(tmp_path / name / "base.model", texts, r"--pieces is 5, but the new scripts .* have \d+ letters", 5)
    _refuse(base, texts, "holds no Khmer text", scripts=("Khmer",))
    english = text_corpora.write_texts(tmp_path / "en.jsonl", "en")
    _refuse(base, english, r"has a token for every letter of the scripts in the input \(Latin\)")
    _refuse(base, texts, "--first-id is 3, but .* has ids up to 502", first_id=3)
    _refuse(base, texts, "--pieces is 0", 0)


def test_a_script_that_does_not_exist_is_answered_with_the_nearest() -> None:
    assert parse_scripts(["ethiopic", "Tamil", "Ethiopic"]) == ("Ethiopic", "Tamil")
    with pytest.raises(InputError, match="did you mean 'Devanagari'"):
        parse_scripts(["devanagri"])
    with pytest.raises(InputError, match="is no Unicode script"):
        parse_scripts(["Common"])


def test_outputs_are_looked_at_before_any_work(texts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, folder = BASES["bpe"](tmp_path / "base"), byte_level(tmp_path / "folder", words=True)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("mine")
    refusals = [(model, tmp_path / "x", "ends in .model"), (model, model, "the base itself"), (folder, taken, "exists")]
    for base, output, message in refusals:
        command = ["tokenizer", "extend", "--base", str(base), "--input", texts, "--pieces", "50"]
        assert main([*command, "--output", str(output)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert [path.name for path in taken.iterdir()] == ["thesis.txt"]


# ---- merges and scripts


def test_merges_are_those_of_byte_pair_encoding() -> None:
    words = {tuple("low"): 5, tuple("lowest"): 2, tuple("newer"): 6, tuple("wider"): 3}
    merges = learn_merges(words, 4, lambda piece: True, set())
    assert merges == [Merge("e", "r", True), Merge("l", "o", True), Merge("lo", "w", True), Merge("e", "w", True)]


def test_a_merge_into_a_known_symbol_costs_no_piece() -> None:
    words = {tuple("abab"): 4, tuple("ababc"): 3}
    merges = learn_merges(words, 1, lambda piece: "c" not in piece, {"a", "b", "c", "ab"})
    assert merges == [Merge("a", "b", False), Merge("ab", "ab", True)]


def test_scripts_of_characters_and_texts() -> None:
    assert [script_of(c) for c in "aሰकन的।\u200d\ue000"] == [
        "Latin", "Ethiopic", "Devanagari", "Devanagari", "Han", "Common", "Inherited", "Unknown"
    ]  # fmt: skip
    assert main_script("hello ሰላም ለዓለም") == "Ethiopic" and main_script("123 !") == "Common"
    assert shared_with("।", "Devanagari") and shared_with("\u0953", "Devanagari") and not shared_with(".", "Devanagari")
