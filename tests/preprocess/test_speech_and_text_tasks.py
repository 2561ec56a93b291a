"""`asr` and `interleaved`: speech to its text, and recordings whose segments are in turn speech and text."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_speech.preprocess.references import COVERED, NO_ORDER, Keys, following_segments
from megatron_speech.tokens.normalization import normalize_transcript
from megatron_speech.tokens.templates import TEMPLATE_HASH, compile_document, template_hash


def keys_of(segments: list[tuple[int, int]]) -> Keys:
    """Keys of rows of (source, segment_order)."""
    count = len(segments)
    one = np.ones(count, dtype=np.uint64)
    return Keys(
        usable=np.ones(count, dtype=bool),
        sample=np.arange(1, count + 1, dtype=np.uint64),
        source=np.array([source for source, _ in segments], dtype=np.uint64),
        speaker=one, language=one,
        order=np.array([order for _, order in segments], dtype=np.int64),
        content_low=one, content_high=one,
    )  # fmt: skip


def documents(segments: list[tuple[int, int]], count: int) -> list[list[tuple[int, int]]]:
    found = following_segments(keys_of(segments), count)
    return [
        [segments[row], *(segments[other] for other in found[row].tolist() if other >= 0)]
        for row in np.flatnonzero(found[:, 0] >= 0).tolist()
    ]


def test_a_recording_is_cut_into_documents_of_n_segments_and_none_is_left_alone() -> None:
    assert documents([(1, order) for order in range(5)], 2) == [[(1, 0), (1, 1)], [(1, 2), (1, 3), (1, 4)]]
    assert documents([(1, order) for order in range(4)], 4) == [[(1, order) for order in range(4)]]
    assert documents([(1, 0), (1, 2), (2, 1)], 4) == []  # a gap, and another recording


def test_rows_may_stand_in_any_order_and_variants_go_with_variants() -> None:
    found = following_segments(keys_of([(7, 1), (7, 0), (7, 1), (7, 0)]), 4)
    assert found[:, 0].tolist() == [COVERED, 0, COVERED, 2]


@given(
    segments=st.lists(st.tuples(st.integers(1, 3), st.integers(0, 6)), max_size=25),
    count=st.integers(2, 5),
    unordered=st.booleans(),
)
def test_every_segment_is_in_a_document_or_has_no_neighbour(
    segments: list[tuple[int, int]], count: int, unordered: bool
) -> None:
    if unordered:
        segments = [*segments, (1, int(NO_ORDER))]
    found = following_segments(keys_of(segments), count)
    taken = Counter(int(row) for row in found.ravel() if row >= 0)
    for row, (source, order) in enumerate(segments):
        members = [int(other) for other in found[row] if other >= 0]
        # Of one recording, one after the other.
        assert [segments[other] for other in members] == [(source, order + 1 + k) for k in range(len(members))]
        assert (found[row, 0] == COVERED) == (row in taken)
        assert not (members and row in taken)
        if not members and row not in taken and order != NO_ORDER:
            neighbours = {(source, order - 1), (source, order + 1)} & set(segments)
            # Alone: without a neighbour, or a variant more than others of the recording have.
            variants = Counter(segments)
            fewest = min(count for (other, _), count in variants.items() if other == source)
            assert not neighbours or variants[source, order] > fewest
    assert all(1 <= len([other for other in row if other >= 0]) <= count for row in found[found[:, 0] >= 0])


def test_asr_documents_are_speech_and_then_its_text(corpus: Any) -> None:
    space, asr = corpus.space, corpus.convert("asr")
    assert asr.manifest is not None
    assert asr.manifest.template_hash == template_hash("asr") != TEMPLATE_HASH
    targets = asr.columns("target_tokens")["target_tokens"].to_pylist()
    for number, (row, codes) in enumerate(zip(corpus.rows, corpus.codes, strict=True)):
        text = space.encode_text(normalize_transcript(row["transcript"]))
        wanted = compile_document(space, "asr", code_ids=space.encode_codes(codes.astype(np.int32)), text_ids=text)
        assert asr.document(number).tolist() == wanted.tolist()
        assert targets[number] == len(text) + 1


def test_interleaved_documents_change_between_text_and_speech(corpus: Any) -> None:
    dataset, space = corpus.convert("interleaved", "--interleave", 3), corpus.space
    assert dataset.manifest is not None
    assert dataset.manifest.documents == len(corpus.rows) // 3
    assert dataset.manifest.filters.kept == len(corpus.rows) // 3 * 3
    columns = dataset.columns(
        "sample_id", "target_tokens", "text_tokens", "audio_tokens", "transcript_native", "source_id"
    )
    begins = set()
    for number in range(len(dataset)):
        rows = range(3 * number, 3 * number + 3)
        assert columns["sample_id"][number].as_py() == corpus.rows[rows[0]]["sample_id"]
        texts = [space.encode_text(normalize_transcript(corpus.rows[row]["transcript"])) for row in rows]
        speech = [space.encode_codes(corpus.codes[row].astype(np.int32)) for row in rows]
        forms = {
            kind: compile_document(
                space,
                "interleaved",
                segments=[
                    ("text", texts[k]) if (k % 2 == 0) == (kind == "text") else ("speech", speech[k]) for k in range(3)
                ],
            )
            for kind in ("text", "speech")
        }
        (begin,) = (kind for kind, ids in forms.items() if ids.tolist() == dataset.document(number).tolist())
        begins.add(begin)
        first = np.flatnonzero(dataset.document(number) == space.special("<speech_start>"))[0]
        assert columns["target_tokens"][number].as_py() == len(dataset.document(number)) - first - 1
        spoken = speech[1::2] if begin == "text" else speech[0::2]
        assert columns["audio_tokens"][number].as_py() == sum(map(len, spoken))
        written = texts[0::2] if begin == "text" else texts[1::2]
        assert columns["text_tokens"][number].as_py() == sum(map(len, written))
        said = " ".join(normalize_transcript(corpus.rows[row]["transcript"]) for row in rows)
        assert columns["transcript_native"][number].as_py() == said
    assert begins == {"text", "speech"}


def test_segments_without_a_neighbour_are_counted_and_unusable_ones_cut_a_recording(corpus: Any) -> None:
    rows = [dict(row) for row in corpus.rows]
    rows[1]["code_len"] = 10**6  # the middle of the first recording: both of its neighbours are alone then
    corpus.write(rows)
    manifest = corpus.convert("interleaved", "--max-rejected", 0.1).manifest
    assert manifest is not None
    assert manifest.filters.dropped == {"codes_length": 1, "no_neighbour": 2}
    assert manifest.filters.kept + sum(manifest.filters.dropped.values()) == len(rows)


def test_a_conversion_in_shards_has_the_documents_of_the_whole(corpus: Any) -> None:
    whole = corpus.convert("interleaved", prefix="out/whole")
    parts = []
    for index in range(2):
        part = corpus.convert("interleaved", "--shard", f"{index}/2", prefix=f"out/part{index}")
        parts += [part.document(number).tolist() for number in range(len(part))]
    assert parts == [whole.document(number).tolist() for number in range(len(whole))]


def test_flags_of_one_task_are_refused_for_another(corpus: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert corpus.run("asr", "--interleave", "3") == 2
    assert "--interleave is only for --task interleaved" in capsys.readouterr().err
    assert corpus.run("speech_lm", "--transcript", "romanized") == 2
    assert "--transcript is only for tasks with transcripts" in capsys.readouterr().err
