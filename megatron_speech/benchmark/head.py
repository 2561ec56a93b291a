"""`megatron-speech benchmark head`: time and memory of the output head, forward and backward, beside full logits.

    ours           ops.cross_entropy on the rows that are learned
    full           logits of all rows, in fp32 for the softmax, masked labels ignored: what a plain training loop does
    torch-chunked  torch.nn.functional.linear_cross_entropy on the rows that are learned, where PyTorch has it

Repetitions are interleaved, forth and back, and ratios are taken within a repetition, so that a machine that slows down
slows all of them; seconds are those of the clock on a GPU, and of the processor on a CPU, which others may share.
Before anything is timed ours is compared with full logits, in loss and gradients; the loss of every side is reported.
Memory is what the allocator holds at most during one call beyond the inputs: gradients are part of it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_speech.benchmark.measure import report_of_kernels, spread, summary
from megatron_speech.errors import InputError

if TYPE_CHECKING:
    import torch

DTYPES = ("fp32", "bf16")
Call = Callable[[], "torch.Tensor"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("--ids", type=int, default=193_856, help="ids of the token space (default: 193856)")
    parser.add_argument("--hidden", type=int, default=512, help="width of the hidden states (default: 512)")
    parser.add_argument("--rows", type=int, default=512, help="tokens of a micro-batch (default: 512)")
    parser.add_argument(
        "--masked", type=float, nargs="+", default=[0.0, 0.5, 0.95], help="shares of tokens without loss (0 0.5 0.95)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of all inputs (default: bf16 on a GPU, else fp32)")
    parser.add_argument("--chunk-rows", type=int, help="rows whose logits exist at once (default: chosen by size)")
    parser.add_argument("--repetitions", type=int, default=5, help="interleaved repetitions (default: 5)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads that PyTorch may use (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (default: 0)")
    parser.add_argument("--json", type=Path, metavar="F", help="write the figures to this file")


def run(args: argparse.Namespace) -> int:
    """Print, and write if asked, seconds and bytes of each side and their ratios.

    Raises:
        InputError: a flag that is out of range.
    """
    for name in ("ids", "hidden", "rows", "repetitions", "threads", "chunk_rows"):
        if (value := getattr(args, name)) is not None and value <= 0:
            raise InputError(f"--{name.replace('_', '-')} is {value}; it must be above 0")
    if wrong := [share for share in args.masked if not 0.0 <= share <= 1.0]:
        raise InputError(f"--masked is {wrong[0]}; a share lies between 0 and 1")
    return report_of_kernels(args, measure, print_report)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The figures, for each share of masked tokens and each side."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = args.dtype or ("bf16" if device.type == "cuda" else "fp32")
    results = []
    for masked in args.masked:
        calls, losses = make_calls(args, masked, device, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
        memory = {name: peak_bytes(call, device) for name, call in calls.items()}
        seconds = interleave(
            {name: call for name, call in calls.items() if memory[name] is not None}, args.repetitions, device
        )
        results.append({"masked": masked, "sides": sides(seconds, memory, losses)})
    shape = {name: getattr(args, name) for name in ("ids", "hidden", "rows", "chunk_rows", "seed")}
    return {
        "benchmark": "head",
        "device": device.type,
        "shape": {**shape, "dtype": dtype},
        "threads": args.threads,
        "results": results,
    }


def sides(seconds: dict[str, list[float]], memory: dict[str, int | None], losses: dict[str, float]) -> dict[str, Any]:
    """Loss, seconds and bytes of each side, and how many times ours they are; None for what memory does not hold."""
    ours, least = seconds["ours"], memory["ours"] or 1
    return {
        name: None
        if peak is None
        else {
            "loss": losses[name],
            "seconds": summary(seconds[name]),
            "peak_bytes": peak,
            "seconds_to_ours": summary([theirs / own for theirs, own in zip(seconds[name], ours, strict=True)]),
            "peak_bytes_to_ours": peak / least,
        }
        for name, peak in memory.items()
    }


def make_calls(
    args: argparse.Namespace, masked: float, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, Call], dict[str, float]]:
    """One forward and backward pass per side, on the same inputs, and its loss."""
    import torch
    import torch.nn.functional as F

    from megatron_speech.ops.cross_entropy import linear_cross_entropy

    generator = torch.Generator().manual_seed(args.seed)
    hidden = torch.randn(args.rows, args.hidden, generator=generator).to(device, dtype).requires_grad_()
    table = (torch.randn(args.ids, args.hidden, generator=generator) / args.hidden**0.5).to(device, dtype)
    table.requires_grad_()
    labels = torch.randint(0, args.ids, (args.rows,), generator=generator)
    rows = torch.randperm(args.rows, generator=generator)[: args.rows - round(masked * args.rows)].sort().values
    learned, count = labels[rows].to(device), max(1, len(rows))
    weights = torch.full((len(rows),), 1.0 / count, device=device)
    targets = torch.full_like(labels, -100).index_copy(0, rows, labels[rows]).to(device)
    rows = rows.to(device)

    def ours() -> torch.Tensor:
        own = hidden.index_select(0, rows)
        return linear_cross_entropy(own, table, learned, weights, vocab_size=args.ids, chunk_rows=args.chunk_rows).total

    def full() -> torch.Tensor:
        logits = (hidden @ table.t()).float()
        return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / count

    losses = {"ours": ours, "full": full}
    chunked = getattr(F, "linear_cross_entropy", None)  # from torch 2.13 on
    if chunked is not None and len(rows):
        options = torch.nn.LinearCrossEntropyOptions()

        def torch_chunked() -> torch.Tensor:
            result: torch.Tensor = chunked(hidden.index_select(0, rows), table, learned, options=options)
            return result

        losses["torch-chunked"] = torch_chunked

    def backward(loss: Call) -> Call:
        def call() -> torch.Tensor:
            hidden.grad = table.grad = None
            total = loss()
            total.backward()
            return total.detach()

        return call

    calls = {name: backward(loss) for name, loss in losses.items()}
    losses_found = check(calls, hidden, table, 1e-5 if dtype == torch.float32 else 2e-2)
    hidden.grad = table.grad = None
    return calls, losses_found


def check(calls: dict[str, Call], hidden: torch.Tensor, table: torch.Tensor, tolerance: float) -> dict[str, float]:
    """Compare our loss and the size of our gradients with those of full logits; returns the loss of every side."""
    import torch

    found: dict[str, list[torch.Tensor]] = {}
    for name, call in calls.items():
        try:
            loss = call()
        except torch.OutOfMemoryError:
            continue  # reported as such by peak_bytes
        assert hidden.grad is not None and table.grad is not None
        found[name] = [loss.float(), hidden.grad.float().norm(), table.grad.float().norm()]
    for ours, theirs in zip(found["ours"], found.get("full", found["ours"]), strict=True):
        if not torch.allclose(ours, theirs, rtol=tolerance, atol=1e-12):
            raise RuntimeError(f"the head disagrees with full logits: {ours.item()} instead of {theirs.item()}")
    return {name: values[0].item() for name, values in found.items()}


def interleave(calls: dict[str, Call], repetitions: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of one call: for each side, one figure per repetition. All have run before."""
    import torch

    clock = time.perf_counter if device.type == "cuda" else time.process_time

    found: dict[str, list[float]] = {name: [] for name in calls}
    for repetition in range(repetitions):
        for name in calls if repetition % 2 == 0 else reversed(list(calls)):
            if device.type == "cuda":
                torch.cuda.synchronize()
            begin = clock()
            calls[name]()
            if device.type == "cuda":
                torch.cuda.synchronize()
            found[name].append(clock() - begin)
    return found


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """The most that the allocator holds during `call` beyond what it held before; None where that is too much.

    On a CPU every allocation and release is counted, those inside of operations too.
    """
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        try:
            call()
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return None
        return torch.cuda.max_memory_allocated() - before
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with _quiet():
        profiler.start()
    call()
    with _quiet():
        profiler.stop()
    kind = torch._C._profiler._EventType.Allocation
    results: Any = profiler.profiler
    pending = list(results.kineto_results.experimental_event_tree())
    changes = []
    while pending:
        event = pending.pop()
        pending += event.children
        if event.typed[0] == kind:
            changes.append((event.start_time_ns, event.typed[1].alloc_size))
    held = peak = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        held += size
        peak = max(peak, held)
    return peak


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """PyTorch's profiler writes lines of its own to stderr when it starts and stops."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def print_report(report: dict[str, Any]) -> None:
    """The figures as lines."""
    shape, environment = report["shape"], report["environment"]
    git = environment["git"] or {"commit": "none", "modified": False}
    where = environment["devices"][0]["name"] if report["device"] == "cuda" else f"CPU, {report['threads']} thread(s)"
    print(f"head: {shape['rows']} rows × {shape['hidden']} hidden × {shape['ids']} ids, {shape['dtype']}, {where}")
    print(
        f"torch {environment['torch']}, commit {git['commit'][:12]}{' (modified)' if git['modified'] else ''}, "
        f"{report['date']}"
    )
    unit = "ms" if report["device"] == "cuda" else "CPU ms"
    for result in report["results"]:
        print(f"  {result['masked']:.0%} of the rows without loss")
        for name, side in result["sides"].items():
            if side is None:
                print(f"    {name:13s}  does not fit into memory")
                continue
            line = (
                f"    {name:13s}  {spread(side['seconds'], 1, 1e-3)} {unit}, "
                f"{side['peak_bytes'] / 2**20:,.0f} MiB beyond the inputs, loss {side['loss']:.4f}"
            )
            if name != "ours":
                line += (
                    f"; {spread(side['seconds_to_ours'], 2)} × the time and {side['peak_bytes_to_ours']:.2f} × the "
                    "memory of ours"
                )
            print(line)
