"""`megatron-speech benchmark data`: the data path, from rows to batches, beside Megatron-LM's in the same call."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_speech.errors import InputError
from megatron_speech.files import write_json

PARTS = ("text", "codes", "loader", "sizes")
DEFAULT_PARTS = "text,codes,loader"
PROFILES = ("transcripts", "paragraphs", "pages")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    add = parser.add_argument
    add("--only", default=DEFAULT_PARTS, metavar="PARTS", help=f"of {','.join(PARTS)} (default: {DEFAULT_PARTS})")
    add("--documents", type=int, default=100_000, metavar="N", help="rows to convert (default: 100000)")
    add("--workers", type=int, default=1, metavar="W", help="worker processes of every tool (default: 1)")
    add("--repetitions", type=int, default=3, metavar="R", help="interleaved repetitions, at least 3 (default: 3)")
    add("--tokens", type=int, default=100_000_000, metavar="N", help="tokens read by the loader (default: 100000000)")
    add("--profiles", default=",".join(PROFILES), help=f"kinds of text (default: {','.join(PROFILES)})")
    add("--tokenizer", type=Path, metavar="DIR", help="Hugging Face folder (default: a tokenizer is trained)")
    add("--vocabulary", type=int, default=32_000, metavar="V", help="pieces of the trained tokenizer (default: 32000)")
    add("--seed", type=int, default=0, help="of the text and the codes (default: 0)")
    add("--peer-repository", type=Path, metavar="DIR", help="a checkout of Megatron-LM to measure beside (text)")
    add("--peer-python", default=sys.executable, metavar="PYTHON", help="interpreter with what its tools import")
    add("--work-dir", type=Path, metavar="DIR", help="keep the files here (default: a temporary folder)")
    add("--json", type=Path, metavar="F", help="write the figures to this file")


def run(args: argparse.Namespace) -> int:
    """Print, and write if asked, the figures of the chosen parts.

    Raises:
        InputError: a flag that makes no sense, or a peer that does not run.
    """
    parts = _names("--only", args.only, PARTS)
    profiles = _names("--profiles", args.profiles, PROFILES)
    for name, least in (("documents", 1000), ("workers", 1), ("repetitions", 3), ("tokens", 1), ("vocabulary", 512)):
        if getattr(args, name) < least:
            raise InputError(f"--{name} is {getattr(args, name)}, needed at least {least}")
    peer = _peer(args) if args.peer_repository is not None else None
    from megatron_speech.environment import detect

    report: dict[str, Any] = {
        "benchmark": "data",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "environment": detect(),
        "options": {name: str(value) for name, value in sorted(vars(args).items()) if name != "command"},
    }
    git = report["environment"]["git"] or {"commit": "none", "modified": False}
    print(
        f"data path, {report['machine']['processor']}, {report['machine']['cores']} core(s), commit "
        f"{git['commit'][:12]}{' (modified)' if git['modified'] else ''}; {args.repetitions} interleaved repetitions, "
        "median [lowest .. highest]"
    )
    with _folder(args.work_dir) as folder:
        if "text" in parts:
            from megatron_speech.benchmark import data_text

            report["text"] = data_text.measure(
                folder,
                documents=args.documents,
                profiles=profiles,
                workers=args.workers,
                repetitions=args.repetitions,
                seed=args.seed,
                tokenizer=args.tokenizer,
                vocabulary=args.vocabulary,
                peer=peer,
            )
            data_text.print_report(report["text"])
        if "codes" in parts:
            from megatron_speech.benchmark import data_codes

            report["codes"] = data_codes.measure(
                folder, rows=args.documents, workers=args.workers, repetitions=args.repetitions, seed=args.seed
            )
            data_codes.print_report(report["codes"])
        if "sizes" in parts:
            from megatron_speech.benchmark import data_sizes

            report["sizes"] = data_sizes.measure(folder, rows=args.documents, workers=args.workers, seed=args.seed)
            data_sizes.print_report(report["sizes"])
        if "loader" in parts:
            from megatron_speech.benchmark import data_loader

            report["loader"] = data_loader.measure(
                folder, tokens=args.tokens, repetitions=args.repetitions, seed=args.seed
            )
            data_loader.print_report(report["loader"])
    if args.json is not None:
        write_json(args.json, report)
    return 0


def _names(flag: str, given: str, known: tuple[str, ...]) -> list[str]:
    names = [name for name in given.split(",") if name]
    for name in names:
        if name not in known:
            raise InputError(f"{flag} names {name!r}; needed some of {', '.join(known)}, separated by commas")
    if not names:
        raise InputError(f"{flag} is empty; needed some of {', '.join(known)}")
    return names


def _peer(args: argparse.Namespace) -> Any:
    from megatron_speech.benchmark.data_text import Peer

    peer = Peer(args.peer_repository.resolve(), args.peer_python)
    peer.check()
    return peer


@contextlib.contextmanager
def _folder(path: Path | None) -> Iterator[Path]:
    if path is not None:
        path.mkdir(parents=True, exist_ok=True)
        yield path.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="megatron-speech-benchmark-") as name:
        yield Path(name)


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, memory, and how busy the machine is as we start."""
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                processor = value.strip()
                break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"processor": processor, "cores": cores, "memory_gib": memory / 2**30, "load_average": os.getloadavg()}
