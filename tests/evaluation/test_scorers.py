"""What the scorers hear, and that they are not fooled by themselves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_speech.codecs import get_codec
from megatron_speech.codecs.audio import read_audio
from megatron_speech.errors import InputError
from megatron_speech.evaluation.scorers import (
    LOOP_REPEATS,
    LOOP_SECONDS,
    PocketSphinx,
    can_score,
    chance_rates,
    error_rates,
    is_loop,
    normalise_text,
    prepare_audio,
)

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(scope="module")
def recogniser() -> PocketSphinx:
    pytest.importorskip("pocketsphinx", reason="pocketsphinx is not installed")
    return PocketSphinx(DIGITS)


@pytest.fixture(scope="module")
def recordings(fsdd: Path) -> list[tuple[str, np.ndarray]]:
    """150 real digits, evenly over words and speakers."""
    rows = [json.loads(line) for line in fsdd.read_text().splitlines()][::18]
    return [(row["transcript"], read_audio(fsdd.parent / row["wav_path"], 8000)) for row in rows]


@pytest.mark.slow
def test_pocketsphinx_hears_real_digits(recogniser: PocketSphinx, recordings: list[tuple[str, np.ndarray]]) -> None:
    heard = [recogniser.transcribe(audio, 8000) for _, audio in recordings]
    rates = error_rates([word for word, _ in recordings], heard)
    chance = chance_rates([word for word, _ in recordings], heard)
    assert rates is not None and chance is not None
    assert rates.exact >= 0.8
    assert rates.wer <= 0.2
    assert chance.exact <= 0.05


def test_a_transcript_does_not_depend_on_the_utterance_before(
    recogniser: PocketSphinx, recordings: list[tuple[str, np.ndarray]]
) -> None:
    some = [audio for _, audio in recordings[:12]]
    forwards = [recogniser.transcribe(audio, 8000) for audio in some]
    backwards = [recogniser.transcribe(audio, 8000) for audio in reversed(some)]
    assert forwards == backwards[::-1]


def test_level_and_offset_of_the_input_do_not_matter(recordings: list[tuple[str, np.ndarray]]) -> None:
    audio = recordings[0][1]
    prepared = prepare_audio(audio, 8000)
    assert prepared.dtype == np.int16
    assert len(prepared) == pytest.approx(2 * len(audio) + 3200, abs=2)
    assert np.abs(prepared.astype(int)).max() == pytest.approx(12_000, abs=300)
    np.testing.assert_allclose(prepare_audio(audio * 0.01 + 0.3, 8000), prepared, atol=20)


def test_nothing_to_hear_is_no_crash(recogniser: PocketSphinx) -> None:
    for audio in (np.zeros(0, np.float32), np.zeros(4000, np.float32), np.full(1, 0.5, np.float32)):
        assert isinstance(recogniser.transcribe(audio, 8000), str)


def test_words_that_the_dictionary_lacks_are_named() -> None:
    pytest.importorskip("pocketsphinx", reason="pocketsphinx is not installed")
    with pytest.raises(InputError, match="'zzyqx'"):
        PocketSphinx(["one", "zzyqx"])
    with pytest.raises(InputError, match="at least one word"):
        PocketSphinx(["one", "…"])


def test_texts_are_compared_without_case_and_punctuation() -> None:
    assert normalise_text("  It’s  ONE—two, “three”!") == "it's one two three"
    assert normalise_text("'quoted' don't") == "quoted don't"


def test_only_languages_that_the_scorer_hears_are_scored() -> None:
    assert [can_score(language) for language in ("en", "en-US", "EN_gb", "hi", "und", "enm")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip


def test_error_rates_pool_over_the_set() -> None:
    pytest.importorskip("jiwer", reason="jiwer is not installed")
    rates = error_rates(["a b c", "d"], ["a x c", "d"])
    assert rates is not None
    assert (rates.items, rates.wer, rates.exact) == (2, 0.25, 0.5)
    assert error_rates([], []) is None
    with pytest.raises(InputError, match="no word in it"):
        error_rates(["?!"], ["a"])


def test_chance_is_the_score_of_a_model_deaf_to_its_text() -> None:
    pytest.importorskip("jiwer", reason="jiwer is not installed")
    perfect, always = chance_rates(["a", "b", "c"], ["a", "b", "c"]), chance_rates(["a", "b", "c", "d"], ["a"] * 4)
    assert perfect is not None and always is not None
    assert perfect.exact == 0.0
    assert always.exact == 0.25
    assert chance_rates(["a", "a"], ["a", "b"]) is None


def naive_loop(codes: list[int], frame_rate_hz: float) -> bool:
    """Every block at every place, repeated for as long as it goes."""
    for start in range(len(codes)):
        for period in range(1, round(2 * frame_rate_hz) + 1):
            block, repeats = codes[start : start + period], 0
            while codes[start + repeats * period : start + (repeats + 1) * period] == block and len(block) == period:
                repeats += 1
            rest = 0  # a stretch may end within a block
            while (
                repeats
                and start + repeats * period + rest < len(codes)
                and codes[start + repeats * period + rest] == block[rest]
            ):
                rest += 1
            if repeats >= LOOP_REPEATS and repeats * period + rest >= LOOP_SECONDS * frame_rate_hz - 1e-9:
                return True
    return False


@settings(max_examples=300, deadline=None)
@given(
    codes=st.lists(st.integers(0, 1), max_size=26) | st.lists(st.integers(0, 2), max_size=40),
    frame_rate_hz=st.sampled_from([5.0, 12.5, 25.0]),
)
def test_a_loop_is_a_block_repeated_without_a_gap(codes: list[int], frame_rate_hz: float) -> None:
    assert is_loop(np.array(codes, dtype=np.int32).reshape(-1, 1), frame_rate_hz) == naive_loop(codes, frame_rate_hz)


def test_a_stuck_frame_and_a_repeated_word_are_loops_and_real_speech_is_none(
    recordings: list[tuple[str, np.ndarray]],
) -> None:
    pytest.importorskip("pycodec2", reason="Codec2 is not installed")
    codec = get_codec("codec2")
    real = [codec.encode(audio) for _, audio in recordings]
    assert not any(is_loop(codes, codec.frame_rate_hz) for codes in real)
    word = real[0][:9]
    assert is_loop(np.concatenate([word, *[word[-1:]] * 10]), codec.frame_rate_hz)
    assert is_loop(np.tile(word, (4, 1)), codec.frame_rate_hz)
    assert not is_loop(np.tile(word, (3, 1)), codec.frame_rate_hz)
