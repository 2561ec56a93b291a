"""Where recordings may lie: compressed lists, URLs, archives. The codes are those of the plain files."""

from __future__ import annotations

import gzip
import json
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from megatron_speech.preprocess import encode_audio

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def recordings(fsdd: Path) -> Rows:
    lines = fsdd.read_text(encoding="utf-8").splitlines()[::270]
    rows = [json.loads(line) for line in lines]
    return [{**row, "wav_path": str(fsdd.parent / row["wav_path"])} for row in rows]


def encode(output: Path, *inputs: str, flags: tuple[str, ...] = ()) -> int:
    return encode_audio.main(
        ["--input", *inputs, "--codec", "codec2", "--output-dir", str(output), "--workers", "1", *flags]
    )


def jsonl(rows: Rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def outcome(folder: Path) -> tuple[np.ndarray, Rows]:
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    return np.load(folder / "codes-00000-of-00001.npy"), rows


@pytest.fixture(scope="module")
def plain(recordings: Rows, tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, Rows]:
    folder = tmp_path_factory.mktemp("plain")
    (folder / "samples.jsonl").write_bytes(jsonl(recordings))
    assert encode(folder / "out", str(folder / "samples.jsonl")) == 0
    return outcome(folder / "out")


def test_a_compressed_list_gives_the_same_bytes(
    recordings: Rows, plain: tuple[np.ndarray, Rows], tmp_path: Path
) -> None:
    (tmp_path / "samples.jsonl.gz").write_bytes(gzip.compress(jsonl(recordings)))
    assert encode(tmp_path / "out", str(tmp_path / "samples.jsonl.gz")) == 0
    codes, rows = outcome(tmp_path / "out")
    assert np.array_equal(codes, plain[0]) and rows == plain[1]


def test_recordings_at_a_url_are_read_there(recordings: Rows, plain: tuple[np.ndarray, Rows], tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for i, row in enumerate(recordings):
        memory.pipe(f"/audio-in/wavs/{i}.wav", Path(row["wav_path"]).read_bytes())
    rows = [{**row, "wav_path": f"wavs/{i}.wav"} for i, row in enumerate(recordings)]
    memory.pipe("/audio-in/samples.jsonl", jsonl([*rows, {**rows[0], "wav_path": "wavs/none.wav"}]))
    assert encode(tmp_path / "out", "memory://audio-in/samples.jsonl", flags=("--max-rejected", "0.5")) == 0
    codes, found = outcome(tmp_path / "out")
    assert np.array_equal(codes, plain[0])
    assert [row["wav_path"] for row in found] == [f"memory://audio-in/wavs/{i}.wav" for i in range(len(rows))]
    (rejected,) = (tmp_path / "out" / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(rejected)["reason"] == "missing_file"


def test_an_archive_of_recordings_is_read_in_place(
    recordings: Rows, plain: tuple[np.ndarray, Rows], tmp_path: Path
) -> None:
    for part, half in enumerate((recordings[::2], recordings[1::2])):
        with tarfile.open(tmp_path / f"shard-{part}.tar", "w") as archive:
            for i, row in enumerate(half):
                fields = tmp_path / "fields.json"
                fields.write_bytes(jsonl([{key: row[key] for key in ("transcript", "language", "speaker_id")}]))
                archive.add(row["wav_path"], f"{part}-{i}.wav")
                archive.add(fields, f"{part}-{i}.json")
            (tmp_path / "orphan.txt").write_text("nobody speaks", encoding="utf-8")
            archive.add(tmp_path / "orphan.txt", f"{part}-orphan.txt")
    assert encode(tmp_path / "out", str(tmp_path / "shard-{0..1}.tar"), flags=("--max-rejected", "0.5")) == 0
    codes, rows = outcome(tmp_path / "out")
    expected = {row["wav_path"]: row for row in plain[1]}
    whole = [*recordings[::2], *recordings[1::2]]
    assert [row["transcript"] for row in rows] == [row["transcript"] for row in whole]
    assert [row["sample_id"] for row in rows[:2]] == ["0-0", "0-1"]
    for row, given in zip(rows, whole, strict=True):
        assert row["checksum"] == next(r for p, r in expected.items() if p == given["wav_path"])["checksum"]
        assert (tmp_path / "out" / row["wav_path"]).exists()
    rejected = (tmp_path / "out" / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["reason"] for line in rejected] == ["missing_wav_path"] * 2
    # What the first run listed is an input like any other: the archive's bytes are found again.
    assert encode(tmp_path / "again", str(tmp_path / "out" / "samples.jsonl")) == 0
    assert np.array_equal(outcome(tmp_path / "again")[0], codes)


def test_archives_that_cannot_be_read_in_place_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(b""))
    assert encode(tmp_path / "out", str(tmp_path / "a.tar.gz")) == 2
    assert "decompress it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
