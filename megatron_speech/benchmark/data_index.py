"""`megatron-speech benchmark data-index`: the sequence index at scale, from files to the first batch.

    datasets on disk (.idx, .docs.parquet, manifest; .bin is sparse: nothing of it is read)
      ─ a fresh process builds the index ─► wall and CPU seconds, peak memory, bytes
      ─ another fresh process opens it   ─► seconds to open, seconds to the first batch at random positions
      ─ the finished table is counted    ─► tokens of every stratum at 1 %, 10 %, 100 % of the stage, against its target

Every dataset is one stratum of its own language and source; tasks are speech_lm (60 % of the mass), tts (30 %) and
text_lm (10 %); languages are levelled with temperature 0.7, so that some strata are repeated and some are not used
up. Lengths are log-normal. Files are dropped from the page cache before they are read.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_speech.benchmark.measure import module_environment, run_measured, script
from megatron_speech.errors import InputError
from megatron_speech.files import write_json

TASK_MASS = {"speech_lm": 0.6, "tts": 0.3, "text_lm": 0.1}
_TASKS = (*["speech_lm"] * 6, *["tts"] * 3, "text_lm")
SPREAD = 0.7  # standard deviation of the logarithm of a length
SHORTEST, LONGEST = 8, 2048
SHARES = (0.01, 0.1, 1.0)
POSITIONS = 20
_ROWS = 1 << 19
_MIB = 1 << 20
# Bytes on disk, with room to spare: a document of a dataset (.idx 20, table 14), a segment or sequence of the index.
_DOCUMENT_BYTES, _SEGMENT_BYTES = 40, 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("--documents", type=int, default=1_000_000, help="documents in all (default: 1000000)")
    parser.add_argument("--strata", type=int, default=30, help="datasets, each one stratum; at least 10 (default: 30)")
    parser.add_argument("--tokens", type=int, help="tokens of the stage (default: 300 a document)")
    parser.add_argument("--seq-length", type=int, default=4096, help="tokens of a sequence (default: 4096)")
    parser.add_argument("--mode", choices=("cut", "fit", "bucket"), default="cut", help="packing (default: cut)")
    parser.add_argument("--open-sequences", type=int, help="look-ahead of fit and bucket (default: the recipe's)")
    parser.add_argument("--without-compiler", action="store_true", help="build on the NumPy and Python references")
    parser.add_argument("--seed", type=int, default=0, help="of lengths and hashes (default: 0)")
    parser.add_argument("--folder", type=Path, help="where the files go for as long as it takes (default: TMPDIR)")
    parser.add_argument("--json", metavar="F", help="write the figures to this file")


def run(args: argparse.Namespace) -> int:
    """Print, and write if asked, what the index costs.

    Raises:
        InputError: a flag out of range, too little room on the disk, or a build that fails.
    """
    tokens = args.tokens or 300 * args.documents
    for name, value, least in (
        ("documents", args.documents, 10 * args.strata),
        ("strata", args.strata, 10),
        ("tokens", tokens, 100 * args.seq_length),
        ("seq-length", args.seq_length, 2 * SHORTEST),
    ):
        if value < least:
            raise InputError(f"--{name} is {value}; needed at least {least}")
    parent = args.folder or Path(tempfile.gettempdir())
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=parent, prefix="data-index-"))
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise InputError(f"cannot write to {parent}: {error.strerror or error}; name another --folder") from error
    try:
        segments = args.documents + 2 * tokens // args.seq_length
        needed = args.documents * _DOCUMENT_BYTES + segments * _SEGMENT_BYTES
        if free < needed:
            raise InputError(
                f"{parent} has {free / 2**30:.1f} GiB free, needed about {needed / 2**30:.1f}; name another --folder"
            )
        report = measure(args, folder, tokens)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print_report(report)
    if args.json:
        write_json(args.json, report)
    return 0


# ---- datasets


def sizes_of(documents: int, strata: int) -> list[int]:
    """Documents of each dataset: the k-th of a task has 1/sqrt(k + 1) of its first."""
    weights = np.array([1 / np.sqrt(k // len(_TASKS) + 1 + k % 3) for k in range(strata)])
    ends = np.rint(np.cumsum(weights / weights.sum()) * documents).astype(np.int64)
    return np.diff(ends, prepend=0).tolist()


def write_datasets(folder: Path, documents: int, strata: int, mean_tokens: float, seed: int) -> int:
    """Write datasets d00, d01, … into `folder`; returns their tokens. Deterministic."""
    from megatron_speech.tokens.space import CodecDescription, TokenSpace

    codec = CodecDescription("synthetic", "0" * 64, 16_000, 25.0, ("codes",), (4096,))
    space = TokenSpace.build("bytes", codec)
    space.save(folder / "token_space.json")
    total = 0
    for k, size in enumerate(sizes_of(documents, strata)):
        # Datasets differ in the length of their documents, half to one and a half times the mean.
        mean = mean_tokens * (0.5 + (k * 7 % strata) / (strata - 1))
        total += _write_dataset(folder / f"d{k:02d}", k, size, mean, space, seed)
    return total


def _lengths(random: np.random.Generator, count: int, mean: float) -> np.ndarray:
    values = np.exp(random.standard_normal(count, dtype=np.float32) * np.float32(SPREAD))
    values *= np.float32(mean / np.exp(SPREAD**2 / 2))
    lengths: np.ndarray = np.clip(np.rint(values), SHORTEST, LONGEST).astype(np.int32)
    return lengths


def _write_dataset(prefix: Path, number: int, documents: int, mean: float, space: Any, seed: int) -> int:
    import pyarrow as pa

    from megatron_speech.data.dataset.documents_table import SCHEMA, DocumentsTableWriter
    from megatron_speech.data.dataset.indexed import file_of
    from megatron_speech.data.dataset.indexed_writer import write_index
    from megatron_speech.data.dataset.manifest import (
        CodecEntry,
        FileEntry,
        FilterStatistics,
        Manifest,
        Totals,
        write_manifest,
    )
    from megatron_speech.data.dataset.split import splitmix64
    from megatron_speech.files import sha256_file, sha256_hex
    from megatron_speech.tokens.templates import TEMPLATE_HASH

    random = np.random.default_rng([seed, number])
    task = _TASKS[number % len(_TASKS)]
    dtype = np.dtype(space.dtype)
    lengths = _lengths(random, documents, mean)
    table = DocumentsTableWriter(file_of(prefix, ".docs.parquet"))
    for first in range(0, documents, _ROWS):
        part = lengths[first : first + _ROWS]
        rows = len(part)
        same = {"language": f"l{number:02d}", "dataset_source": f"corpus-{number:02d}", "task": task}
        hashes = splitmix64(np.arange(first, first + rows, dtype=np.uint64) + np.uint64(number << 40))
        values: dict[str, Any] = {
            name: pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([value])).cast(
                pa.string()
            )
            for name, value in same.items()
        }
        values["tokens"] = pa.array(part)
        values["target_tokens"] = pa.array(part * 3 // 4)
        values["duration_seconds"] = pa.array(part / 25.0 if task != "text_lm" else np.zeros(rows))
        values["split_hash"] = pa.array(hashes)
        columns = [values[field.name] if field.name in values else pa.nulls(rows, field.type) for field in SCHEMA]
        table.add(pa.record_batch(columns, schema=SCHEMA))
    table.close()
    with open(file_of(prefix, ".idx"), "wb") as handle:
        write_index(handle.write, dtype, lengths)
    tokens = int(lengths.sum(dtype=np.int64))
    with open(file_of(prefix, ".bin"), "wb") as handle:
        handle.truncate(tokens * dtype.itemsize)
    files = {
        suffix: FileEntry(bytes=file_of(prefix, suffix).stat().st_size, sha256=sha256_file(file_of(prefix, suffix)))
        for suffix in (".idx", ".docs.parquet")
    }
    # Gigabytes of nothing: no one reads them, so their hash is a name.
    files[".bin"] = FileEntry(bytes=tokens * dtype.itemsize, sha256=sha256_hex(f"{tokens} zeros".encode()))
    write_manifest(
        file_of(prefix, ".manifest.json"),
        Manifest(
            task=task,
            dtype=dtype.name,
            documents=documents,
            tokens=tokens,
            token_space_hash=space.hash,
            template_hash=TEMPLATE_HASH,
            codec=CodecEntry(name=space.codec.name, hash=space.codec.hash, frame_rate_hz=25.0, codebooks=1),
            tokenizer_version="1",
            normalization_version="1",
            split_seed=0,
            seed=seed,
            totals=Totals(documents=documents, tokens=tokens),
            languages={},
            sources={},
            filters=FilterStatistics(),
            inputs=[],
            files=files,
        ),
    )
    return tokens


def _drop_from_cache(folder: Path) -> None:
    """Have the next reader of the folder's files read the disk (where the system lets us)."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


# ---- the children


def _status(*fields: str) -> list[int]:
    """Fields of /proc/self/status, bytes; 0 where there are none."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return [0] * len(fields)
    found = dict(line.split(":", 1) for line in text.splitlines())
    return [int(found[name].split()[0]) * 1024 if name in found else 0 for name in fields]


@contextlib.contextmanager
def _watched() -> Iterator[dict[str, int]]:
    """Peaks of anonymous and of mapped memory, sampled 20 times a second, and the kernel's own peak of their sum."""
    peaks = {"anonymous": 0, "mapped": 0, "resident": 0}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            anonymous, mapped = _status("RssAnon", "RssFile")
            peaks["anonymous"] = max(peaks["anonymous"], anonymous)
            peaks["mapped"] = max(peaks["mapped"], mapped)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        done.set()
        thread.join()
        (peaks["resident"],) = _status("VmHWM")


def _stage_of(folder: Path) -> tuple[Any, dict[str, float]]:
    """The stage's data, from nothing; and what opening took."""
    begin = time.perf_counter()
    from megatron_speech.data.stage import StageData, open_datasets
    from megatron_speech.recipe.data import DataConfig
    from megatron_speech.recipe.stage import StageDataConfig
    from megatron_speech.tokens.space import TokenSpace

    imported = time.perf_counter()
    recipe = json.loads((folder / "recipe.json").read_text())
    data, stage = DataConfig(**recipe["data"]), StageDataConfig(**recipe["stage"])
    space = TokenSpace.load(folder / "token_space.json")
    datasets = open_datasets(data, space, folder)
    opened = time.perf_counter()
    result = StageData(stage, data, datasets, space, seed=recipe["seed"], cache_dir=folder / "cache")
    done = time.perf_counter()
    return result, {"import": imported - begin, "datasets": opened - imported, "index": done - opened}


def _build(folder: Path) -> dict[str, Any]:
    with _watched() as peaks:
        stage, seconds = _stage_of(folder)
    report = stage.blend_report()
    return {
        "seconds": seconds,
        "peak_bytes": peaks,
        "key": stage.key,
        "n_sequences": stage.n_sequences,
        "segments": len(stage.table.length),
        "tokens": report["tokens"],
        "pad_fraction": report["pad_fraction"],
        "strata": [
            {name: row[name] for name in ("name", "target", "realised", "epochs", "documents", "tokens")}
            for row in report["strata"]
        ],
    }


def _open(folder: Path) -> dict[str, Any]:
    stage, seconds = _stage_of(folder)
    stage.rows()  # imports what the first batch is not to be charged for

    random = np.random.default_rng(1)
    first = []
    for position in random.integers(0, stage.n_sequences - 8, POSITIONS).tolist():
        begin = time.perf_counter()
        with stage.loader(position, micro_batch_size=4, global_batch_sequences=4) as batches:
            next(batches)
        first.append(time.perf_counter() - begin)
    (resident,) = _status("VmHWM")
    return {"seconds": seconds, "first_batch_seconds": first, "peak_bytes": resident}


def _child(what: str, folder: Path) -> None:
    print(json.dumps({"build": _build, "open": _open}[what](folder)))


# ---- figures


def realised(table: Any, target: np.ndarray) -> list[dict[str, Any]]:
    """How far each stratum's tokens are from its target, relatively, after parts of the table.

    The stage counts every token, so a segment's length is what it counts for.
    """
    rows = []
    for share in SHARES:
        sequences = int(table.n_sequences * share)
        end = int(table.seq_ptr[sequences])
        tokens = np.zeros(len(target), dtype=np.int64)
        for first in range(0, end, 1 << 22):
            part = slice(first, min(first + (1 << 22), end))
            tokens += np.bincount(table.stratum[part], table.length[part], minlength=len(target)).astype(np.int64)
        off = tokens / tokens.sum() / target - 1
        worst = int(np.argmax(np.abs(off)))
        rows.append(
            {
                "share_of_stage": share,
                "sequences": sequences,
                "largest_relative_error": float(abs(off[worst])),
                "of_stratum": worst,
                "its_target": float(target[worst]),
                "its_tokens": int(tokens[worst]),
                "its_error_tokens": float(tokens[worst] - target[worst] * tokens.sum()),
            }
        )
    return rows


def measure(args: argparse.Namespace, folder: Path, tokens: int) -> dict[str, Any]:
    """All figures; the files are left to the caller."""
    from megatron_speech.data.sequences.index_cache import open_table
    from megatron_speech.environment import detect

    begin = time.perf_counter()
    held = write_datasets(folder, args.documents, args.strata, tokens / args.documents, args.seed)
    making = time.perf_counter() - begin
    batch = args.seq_length * 8
    packing: dict[str, Any] = {"mode": args.mode}
    if args.mode != "cut":
        packing["oversize"] = "drop"
        if args.open_sequences is not None:
            packing["open_sequences"] = args.open_sequences
    recipe = {
        "seed": args.seed,
        "data": {"datasets": [f"d{k:02d}" for k in range(args.strata)]},
        "stage": {
            "name": "pt", "task_mass": TASK_MASS, "language_temperature": 0.7, "tokens": tokens // batch * batch,
            "seq_length": args.seq_length, "global_batch_tokens": batch, "packing": packing,
        },
    }  # fmt: skip
    (folder / "recipe.json").write_text(json.dumps(recipe))
    command = script("megatron_speech.benchmark.data_index")
    environment = module_environment()
    if args.without_compiler:
        environment["MEGATRON_SPEECH_NO_EXTENSION"] = "1"
    load = os.getloadavg()[0]
    _drop_from_cache(folder)
    built = run_measured([*command, "build", str(folder)], environment)
    build = json.loads(built.output.splitlines()[-1])
    _drop_from_cache(folder / "cache")
    opened = run_measured([*command, "open", str(folder)], environment)
    opening = json.loads(opened.output.splitlines()[-1])
    table, content = open_table(folder / "cache" / build["key"], build["key"])
    target = np.array([stratum["target"] for stratum in content["strata"]])
    on_disk = {path.name: path.stat().st_size for path in sorted((folder / "cache" / build["key"]).iterdir())}
    return {
        "benchmark": "data-index",
        "documents": args.documents,
        "strata": len(target),
        "tokens": tokens,
        "tokens_in_datasets": held,
        "seq_length": args.seq_length,
        "packing": packing,
        "seed": args.seed,
        "compiled": not args.without_compiler,
        "making_the_datasets_seconds": making,
        "build": {
            **build,
            "wall_seconds": built.wall_seconds,
            "cpu_seconds": built.cpu_seconds,
            "peak_resident_bytes": built.peak_bytes,
        },
        "open": opening,
        "proportions": realised(table, target),
        "index_bytes": on_disk,
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "load_average_before": load,
        },
        "environment": detect(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def print_report(report: dict[str, Any]) -> None:
    """The figures as a few lines."""
    build, opening = report["build"], report["open"]
    peaks = build["peak_bytes"]
    first = sorted(opening["first_batch_seconds"])
    print(
        f"index of {report['documents']:,} documents in {report['strata']} strata, {report['tokens']:,} tokens in "
        f"sequences of {report['seq_length']}, {report['packing']['mode']}"
        f"{'' if report['compiled'] else ', without a compiler'}"
    )
    print(
        f"  built in {build['wall_seconds']:.1f} s ({build['cpu_seconds']:.1f} s of CPU; load before "
        f"{report['machine']['load_average_before']:.1f} on {report['machine']['cores']} cores)"
    )
    print(
        f"  peak resident memory {build['peak_resident_bytes'] / _MIB:,.0f} MiB (anonymous "
        f"{peaks['anonymous'] / _MIB:,.0f}, mapped files {peaks['mapped'] / _MIB:,.0f}, each at its own peak)"
    )
    size = sum(report["index_bytes"].values())
    print(
        f"  {build['n_sequences']:,} sequences, {build['segments']:,} segments, {size / _MIB:,.0f} MiB on disk, "
        f"{1 - build['pad_fraction']:.3%} full"
    )
    seconds = opening["seconds"]
    print(
        f"  opened in {seconds['datasets'] + seconds['index']:.3f} s (imports {seconds['import']:.1f} s before); first "
        f"batch at {len(first)} random positions: median {first[len(first) // 2]:.3f} s, longest {first[-1]:.3f} s"
    )
    for row in report["proportions"]:
        print(
            f"  after {row['share_of_stage']:.0%} of the stage every stratum is within "
            f"{row['largest_relative_error']:.4%} of its target (the furthest: share {row['its_target']:.2%}, "
            f"{row['its_error_tokens']:+,.0f} of {row['its_tokens']:,} tokens)"
        )


if __name__ == "__main__":
    try:
        _child(sys.argv[1], Path(sys.argv[2]))
    except InputError as error:
        sys.exit(str(error))
