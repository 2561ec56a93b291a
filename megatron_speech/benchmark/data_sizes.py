"""What a large conversion needs: bytes and CPU seconds per document, measured; sizes of whole jobs, by multiplication.

Rows with realistic fields (names, sources, speakers, transcripts of the length that ten seconds of speech have) go
through the user's own command. From the constants follow files, disk, memory and core hours of any number of hours.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from megatron_speech.benchmark.data_codes import IDLE_ROWS, _fields
from megatron_speech.benchmark.data_corpus import BenchmarkCorpus
from megatron_speech.benchmark.data_text import FLAT_CODEC
from megatron_speech.benchmark.measure import module_environment, run_measured, script
from megatron_speech.tokens.space import TokenSpace

MEDIAN_SECONDS, SIGMA, LEAST, MOST = 8.0, 0.6, 0.6, 45.0
HOURS = (10_000, 100_000, 1_000_000)
SHARD_DOCUMENTS = 1_000_000
SEQ_LENGTH = 2048
SEQUENCE_BYTES, SEGMENT_BYTES = 8, 14
"""Of the sequence index: a pointer per sequence; stratum, document, start and length of each segment."""
TASKS = ("speech_lm", "tts")


def make_rows(folder: Path, rows: int, seed: int) -> tuple[Path, float]:
    """(samples.jsonl with offsets into one `.npy`, mean seconds of a row); lengths are log-normal."""
    rng = np.random.default_rng(seed)
    seconds = np.clip(np.exp(rng.normal(math.log(MEDIAN_SECONDS), SIGMA, rows)), LEAST, MOST)
    lengths = (seconds * FLAT_CODEC.frame_rate_hz).astype(np.int64)
    ends = np.cumsum(lengths)
    codes = np.lib.format.open_memmap(folder / "codes.npy", mode="w+", dtype=np.uint16, shape=(int(ends[-1]),))
    for start in range(0, len(codes), 1 << 24):
        size = min(1 << 24, len(codes) - start)
        codes[start : start + size] = rng.integers(0, FLAT_CODEC.codebook_sizes[0], size, dtype=np.uint16)
    del codes
    texts = BenchmarkCorpus("transcripts", seed).documents(rows)
    with open(folder / "samples.jsonl", "w", encoding="utf-8") as handle:
        for i, (end, length, (_, text)) in enumerate(zip(ends.tolist(), lengths.tolist(), texts, strict=True)):
            row = _fields(i) | {
                "codes_path": "codes.npy",
                "code_offset": end - length,
                "code_len": length,
                "transcript": text,
                "start_time": round(i % 40 * 9.5, 2),
                "end_time": round(i % 40 * 9.5 + length / FLAT_CODEC.frame_rate_hz, 2),
            }
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")
    return folder / "samples.jsonl", float(lengths.mean() / FLAT_CODEC.frame_rate_hz)


def measure(folder: Path, *, rows: int, workers: int, seed: int) -> dict[str, Any]:
    """Constants of each task, measured over `rows` rows, and the table of `HOURS`."""
    from megatron_speech.data.dataset.indexed import TokenDataset, file_of

    space = folder / "sizes_space.json"
    TokenSpace.build("bytes", FLAT_CODEC).save(space)
    full, few = folder / "sizes", folder / "sizes-few"
    for place in (full, few):
        place.mkdir(exist_ok=True)
    source, mean_seconds = make_rows(full, rows, seed)
    small, _ = make_rows(few, IDLE_ROWS, seed)
    report: dict[str, Any] = {"rows": rows, "workers": workers, "mean_seconds": mean_seconds, "tasks": {}}
    for task in TASKS:
        runs = {}
        for name, path in (("few", small), ("full", source)):
            command = [
                *script("megatron_speech.preprocess.preprocess_data"),
                *("--task", task, "--input", str(path), "--token-space", str(space)),
                *("--output-prefix", str(path.parent / task), "--workers", str(workers)),
            ]
            runs[name] = run_measured(command, module_environment())
        dataset = TokenDataset(full / task)
        sizes = {suffix: file_of(full / task, suffix).stat().st_size for suffix in (".bin", ".idx", ".docs.parquet")}
        report["tasks"][task] = {
            "documents": len(dataset),
            "tokens_per_document": float(np.sum(dataset.lengths, dtype=np.int64) / len(dataset)),
            "bytes_per_document": {suffix: size / len(dataset) for suffix, size in sizes.items()},
            "cpu_seconds_per_document": (runs["full"].cpu_seconds - runs["few"].cpu_seconds) / (rows - IDLE_ROWS),
            "anonymous_bytes": runs["full"].anonymous_bytes,
        }
    report["table"] = [plan(report, hours) for hours in HOURS]
    return report


def plan(report: dict[str, Any], hours: int) -> dict[str, Any]:
    """What `hours` of speech need, for a dataset of each task: the measured constants times the documents."""
    documents = math.ceil(hours * 3600 / report["mean_seconds"])
    shards = math.ceil(documents / SHARD_DOCUMENTS)
    result: dict[str, Any] = {"hours": hours, "documents": documents, "shards": shards, "tasks": {}}
    for task, constants in report["tasks"].items():
        tokens = documents * constants["tokens_per_document"]
        sequences = math.ceil(tokens / SEQ_LENGTH)
        result["tasks"][task] = {
            "tokens": tokens,
            # `cut`: every document is a segment, and one more where a sequence ends inside of it
            "index_bytes": sequences * SEQUENCE_BYTES + (documents + sequences) * SEGMENT_BYTES,
            "bytes": {suffix: documents * size for suffix, size in constants["bytes_per_document"].items()},
            "core_hours": documents * constants["cpu_seconds_per_document"] / 3600,
        }
    return result


def print_report(report: dict[str, Any]) -> None:
    """The constants and the table."""
    print(f"sizes, measured over {report['rows']:,} rows of {report['mean_seconds']:.2f} s on average:")
    for task, constants in report["tasks"].items():
        size = ", ".join(f"{suffix} {value:.1f}" for suffix, value in constants["bytes_per_document"].items())
        print(
            f"  {task}: {constants['tokens_per_document']:.1f} tokens per document; bytes per document {size}; "
            f"{constants['cpu_seconds_per_document'] * 1e6:.1f} CPU microseconds per document; memory without mapped "
            f"files {constants['anonymous_bytes'] / 2**20:,.0f} MiB"
        )
    print(f"  by multiplication, shards of {SHARD_DOCUMENTS:,} documents:")
    for line in report["table"]:
        print(f"    {line['hours']:>9,} h: {line['documents']:,} documents, {line['shards']:,} shards")
        for task, needs in line["tasks"].items():
            size = ", ".join(f"{suffix} {value / 2**30:,.1f} GiB" for suffix, value in needs["bytes"].items())
            print(
                f"      {task}: {needs['tokens'] / 1e9:,.1f} G tokens, {size}; index of an epoch "
                f"{needs['index_bytes'] / 2**30:,.1f} GiB; {needs['core_hours']:,.2f} core hours"
            )
