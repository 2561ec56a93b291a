"""Claims about the unknown id: each kind of tokenizer says which id stands for text that it cannot spell."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from megatron_speech.tokens.space import CodecDescription, TokenSpace

CODEC = CodecDescription("toy", "c0ffee", 8000, 25.0, ("a",), (5,))
FOREIGN = "ꦲꦏ꧀ꦱꦫ"  # Javanese: in none of the vocabularies below


def _sentencepiece(folder: Path, byte_fallback: bool) -> Path:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["one two three four five six seven"] * 20),
        model_prefix=str(folder / "toy"),
        vocab_size=300 if byte_fallback else 40,
        model_type="bpe",
        byte_fallback=byte_fallback,
        unk_id=3,
        bos_id=0,
        eos_id=1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return folder / "toy.model"


def _hugging_face(folder: Path, kind: str) -> Path:
    vocabulary = {"[PAD]": 0, "one": 1, "[UNK]": 2, "hello": 3}
    if kind == "wordpiece":
        model = tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]")
    elif kind == "wordlevel":
        model = tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")
    elif kind == "unigram":
        model = tokenizers.models.Unigram([("[PAD]", 0.0), ("one", -1.0), ("[UNK]", 0.0), ("hello", -1.0)], unk_id=2)
    else:
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        model = tokenizers.models.BPE({letter: i for i, letter in enumerate(sorted(alphabet))}, [])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if kind == "byte-level":
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("byte_fallback", [False, True])
def test_sentencepiece_names_its_unknown_piece(tmp_path: Path, byte_fallback: bool) -> None:
    space = TokenSpace.build(_sentencepiece(tmp_path, byte_fallback), CODEC)
    assert space.unknown_id == 3
    assert (3 in space.encode_text(FOREIGN).tolist()) is not byte_fallback


@pytest.mark.parametrize("kind", ["wordpiece", "wordlevel", "unigram"])
def test_hugging_face_models_name_their_unknown_token(tmp_path: Path, kind: str) -> None:
    space = TokenSpace.build(_hugging_face(tmp_path, kind), CODEC)
    assert space.unknown_id == 2
    assert 2 in space.encode_text(FOREIGN).tolist()
    assert 2 not in space.encode_text("one").tolist()


def test_bytes_and_byte_level_tokenizers_know_everything(tmp_path: Path) -> None:
    assert TokenSpace.build("bytes", CODEC).unknown_id is None
    assert TokenSpace.build(_hugging_face(tmp_path, "byte-level"), CODEC).unknown_id is None


def test_the_unknown_id_survives_saving(tmp_path: Path) -> None:
    space = TokenSpace.build(_hugging_face(tmp_path, "wordpiece"), CODEC)
    space.save(tmp_path / "ts.json")
    assert TokenSpace.load(tmp_path / "ts.json").unknown_id == 2
