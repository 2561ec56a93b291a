"""Training, generation and evaluation of two checkouts, in turn: `python tools/paired_speed.py OTHER GOLDEN`.

GOLDEN is what `tools/golden.py --fsdd …` has left: its digits run is trained anew for some steps, and speaks. Each
figure is this checkout's over OTHER's, per repetition of the two after each other: tokens per second of training
(more than 1 is faster), and CPU seconds of `generate` and `evaluate` as whole processes (less than 1 is faster).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def cpu_seconds(checkout: Path, *command: object) -> float:
    """User and system seconds of a command of a checkout, with one thread."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = [sys.executable, "-m", "megatron_speech.cli", *map(str, command)]
    subprocess.run(words, check=True, env=environment, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    """Run the repetitions and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the checkout to compare with, its extensions built")
    parser.add_argument("golden", type=Path, help="OUT of tools/golden.py")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    golden = args.golden.resolve()
    ratios: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prompts = [{"id": f"{word}{seed}", "text": word, "seed": seed} for word in WORDS for seed in range(20)]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
        items = [{"id": word, "text": word, "language": "en", "seeds": [0, 1, 2, 3]} for word in WORDS]
        canaries = {
            "name": "digits",
            "decoding": {"temperature": 0.6, "max_seconds": 1.0},
            "scorer": {"kind": "pocketsphinx", "grammar": list(WORDS)},
            "items": items,
        }
        (folder / "canaries.yaml").write_text(json.dumps(canaries))
        data = [f"token_space={golden / 'token_space.json'}", f"data.datasets.speech={golden / 'digits/speech'}",
                f"data.datasets.tts={golden / 'digits/tts'}"]  # fmt: skip

        def measure(checkout: Path) -> dict[str, float]:
            figures = folder / "train.json"
            train = ("benchmark", "train", HERE / "examples/digits/recipe.yaml", "--stage", "sft", "--steps", "60")
            cpu_seconds(checkout, *train, "--json", figures, *data, f"run_dir={folder / 'run'}")
            speak = ("generate", "--checkpoint", golden / "runs/digits", "--input", folder / "prompts.jsonl")
            judge = ("evaluate", "--checkpoint", golden / "runs/digits", "--canaries", folder / "canaries.yaml")
            return {
                "train, tokens per second": json.loads(figures.read_text())["tokens_per_second"],
                "generate, CPU seconds": cpu_seconds(
                    checkout, *speak, "--output-dir", folder / "out", "--max-seconds", "1"
                ),
                "evaluate, CPU seconds": cpu_seconds(checkout, *judge, "--output-dir", folder / "report"),
            }

        for number in range(args.repeats):
            order = (HERE, args.other.resolve()) if number % 2 else (args.other.resolve(), HERE)
            found = {checkout: measure(checkout) for checkout in order}
            for what, value in found[HERE].items():
                ratios[what].append(value / found[args.other.resolve()][what])
    for what, values in ratios.items():
        print(f"{what}: {statistics.median(values):.3f} [{min(values):.3f} .. {max(values):.3f}] of the other's")


if __name__ == "__main__":
    main()
