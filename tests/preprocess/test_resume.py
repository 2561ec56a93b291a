"""A conversion that is killed at any moment goes on, and ends in the bytes of one that was not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_speech.data.dataset.indexed import TokenDataset
from megatron_speech.errors import InputError

FILES = {"bin", "idx", "docs.parquet", "manifest.json", "rejected.jsonl"}


def bad_rows(corpus: Any) -> None:
    rows: list[Any] = list(corpus.rows)
    rows[3], rows[50] = "{", {**rows[50], "codes_path": "nowhere.npy"}
    corpus.write(rows)


CONVERSIONS = {
    "pairs": ("tts", "--max-rejected", "0.5"),
    "cloning": ("tts", "--max-rejected", "0.5", "--cloning", "same-speaker", "--references", "2"),
}


# Cloning has a pre-pass; what follows it is the same, so a quarter of the changes will do.
@pytest.mark.slow
@pytest.mark.parametrize(("name", "step"), [("pairs", 1), ("cloning", 4)], ids=["pairs", "cloning"])
def test_killed_at_every_change_of_the_disk_a_conversion_goes_on_to_the_same_bytes(
    corpus: Any, killer: Any, name: str, step: int
) -> None:
    bad_rows(corpus)
    argv = corpus.arguments(*CONVERSIONS[name], prefix="out/data")
    whole = killer.run("preprocess_data", argv)
    assert whole["status"] == 0, whole["log"]
    expected = corpus.files()
    assert set(expected) == FILES
    went_on = placed = 0
    for k in range(0, whole["changes"], step):
        shutil.rmtree(corpus.folder / "out")
        assert killer.run("preprocess_data", argv, kill_at=k)["status"] == -9
        if "manifest.json" not in corpus.files():
            with pytest.raises(InputError, match="does not exist"):  # half a dataset is none
                TokenDataset(corpus.folder / "out" / "data")
        else:
            assert corpus.files() == expected
        again = killer.run("preprocess_data", argv, often=False)
        assert again["status"] == 0, (k, again["log"])
        assert corpus.files() == expected, k
        assert not [name for name in corpus.left() if name.startswith(".")], k
        went_on += "resumes after" in again["log"]
        placed += "every row was converted before" in again["log"]
    assert went_on > 2 and placed > 2  # and did not merely begin anew


@pytest.mark.slow
def test_a_dataset_that_is_replaced_stays_whole_until_the_new_one_is(corpus: Any, killer: Any) -> None:
    argv = corpus.arguments("tts")
    assert killer.run("preprocess_data", argv)["status"] == 0
    old = corpus.files()
    shutil.copytree(corpus.folder / "out", corpus.folder / "kept")
    corpus.write(corpus.rows[:40])
    whole = killer.run("preprocess_data", argv)
    new = corpus.files()
    assert new != old
    seen = set()
    last = whole["changes"]
    for k in [*range(0, last - 30, 20), *range(last - 30, last)]:  # the old files go near the end
        shutil.rmtree(corpus.folder / "out")
        shutil.copytree(corpus.folder / "kept", corpus.folder / "out")
        assert killer.run("preprocess_data", argv, kill_at=k)["status"] == -9
        files = corpus.files()
        state = "old" if files == old else "new" if files == new else "none"
        assert state != "none" or "manifest.json" not in files
        seen.add(state)
        assert killer.run("preprocess_data", argv, often=False)["status"] == 0
        assert corpus.files() == new, k
    assert seen == {"old", "new", "none"}


@pytest.mark.slow
def test_killed_again_and_again_it_still_ends(corpus: Any, killer: Any) -> None:
    bad_rows(corpus)
    argv = corpus.arguments(*CONVERSIONS["cloning"])
    assert killer.run("preprocess_data", argv)["status"] == 0
    expected = corpus.files()
    shutil.rmtree(corpus.folder / "out")
    for _ in range(200):
        if killer.run("preprocess_data", argv, kill_at=60)["status"] == 0:
            break
    assert corpus.files() == expected


@pytest.mark.slow
def test_what_decides_the_output_begins_it_anew_and_is_named(corpus: Any, killer: Any) -> None:
    bad_rows(corpus)
    flags = CONVERSIONS["pairs"]
    middle = killer.run("preprocess_data", corpus.arguments(*flags))["changes"] // 2
    shutil.rmtree(corpus.folder / "out")

    def stopped() -> None:
        assert killer.run("preprocess_data", corpus.arguments(*flags), kill_at=middle)["status"] == -9

    def again(*more: str) -> str:
        answer = killer.run("preprocess_data", corpus.arguments(*flags, *more))
        assert answer["status"] == 0
        return answer["log"]

    stopped()
    assert "restarted, since options.seed was 0 and is 1" in again("--seed", "1")
    stopped()
    assert "restarted, since a restart was requested" in again("--restart")
    stopped()
    assert "resumes after" in again("--workers", "2")  # what does not decide it does not
    stopped()
    corpus.write([*corpus.rows[:-1], {**corpus.rows[-1], "mood": "glad"}])
    assert "restarted, since inputs." in again() and TokenDataset(corpus.folder / "out" / "data")


@pytest.mark.slow
def test_damaged_unfinished_work_is_not_gone_on_with(corpus: Any, killer: Any) -> None:
    argv = corpus.arguments("tts")
    whole = killer.run("preprocess_data", argv)
    expected = corpus.files()
    partial = corpus.folder / "out" / ".data.partial"
    for name in ("ids.bin", "lengths", "rows.arrow", "journal.json"):
        shutil.rmtree(corpus.folder / "out")
        killer.run("preprocess_data", argv, kill_at=2 * whole["changes"] // 3)
        data = bytearray((partial / name).read_bytes())
        data[len(data) // 3] ^= 4
        (partial / name).write_bytes(data)
        log = killer.run("preprocess_data", argv)["log"]
        assert "restarted, since" in log and "damaged" in log, name
        assert corpus.files() == expected


@pytest.mark.slow
def test_encoding_killed_at_every_change_of_the_disk_goes_on_to_the_same_bytes(
    tmp_path: Path, fsdd: Path, killer: Any
) -> None:
    pytest.importorskip("pycodec2", reason="the Codec2 codec is an extra")
    rows = [json.loads(line) for line in fsdd.read_text().splitlines()[::500]]
    with open(tmp_path / "samples.jsonl", "w") as handle:
        for row in rows:
            handle.write(json.dumps({**row, "wav_path": str(fsdd.parent / row["wav_path"])}) + "\n")
    out = tmp_path / "out"
    argv = ["--input", str(tmp_path / "samples.jsonl"), "--codec", "codec2", "--output-dir", str(out)]
    argv += ["--workers", "1", "--resume"]
    whole = killer.run("encode_audio", argv)
    assert whole["status"] == 0, whole["log"]
    expected = {path.name: path.read_bytes() for path in out.iterdir()}
    for k in range(whole["changes"]):
        shutil.rmtree(out)
        assert killer.run("encode_audio", argv, kill_at=k)["status"] == -9
        again = killer.run("encode_audio", argv)
        assert again["status"] == 0, (k, again["log"])
        assert {path.name: path.read_bytes() for path in out.iterdir()} == expected, k
