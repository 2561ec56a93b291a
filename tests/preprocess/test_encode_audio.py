"""Claims about preprocess/encode_audio.py, on real recordings."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import soundfile

from megatron_speech.codecs.audio import read_audio
from megatron_speech.codecs.codec2 import Codec2
from megatron_speech.preprocess import audio_input, encode_audio
from megatron_speech.preprocess.fields import recording_name

Rows = list[dict[str, Any]]


def write_rows(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a directory, hidden ones too."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def codes_of(directory: Path, row: dict[str, Any]) -> np.ndarray:
    codes = np.load(directory / row["codes_path"], mmap_mode="r")
    return codes[row["code_offset"] : row["code_offset"] + row["code_len"]]


@pytest.fixture(scope="module")
def recordings(fsdd: Path) -> Rows:
    """Every 20th real recording, with its absolute path."""
    return [{**row, "wav_path": str(fsdd.parent / row["wav_path"])} for row in read_rows(fsdd)[::20]]


@pytest.fixture
def encode(tmp_path: Path) -> Callable[..., int]:
    """Run the command in this process: encode("out", rows or path, "--flag", …); its exit status."""

    def run(output: str, source: Rows | Path, *flags: str) -> int:
        if not isinstance(source, Path):
            source = write_rows(tmp_path / "in" / "samples.jsonl", source)
        arguments = ["--input", str(source), "--codec", "codec2", "--output-dir", str(tmp_path / output)]
        return encode_audio.main([*arguments, *(flags if "--workers" in flags else (*flags, "--workers", "1"))])

    return run


def test_codes_in_the_file_are_those_of_the_codec(
    tmp_path: Path, encode: Callable[..., int], recordings: Rows, capsys: pytest.CaptureFixture[str]
) -> None:
    assert encode("out", recordings) == 0
    rows = read_rows(tmp_path / "out" / "samples.jsonl")
    assert len(rows) == len(recordings)
    offset = 0
    for row, given in zip(rows, recordings, strict=True):
        assert {**row, **given, "duration": 0} == {**row, "duration": 0}, "an input field was changed"
        assert row["duration"] == pytest.approx(given["duration"], abs=1e-3)
        assert row["sample_id"] == row["source_id"] == recording_name(given["wav_path"], str(tmp_path / "in"))
        assert (row["codec"], row["codec_hash"]) == ("codec2", Codec2().hash)
        assert row["code_offset"] == offset
        offset += row["code_len"]
        codes = codes_of(tmp_path / "out", row)
        np.testing.assert_array_equal(codes, Codec2().encode(read_audio(given["wav_path"], 8000)))
        assert row["checksum"] == hashlib.sha256(codes.astype("<i4").tobytes()).hexdigest()
    codes = np.load(tmp_path / "out" / "codes-00000-of-00001.npy")
    assert codes.shape == (offset, 4) and codes.dtype == np.uint16
    assert sorted(contents(tmp_path / "out")) == [
        "codes-00000-of-00001.json",
        "codes-00000-of-00001.npy",
        "rejected.jsonl",
        "samples.jsonl",
    ]
    printed = capsys.readouterr()
    seconds = sum(row["duration"] for row in rows)
    assert f"{seconds:.1f}" in printed.out and "fsdd" in printed.out and "135" in printed.out
    assert printed.err == ""  # no progress bar where there is no terminal


@pytest.mark.slow
def test_bytes_are_the_same_whatever_the_workers_and_from_any_directory(
    tmp_path: Path, recordings: Rows, repository: Path
) -> None:
    source = write_rows(tmp_path / "in" / "samples.jsonl", recordings[:100])
    for workers in (1, 3):
        command = [sys.executable, str(repository / "preprocess" / "encode_audio.py"), "--codec", "codec2"]
        command += ["--input", str(source), "--output-dir", f"out{workers}", "--workers", str(workers)]
        subprocess.run([*command, "--augment", "2"], cwd=tmp_path, check=True, capture_output=True)
    assert contents(tmp_path / "out1") == contents(tmp_path / "out3")


def test_repeating_gives_the_same_bytes_and_resuming_a_finished_run_does_nothing(
    tmp_path: Path, encode: Callable[..., int], recordings: Rows, capsys: pytest.CaptureFixture[str]
) -> None:
    assert encode("out", recordings[:40]) == 0
    before = contents(tmp_path / "out")
    assert encode("out", recordings[:40]) == 0
    assert contents(tmp_path / "out") == before
    capsys.readouterr()
    assert encode("out", recordings[:40], "--resume") == 0
    assert "complete already" in capsys.readouterr().out
    assert contents(tmp_path / "out") == before
    # Other rows over an old result: nothing of the old one is left.
    assert encode("out", recordings[40:50]) == 0
    assert encode("fresh", recordings[40:50]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@pytest.mark.slow
def test_kill_9_and_resume_give_the_same_bytes(
    tmp_path: Path, encode: Callable[..., int], recordings: Rows, repository: Path
) -> None:
    bad = {"wav_path": "absent.wav", "language": "en"}
    rows = [bad, *recordings, *({**row, "sample_id": f"again-{i}"} for i, row in enumerate(recordings))]
    source = write_rows(tmp_path / "in" / "samples.jsonl", rows)
    flags = ["--augment", "4"]
    command = [sys.executable, str(repository / "preprocess" / "encode_audio.py"), "--codec", "codec2"]
    command += ["--input", str(source), "--output-dir", str(tmp_path / "out"), "--workers", "2", *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    state = tmp_path / "out" / ".encode-00000-of-00001" / "state.json"
    while not state.exists():
        assert process.poll() is None, "it ended before its first commit"
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert workers and not psutil.wait_procs(workers, timeout=30)[1], "workers outlive their parent"
    done = json.loads(state.read_text())["rows"]
    assert 0 < done < len(rows)
    assert not (tmp_path / "out" / "samples.jsonl").exists()
    assert encode("out", source, "--resume", *flags) == 0
    assert encode("whole", source, *flags) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_kill_between_the_renames_is_resumed(
    tmp_path: Path, encode: Callable[..., int], recordings: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    assert encode("whole", recordings[:40]) == 0
    replace = os.replace
    for survive in range(3):
        output = f"out{survive}"
        left = survive

        def stop(source: Any, target: Any) -> None:
            nonlocal left
            if Path(source).name in ("codes", "rejected", "samples"):
                if left == 0:
                    raise Killed
                left -= 1
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stop)
            with pytest.raises(Killed):
                encode(output, recordings[:40])
        assert not (tmp_path / output / "samples.jsonl").exists()
        assert encode(output, recordings[:40], "--resume") == 0
        assert contents(tmp_path / output) == contents(tmp_path / "whole")


def test_unfinished_work_of_another_input_is_not_resumed_but_can_be_replaced(
    tmp_path: Path,
    encode: Callable[..., int],
    recordings: Rows,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(encode_audio, "COMMIT_SECONDS", 0.0)
        patch.setattr(encode_audio, "CHUNK_ROWS", 4)
        patch.setattr(encode_audio.Writer, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert encode("out", recordings[:20]) == 130
    before = contents(tmp_path / "out")
    assert encode("out", recordings[1:20], "--resume") == 2
    assert "another input" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before
    assert encode("out", recordings[1:20]) == 0
    assert encode("fresh", recordings[1:20]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_two_runs_cannot_write_the_same_shard(
    tmp_path: Path, encode: Callable[..., int], recordings: Rows, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "out" / ".encode-00000-of-00001"
    work.mkdir(parents=True)
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import fcntl, sys; f = open({str(work / 'lock')!r}, 'wb'); fcntl.lockf(f, fcntl.LOCK_EX); "
            "print('held', flush=True); sys.stdin.read()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    try:
        assert encode("out", recordings[:2]) == 2
        assert "another run is encoding" in capsys.readouterr().err
        assert work.exists()
    finally:
        holder.communicate()
    assert encode("out", recordings[:2]) == 0


@pytest.mark.slow
def test_shards_in_any_order_join_to_what_one_run_gives(
    tmp_path: Path, encode: Callable[..., int], recordings: Rows
) -> None:
    rows = [*recordings[:30], recordings[3], {"wav_path": "absent.wav"}, *recordings[30:]]
    assert encode("whole", rows, "--max-rejected", "0.1") == 0
    for shard in (2, 0, 3, 1):
        assert not (tmp_path / "parts" / "samples.jsonl").exists()
        assert encode("parts", rows, "--max-rejected", "0.1", "--shard", f"{shard}/4") == 0
    whole, parts = (read_rows(tmp_path / name / "samples.jsonl") for name in ("whole", "parts"))
    placed = ("codes_path", "code_offset")
    assert [{k: v for k, v in row.items() if k not in placed} for row in whole] == [
        {k: v for k, v in row.items() if k not in placed} for row in parts
    ]
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(codes_of(tmp_path / "whole", one), codes_of(tmp_path / "parts", other))
    assert (tmp_path / "whole" / "rejected.jsonl").read_bytes() == (tmp_path / "parts" / "rejected.jsonl").read_bytes()
    assert [row["reason"] for row in read_rows(tmp_path / "parts" / "rejected.jsonl")] == [
        "duplicate_sample_id",
        "missing_file",
    ]


def test_more_shards_than_rows_leave_empty_shards(tmp_path: Path, encode: Callable[..., int], recordings: Rows) -> None:
    for shard in range(5):
        assert encode("parts", recordings[:2], "--shard", f"{shard}/5") == 0
    assert len(read_rows(tmp_path / "parts" / "samples.jsonl")) == 2


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("channels", [1, 2])
def test_every_format_at_44100_hz_gives_nearly_the_codes_of_the_original(
    tmp_path: Path, encode: Callable[..., int], recordings: Rows, suffix: str, channels: int
) -> None:
    import soxr

    original = read_audio(recordings[7]["wav_path"], 8000)
    audio = soxr.resample(original, 8000, 44100)
    soundfile.write(tmp_path / f"a.{suffix}", np.stack([audio] * channels, axis=1), 44100)
    # Relative to the list, which lies in another directory than the output.
    source = write_rows(tmp_path / "in" / "deeper" / "s.jsonl", [{"wav_path": f"../../a.{suffix}"}])
    assert encode("out", source) == 0
    (row,) = read_rows(tmp_path / "out" / "samples.jsonl")
    assert (tmp_path / "out" / row["wav_path"]).resolve() == (tmp_path / f"a.{suffix}").resolve()
    assert row["sample_id"] == f"../../a.{suffix}"
    assert row["duration"] == pytest.approx(len(original) / 8000, abs=0.03)
    codes, expected = codes_of(tmp_path / "out", row).astype(int), Codec2().encode(original)
    frames = min(len(codes), len(expected))
    assert abs(len(codes) - len(expected)) <= 1
    assert np.median(np.abs(codes[:frames, 2:] - expected[:frames, 2:]), axis=0).max() <= 2  # energy and pitch


def test_segments_of_one_file(tmp_path: Path, encode: Callable[..., int], recordings: Rows) -> None:
    parts = [read_audio(row["wav_path"], 8000) for row in recordings[:3]]
    soundfile.write(tmp_path / "long.flac", np.concatenate(parts), 8000)
    edges = np.cumsum([0, *map(len, parts)]) / 8000
    rows = [
        {"wav_path": "../long.flac", "start_time": start, "end_time": end, "segment_order": index}
        for index, (start, end) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))
    ]
    assert encode("out", rows) == 0
    written = read_rows(tmp_path / "out" / "samples.jsonl")
    assert len({row["sample_id"] for row in written}) == 3
    assert {row["source_id"] for row in written} == {"../long.flac"}
    for row, part in zip(written, parts, strict=True):
        assert row["duration"] == len(part) / 8000
        np.testing.assert_array_equal(codes_of(tmp_path / "out", row), Codec2().encode(part))


def test_augmented_variants_differ_are_named_and_share_their_source(
    tmp_path: Path, encode: Callable[..., int], recordings: Rows
) -> None:
    rows = [{**row, "sample_id": f"id{index}"} for index, row in enumerate(recordings[:10])]
    assert encode("plain", rows) == 0
    assert encode("out", rows, "--augment", "4") == 0
    plain, written = (read_rows(tmp_path / name / "samples.jsonl") for name in ("plain", "out"))
    assert len(written) == 40
    for index, clean in enumerate(plain):
        variants = written[4 * index : 4 * index + 4]
        assert [row["variant"] for row in variants] == [0, 1, 2, 3]
        assert [row["sample_id"] for row in variants] == [f"id{index}" + suffix for suffix in ("", "#v1", "#v2", "#v3")]
        assert {row["source_id"] for row in variants} == {clean["source_id"]}
        assert variants[0]["checksum"] == clean["checksum"]
        assert len({row["checksum"] for row in variants}) == 4
    # A variant depends on its sample_id alone, not on its neighbours.
    assert encode("alone", rows[5:6], "--augment", "3") == 0
    alone = read_rows(tmp_path / "alone" / "samples.jsonl")
    assert [row["checksum"] for row in alone] == [row["checksum"] for row in written[20:23]]


def test_shift_and_gain_stay_in_their_ranges() -> None:
    drawn = [encode_audio.variant_shift_and_gain(f"s{i}", 1 + i % 7, 320) for i in range(2000)]
    shifts, gains = np.array(drawn).T
    assert shifts.min() == 1 and shifts.max() == 319
    assert 10 ** (-6 / 20) <= gains.min() < 0.51 and 1.25 < gains.max() <= 10 ** (2 / 20)
    assert encode_audio.variant_shift_and_gain("s", 0, 320) == (0, 1.0)


def test_unusable_rows_are_set_aside_with_their_reason(
    tmp_path: Path, encode: Callable[..., int], recordings: Rows, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "nothing.wav").write_bytes(b"")
    (tmp_path / "in" / "text.wav").write_text("no audio")
    soundfile.write(tmp_path / "in" / "empty.wav", np.zeros(0), 8000)
    soundfile.write(tmp_path / "in" / "short.wav", np.linspace(-0.1, 0.1, 319), 8000)
    soundfile.write(tmp_path / "in" / "frame.wav", np.linspace(-0.1, 0.1, 320), 8000)
    soundfile.write(tmp_path / "in" / "nan.wav", np.array([np.nan] * 800, np.float32), 8000, subtype="FLOAT")
    good = recordings[0]
    lines: list[tuple[str | None, bytes]] = [
        (None, json.dumps(good).encode()),
        ("missing_file", b'{"wav_path": "absent.wav", "note": "kept"}'),
        ("empty_audio", b'{"wav_path": "nothing.wav"}'),
        ("unreadable", b'{"wav_path": "text.wav"}'),
        ("empty_audio", b'{"wav_path": "empty.wav"}'),
        ("too_short", b'{"wav_path": "short.wav"}'),
        (None, b'{"wav_path": "frame.wav"}'),
        ("non_finite", b'{"wav_path": "nan.wav"}'),
        ("bad_json", b'{"wav_path": "frame.wav"'),
        ("bad_json", b'["frame.wav"]'),
        ("bad_json", b'{"wav_path": "\xff.wav"}'),
        ("bad_json", b'{"wav_path": "frame.wav", "duration": NaN}'),
        ("bad_json", b'{"wav_path": "\\ud800.wav"}'),
        ("bad_json", b'{"wav_path": "frame.wav", "snr": 1e400}'),
        ("bad_json", b"[" * 100_000),
        ("missing_wav_path", b'{"codes_path": "a.npy"}'),
        ("missing_wav_path", b'{"wav_path": 3}'),
        ("missing_wav_path", b'{"wav_path": ""}'),
        ("bad_sample_id", b'{"wav_path": "frame.wav", "sample_id": ["a"]}'),
        ("bad_segment", b'{"wav_path": "frame.wav", "start_time": "0"}'),
        ("bad_segment", b'{"wav_path": "frame.wav", "start_time": 1, "end_time": 99}'),
        ("duplicate_sample_id", json.dumps(good).encode()),
        (None, json.dumps({**good, "sample_id": "another"}).encode()),
        (None, b'{"wav_path": "frame.wav", "sample_id": 7}'),
        ("duplicate_sample_id", b'{"wav_path": "frame.wav", "sample_id": "7"}'),
    ]
    source = tmp_path / "in" / "samples.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + b"\n\n".join(line for _, line in lines))
    assert encode("out", source, "--max-rejected", "0.9") == 0
    rejected = read_rows(tmp_path / "out" / "rejected.jsonl")
    expected = [(1 + 2 * index, reason) for index, (reason, _) in enumerate(lines) if reason]
    assert [(row["line"], row["reason"]) for row in rejected] == expected
    assert rejected[0]["row"] == {"wav_path": "absent.wav", "note": "kept"}
    assert all(row["detail"] for row in rejected)
    rows = read_rows(tmp_path / "out" / "samples.jsonl")
    called = recording_name(good["wav_path"], str(tmp_path / "in"))
    assert [row["sample_id"] for row in rows] == [called, "frame.wav", "another", "7"]
    assert [row["code_len"] for row in rows][1] == 2
    manifest = json.loads((tmp_path / "out" / "codes-00000-of-00001.json").read_text())
    assert (manifest["rows"], manifest["samples"]) == (len(lines), 4)
    assert sum(manifest["rejected"].values()) == len(expected)
    printed = capsys.readouterr().out
    assert "bad_json" in printed and "unknown" in printed


def test_duplicates_are_found_in_bounded_memory(
    tmp_path: Path, encode: Callable[..., int], recordings: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*recordings[:20], *recordings[10:15], *recordings[10:12]]
    monkeypatch.setattr(audio_input, "DUPLICATE_ROWS_IN_MEMORY", 3)
    assert encode("out", rows, "--max-rejected", "0.5") == 0
    assert [row["line"] for row in read_rows(tmp_path / "out" / "rejected.jsonl")] == list(range(21, 28))
    assert len(read_rows(tmp_path / "out" / "samples.jsonl")) == 20


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--codec", "codek2"], "did you mean 'codec2'"),
        (["--workers", "0"], "--workers is 0"),
        (["--augment", "0"], "--augment is 0"),
        (["--shard", "2/2"], "--shard is '2/2'"),
        (["--shard", "one"], "--shard is 'one'"),
        (["--max-rejected", "1.5"], "--max-rejected is 1.5"),
        (["--input", "absent.jsonl"], "absent.jsonl does not exist"),
        (["--input", "."], "is a folder"),
        (["--input", "empty.jsonl"], "has no rows"),
        (["--input", "blank.jsonl"], "has no rows"),
        (["--input", "bad.jsonl"], "2 of the first 2 rows"),
        (["--input", "bad.jsonl", "--max-rejected", "1"], "no row of bad.jsonl is left"),
        (["--output-dir", "file.txt"], "cannot write to file.txt"),
        (["--output-dir", "/proc/out"], "cannot write to /proc/out"),
        (["--output-dir", "file.txt/deeper"], "cannot write to file.txt/deeper"),
    ],
)
def test_bad_input_exits_2_with_one_sentence_and_leaves_nothing(
    tmp_path: Path,
    recordings: Rows,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "good.jsonl", recordings[:2])
    write_rows(tmp_path / "bad.jsonl", [{"wav_path": "absent.wav"}, {"wav_path": "gone.wav"}])
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "blank.jsonl").write_bytes(b"\n \n")
    (tmp_path / "file.txt").write_bytes(b"")
    before = contents(tmp_path)
    defaults = {"--input": "good.jsonl", "--codec": "codec2", "--output-dir": "new/out", "--workers": "1"}
    defaults |= dict(zip(flags[::2], flags[1::2], strict=True))
    assert encode_audio.main([word for pair in defaults.items() for word in pair]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and message in printed.err
    assert printed.err.count("\n") == 1 and "Traceback" not in printed.err
    assert contents(tmp_path) == before
    assert not (tmp_path / "new").exists()


def test_too_many_rejections_stop_early_name_reasons_and_keep_an_earlier_result(
    tmp_path: Path, encode: Callable[..., int], recordings: Rows, capsys: pytest.CaptureFixture[str]
) -> None:
    assert encode("out", recordings[:20]) == 0
    before = contents(tmp_path / "out")
    rows = [{"wav_path": "absent.wav"}, {"wav_path": "gone.wav"}, *recordings]
    assert encode("out", rows) == 2
    error = capsys.readouterr().err
    assert "2 of the first 32 rows" in error and "(137 in all)" in error
    assert "2 missing_file" in error and "line 1:" in error and "absent.wav" in error
    assert contents(tmp_path / "out") == before
    # One of 137 is less than 1 %.
    assert encode("out", rows[1:]) == 0


def test_an_unwritable_output_is_refused(
    tmp_path: Path, encode: Callable[..., int], recordings: Rows, capsys: pytest.CaptureFixture[str]
) -> None:
    if os.geteuid() == 0:
        pytest.skip("the superuser can write everywhere")
    (tmp_path / "out").mkdir(mode=0o555)
    assert encode("out", recordings[:2]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_help_names_units_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        encode_audio.main(["--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for word in ("--resume", "--shard", "seconds", "default: 0.01", "default: 0/1", "dB", "codec2"):
        assert word in printed
