"""Staging: a dataset is copied once, checked, kept while it is used, and evicted when it is not."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_speech.data.dataset import staging
from megatron_speech.data.dataset.indexed import TokenDataset
from megatron_speech.data.dataset.staging import release, stage_datasets
from megatron_speech.data.stage import open_datasets
from megatron_speech.errors import InputError
from megatron_speech.files import read_json, write_json
from megatron_speech.recipe.data import DataConfig
from megatron_speech.tokens.space import TokenSpace

pytestmark = pytest.mark.usefixtures("no_entry_held")
Make = Callable[..., TokenDataset]


@pytest.fixture
def make(tmp_path: Path, toy_space: TokenSpace, make_dataset: Any, document: Any) -> Make:
    def one(name: str, codes: int = 40, seed: int = 0) -> TokenDataset:
        return make_dataset(tmp_path / name, toy_space, "speech_lm", [document(codes=codes)] * 50, seed=seed)

    return one


def size_of(dataset: TokenDataset) -> int:
    return sum(
        Path(f"{dataset.prefix}{suffix}").stat().st_size
        for suffix in (".bin", ".idx", ".docs.parquet", ".manifest.json")
    )


def assert_same(prefix: str | Path, source: TokenDataset) -> None:
    """A whole copy, byte for byte, that opens."""
    TokenDataset(prefix)
    for suffix in (".bin", ".idx", ".docs.parquet", ".manifest.json"):
        assert Path(f"{prefix}{suffix}").read_bytes() == Path(f"{source.prefix}{suffix}").read_bytes()


def stage(cache: Path, *datasets: TokenDataset, limit_bytes: int | None = None) -> list[Path]:
    named = {str(k): dataset.prefix for k, dataset in enumerate(datasets)}
    limit = None if limit_bytes is None else limit_bytes / 2**30
    return [Path(prefix) for prefix in stage_datasets(named, cache, limit).values()]


def entries(cache: Path) -> set[str]:
    return {path.name for path in (cache / "datasets").iterdir() if path.is_dir()}


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files that are copied from here on."""
    copied: list[str] = []
    real = staging._copy_file

    def counting(name: str, *rest: Any) -> str:
        copied.append(Path(name).name)
        return real(name, *rest)

    monkeypatch.setattr(staging, "_copy_file", counting)
    return copied


def test_a_staged_dataset_is_the_same_dataset_and_copied_once(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy_space: TokenSpace
) -> None:
    source = make("d")
    copied = counted(monkeypatch)
    config = DataConfig(datasets={"d": source.prefix}, cache_dir=str(tmp_path / "cache"), stage_datasets=True)
    staged = open_datasets(config, toy_space)["d"]
    assert Path(staged.prefix).is_relative_to(tmp_path / "cache" / "datasets")
    assert_same(staged.prefix, source)
    assert np.array_equal(staged.tokens, source.tokens)
    assert staged.columns().equals(source.columns())
    assert len(copied) == 3
    open_datasets(config, toy_space)
    release()
    open_datasets(config, toy_space)
    assert len(copied) == 3


def test_the_same_content_under_two_names_is_one_copy(make: Make, tmp_path: Path) -> None:
    one, two = make("one"), make("two")
    assert len(set(stage(tmp_path / "cache", one, two))) == 1


SCRIPT = """
import os, signal, sys
from megatron_speech.data.dataset import staging
staging._CHUNK = 100
kill_after = int(sys.argv[3])
chunks = 0
def copied(target, size):
    global chunks
    chunks += 1
    if chunks == kill_after:
        os.kill(os.getpid(), signal.SIGKILL)
staging._copied = copied
print(staging.stage_datasets({"d": sys.argv[1]}, sys.argv[2], None)["d"], chunks)
"""


def child(source: TokenDataset, cache: Path, kill_after: int = -1) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, source.prefix, str(cache), str(kill_after)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_killed_copy_is_continued_and_ends_in_the_same_bytes(make: Make, tmp_path: Path) -> None:
    source, cache = make("d"), tmp_path / "cache"
    killed = child(source, cache, kill_after=20)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    (left,) = entries(cache)
    assert left.endswith(".partial")
    again = child(source, cache)
    output, complaint = again.communicate()
    assert again.returncode == 0, complaint
    prefix, chunks = output.split()
    whole = sum(-(-path.stat().st_size // 100) for path in Path(prefix).parent.glob("data.[bid]*"))
    assert int(chunks) <= whole - 18  # what was there was not copied again
    assert_same(prefix, source)
    assert entries(cache) == {Path(prefix).parent.name}


def test_what_a_killed_copy_left_is_not_trusted(make: Make, tmp_path: Path) -> None:
    source, cache = make("d"), tmp_path / "cache"
    child(source, cache, kill_after=20).communicate()
    (partial,) = (cache / "datasets").glob(".*.partial")
    begun = max(partial.glob("data.[bid]*"), key=lambda path: path.stat().st_mtime_ns)
    damaged = bytearray(begun.read_bytes())
    damaged[0] ^= 1
    begun.write_bytes(damaged)
    assert_same(stage(cache, source)[0], source)


@pytest.mark.slow
def test_two_processes_at_once_make_one_copy(make: Make, tmp_path: Path) -> None:
    source, cache = make("d"), tmp_path / "cache"
    both = [child(source, cache) for _ in range(2)]
    outputs = []
    for process in both:
        output, complaint = process.communicate()
        assert process.returncode == 0, complaint
        outputs.append(output.split())
    assert outputs[0][0] == outputs[1][0]
    assert sorted(int(chunks) > 0 for _, chunks in outputs) == [False, True]
    assert_same(outputs[0][0], source)


def test_the_longest_unused_goes_first_and_nothing_that_is_used(make: Make, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    datasets = [make(name, seed=seed) for seed, name in enumerate("abcd")]
    room = int(2.5 * size_of(datasets[0]))
    a, b = (stage(cache, one)[0] for one in datasets[:2])
    release()
    for age, prefix in ((50, a), (100, b)):
        used = prefix.parent.with_suffix(".used")
        os.utime(used, (used.stat().st_mtime - age,) * 2)
    (c,) = stage(cache, datasets[2], limit_bytes=room)  # b goes: it is unused for longer than a
    assert entries(cache) == {a.parent.name, c.parent.name}
    (d,) = stage(cache, datasets[3], limit_bytes=room)  # c is ours, so a goes
    assert entries(cache) == {c.parent.name, d.parent.name}
    with pytest.raises(InputError, match=r"with what this and other runs are using, above data.cache_gib"):
        stage(cache, datasets[0], limit_bytes=room)
    assert entries(cache) == {c.parent.name, d.parent.name}
    assert_same(c, datasets[2])


@pytest.mark.slow
def test_another_process_keeps_what_it_uses(make: Make, tmp_path: Path) -> None:
    cache, one, two = tmp_path / "cache", make("one"), make("two", seed=1)
    holder = subprocess.Popen(
        [sys.executable, "-c", SCRIPT + "sys.stdout.flush(); sys.stdin.read()", one.prefix, str(cache), "-1"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout is not None
    prefix = holder.stdout.readline().split()[0]
    with pytest.raises(InputError, match="other runs are using"):
        stage(cache, two, limit_bytes=int(1.5 * size_of(one)))
    holder.communicate("")
    stage(cache, two, limit_bytes=int(1.5 * size_of(one)))
    assert not Path(prefix).parent.exists()


def test_what_a_run_needs_must_fit_the_limit_and_the_disk(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, cache = make("d"), tmp_path / "cache"
    with pytest.raises(InputError, match=r"data.cache_gib is .* but the run's 1 datasets are .*; raise it"):
        stage(cache, source, limit_bytes=size_of(source) - 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(InputError, match=r"needs .* and the disk has 0.00 GiB free \(data.cache_gib is not set"):
        stage(cache, source)
    assert entries(cache) == set()


def test_a_disk_that_fills_up_leaves_nothing_behind(make: Make, tmp_path: Path) -> None:
    source, cache = make("d", codes=400), tmp_path / "cache"
    # A file size limit is met in the middle of writing, like a full disk.
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
    limited += "import signal as s; s.signal(s.SIGXFSZ, s.SIG_IGN)\n"
    command = [sys.executable, "-c", limited + SCRIPT, source.prefix, str(cache), "-1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "InputError: cannot stage" in done.stderr
    assert "File too large" in done.stderr
    assert entries(cache) == set()


@pytest.mark.parametrize("how", ["truncated", "touched", "gone"])
def test_a_copy_that_was_tampered_with_is_made_anew(make: Make, tmp_path: Path, how: str) -> None:
    source, cache = make("d"), tmp_path / "cache"
    path = Path(f"{stage(cache, source)[0]}.bin")
    release()
    if how == "gone":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[3] ^= 1
        path.write_bytes(data if how == "touched" else data[:-2])
    assert_same(stage(cache, source)[0], source)


def test_after_a_boot_the_hashes_are_read_again(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, cache = make("d"), tmp_path / "cache"
    path = Path(f"{stage(cache, source)[0]}.bin")
    release()
    copied = counted(monkeypatch)
    monkeypatch.setattr(staging, "_boot", lambda: "another boot")
    stage(cache, source)
    assert not copied
    assert read_json(path.parent / "entry.json", "entry")["boot"] == "another boot"
    release()
    # Lost in a crash, with the size and time that it had.
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    monkeypatch.setattr(staging, "_boot", lambda: "a third boot")
    assert_same(stage(cache, source)[0], source)
    assert copied


@pytest.mark.slow
def test_a_copy_in_use_is_not_taken_from_under_a_run(make: Make, tmp_path: Path) -> None:
    source, cache = make("d"), tmp_path / "cache"
    holder = subprocess.Popen(
        [sys.executable, "-c", SCRIPT + "sys.stdout.flush(); sys.stdin.read()", source.prefix, str(cache), "-1"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout is not None
    prefix = holder.stdout.readline().split()[0]
    os.utime(f"{prefix}.bin", (1, 1))
    with pytest.raises(InputError, match="is damaged and another run is using it"):
        stage(cache, source)
    holder.communicate("")
    assert_same(stage(cache, source)[0], source)


def test_a_damaged_or_changed_source_is_refused(make: Make, tmp_path: Path) -> None:
    source, cache = make("d"), tmp_path / "cache"
    path = Path(f"{source.prefix}.bin")
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"d.bin: SHA-256 of what was read is .* needed .* by its manifest"):
        stage(cache, source)
    assert entries(cache) == set()
    path.unlink()
    with pytest.raises(InputError, match=r"d.bin cannot be read"):
        stage(cache, source)


def test_a_source_made_anew_is_another_entry(make: Make, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = stage(cache, make("d"))
    second = stage(cache, make("d", seed=1))
    assert first != second
    assert len(entries(cache)) == 2


def test_a_url_is_staged_and_nothing_else_may_name_one(make: Make, tmp_path: Path, toy_space: TokenSpace) -> None:
    source = make("d")
    url = f"file://{source.prefix}"
    config = DataConfig(datasets=[url], cache_dir=str(tmp_path / "cache"), stage_datasets=True)
    staged = open_datasets(config, toy_space)["d"]
    assert np.array_equal(staged.tokens, source.tokens)
    with pytest.raises(InputError, match=r"is a URL, and training reads local files; set data\.stage_datasets: true"):
        open_datasets(DataConfig(datasets=[url]), toy_space)
    with pytest.raises(InputError, match=r"nothing.manifest.json cannot be read"):
        open_datasets(config.model_copy(update={"datasets": [f"file://{tmp_path}/nothing"]}), toy_space)
    write_json(tmp_path / "bad.manifest.json", {"format_version": 0})
    with pytest.raises(InputError, match=r"manifest file://.*/bad.manifest.json: format_version is 0"):
        open_datasets(config.model_copy(update={"datasets": [f"file://{tmp_path}/bad"]}), toy_space)
