"""Names of fields: rows as NeMo, Lhotse, Hugging Face, Common Voice, CosyVoice and Emilia write them."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_speech.errors import InputError
from megatron_speech.preprocess import fields
from megatron_speech.preprocess.columns import VALUES, read_samples
from megatron_speech.preprocess.fields import FIELDS, FieldError, FieldNames, distinct_names, local_name, parse_map
from megatron_speech.preprocess.readers.base import Row, RowRejected
from megatron_speech.preprocess.samples import SampleRules

Fields = dict[str, Any]

# What a row of each kind of list holds, and what it is here.
LISTS: dict[str, tuple[Fields, Fields]] = {
    "NeMo": (
        {"audio_filepath": "a.wav", "offset": 1.5, "duration": 2.25, "text": "hello", "lang": "en"},
        {"wav_path": "a.wav", "start_time": 1.5, "end_time": 3.75, "duration": 2.25, "transcript": "hello",
         "language": "en"},
    ),
    "NeMo, one of two channels": (
        {"audio_filepath": "a.wav", "duration": 2.25, "text": "hello", "channel_selector": 1},
        {"wav_path": "a.wav", "duration": 2.25, "transcript": "hello", "channel": 1},
    ),
    "NeMo, the average of the channels": (
        {"audio_filepath": "a.wav", "text": "hello", "channel_selector": "average"},
        {"wav_path": "a.wav", "transcript": "hello"},
    ),
    "supervisions of Lhotse": (
        {"id": "s-1", "recording_id": "talk", "start": 3.1, "duration": 0.2, "channel": 0, "text": "so",
         "speaker": "anna", "language": "en"},
        {"sample_id": "s-1", "source_id": "talk", "start_time": 3.1, "end_time": 3.3, "duration": 0.2, "channel": 0,
         "transcript": "so", "speaker_id": "anna", "language": "en"},
    ),
    "Hugging Face": (
        {"audio": {"path": "clips/a.flac", "bytes": None}, "transcription": "hi", "raw_transcription": "Hi!"},
        {"wav_path": "clips/a.flac", "transcript": "hi", "raw_transcription": "Hi!"},
    ),
    "Hugging Face, only normalised text": (
        {"file": "a.flac", "normalized_text": "hi"},
        {"wav_path": "a.flac", "transcript": "hi"},
    ),
    "Common Voice": (
        {"client_id": "f00", "path": "cv_1.mp3", "sentence": "नमस्ते", "locale": "hi"},
        {"speaker_id": "f00", "wav_path": "cv_1.mp3", "transcript": "नमस्ते", "language": "hi"},
    ),
    "CosyVoice": (
        {"utt": "u1", "spk": "s1", "wav": "u1.wav", "text": "hello"},
        {"sample_id": "u1", "speaker_id": "s1", "wav_path": "u1.wav", "transcript": "hello"},
    ),
    "Emilia": (
        {"_id": "EN_1", "wav": "EN/1.mp3", "text": "hello", "speaker": "EN_S", "language": "en", "duration": 3.2,
         "dnsmos": 3.4},
        {"sample_id": "EN_1", "wav_path": "EN/1.mp3", "transcript": "hello", "speaker_id": "EN_S", "language": "en",
         "duration": 3.2, "dnsmos": 3.4},
    ),
    "plain, in seconds": (
        {"wav_path": "a.wav", "start": 1, "end": 2.5, "speaker": 7},
        {"wav_path": "a.wav", "start_time": 1, "end_time": 2.5, "speaker_id": 7},
    ),
    "plain, in milliseconds": (
        {"wav_path": "a.wav", "start_ms": 1500, "end_ms": 2250, "duration_ms": 750},
        {"wav_path": "a.wav", "start_time": 1.5, "end_time": 2.25, "duration": 0.75},
    ),
    "the same under two names": (
        {"wav_path": "a.wav", "audio_filepath": "a.wav", "text": "a  b", "transcript": "a b", "start": 1.0,
         "start_time": 1, "speaker_id": 3, "speaker": "3"},
        {"wav_path": "a.wav", "transcript": "a b", "start_time": 1, "speaker_id": 3},
    ),
    "ours": (
        {"wav_path": "a.wav", "start_time": 1.0, "duration": 9.0, "channels": 2, "path": "b.wav", "id": 4,
         "sample_id": "x", "normalized_text": "HI", "transcript": "hi", "speaker_name": "Bo", "speaker_id": "s"},
        {"wav_path": "a.wav", "start_time": 1.0, "duration": 9.0, "channels": 2, "path": "b.wav", "id": 4,
         "sample_id": "x", "normalized_text": "HI", "transcript": "hi", "speaker_name": "Bo", "speaker_id": "s"},
    ),
    "in an archive, with the path of old": (
        {"wav_path": "/x/a.tar", "wav_offset": 512, "wav_bytes": 9, "wav": "EN/1.mp3", "text": "hello"},
        {"wav_path": "/x/a.tar", "wav_offset": 512, "wav_bytes": 9, "wav": "EN/1.mp3", "transcript": "hello"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LISTS)
def test_rows_of_other_projects_mean_what_they_meant(name: str) -> None:
    theirs, ours = LISTS[name]
    given = dict(theirs)
    renamed, notices = FieldNames("encode").of_row(given)
    assert renamed == ours and given == theirs, "the row that was given is not changed"
    assert FieldNames("encode").of_row(renamed)[0] == ours, "a second time changes nothing"
    named = {notice.removeprefix("field:").partition("->")[0] for notice in notices}
    assert named <= theirs.keys() - ours.keys()


REFUSED: dict[str, tuple[Fields, str, str]] = {
    "two texts": (
        {"transcript": "ten", "text": "10"}, "field_conflict", "transcript is 'ten' and field text is '10'",
    ),
    "two of others": ({"text": "ten", "sentence": "10"}, "field_conflict", "--map transcript=text"),
    "two times": ({"start_time": 1, "offset": 2}, "field_conflict", "start_time is 1 and field offset is 2"),
    "two recordings": ({"wav_path": "a.wav", "audio_filepath": "b.wav"}, "field_conflict", "a.wav"),
    "two channels": ({"channel": 0, "channel_selector": 1}, "field_conflict", "channel_selector is 1"),
    "samples": ({"start_sample": 16000}, "unsupported_field", "field start_sample is 16000, counted in samples"),
    "frames": ({"frame_offset": 0}, "unsupported_field", "needed are seconds"),
    "several channels": ({"channel_selector": [0, 1]}, "unsupported_field", "several channels"),
    "several channels of a cut": ({"channel": [0, 1]}, "unsupported_field", "several channels"),
    "a cut": ({"supervisions": [{"text": "x"}], "start": 0.0}, "unsupported_field", "field supervisions is part of"),
    "speed": ({"transforms": [{"name": "Speed", "factor": 1.1}]}, "unsupported_field", "field transforms"),
    "a translation": ({"source_lang": "en", "target_lang": "de", "text": "x"}, "unsupported_field", "a translation"),
    "numbers": ({"audio": {"array": [0.0], "sampling_rate": 8000}}, "unsupported_field", "samples as numbers"),
    "two recordings, one as Hugging Face has it": (
        {"wav_path": "a.wav", "audio": {"path": "b.wav"}}, "field_conflict", "both are the wav_path",
    ),
    "several files": ({"audio_filepath": ["l.wav", "r.wav"]}, "unsupported_field", "the path of one recording"),
    "no length": ({"offset": 1.0, "duration": -1}, "bad_segment", "field duration is -1"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_means_another_audio_or_text_is_refused_by_its_name(name: str) -> None:
    row, rule, reason = REFUSED[name]
    with pytest.raises(FieldError) as error:
        FieldNames("encode").of_row(row)
    assert error.value.rule == rule and reason in error.value.reason


def test_a_field_is_where_the_map_says_and_nowhere_else() -> None:
    names = FieldNames("encode", parse_map(["transcript=clean", "wav_path=clip", "start_time="]))
    row = {"wav_path": "no.wav", "clip": "yes.wav", "clean": "ten", "text": "10", "start": 1, "start_time": 1.0}
    renamed, notices = names.of_row(row)
    assert renamed == {"wav_path": "yes.wav", "transcript": "ten", "text": "10", "start": 1}
    assert sorted(notices) == [
        "field:clean->transcript", "field:clip->wav_path", "field:start_time not read", "field:wav_path not read",
    ]  # fmt: skip
    assert names.of_row({"transcript": "no", "text": "no"})[0] == {"text": "no"}
    assert FieldNames("encode", parse_map(["channel="])).of_row({"channel": "news", "wav_path": "a"})[0] == {
        "wav_path": "a"
    }
    chosen = FieldNames("encode", parse_map(["transcript=transcript"]))
    assert chosen.of_row({"transcript": "ten", "text": "10"})[0] == {"transcript": "ten", "text": "10"}


def test_what_encode_audio_wrote_has_its_names_already() -> None:
    # A field that a map had not taken stays one of its own, and does not come back in the next stage.
    row = {"transcript": "ten", "text": "10", "start": 1.0, "codec": "c", "codec_hash": "h", "code_offset": 0}
    for use in ("encode", "speech"):
        assert FieldNames(use).of_row(row) == (row, [])
    renamed, notices = FieldNames("speech", (("transcript", "text"),)).of_row(row)
    assert renamed["transcript"] == "10" and renamed["start"] == 1.0 and "start_time" not in renamed
    assert notices == ["field:transcript not read", "field:text->transcript"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["transcrpt=text"], "did you mean 'transcript'?"),
        (["text=content"], "--json-keys"),
        (["text"], "needed NAME=THEIRS"),
        (["=text"], "needed NAME=THEIRS"),
        (["transcript=a", "transcript=b"], "names transcript twice"),
    ],
)
def test_a_map_that_cannot_be_is_refused(given: list[str], message: str) -> None:
    with pytest.raises(InputError) as error:
        parse_map(given)
    assert message in str(error.value)


def test_text_of_documents_stays_text_and_only_languages_are_renamed() -> None:
    row = {"text": "a page", "lang": "hi", "path": "p", "start": 3, "start_frame": 4, "speaker": "s", "id": 1}
    rules = SampleRules("text_lm")
    samples = read_samples(rules, [Row(1, dict(row))], "/a/pages.jsonl")
    assert samples.texts[0] == ("a page",) and samples.language[0] == "hi" and not samples.rejected
    assert samples.speaker_id[0] is None and samples.sample_id[0] == "pages-00000001"
    assert samples.notices == {"field:lang->language": 1}


def test_batches_and_single_rows_are_renamed_alike_and_counted_once() -> None:
    rules = SampleRules("tts", language="en")
    codes = [[1], [2]]
    rows = [
        Row(1, {"text": "one", "speaker": "s", "codes": codes, "start": 1.0, "mood": 3}),
        Row(2, {"transcript": "two", "speaker_id": "s", "codes": codes}),
        Row(3, {"transcript": "three", "text": "3", "codes": codes}),
        Row(4, {"sentence": "four", "spk": 5, "codes": codes, "start_frame": 9, "wav": "x.wav"}),
    ]
    samples = read_samples(rules, rows, "/a/x.jsonl")
    assert set(samples.rejected) == {2} and samples.rejected[2].rule == "field_conflict"
    with pytest.raises(RowRejected, match="field_conflict"):
        rules.sample(rows[2], "/a/x.jsonl")
    for i in (0, 1, 3):
        expected = rules.sample(rows[i], "/a/x.jsonl")
        for name in VALUES:
            assert repr(getattr(samples, name)[i]) == repr(getattr(expected, name)), name
    assert samples.speaker_id[:2] == ["s", "s"] and samples.texts[3] == ("four",)
    # Where no audio is read, what would say which part of it stays a field like any other.
    assert samples.extra[3] == '{"start_frame":9,"wav":"x.wav"}'
    assert samples.notices == {
        "field:text->transcript": 1, "field:speaker->speaker_id": 1, "field:start->start_time": 1,
        "field:sentence->transcript": 1, "field:spk->speaker_id": 1,
    }  # fmt: skip


@pytest.mark.parametrize("odd", [{}, {"text": ""}, {"text": 3}, {"sample_id": ""}, {"transcript": "t"}, {"spk": "s"}])
def test_rows_that_are_all_alike_are_renamed_as_each_is_alone(odd: Fields) -> None:
    alike = [{"text": f"t{i}", "speaker": f"s{i}", "id": i, "sample_id": f"x{i}", "mood": [i]} for i in range(4)]
    alike[2] |= odd
    rows, names = [dict(row) for row in alike], FieldNames("speech")
    renamed, errors = names.rename(rows, set().union(*rows))
    counted: Counter[str] = Counter()
    for i, row in enumerate(alike):
        try:
            expected, notices = names.of_row(row)
        except FieldError as error:
            assert errors[i].reason == error.reason
            continue
        counted.update(notices)
        assert rows[i] == expected
    assert renamed == counted and renamed["field:text->transcript"] in (3, 4)


def test_rows_with_names_of_this_project_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FieldNames, "of_row", lambda *_: pytest.fail("a row was looked at"))
    ours = {"sample_id": "a", "transcript": "t", "codes": [[1]], "duration": 1.0, "wav_path": "a.wav", "language": "en",
            "codec_hash": None, "variant": 0}  # fmt: skip
    assert len(read_samples(SampleRules("tts"), [Row(1, ours)], "x.jsonl")) == 1


def test_no_name_means_two_things() -> None:
    for use in ("encode", "speech", "text"):
        names = [name for field in FIELDS if use in field.uses for name in (field.name, *field.same, *field.instead)]
        assert len(names) == len(set(names))
    ours = sorted({field.name for field in FIELDS})
    assert parse_map([f"{name}=x" for name in ours]) == tuple((name, "x") for name in ours)


def test_the_page_lists_the_table() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    section = page.partition("## Names of other projects")[2].partition("\n## ")[0]
    rows = {match[1]: match[2] for match in re.finditer(r"^\| `(\w+)`[^|]*\|(.*)\|$", section, re.MULTILINE)}
    for field in FIELDS:
        if "encode" in field.uses:
            same, instead = (set(re.findall(r"`(\w+)`", cell)) for cell in rows[field.name].split("|"))
            assert (same - {"average"}, instead) == (set(field.same), set(field.instead)), field.name


def test_a_name_does_not_hold_the_place_of_the_corpus(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    (corpus / "lists").mkdir(parents=True)
    (tmp_path / "link").symlink_to(corpus)
    inside = str(corpus / "lists" / "wavs" / "a.wav")
    assert local_name(inside, str(corpus / "lists")) == "wavs/a.wav"
    assert local_name(inside, str(tmp_path / "link" / "lists")) == "wavs/a.wav"
    assert local_name(f"file://{inside}", f"file://{corpus}/lists") == "wavs/a.wav"
    assert local_name("s3://b/c/wavs/a.wav", "s3://b/c") == "wavs/a.wav"
    assert local_name("https://h/a.wav?signature=1", "/x") == "https://h/a.wav"
    for name in ("talk", "wavs/a.wav", "/elsewhere/a.wav", "s3://b/cc/a.wav"):
        assert local_name(name, "s3://b/c" if "s3" in name else str(corpus)) == name
    # Beside the list: moved together, it is called the same.
    assert fields.recording_name(str(corpus / "wavs" / "a.wav"), str(corpus / "lists")) == "../wavs/a.wav"


def test_files_of_one_name_are_told_apart_by_as_many_folders_as_that_takes() -> None:
    paths = ["/m/en/a/0.tar", "/m/en/b/0.tar", "/m/fr/b/0.tar", "/m/1.tar", "s3://k/2.tar"]
    assert list(distinct_names(paths).values()) == ["a/0.tar", "en/b/0.tar", "fr/b/0.tar", "1.tar", "2.tar"]
    moved = [path.replace("/m/", "/elsewhere/n/") for path in paths]
    assert list(distinct_names(moved).values()) == list(distinct_names(paths).values())


def test_rules_travel_to_workers_with_their_names() -> None:
    rules = SampleRules("tts", given_names=(("transcript", "clean"),), stems={"a": "b"})
    assert dataclasses.replace(rules, task="speech_lm").names.given == (("transcript", "clean"),)
