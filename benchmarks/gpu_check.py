"""One GPU against the CPU: the same recipe on the same data must give the same losses; then how fast it trains.

    python benchmarks/gpu_check.py --json gpu_check.json

Data is made on the spot (random walks over a codebook: something can be learned, nothing is downloaded). Three runs
of a small recipe in processes of their own: CPU fp32 is the reference, CUDA fp32 must agree with it to 1e-3 relative
(TF32 off), CUDA bf16 to 5e-2. Then tokens/s of PT and SFT of a larger preset in bf16.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_speech.errors import command
from megatron_speech.files import write_json, write_text
from megatron_speech.token_space import CodecDescription, TokenSpace

ROOT = Path(__file__).resolve().parent.parent
CODES = 65_536  # one codebook at 50 Hz: the shape of the real job
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


def make_data(folder: Path, samples: int, seed: int = 0) -> None:
    """Token space, samples.jsonl with inline code files, and the datasets `speech` and `tts`."""
    rng = np.random.default_rng(seed)
    codec = CodecDescription("random-walk", "0" * 64, 16_000, 50.0, ("codes",), (CODES,))
    TokenSpace.build("bytes", codec).save(folder / "ts.json")
    lengths = rng.integers(50, 400, samples)
    steps = rng.integers(-3, 4, lengths.sum())
    start = np.repeat(rng.integers(0, CODES, samples), lengths)
    first = np.repeat(np.cumsum(lengths) - lengths, lengths)
    walk = np.cumsum(steps)
    codes = (start + walk - walk[first]) % CODES
    np.save(folder / "codes.npy", codes.astype(np.uint16)[:, None])
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


@command
def main() -> int:
    """Run the comparison and the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="figures are written here")
    parser.add_argument("--preset", default="qwen2.5-0.5b", help="shape whose speed is measured (qwen2.5-0.5b)")
    args = parser.parse_args()
    result: dict[str, Any] = {"agreement": {}, "speed": {}}
    failures = []
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as name:
        folder = Path(name)
        make_data(folder, samples=4000)
        small = {"preset": "tiny", "tokens": 10 * 4096, "seq": 1024, "rows": 2, "batch": 4096}
        runs = {"cpu_fp32": (False, "fp32"), "cuda_fp32": (True, "fp32"), "cuda_bf16": (True, "bf16")}
        losses = {
            key: np.array([line["loss"] for line in train(folder, key, cuda=cuda, precision=precision, **small)])
            for key, (cuda, precision) in runs.items()
        }
        for key, tolerance in TOLERANCES.items():
            difference = float(np.max(np.abs(losses[key] / losses["cpu_fp32"] - 1)))
            result["agreement"][key] = {"largest_relative_difference": difference, "tolerance": tolerance}
            if not difference <= tolerance:
                failures.append(f"{key} differs from the CPU by {difference:.2e}")
        large = {"preset": args.preset, "tokens": 30 * 65_536, "seq": 2048, "rows": 8, "batch": 65_536}
        lines = train(folder, "speed", cuda=True, precision="bf16", **large)
        for stage in ("pt", "sft"):
            rows = [line for line in lines if line["stage"] == stage][10:]
            result["speed"][stage] = {
                key: float(np.median([row[key] for row in rows]))
                for key in ("tokens_per_second_per_gpu", "tflops_per_gpu", "data_wait_seconds", "memory_gib")
            }
        result["environment"] = json.loads((folder / "speed" / "environment.json").read_text())
    write_json(args.json, result)
    print(json.dumps({"agreement": result["agreement"], "speed": result["speed"]}, indent=2))
    print("; ".join(failures) or f"agrees; {result['speed']['pt']['tokens_per_second_per_gpu']:,.0f} PT tokens/s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
