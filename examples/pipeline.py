"""What the example scripts share: run the project's own commands one after another, each shown before it runs."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_speech.data.dataset.indexed import TokenDataset
from megatron_speech.data.dataset.split import held_out
from megatron_speech.errors import InputError
from megatron_speech.files import atomic_write
from megatron_speech.generation.prompts import read_json_lines
from megatron_speech.recipe.data import DataConfig
from megatron_speech.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable


def say(text: str) -> None:
    """One line on stdout, at once."""
    print(text, flush=True)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Pipeline:
    """Runs steps, prints each command as a person would type it, and remembers how long each took."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.seconds: dict[str, float] = {}

    def step(self, title: str, argv: Sequence[str | Path], **environment: str) -> None:
        """Run one command from the root of the checkout; a failure ends the script with the command's status."""
        words = [str(word) for word in argv]
        shown = ["python" if word == PYTHON else word for word in words]
        say(f"\n── {title}\n$ {shlex.join(shown)}")
        start = time.monotonic()
        status = subprocess.run(words, cwd=ROOT, env={**os.environ, **environment}).returncode
        self.seconds[title] = time.monotonic() - start
        if status:
            say(f"stopped: “{title}” ended with status {status} (its message is above)")
            raise SystemExit(status)
        say(f"   ({self.seconds[title]:.0f} s)")

    def elapsed(self) -> float:
        """Seconds since the script began."""
        return time.monotonic() - self.started


def megatron_speech(*words: str | Path) -> list[str | Path]:
    """The console script's argv, run with this interpreter."""
    return [PYTHON, "-m", "megatron_speech.cli", *words]


def script(path: str, *words: str | Path) -> list[str | Path]:
    """A script of the checkout's argv, run with this interpreter."""
    return [PYTHON, ROOT / path, *words]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file.

    Raises:
        InputError: the file is missing or unreadable, a line is not a JSON object, or there is no line.
    """
    rows = [row for _, row in read_json_lines(path, "samples file")]
    if not rows:
        raise InputError(f"{path} has no line; it needs one JSON object per recording")
    return rows


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object per line, the file whole or not at all."""
    with atomic_write(path, "w") as handle:
        handle.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def held_out_recordings(codes: Path, prefix: Path, data: DataConfig) -> list[dict[str, Any]]:
    """The recordings that a run never trains on, as clean rows of `codes/samples.jsonl` with absolute `wav_path`.

    Args:
        codes: output directory of `encode_audio.py`.
        prefix: a dataset made of all of its rows.
        data: the recipe's data section, which says what is held out.
    """
    columns = TokenDataset(prefix).columns("source_id", "sample_id")
    held = held_out(columns, data.validation_fraction, data.split_seed)
    sources = {name for name, out in zip(columns["source_id"].to_pylist(), held, strict=True) if out}
    rows = [row for row in read_jsonl(codes / "samples.jsonl") if not row.get("variant")]
    for row in rows:
        row["wav_path"] = str((codes / row["wav_path"]).resolve())
    return [row for row in rows if row["source_id"] in sources]


def processes() -> int:
    """Data-parallel processes for this machine's cores, one thread each: 1, 2 or 4.

    Two processes with a thread each train a small model faster than one process with two threads.
    """
    return 1 << (min(cores(), 4).bit_length() - 1)


def launched(*words: str | Path) -> list[str | Path]:
    """The console script's argv under torchrun, one process per core that is used."""
    return [
        *(PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes())),
        *("-m", "megatron_speech.cli", *words),
    ]


def batch_overrides(stages: Iterable[str], seq_length: int, global_batch_tokens: int) -> list[str]:
    """Overrides that cut every stage's global batch into one micro-batch per process."""
    sequences = global_batch_tokens // seq_length
    rows = max(1, sequences // processes())
    return [
        f"stages.{stage}.{key}={value}"
        for stage in stages
        for key, value in (
            ("seq_length", seq_length),
            ("global_batch_tokens", max(sequences, processes()) * seq_length),
            ("micro_batch_size", rows),
        )
    ]


def precision_override(run: Path) -> str:
    """The override of `precision`: that of the run where it has begun, else what this CPU computes faster.

    bf16 halves a step of a small model on a CPU that multiplies it, and doubles it on one that emulates it.
    """
    if (run / "recipe.yaml").exists():
        return f"precision={load_recipe(run / 'recipe.yaml').precision}"
    code = (
        "import time, torch\n"
        "torch.set_num_threads(1)\n"
        "def seconds(dtype):\n"
        "    a, b = torch.ones(2048, 192, dtype=dtype), torch.ones(192, 512, dtype=dtype)\n"
        "    spent = []\n"
        "    for _ in range(12):\n"
        "        began = time.perf_counter(); a @ b; spent.append(time.perf_counter() - began)\n"
        "    return sorted(spent)[3]\n"
        "print('bf16' if seconds(torch.bfloat16) < seconds(torch.float32) else 'fp32')\n"
    )
    chosen = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    return f"precision={chosen}"
