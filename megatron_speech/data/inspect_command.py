"""`megatron-speech inspect P`: what a dataset is, and whether its bytes are whole."""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
import pyarrow as pa
from rich.table import Table

from megatron_speech.data.documents_table import SCHEMA
from megatron_speech.data.indexed import TokenDataset, file_of
from megatron_speech.data.manifest import Manifest
from megatron_speech.data.report import drops_table, duration, make_console, totals_table
from megatron_speech.errors import InputError
from megatron_speech.tasks import render
from megatron_speech.token_space import TokenSpace

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
HISTOGRAM_BINS = 12
HISTOGRAM_WIDTH = 50
VERIFY_IDS = 1 << 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("prefix", metavar="P", help="prefix of the dataset's files, without .bin or .idx")
    parser.add_argument("--verify", action="store_true", help="read every byte and compare with the hashes and counts")
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
    dataset = TokenDataset(args.prefix)
    space = None
    if args.token_space is not None:
        space = TokenSpace.load(args.token_space)
        dataset.check(space)
    if args.verify:
        dataset.verify()
        if space is not None:
            verify_ids(dataset, space)
    description = describe(dataset, space, args.sample, args.seed)
    if args.verify:
        description["verified"] = True
    if args.json:
        print(json.dumps(description, indent=2, ensure_ascii=False))
    else:
        _print(dataset, description)
    return 0


def describe(dataset: TokenDataset, space: TokenSpace | None = None, samples: int = 0, seed: int = 0) -> dict[str, Any]:
    """Everything that `inspect` tells, JSON-able.

    Args:
        dataset: an opened dataset with a manifest.
        space: its token space; needed where `samples` > 0.
        samples: number of documents to render.
        seed: of their choice.
    """
    table = dataset.columns("tokens", "target_tokens", "duration_seconds")
    columns = {name: _numbers(table[name]) for name in table.column_names}
    result: dict[str, Any] = {
        "prefix": dataset.prefix,
        "manifest": _manifest(dataset).model_dump(),
        "schema": {field.name: str(field.type) for field in SCHEMA},
        "quantiles": {name: _quantiles(values) for name, values in columns.items() if len(values)},
        "histogram_tokens": _histogram(columns["tokens"]),
    }
    if samples and space is not None:
        result["samples"] = _samples(dataset, space, samples, seed)
    return result


def verify_ids(dataset: TokenDataset, space: TokenSpace) -> None:
    """Check that every id is one of the token space's.

    Raises:
        InputError: naming the first id that is not, and its document.
    """
    for start in range(0, dataset.total_tokens, VERIFY_IDS):
        ids = dataset.tokens[start : start + VERIFY_IDS]
        wrong = (ids < 0) | (ids >= space.size)
        if wrong.any():
            at = start + int(np.argmax(wrong))
            document = int(np.searchsorted(dataset.offsets, at, side="right")) - 1
            raise InputError(
                f"{file_of(dataset.prefix, '.bin')}: id {int(dataset.tokens[at])} in document {document} is outside "
                f"the token space (0 to {space.size - 1}); make the dataset anew with preprocess/preprocess_data.py"
            )


def _manifest(dataset: TokenDataset) -> Manifest:
    assert dataset.manifest is not None  # TokenDataset requires it
    return dataset.manifest


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    return column.drop_null().to_numpy()


def _quantiles(values: np.ndarray) -> dict[str, float]:
    found = np.quantile(values, QUANTILES)
    return {f"{quantile:g}": round(float(value), 6) for quantile, value in zip(QUANTILES, found, strict=True)}


def _histogram(lengths: np.ndarray) -> list[dict[str, int]]:
    """Documents by length in ids, in bins of equal width; the last one also holds the longest 0.5 %."""
    if not len(lengths):
        return []
    top = int(np.quantile(lengths, 0.995)) + 1
    bottom = int(lengths.min())
    edges = np.unique(np.linspace(bottom, max(top, bottom + 1), HISTOGRAM_BINS + 1).astype(np.int64))
    counts, _ = np.histogram(np.minimum(lengths, edges[-1]), edges)
    ends = [*edges[1:-1].tolist(), int(lengths.max()) + 1]
    return [
        {"from": start, "below": end, "documents": count}
        for start, end, count in zip(edges[:-1].tolist(), ends, counts.tolist(), strict=True)
    ]


def _samples(dataset: TokenDataset, space: TokenSpace, count: int, seed: int) -> list[dict[str, Any]]:
    chosen = np.sort(np.random.default_rng(seed).choice(len(dataset), min(count, len(dataset)), replace=False))
    names = ("sample_id", "language", "speaker_id", "reference_sample_id")
    rows = dataset.columns(*names).take(pa.array(chosen)).to_pylist()
    return [
        {"document": i, **row, "rendered": render(space, dataset.document(i))}
        for i, row in zip(chosen.tolist(), rows, strict=True)
    ]


def _print(dataset: TokenDataset, description: dict[str, Any]) -> None:
    manifest = _manifest(dataset)
    console = make_console()
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
        print("verified: every byte is as the manifest says")


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
        print(f"{entry['from']:>9,} to {entry['below'] - 1:>9,} tokens {entry['documents']:>12,} {bar}")
