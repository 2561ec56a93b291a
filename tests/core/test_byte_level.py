"""The compiled byte-level BPE gives the tokenizers library's ids, whatever the text."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_speech.ops.extension import extension
from megatron_speech.tokens import byte_level

pytestmark = pytest.mark.skipif(extension() is None, reason="the compiled extension is not built")

WORDS = "the them there then we're I'LL it's naïve 12 1234 नमस्ते दुनिया ሰላም 日本語 , ... \n\n  \t x"
TRICKY = "aSsTtlLeErRvV'’ſ0½٣ \n\r\t\u00a0\u3000\u2028.,!?—ß\u0301अािሀ日😀\u200d\u0000\x85\ufeff"


def tokenizer_json(pattern, **model):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 50, trainer)
    spec = json.loads(tokenizer.to_str())
    if pattern is not None:
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
    spec["model"].update(model)
    return spec


def both(spec):
    """(the library's ids of texts, the kernel's)."""
    payload = json.dumps(spec)
    library = tokenizers.Tokenizer.from_str(payload)
    library.encode_special_tokens = True
    kernel = byte_level.make(payload.encode())
    assert kernel is not None

    def ids(texts):
        expected = [one.ids for one in library.encode_batch_fast(texts, add_special_tokens=False)]
        return expected, [one.tolist() for one in kernel.encode_batch(texts)]

    return ids


CASES = [(pattern, whole) for pattern in byte_level.PATTERNS for whole in (False, True)]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{byte_level.PATTERNS[case[0]]}-{case[1]}")
def ids(request):
    pattern, whole = request.param
    return both(tokenizer_json(pattern, ignore_merges=whole))


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(texts=st.lists(st.text(alphabet=TRICKY) | st.text(), max_size=8))
def test_any_text_has_the_librarys_ids(ids, texts):
    expected, found = ids(texts)
    assert found == expected


def test_long_words_and_special_names_have_the_librarys_ids(ids):
    expected, found = ids(["the" * 400, "日本語" * 100, "a" * 25, "", " ", "<|end|> the", "it's" * 30, "\n" * 70])
    assert found == expected


@pytest.mark.slow
def test_every_character_has_the_librarys_ids(ids):
    codes = [code for code in range(0x20000) if not 0xD800 <= code < 0xE000]
    texts = ["x".join(f"{chr(code)} {chr(code)}1" for code in codes[i : i + 512]) for i in range(0, len(codes), 512)]
    expected, found = ids(texts)
    assert found == expected


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
    ],
    ids=["normaliser", "prefix space", "another split", "no split"],
)
def test_a_tokenizer_of_another_kind_stays_with_the_library(change):
    assert byte_level.make(json.dumps(tokenizer_json(None) | change).encode()) is None


def test_an_added_token_that_is_no_special_one_stays_with_the_library():
    spec = tokenizer_json(None)
    spec["added_tokens"][0]["special"] = False
    assert byte_level.make(json.dumps(spec).encode()) is None


def test_dropout_stays_with_the_library():
    assert byte_level.make(json.dumps(tokenizer_json(None, dropout=0.1)).encode()) is None
