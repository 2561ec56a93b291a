"""A toy language that a tiny model learns in seconds: every letter is spoken as three codes of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import yaml

from megatron_speech import cli
from megatron_speech.data.dataset.dataset_writer import DatasetWriter
from megatron_speech.data.dataset.documents_table import SCHEMA, derive_columns
from megatron_speech.data.dataset.manifest import CodecEntry, FilterStatistics, Manifest, Totals
from megatron_speech.tokens.space import CodecDescription, TokenSpace
from megatron_speech.tokens.templates import compile_document, template_hash

if TYPE_CHECKING:
    import pytest

    from megatron_speech.training.telemetry.run_log import RunLog

# Of the fixture launch_two: the argument lists of `megatron-speech train`.
LaunchTwo = Callable[..., subprocess.CompletedProcess[str]]

LETTERS = "abcdefgh"
CODEC = CodecDescription("toy", "toy-1", 8000, 25.0, ("q0",), (64,))


def make_token_space(path: Path, codec: CodecDescription = CODEC) -> TokenSpace:
    """Bytes and the toy codec, saved at `path`."""
    space = TokenSpace.build("bytes", codec)
    space.save(path)
    return space


def spoken(word: str) -> np.ndarray:
    """The codes of a word: int32 [3·len, 1]."""
    return np.array([[8 * LETTERS.index(letter) + k] for letter in word for k in range(3)], dtype=np.int32)


def make_dataset(prefix: Path, space: TokenSpace, task: str, *, documents: int = 200, seed: int = 0) -> None:
    """A dataset of random words of 2 to 6 letters, in two languages and two sources."""
    generator = np.random.default_rng(seed)
    flat, rows = [], []
    for index in range(documents):
        word = "".join(generator.choice(list(LETTERS), size=generator.integers(2, 7)))
        text, codes = space.encode_text(word), space.encode_codes(spoken(word))
        if task == "text_lm":
            ids, audio, target = compile_document(space, task, text_ids=text), 0, 0
        elif task == "speech_lm":
            ids, audio, target = compile_document(space, task, code_ids=codes), len(codes), len(codes) + 1
        else:
            ids = compile_document(space, task, text_ids=text, code_ids=codes)
            audio, target = len(codes), len(text if task == "asr" else codes) + 1
        flat.append(ids)
        rows.append(
            {
                "sample_id": f"{task}-{index}", "source_id": f"{task}-{index}", "language": ["xx", "yy"][index % 2],
                "dataset_source": ["studio", "street"][index // 2 % 2], "task": task, "transcript_native": word,
                "speaker_id": "s", "code_len": audio, "audio_tokens": audio, "text_tokens": len(text),
                "tokens": len(ids), "target_tokens": target, "duration_seconds": audio / 25.0,
                "codec_hash": CODEC.hash,
            }
        )  # fmt: skip
    manifest = Manifest(
        task=task,
        dtype=np.dtype(space.dtype).name,
        documents=0,
        tokens=0,
        token_space_hash=space.hash,
        template_hash=template_hash(task),
        codec=CodecEntry(name=CODEC.name, hash=space.codec.hash, frame_rate_hz=25.0, codebooks=1),
        tokenizer_version="1",
        normalization_version="1",
        split_seed=0,
        seed=0,
        totals=Totals(),
        languages={},
        sources={},
        filters=FilterStatistics(),
        inputs=[],
        files={},
    )
    lengths = np.array([len(ids) for ids in flat], dtype=np.int32)
    with DatasetWriter(prefix, space.dtype) as writer:
        ids = np.concatenate(flat).astype(space.dtype)
        writer.add(ids, lengths, derive_columns(pa.RecordBatch.from_pylist(rows, schema=SCHEMA), ids, lengths))
        writer.finish(manifest)


def make_toy_datasets(folder: Path) -> Path:
    """A folder with ts.json and the datasets speech, tts and text."""
    space = make_token_space(folder / "ts.json")
    for number, (name, task) in enumerate({"speech": "speech_lm", "tts": "tts", "text": "text_lm"}.items()):
        make_dataset(folder / name, space, task, seed=number)
    return folder


def toy_recipe(toy: Path, **changes: Any) -> dict[str, Any]:
    """A two-stage recipe of a tiny model on the toy datasets, with top-level sections replaced by `changes`."""
    recipe: dict[str, Any] = {
        "name": "toy",
        "seed": 7,
        "token_space": str(toy / "ts.json"),
        "model": {"preset": "tiny", "num_query_groups": 4},
        "data": {"datasets": [str(toy / name) for name in ("speech", "tts", "text")], "validation_fraction": 0.1},
        "stages": [
            {
                "name": "pt", "task_mass": {"speech_lm": 0.5, "tts": 0.4, "text_lm": 0.1}, "tokens": 24 * 512,
                "seq_length": 64, "micro_batch_size": 2, "global_batch_tokens": 512, "max_epochs": 1000,
                "lr": {"peak": 5e-3, "end": 1e-3, "warmup": 0.25},
            },
            {
                "name": "sft", "task_mass": {"tts": 1.0}, "tokens": 12 * 512, "seq_length": 64, "micro_batch_size": 4,
                "global_batch_tokens": 512, "max_epochs": 1000, "lr": {"peak": 1e-3, "end": 1e-4, "warmup": 2},
                "loss": {"prompt": 0.0}, "carry_optimizer": False,
            },
        ],
        "checkpoint": {"interval_steps": 10, "keep_last": 10},
        "validation": {"interval_steps": 10, "tokens": 2048},
        "logging": {"interval_steps": 3, "tensorboard": False},
    }  # fmt: skip
    recipe.update(changes)
    return recipe


def write_recipe(path: Path, recipe: dict[str, Any]) -> Path:
    """Save `recipe` as YAML at `path`."""
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


TIMING = {
    "tokens_per_second", "tokens_per_second_per_gpu", "tflops_per_gpu", "mfu", "data_wait_seconds", "step_seconds",
    "memory_gib", "validation_seconds", "slowest_rank", "slowest_rank_seconds", "median_rank_seconds", "goodput",
}  # fmt: skip


def without_timing(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines with only the fields that a repetition reproduces."""
    return [
        {key: value for key, value in line.items() if key not in TIMING and not key.startswith("lost_seconds/")}
        for line in lines
    ]


def train(recipe: Path, run: Path, *overrides: str) -> int:
    """`megatron-speech train` in this process."""
    return cli.main(["train", str(recipe), f"run_dir={run}", *overrides])


def at_record(monkeypatch: pytest.MonkeyPatch, **actions: Callable[[], None]) -> None:
    """Call `actions["step_6"]` when the line of step 6 has been written."""
    from megatron_speech.training.telemetry.run_log import RunLog

    write = RunLog.write

    def wrapped(log: RunLog, record: dict[str, Any]) -> None:
        write(log, record)
        if action := actions.get(f"step_{record['step']}"):
            action()

    monkeypatch.setattr(RunLog, "write", wrapped)


def copy_until(run: Path, copy: Path, step: int) -> Path:
    """A copy of a run whose newest checkpoint is `step`, as if it had been killed later on."""
    shutil.copytree(run, copy, symlinks=True)
    for path in (copy / "checkpoints").glob("step_*"):
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    return copy
