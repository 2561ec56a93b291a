#!/usr/bin/env python3
"""Join token datasets into one, in the order given: ids are copied as bytes, nothing is loaded whole.

The shards I/N of one input, joined in order, give the same documents as one run over all of it.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import pyarrow.parquet as pq
from tqdm import tqdm

# A checkout runs as it is, installed or not, from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_speech.data.dataset_writer import BIN, DOCUMENTS, REJECTED, DatasetWriter
from megatron_speech.data.documents_table import SCHEMA
from megatron_speech.data.indexed import TokenDataset, file_of
from megatron_speech.data.manifest import FilterStatistics, InputEntry, Manifest, Totals, sum_counts, sum_totals
from megatron_speech.data.report import print_report
from megatron_speech.errors import InputError, command
from preprocess.pool import interrupt_on_sigterm

COPY_BYTES = 8 << 20

# What must be equal in all parts, and what to do where it is not.
AGREEMENTS = {
    "task": "merge datasets of one task",
    "dtype": "make them with one token space",
    "streams": "make them with one version",
    "codec.hash": "encode all audio with one codec",
    "token_space_hash": "make them with one token space",
    "template_hash": "make them with one version of the templates",
    "tokenizer_version": "make them with one token space",
    "normalization_version": "make them with one version of the text normalisation",
    "split_seed": "make them with one --split-seed",
    "append_eod": "make all of them with --append-eod, or none",
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--input", required=True, nargs="+", metavar="P", help="prefixes of the datasets, in order")
    parser.add_argument("--output-prefix", required=True, metavar="P", help="prefix of the joined dataset")
    arguments = parser.parse_args(argv)
    seen: dict[Path, str] = {}
    for prefix in arguments.input:
        path = Path(prefix).resolve()
        if path in seen:
            raise InputError(f"--input names {prefix} twice; its documents would be there twice")
        seen[path] = prefix
    if Path(arguments.output_prefix).resolve() in seen:
        raise InputError(f"--output-prefix {arguments.output_prefix} is one of --input; name another")
    return arguments


def open_parts(prefixes: Sequence[str]) -> list[TokenDataset]:
    """Open the datasets and check that they can be one.

    Raises:
        InputError: the first field in which two of them differ, or two that are the same.
    """
    parts = [TokenDataset(prefix) for prefix in prefixes]
    contents: dict[str, str] = {}
    for part in parts:
        for field, remedy in AGREEMENTS.items():
            found, needed = _get(_manifest(part), field), _get(_manifest(parts[0]), field)
            if found != needed:
                raise InputError(
                    f"{file_of(part.prefix, '.manifest.json')}: {field} is {found!r}, but {needed!r} in "
                    f"{parts[0].prefix}; {remedy}"
                )
        content = _manifest(part).files[BIN].sha256
        if content in contents:
            raise InputError(f"{part.prefix} holds the same ids as {contents[content]}; name each dataset once")
        contents[content] = part.prefix
    return parts


def _manifest(part: TokenDataset) -> Manifest:
    assert part.manifest is not None  # TokenDataset requires it
    return part.manifest


def _get(manifest: Manifest, field: str) -> Any:
    value: Any = manifest
    for name in field.split("."):
        value = getattr(value, name)
    return value


def copy_part(part: TokenDataset, writer: DatasetWriter, progress: tqdm[NoReturn]) -> None:
    """Append a dataset's files, checking their bytes on the way.

    Raises:
        InputError: a file does not have the SHA-256 that its manifest states.
    """
    digest = hashlib.sha256()
    with open(file_of(part.prefix, BIN), "rb") as handle:
        while chunk := handle.read(COPY_BYTES):
            digest.update(chunk)
            writer.add_raw(chunk)
            progress.update(len(chunk))
    needed = _manifest(part).files[BIN].sha256
    if digest.hexdigest() != needed:
        raise InputError(
            f"{file_of(part.prefix, BIN)}: SHA-256 is {digest.hexdigest()}, needed {needed} by its manifest: it is "
            "damaged; make this dataset anew"
        )
    writer.add_lengths(part.lengths)
    with pq.ParquetFile(file_of(part.prefix, DOCUMENTS)) as table:
        if table.schema_arrow != SCHEMA:
            raise InputError(
                f"{file_of(part.prefix, DOCUMENTS)}: its columns are not those of this version; make it anew"
            )
        for batch in table.iter_batches():
            writer.add_rows(batch)
    rejected = file_of(part.prefix, REJECTED)
    if rejected.exists():
        writer.add_rejected_lines(rejected)


def merge_manifests(manifests: Sequence[Manifest]) -> Manifest:
    """The manifest of the joined dataset, but for its files."""
    first = manifests[0]
    rate = first.codec.frame_rate_hz
    inputs: list[InputEntry] = []
    for manifest in manifests:
        inputs += [entry for entry in manifest.inputs if entry not in inputs]
    seeds = {manifest.seed for manifest in manifests}
    return first.model_copy(
        update={
            "seed": first.seed if len(seeds) == 1 else None,
            "options": {
                name: value
                for name, value in first.options.items()
                if all(name in manifest.options and manifest.options[name] == value for manifest in manifests)
            },
            "forms": sum_counts([manifest.forms for manifest in manifests]),
            "notices": sum_counts([manifest.notices for manifest in manifests]),
            "totals": sum_totals([manifest.totals for manifest in manifests], rate),
            "languages": _join([manifest.languages for manifest in manifests], rate),
            "sources": _join([manifest.sources for manifest in manifests], rate),
            "filters": FilterStatistics(
                rows=sum(manifest.filters.rows for manifest in manifests),
                kept=sum(manifest.filters.kept for manifest in manifests),
                dropped=sum_counts([manifest.filters.dropped for manifest in manifests]),
            ),
            "inputs": inputs,
            "shard": _join_shards([manifest.shard for manifest in manifests]),
        }
    )


def _join(groups: Sequence[dict[str, Totals]], rate: float) -> dict[str, Totals]:
    names = sorted({name for group in groups for name in group})
    return {name: sum_totals([group[name] for group in groups if name in group], rate) for name in names}


def _join_shards(shards: Sequence[str | None]) -> str | None:
    """None where nothing is missing: whole inputs, or all N of N shards."""
    named = [shard for shard in shards if shard is not None]
    if not named:
        return None
    count = int(named[0].partition("/")[2])
    if set(named) == {f"{index}/{count}" for index in range(count)} and len(named) == count:
        return None
    return " ".join(named)


@command
def main(argv: list[str] | None = None) -> None:
    """Open, check, copy, report."""
    arguments = parse_arguments(argv)
    parts = open_parts(arguments.input)
    total = sum(_manifest(part).files[BIN].bytes for part in parts)
    with (
        DatasetWriter(arguments.output_prefix, parts[0].dtype) as writer,
        tqdm(total=total, unit="B", unit_scale=True, desc="merge", disable=None) as progress,
    ):
        for part in parts:
            copy_part(part, writer, progress)
        manifest = writer.finish(merge_manifests([_manifest(part) for part in parts]))
    print_report(manifest)
    print(f"{arguments.output_prefix}: {manifest.documents:,} documents, {manifest.tokens:,} tokens, from {len(parts)}")


if __name__ == "__main__":
    interrupt_on_sigterm()
    sys.exit(main())
