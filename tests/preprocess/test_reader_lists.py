"""Lists of recordings in the formats of other projects: read as they are, by both scripts.

`files/` holds what lhotse 1.33.0, datasets 5.2.0 and webdataset 1.0.2 wrote of three recordings of a second,
`audio/0.wav` to `audio/2.wav` (8 kHz), and `audio/st.wav` of two channels.
"""

from __future__ import annotations

import gzip
import json
import tarfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from megatron_speech.errors import InputError
from megatron_speech.preprocess import encode_audio
from megatron_speech.preprocess.readers import json_array
from megatron_speech.preprocess.readers.base import Row
from megatron_speech.preprocess.readers.open import InputFiles
from megatron_speech.tokens.templates import render

ReadRows = Callable[..., list[Row]]
FILES = Path(__file__).parent / "files"
TEXTS = [f"words {i}" for i in range(3)]


@pytest.fixture
def audio(tmp_path: Path) -> Path:
    """A folder with the recordings that the files name."""
    folder = tmp_path / "lists" / "audio"
    folder.mkdir(parents=True)
    with tarfile.open(FILES / "webdataset.tar") as archive:
        for i in range(3):
            (folder / f"{i}.wav").write_bytes(archive.extractfile(f"utt-{i}.wav").read())  # type: ignore[union-attr]
    one, two = (soundfile.read(folder / f"{i}.wav")[0] for i in range(2))
    soundfile.write(folder / "st.wav", np.stack([one, two], axis=1), 8000, "PCM_16")
    return folder.parent


def put(folder: Path, name: str) -> Path:
    (folder / name).write_bytes((FILES / name).read_bytes())
    return folder / name


def fields(rows: list[Row]) -> list[dict[str, Any]]:
    assert [row.rejected for row in rows] == [None] * len(rows)
    return [row.fields for row in rows]


# ---- what each becomes


def test_lists_of_common_voice_name_clips_beside_them(tmp_path: Path, read_rows: ReadRows) -> None:
    lines = [
        "client_id\tpath\tsentence\tage\tlocale",
        'abc\tcommon_voice_en_1.mp3\the said "no \\ yes"\t\ten',
        "abd\tcommon_voice_en_2\tनमस्ते\ttwenties\thi",
        "abd\tshort",
    ]
    path = tmp_path / "train.tsv"
    path.write_text("\r\n".join(lines) + "\r\n", encoding="utf-8")
    assert fields(read_rows(path)[:1])[0]["wav_path"] == "common_voice_en_1.mp3"  # without the folder clips
    (tmp_path / "clips").mkdir()
    one, two, three = read_rows(path)
    assert one.number == 2 and fields([one, two]) == [
        {
            "speaker_id": "abc",
            "transcript": 'he said "no \\ yes"',
            "language": "en",
            "sample_id": "common_voice_en_1",
            "wav_path": "clips/common_voice_en_1.mp3",
        },
        {
            "speaker_id": "abd",
            "transcript": "नमस्ते",
            "age": "twenties",
            "language": "hi",
            "sample_id": "common_voice_en_2",
            "wav_path": "clips/common_voice_en_2.mp3",
        },
    ]
    assert three.rejected is not None and three.rejected.reason == "the line has 2 columns, needed 5 as the header"
    (tmp_path / "train.tsv.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert fields(read_rows(tmp_path / "train.tsv.gz")[:2]) == fields([one, two])


def test_the_list_of_ljspeech_gives_the_normalised_text(tmp_path: Path, read_rows: ReadRows) -> None:
    (tmp_path / "wavs").mkdir()
    lines = ['LJ001|In 1900, "yes"|In nineteen hundred, "yes"', "LJ002|plain|", "LJ003|two", ""]
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    rows = fields(read_rows(tmp_path / "metadata.csv"))
    assert [row["wav_path"] for row in rows] == [f"wavs/LJ00{i}.wav" for i in (1, 2, 3)]
    assert [row["transcript"] for row in rows] == ['In nineteen hundred, "yes"', "plain", "two"]
    assert [row.get("raw_text") for row in rows] == ['In 1900, "yes"', None, None]
    assert [row["sample_id"] for row in rows] == ["LJ001", "LJ002", "LJ003"]


def kaldi(folder: Path, **lists: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in lists.items():
        (folder / name.replace("wav_scp", "wav.scp")).write_text(text, encoding="utf-8")
    return folder


def test_a_folder_of_kaldi_joins_its_lists_by_utterance(tmp_path: Path, read_rows: ReadRows) -> None:
    folder = kaldi(
        tmp_path / "data",
        wav_scp="talk1 /corpus/talk 1.flac\ntalk2\tb.wav\n",
        segments="u1 talk1 0.5 2.25\nu2 talk2 0 -1\nu3 talk2 1 2 1\nu4 lost 0 1\n",
        text="u1 hello  there\nu2 नमस्ते\nu9 nobody\n",
        utt2spk="u1 s1\nu2 s2\n",
        utt2lang="u1 en\nu2 hi\n",
        utt2dur="u1 1.75\n",
    )
    for path in (folder, folder / "wav.scp"):
        rows = read_rows(path)
        assert [row.fields for row in rows[:3]] == [
            {
                "sample_id": "u1",
                "source_id": "talk1",
                "wav_path": "/corpus/talk 1.flac",
                "start_time": 0.5,
                "end_time": 2.25,
                "transcript": "hello  there",
                "speaker_id": "s1",
                "language": "en",
                "duration": 1.75,
            },
            {
                "sample_id": "u2",
                "source_id": "talk2",
                "wav_path": "b.wav",
                "start_time": 0.0,
                "transcript": "नमस्ते",
                "speaker_id": "s2",
                "language": "hi",
            },
            {
                "sample_id": "u3",
                "source_id": "talk2",
                "wav_path": "b.wav",
                "start_time": 1.0,
                "end_time": 2.0,
                "channel": 1,
            },
        ]
        assert [row.rejected.reason for row in rows[3:] if row.rejected] == [
            "segments: recording lost of u4 is not in wav.scp",
            "text line 3: utterance u9 is not in segments",
        ]
    whole = fields(read_rows(kaldi(tmp_path / "whole", wav_scp="a x.wav\n", text="a b c\n")))
    assert whole == [{"sample_id": "a", "source_id": "a", "wav_path": "x.wav", "transcript": "b c"}]


def test_relative_paths_are_of_the_list_or_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_rows: ReadRows
) -> None:
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / "0.wav").touch()
    (tmp_path / "lists").mkdir()
    cuts = put(tmp_path / "lists", "lhotse_cuts.json")
    assert fields(read_rows(cuts))[0]["wav_path"] == "audio/0.wav"
    monkeypatch.chdir(tmp_path)
    assert fields(read_rows(cuts))[0]["wav_path"] == str(tmp_path / "audio" / "0.wav")
    folder = kaldi(tmp_path / "data", wav_scp="a db/a.wav\n")
    (tmp_path / "db").mkdir()
    (tmp_path / "db" / "a.wav").touch()
    assert fields(read_rows(folder))[0]["wav_path"] == str(tmp_path / "db" / "a.wav")
    (folder / "db").mkdir()
    (folder / "db" / "a.wav").touch()
    assert fields(read_rows(folder))[0]["wav_path"] == "db/a.wav"


@pytest.mark.parametrize("name", ["lhotse_cuts.jsonl.gz", "lhotse_cuts.json"])
def test_cuts_of_lhotse_are_segments_of_recordings(read_rows: ReadRows, name: str) -> None:
    rows = fields(read_rows(FILES / name))
    for i, row in enumerate(rows):
        assert row == {
            "sample_id": f"cut-{i}",
            "source_id": "st" if i == 3 else str(i),
            "wav_path": "audio/st.wav" if i == 3 else f"audio/{i}.wav",
            "start_time": 0.2,
            "end_time": 0.8,
            **({"channel": 1} if i == 3 else {}),
            "transcript": f"words {i}",
            "speaker_id": f"speaker {i}",
            "language": "en",
            "gender": "f",
            "custom": {"mos": 3.5},
        }
    assert len(rows) == 4


def test_cuts_that_are_no_segment_as_it_is_are_rejected_by_name(read_rows: ReadRows) -> None:
    silent, *odd = read_rows(FILES / "lhotse_odd_cuts.jsonl")
    assert silent.fields == {
        "sample_id": "silent",
        "source_id": "2",
        "wav_path": "audio/2.wav",
        "start_time": 0.0,
        "end_time": 1.0,
    }
    assert {row.rejected.rule for row in odd if row.rejected} == {"unsupported_cut"}
    reasons = [row.rejected.reason for row in odd if row.rejected]
    parts = ["by Speed", "by Volume", "by Resample", "is a MixedCut", "is a MultiCut", "is a PaddingCut"]
    parts += ["has 2 supervisions", "only a part of its supervision (0 to 0.6 of 0 to 0.3 s)"]
    for reason, part in zip(reasons, parts, strict=True):
        assert part in reason


def test_arrays_of_json_are_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_rows: ReadRows
) -> None:
    rows = [{"text": 'é\n"x" ' * (i % 7), "i": i, "deep": {"n": [None, 1.5]}} for i in range(1500)]
    for block in (13, 1 << 20):
        monkeypatch.setattr(json_array, "_BLOCK_BYTES", block)
        for i, value in enumerate((rows, {"data": rows})):
            for indent in (None, 1):
                path = tmp_path / f"{i}.json"
                path.write_text(json.dumps(value, ensure_ascii=False, indent=indent), encoding="utf-8-sig")
                found = [row for batch in InputFiles([str(path)]).batches(0) for row in batch.read()]
                assert fields(found) == rows and [row.number for row in found] == list(range(1, 1501))
    path.write_text('[{"a": 1}, 2, {"a": NaN},\n {"a": 12345678901234567890123}]')
    one, two, three, four = read_rows(path)
    assert one.fields == {"a": 1} and four.fields == {"a": 12345678901234567890123}
    assert [row.rejected.rule for row in (two, three) if row.rejected] == ["bad_json", "not_finite"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}, {"a": ', "is not JSON: "),
        ('[{"a": 1}, ', "is cut off: its array does not end (after 1 rows)"),
        ('[{"a": 1} {"a": 2}]', "has '{' between rows (after 1 rows)"),
        ('[{"a": 1}] {"a": 2}', "goes on after its end with '{' (after 1 rows)"),
        ('{"data": [{"a": 1}], "version": 2}', "has other keys beside data"),
        ("[]", "holds no rows"),
        ('{\n "a": 1\n}', "is one JSON object over several lines"),
    ],
)
def test_arrays_that_are_none_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError) as error:
        list(InputFiles([str(tmp_path / "a.json")]).batches(0))
    assert message in str(error.value)


# ---- encoded


def write_lists(folder: Path, *, encoded: bool = True) -> dict[str, list[str]]:
    """The three recordings in every format: its name → inputs. Without recordings unless they are to be encoded."""
    for name in ("clips", "wavs"):
        (folder / name).mkdir()
    for i in range(3 if encoded else 0):
        recording = (folder / "audio" / f"{i}.wav").read_bytes()
        (folder / "clips" / f"{i}.wav").write_bytes(recording)
        (folder / "wavs" / f"{i}.wav").write_bytes(recording)
    nemo = [{"audio_filepath": f"audio/{i}.wav", "text": TEXTS[i], "offset": 0.0, "duration": 1.0} for i in range(3)]
    (folder / "nemo.json").write_text("".join(json.dumps(row) + "\n" for row in nemo))
    (folder / "array.json").write_text(json.dumps(nemo[1:], indent=1))
    (folder / "first.jsonl").write_text(json.dumps({"wav_path": "audio/0.wav", "transcript": TEXTS[0]}) + "\n")
    (folder / "train.tsv").write_text(
        "client_id\tpath\tsentence\n" + "".join(f"c\t{i}.wav\t{TEXTS[i]}\n" for i in range(3))
    )
    (folder / "metadata.csv").write_text("".join(f"{i}|{TEXTS[i]}\n" for i in range(3)))
    kaldi(
        folder / "kaldi",
        wav_scp="".join(f"k{i} {folder}/audio/{i}.wav\n" for i in range(3)),
        text="".join(f"k{i} {TEXTS[i]}\n" for i in range(3)),
    )
    return {
        "nemo": [str(folder / "nemo.json")],
        "two inputs": [str(folder / "first.jsonl"), str(folder / "array.json")],
        "common voice": [str(folder / "train.tsv")],
        "ljspeech": [str(folder / "metadata.csv")],
        "kaldi": [str(folder / "kal*")],
        "hugging face": [str(put(folder, "hf_audio.parquet"))],
        "webdataset": [str(put(folder, "webdataset.tar"))],
    }


def encode(output: Path, *inputs: str, flags: tuple[str, ...] = ()) -> int:
    arguments = ["--input", *inputs, "--codec", "codec2", "--output-dir", str(output), "--workers", "1", *flags]
    return encode_audio.main(arguments)


def encoded(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_recordings_of_every_list_become_the_same_codes(audio: Path, tmp_path: Path) -> None:
    pytest.importorskip("pycodec2")
    rows = [{"wav_path": f"audio/{i}.wav", "transcript": TEXTS[i]} for i in range(3)]
    (audio / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert encode(tmp_path / "plain", str(audio / "plain.jsonl")) == 0
    expected = [(row["checksum"], row["transcript"]) for row in encoded(tmp_path / "plain")]
    for name, inputs in write_lists(audio).items():
        repeated = [word for more in inputs[1:] for word in ("--input", more)]
        assert encode(tmp_path / name, inputs[0], flags=tuple(repeated)) == 0, name
        found = encoded(tmp_path / name)
        assert [(row["checksum"], row["transcript"]) for row in found] == expected, name
        assert len({row["source_id"] for row in found}) == len({row["sample_id"] for row in found}) == 3, name


def test_a_repeated_input_adds_to_the_first(corpus: Any) -> None:
    rows = [{"a": "one", "b": "two"}, {"a": "three", "b": "four"}]
    first = corpus.write(rows[:1], "first.jsonl")
    (corpus.folder / "second.json").write_text(json.dumps(rows[1:]))
    keys = ("--json-keys", "a", "--json-keys", "b")
    dataset = corpus.convert("text_lm", "--input", corpus.folder / "second.json", *keys, inputs=[first])
    shown = [render(corpus.space, dataset.document(i)) for i in range(len(dataset))]
    assert shown == [f"<bos> {text} <eos>" for text in ("one", "two", "three", "four")]


def test_transcripts_of_lists_are_texts_too(corpus: Any) -> None:
    lists = write_lists(corpus.folder, encoded=False)
    for name in ("common voice", "ljspeech", "kaldi"):
        dataset = corpus.convert("text_lm", "--json-keys", "transcript", inputs=lists[name], prefix=f"out/{name}")
        shown = [render(corpus.space, dataset.document(i)) for i in range(len(dataset))]
        assert shown == [f"<bos> {text} <eos>" for text in TEXTS], name


@pytest.mark.slow
def test_cuts_of_lhotse_are_encoded_as_segments_and_channels(audio: Path, tmp_path: Path) -> None:
    pytest.importorskip("pycodec2")
    rows = [{"wav_path": f"audio/{i}.wav", "start_time": 0.2, "end_time": 0.8} for i in (0, 1, 2, 1)]
    (audio / "plain.jsonl").write_text("".join(json.dumps({**r, "sample_id": i}) + "\n" for i, r in enumerate(rows)))
    assert encode(tmp_path / "plain", str(audio / "plain.jsonl")) == 0
    assert encode(tmp_path / "cuts", str(put(audio, "lhotse_cuts.jsonl.gz"))) == 0
    checksums = [row["checksum"] for row in encoded(tmp_path / "plain")]
    assert [row["checksum"] for row in encoded(tmp_path / "cuts")] == checksums


@pytest.mark.slow
def test_what_was_encoded_of_a_table_is_found_there_again(audio: Path, tmp_path: Path) -> None:
    pytest.importorskip("pycodec2")
    assert encode(tmp_path / "a", str(put(audio, "hf_audio.parquet"))) == 0
    rows = encoded(tmp_path / "a")
    assert [row["sample_id"] for row in rows] == ["utt-0", "utt-1", "utt-2"] and {row["language"] for row in rows} == {
        "en"
    }
    assert [(row["wav_row"], row["wav_column"]) for row in rows] == [(i, "audio") for i in range(3)]
    assert encode(tmp_path / "b", str(tmp_path / "a" / "samples.jsonl")) == 0
    assert [row["checksum"] for row in encoded(tmp_path / "b")] == [row["checksum"] for row in rows]


# ---- what is not read

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
REFUSED: dict[str, tuple[str, bytes, str]] = {
    "csv": ("a.csv", b"path,text\nx.wav,hi\n", "csv.DictReader(sys.stdin, delimiter=',')"),
    "csv of LJSpeech's name": ("metadata.csv", b"file_name,transcription\nx.wav,hi\n", "only LJSpeech's metadata.csv"),
    "other tsv": ("a.tsv", b"file\ttext\nx.wav\thi\n", "lists of Common Voice (columns path and sentence) are read"),
    "UTF-16": ("a.jsonl", '{"text": "x"}\n'.encode("utf-16"), "it is UTF-16: convert it, iconv -f UTF-16 -t UTF-8"),
    "UTF-16 without a mark": ("a.jsonl", '{"text": "x"}\n'.encode("utf-16-be"), "it is UTF-16BE: convert it"),
    "UTF-16 tsv": ("a.tsv", "path\tsentence\nx\ty\n".encode("utf-16"), "it is UTF-16"),
    "npz": ("a.npz", b"PK\x03\x04", "is of a format that is not read"),
    "pt": ("a.pt", b"PK\x03\x04", "write each sample's codes with numpy.save('codes/ID.npy', codes)"),
    "pkl": ("a.pkl", b"\x80\x04", "pickles can run code"),
    "arrow": ("a.arrow", b"", "datasets.load_from_disk('FOLDER').to_parquet('X.parquet')"),
    "a recording": ("a.wav", b"RIFF", "is a recording; name a samples.jsonl"),
    "recordings of Lhotse": ("r.jsonl", b"", "is a list of Lhotse with recordings without supervisions"),
    "supervisions of Lhotse": ("s.jsonl", b"", "is a list of Lhotse with supervisions without recordings"),
} | {
    f"git-lfs pointer of a {name}": (name, LFS, "it is a git-lfs pointer, the file itself was not downloaded: run `git")
    for name in ("a.jsonl", "a.parquet", "a.tar", "a.jsonl.gz", "a.offsets.npy", "train.tsv")
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_read_says_what_it_is_and_what_to_do(
    corpus: Any, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    name, content, message = REFUSED[what]
    if "of Lhotse" in what:
        content = (FILES / f"lhotse_{what.split()[0]}.jsonl").read_bytes()
    path = corpus.folder / name
    path.write_bytes(content)
    for run in (
        lambda: corpus.run("text_lm", inputs=[path]),
        lambda: encode(corpus.folder / "codes", str(path)),
    ):
        assert run() == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert corpus.left() == [] and not (corpus.folder / "codes").exists()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("sph2pipe -f wav a.sph |", "is the output of a command (sph2pipe -f wav a.sph |), and none is run here"),
        ("wavs.ark:1234", "lies in an archive of Kaldi (wavs.ark:1234)"),
        ("-", "has no path"),
    ],
)
def test_commands_and_archives_of_kaldi_are_refused(tmp_path: Path, entry: str, message: str) -> None:
    folder = kaldi(tmp_path / "data", wav_scp=f"a x.wav\nb {entry}\n")
    with pytest.raises(InputError) as error:
        list(InputFiles([str(folder)]).batches(0))
    assert "wav.scp line 2: recording b" in str(error.value) and message in str(error.value)


def test_paths_of_windows_and_names_in_another_normalisation(audio: Path, tmp_path: Path) -> None:
    pytest.importorskip("pycodec2")
    recording = (audio / "audio" / "0.wav").read_bytes()
    decomposed = unicodedata.normalize("NFD", "é")
    (audio / decomposed).mkdir()
    (audio / decomposed / "ü.wav").write_bytes(recording)
    (audio / "pointer.wav").write_bytes(LFS)
    paths = ["é/ü.wav", r"C:\corpus\a.wav", r"audio\0.wav", "audio/none.wav", "pointer.wav"]
    listed = audio / unicodedata.normalize("NFD", "listé.jsonl")
    listed.write_text("".join(json.dumps({"wav_path": path}) + "\n" for path in paths), encoding="utf-8")
    assert encode(tmp_path / "out", str(audio / "listé.jsonl"), flags=("--max-rejected", "0.9")) == 0
    assert [row["sample_id"] for row in encoded(tmp_path / "out")] == ["é/ü.wav"]
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [row["reason"] for row in rejected] == ["missing_file"] * 3 + ["unreadable"]
    assert "it is a path of Windows: write it relative to the list, with /" in rejected[0]["detail"]
    assert rejected[1]["detail"].endswith("audio/0.wav does; write / in place of \\")
    assert rejected[2]["detail"].endswith("does not exist; check wav_path")
    assert "it is a git-lfs pointer" in rejected[3]["detail"]
