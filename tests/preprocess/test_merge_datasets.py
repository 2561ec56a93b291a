"""Joining datasets: shards become what one run gives, and what does not fit together is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_speech.data.dataset.indexed import TokenDataset
from megatron_speech.data.dataset.verify import verify_dataset
from megatron_speech.preprocess import merge_datasets
from megatron_speech.tokens.space import TokenSpace


def merge(folder: Path, output: str, *inputs: str) -> int:
    flags = [name for name in inputs if name.startswith("--")]
    parts = [str(folder / name) for name in inputs if name not in flags]
    return merge_datasets.main(["--input", *parts, "--output-prefix", str(folder / output), *flags])


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--cloning", "same-speaker", "--references", 2), ()], ids=["cloning", "plain"])
def test_merged_shards_are_the_bytes_of_one_run(make_corpus: Any, flags: tuple[object, ...]) -> None:
    corpus = make_corpus(1300)
    rows: list[Any] = list(corpus.rows)
    rows[3] = "{"
    rows[1290] = "{"
    corpus.write(rows)
    corpus.convert("tts", *flags, prefix="out/one")
    for i in range(3):
        corpus.convert("tts", *flags, "--shard", f"{i}/3", prefix=f"out/shard{i}")
    assert merge(corpus.folder / "out", "merged", "shard0", "shard1", "shard2") == 0
    one, merged = corpus.files("out/one"), corpus.files("out/merged")
    assert set(one) == {"bin", "idx", "docs.parquet", "manifest.json", "rejected.jsonl"}
    assert one == merged
    verify_dataset(corpus.folder / "out" / "merged").require()


def test_different_datasets_are_joined_in_order(corpus: Any) -> None:
    first = corpus.convert("tts", prefix="out/a")
    other = corpus.write([{**row, "dataset_source": "third", "language": "am"} for row in corpus.rows[:7]], "b.jsonl")
    second = corpus.convert("tts", "--seed", 5, prefix="out/b", inputs=[other])
    assert merge(corpus.folder / "out", "c", "b", "a") == 0
    merged = TokenDataset(corpus.folder / "out" / "c")
    verify_dataset(merged.prefix, require_manifest=merged.manifest is not None).require()
    assert np.array_equal(merged.tokens, np.concatenate([second.tokens, first.tokens]))
    assert merged.columns("sample_id")["sample_id"].to_pylist()[:8] == [*(f"s{i}" for i in range(7)), "s0"]
    manifest = merged.manifest
    assert manifest is not None and manifest.seed is None
    assert manifest.languages["am"].documents == 7 and manifest.totals.documents == 67
    assert [Path(entry.path).name for entry in manifest.inputs] == ["b.jsonl", "samples.jsonl"]


def test_what_does_not_fit_together_is_refused(corpus: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_speech.tokens.space import CodecDescription

    out = corpus.folder / "out"
    corpus.convert("tts", prefix="out/pairs")
    corpus.convert("speech_lm", prefix="out/speech")
    corpus.convert("tts", "--split-seed", 9, prefix="out/split")
    corpus.convert("tts", "--append-eod", prefix="out/eod")
    corpus.write([{**row, "codec_hash": "d" * 64} for row in corpus.rows])
    TokenSpace.build("bytes", CodecDescription("toy", "d" * 64, 8000, 25.0, ("a", "b"), (512, 64))).save(
        corpus.folder / "ts.json"
    )
    assert corpus.run("tts", prefix="out/codec") == 0
    before = corpus.left()
    for name, message in {
        "speech": "speech.manifest.json: task is 'speech_lm', but 'tts' in",
        "split": "split_seed is 9, but 0",
        "eod": "append_eod is True, but False",
        "codec": f"codec.hash is '{'d' * 64}', but '{'c' * 64}'",
        "pairs": "twice",
        "nothing": "does not exist",
    }.items():
        capsys.readouterr()
        assert merge(out, "merged", "pairs", name) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error
    assert merge(out, "pairs", "pairs", "split") == 2
    assert "is one of --input" in capsys.readouterr().err
    (out / "copy.manifest.json").write_text((out / "pairs.manifest.json").read_text())
    for suffix in (".bin", ".idx", ".docs.parquet"):
        (out / f"copy{suffix}").write_bytes((out / f"pairs{suffix}").read_bytes())
    assert merge(out, "merged", "pairs", "copy") == 2
    assert "holds the same ids as" in capsys.readouterr().err
    assert [name for name in corpus.left() if not name.startswith("copy.")] == before


def test_a_damaged_part_is_found_while_copying(corpus: Any, capsys: pytest.CaptureFixture[str]) -> None:
    corpus.convert("tts", "--shard", "0/2", prefix="out/a")
    corpus.convert("tts", "--shard", "1/2", prefix="out/b")
    path = corpus.folder / "out" / "b.bin"
    data = bytearray(path.read_bytes())
    data[11] ^= 1
    path.write_bytes(data)
    before = corpus.left()
    assert merge(corpus.folder / "out", "merged", "a", "b") == 2
    assert "b.bin: SHA-256 is" in capsys.readouterr().err
    assert corpus.left() == before


def test_a_missing_shard_is_named(corpus: Any, capsys: pytest.CaptureFixture[str]) -> None:
    out = corpus.folder / "out"
    for i in range(3):
        corpus.convert("tts", "--shard", f"{i}/3", prefix=f"out/{i}")
    before = corpus.left()
    assert merge(out, "some", "0", "2") == 2
    assert f"shard 1/3 of {corpus.samples} is missing (found 0/3, 2/3)" in capsys.readouterr().err
    assert merge(out, "some", "0", "2", "1") == 2
    assert "are named as 0/3, 2/3, 1/3; name them in order" in capsys.readouterr().err
    assert corpus.left() == before
    assert merge(out, "some", "0", "2", "--allow-missing") == 0
    manifest = json.loads((out / "some.manifest.json").read_text())
    assert manifest["shard"] == "0/3 2/3"
    assert manifest["documents"] == 40
    assert merge(out, "all", "some", "1") == 2  # what is there twice or out of order stays visible
    assert "are named as 0/3, 2/3, 1/3" in capsys.readouterr().err


def test_shards_of_two_conversions_do_not_complete_each_other(corpus: Any, capsys: pytest.CaptureFixture[str]) -> None:
    corpus.convert("tts", "--shard", "0/2", prefix="out/a0")
    other = corpus.write([{**row, "language": "am"} for row in corpus.rows], "other.jsonl")
    corpus.convert("tts", "--shard", "1/2", prefix="out/b1", inputs=[other])
    corpus.convert("tts", "--shard", "1/2", "--seed", 1, prefix="out/c1")
    for name, missing in (("b1", "1/2"), ("c1", "1/2")):
        assert merge(corpus.folder / "out", "merged", "a0", name) == 2
        assert f"shard {missing} of {corpus.samples} is missing (found 0/2)" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".docs.parquet", ".rejected.jsonl"])
def test_each_file_of_a_part_is_checked(corpus: Any, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    corpus.write(["{", *corpus.rows, "{"])
    for i in range(2):
        corpus.convert("tts", "--max-rejected", 0.5, "--shard", f"{i}/2", prefix=f"out/{i}")
    path = corpus.folder / "out" / f"1{suffix}"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    before = corpus.left()
    assert merge(corpus.folder / "out", "merged", "0", "1") == 2
    assert f"1{suffix}: SHA-256 is" in capsys.readouterr().err
    assert corpus.left() == before


@pytest.mark.slow
def test_a_merge_killed_at_every_change_of_the_disk_goes_on_to_the_same_bytes(corpus: Any, killer: Any) -> None:
    corpus.write(["{", *corpus.rows])
    for i in range(2):
        corpus.convert("tts", "--max-rejected", 0.5, "--shard", f"{i}/2", prefix=f"shards/{i}")
    argv = ["--input", *(str(corpus.folder / "shards" / str(i)) for i in range(2))]
    argv += ["--output-prefix", str(corpus.folder / "out" / "data")]
    whole = killer.run("merge_datasets", argv)
    assert whole["status"] == 0, whole["log"]
    expected = corpus.files()
    went_on = 0
    for k in range(whole["changes"]):
        shutil.rmtree(corpus.folder / "out")
        assert killer.run("merge_datasets", argv, kill_at=k)["status"] == -9
        again = killer.run("merge_datasets", argv, often=False)
        assert again["status"] == 0, (k, again["log"])
        assert corpus.files() == expected, k
        assert not [name for name in corpus.left() if name.startswith(".")], k
        went_on += "resumes after" in again["log"]
    assert went_on > 5
