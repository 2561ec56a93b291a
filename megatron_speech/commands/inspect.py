"""`megatron-speech inspect P`: what a dataset is, and whether its bytes are whole."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
from rich.table import Table

from megatron_speech.console import output, tables
from megatron_speech.data.dataset.distributions import QUANTILES, Distribution, distributions, length_bins, plot
from megatron_speech.data.dataset.documents_table import SCHEMA, document_batches
from megatron_speech.data.dataset.indexed import TokenDataset, file_of
from megatron_speech.data.dataset.manifest import Manifest
from megatron_speech.data.dataset.totals_table import drops_table, totals_table
from megatron_speech.data.dataset.verify import Verification, verify_dataset
from megatron_speech.errors import InputError
from megatron_speech.tokens.space import TokenSpace
from megatron_speech.tokens.templates import render
from megatron_speech.wording import duration

HISTOGRAM_WIDTH = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("prefix", metavar="P", help="prefix of the dataset's files, without .bin or .idx")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read every byte, compare every file, document and total, and list all that disagrees (exit status 2)",
    )
    parser.add_argument("--plot", metavar="OUT.png", help="draw the distribution of lengths (.png, .svg or .pdf)")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="show N documents, drawn by --seed")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of documents to show (default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument(
        "--token-space", metavar="TS.json", help="the dataset's token space: needed by --sample, checked where given"
    )


def run(args: argparse.Namespace) -> int:
    """Print what the dataset is.

    Raises:
        InputError: the dataset cannot be opened, is damaged (with --verify), or is of another token space.
    """
    if args.sample < 0:
        raise InputError(f"--sample is {args.sample}, needed 0 or more")
    if args.sample and args.token_space is None:
        raise InputError("--sample shows text and codes: needed --token-space TS.json, the dataset's token space")
    space = None if args.token_space is None else TokenSpace.load(args.token_space)
    if args.verify:
        _verify(args, space)
    dataset = TokenDataset(args.prefix)
    if space is not None:
        dataset.check(space)
    found = distributions(dataset)
    description = describe(dataset, space, args.sample, args.seed, found)
    if args.verify:
        description["verified"] = True
    if args.plot is not None:
        plot(args.plot, dataset, found)
    if args.json:
        output(json.dumps(description, indent=2, ensure_ascii=False))
    else:
        _print(dataset, description)
        if args.plot is not None:
            output(f"picture: {args.plot}")
    return 0


def _verify(args: argparse.Namespace, space: TokenSpace | None) -> None:
    """Print all that disagrees.

    Raises:
        InputError: something does.
    """
    found = verify_dataset(args.prefix, space)
    if not found.findings:
        return
    if args.json:
        output(json.dumps({"prefix": args.prefix, "verified": False, **_findings(found)}, indent=2, ensure_ascii=False))
    else:
        for finding in found.findings:
            output(f"{finding.file}: {finding.problem}")
    count = len(found.findings)
    raise InputError(
        f"{args.prefix} is damaged: {count} finding{'s' if count > 1 else ''}, of which the first is "
        f"{found.findings[0].file}: {found.findings[0].problem}; restore these files, or recreate the dataset"
    )


def _findings(found: Verification) -> dict[str, Any]:
    return {
        "findings": [asdict(finding) for finding in found.findings],
        "damaged_documents": found.damaged_documents,
        "damaged": found.damaged,
    }


def describe(
    dataset: TokenDataset,
    space: TokenSpace | None = None,
    samples: int = 0,
    seed: int = 0,
    found: dict[str, Distribution] | None = None,
) -> dict[str, Any]:
    """Everything that `inspect` prints, JSON-able.

    Args:
        dataset: an opened dataset with a manifest.
        space: its token space; needed where `samples` > 0.
        samples: number of documents to render.
        seed: of their choice.
        found: the dataset's :func:`distributions`, if they are at hand.
    """
    found = distributions(dataset) if found is None else found
    result: dict[str, Any] = {
        "prefix": dataset.prefix,
        "manifest": _manifest(dataset).model_dump(),
        "schema": {field.name: str(field.type) for field in SCHEMA},
        "quantiles": {name: _quantiles(values) for name, values in found.items() if values.total},
        "histogram_tokens": length_bins(found["tokens"]),
    }
    if samples and space is not None:
        result["samples"] = _samples(dataset, space, samples, seed)
    return result


def _manifest(dataset: TokenDataset) -> Manifest:
    assert dataset.manifest is not None  # TokenDataset requires it
    return dataset.manifest


def _quantiles(values: Distribution) -> dict[str, float]:
    found = values.quantiles(QUANTILES)
    return {f"{quantile:g}": round(float(value), 6) for quantile, value in zip(QUANTILES, found, strict=True)}


def _samples(dataset: TokenDataset, space: TokenSpace, count: int, seed: int) -> list[dict[str, Any]]:
    chosen = np.sort(np.random.default_rng(seed).choice(len(dataset), min(count, len(dataset)), replace=False))
    names = ("sample_id", "language", "speaker_id", "reference_sample_id")
    rows: list[dict[str, Any]] = []
    first = 0
    for batch in document_batches(file_of(dataset.prefix, ".docs.parquet"), names, len(dataset)):
        here = chosen[(chosen >= first) & (chosen < first + batch.num_rows)] - first
        rows += batch.take(pa.array(here)).to_pylist()
        first += batch.num_rows
    return [
        {"document": i, **row, "rendered": render(space, dataset.document(i))}
        for i, row in zip(chosen.tolist(), rows, strict=True)
    ]


def _print(dataset: TokenDataset, description: dict[str, Any]) -> None:
    manifest = _manifest(dataset)
    console = tables()
    shard = f", shard {manifest.shard}" if manifest.shard is not None else ""
    seed = "several" if manifest.seed is None else manifest.seed
    console.print(
        f"{dataset.prefix}: {manifest.documents:,} {manifest.task} documents, {manifest.tokens:,} tokens of "
        f"{manifest.dtype}, {duration(manifest.totals.seconds)} of speech{shard}",
        f"codec        {manifest.codec.name}, {manifest.codec.codebooks} codebooks at {manifest.codec.frame_rate_hz:g} "
        f"frames/s, hash {manifest.codec.hash}",
        f"token space  {manifest.token_space_hash}",
        f"templates    {manifest.template_hash}",
        f"text         {manifest.tokenizer_version}, {manifest.normalization_version}",
        f"seeds        split {manifest.split_seed}, conversion {seed}",
        f"forms        {', '.join(f'{name} {count:,}' for name, count in manifest.forms.items())}",
        f"options      {json.dumps(manifest.options, ensure_ascii=False)}",
        f"columns      {', '.join(f'{name} {kind}' for name, kind in description['schema'].items())}",
        sep="\n",
        markup=False,
        soft_wrap=True,
    )
    console.print(totals_table(manifest))
    console.print(drops_table(manifest))
    console.print(_quantile_table(description["quantiles"]))
    _print_histogram(description["histogram_tokens"])
    for sample in description.get("samples", ()):
        about = ", ".join(str(sample[name]) for name in ("sample_id", "language", "speaker_id") if sample[name])
        console.print(f"document {sample['document']} ({about}): {sample['rendered']}", markup=False, soft_wrap=True)
    if description.get("verified"):
        output("verified: every byte, document and total is as it was written")


def _quantile_table(quantiles: dict[str, dict[str, float]]) -> Table:
    table = Table(title="per document")
    table.add_column("quantile")
    for quantile in QUANTILES:
        table.add_column({0.0: "min", 0.5: "median", 1.0: "max"}.get(quantile, f"{quantile:.0%}"), justify="right")
    for name, values in quantiles.items():
        table.add_row(name, *(f"{value:,.2f}".rstrip("0").rstrip(".") for value in values.values()))
    return table


def _print_histogram(bins: list[dict[str, int]]) -> None:
    most = max((entry["documents"] for entry in bins), default=0) or 1
    for entry in bins:
        bar = "█" * round(HISTOGRAM_WIDTH * entry["documents"] / most)
        output(f"{entry['from']:>9,} to {entry['below'] - 1:>9,} tokens {entry['documents']:>12,} {bar}")
