"""Code of ours beside the library that does the same: CPU time in interleaved repetitions, and each guarantee tried.

python benchmarks/libraries.py checkpoint-writer  # or watchdog, tar, fsspec, prefetch; --repeats 5, --json FILE

A ratio is the library's time over ours: above 1, ours is faster. A guarantee is tried on small data, on both sides;
what is printed is what happened. The libraries are not needed by the package:

pip install webdataset torchdata nvidia-resiliency-ext==0.4.1 backports.zstd
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gzip
import hashlib
import http.server
import importlib
import importlib.metadata
import io
import itertools
import json
import os
import pickle
import re
import resource
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_speech.errors import InputError  # noqa: E402
from megatron_speech.files import write_json  # noqa: E402

PACKAGES = {
    "webdataset": "webdataset",
    "torchdata": "torchdata",
    "nvidia_resiliency_ext": "nvidia-resiliency-ext==0.4.1",
    "fsspec": "fsspec[http]",
}


def needed(module: str) -> str:
    """The version of a library that is there.

    Raises:
        InputError: it is not installed.
    """
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{module} cannot be imported ({error}); run: pip install '{PACKAGES[module]}'") from error
    return importlib.metadata.version(PACKAGES[module].partition("==")[0].partition("[")[0])


class Table:
    """What one comparison found: ratios, and guarantees as (claim, ours, the library's)."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.figures: dict[str, dict[str, float]] = {}
        self.guarantees: dict[str, dict[str, str]] = {}

    def ratio(self, what: str, ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int) -> None:
        """CPU seconds of both, one after the other, `repeats` times."""
        pairs = [(cpu_seconds(ours), cpu_seconds(theirs)) for _ in range(repeats)]
        self.pairs(what, pairs)

    def pairs(self, what: str, pairs: Sequence[tuple[float, float]]) -> None:
        """Note pairs of (ours, the library's), in seconds."""
        ratios = [theirs / max(ours, 1e-9) for ours, theirs in pairs]
        self.figures[what] = {
            "ours_seconds": statistics.median(ours for ours, _ in pairs),
            "library_seconds": statistics.median(theirs for _, theirs in pairs),
            "ratio": statistics.median(ratios),
            "least": min(ratios),
            "most": max(ratios),
        }

    def tried(self, claim: str, ours: Callable[[], str], theirs: Callable[[], str]) -> None:
        """Try a guarantee on both sides; an error is an answer too."""
        self.guarantees[claim] = {"ours": outcome(ours), "library": outcome(theirs)}

    def print(self) -> None:
        """Both tables."""
        print(f"{self.title}\n")
        for what, figure in self.figures.items():
            print(
                f"{what}: library / ours {figure['ratio']:.2f} [{figure['least']:.2f} .. {figure['most']:.2f}], "
                f"ours {figure['ours_seconds'] * 1e3:.4g} ms, library {figure['library_seconds'] * 1e3:.4g} ms"
            )
        for claim, sides in self.guarantees.items():
            print(f"\n{claim}\n    ours     {sides['ours']}\n    library  {sides['library']}")


def cpu_seconds(work: Callable[[], Any]) -> float:
    """CPU time of this process and of the children that have ended."""

    def so_far() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + children.ru_utime + children.ru_stime

    before = so_far()
    work()
    return so_far() - before


def wall_seconds(work: Callable[[], Any]) -> float:
    """Elapsed time."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def outcome(trial: Callable[[], str]) -> str:
    """What a trial says; an error in one line."""
    try:
        return trial()
    except Exception as error:  # any library's: which one it is, is the answer
        text = re.sub(r"/\S*/megatron-speech-libraries-[^/]*/", "", str(error))
        return f"{type(error).__name__}: {text.splitlines()[0][:160] if text else ''}"


def read_by(work: Callable[[], Any]) -> int:
    """Bytes that this process reads from files meanwhile."""

    def so_far() -> int:
        return int(Path("/proc/self/io").read_text(encoding="ascii").split()[1])

    before = so_far()
    work()
    return so_far() - before


def peak_of(work: Callable[[], Any]) -> str:
    """The most memory that Python's objects took meanwhile."""
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return f"{peak / 2**20:.1f} MiB"


def drain(items: Iterable[Any]) -> int:
    """How many items there are."""
    return sum(1 for _ in items)


def child(name: str, *arguments: str) -> subprocess.Popen[str]:
    """A trial in a process of its own (see `CHILDREN`)."""
    return subprocess.Popen(
        [sys.executable, __file__, "child", name, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def left_after_kill(name: str, *arguments: str) -> str:
    """Start a trial, wait for the line `ready`, SIGKILL it: which of its processes are there ten seconds later."""
    process = child(name, *arguments)
    assert process.stdout is not None and process.stderr is not None
    if process.stdout.readline().strip() != "ready":
        return f"did not start: {process.stderr.read().strip().splitlines()[-1]}"
    below = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(below, timeout=10)
    for one in alive:
        one.kill()
    return f"{len(below)} processes beside it, {len(alive)} of them left 10 s after SIGKILL"


# ---- tar


def write_archive(path: Path, samples: int, extra: Sequence[tuple[tarfile.TarInfo, bytes]] = ()) -> None:
    """An archive of samples KEY.npy and KEY.json, then the members `extra`."""
    generator = np.random.default_rng(0)
    with tarfile.open(path, "w") as archive:

        def add(info: tarfile.TarInfo, data: bytes) -> None:
            info.size = len(data) if info.isreg() else 0
            archive.addfile(info, io.BytesIO(data))

        for i in range(samples):
            codes = io.BytesIO()
            np.save(codes, generator.integers(0, 1024, 250, dtype=np.int32))
            add(tarfile.TarInfo(f"s{i:05d}.npy"), codes.getvalue())
            add(tarfile.TarInfo(f"s{i:05d}.json"), json.dumps({"transcript": f"sentence {i}"}).encode())
        for info, data in extra:
            add(info, data)


def tar(folder: Path, repeats: int) -> Table:
    """preprocess/readers/tar.py and webdataset.py, and `webdataset`."""
    version = needed("webdataset")
    import webdataset

    from megatron_speech.preprocess.readers import source
    from megatron_speech.preprocess.readers.webdataset import TarReader, TarStreamReader

    table = Table(f"tar: webdataset {version}, Python {sys.version.split()[0]}")
    path = folder / "a.tar"
    write_archive(path, 5000)
    data = path.read_bytes()

    def ours(path: Path, start: int = 0) -> Iterator[dict[str, Any]]:
        reader = TarReader(str(path)) if path.suffix == ".tar" else TarStreamReader(str(path))
        for batch in reader.batches(start):
            for row in batch.read():
                if row.rejected is not None:
                    raise row.rejected
                yield row.fields

    def theirs(path: Path | str) -> Iterator[dict[str, Any]]:
        yield from webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False).decode()

    def same() -> str:
        for one, other in itertools.zip_longest(ours(path), theirs(path)):
            if not np.array_equal(one["codes"], other["npy"]) or one["transcript"] != other["json"]["transcript"]:
                return "no"
        return "yes"

    table.ratio("5,000 samples of codes and json", lambda: drain(ours(path)), lambda: drain(theirs(path)), repeats)
    table.tried("the same rows in the same order", same, same)

    def sides(path: Path) -> tuple[Callable[[], str], Callable[[], str]]:
        return (lambda: f"no error, {drain(ours(path))} rows"), (lambda: f"no error, {drain(theirs(path))} rows")

    cut = folder / "cut.tar"
    with tarfile.open(path) as archive:
        at = archive.getmembers()[6000]
    cut.write_bytes(data[: at.offset_data + 100])
    table.tried("cut at 60 %, inside a member: an error", *sides(cut))
    between = folder / "between.tar"
    between.write_bytes(data[: at.offset])
    table.tried("cut at 60 %, between two members: an error", *sides(between))
    flipped = folder / "flipped.tar"
    flipped.write_bytes(data[: at.offset + 5] + b"?" + data[at.offset + 6 :])
    table.tried("a header with a wrong checksum: an error", *sides(flipped))
    with contextlib.ExitStack() as stack:
        import zstandard

        packed = folder / "a.tar.zst"
        stack.enter_context(open(packed, "wb")).write(zstandard.compress(data))
    table.tried(".tar.zst is read", *sides(packed))

    def resumed() -> str:
        reader = TarReader(str(path))
        rows = reader.rows
        again = read_by(lambda: [batch.read() for batch in reader.batches(rows - 100)])
        return f"{again / len(data):.0%} of the archive read (of a headers' index made once)"

    def skipped() -> str:
        again = read_by(lambda: drain(itertools.islice(theirs(path), 4900, None)))
        return f"{again / len(data):.0%} of the archive read (no position to begin at; by stepping over)"

    table.tried("the last 100 of 5,000 rows again, without what lies before", resumed, skipped)
    big = folder / "big.tar"
    write_archive(big, 10, [(tarfile.TarInfo("s00009.wav"), bytes(128 << 20))])
    table.tried(
        "peak memory, a member of 128 MiB that nobody asked for",
        lambda: peak_of(lambda: drain(ours(big))),
        lambda: peak_of(lambda: drain(webdataset.WebDataset(str(big), shardshuffle=False, empty_check=False))),
    )
    link = tarfile.TarInfo("s99999.npy")
    link.type, link.linkname = tarfile.SYMTYPE, "s00000.npy"
    linked = folder / "linked.tar"
    write_archive(linked, 10, [(link, b""), (tarfile.TarInfo("s99999.json"), b"{}")])
    table.tried("codes that are a link: the sample is rejected by name", *sides(linked))
    again = folder / "again.tar"
    write_archive(again, 10, [(tarfile.TarInfo("s00003.txt"), b"again")])
    table.tried("a key that comes again later: rejected by name", *sides(again))
    for i in (0, 2):
        write_archive(folder / f"shard-{i:03d}.tar", 10)
    pattern = f"{folder}/shard-{{000..002}}.tar"

    def before_reading() -> str:
        seen = 0
        try:
            for _ in theirs(pattern):
                seen += 1
        except FileNotFoundError:
            return f"an error after {seen} rows"
        return "no error"

    table.tried("a shard missing from shard-{000..002}.tar: named before anything is read",
                lambda: str(source.expand(pattern)), before_reading)  # fmt: skip
    return table


# ---- fsspec


def fsspec_sides(folder: Path, repeats: int) -> Table:
    """preprocess/readers/compression.py and source.py, data/dataset/staging.py, and `fsspec`."""
    version = needed("fsspec")
    import fsspec
    import fsspec.compression
    import zstandard

    from megatron_speech.preprocess.readers import source

    back_end = "backports.zstd" if "backports" in fsspec.compression.compr["zstd"].__module__ else "zstandard"
    table = Table(f"fsspec {version}, its zstd by {back_end}, zlib of Python {sys.version.split()[0]}")
    rows = b"".join(
        b'{"sample_id": "utterance-%d", "transcript": "so many words %d"}\n' % (i, i * i) for i in range(100_000)
    )

    def zst(data: bytes, long: bool = False) -> bytes:
        parameters = zstandard.ZstdCompressionParameters(window_log=31 if long else 20, write_content_size=not long)
        packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # which does not know the size
        return packer.compress(data) + packer.flush()

    def ours(path: Path) -> Iterator[bytes]:
        with source.open_binary(str(path)) as handle:
            while chunk := handle.read(1 << 20):
                yield chunk

    def theirs(path: Path) -> Iterator[bytes]:
        with fsspec.open(str(path), "rb", compression="infer") as handle:
            while chunk := handle.read(1 << 20):
                yield chunk

    def all_of(read: Callable[[Path], Iterator[bytes]], path: Path, whole: bytes = rows) -> str:
        data = b"".join(read(path))
        return "yes" if data == whole else f"no error, {len(data):,} of {len(whole):,} bytes"

    for ending, pack in (("gz", gzip.compress), ("zst", zst)):
        path, packed = folder / f"a.{ending}", pack(rows)

        def tried(claim: str, data: bytes, whole: bytes = rows, ending: str = ending) -> None:
            path = folder / f"trial {len(table.guarantees)}.{ending}"
            path.write_bytes(data)
            table.tried(
                f".{ending}: {claim}",
                functools.partial(all_of, ours, path, whole),
                functools.partial(all_of, theirs, path, whole),
            )

        path.write_bytes(packed)
        table.ratio(
            f".{ending} of {len(rows) / 1e6:.0f} MB",
            functools.partial(lambda p: drain(ours(p)), path),
            functools.partial(lambda p: drain(theirs(p)), path),
            repeats,
        )
        tried("the bytes come out", packed)
        tried("two streams end to end are one", packed + packed, rows + rows)
        tried("cut at 60 %: an error", packed[: int(len(packed) * 0.6)])
        tried("an empty file: an error", b"", b"?")
        tried("something else after the stream: an error", packed + b"garbage that is no stream")
        if ending == "gz":
            tried("zeros after the stream are padding", packed + bytes(1000))
        else:
            tried("a window of 2 GiB (--long=31) is read", zst(rows, long=True))
        bomb = folder / f"bomb.{ending}"
        bomb.write_bytes(pack(bytes(256 << 20)))
        table.tried(
            f".{ending}: peak memory, 256 MiB of zeros read 1 MiB at a time",
            functools.partial(peak_of, functools.partial(lambda p: drain(ours(p)), bomb)),
            functools.partial(peak_of, functools.partial(lambda p: drain(theirs(p)), bomb)),
        )
    _fsspec_names(folder, table)
    return table


def _fsspec_names(folder: Path, table: Table) -> None:
    """Ranges of files, versions of files, copies that break off."""
    import fsspec
    from fsspec.generic import rsync

    from megatron_speech.preprocess.readers import source

    for i in range(3):
        (folder / f"r-{i:03d}.tar").write_bytes(b"x")
    pattern, missing = f"{folder}/r-{{000..002}}.tar", f"{folder}/r-{{000..004}}.tar"
    table.tried(
        "r-{000..002}.tar names three files",
        lambda: f"{len(source.expand(pattern))} files",
        lambda: f"{[Path(file.path).name for file in fsspec.open_files(pattern)]}",
    )
    table.tried(
        "files missing from r-{000..004}.tar are named",
        lambda: f"{len(source.expand(missing))} files",
        lambda: f"{[Path(file.path).name for file in fsspec.open_files(missing)]}",
    )

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Nothing."""

    web = folder / "web"
    web.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(web)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/a.txt"

    def told_apart(version: Callable[[str], Any]) -> str:
        (web / "a.txt").write_bytes(b"one")
        before = version(url)
        (web / "a.txt").write_bytes(b"three")
        return "yes" if version(url) != before else "no"

    table.tried(
        "a file behind http that has changed is told from the old one (fingerprint, fs.ukey)",
        lambda: told_apart(source.fingerprint),
        lambda: told_apart(lambda url: fsspec.filesystem("http").ukey(url)),
    )
    server.shutdown()
    server.server_close()

    def changed() -> str:
        source_folder, target = folder / "from", folder / "to"
        source_folder.mkdir()
        (source_folder / "a.bin").write_bytes(b"a" * 1000)
        rsync(f"file://{source_folder}", f"file://{target}")
        status = (target / "a.bin").stat()
        (target / "a.bin").write_bytes(b"b" * 1000)
        os.utime(target / "a.bin", ns=(status.st_atime_ns, status.st_mtime_ns))
        rsync(f"file://{source_folder}", f"file://{target}")
        return "copied again" if (target / "a.bin").read_bytes() == b"a" * 1000 else "not noticed (size and time are)"

    staged = _staged(folder)
    table.tried("a copy with other bytes, size and time the same: noticed by its hash after a boot", staged, changed)

    def broken() -> str:
        memory = fsspec.filesystem("memory")
        memory.pipe("/slow/a.bin", bytes(32 << 20))
        handle_type = type(memory.open("/slow/a.bin"))
        read, target = handle_type.read, folder / "a.bin"

        def breaks_off(self: Any, *arguments: Any) -> bytes:
            if self.tell() >= 20 << 20:
                raise ConnectionError("broke off")
            return read(self, *arguments)

        handle_type.read = breaks_off
        try:
            memory.get_file("/slow/a.bin", str(target))
        except ConnectionError:
            size = target.stat().st_size if target.exists() else 0
        finally:
            handle_type.read = read
        at = f"{size >> 20} of 32 MiB under the file's own name" if size else "nothing"
        return f"left behind: {at}; get_file begins at 0 again"

    tested = "yes (tests/data/test_staging.py, by SIGKILL)"
    table.tried("a copy that breaks off is hidden, and continued", lambda: tested, broken)


def _staged(folder: Path) -> Callable[[], str]:
    def trial() -> str:
        sys.path.insert(0, str(ROOT / "tests" / "training"))
        from toy_runs import make_toy_datasets

        from megatron_speech.data.dataset import staging

        (folder / "toy").mkdir()
        toy, boot = make_toy_datasets(folder / "toy"), staging._boot
        copy = Path(staging.stage_datasets({"text": str(toy / "text")}, folder / "cache", None)["text"] + ".bin")
        status, right = copy.stat(), copy.read_bytes()
        staging.release()
        copy.write_bytes(bytes(len(right)))
        os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
        staging._boot = lambda: "another boot"  # as after a crash, which is when disks lose what was written
        try:
            staging.stage_datasets({"text": str(toy / "text")}, folder / "cache", None)
        finally:
            staging._boot = boot
            staging.release()
        return "copied again" if copy.read_bytes() == right else "not noticed"

    return trial


# ---- prefetch


def _hash(_: object, number: int) -> str:
    return hashlib.sha256(number.to_bytes(8, "little") * 8192).hexdigest()


def _hash_alone(number: int) -> str:
    return _hash(None, number)


def _fail_at_six(number: int) -> int:
    if number == 6:
        raise InputError("file a.bin, row 6: found 7, needed 6; restore it")
    return number


def prefetch(folder: Path, repeats: int) -> Table:
    """StageLoader of data/loading/loader.py and preprocess/pool.py, and `torchdata.nodes`."""
    version = needed("torchdata")
    from torchdata.nodes import BaseNode, IterableWrapper, ParallelMapper, Prefetcher

    from megatron_speech.data.loading.loader import StageLoader
    from megatron_speech.preprocess.pool import map_ordered

    table = Table(f"prefetch: torchdata {version}, Python {sys.version.split()[0]}")

    def counted(made: list[int], count: int) -> Iterator[Any]:
        for number in range(count):
            made.append(number)
            yield number

    def nodes(items: Iterable[Any]) -> Any:
        node = Prefetcher(IterableWrapper(items), prefetch_factor=4)
        node.reset()
        return node

    def stage(items: Iterable[Any]) -> Any:
        return StageLoader(lambda: iter(items), 4)

    table.ratio("20,000 small items by one thread ahead", lambda: drain(stage(range(20_000))),
                lambda: drain(nodes(range(20_000))), repeats)  # fmt: skip

    def ours() -> list[str]:
        return list(map_ordered(_hash, range(3000), workers=2, make_state=int))

    def theirs() -> list[str]:
        node = ParallelMapper(
            IterableWrapper(range(3000)), _hash_alone, num_workers=2, method="process", multiprocessing_context="spawn"
        )
        node.reset()
        return list(node)

    # By the wall: the library does not wait for its processes, so that their CPU time is not known here.
    walls = [(wall_seconds(ours), wall_seconds(theirs)) for _ in range(repeats)]
    table.pairs("3,000 hashes of 64 KiB by two processes, their start included (wall)", walls)
    alone = [_hash_alone(number) for number in range(3000)]
    table.tried("two processes, results in order", lambda: "yes" if ours() == alone else "no",
                lambda: "yes" if theirs() == alone else "no")  # fmt: skip

    def error(make: Callable[[Iterable[Any]], Any]) -> str:
        seen = []
        try:
            for item in make(map(_fail_at_six, range(10))):
                seen.append(item)
        except Exception as error:  # of which type, is the question
            return (
                f"after {len(seen)} items {type(error).__name__} of {str(error).count(chr(10)) + 1} lines: "
                + str(error).splitlines()[0]
            )
        return "no error"

    table.tried("an error arrives after the items before it, as the sentence that it is",
                lambda: error(stage), lambda: error(nodes))  # fmt: skip

    def ahead(make: Callable[[Iterable[Any]], Any]) -> str:
        made: list[int] = []
        loader = make(counted(made, 100))
        next(loader)
        before = -1
        while before != len(made):
            before = len(made)
            time.sleep(0.3)
        return f"{len(made)} items made for 1 taken, with 4 ahead"

    table.tried("what is made ahead is bounded", lambda: ahead(stage), lambda: ahead(nodes))

    def ends(make: Callable[[Iterable[Any]], Any], close: Callable[[Any], None]) -> str:
        before = set(threading.enumerate())
        loader = make(counted([], 100))
        next(loader)
        close(loader)
        left = [thread for thread in threading.enumerate() if thread not in before and thread.is_alive()]
        del loader
        for thread in left:
            thread.join(5)
        still = sum(thread.is_alive() for thread in left)
        return f"{len(left)} threads left by it, {still} once the loader is dropped, too"

    table.tried("leaving early by close() ends the threads", lambda: ends(stage, lambda loader: loader.close()),
                lambda: ends(nodes, lambda loader: loader.close() if hasattr(loader, "close") else None))  # fmt: skip

    def from_position() -> str:
        made: list[int] = []
        first = next(StageLoader(lambda: (made.append(i) or i for i in range(5000, 10_000)), 1))  # type: ignore[arg-type]
        return f"item {first}; 0 items before it are made; state: one integer, 8 bytes"

    class Numbers(BaseNode[int]):  # as torchdata wants a source that can begin anywhere
        def __init__(self, made: list[int]) -> None:
            super().__init__()
            self.made, self.number = made, 0

        def reset(self, initial_state: dict[str, Any] | None = None) -> None:
            super().reset(initial_state)
            self.number = initial_state["number"] if initial_state else 0

        def next(self) -> int:
            self.made.append(self.number)
            self.number += 1
            return self.number - 1

        def get_state(self) -> dict[str, Any]:
            return {"number": self.number}

    def from_state() -> str:
        node = Prefetcher(Numbers([]), prefetch_factor=4)
        node.reset()
        for _ in range(5000):
            next(node)
        state, made = node.state_dict(), []
        again = Prefetcher(Numbers(made), prefetch_factor=4)
        again.reset(state)
        first = next(again)
        before = sum(number < first for number in made)
        return f"item {first}; {before} items before it are made; state: {len(pickle.dumps(state))} bytes"

    table.tried("going on at item 5,000 without making what lies before", from_position, from_state)
    table.tried("processes of a pool after SIGKILL of the parent", lambda: left_after_kill("pool-ours"),
                lambda: left_after_kill("pool-library"))  # fmt: skip
    return table


def _slow(_: object, number: int) -> int:
    time.sleep(0.01)
    return number


def _slow_alone(number: int) -> int:
    return _slow(None, number)


def _pool_ours() -> None:
    from megatron_speech.preprocess.pool import map_ordered

    for number in map_ordered(_slow, itertools.count(), workers=2, make_state=int):
        if number == 10:
            print("ready", flush=True)


def _pool_library() -> None:
    from torchdata.nodes import IterableWrapper, ParallelMapper

    node = ParallelMapper(
        IterableWrapper(range(1 << 40)),
        _slow_alone,
        num_workers=2,
        method="process",
        multiprocessing_context="spawn",
    )
    node.reset()
    for number in node:
        if number == 10:
            print("ready", flush=True)


# ---- watchdog


def watchdog(folder: Path, repeats: int) -> Table:
    """training/health/watchdog.py and training/telemetry/timing.py, and `nvidia-resiliency-ext`."""
    version = needed("nvidia_resiliency_ext")
    table = Table(f"watchdog: nvidia-resiliency-ext {version}, Python {sys.version.split()[0]}, no GPU")

    def once(name: str) -> float:
        process = child(name)
        out, err = process.communicate(timeout=120)
        if process.returncode:
            raise InputError(f"{name} failed: {err.strip().splitlines()[-1]}")
        return float(out.split()[-1])

    for what, name in (("import, after torch (CPU)", "import"), ("a heartbeat (CPU)", "beat")):
        table.pairs(what, [(once(f"{name}-ours"), once(f"{name}-library")) for _ in range(repeats)])

    def hang(name: str) -> str:
        out, err = folder / f"{name}.out", folder / f"{name}.err"
        with open(out, "w") as to_out, open(err, "w") as to_err:  # not pipes: what is left behind would keep them open
            process = subprocess.Popen(
                [sys.executable, __file__, "child", name, str(folder)], stdout=to_out, stderr=to_err
            )
            process.wait(120)
        seconds = time.monotonic() - float(out.read_text().split()[0])
        for one in psutil.process_iter(["cmdline"]):
            if str(folder) in (one.info["cmdline"] or []):
                one.kill()
        written = folder.rglob("rank_*.txt") if name == "hang-ours" else []
        stacks = any("_sleep_for_ever" in path.read_text() for path in written)
        said = [line for line in err.read_text().splitlines() if "has not ended" in line or "timeout" in line.lower()]
        how = f"ended after {seconds:.1f} s (limit 2 s), exit code {process.returncode}"
        how += ", stacks written" if stacks else ", no stacks"
        return f"{how}, said: {said[0][:150] if said else 'nothing'}"

    table.tried("a step that hangs is ended, with a sentence and the stacks", lambda: hang("hang-ours"),
                lambda: hang("hang-library"))  # fmt: skip
    table.tried("processes beside a rank, and after its SIGKILL", lambda: left_after_kill("alive-ours", str(folder)),
                lambda: left_after_kill("alive-library", str(folder)))  # fmt: skip

    def stragglers() -> str:
        from megatron_speech.training.telemetry.timing import Stragglers

        found = Stragglers.find([1.0, 1.0, 2.5, 1.0], [0, 0, 0, 0])
        return str(found.sentence(1.5, "host7"))

    def cupti() -> str:
        from nvidia_resiliency_ext.straggler.cupti import CuptiManager

        CuptiManager().initialize()
        return "started"

    table.tried("the slowest rank is named without a GPU", stragglers, cupti)
    return table


def _import_ours() -> None:
    import torch.distributed as _  # noqa: F401

    print(cpu_seconds(lambda: importlib.import_module("megatron_speech.training.health.watchdog")))


def _import_library() -> None:
    import torch.distributed as _  # noqa: F401

    print(cpu_seconds(lambda: importlib.import_module("nvidia_resiliency_ext.fault_tolerance")))


def _our_watchdog(folder: str, seconds: float) -> Any:
    from megatron_speech.recipe.watchdog import WatchdogConfig
    from megatron_speech.training.health.watchdog import Watchdog

    return Watchdog(WatchdogConfig(timeout_seconds=seconds), Path(folder) / "stacks", 0, lambda _: None)


def _library_client(folder: str, seconds: float) -> Any:
    from nvidia_resiliency_ext import fault_tolerance
    from nvidia_resiliency_ext.fault_tolerance.data import FT_RANK_MONITOR_IPC_SOCKET_ENV_VAR

    path = str(Path(folder) / f"{os.getpid()}.socket")
    os.environ.update(
        {
            FT_RANK_MONITOR_IPC_SOCKET_ENV_VAR: path,
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_WORLD_SIZE": "1",
        }
    )
    config = fault_tolerance.FaultToleranceConfig(
        workload_check_interval=0.1, rank_heartbeat_timeout=seconds, initial_rank_heartbeat_timeout=60.0
    )
    fault_tolerance.RankMonitorServer.run_in_subprocess(config, path)
    client = fault_tolerance.RankMonitorClient()
    client.init_workload_monitoring()
    client.send_heartbeat()
    return client


def _beat(beat: Callable[[], Any]) -> None:
    def many() -> None:
        for _ in range(2000):
            beat()

    print(cpu_seconds(many) / 2000, flush=True)
    for below in psutil.Process().children(recursive=True):
        below.kill()
    os._exit(0)


def _sleep_for_ever() -> None:
    print(time.monotonic(), flush=True)
    while True:
        time.sleep(1)


def _beat_ours() -> None:
    dog = _our_watchdog(tempfile.gettempdir(), 1000.0)
    _beat(lambda: dog.progress.step_ended(1))


def _beat_library() -> None:
    with tempfile.TemporaryDirectory() as folder:
        _beat(_library_client(folder, 1000.0).send_heartbeat)


def _hang_ours(folder: str) -> None:
    dog = _our_watchdog(folder, 2.0)
    dog.progress.step_ended(7)
    _sleep_for_ever()


def _hang_library(folder: str) -> None:
    client = _library_client(folder, 2.0)
    client.send_heartbeat()
    _sleep_for_ever()


def _alive_ours(folder: str) -> None:
    dog = _our_watchdog(folder, 1000.0)
    dog.progress.step_ended(7)
    print("ready", flush=True)
    signal.pause()


def _alive_library(folder: str) -> None:
    _library_client(folder, 1000.0)
    print("ready", flush=True)
    signal.pause()


# ---- checkpoint-writer


def _weights(mebibytes: int) -> dict[str, Any]:
    """Eight tensors, sharded as megatron-core has it."""
    import torch
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    torch.manual_seed(0)
    tensors = {f"w{i}": torch.randn(mebibytes * (1 << 20) // 32) for i in range(8)}
    return {name: ShardedTensor.from_rank_offsets(name, tensor) for name, tensor in tensors.items()}


class Saves:
    """One way of saving; `begin` returns what waits for the end."""

    def __init__(self, mebibytes: int) -> None:
        from megatron_speech.codecs.base import CodecDescription
        from megatron_speech.environment import prepare_imports
        from megatron_speech.tokens.space import TokenSpace

        prepare_imports()
        from megatron_speech.parallel import groups
        from megatron_speech.training.checkpoint.writing import HostBuffers, Sharing

        groups.initialize()
        self.contents = functools.partial(_weights, mebibytes)
        self.state = self.contents()
        self.space = TokenSpace.build("bytes", CodecDescription("toy", "toy-1", 8000, 25.0, ("q0",), (64,)))
        self.buffers, self.sharing = HostBuffers(), Sharing()

    def ours(self, path: Path) -> Callable[[], Any]:
        """plan_save here, write_save in a thread."""
        from megatron_speech.training.checkpoint.writing import plan_save, write_save

        planned = plan_save(dict(self.state), self.sharing, self.buffers)
        write = functools.partial(
            write_save, planned, path, described={"step": 1}, space=self.space, recipe=None, group=None
        )
        thread = threading.Thread(target=write)
        thread.start()
        return thread.join

    def megatron(self, path: Path) -> Callable[[], Any]:
        """megatron-core's writer, by processes."""
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

        path.mkdir(parents=True)
        request = dist_checkpointing.save(dict(self.state), str(path), async_sharded_save=True)
        queue = AsyncCallsQueue()
        queue.schedule_async_request(request)
        return functools.partial(queue.maybe_finalize_async_calls, blocking=True)

    def torch(self, path: Path) -> Callable[[], Any]:
        """torch.distributed.checkpoint.async_save, by a thread, of plain tensors."""
        from torch.distributed import checkpoint

        state = {name: sharded.data for name, sharded in self.state.items()}
        return checkpoint.async_save(state, checkpoint_id=str(path)).result


def checkpoint_writer(folder: Path, repeats: int) -> Table:
    """training/checkpoint/writing.py, and the writers of megatron-core and torch."""
    import torch

    megatron = importlib.metadata.version("megatron-core")
    saves = Saves(64)
    table = Table(f"checkpoint-writer: megatron-core {megatron}, torch {torch.__version__}; 64 MiB, one rank, no GPU")
    numbers = itertools.count()

    def timed(save: Callable[[Path], Callable[[], Any]]) -> tuple[float, float]:
        path = folder / f"step_{next(numbers):08d}"
        began = time.perf_counter()
        wait = save(path)
        waited = time.perf_counter() - began
        wait()
        return waited, time.perf_counter() - began

    for save in (saves.ours, saves.megatron, saves.torch):
        timed(save)
    rounds = [(timed(saves.ours), timed(saves.megatron), timed(saves.torch)) for _ in range(repeats)]
    for at, what in enumerate(("the training waits", "until it is complete")):
        table.pairs(f"{what} (wall), megatron-core's", [(one[0][at], one[1][at]) for one in rounds])
        table.pairs(f"{what} (wall), torch's async_save", [(one[0][at], one[2][at]) for one in rounds])

    def loads(save: Callable[[Path], Callable[[], Any]], name: str) -> str:
        from megatron.core import dist_checkpointing

        path = folder / name
        save(path)()
        loaded = dist_checkpointing.load(saves.contents(), str(path))
        same = all(torch.equal(loaded[key], sharded.data) for key, sharded in saves.state.items())
        return f"{'yes' if same else 'no'}, files {sorted(p.name for p in path.iterdir())}"

    table.tried("megatron-core loads it (library: megatron-core's own)", lambda: loads(saves.ours, "step_90000001"),
                lambda: loads(saves.megatron, "step_90000002"))  # fmt: skip

    def visible(save: Callable[[Path], Callable[[], Any]], name: str) -> str:
        path = folder / name
        watcher = child("look", str(path), str(os.getpid()))
        assert watcher.stdout is not None
        watcher.stdout.readline()
        save(path)()
        out, _ = watcher.communicate("")
        seen, started = json.loads(out)
        return f"{started} processes; under the checkpoint's name before it is whole: {seen or 'nothing'}"

    for number, (name, save) in enumerate({"megatron-core": saves.megatron, "torch": saves.torch}.items()):
        table.tried(
            f"hidden until it is whole, no process started ({name})",
            functools.partial(visible, saves.ours, f"step_9100000{number}"),
            functools.partial(visible, save, f"step_9200000{number}"),
        )

    def hashed(name: str) -> str:
        described = folder / name / "checkpoint.json"
        return "yes" if described.is_file() and "sha256" in described.read_text() else "no"

    table.tried(
        "SHA-256 of every file stands beside it", lambda: hashed("step_90000001"), lambda: hashed("step_90000002")
    )
    table.tried(
        "processes after SIGKILL in a save (megatron-core)",
        lambda: left_after_kill("save-ours", str(folder / "killed")),
        lambda: left_after_kill("save-library", str(folder / "killed")),
    )
    return table


def _look(path: str, pid: str) -> None:
    """Until stdin ends: files of a checkpoint that is not whole, and processes that another one starts."""
    parent, ended = psutil.Process(int(pid)), threading.Event()
    before = {*parent.children(recursive=True), psutil.Process()}
    seen: set[str] = set()
    started: set[psutil.Process] = set()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set())).start()
    print("ready", flush=True)
    while not ended.is_set():
        names = {one.name for one in Path(path).iterdir()} if os.path.exists(path) else set()
        if ".metadata" not in names:
            seen |= names
        started |= set(parent.children(recursive=True)) - before
    print(json.dumps([sorted(seen), len(started)]))


def _save(name: str, folder: str) -> None:
    saves = Saves(256)
    wait = getattr(saves, name)(Path(folder) / name / "step_00000001")
    print("ready", flush=True)
    wait()
    signal.pause()


# ---- command line

COMPARISONS: dict[str, Callable[[Path, int], Table]] = {
    "checkpoint-writer": checkpoint_writer,
    "watchdog": watchdog,
    "tar": tar,
    "fsspec": fsspec_sides,
    "prefetch": prefetch,
}
CHILDREN: dict[str, Callable[..., None]] = {
    "pool-ours": _pool_ours,
    "pool-library": _pool_library,
    "import-ours": _import_ours,
    "import-library": _import_library,
    "beat-ours": _beat_ours,
    "beat-library": _beat_library,
    "hang-ours": _hang_ours,
    "hang-library": _hang_library,
    "alive-ours": _alive_ours,
    "alive-library": _alive_library,
    "look": _look,
    "save-ours": functools.partial(_save, "ours"),
    "save-library": functools.partial(_save, "megatron"),
}


def main() -> int:
    """Run one comparison, or a trial of one in this process."""
    if sys.argv[1:2] == ["child"]:
        CHILDREN[sys.argv[2]](*sys.argv[3:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", choices=list(COMPARISONS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="megatron-speech-libraries-") as folder:
            table = COMPARISONS[arguments.comparison](Path(folder), arguments.repeats)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    table.print()
    if arguments.json is not None:
        write_json(arguments.json, {"title": table.title, "figures": table.figures, "guarantees": table.guarantees})
    return 0


if __name__ == "__main__":
    sys.exit(main())
