"""Claims about the template compiler: documents are exactly the grammar, and prompts are exactly their heads."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_speech.errors import InputError
from megatron_speech.tokens.space import CodecDescription, TokenSpace
from megatron_speech.tokens.templates import compile_document, compile_prompt, count_target_tokens, render

SPACE = TokenSpace.build("bytes", CodecDescription("toy", "c0ffee", 8000, 25.0, ("a", "b"), (5, 7)))
TEXT, REF_TEXT = SPACE.encode_text("hi"), SPACE.encode_text("yo")
CODES = SPACE.encode_codes(np.array([[1, 2], [3, 4]]))
OTHER = SPACE.encode_codes(np.array([[0, 6]]))


def written(*parts: str | np.ndarray) -> list[int]:
    return [int(i) for part in parts for i in ([SPACE.special(part)] if isinstance(part, str) else part)]


def test_documents_are_exactly_the_grammar() -> None:
    assert compile_document(SPACE, "speech_lm", code_ids=CODES).tolist() == written(
        "<bos>", "<speech_start>", CODES, "<speech_end>"
    )
    assert compile_document(SPACE, "speech_lm", prompt_code_ids=OTHER, code_ids=CODES).tolist() == written(
        "<bos>", "<speech_start>", OTHER, "<speech_sep>", CODES, "<speech_end>"
    )
    assert compile_document(SPACE, "tts", text_ids=TEXT, code_ids=CODES).tolist() == written(
        "<bos>", "<target_text>", TEXT, "</target_text>", "<speech_start>", CODES, "<speech_end>"
    )
    cloning = compile_document(SPACE, "tts", text_ids=TEXT, code_ids=CODES, ref_text_ids=REF_TEXT, ref_code_ids=OTHER)
    assert cloning.tolist() == written(
        *("<bos>", "<ref_text>", REF_TEXT, "</ref_text>", "<ref_speech>", OTHER, "</ref_speech>"),
        *("<target_text>", TEXT, "</target_text>", "<speech_start>", CODES, "<speech_end>"),
    )
    assert compile_document(SPACE, "text_lm", text_ids=TEXT).tolist() == written("<bos>", TEXT, "<eos>")
    assert compile_document(SPACE, "text_lm", turns=[("user", TEXT), ("assistant", REF_TEXT)]).tolist() == written(
        "<bos>", "<user>", TEXT, "</user>", "<assistant>", REF_TEXT, "</assistant>"
    )


@pytest.mark.parametrize(
    ("task", "fields"),
    [
        ("speech_lm", {}),
        ("speech_lm", {"prompt_code_ids": OTHER}),
        ("tts", {"text_ids": TEXT}),
        ("tts", {"text_ids": TEXT, "ref_text_ids": REF_TEXT, "ref_code_ids": OTHER}),
    ],
)
def test_a_prompt_is_the_head_of_its_document(task: str, fields: dict[str, np.ndarray]) -> None:
    prompt = compile_prompt(SPACE, task, **fields)
    document = compile_document(SPACE, task, code_ids=CODES, **fields)
    assert document.tolist() == [*prompt, *CODES, SPACE.special("<speech_end>")]


def test_what_sft_learns_is_what_follows_speech_start() -> None:
    assert count_target_tokens(SPACE, compile_document(SPACE, "tts", text_ids=TEXT, code_ids=CODES)) == len(CODES) + 1
    assert count_target_tokens(SPACE, compile_document(SPACE, "text_lm", text_ids=TEXT)) == 0


def test_append_eod_ends_every_document_with_one_eos() -> None:
    eos = SPACE.special("<eos>")
    for task, fields in (("speech_lm", {"code_ids": CODES}), ("text_lm", {"text_ids": TEXT})):
        document = compile_document(SPACE, task, append_eod=True, **fields)
        assert document[-1] == eos and (document == eos).sum() == 1


@pytest.mark.parametrize(
    ("task", "fields", "words"),
    [
        ("asr", {"text_ids": TEXT}, "plain: {codes} {text}"),
        ("tts", {"text_ids": TEXT}, "plain"),
        ("tts", {"text_ids": TEXT, "code_ids": CODES, "ref_text_ids": REF_TEXT}, "cloning"),
        ("text_lm", {"turns": [("robot", TEXT)]}, "role 'robot'"),
    ],
)
def test_what_no_form_of_the_task_has_is_refused(task: str, fields: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        compile_document(SPACE, task, **fields)


def test_a_document_is_readable() -> None:
    document = compile_document(SPACE, "tts", text_ids=SPACE.encode_text("héllo"), code_ids=CODES)
    assert render(SPACE, document) == (
        "<bos> <target_text> héllo </target_text> <speech_start> [2 frames: 1,2 | 3,4] <speech_end>"
    )
    assert render(SPACE, np.zeros(0, np.int32)) == ""
    assert "outside the token space" in render(SPACE, np.array([SPACE.size + 3]))
