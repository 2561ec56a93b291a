"""Control tags on the road: conversion reads them where it is told to, and only there."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_speech.tokens.space import TokenSpace
from megatron_speech.tokens.templates import compile_document


@pytest.fixture
def tagged(corpus: Any) -> Any:
    """A corpus whose first transcripts hold tags."""
    corpus.space = TokenSpace.build("bytes", corpus.space.codec, controls=["pause"])
    corpus.space.save(corpus.folder / "ts.json")
    for row, text in zip(corpus.rows, ("one [[pause]] two", "three [[paws]]", r"\[[pause]]"), strict=False):
        row["transcript"] = text
    corpus.write(corpus.rows)
    return corpus


def document(corpus: Any, row: int, text: list[int]) -> list[int]:
    codes = corpus.space.encode_codes(corpus.codes[row].astype("int32"))
    return compile_document(corpus.space, "tts", text_ids=text, code_ids=codes).tolist()


def test_tags_are_tokens_where_they_are_asked_for(tagged: Any) -> None:
    pause = tagged.space.controls["pause"]
    dataset = tagged.convert("tts", "--control-tags", "--max-rejected", 0.1)
    assert dataset.document(0).tolist() == document(tagged, 0, [*b"one ", pause, *b" two"])
    assert dataset.document(1).tolist() == document(tagged, 2, [*b"[[pause]]"])
    assert dataset.manifest.filters.dropped == {"unknown_control": 1}
    assert dataset.manifest.options["control_tags"] is True
    assert "did you mean 'pause'?" in json.loads(tagged.files()["rejected.jsonl"])["reason"]


def test_else_they_are_text_and_the_manifest_counts_them(tagged: Any) -> None:
    dataset = tagged.convert("tts")
    assert dataset.document(0).tolist() == document(tagged, 0, [*b"one [[pause]] two"])
    assert dataset.manifest.notices["control_tags_as_text"] == 2
    assert "control_tags" not in dataset.manifest.options


def test_filters_look_at_what_is_said(tagged: Any) -> None:
    rules = tagged.folder / "rules.yaml"
    rules.write_text("filters: [{rule: text_length, max_characters: 9}]\n")
    for row in tagged.rows:
        row["transcript"] = "a [[pause]] b"
    tagged.write(tagged.rows)
    assert tagged.convert("tts", "--control-tags", "--filters", rules).manifest.filters.dropped == {}
    assert tagged.run("tts", "--filters", rules, prefix="out/none") == 2


def test_references_have_their_tags_too(tagged: Any) -> None:
    pause = tagged.space.controls["pause"]
    for row in tagged.rows:
        row["transcript"] = "[[pause]]x"
    tagged.write(tagged.rows)
    dataset = tagged.convert("tts", "--control-tags", "--cloning", "same-speaker")
    assert (dataset.document(0) == pause).sum() == 2


def test_flags_that_could_do_nothing_are_refused(corpus: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert corpus.run("tts", "--control-tags") == 2
    assert "declares no control; make one with" in capsys.readouterr().err
    assert corpus.run("speech_lm", "--control-tags") == 2
