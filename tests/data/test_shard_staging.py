"""Staging by the shard: what is read is there, whatever is fetched, evicted or killed meanwhile, and never a hole."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_speech.data.dataset import shard_store, shard_table, staging
from megatron_speech.data.dataset.indexed import TokenDataset
from megatron_speech.data.dataset.shard_store import ShardStore
from megatron_speech.data.dataset.shard_table import ABSENT, PARTIAL, SPARSE, TABLE, WHOLE, ShardTable
from megatron_speech.data.dataset.sharded import ShardedTokenDataset
from megatron_speech.data.dataset.staging import release, shard_bytes_of, stage_datasets, stage_shards
from megatron_speech.errors import InputError
from megatron_speech.files import read_json
from megatron_speech.tokens.space import TokenSpace

pytestmark = pytest.mark.usefixtures("no_entry_held")
Make = Callable[..., TokenDataset]
SHARD = 16_384


@pytest.fixture
def make(tmp_path: Path, toy_space: TokenSpace, make_dataset: Any, document: Any) -> Make:
    """A dataset of 50 documents of 3 to 5 KB, in some 13 shards."""

    def one(name: str, seed: int = 0) -> TokenDataset:
        lengths = np.random.default_rng(seed).integers(1500, 2500, 50).tolist()
        return make_dataset(
            tmp_path / name, toy_space, "speech_lm", [document(codes=codes) for codes in lengths], seed=seed
        )

    return one


def beside_bin(source: TokenDataset) -> int:
    return sum(Path(f"{source.prefix}{s}").stat().st_size for s in (".idx", ".docs.parquet", ".manifest.json"))


def gib_of(shards: float, *sources: TokenDataset) -> float:
    """A `cache_gib` with room for so many shards of these datasets."""
    return (sum(map(beside_bin, sources)) + shards * SHARD) / 2**30


def opened(source: TokenDataset, cache: Path, shards: float = 4, prefix: str = "") -> ShardedTokenDataset:
    stores = stage_shards({"d": prefix or source.prefix}, cache, gib_of(shards, source), shard_bytes=SHARD)
    return ShardedTokenDataset(stores["d"])


def states(store: ShardStore) -> list[int]:
    return ShardTable(store.entry).records["state"].tolist()


def blocks(store: ShardStore) -> int:
    return (store.entry / SPARSE).stat().st_blocks * 512


def assert_same(staged: TokenDataset, source: TokenDataset) -> None:
    for number in range(len(source)):
        np.testing.assert_array_equal(staged.document(number), source.document(number), strict=True)


def first_of(store: ShardStore, staged: TokenDataset, shard: int) -> int:
    """A document of a shard."""
    return int(np.searchsorted(staged.pointers, store.bounds[shard]))


# ---- what is read


def test_documents_are_those_of_the_source_in_a_cache_that_holds_a_third_of_them(make: Make, tmp_path: Path) -> None:
    source = make("d")
    staged = opened(source, tmp_path / "cache", shards=4.5)
    store = staged.shards
    assert len(store.bounds) > 12
    assert np.isin(store.bounds, [*source.pointers, store.size]).all()  # no document lies in two shards
    assert blocks(store) == 0  # nothing is fetched before it is read
    order = np.random.default_rng(0).permutation(len(source)).tolist()
    for number in [*order, *range(len(source))]:
        np.testing.assert_array_equal(staged.document(number), source.document(number), strict=True)
        assert ShardTable(store.entry).bytes_taken() <= 4.5 * SHARD
    assert store.statistics.fetched > len(store.bounds)  # some came again, and were what they had been
    part = source.document(7, 3, 40)
    np.testing.assert_array_equal(staged.document(7, 3, 40), part, strict=True)
    assert staged.columns().equals(source.columns())


def test_the_longest_unused_shard_goes_and_its_blocks_are_free_again(make: Make, tmp_path: Path) -> None:
    source = make("d")
    staged = opened(source, tmp_path / "cache", shards=4)
    store = staged.shards
    used: list[int] = []
    for shard in (0, 1, 2, 0, 3, 4, 5, 1, 7):
        staged.document(first_of(store, staged, shard))
        used = [other for other in used if other != shard]
        while sum(map(store.shard_bytes, [*used, shard])) > 4 * SHARD:
            del used[0]
        used.append(shard)
        assert [shard for shard, state in enumerate(states(store)) if state == WHOLE] == sorted(used)
        # Of a shard whose edges share a block with another one, that block stays.
        assert sum(map(store.shard_bytes, used)) <= blocks(store) <= sum(map(store.shard_bytes, used)) + 9 * 8192
    assert store.statistics.fetched == 8 and 2 not in used
    with open(store.entry / SPARSE, "rb") as sparse:
        sparse.seek(int(store.bounds[2]))
        assert not any(sparse.read(store.shard_bytes(2)))  # a hole, which only the locks keep readers from


def test_a_pinned_shard_stays_whoever_wants_its_room(make: Make, tmp_path: Path) -> None:
    source, other = make("d"), make("e", seed=1)
    cache, limit = tmp_path / "cache", gib_of(3.2, source, other)
    one, two = stage_shards({"d": source.prefix, "e": other.prefix}, cache, limit, shard_bytes=SHARD).values()
    pinned = [shard for shard in range(6) if one.try_pin(shard)]
    assert 2 <= len(pinned) < 6  # what does not fit is not waited for
    assert not two.try_pin(0)
    assert [shard for shard in range(6) if states(one)[shard] == WHOLE] == pinned
    one.unpin(0)
    two.pin(0)
    assert states(one)[0] == ABSENT and states(two)[0] == WHOLE


def test_whole_entries_and_shards_make_room_for_one_another(make: Make, tmp_path: Path) -> None:
    source, other, cache = make("d"), make("e", seed=1), tmp_path / "cache"
    size = Path(f"{other.prefix}.bin").stat().st_size
    staged = opened(source, cache, shards=6)
    for number in range(len(source)):
        staged.document(number)
    held = ShardTable(staged.shards.entry).bytes_taken()
    limit = (beside_bin(source) + beside_bin(other) + size + SHARD) / 2**30
    prefix = stage_datasets({"e": other.prefix}, cache, limit)["e"]
    assert ShardTable(staged.shards.entry).bytes_taken() <= SHARD < held
    assert Path(f"{prefix}.bin").stat().st_size == size
    release()
    assert_same(opened(source, cache, shards=6), source)
    assert not Path(f"{prefix}.bin").exists()  # which nobody uses any more


def test_there_is_no_file_to_be_read_in_place_of_the_locks(make: Make, tmp_path: Path) -> None:
    staged = opened(make("d"), tmp_path / "cache")
    assert not Path(f"{staged.prefix}.bin").exists()
    with pytest.raises(InputError, match=r"data\.bin does not exist"):
        TokenDataset(staged.prefix)
    with pytest.raises(RuntimeError, match="staged by the shard"):
        _ = staged.tokens


def test_another_process_opens_the_shards_itself(make: Make, tmp_path: Path) -> None:
    source = make("d")
    staged = opened(source, tmp_path / "cache")
    assert_same(pickle.loads(pickle.dumps(staged)), source)


def test_ranges_are_read_in_place_without_keeping_their_shards(make: Make, tmp_path: Path) -> None:
    source = make("d")
    staged = opened(source, tmp_path / "cache")
    data = Path(f"{source.prefix}.bin").read_bytes()
    assert staged.read_bin(100, 3 * SHARD) == data[100 : 100 + 3 * SHARD]
    assert set(states(staged.shards)) == {ABSENT}
    staged.document(0)
    assert staged.read_bin(8, 100) == data[8:108]
    assert staged.read_bin(len(data) - 10, 100) == source.read_bin(len(data) - 10, 100) == data[-10:]


def test_a_url_is_read_by_ranges(make: Make, tmp_path: Path) -> None:
    source = make("d")
    staged = opened(source, tmp_path / "cache", prefix=f"file://{source.prefix}")
    assert_same(staged, source)
    assert staged.read_bin(SHARD, 10) == source.read_bin(SHARD, 10)


def test_shards_of_large_datasets_are_larger() -> None:
    sizes = [1, 1 << 40, (1 << 40) + 1, 5 << 40, 1 << 60]
    assert [shard_bytes_of(size) >> 20 for size in sizes] == [64, 64, 128, 512, 1024]


# ---- several processes

READER = """
import sys
import numpy as np
from pathlib import Path
from megatron_speech.data.dataset.indexed import TokenDataset
from megatron_speech.data.dataset.sharded import ShardedTokenDataset
from megatron_speech.data.dataset.staging import stage_shards
prefix, cache, limit, shard, seed, reads = sys.argv[1:7]
source = TokenDataset(prefix)
staged = ShardedTokenDataset(stage_shards({"d": prefix}, cache, float(limit), shard_bytes=int(shard))["d"])
random = np.random.default_rng(int(seed))
wrong = 0
for number in random.integers(0, len(source), int(reads)).tolist():
    wrong += not np.array_equal(staged.document(number), source.document(number))
statistics = staged.shards.statistics
print(wrong, statistics.fetched)
"""


def reader(source: TokenDataset, cache: Path, shards: float, seed: int, reads: int) -> subprocess.Popen[str]:
    arguments = [source.prefix, str(cache), str(gib_of(shards, source)), str(SHARD), str(seed), str(reads)]
    return subprocess.Popen(
        [sys.executable, "-c", READER, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def counts_of(readers: list[subprocess.Popen[str]]) -> np.ndarray:
    """What readers that all ended well have printed: int [readers, 2], wrong reads and shards fetched."""
    said = [one.communicate() for one in readers]
    assert all(one.returncode == 0 for one in readers), said
    return np.array([[int(word) for word in output.split()] for output, _ in said])


@pytest.mark.slow
def test_processes_that_fetch_and_evict_at_once_never_read_a_hole(make: Make, tmp_path: Path) -> None:
    source = make("d")
    readers = [reader(source, tmp_path / "cache", 3.5, seed, 250) for seed in range(4)]
    counts = counts_of(readers)
    assert counts[:, 0].tolist() == [0, 0, 0, 0]
    assert counts[:, 1].sum() > 60  # they did take it from under one another


@pytest.mark.slow
def test_of_two_processes_one_fetches_a_shard(make: Make, tmp_path: Path) -> None:
    source = make("d")
    readers = [reader(source, tmp_path / "cache", 20, seed, 300) for seed in range(2)]
    counts = counts_of(readers)
    store = opened(source, tmp_path / "cache", shards=20).shards
    assert counts[:, 1].sum() == states(store).count(WHOLE) == len(store.bounds) - 1


def test_who_waited_for_a_fetch_goes_on_when_it_has_ended_though_the_shard_is_held(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make("d")
    # Of one process, but each with files, and so with locks, of its own.
    one, two = (opened(source, tmp_path / "cache").shards for _ in range(2))
    fetching, go_on = threading.Event(), threading.Event()

    def held_up(store: ShardStore, shard: int, at: int) -> None:
        fetching.set()
        assert go_on.wait(60)

    monkeypatch.setattr(shard_store, "_fetched", held_up)
    first = threading.Thread(target=one.pin, args=[0], daemon=True)
    first.start()
    assert fetching.wait(60)
    assert not two.try_pin(0)  # who looks ahead does not wait
    obtain, waiting = two._obtain, threading.Event()
    monkeypatch.setattr(two, "_obtain", lambda *shard, **wait: (waiting.set(), obtain(*shard, **wait))[1])
    second = threading.Thread(target=two.pin, args=[0], daemon=True)
    second.start()
    assert waiting.wait(60)  # it has found the shard not there
    go_on.set()
    first.join(60)
    second.join(60)
    assert not first.is_alive() and not second.is_alive()
    assert (one._pins, two._pins) == ({0: 1}, {0: 1})
    assert (one.statistics.fetched, two.statistics.fetched) == (1, 0)


KILLED = """
import os, signal, sys
from megatron_speech.data.dataset import shard_store, shard_table
from megatron_speech.data.dataset.staging import stage_shards
prefix, cache, limit, shard, where = sys.argv[1:6]
shard_store._CHUNK = 1000
store = stage_shards({"d": prefix}, cache, float(limit), shard_bytes=int(shard))["d"]
def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)
if where == "fetch":
    shard_store._fetched = lambda store, shard, at: kill() if at > store.bounds[shard] + 5000 else None
    store.pin(1)
store.pin(1)
store.unpin(1)
if where == "punched":
    punch = shard_table.punch
    shard_table.punch = lambda *arguments: (punch(*arguments), kill())
else:
    shard_table.punch = kill
shard_table.free_shard(store.entry, 1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["fetch", "punch", "punched"])
def test_a_shard_that_was_being_fetched_or_freed_by_a_killed_process_is_fetched_again(
    make: Make, tmp_path: Path, where: str
) -> None:
    source, cache = make("d"), tmp_path / "cache"
    arguments = [source.prefix, str(cache), str(gib_of(4, source)), str(SHARD), where]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    staged = opened(source, cache)
    assert states(staged.shards)[1] == PARTIAL
    assert_same(staged, source)


# ---- faults


def test_a_source_that_was_truncated_is_refused_naming_what_is_there(make: Make, tmp_path: Path) -> None:
    source = make("d")
    staged = opened(source, tmp_path / "cache")
    size = staged.shards.size
    os.truncate(f"{source.prefix}.bin", size - 100)
    with pytest.raises(InputError, match=r"d\.bin: of the .* bytes from .* on, .* are there: the file is shorter"):
        staged.document(len(staged) - 1)
    assert states(staged.shards)[-1] == ABSENT
    staged.document(0)  # the others are what they were
    with pytest.raises(InputError, match=r"d\.bin: of the 50 bytes from .* on, 0 are there"):
        staged.read_bin(size - 50, 50)
    release()
    with pytest.raises(InputError, match=rf"d\.bin: holds {size - 100:,} bytes, needed {size:,} by its manifest"):
        opened(source, tmp_path / "other")


def test_a_source_that_is_gone_is_refused(make: Make, tmp_path: Path) -> None:
    source = make("d")
    staged = opened(source, tmp_path / "cache")
    Path(f"{source.prefix}.bin").unlink()
    with pytest.raises(InputError, match=r"d\.bin cannot be read .*; try again when it can"):
        staged.document(0)
    with pytest.raises(InputError, match=r"d\.bin cannot be read .*; restore it, or recreate the dataset"):
        opened(source, tmp_path / "other")


def test_a_source_that_changed_under_a_run_is_refused_when_a_shard_comes_again(make: Make, tmp_path: Path) -> None:
    source = make("d")
    staged = opened(source, tmp_path / "cache", shards=3)
    before = staged.document(0)
    with open(f"{source.prefix}.bin", "r+b") as handle:
        handle.write(b"\x07\x00\x07\x00")
    np.testing.assert_array_equal(staged.document(0), before)
    for number in range(20, 50):
        staged.document(number)
    assert states(staged.shards)[0] == ABSENT
    with pytest.raises(InputError, match=r"d\.bin: bytes 0 to .* have SHA-256 .*, needed .*, which they had when"):
        staged.document(0)
    assert states(staged.shards)[0] == ABSENT


def test_after_a_boot_a_shard_is_read_again_before_it_is_used(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, cache = make("d"), tmp_path / "cache"
    staged = opened(source, cache)
    for shard in (0, 1):
        staged.document(first_of(staged.shards, staged, shard))
    release()
    # Lost in a crash: the first of the two was not written yet.
    with open(staged.shards.entry / SPARSE, "r+b") as handle:
        handle.seek(64)
        handle.write(bytes(512))
    monkeypatch.setattr(staging, "_boot", lambda: "another boot")
    staged = opened(source, cache)
    for shard in (0, 1):
        number = first_of(staged.shards, staged, shard)
        np.testing.assert_array_equal(staged.document(number), source.document(number))
    assert staged.shards.statistics.fetched == 1
    assert read_json(staged.shards.entry / "entry.json", "entry")["boot"] == "another boot"


@pytest.mark.parametrize("name", [TABLE, SPARSE, "data.idx"])
def test_an_entry_whose_files_are_not_what_they_were_is_made_anew(make: Make, tmp_path: Path, name: str) -> None:
    source, cache = make("d"), tmp_path / "cache"
    staged = opened(source, cache)
    staged.document(0)
    release()
    os.truncate(staged.shards.entry / name, 10)
    staged = opened(source, cache)
    assert set(states(staged.shards)) == {ABSENT}
    assert_same(staged, source)


def test_a_disk_that_fills_up_in_a_fetch_is_refused_and_the_shard_freed(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make("d")
    staged = opened(source, tmp_path / "cache")
    written = 0

    def full(descriptor: int, data: Any, at: int) -> int:
        nonlocal written
        if written > 3000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = os.writev(descriptor, []) if not data else real(descriptor, data, at)
        written += done
        return done

    real = os.pwrite
    monkeypatch.setattr(shard_store, "_CHUNK", 1000)
    monkeypatch.setattr(shard_store.os, "pwrite", full)
    with pytest.raises(InputError, match=r"cannot stage .*d\.bin in .*: No space left on device; free some space"):
        staged.document(0)
    monkeypatch.undo()
    assert states(staged.shards)[0] == ABSENT and blocks(staged.shards) == 0
    assert_same(staged, source)


def test_a_file_system_that_cannot_punch_holes_is_refused(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_table, "_fallocate", lambda *_: errno.EOPNOTSUPP)
    with pytest.raises(InputError, match=r"cannot free a part of a file .*; name a folder on ext4, XFS"):
        opened(make("d"), tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache" / "datasets").iterdir() if path.is_dir() and path.name[0] != "."]


def test_a_limit_that_cannot_hold_two_shards_is_refused(make: Make, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data.cache_gib is .*, but the indices .* largest shards .*; raise it"):
        opened(make("d"), tmp_path / "cache", shards=1.9)
