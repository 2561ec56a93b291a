"""Control tags: tokens that a text names on purpose, and never by accident."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_speech.errors import InputError
from megatron_speech.tokens.control_tags import UnknownTag, encode_tagged, split_tags, without_tags
from megatron_speech.tokens.space import CodecDescription, TokenSpace
from megatron_speech.tokens.templates import render

CODEC = CodecDescription("toy", "0" * 64, 8000, 25.0, ("a",), (5,))
SPACE = TokenSpace.build("bytes", CODEC, controls=["pause", "style-whisper"])
PAUSE, WHISPER = SPACE.controls["pause"], SPACE.controls["style-whisper"]


def test_a_declared_tag_is_a_token_and_its_text_is_not() -> None:
    assert split_tags("[[style-whisper]]so[[pause]] [[pause]]", SPACE.controls) == [WHISPER, "so", PAUSE, " ", PAUSE]
    (ids,), problems = encode_tagged(SPACE, ["ab[[pause]]c"])
    assert problems == {} and ids.tolist() == [97, 98, PAUSE, 99]
    assert render(SPACE, ids) == "ab [[pause]] c"
    # Without being asked for, the same letters are letters.
    assert SPACE.encode_text("ab[[pause]]c").tolist() == list(b"ab[[pause]]c")


def test_an_escaped_tag_is_text() -> None:
    assert split_tags(r"say \[[pause]]!", SPACE.controls) == ["say [[pause]]!"]
    assert without_tags(r"say \[[pause]] and[[pause]] go") == "say [[pause]] and go"


def test_an_unknown_tag_is_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownTag, match=r"\[\[puase\]\] is a control tag .* did you mean 'pause'\?"):
        split_tags("a [[puase]] b", SPACE.controls)
    ids, problems = encode_tagged(SPACE, ["a", "[[b]]", "[[pause]]"])
    assert [one.tolist() for one in ids] == [[97], [], [PAUSE]]
    assert list(problems) == [1]


@given(st.lists(st.text(alphabet="ab [](\\pause", max_size=20), max_size=6))
def test_texts_without_a_tag_are_encoded_as_ever(texts: list[str]) -> None:
    ids, problems = encode_tagged(SPACE, texts)
    for index, text in enumerate(texts):
        if without_tags(text) == text and index not in problems:
            assert ids[index].tolist() == SPACE.encode_text(text).tolist()


@given(st.lists(st.sampled_from(["[[pause]]", "[[style-whisper]]", "x", "é", " ", "[", "]"]), max_size=12))
def test_what_is_left_of_a_text_without_its_tags_is_what_is_said(parts: list[str]) -> None:
    text = "".join(parts)
    (ids,), problems = encode_tagged(SPACE, [text])
    if not problems:
        controls = np.isin(ids, [PAUSE, WHISPER])
        assert SPACE.decode_text(ids[~controls]) == without_tags(text)


def test_controls_come_behind_everything_else_and_belong_to_the_hash(tmp_path) -> None:
    plain = TokenSpace.build("bytes", CODEC)
    assert SPACE.size == plain.size + 2 and (PAUSE, WHISPER) == (plain.size, plain.size + 1)
    assert {name: SPACE.special_ids[name] for name in plain.special_ids} == plain.special_ids
    assert SPACE.hash != plain.hash and plain.controls == {}
    SPACE.save(tmp_path / "ts.json")
    assert TokenSpace.load(tmp_path / "ts.json").controls == SPACE.controls


@pytest.mark.parametrize(
    ("controls", "sentence"),
    [
        (["Pause"], "control 'Pause' cannot be a tag"),
        (["a]]"], "cannot be a tag"),
        (["a", "a"], "control 'a' is named twice"),
    ],
)
def test_names_that_cannot_be_are_refused(controls: list[str], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        TokenSpace.build("bytes", CODEC, controls=controls)
