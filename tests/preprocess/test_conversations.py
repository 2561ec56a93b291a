"""Conversations as others write them, and texts in which nothing can be seen."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from megatron_speech.tokens.normalization import (
    normalize_document,
    normalize_documents,
    normalize_transcript,
    normalize_transcripts,
)
from megatron_speech.tokens.space import TokenSpace
from megatron_speech.tokens.templates import TEMPLATE_HASH, render

TURNS = [("system", "Be brief."), ("human", "Hi"), ("gpt", "Hello")]
SHOWN = "<bos> <system> Be brief. </system> <user> Hi </user> <assistant> Hello </assistant>"
SHAREGPT = [{"from": role, "value": text} for role, text in TURNS]
ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


def test_conversations_are_read_as_others_write_them(corpus: Any) -> None:
    rows = [
        {"messages": [{"role": ROLES[role], "content": text} for role, text in TURNS]},
        {"conversations": SHAREGPT},
        {"conversations": SHAREGPT[1:], "system": "Be brief."},
        {"turns": [[ROLES[role], text] for role, text in TURNS]},
        {"conversations": json.dumps(SHAREGPT)},
        {"conversations": SHAREGPT, "system": "", "id": "x"},
    ]
    path = corpus.write(rows, "chat.jsonl")
    dataset = corpus.convert("text_lm", inputs=[path])
    assert [render(corpus.space, dataset.document(i)) for i in range(len(rows))] == [SHOWN] * len(rows)
    assert dataset.manifest.forms == {"turns": len(rows)}


@pytest.mark.parametrize(
    "conversation",
    [[{"from": "tool", "value": "x"}], [{"from": "human"}], "not a list", "[{", [{"from": ["human"], "value": "x"}]],
)
def test_turns_of_other_kinds_are_rejected(corpus: Any, conversation: Any) -> None:
    path = corpus.write([{"text": "fine"}, {"conversations": conversation}], "chat.jsonl")
    dataset = corpus.convert("text_lm", "--max-rejected", 0.9, inputs=[path])
    assert dataset.manifest.filters.dropped == {"bad_turns": 1}


def test_a_token_space_made_before_system_turns_says_what_to_do(
    corpus: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    specials = {name: i for name, i in corpus.space.special_ids.items() if "system" not in name}
    older = replace(corpus.space, special_ids=specials, size=corpus.space.size - 2)
    older.save(corpus.folder / "ts.json")
    assert TokenSpace.load(corpus.folder / "ts.json").hash == older.hash != corpus.space.hash
    path = corpus.write([{"text": "fine"}, {"conversations": SHAREGPT}], "chat.jsonl")
    assert corpus.run("text_lm", inputs=[path]) == 2
    error = capsys.readouterr().err
    assert "chat.jsonl line 2: a turn of the role system needs the special <system>" in error
    assert "make a new one with `megatron-speech token-space`" in error and error.count("\n") == 1
    corpus.write([{"conversations": SHAREGPT[1:]}], "chat.jsonl")
    assert corpus.run("text_lm", inputs=[path]) == 0  # everything else goes on as it was


def test_the_system_special_moves_no_other_id_and_no_hash_of_templates(corpus: Any) -> None:
    space = corpus.space
    assert [space.special(name) for name in ("<system>", "</system>")] == [space.size - 2, space.size - 1]
    ids = sorted([i for name, i in space.special_ids.items() if "system" not in name])
    assert ids == list(range(256, 272)) and space.codebooks[0].offset == 272
    assert TEMPLATE_HASH.startswith("66488b3e34b21f77")  # of all datasets so far


@pytest.mark.parametrize("text", ["\u200b", "\u200d \u200c", "\ufeff\u2060\ufeff", "\n\u200b\n", " \u2060"])
def test_texts_of_only_zero_width_characters_are_empty(text: str) -> None:
    assert normalize_transcript(text) == normalize_document(text) == ""
    assert normalize_transcripts(["a", text, "b"]) == normalize_documents(["a", text, "b"]) == ["a", "", "b"]


@pytest.mark.parametrize("text", ["\u200cक", "क\u200d", "\u200b一\u200b二", "\u200d\u200d."])
def test_zero_width_characters_beside_others_stay(text: str) -> None:
    assert normalize_transcript(text) == normalize_document(text) == text
    assert normalize_transcripts([text, "b"]) == normalize_documents([text, "b"]) == [text, "b"]


def test_rows_whose_transcript_cannot_be_seen_are_rejected_as_empty(corpus: Any) -> None:
    corpus.write([*corpus.rows, {**corpus.rows[0], "sample_id": "blank", "transcript": "\u200b \ufeff\u200d"}])
    dataset = corpus.convert("tts", "--max-rejected", 0.5)
    assert dataset.manifest.filters.dropped == {"empty_text": 1} and len(dataset) == 60
