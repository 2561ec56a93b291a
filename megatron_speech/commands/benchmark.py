"""`megatron-speech benchmark WHAT`: one module per figure, all reporting through `environment`-stamped JSON."""

from __future__ import annotations

import argparse
import importlib

# what → module with add_arguments(parser) and run(args)
BENCHMARKS = {
    "train": ("megatron_speech.benchmark.train", "tokens/s of a recipe on its own data"),
    "train-peer": ("megatron_speech.benchmark.train_peer", "the trainer beside a transformers loop, on the same data"),
    "checkpoint": ("megatron_speech.benchmark.checkpoint", "what a checkpoint costs the training, and how fast it is"),
    "data": ("megatron_speech.benchmark.data", "text, codes and loader throughput, beside Megatron-LM's"),
    "data-index": ("megatron_speech.benchmark.data_index", "the sequence index at scale: seconds, memory, proportions"),
    "head": ("megatron_speech.benchmark.head", "time and memory of the output head beside full logits"),
    "loss-mask": ("megatron_speech.benchmark.loss_mask", "the loss-mask kernels against each other"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of every benchmark, each a subcommand."""
    subparsers = parser.add_subparsers(dest="benchmark", required=True, metavar="WHAT")
    for name, (module, summary) in BENCHMARKS.items():
        importlib.import_module(module).add_arguments(
            subparsers.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        )


def run(args: argparse.Namespace) -> int:
    """Run the one that was named."""
    return importlib.import_module(BENCHMARKS[args.benchmark][0]).run(args)
