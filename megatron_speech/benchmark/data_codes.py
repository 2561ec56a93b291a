"""Codes to documents: codes per second of one core, for the forms in which tokenised speech lies on disks.

Each row is ten seconds of one codebook at 50 Hz. The command is the user's own, `preprocess_data.py --task speech_lm`;
what it takes for a handful of rows is subtracted.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_speech.benchmark.data_text import FLAT_CODEC
from megatron_speech.benchmark.measure import (
    Measured,
    interleaved,
    marginal_rates,
    module_environment,
    run_measured,
    script,
    spread,
)
from megatron_speech.tokens.space import TokenSpace

CODES_PER_ROW = 500
IDLE_ROWS = 64
# Rows for one row of the big array: files of their own cost more time to make than to read.
SHARES = {"npy with offsets": 1.0, "npy per sample": 0.1, "parquet": 0.5, "webdataset tar": 0.1}


def _fields(number: int) -> dict[str, Any]:
    return {
        "sample_id": f"rec{number // 40:07d}-{number % 40:03d}",
        "source_id": f"rec{number // 40:07d}",
        "segment_order": number % 40,
        "speaker_id": f"spk{number // 400:05d}",
        "language": ("en", "hi", "am", "ta")[number // 40 % 4],
        "dataset_source": "benchmark",
    }


def _codes(rows: int, seed: int) -> np.ndarray:
    size = FLAT_CODEC.codebook_sizes[0]
    return np.random.default_rng(seed).integers(0, size, (rows, CODES_PER_ROW), dtype=np.uint16)


def make_offsets(folder: Path, rows: int, seed: int) -> Path:
    """One `.npy` of all codes, and a line with offset and length for each sample."""
    np.save(folder / "codes.npy", _codes(rows, seed).reshape(-1))
    with open(folder / "samples.jsonl", "w", encoding="utf-8") as handle:
        for i in range(rows):
            place = {"codes_path": "codes.npy", "code_offset": i * CODES_PER_ROW, "code_len": CODES_PER_ROW}
            handle.write(json.dumps(_fields(i) | place) + "\n")
    return folder / "samples.jsonl"


def make_files(folder: Path, rows: int, seed: int) -> Path:
    """A `.npy` per sample, a thousand in a folder."""
    codes = _codes(rows, seed)
    with open(folder / "samples.jsonl", "w", encoding="utf-8") as handle:
        for i in range(rows):
            path = folder / f"{i // 1000:05d}" / f"{i:08d}.npy"
            path.parent.mkdir(exist_ok=True)
            np.save(path, codes[i])
            handle.write(json.dumps(_fields(i) | {"codes_path": str(path.relative_to(folder))}) + "\n")
    return folder / "samples.jsonl"


def make_parquet(folder: Path, rows: int, seed: int) -> Path:
    """A parquet file with a column of lists."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    flat = pa.array(_codes(rows, seed).reshape(-1))
    offsets = pa.array(np.arange(rows + 1, dtype=np.int32) * CODES_PER_ROW)
    columns: dict[str, Any] = {"codes": pa.ListArray.from_arrays(offsets, flat)}
    described = [_fields(i) for i in range(rows)]
    columns |= {name: pa.array([fields[name] for fields in described]) for name in described[0]}
    pq.write_table(pa.table(columns), folder / "samples.parquet", row_group_size=10_000)
    return folder / "samples.parquet"


def make_tar(folder: Path, rows: int, seed: int) -> Path:
    """A WebDataset shard: `key.json` and `key.npy` of each sample."""
    codes = _codes(rows, seed)
    with tarfile.open(folder / "samples.tar", "w") as archive:
        for i in range(rows):
            array = io.BytesIO()
            np.save(array, codes[i])
            for suffix, data in (("json", json.dumps(_fields(i)).encode()), ("npy", array.getvalue())):
                member = tarfile.TarInfo(f"{i:08d}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return folder / "samples.tar"


FORMS: dict[str, Callable[[Path, int, int], Path]] = {
    "npy with offsets": make_offsets,
    "npy per sample": make_files,
    "parquet": make_parquet,
    "webdataset tar": make_tar,
}


def our_command(source: Path, space: Path, prefix: Path, workers: int) -> list[str]:
    """The conversion of codes alone."""
    return [
        *script("megatron_speech.preprocess.preprocess_data"),
        *("--task", "speech_lm", "--input", str(source), "--token-space", str(space)),
        *("--output-prefix", str(prefix), "--workers", str(workers)),
    ]


def measure(folder: Path, *, rows: int, workers: int, repetitions: int, seed: int) -> dict[str, Any]:
    """Figures of each form; `rows` are those of the big array, the others are fewer by `SHARES`."""
    space = folder / "codes_space.json"
    TokenSpace.build("bytes", FLAT_CODEC).save(space)
    report: dict[str, Any] = {"workers": workers, "codes_per_row": CODES_PER_ROW, "forms": {}}
    runs: dict[str, Callable[[], Measured]] = {}
    counts = {form: max(2 * IDLE_ROWS, round(rows * SHARES[form])) for form in FORMS}
    for form, make in FORMS.items():
        for name, count in (("full", counts[form]), ("few", IDLE_ROWS)):
            place = folder / f"{form.replace(' ', '-')}-{name}"
            place.mkdir(exist_ok=True)
            command = our_command(make(place, count, seed), space, place / "out", workers)
            runs[f"{form} {name}"] = _runner(command)
    found = interleaved(runs, repetitions)
    for form, count in counts.items():
        codes = (count - IDLE_ROWS) * CODES_PER_ROW
        rates = marginal_rates(codes, found[f"{form} full"], found[f"{form} few"])
        report["forms"][form] = {"rows": count, "codes": count * CODES_PER_ROW, **rates}
    return report


def _runner(command: list[str]) -> Callable[[], Measured]:
    return lambda: run_measured(command, module_environment())


def print_report(report: dict[str, Any]) -> None:
    """The figures as lines."""
    print(f"codes, {report['workers']} worker(s), rows of {report['codes_per_row']}, million codes per CPU second:")
    for form, result in report["forms"].items():
        memory = result["anonymous_bytes"] / 2**20
        print(
            f"  {form}: {result['rows']:,} rows, {spread(result['per_cpu_second'], 1, 1e6)}; by wall "
            f"{spread(result['per_second'], 1, 1e6)}; memory without mapped files {memory:,.0f} MiB"
        )
