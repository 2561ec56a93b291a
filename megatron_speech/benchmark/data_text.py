"""Text preprocessing: ours against Megatron-LM's `tools/preprocess_data.py`, same text, same tokenizer, same workers.

Both tools run as their users run them, as commands. Their start-up (interpreter, imports, workers) is measured by the
same command over a few documents and subtracted, so that neither a small corpus nor slow imports decide the ratio;
whole times are reported beside. The token ids of every document are compared.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_speech.benchmark.data_corpus import PROFILES, BenchmarkCorpus, train_tokenizer
from megatron_speech.benchmark.measure import (
    Measured,
    interleaved,
    marginal_rates,
    module_environment,
    ratios,
    run_measured,
    script,
    spread,
)
from megatron_speech.data.dataset.indexed import TokenDataset
from megatron_speech.errors import InputError
from megatron_speech.tokens.space import CodecDescription, TokenSpace

IDLE_DOCUMENTS = 32
# Documents of a profile for one of transcripts: about as many words in each profile.
SHARES = {"transcripts": 1.0, "paragraphs": 0.25, "pages": 0.04}

FLAT_CODEC = CodecDescription("flat-50hz", "f" * 64, 16_000, 50.0, ("codes",), (65_536,))
"""One codebook of 65,536 codes at 50 Hz: the first family's id space, without a codec to run."""


@dataclass(frozen=True)
class Peer:
    """A checkout of Megatron-LM and an interpreter that can run its tools."""

    repository: Path
    python: str

    def check(self) -> None:
        """Refuse a folder that is no checkout, before anything is measured.

        Raises:
            InputError: there is no tools/preprocess_data.py.
        """
        if not self.tool.is_file():
            raise InputError(
                f"--peer-repository {self.repository} holds no tools/preprocess_data.py; name a checkout of Megatron-LM"
            )

    @property
    def tool(self) -> Path:
        """The peer's preprocessing tool."""
        return self.repository / "tools" / "preprocess_data.py"

    def command(self, text: Path, tokenizer: Path, prefix: Path, workers: int) -> list[str]:
        """Its command line for a jsonl file."""
        return [
            *(self.python, str(self.tool), "--input", str(text), "--output-prefix", str(prefix)),
            *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer)),
            *("--workers", str(workers), "--append-eod", "--log-interval", "1000000"),
        ]

    @property
    def environment(self) -> dict[str, str]:
        """Lets the tool find its own megatron before any that is installed."""
        return {"PYTHONPATH": str(self.repository)}

    def describe(self) -> dict[str, Any]:
        """Commit and versions of the peer."""
        git = ["git", "-C", str(self.repository), "rev-parse", "HEAD"]
        done = subprocess.run(git, capture_output=True, text=True, check=False)
        commit = done.stdout.strip() if done.returncode == 0 and (self.repository / ".git").exists() else None
        code = (
            "import importlib.metadata as m, platform, json\n"
            "names = ('torch', 'transformers', 'tokenizers', 'numpy')\n"
            "found = {d.metadata['Name'].lower(): d.version for d in m.distributions() if d.metadata['Name']}\n"
            "print(json.dumps({'python': platform.python_version(), **{n: found.get(n) for n in names}}))\n"
        )
        versions = json.loads(run_measured([self.python, "-c", code]).output.splitlines()[-1])
        return {"commit": commit, "megatron-core": _package_version(self.repository), **versions}


def _package_version(repository: Path) -> str | None:
    path = repository / "megatron" / "core" / "package_info.py"
    names: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        name, equals, value = line.partition(" = ")
        if equals and name in ("MAJOR", "MINOR", "PATCH"):
            names[name] = value.split("#")[0].strip().strip("'\"")
    return ".".join(names.get(name, "?") for name in ("MAJOR", "MINOR", "PATCH")) if names else None


def our_command(text: Path, space: Path, prefix: Path, workers: int) -> list[str]:
    """Our command line for a jsonl file."""
    return [
        *script("megatron_speech.preprocess.preprocess_data"),
        *("--task", "text_lm", "--input", str(text), "--token-space", str(space), "--output-prefix", str(prefix)),
        *("--workers", str(workers), "--append-eod"),
    ]


def read_documents(prefix: Path) -> tuple[np.ndarray, np.ndarray]:
    """(ids of all documents end to end, int64 ids per document) of a .bin and .idx, whoever wrote them."""
    dataset = TokenDataset(prefix, require_manifest=False)
    return np.asarray(dataset.tokens), np.asarray(dataset.lengths, dtype=np.int64)


def compare_ids(ours: Path, theirs: Path) -> dict[str, Any]:
    """Whether document by document the text ids are the same: ours are `<bos> text <eos>`, theirs `text eod`."""
    a, a_lengths = read_documents(ours)
    b, b_lengths = read_documents(theirs)
    result: dict[str, Any] = {"documents": len(a_lengths), "documents_peer": len(b_lengths), "text_ids": 0}
    if len(a_lengths) != len(b_lengths):
        return {**result, "identical": False, "differing_documents": None}
    inner = a_lengths - 2
    differs = inner != b_lengths - 1
    a_ends, b_ends = np.cumsum(a_lengths), np.cumsum(b_lengths)
    if differs.any():
        return {**result, "identical": False, "differing_documents": int(differs.sum())}
    a_text, b_text = np.ones(len(a), bool), np.ones(len(b), bool)
    a_text[a_ends - 1] = a_text[a_ends - a_lengths] = b_text[b_ends - 1] = False
    unequal = a[a_text].astype(np.int64) != b[b_text].astype(np.int64)
    differing = len(np.unique(np.searchsorted(np.cumsum(inner), np.flatnonzero(unequal), side="right")))
    return {**result, "text_ids": len(unequal), "identical": differing == 0, "differing_documents": differing}


def prepare(folder: Path, tokenizer: Path | None, vocabulary: int, seed: int) -> tuple[Path, Path]:
    """(tokenizer folder, token space) in `folder`; the tokenizer is trained there unless one is given."""
    if tokenizer is None:
        tokenizer = folder / "tokenizer"
        train_tokenizer(tokenizer, vocabulary, seed)
    space = folder / "token_space.json"
    TokenSpace.build(tokenizer, FLAT_CODEC).save(space)
    return tokenizer, space


def measure(
    folder: Path,
    *,
    documents: int,
    profiles: list[str],
    workers: int,
    repetitions: int,
    seed: int,
    tokenizer: Path | None,
    vocabulary: int,
    peer: Peer | None,
) -> dict[str, Any]:
    """Figures of each profile; `documents` are those of the transcripts, longer ones are fewer by `SHARES`."""
    tokenizer, space = prepare(folder, tokenizer, vocabulary, seed)
    report: dict[str, Any] = {"workers": workers, "vocabulary": TokenSpace.load(space).text_size, "profiles": {}}
    if peer is not None:
        report["peer"] = peer.describe()
    for profile in profiles:
        count = max(IDLE_DOCUMENTS * 2, round(documents * SHARES[profile]))
        corpus = BenchmarkCorpus(profile, seed)
        full, few = folder / f"{profile}.jsonl", folder / f"{profile}.few.jsonl"
        about = corpus.write_jsonl(full, count)
        corpus.write_jsonl(few, IDLE_DOCUMENTS)
        runs = {}
        for name, text in (("full", full), ("few", few)):
            runs[f"ours {name}"] = _runner(
                our_command(text, space, folder / f"ours-{name}", workers), module_environment()
            )
            if peer is not None:
                theirs = peer.command(text, tokenizer, folder / f"peer-{name}", workers)
                runs[f"peer {name}"] = _runner(theirs, peer.environment)
        found = interleaved(runs, repetitions)
        _, lengths = read_documents(folder / "ours-full")
        result: dict[str, Any] = {
            **about,
            "median_words": PROFILES[profile].median_words,
            "tokens": int(lengths.sum()),
            "ours": marginal_rates(count - IDLE_DOCUMENTS, found["ours full"], found["ours few"]),
        }
        if peer is not None:
            result["peer"] = marginal_rates(count - IDLE_DOCUMENTS, found["peer full"], found["peer few"])
            result["ratio"] = ratios(result["ours"], result["peer"])
            result["ids"] = compare_ids(folder / "ours-full", folder / "peer-full_text_document")
        report["profiles"][profile] = result
    return report


def _runner(command: list[str], environment: dict[str, str]) -> Any:
    def run() -> Measured:
        return run_measured(command, environment)

    return run


def print_report(report: dict[str, Any]) -> None:
    """The figures as lines."""
    print(f"text, {report['workers']} worker(s), vocabulary {report['vocabulary']:,}, documents per CPU second:")
    for profile, result in report["profiles"].items():
        line = f"  {profile}: {result['documents']:,} documents of about {result['median_words']:g} words"
        line += f", {spread(result['ours']['per_cpu_second'], 0)}"
        if "peer" in result:
            line += (
                f"; Megatron-LM {spread(result['peer']['per_cpu_second'], 0)}; ratio "
                f"{spread(result['ratio']['per_cpu_second'], 2)} by CPU, {spread(result['ratio']['per_second'], 2)} by "
                f"wall; ids {'identical' if result['ids']['identical'] else 'DIFFER'}"
            )
        print(line)
    if "peer" not in report:
        print("  no peer: name a Megatron-LM checkout with --peer-repository", file=sys.stderr)
