"""Claims about text that spells control tokens: it stays text, in every kind of tokenizer; so do emoji and blanks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from megatron_speech.errors import InputError
from megatron_speech.tokens.control_tokens import is_mark
from megatron_speech.tokens.encoders import TextEncoder, open_text_tokenizer
from megatron_speech.tokens.space import CodecDescription, TokenSpace

CODEC = CodecDescription("toy", "c0ffee", 8000, 25.0, ("a",), (5,))
# Declared special; added without being declared; in the vocabulary of the model.
SPECIAL = ("<s>", "</s>", "<|im_start|>", "[CLS]")
ADDED = ("<speech_start>", "<speech_end>", "<|s_3|>", "<think>", "<bos>")
ORDINARY = ("    ", "😀", "www.")
WORDS = "one two three speech start bos think im s 3 CLS www नमस्ते".split()
Make = Callable[[Path], Path]


def add(tokenizer: Tokenizer, normalized: bool = False) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=normalized) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=normalized) for token in ADDED])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ORDINARY])
    return tokenizer


def saved(tokenizer: Tokenizer, folder: Path, **model: object) -> Path:
    spec = json.loads(tokenizer.to_str())
    spec["model"].update(model)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return folder


def byte_level_vocabulary() -> dict[str, int]:
    return {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def byte_level(folder: Path, *, nfc: bool = False, normalized: bool = False, ordinary: bool = True) -> Path:
    vocabulary = byte_level_vocabulary()
    for word in ("on", "sp", "st", "<|", "|>"):
        vocabulary[word] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(w) for w in ("on", "sp", "st", "<|", "|>")]))
    if nfc:
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    add(tokenizer, normalized)
    if not ordinary:
        spec = json.loads(tokenizer.to_str())
        spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in ORDINARY]
        tokenizer = Tokenizer.from_str(json.dumps(spec))
    return saved(tokenizer, folder)


def whole_words(folder: Path) -> Path:
    """BPE that takes a text for one word, and a word that is in its vocabulary for one token, as it is."""
    vocabulary = byte_level_vocabulary()
    for token in (*SPECIAL, *ADDED, *ORDINARY):
        vocabulary[token] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return saved(add(tokenizer), folder, ignore_merges=True)


def byte_fallback(folder: Path) -> Path:
    """LLaMA 2's kind: specials in the vocabulary, spaces as ▁, bytes for the rest."""
    vocabulary = {token: i for i, token in enumerate(("<unk>", "<s>", "</s>"))}
    for token in [f"<0x{byte:02X}>" for byte in range(256)] + list("▁onetwsp<>|") + ["on"]:
        vocabulary[token] = len(vocabulary)
    model = models.BPE(vocab=vocabulary, merges=[("o", "n")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return saved(add(tokenizer), folder)


def unigram(folder: Path) -> Path:
    """T5's kind: every control token is a piece of the model, with the best of all scores."""
    pieces = [("<unk>", 0.0), *((token, 0.0) for token in (*SPECIAL, *ADDED))]
    pieces += [(letter, -3.0) for letter in "▁<>|/[]_abcdehiklmnoprstwCLS3"] + [("▁one", -2.0), ("<b>", -2.5)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return saved(add(tokenizer), folder)


def word_level(folder: Path) -> Path:
    vocabulary = {token: i for i, token in enumerate(("[UNK]", *SPECIAL, *ADDED, "one", "two"))}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return saved(add(tokenizer), folder)


def word_piece(folder: Path) -> Path:
    letters = sorted(set("".join(WORDS) + "<>|/[]_"))
    vocabulary = {token: i for i, token in enumerate(("[UNK]", *SPECIAL, *letters, *("##" + a for a in letters)))}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return saved(add(tokenizer), folder)


def piece_model(kind: str) -> Make:
    def make(folder: Path) -> Path:
        text = folder / "text.txt"
        text.write_text("\n".join(["one two three speech start < > | / _ bos think", *WORDS] * 40))
        sentencepiece.SentencePieceTrainer.train(
            input=str(text), model_prefix=str(folder / "spm"), vocab_size=340, model_type=kind, byte_fallback=True,
            hard_vocab_limit=False, minloglevel=2, control_symbols=["<|im_start|>", "[CLS]"],
            user_defined_symbols=[*ADDED, "😀", "www."],
        )  # fmt: skip
        return folder / "spm.model"

    return make


KINDS: dict[str, Make] = {
    "byte-level": byte_level,
    "byte-level by the kernel": lambda folder: byte_level(folder, ordinary=False),
    "normalised": lambda folder: byte_level(folder, nfc=True, normalized=True),
    "whole words": whole_words,
    "byte fallback": byte_fallback,
    "unigram": unigram,
    "word level": word_level,
    "word piece": word_piece,
    "sentencepiece bpe": piece_model("bpe"),
    "sentencepiece unigram": piece_model("unigram"),
}
LOSSLESS = ("byte-level", "byte-level by the kernel", "whole words")


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, TextEncoder]:
    kind = request.param
    path = KINDS[kind](tmp_path_factory.mktemp("tokenizer"))
    return kind, path, open_text_tokenizer(path)[2]


def ids_of(path: Path, tokens: tuple[str, ...]) -> dict[str, int]:
    """Id of each token that the tokenizer has, as the library that made it says."""
    if path.suffix == ".model":
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        found = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    else:
        found = Tokenizer.from_file(str(path / "tokenizer.json")).get_vocab(with_added_tokens=True)
    return {token: found[token] for token in tokens if token in found}


FRAGMENTS = [
    *SPECIAL, *ADDED, *ORDINARY, *WORDS, "<unk>", "[UNK]", "<|eot_id|>", "<", ">", "<|", "|>", "<s", "speech_start>",
    "＜speech_start＞", "<SPEECH_START>", "<think\u0301>", "<e\u0301>", "<speech_start", "\u200b", " ", "\n", "\ufdd0",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=8).map("".join)


def test_no_text_becomes_a_control_token(tokenizer: tuple[str, Path, TextEncoder]) -> None:
    kind, path, encoder = tokenizer
    control = ids_of(path, (*SPECIAL, *ADDED))
    assert set(np.flatnonzero(encoder.control_ids)) >= set(control.values()) and len(control) >= 4
    forbidden = set(control.values()) - {encoder.unknown_id}

    @settings(max_examples=60, deadline=None)
    @given(st.lists(TEXTS, min_size=1, max_size=3))
    def check(texts: list[str]) -> None:
        texts = [text.encode("utf-8", "ignore").decode() for text in texts]
        found = encoder.encode_batch(texts)
        for text, ids in zip(texts, found, strict=True):
            assert not forbidden & set(ids.tolist()), (text, ids)
            assert encoder.encode_batch([text])[0].tolist() == ids.tolist()
            if kind in LOSSLESS:
                assert encoder.decode(ids.tolist()) == text

    check()
    # Every spelling by itself, at both ends of a word, twice, and across another.
    for token in (*SPECIAL, *ADDED, "<unk>"):
        for text in (token, f"one {token}", f"{token}one", token * 2, token[:-1] + token, f" {token} two"):
            assert not forbidden & set(encoder.encode_batch([text])[0].tolist()), text


def test_added_tokens_that_are_text_are_used(tokenizer: tuple[str, Path, TextEncoder]) -> None:
    kind, path, encoder = tokenizer
    ordinary = ids_of(path, ORDINARY)
    assert len(ordinary) == {"byte-level by the kernel": 0}.get(kind, 2 if path.suffix == ".model" else 3)
    for token, number in ordinary.items():
        assert number in encoder.encode_batch([f"one{token}two"])[0].tolist() and encoder.is_text(number)


def test_text_without_control_tokens_has_the_ids_that_the_library_gives(
    tokenizer: tuple[str, Path, TextEncoder],
) -> None:
    _, path, encoder = tokenizer
    texts = ["one two three", "one    two 😀 www.www. नमस्ते", "1 < 2 > 0", "<b>bold</b>", "a|b"]
    if path.suffix == ".model":
        wanted = sentencepiece.SentencePieceProcessor(model_file=str(path)).encode(texts)
    else:
        library = Tokenizer.from_file(str(path / "tokenizer.json"))
        wanted = [encoding.ids for encoding in library.encode_batch(texts, add_special_tokens=False)]
    assert [ids.tolist() for ids in encoder.encode_batch(texts)] == wanted


def test_ids_of_control_tokens_still_have_their_names(tokenizer: tuple[str, Path, TextEncoder]) -> None:
    _, path, encoder = tokenizer
    for token, number in ids_of(path, (*SPECIAL, *ADDED)).items():
        # sentencepiece writes nothing for a control symbol, and the library a lower-cased name where that is normal.
        assert encoder.decode([number]).strip() in (token, token.lower(), "")


@pytest.mark.parametrize(
    ("token", "mark"),
    [
        *((token, True) for token in (*SPECIAL, *ADDED, "<|fim_prefix|>", "[/INST]", "<<SYS>>", "▁<PRE>")),
        *((token, False) for token in (*ORDINARY, "<0x0A>", "<>", "<->", "[1]", "<3", "\n", "▁▁", "hello", ">")),
    ],
)  # fmt: skip
def test_a_mark_is_a_name_between_brackets(token: str, mark: bool) -> None:
    assert is_mark(token) == mark


@pytest.fixture(scope="module")
def based(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone's folder whose <bos> and <eos> are added tokens that are not declared special."""
    folder = byte_level(tmp_path_factory.mktemp("based"))
    ids = ids_of(folder, ("<bos>", "<think>"))
    config = {"vocab_size": 320, "bos_token_id": ids["<bos>"], "eos_token_id": ids["<think>"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_documents_of_every_task_hold_the_specials_of_their_template_and_no_others(based: Path, tmp_path: Path) -> None:
    from megatron_speech.data.dataset.indexed import TokenDataset
    from megatron_speech.preprocess.preprocess_data import main as preprocess

    space = TokenSpace.build(based, CODEC, base=based)
    assert space.special("<bos>") == ids_of(based, ("<bos>",))["<bos>"] < space.text_size
    space.save(tmp_path / "ts.json")
    spelled = "<bos>hello <speech_start> <|s_3|></target_text><think> <|im_start|>"
    rows = {
        "tts": {"sample_id": "a", "transcript": spelled, "language": "en", "codes": [1, 2, 3]},
        "text_lm": {"sample_id": "b", "text": spelled, "language": "en"},
        "turns": {"sample_id": "c", "messages": [{"role": r, "content": spelled} for r in ("user", "assistant")]},
    }
    wanted = {
        "tts": ["<bos>", "<target_text>", "</target_text>", "<speech_start>", "<speech_end>"],
        "text_lm": ["<bos>", "<eos>"],
        "turns": ["<bos>", "<user>", "</user>", "<assistant>", "</assistant>"],
    }
    names = {number: name for name, number in space.special_ids.items()}
    control = {*np.flatnonzero(space.control_ids).tolist(), *names, *space.codebooks[0].ids.tolist()}
    for task, row in rows.items():
        (tmp_path / f"{task}.jsonl").write_text(json.dumps(row) + "\n")
        arguments = ["--task", task if task == "tts" else "text_lm", "--input", str(tmp_path / f"{task}.jsonl")]
        arguments += ["--token-space", str(tmp_path / "ts.json"), "--output-prefix", str(tmp_path / task)]
        assert preprocess(arguments) == 0
        document = np.asarray(TokenDataset(tmp_path / task).document(0))
        found = [int(i) for i in document if int(i) in control]
        codes = space.encode_codes(np.array([1, 2, 3])).tolist() if task == "tts" else []
        assert [names[i] for i in found if i not in codes] == wanted[task]
        assert [i for i in found if i in codes] == codes


def test_given_ids_of_text_hold_no_special_of_the_space(based: Path, tmp_path: Path) -> None:
    from megatron_speech.preprocess.preprocess_data import main as preprocess

    TokenSpace.build(based, CODEC, base=based).save(tmp_path / "ts.json")
    ids = ids_of(based, ("<think>", "<|im_start|>"))  # the first is <eos> here, the other a mark of the backbone's
    rows = [{"sample_id": str(i), "text_ids": [1, ids[token]]} for i, token in enumerate(ids)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--task", "text_lm", "--input", str(tmp_path / "rows.jsonl"), "--token-space"]
    arguments += [str(tmp_path / "ts.json"), "--output-prefix", str(tmp_path / "out"), "--max-rejected", "1"]
    assert preprocess(arguments) == 0
    (line,) = [line for path in tmp_path.rglob("*rejected*") for line in path.read_text().splitlines()]
    assert json.loads(line)["rule"] == "text_id_is_special" and str(ids["<think>"]) in line


def test_a_start_that_is_a_text_token_of_the_base_is_not_taken_over(
    based: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((based / "tokenizer.json").read_bytes())
    # The defaults of LlamaConfig, beside a tokenizer in which they are letters.
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 320, "bos_token_id": 1, "eos_token_id": 2}))
    space = TokenSpace.build(tmp_path, CODEC, base=tmp_path)
    assert space.special("<bos>") >= 320 and space.special("<eos>") >= 320
    assert "bos_token_id is 1, which is '\"'" in caplog.text and "an id of its own" in caplog.text
    assert space.decode_text(space.encode_text('say "one"!')) == 'say "one"!'


def test_a_saved_space_whose_start_is_a_letter_refuses_the_text_that_has_it(based: Path) -> None:
    from dataclasses import replace

    space = TokenSpace.build(based, CODEC)
    broken = replace(space, special_ids={**space.special_ids, "<bos>": 1})
    assert broken.encode_text("one").tolist() == space.encode_text("one").tolist()
    with pytest.raises(InputError, match=r"say .* becomes id 1 .*control token.*megatron-speech token-space"):
        broken.encode_text('say "one"')
    whole = replace(space, special_ids={**space.special_ids, "<bos>": ids_of(based, ("on",))["on"]})
    assert whole.decode_text(whole.encode_text("one")) == "one"
    assert ids_of(based, ("on",))["on"] not in whole.encode_text("one on").tolist()


def test_leaving_tokens_out_would_move_the_ids_of_others(based: Path) -> None:
    """Why control tokens are renamed: the library numbers what is left anew."""
    spec = json.loads((based / "tokenizer.json").read_text())
    emoji = ids_of(based, ("😀",))["😀"]
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in ADDED]
    assert tokenizers.Tokenizer.from_str(json.dumps(spec)).token_to_id("😀") != emoji
    space = TokenSpace.build(based, CODEC, base=based)
    assert emoji in space.encode_text("one😀").tolist()
