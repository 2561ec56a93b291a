"""What a sample is a part of: archive and key, wherever the corpus lies. And what follows from it."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import soundfile

from megatron_speech.data.dataset.documents_table import read_documents_table
from megatron_speech.data.dataset.split import held_out
from megatron_speech.preprocess import encode_audio
from megatron_speech.preprocess.readers.base import Row
from megatron_speech.preprocess.readers.open import InputFiles

Fields = dict[str, Any]
Members = Sequence[tuple[str, bytes]]


def write_tar(path: Path, members: Members) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def packed(value: Any) -> bytes:
    """Codes as an .npy, audio [n] as a .wav, fields as JSON."""
    handle = io.BytesIO()
    if isinstance(value, dict):
        handle.write(json.dumps(value).encode())
    elif value.dtype.kind == "f":
        soundfile.write(handle, value, 8000, format="WAV")
    else:
        np.save(handle, value)
    return handle.getvalue()


def tone(i: int) -> np.ndarray:
    """A quarter of a second that no other number gives."""
    return 0.3 * np.sin(np.arange(2000) * (0.05 + 0.003 * i))


def encode(output: Path, *inputs: object, flags: Sequence[str] = ()) -> int:
    arguments = ["--input", *map(str, inputs), "--codec", "codec2", "--output-dir", str(output), "--workers", "1"]
    return encode_audio.main([*arguments, *flags])


def lines(path: Path) -> list[Fields]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def of_codes(corpus: Any, path: Path, numbers: Sequence[int], fields: Callable[[int], Fields]) -> Path:
    """An archive of samples as WebDataset has them: codes and fields, keys counted from 0."""
    members = []
    for key, i in enumerate(numbers):
        members.append((f"{key:04d}.json", packed({"transcript": f"text {i}", "language": "en", **fields(i)})))
        members.append((f"{key:04d}.npy", packed(corpus.codes[i])))
    return write_tar(path, members)


def documents(dataset: Any) -> pa.Table:
    return read_documents_table(Path(f"{dataset.prefix}.docs.parquet"), (), len(dataset))


@pytest.mark.slow
def test_the_recordings_of_one_archive_are_sources_of_their_own(make_corpus: Callable[[int], Any]) -> None:
    corpus = make_corpus(100)
    archive = of_codes(corpus, corpus.folder / "one" / "a.tar", range(100), lambda i: {"speaker": f"s{i % 5}"})
    table = documents(corpus.convert("tts", "--cloning", "same-speaker", inputs=[archive]))
    assert table["source_id"].to_pylist() == [f"a.tar/{i:04d}" for i in range(100)]
    assert table["reference_source_id"].null_count == 0, "every speaker has another recording to clone"
    for column in ("source_id", "speaker_id"):
        of_sample = dict(zip(table["sample_id"].to_pylist(), table[column].to_pylist(), strict=True))
        pairs = zip(table["reference_sample_id"].to_pylist(), table[column].to_pylist(), strict=True)
        assert all((of_sample[quoted] == own) is (column == "speaker_id") for quoted, own in pairs)
    held = held_out(table, 0.1, 0)
    assert 0 < held.sum() < 40

    shutil.move(corpus.folder / "one", corpus.folder / "elsewhere")
    moved = corpus.convert(
        "tts", "--cloning", "same-speaker", prefix="out/moved", inputs=[corpus.folder / "elsewhere" / "a.tar"]
    )
    assert documents(moved).equals(table)


def test_a_prompt_is_of_the_same_talk_and_never_of_another(make_corpus: Callable[[int], Any]) -> None:
    corpus = make_corpus(40)

    def segment(i: int) -> Fields:
        return {"segment_order": i % 5, "speaker": "one and the same", "recording_id": f"talk {i // 5}"}

    # Two archives of one name, whose keys repeat, and whose segments alternate between talks.
    mixed = sorted(range(40), key=lambda i: (i % 5, i))
    archives = [
        of_codes(corpus, corpus.folder / part / "0.tar", [i for i in mixed if (i // 5) % 2 == k], segment)
        for k, part in enumerate(("a", "b"))
    ]
    table = documents(corpus.convert("speech_lm", "--continuation", inputs=archives))
    prompts = table["reference_source_id"].to_pylist()
    talks = zip(table["source_id"].to_pylist(), table["segment_order"].to_pylist(), strict=True)
    assert prompts == [talk if order else None for talk, order in talks]
    assert sum(prompt is not None for prompt in prompts) == 32

    def without_talk(i: int) -> Fields:
        return {"segment_order": i, "speaker": "one and the same"}

    of_codes(corpus, archives[0], [0, 2, 4], without_talk)
    of_codes(corpus, archives[1], [1, 3, 5], without_talk)
    table = documents(corpus.convert("speech_lm", "--continuation", prefix="out/none", inputs=archives))
    assert table["reference_source_id"].null_count == 6, "whose talk it is nobody said"
    assert len(set(table["source_id"].to_pylist())) == 6
    assert table["source_id"][0].as_py() == "a/0.tar/0000" and table["source_id"][5].as_py() == "b/0.tar/0002"


def test_an_archive_at_a_url_gives_the_names_of_the_local_one(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "a.tar", [("k/0.wav", packed(tone(0))), ("k/0.txt", b"a tone")])
    fsspec.filesystem("memory").pipe("/rows-url/x/a.tar", archive.read_bytes())
    assert encode(tmp_path / "local", archive) == 0
    assert encode(tmp_path / "url", "memory://rows-url/x/a.tar") == 0
    (local,), (remote,) = (lines(tmp_path / name / "samples.jsonl") for name in ("local", "url"))
    assert (local["sample_id"], local["source_id"]) == ("k/0", "a.tar/k/0")
    assert {**remote, "wav_path": ""} == {**local, "wav_path": ""}


@pytest.mark.parametrize("where", ["samples.jsonl", "lists/samples.jsonl"])
def test_moving_a_corpus_with_absolute_paths_changes_no_name(tmp_path: Path, where: str) -> None:
    found = []
    for place in ("here", "there"):
        folder = tmp_path / place / "corpus"
        (folder / "wavs").mkdir(parents=True)
        (folder / where).parent.mkdir(exist_ok=True)
        soundfile.write(folder / "wavs" / "a.wav", tone(1), 8000)
        wav, inside = str(folder / "wavs" / "a.wav"), str((folder / where).parent / "x")
        rows = [{"wav_path": wav, "language": "en"}, {"wav_path": wav, "sample_id": "b", "source_id": inside}]
        (folder / where).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        assert encode(folder / "out", folder / where) == 0
        found.append([(row["sample_id"], row["source_id"]) for row in lines(folder / "out" / "samples.jsonl")])
    name = "wavs/a.wav" if where == "samples.jsonl" else "../wavs/a.wav"
    assert found[0] == found[1] == [(name, name), ("b", "x")]


def test_a_source_that_is_a_path_is_relative_to_its_list(corpus: Any) -> None:
    rows = [{**row, "source_id": str(corpus.folder / "talks" / row["source_id"])} for row in corpus.rows[:6]]
    rows += [{**row, "source_id": None, "sample_id": str(corpus.folder / f"{i}.wav")} for i, row in enumerate(rows[:2])]
    rows.append({**rows[0], "source_id": "/on another disk/a.wav"})
    dataset = corpus.convert("tts", inputs=[corpus.write(rows, "paths.jsonl")])
    sources = [f"talks/{row['source_id']}" for row in corpus.rows[:6]]
    assert documents(dataset)["source_id"].to_pylist() == [*sources, "0.wav", "1.wav", "/on another disk/a.wav"]
    assert dataset.manifest.notices == {"source_id:absolute path outside the list's folder": 1}


def test_rows_without_names_of_files_of_one_name_are_told_apart(corpus: Any) -> None:
    inputs = []
    for part in ("a", "b"):
        (corpus.folder / part).mkdir()
        rows = [{"text": f"{part} {i}"} for i in range(3)]
        inputs.append(corpus.write(rows, f"{part}/pages.jsonl"))
    table = documents(corpus.convert("text_lm", inputs=inputs))
    assert table["source_id"].to_pylist() == [f"{part}/pages.jsonl-{i:08d}" for part in "ab" for i in (1, 2, 3)]
    assert documents(corpus.convert("text_lm", inputs=inputs[:1]))["source_id"][0].as_py() == "pages-00000001"


# ---- encode_audio.py reads archives, and several inputs, as preprocess_data.py does


def test_shards_that_count_from_nought_each_are_one_input(tmp_path: Path) -> None:
    for k, name in enumerate(("a.tar", "b.tar")):
        members = [(f"{i:04d}.{e}", packed({"speaker": i} if e == "json" else tone(3 * k + i)))
                   for i in range(3) for e in ("json", "wav")]  # fmt: skip
        write_tar(tmp_path / name, members)
    archives = [tmp_path / "a.tar", tmp_path / "b.tar"]
    assert encode(tmp_path / "out", *archives) == 0
    rows = lines(tmp_path / "out" / "samples.jsonl")
    assert [row["sample_id"] for row in rows] == ["0000", "0001", "0002", "b.tar/0000", "b.tar/0001", "b.tar/0002"]
    assert [row["source_id"] for row in rows] == [f"{a}.tar/{i:04d}" for a in "ab" for i in range(3)]
    assert [row["speaker_id"] for row in rows] == [0, 1, 2] * 2
    assert len({row["checksum"] for row in rows}) == 6
    # In parts it is the same work.
    for part in ("1/2", "0/2"):
        assert encode(tmp_path / "parts", *archives, flags=("--shard", part)) == 0
    parts = lines(tmp_path / "parts" / "samples.jsonl")
    for name in ("sample_id", "source_id", "checksum", "speaker_id"):
        assert [row[name] for row in parts] == [row[name] for row in rows]


def test_what_an_archive_holds_twice_or_unread_is_said_by_both_scripts(tmp_path: Path) -> None:
    wav = packed(tone(0))
    shared: list[tuple[str, bytes]] = [
        ("ok.json", b'{"text": "a", "wav_path": "of old.wav"}'), ("ok.txt", b"a"), ("ok.wav", wav), ("ok.png", b"x"),
        ("differ.json", b'{"transcript": "a"}'), ("differ.txt", b"b"), ("differ.wav", wav),
        ("broken.json", b'{"transcript": '), ("broken.wav", wav),
        ("dotted.1.wav", wav), ("dotted.1.json", b"{}"),
        ("again.wav", wav), ("other.wav", wav), ("again.txt", b"late"),
    ]  # fmt: skip
    archive = write_tar(tmp_path / "x.tar", [*shared, ("two.wav", wav), ("two.flac", wav)])
    assert encode(tmp_path / "out", archive, flags=("--max-rejected", "0.9")) == 0
    assert [row["sample_id"] for row in lines(tmp_path / "out" / "samples.jsonl")] == ["ok", "again", "other"]
    rejected = lines(tmp_path / "out" / "rejected.jsonl")
    assert [(row["line"], row["reason"]) for row in rejected] == [
        (2, "tar_duplicate_member"), (3, "bad_json"), (4, "missing_wav_path"), (7, "tar_key_again"),
        (8, "tar_duplicate_member"),
    ]  # fmt: skip
    assert "a recording is in .wav and again in .flac" in rejected[-1]["detail"]
    assert "a key ends at the first dot" in rejected[2]["detail"]
    assert {row["input"] for row in rejected} == {str(archive)}
    manifest = json.loads((tmp_path / "out" / "codes-00000-of-00001.json").read_text())
    assert manifest["notices"] == {
        "tar_field:wav_path": 1, "tar_member:.1.json": 1, "tar_member:.1.wav": 1,
        "tar_member:.png": 1,
    }  # fmt: skip
    # The reader of codes finds the same faults in the same members.
    rows = [row for batch in InputFiles([str(archive)]).batches(0) for row in batch.read()]
    rules = [row.rejected.rule if isinstance(row, Row) and row.rejected else None for row in rows]
    assert rules == [None, "tar_duplicate_member", "bad_json", None, None, None, "tar_key_again", None]


def test_inputs_of_several_formats_are_one(tmp_path: Path) -> None:
    for k, part in enumerate(("a", "b")):
        (tmp_path / part / "wavs").mkdir(parents=True)
        soundfile.write(tmp_path / part / "wavs" / "0.wav", tone(k), 8000)
        row = {"audio_filepath": "wavs/0.wav", "text": f"tone {k}"}
        (tmp_path / part / "list.jsonl").write_text(json.dumps(row) + "\n" + '{"text": "none"}\n', encoding="utf-8")
    archive = write_tar(tmp_path / "c.tar", [("0.wav", packed(tone(2)))])
    inputs = (tmp_path / "a" / "list.jsonl", tmp_path / "b" / "list.jsonl", archive)
    assert encode(tmp_path / "out" / "codes", *inputs, flags=("--max-rejected", "0.9")) == 0
    rows = lines(tmp_path / "out" / "codes" / "samples.jsonl")
    assert [row["source_id"] for row in rows] == ["a/wavs/0.wav", "b/wavs/0.wav", "c.tar/0"]
    assert [row.get("transcript") for row in rows] == ["tone 0", "tone 1", None]
    assert len({row["checksum"] for row in rows}) == 3
    for row in rows:
        assert (tmp_path / "out" / "codes" / row["wav_path"]).exists() and "audio_filepath" not in row
    rejected = lines(tmp_path / "out" / "codes" / "rejected.jsonl")
    assert [(row["input"], row["line"], row["reason"]) for row in rejected] == [
        (str(path), 2, "missing_wav_path") for path in inputs[:2]
    ]


def test_recordings_of_one_file_are_sources_of_their_own_whatever_says_where_they_lie(tmp_path: Path) -> None:
    wavs = [packed(tone(i)) for i in range(3)]
    (tmp_path / "all.bin").write_bytes(b"".join(wavs))
    rows = [{"wav_path": "all.bin", "wav_offset": i * len(wavs[0]), "wav_bytes": len(wavs[0])} for i in range(3)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert encode(tmp_path / "out", tmp_path / "x.jsonl") == 0
    found = lines(tmp_path / "out" / "samples.jsonl")
    assert [row["sample_id"] for row in found] == [f"all.bin/{i * len(wavs[0])}" for i in range(3)]
    assert [row["source_id"] for row in found] == [row["sample_id"] for row in found]


def test_an_input_that_is_named_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = write_tar(tmp_path / "c.tar", [("0.wav", packed(tone(2)))])
    assert encode(tmp_path / "out", archive, archive) == 2
    assert f"names {archive} 2 times; name it once" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_segments_and_names_of_a_nemo_manifest_reach_the_dataset_without_a_map(corpus: Any, tmp_path: Path) -> None:
    talk = np.concatenate([tone(i) for i in range(4)])
    soundfile.write(tmp_path / "talk.wav", talk, 8000)
    manifest = [
        {"audio_filepath": "talk.wav", "offset": 0.25 * i, "duration": 0.25, "text": f"part {i}", "lang": "en"}
        for i in range(4)
    ]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in manifest), encoding="utf-8")
    assert encode(tmp_path / "codes", tmp_path / "manifest.jsonl") == 0
    rows = lines(tmp_path / "codes" / "samples.jsonl")
    for i in range(4):
        soundfile.write(tmp_path / f"{i}.wav", talk[2000 * i : 2000 * (i + 1)], 8000)
    parts = [{"wav_path": f"{i}.wav"} for i in range(4)]
    (tmp_path / "parts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in parts), encoding="utf-8")
    assert encode(tmp_path / "alone", tmp_path / "parts.jsonl") == 0
    assert [row["checksum"] for row in rows] == [r["checksum"] for r in lines(tmp_path / "alone" / "samples.jsonl")]
    assert [row["sample_id"] for row in rows] == [f"talk.wav@{a}-{b}" for a, b in
                                                  (("0", 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))]  # fmt: skip
    assert {row["source_id"] for row in rows} == {"talk.wav"}
    assert [(row["transcript"], row["language"]) for row in rows] == [(f"part {i}", "en") for i in range(4)]
    assert not any(name in row for row in rows for name in ("audio_filepath", "offset", "text", "lang"))


def test_a_map_decides_the_output_of_both_scripts(corpus: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**row, "clean": f"clean {i}"} for i, row in enumerate(corpus.rows)]
    path = corpus.write(rows, "mapped.jsonl")
    dataset = corpus.convert("tts", "--map", "transcript=clean", "--map", "speaker_id=nobody", inputs=[path])
    table = documents(dataset)
    assert table["transcript_native"].to_pylist() == [f"clean {i}" for i in range(len(rows))]
    assert dataset.manifest.options["map"] == {"transcript": "clean", "speaker_id": "nobody"}
    assert dataset.manifest.notices["field:clean->transcript"] == len(rows)
    captured = capsys.readouterr()
    assert "--map speaker_id=nobody: no row that was read has a field nobody" in captured.err + captured.out
    assert corpus.run("tts", "--map", "transcrpt=clean", prefix="out/x") == 2
    assert "did you mean 'transcript'?" in capsys.readouterr().err


def test_encoding_is_not_gone_on_with_under_another_map(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soundfile.write(tmp_path / "a.wav", tone(0), 8000)
    row = {"clip": "a.wav", "one": "eins", "two": "zwei"}
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    flags = ("--map", "wav_path=clip", "--map", "transcript=one")
    assert encode(tmp_path / "out", tmp_path / "x.jsonl", flags=flags) == 0
    (found,) = lines(tmp_path / "out" / "samples.jsonl")
    assert (found["transcript"], found["two"], "one" in found) == ("eins", "zwei", False)
    assert encode(tmp_path / "out", tmp_path / "x.jsonl", flags=(*flags, "--resume")) == 0
    assert "complete already" in capsys.readouterr().out
    assert encode(tmp_path / "out", tmp_path / "x.jsonl", flags=(*flags[:3], "transcript=two", "--resume")) == 0
    assert lines(tmp_path / "out" / "samples.jsonl")[0]["transcript"] == "zwei"
