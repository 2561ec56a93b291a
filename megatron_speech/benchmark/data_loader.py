"""Batches: our loader, loss mask included, against megatron-core's GPTDataset behind a torch DataLoader, same files.

Each measurement is a process of its own, so that none warms another's memory. Ours runs warm and cold (files dropped
from the page cache first), as in pretraining and as in fine-tuning (prompts not learned). The peer runs as it is by
default, and with positions and loss reset at document ends, which is what ours always does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_speech.benchmark.measure import Measured, module_environment, run_measured, script, spread, summary
from megatron_speech.files import read_json

DATASET_TOKENS = 250_000_000
PEER_TOKENS = 50_000_000

OURS = {
    "pretraining, warm": [],
    "pretraining, cold": ["--cold"],
    "fine-tuning, warm": ["--prompt", "0"],
}
PEERS = {"GPTDataset": [], "GPTDataset with document resets": ["--documents"]}
BASE = "pretraining, warm"


def measure(folder: Path, *, tokens: int, repetitions: int, seed: int) -> dict[str, Any]:
    """Figures of each way to read `tokens` tokens; memory of ours at points along the way."""
    from megatron_speech.benchmark.loader import make_dataset

    size = min(DATASET_TOKENS, max(tokens, 10_000_000))
    prefix = folder / f"loader-{size}-0"
    if not Path(f"{prefix}.manifest.json").exists():
        make_dataset(prefix, size, seed=0)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in (*OURS, *PEERS)}
    output = folder / "loader.json"
    for repetition in range(repetitions):
        for name, flags in {**OURS, **PEERS}.items():
            if name in OURS:
                command = script("megatron_speech.benchmark.loader")
                command += ["--tokens", str(tokens), "--dataset-tokens", str(size), "--work-dir", str(folder)]
            else:
                command = script("megatron_speech.benchmark.peer_loader")
                command += [str(prefix), "--tokens", str(min(tokens, PEER_TOKENS)), "--seed", str(seed + repetition)]
            done: Measured = run_measured([*command, *flags, "--json", str(output)], module_environment())
            found[name].append({**read_json(output, "figures"), "peak_bytes": done.peak_bytes})
    report: dict[str, Any] = {"dataset_tokens": size, "ways": {}}
    base = [one["tokens_per_cpu_second"] for one in found[BASE]]
    for name, figures in found.items():
        rates = [one["tokens_per_cpu_second"] for one in figures]
        report["ways"][name] = {
            "tokens": figures[0]["tokens"],
            "tokens_per_cpu_second": summary(rates),
            "tokens_per_second": summary([one["tokens_per_second"] for one in figures]),
            "peak_bytes": max(one["peak_bytes"] for one in figures),
            "memory": figures[-1].get("memory"),
        }
        if name in PEERS:
            report["ways"][name]["ours_over_this"] = summary([a / b for a, b in zip(base, rates, strict=True)])
    return report


def print_report(report: dict[str, Any]) -> None:
    """The figures as lines."""
    print("loader, million tokens per CPU second into batches with their loss mask:")
    for name, way in report["ways"].items():
        line = f"  {name}: {spread(way['tokens_per_cpu_second'], 1, 1e6)}"
        if "ours_over_this" in way:
            line += f"; ours, {BASE}, is {spread(way['ours_over_this'], 1)} times as fast"
        if way["memory"]:
            first, last = way["memory"][1], way["memory"][-1]
            line += (
                f"; anonymous memory {first['rss_anon_bytes'] / 2**20:,.0f} MiB at {first['tokens'] / 1e6:,.0f} M "
                f"tokens, {last['rss_anon_bytes'] / 2**20:,.0f} MiB at {last['tokens'] / 1e6:,.0f} M"
            )
        print(line)
