"""The loader's figures: tokens a second and core into batches with their loss mask, and what memory does meanwhile.

    python -m megatron_speech.benchmark.loader --tokens 1e9

A dataset of random speech documents is made, packed and read through :class:`StageData.loader`, as training reads it.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_speech.data.dataset.dataset_writer import DatasetWriter
from megatron_speech.data.dataset.documents_table import SCHEMA, derive_columns
from megatron_speech.data.dataset.indexed import TokenDataset
from megatron_speech.data.dataset.manifest import CodecEntry, FilterStatistics, Manifest, Totals
from megatron_speech.data.stage import StageData
from megatron_speech.files import write_json
from megatron_speech.recipe.data import DataConfig
from megatron_speech.recipe.stage import StageDataConfig
from megatron_speech.tokens.space import CodecDescription, TokenSpace
from megatron_speech.tokens.templates import TEMPLATE_HASH

CODEBOOK = 65_536  # codes of a 50 Hz single-codebook codec
SEQ_LENGTH = 2048
GLOBAL_BATCH_SEQUENCES = 256  # 0.5 M tokens
_PIECE = 1 << 14
_TEXT = 60  # bytes of a transcript
_FRAMES_HZ = 50.0


def toy_space() -> TokenSpace:
    """Text as bytes and one codebook of 65,536: ids of four bytes, as those of a real run."""
    return TokenSpace.build("bytes", CodecDescription("random", "0" * 64, 16_000, _FRAMES_HZ, ("codes",), (CODEBOOK,)))


def make_dataset(prefix: Path, tokens: int, *, seed: int = 0) -> TokenDataset:
    """Write about `tokens` tokens of text-and-speech documents: 60 bytes of text, 1 to 30 seconds of random codes."""
    space = toy_space()
    random = np.random.default_rng(seed)
    first_code = int(space.encode_codes(np.zeros((1, 1), dtype=np.int64))[0])
    special = space.special
    head = [special("<bos>"), special("<target_text>"), *([97] * _TEXT), special("</target_text>")]
    head.append(special("<speech_start>"))
    manifest = Manifest(
        task="tts", dtype=np.dtype(space.dtype).name, documents=0, tokens=0, token_space_hash=space.hash,
        template_hash=TEMPLATE_HASH,
        codec=CodecEntry(name="random", hash=space.codec.hash, frame_rate_hz=_FRAMES_HZ, codebooks=1),
        tokenizer_version="1", normalization_version="1", split_seed=0, seed=seed, totals=Totals(), languages={},
        sources={}, filters=FilterStatistics(), inputs=[], files={},
    )  # fmt: skip
    made = documents = 0
    with DatasetWriter(prefix, space.dtype) as writer:
        while made < tokens:
            frames = np.clip(random.lognormal(np.log(6.5 * _FRAMES_HZ), 0.6, _PIECE), 50, 1500).astype(np.int32)
            lengths = frames + len(head) + 1
            ends = np.cumsum(lengths, dtype=np.int64)
            count = min(_PIECE, int(np.searchsorted(ends, tokens - made)) + 1)
            lengths, frames, ends = lengths[:count], frames[:count], ends[:count]
            flat = random.integers(first_code, first_code + CODEBOOK, int(ends[-1]), dtype=np.int32)
            flat[(ends - lengths)[:, None] + np.arange(len(head))] = head
            flat[ends - 1] = special("<speech_end>")
            flat = flat.astype(space.dtype)
            numbers = np.arange(documents, documents + count)
            columns: dict[str, Any] = {name: pa.nulls(count, SCHEMA.field(name).type) for name in SCHEMA.names}
            columns |= {
                "sample_id": pa.array(numbers.astype(str)),
                "source_id": pa.array((numbers // 50).astype(str)),
                "language": pa.array(["en"] * count),
                "dataset_source": pa.array(["random"] * count),
                "task": pa.array(["tts"] * count),
                "code_len": pa.array(frames),
                "audio_tokens": pa.array(frames),
                "text_tokens": pa.array(np.full(count, _TEXT, dtype=np.int32)),
                "tokens": pa.array(lengths),
                "target_tokens": pa.array(frames + 1),
                "duration_seconds": pa.array(frames / _FRAMES_HZ),
            }
            rows = pa.RecordBatch.from_arrays([columns[name] for name in SCHEMA.names], schema=SCHEMA)
            writer.add(flat, lengths.astype(np.int32), derive_columns(rows, flat, lengths.astype(np.int32)))
            made += int(ends[-1])
            documents += count
        writer.finish(manifest)
    return TokenDataset(prefix)


def memory_bytes() -> dict[str, int]:
    """This process's anonymous and file-backed resident memory, in bytes (Linux)."""
    found = {}
    with open("/proc/self/status", encoding="ascii") as handle:
        for line in handle:
            name, _, value = line.partition(":")
            if name in ("RssAnon", "RssFile"):
                found[name] = int(value.split()[0]) * 1024
    return found


def forget_pages(dataset: TokenDataset) -> None:
    """Ask the kernel to drop the dataset's files from the page cache, so that the next read is one of the disk."""
    for suffix in (".bin", ".idx"):
        descriptor = os.open(f"{dataset.prefix}{suffix}", os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def measure(
    folder: Path,
    *,
    tokens: int,
    dataset_tokens: int = 250_000_000,
    micro_batch_size: int = 4,
    workers: int = 1,
    prompt: float = 1.0,
    packing: str = "auto",
    cold: bool = False,
    samples: int = 20,
    seed: int = 0,
) -> dict[str, Any]:
    """Read `tokens` positions of batches and account for them.

    Args:
        folder: the dataset `loader` is made here if it is not there; the index too.
        tokens: positions to read (padding included), rounded to whole global batches.
        dataset_tokens: size of the dataset; more than `tokens / dataset_tokens` epochs are read of it.
        micro_batch_size: rows of a micro-batch.
        workers: `data.workers`.
        prompt: loss weight of prompts: 1 as in pretraining, 0 as in fine-tuning.
        packing: packing mode.
        cold: the dataset's files are not in the page cache at the start.
        samples: points of the memory curve.
        seed: of the documents and their order.

    Returns:
        positions, tokens, wall_seconds, cpu_seconds (of all threads), tokens_per_second, tokens_per_cpu_second,
        data_wait_seconds, minor_faults, major_faults, and memory: a list of {tokens, rss_anon_bytes, rss_file_bytes},
        one of them before anything was read.
    """
    prefix = folder / f"loader-{dataset_tokens}-{seed}"
    dataset = TokenDataset(prefix) if Path(f"{prefix}.manifest.json").exists() else None
    dataset = dataset or make_dataset(prefix, dataset_tokens, seed=seed)
    batch_tokens = SEQ_LENGTH * GLOBAL_BATCH_SEQUENCES
    steps = max(1, tokens // batch_tokens)
    stage = StageDataConfig(
        name="loader", task_mass={"tts": 1.0}, tokens=steps * batch_tokens, seq_length=SEQ_LENGTH,
        global_batch_tokens=batch_tokens, max_epochs=1e9, loss={"prompt": prompt}, packing={"mode": packing},
    )  # type: ignore[arg-type]  # fmt: skip
    data = DataConfig(datasets={"loader": str(prefix)}, workers=workers, validation_fraction=0.0)
    stage_data = StageData(stage, data, {"loader": dataset}, toy_space(), seed=seed, cache_dir=folder / "indices")
    if cold:
        forget_pages(dataset)
    curve = []
    with stage_data.loader(0, micro_batch_size, GLOBAL_BATCH_SEQUENCES) as loader:
        before = resource.getrusage(resource.RUSAGE_SELF)
        begin, cpu = time.perf_counter(), time.process_time()
        read = waited = 0.0
        every = max(1, steps // samples)
        for step in range(steps):
            if step % every == 0:
                curve.append({"tokens": step * batch_tokens, **_memory()})
            called = time.perf_counter()
            batch = next(loader)
            waited += time.perf_counter() - called
            read += batch.tokens
        wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
        after = resource.getrusage(resource.RUSAGE_SELF)
    curve.append({"tokens": steps * batch_tokens, **_memory()})
    return {
        "positions": steps * batch_tokens,
        "tokens": int(read),
        "documents": len(dataset),
        "workers": workers,
        "micro_batch_size": micro_batch_size,
        "seq_length": SEQ_LENGTH,
        "packing": stage.packing_mode,
        "prompt": prompt,
        "cold": cold,
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "tokens_per_second": read / wall,
        "tokens_per_cpu_second": read / cpu,
        "data_wait_seconds": waited,
        "minor_faults": after.ru_minflt - before.ru_minflt,
        "major_faults": after.ru_majflt - before.ru_majflt,
        "memory": curve,
    }


def _memory() -> dict[str, int]:
    found = memory_bytes()
    return {"rss_anon_bytes": found["RssAnon"], "rss_file_bytes": found["RssFile"]}


def print_report(figures: dict[str, Any]) -> None:
    """One line of speed and the memory curve."""
    print(
        f"loader ({figures['packing']}, prompt {figures['prompt']:g}, {figures['workers']} worker(s), "
        f"micro-batch {figures['micro_batch_size']} x {figures['seq_length']}, "
        f"{'cold' if figures['cold'] else 'warm'}): {figures['tokens_per_cpu_second'] / 1e6:.1f} M tokens/s per core, "
        f"{figures['tokens_per_second'] / 1e6:.1f} M tokens/s elapsed, {figures['minor_faults']:,} minor and "
        f"{figures['major_faults']:,} major page faults"
    )
    for point in figures["memory"]:
        print(
            f"  {point['tokens'] / 1e6:8.0f} M tokens  anonymous {point['rss_anon_bytes'] / 2**20:7.0f} MiB  "
            f"files {point['rss_file_bytes'] / 2**20:7.0f} MiB"
        )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tokens", type=float, default=1e8, help="positions to read (default: 1e8)")
    add("--dataset-tokens", type=float, default=2.5e8, help="tokens of the dataset (default: 2.5e8)")
    add("--micro-batch-size", type=int, default=4, help="rows (default: 4)")
    add("--workers", type=int, default=1, help="data.workers (default: 1)")
    add("--prompt", type=float, default=1.0, help="loss weight of prompts, 0 for fine-tuning (default: 1)")
    add("--packing", default="auto", help="packing mode (default: auto)")
    add("--cold", action="store_true", help="drop the dataset from the page cache first")
    add("--work-dir", type=Path, help="keep the files here (default: a temporary folder)")
    add("--json", type=Path, metavar="F", help="write the figures to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="megatron-speech-loader-") as temporary:
        figures = measure(
            args.work_dir or Path(temporary),
            tokens=int(args.tokens),
            dataset_tokens=int(args.dataset_tokens),
            micro_batch_size=args.micro_batch_size,
            workers=args.workers,
            prompt=args.prompt,
            packing=args.packing,
            cold=args.cold,
        )
    print_report(figures)
    if args.json is not None:
        write_json(args.json, figures)


if __name__ == "__main__":
    main()
