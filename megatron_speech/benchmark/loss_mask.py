"""`megatron-speech benchmark loss-mask`: the implementations of the loss mask against each other.

Repetitions are interleaved, and ratios are taken within a repetition, so that a machine that slows down slows
all of them. Before anything is timed the implementations are compared element for element.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megatron_speech.benchmark.measure import report_of_kernels
from megatron_speech.errors import InputError

if TYPE_CHECKING:
    from megatron_speech.ops.loss_mask import MaskedBatch

POLICIES = ("pt", "sft")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("--rows", type=int, default=8, help="sequences in a micro-batch (default: 8)")
    parser.add_argument("--seq-length", type=int, default=2048, help="tokens of a sequence (default: 2048)")
    parser.add_argument("--document-tokens", type=int, default=330, help="median tokens of a document (default: 330)")
    parser.add_argument("--vocabulary", type=int, default=193_856, help="ids of the token space (default: 193856)")
    parser.add_argument("--policy", choices=POLICIES, default="sft", help="what is learned (default: sft)")
    parser.add_argument("--repetitions", type=int, default=20, help="interleaved repetitions (default: 20)")
    parser.add_argument("--seconds", type=float, default=0.1, help="time of one repetition of each (default: 0.1)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads that PyTorch may use (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the tokens and lengths (default: 0)")
    parser.add_argument("--json", metavar="F", help="write the figures to this file")


def run(args: argparse.Namespace) -> int:
    """Print, and write if asked, tokens/s of each implementation and its ratio to the reference.

    Raises:
        InputError: a flag that is not positive.
    """
    for name in ("rows", "seq_length", "document_tokens", "vocabulary", "repetitions", "threads", "seconds"):
        if getattr(args, name) <= 0:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be above 0")
    return report_of_kernels(args, measure, print_report)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The figures: for each device, for each implementation, tokens/s and the ratio to that device's reference."""
    import torch

    from megatron_speech.ops.extension import extension

    devices = {"cpu": ["reference", *(["cpp"] if extension() is not None else [])]}
    if torch.cuda.is_available():
        from megatron_speech.ops import cuda_library

        library, reason = cuda_library.load(torch.cuda.get_device_capability())
        devices["cuda"] = ["reference", *(["cuda"] if library is not None else [])]
        if library is None:
            print(f"note: no CUDA kernel to measure: {reason}")
    tokens = args.rows * args.seq_length
    shape = {
        name: getattr(args, name) for name in ("rows", "seq_length", "document_tokens", "vocabulary", "policy", "seed")
    }
    results: dict[str, Any] = {}
    for device, implementations in devices.items():
        calls = make_calls(args, device, implementations)
        seconds = interleave(calls, args.repetitions, args.seconds, synchronise=device == "cuda")
        results[device] = {
            name: {
                "tokens_per_second": summary([tokens / second for second in seconds[name]]),
                "ratio_to_reference": summary(
                    [base / second for base, second in zip(seconds["reference"], seconds[name], strict=True)]
                ),
                "seconds_per_call": seconds[name],
            }
            for name in implementations
        }
    return {"benchmark": "loss-mask", "shape": shape, "threads": args.threads, "devices": results}


def make_calls(args: argparse.Namespace, device: str, implementations: list[str]) -> dict[str, Callable[[], Any]]:
    """One call per implementation, on the same packed micro-batch, with reused outputs; checked to agree."""
    import numpy as np
    import torch

    from megatron_speech.ops.loss_mask import LossPolicy, MaskedBatch, loss_mask

    rng = np.random.default_rng(args.seed)
    prompt_end = args.vocabulary - 1
    tokens = rng.integers(0, max(1, prompt_end), (args.rows, args.seq_length + 1))
    lengths, pointers = [], [0]
    for row in range(args.rows):
        used = 0
        while used < args.seq_length:
            length = int(args.document_tokens * np.exp(rng.normal(0, 0.7))) + 1
            # A quarter of each document is its prompt; what does not fit is cut, as in PT.
            if used + length // 4 < args.seq_length:
                tokens[row, used + length // 4] = prompt_end
            lengths.append(length)
            used += length
        pointers.append(len(lengths))
    row_tokens, document_lengths, row_pointers, groups, table = (
        torch.from_numpy(array).to(device)
        for array in (
            tokens,
            np.array(lengths, np.int32),
            np.array(pointers, np.int32),
            np.arange(len(lengths), dtype=np.int32) % 16,
            rng.integers(0, 3, args.vocabulary).astype(np.uint8),
        )
    )
    policy = LossPolicy(prompt=0.0, prompt_end_id=prompt_end) if args.policy == "sft" else LossPolicy()

    def call_of(name: Any, out: MaskedBatch) -> Callable[[], MaskedBatch]:
        return lambda: loss_mask(
            row_tokens, document_lengths, row_pointers, groups, table, policy, implementation=name, out=out
        )

    calls = {
        name: call_of(name, MaskedBatch.allocate(args.rows, args.seq_length, len(lengths), device=device))
        for name in implementations
    }
    expected = calls["reference"]().tensors()
    for name, call in calls.items():
        for field, tensor in call().tensors().items():
            if not torch.equal(tensor, expected[field]):
                raise RuntimeError(f"loss mask implementation {name} disagrees with the reference in {field}")
    return calls


def interleave(
    calls: dict[str, Callable[[], Any]], repetitions: int, seconds: float, *, synchronise: bool
) -> dict[str, list[float]]:
    """Seconds per call: for each implementation, one figure per repetition."""
    import torch

    def timed(call: Callable[[], Any], times: int) -> float:
        if synchronise:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(times):
            call()
        if synchronise:
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / times

    times = {name: max(1, round(seconds / timed(call, 5))) for name, call in calls.items()}
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repetitions):
        for name, call in calls.items():
            found[name].append(timed(call, times[name]))
    return found


def summary(values: list[float]) -> dict[str, float]:
    """Median and spread."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def print_report(report: dict[str, Any]) -> None:
    """The figures as lines."""
    shape, environment = report["shape"], report["environment"]
    git = environment["git"] or {"commit": "none", "modified": False}
    print(
        f"loss-mask: {shape['rows']} x {shape['seq_length']} tokens, documents of about {shape['document_tokens']}, "
        f"{shape['vocabulary']} ids, policy {shape['policy']}"
    )
    print(
        f"torch {environment['torch']}, {report['threads']} CPU thread(s), commit {git['commit'][:12]}"
        f"{' (modified)' if git['modified'] else ''}, {report['date']}"
    )
    for device, results in report["devices"].items():
        where = environment["devices"][0]["name"] if device == "cuda" else "CPU"
        for name, result in results.items():
            rate, ratio = result["tokens_per_second"], result["ratio_to_reference"]
            print(
                f"  {where}, {name}: {rate['median'] / 1e6:.1f} M tokens/s "
                f"[{rate['min'] / 1e6:.1f} .. {rate['max'] / 1e6:.1f}], "
                f"{ratio['median']:.2f} x reference [{ratio['min']:.2f} .. {ratio['max']:.2f}]"
            )
