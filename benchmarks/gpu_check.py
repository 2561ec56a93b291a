"""One GPU against the CPU, and how fast it trains.

    python benchmarks/gpu_check.py agreement --json agreement.json
    python benchmarks/gpu_check.py syncs --json syncs.json
    python benchmarks/gpu_check.py speed --preset 1b --json speed.json

Data is made on the spot (random walks over a codebook: something can be learned, nothing is downloaded).

agreement  Three runs of a small recipe in processes of their own: CPU fp32 is the reference, CUDA fp32 must agree with
           it to 1e-3 relative (TF32 off), CUDA bf16 to 5e-2.
syncs      PyTorch tells of every call for which the host waits for the device; a training step may have none.
speed      Tokens/s of PT and SFT of a preset in bf16, with the 193,856 ids of the real job.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_speech.errors import command
from megatron_speech.files import write_json, write_text
from megatron_speech.tokens.space import CodecDescription, TokenSpace

ROOT = Path(__file__).resolve().parent.parent
CODES = 65_536  # one codebook at 50 Hz
REAL_CODES = 193_584  # so many that the head has the 193,856 rows of the real job, text and specials included
TOLERANCES = {"cuda_fp32": 1e-3, "cuda_bf16": 5e-2}

RECIPE = """
name: gpu_check
seed: 1
token_space: ts.json
data: {{datasets: {{speech: speech, tts: tts}}, validation_fraction: 0.0}}
model: {{preset: {preset}}}
precision: {precision}
stages:
  - name: pt
    task_mass: {{speech_lm: 0.8, tts: 0.2}}
    tokens: {tokens}
    seq_length: {seq}
    micro_batch_size: {rows}
    global_batch_tokens: {batch}
    max_epochs: 1000
    lr: {{peak: 1.0e-3, end: 1.0e-4, warmup: 0.1}}
  - name: sft
    task_mass: {{tts: 1.0}}
    tokens: {tokens}
    seq_length: {seq}
    micro_batch_size: {rows}
    global_batch_tokens: {batch}
    max_epochs: 1000
    lr: {{peak: 5.0e-4, end: 1.0e-5}}
    loss: {{prompt: 0.0}}
validation: {{interval_steps: 0}}
checkpoint: {{interval_steps: 0}}
logging: {{interval_steps: 1, tensorboard: false}}
"""


def make_data(folder: Path, samples: int, seed: int = 0, codes: int = CODES) -> None:
    """Token space, samples.jsonl with inline code files, and the datasets `speech` and `tts`."""
    rng = np.random.default_rng(seed)
    codec = CodecDescription("random-walk", "0" * 64, 16_000, 50.0, ("codes",), (codes,))
    TokenSpace.build("bytes", codec).save(folder / "ts.json")
    lengths = rng.integers(50, 400, samples)
    steps = rng.integers(-3, 4, lengths.sum())
    start = np.repeat(rng.integers(0, codes, samples), lengths)
    first = np.repeat(np.cumsum(lengths) - lengths, lengths)
    walk = np.cumsum(steps)
    ids = (start + walk - walk[first]) % codes
    np.save(folder / "codes.npy", ids.astype(np.uint32)[:, None])
    offsets = np.cumsum(lengths) - lengths
    rows = (
        {
            "sample_id": f"s{i}",
            "source_id": f"s{i}",
            "speaker_id": f"v{i % 20}",
            "language": "en",
            "transcript": " ".join(f"w{int(w)}" for w in rng.integers(0, 50, 6)),
            "codes_path": "codes.npy",
            "code_offset": int(offsets[i]),
            "code_len": int(lengths[i]),
        }
        for i in range(samples)
    )
    write_text(folder / "samples.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for task in ("speech_lm", "tts"):
        subprocess.run(
            [
                *(sys.executable, ROOT / "preprocess/preprocess_data.py", "--task", task),
                *("--input", folder / "samples.jsonl", "--token-space", folder / "ts.json"),
                *("--output-prefix", folder / task.removesuffix("_lm")),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )


def train(folder: Path, name: str, *, cuda: bool, **fields: Any) -> list[dict[str, Any]]:
    """Train in a process of its own; the lines of its metrics.jsonl."""
    write_text(folder / f"{name}.yaml", RECIPE.format(**fields))
    environment = {**os.environ, "NVIDIA_TF32_OVERRIDE": "0"}
    if not cuda:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    words = [sys.executable, "-m", "megatron_speech.cli", "train", folder / f"{name}.yaml", f"run_dir={folder / name}"]
    subprocess.run(words, check=True, cwd=ROOT, env=environment)
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def agreement(folder: Path, args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Losses of ten steps on each device; what is out of tolerance."""
    make_data(folder, samples=1000)
    small = {"preset": "tiny", "tokens": 10 * 4096, "seq": 1024, "rows": 2, "batch": 4096}
    runs = {"cpu_fp32": (False, "fp32"), "cuda_fp32": (True, "fp32"), "cuda_bf16": (True, "bf16")}
    losses = {
        key: np.array([line["loss"] for line in train(folder, key, cuda=cuda, precision=precision, **small)])
        for key, (cuda, precision) in runs.items()
    }
    result: dict[str, Any] = {"losses": {key: values.tolist() for key, values in losses.items()}}
    failures = []
    for key, tolerance in TOLERANCES.items():
        difference = float(np.max(np.abs(losses[key] / losses["cpu_fp32"] - 1)))
        result[key] = {"largest_relative_difference": difference, "tolerance": tolerance}
        if not difference <= tolerance:
            failures.append(f"{key} differs from the CPU by {difference:.2e}")
    return result, failures


def syncs(folder: Path, args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Calls within training steps for which the host waits for the device, in PT and in SFT."""
    import torch

    make_data(folder, samples=1000)
    fields = {"preset": "tiny", "tokens": 12 * 4096, "seq": 1024, "rows": 2, "batch": 4096, "precision": "bf16"}
    write_text(folder / "syncs.yaml", RECIPE.format(**fields))
    overrides = [f"run_dir={folder / 'syncs'}", "logging.interval_steps=6"]
    found = waits_in_steps(folder / "syncs.yaml", overrides, torch.cuda.set_sync_debug_mode)
    failures = [f"{count} waits at {place}" for place, count in found["waits"].items()]
    if not found["steps"]:
        failures.append("no step was watched")
    return found, failures


def waits_in_steps(recipe: Path, overrides: list[str], set_mode: Callable[[str], None]) -> dict[str, Any]:
    """Train `recipe` and watch every second half of a logging interval's steps.

    Args:
        recipe: what is trained.
        overrides: of its values.
        set_mode: `torch.cuda.set_sync_debug_mode`: what PyTorch does at a call for which the host waits.

    Returns:
        steps: how many were watched; waits: "file:line: message" → how often.
    """
    from megatron_speech.environment import prepare_imports
    from megatron_speech.parallel import groups
    from megatron_speech.recipe.load import load_recipe

    prepare_imports()
    from megatron_speech.training import trainer
    from megatron_speech.training.run import set_up

    watched = 0
    waits: Counter[str] = Counter()

    try:
        run = set_up(load_recipe(recipe, overrides), log_environment=False)
        take, interval = run.step.take, run.recipe.logging.interval_steps

        def watched_take(*args: Any) -> Any:
            """A step, watched where memory and kernels have settled."""
            nonlocal watched
            if run.progress.position.step % interval < interval // 2:
                return take(*args)
            watched += 1
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                set_mode("warn")
                try:
                    return take(*args)
                finally:
                    set_mode("default")
                    for one in told:
                        if "synchronizing CUDA operation" in str(one.message):
                            waits[f"{one.filename}:{one.lineno}"] += 1

        run.step.take = watched_take  # type: ignore[method-assign]
        trainer.train(run)
    finally:
        groups.destroy()
    return {"steps": watched, "waits": dict(waits)}


def speed(folder: Path, args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Medians of the later half of 16 steps of each stage."""
    make_data(folder, samples=4000, codes=REAL_CODES)
    large = {"preset": args.preset, "tokens": 16 * 65_536, "seq": 2048, "rows": 8, "batch": 65_536}
    lines = train(folder, "speed", cuda=True, precision="bf16", **large)
    result: dict[str, Any] = {"preset": args.preset, "ids": 272 + REAL_CODES}
    for stage in ("pt", "sft"):
        rows = [line for line in lines if line["stage"] == stage][8:]
        result[stage] = {
            key: None if rows[0][key] is None else float(np.median([row[key] for row in rows]))
            for key in ("tokens_per_second_per_gpu", "tflops_per_gpu", "mfu", "data_wait_seconds", "memory_gib")
        }
    result["environment"] = json.loads((folder / "speed" / "environment.json").read_text())
    return result, []


PARTS = {"agreement": agreement, "syncs": syncs, "speed": speed}


@command
def main() -> int:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS, help="what is checked")
    parser.add_argument("--json", type=Path, required=True, help="figures are written here")
    parser.add_argument("--preset", default="1b", help="shape whose speed is measured (1b)")
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device is visible: these checks need one", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as name:
        result, failures = PARTS[args.part](Path(name), args)
    write_json(args.json, {**result, "failures": failures})
    print(json.dumps({key: value for key, value in result.items() if key != "environment"}, indent=2))
    print("; ".join(failures) or f"{args.part}: ok")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
