"""Claims about the id space: every id has one meaning, a saved space is the same space, damage is named."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_speech.errors import InputError
from megatron_speech.tokens.space import (
    MODALITY_AUDIO,
    MODALITY_SPECIAL,
    MODALITY_TEXT,
    SPECIALS,
    CodecDescription,
    TokenSpace,
)

CODEC = CodecDescription("toy", "c0ffee", 8000, 25.0, ("a", "b", "c"), (5, 7, 3))


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=None, byte_fallback=True))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|begin|>", "<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["one two three four five", "नमस्ते दुनिया"] * 20, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"vocab_size": 320, "bos_token_id": 0, "eos_token_id": [1, 5]}))
    return folder


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spm")
    text = folder / "text.txt"
    text.write_text("\n".join(["one two three four five six seven", "eins zwei drei vier", "नमस्ते दुनिया"] * 50))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "toy"),
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    return folder / "toy.model"


@pytest.fixture(params=["bytes", "huggingface", "sentencepiece"])
def space(request: pytest.FixtureRequest) -> TokenSpace:
    if request.param == "bytes":
        source: str | Path = "bytes"
    elif request.param == "huggingface":
        source = request.getfixturevalue("hf_folder")
    else:
        source = request.getfixturevalue("sentencepiece_model")
    return TokenSpace.build(source, CODEC)


def test_every_id_has_exactly_one_meaning(space: TokenSpace) -> None:
    ranges = [range(space.text_size), *([i] for i in space.special_ids.values())]
    ranges += [range(book.offset, book.offset + book.size) for book in space.codebooks]
    ids = [i for one in ranges for i in one]
    assert sorted(ids) == list(range(space.size))
    assert space.padded_size % 128 == 0 and 0 <= space.padded_size - space.size < 128
    modality = space.modality_table()
    assert (modality[: space.text_size] == MODALITY_TEXT).all()
    assert (modality[list(space.special_ids.values())] == MODALITY_SPECIAL).all()
    assert all((modality[book.ids] == MODALITY_AUDIO).all() for book in space.codebooks)
    assert np.bincount(space.codebook_table() + 1).tolist() == [space.padded_size - 15, 5, 7, 3]


def test_a_saved_space_is_the_same_space(space: TokenSpace, tmp_path: Path) -> None:
    space.save(tmp_path / "ts.json")
    again = TokenSpace.load(tmp_path / "ts.json")
    assert again == space and again.hash == space.hash
    for text in ("one two", "नमस्ते", "“½” \t x"):
        assert again.encode_text(text).tolist() == space.encode_text(text).tolist()


def test_text_survives_encoding(space: TokenSpace) -> None:
    for text in ("one two three", "नमस्ते दुनिया", "zwölf Boxkämpfer"):
        ids = space.encode_text(text)
        assert ids.dtype == np.int32 and ids.min() >= 0 and ids.max() < space.text_size
        assert space.decode_text(ids) == text


def test_a_special_written_in_a_transcript_is_text(space: TokenSpace) -> None:
    for text in ("<speech_start> one", "<|begin|> one <|end|>", "</s>"):
        ids = space.encode_text(text)
        assert not set(ids.tolist()) & set(space.special_ids.values())
        assert space.modality_table()[ids].max() == MODALITY_TEXT
    if space.text_kind == "huggingface":
        assert not set(space.encode_text("<|begin|>").tolist()) & {0, 1}


def test_batch_encoding_equals_one_by_one_and_survives_pickling(space: TokenSpace) -> None:
    texts = ["one", "", "two three", "नमस्ते"]
    one_by_one = [space.encode_text(text).tolist() for text in texts]
    assert [ids.tolist() for ids in space.encode_text_batch(texts)] == one_by_one
    copy = pickle.loads(pickle.dumps(space))
    assert [ids.tolist() for ids in copy.encode_text_batch(texts)] == one_by_one


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6), st.integers(0, 2)), max_size=20))
def test_codes_survive_flattening(frames: list[tuple[int, int, int]]) -> None:
    space = TokenSpace.build("bytes", CODEC)
    codes = np.array(frames, dtype=np.int64).reshape(-1, 3)
    ids = space.encode_codes(codes)
    assert ids.shape == (codes.size,)
    assert (space.codebook_table()[ids] == np.tile([0, 1, 2], len(codes))).all()
    assert (space.decode_codes(ids) == codes).all()


@pytest.mark.parametrize(
    ("codes", "words"),
    [
        (np.array([[0, 7, 0]]), ["code 7", "frame 0", "'b'", "0 to 6"]),
        (np.array([[0, 0, 0], [-1, 0, 0]]), ["code -1", "frame 1", "'a'"]),
        (np.zeros((2, 2), int), ["[2, 2]", "[frames, 3]"]),
        (np.zeros((2, 3)), ["float64", "integers"]),
    ],
)
def test_codes_that_are_not_of_the_codec_are_refused(codes: np.ndarray, words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        TokenSpace.build("bytes", CODEC).encode_codes(codes)
    assert all(word in str(error.value) for word in words)


def test_ids_out_of_codebook_order_are_refused() -> None:
    space = TokenSpace.build("bytes", CODEC)
    ids = space.encode_codes(np.zeros((2, 3), int))
    with pytest.raises(InputError, match="whole frames"):
        space.decode_codes(ids[:-1])
    with pytest.raises(InputError, match="codebook order"):
        space.decode_codes(ids[[1, 0, 2]])


def test_base_model_keeps_its_rows_and_its_bos_and_eos(hf_folder: Path) -> None:
    space = TokenSpace.build(hf_folder, CODEC, base=hf_folder)
    assert space.text_size == 320  # config.json, not the tokenizer, says where new rows begin
    assert space.special("<bos>") == 0 and space.special("<eos>") == 1
    assert space.special("<pad>") == 320
    assert space.size == 320 + len(SPECIALS) - 2 + 15
    assert space.modality_table()[[0, 1]].tolist() == [MODALITY_SPECIAL] * 2


def test_two_spaces_differ_in_hash_when_anything_differs(hf_folder: Path) -> None:
    other_codec = CodecDescription("toy", "decaf", 8000, 25.0, ("a", "b", "c"), (5, 7, 3))
    hashes = {
        TokenSpace.build("bytes", CODEC).hash,
        TokenSpace.build("bytes", other_codec).hash,
        TokenSpace.build("bytes", CODEC, pad_multiple=256).hash,
        TokenSpace.build(hf_folder, CODEC).hash,
        TokenSpace.build(hf_folder, CODEC, base=hf_folder).hash,
    }
    assert len(hashes) == 5


def _damaged(path: Path, change: object) -> Path:
    value = json.loads(path.read_text())
    change(value)  # type: ignore[operator]
    path.write_text(json.dumps(value))
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda value: value["specials"].update({"<bos>": 300}), "hash"),
        (lambda value: value.update(format_version=99), "format_version is 99"),
        (lambda value: value.pop("codec"), "codec"),
        (lambda value: value["text"].update(payload="%%%"), "not a token space"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, change: object, words: str) -> None:
    TokenSpace.build("bytes", CODEC).save(tmp_path / "ts.json")
    path = _damaged(tmp_path / "ts.json", change)
    with pytest.raises(InputError, match=words) as error:
        TokenSpace.load(path)
    assert str(path) in str(error.value)


def test_unusable_tokenizers_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(InputError, match=r"bad\.model"):
        TokenSpace.build(tmp_path / "bad.model", CODEC)
    with pytest.raises(InputError, match="holds neither"):
        TokenSpace.build(tmp_path, CODEC)
    with pytest.raises(InputError, match="does not exist"):
        TokenSpace.build(tmp_path / "absent", CODEC)
    empty = tokenizers.Tokenizer(tokenizers.models.BPE())
    empty.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="yields no token"):
        TokenSpace.build(tmp_path, CODEC)
