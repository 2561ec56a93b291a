"""What this checkout makes of fixed inputs, as files that can be compared: `python tools/golden.py OUT [--fsdd JSONL]`.

Run it in two checkouts on one machine and compare the two `golden.json`: where only the layout of the code differs,
datasets, sequence indices, losses and generated ids are the same to the last bit. What is run is the package of
`--repository` (default: the checkout of this file). OUT keeps the run directories: `--continue-from OUT` of another
checkout continues the runs that it left from their checkpoints at step 20.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

TIMING = {
    "tokens_per_second", "tokens_per_second_per_gpu", "tflops_per_gpu", "mfu", "data_wait_seconds", "step_seconds",
    "memory_gib", "validation_seconds", "slowest_rank", "slowest_rank_seconds", "median_rank_seconds",
}  # fmt: skip
# Datasets and a recipe of the toy language, made by the checkout's own test helpers.
MAKE_TOYS = """
import sys, json, pathlib
sys.path.insert(0, str(pathlib.Path(sys.argv[1]) / "tests" / "training"))
import toy_runs
folder = pathlib.Path(sys.argv[2]); folder.mkdir(parents=True, exist_ok=True)
toy_runs.make_toy_datasets(folder)
toy_runs.write_recipe(folder / "recipe.yaml", toy_runs.toy_recipe(folder))
"""
DIGITS = (
    "stages.pt.tokens=61440", "stages.sft.tokens=40960", "validation.interval_steps=20", "checkpoint.interval_steps=20",
    "logging.interval_steps=5", "deterministic=true",
)  # fmt: skip


def sha256(path: Path) -> str:
    """The SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Golden:
    """Runs commands of one checkout and collects what they made."""

    def __init__(self, repository: Path, out: Path) -> None:
        self.repository, self.out = repository, out
        self.found: dict[str, Any] = {}
        self._environment = {
            **os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip

    def run(self, *command: object, processes: int = 1) -> None:
        """Run a command of the checkout; its output goes to a log."""
        words = [str(word) for word in command]
        if processes > 1:
            words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *words]
        with (self.out / "log.txt").open("a") as log:
            print("$", *words, file=log, flush=True)
            subprocess.run(
                [sys.executable, *words], check=True, cwd=self.out, env=self._environment, stdout=log, stderr=log
            )

    def console(self, *command: object, processes: int = 1) -> None:
        """Run `megatron-speech`."""
        self.run("-m", "megatron_speech.cli", *command, processes=processes)

    def datasets(self, folder: Path, *names: str) -> None:
        """Hashes of the files of datasets."""
        for name in names:
            for suffix in (".bin", ".idx", ".manifest.json", ".docs.parquet"):
                self.found[f"{folder.name}/{name}{suffix}"] = sha256(folder / f"{name}{suffix}")

    def losses(self, name: str, run: Path) -> None:
        """Lines of metrics.jsonl without times, and hashes of the sequence indices."""
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        self.found[f"{name}/metrics"] = [{k: v for k, v in line.items() if k not in TIMING} for line in lines]
        for path in sorted((run / "index_cache").rglob("*.npy")):
            self.found[f"{name}/{path.relative_to(run)}"] = sha256(path)
        for path in sorted((run / "checkpoints").glob("step_*/*.distcp")):
            self.found[f"{name}/{path.relative_to(run)}"] = path.stat().st_size


def main() -> None:
    """Make everything and write golden.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--repository", type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument("--fsdd", type=Path, help="samples.jsonl of spoken digits; without it the digits are left out")
    parser.add_argument("--continue-from", type=Path, help="OUT of another checkout, whose runs are continued")
    args = parser.parse_args()
    out = args.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    golden = Golden(args.repository.resolve(), out)

    toy = out / "toy"
    golden.run("-c", MAKE_TOYS, golden.repository, toy)
    golden.datasets(toy, "speech", "tts", "text")
    layouts: dict[str, tuple[int, list[str]]] = {
        "one": (1, []),
        "bf16": (1, ["precision=bf16", "ema.decay=0.9"]),
        "cut_bucket": (1, ["stages.0.packing.mode=bucket", "spikes.loss_above=5"]),
        "data2": (2, ["parallel.distributed_optimizer=true"]),
        "tensor2": (2, ["parallel.tensor=2", "parallel.sequence_parallel=true"]),
        "pipeline2": (2, ["parallel.pipeline=2"]),
    }
    for name, (processes, overrides) in layouts.items():
        run = out / "runs" / name
        golden.console("train", toy / "recipe.yaml", f"run_dir={run}", "deterministic=true", *overrides,
                       processes=processes)  # fmt: skip
        golden.losses(f"toy/{name}", run)
        if args.continue_from:  # what the other checkout had written by step 20, continued here
            theirs, copy = args.continue_from.resolve() / "runs" / name, out / "continued" / name
            shutil.copytree(theirs, copy, symlinks=True)
            for path in (copy / "checkpoints").glob("step_*"):
                if int(path.name.removeprefix("step_")) > 20:
                    shutil.rmtree(path)
            golden.console("train", toy / "recipe.yaml", f"run_dir={copy}", "deterministic=true",
                           *overrides, processes=processes)  # fmt: skip
            golden.losses(f"continued/{name}", copy)

    if args.fsdd:
        # Relative to OUT: manifests name their inputs.
        data, codes, space = Path("digits"), Path("codes"), Path("token_space.json")
        script = golden.repository / "preprocess"
        golden.console("token-space", "--text-tokenizer", "bytes", "--codec", "codec2", "--output", space)
        golden.run(script / "encode_audio.py", "--input", args.fsdd, "--codec", "codec2", "--output-dir", codes,
                   "--workers", "2")  # fmt: skip
        common = ("--input", codes / "samples.jsonl", "--token-space", space, "--workers", "2")
        golden.run(script / "preprocess_data.py", "--task", "speech_lm", *common, "--output-prefix", data / "speech")
        golden.run(script / "preprocess_data.py", "--task", "tts", *common, "--output-prefix", data / "tts",
                   "--cloning", "same-speaker", "--references", "3")  # fmt: skip
        golden.run(script / "merge_datasets.py", "--input", data / "tts", "--output-prefix",
                   data / "merged")  # fmt: skip
        golden.datasets(out / data, "speech", "tts", "merged")
        run = out / "runs" / "digits"
        golden.console("train", golden.repository / "examples/digits/recipe.yaml", f"run_dir={run}",
                       f"token_space={space}", f"data.datasets.speech={data / 'speech'}",
                       f"data.datasets.tts={data / 'tts'}", *DIGITS)  # fmt: skip
        golden.losses("digits", run)
        prompts = out / "prompts.jsonl"
        words = ("zero", "one", "two", "three")
        prompts.write_text("".join(json.dumps({"id": word, "text": word, "seed": 3}) + "\n" for word in words))
        golden.console("generate", "--checkpoint", run, "--input", prompts, "--output-dir", out / "spoken",
                       "--max-seconds", "2")  # fmt: skip
        golden.found["generated"] = sha256(out / "spoken" / "codes.npy")
    (out / "golden.json").write_text(json.dumps(golden.found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
