"""Join token datasets into one, in the order given: ids are copied as bytes, nothing is loaded whole.

The shards I/N of one conversion, joined in order, give the bytes of one run over all of it. What does not belong
together, is damaged or is missing is refused by name. A stopped merge resumes after the last part that it copied whole.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from megatron_speech.console import Progress, output
from megatron_speech.data.dataset.dataset_writer import BIN, DOCUMENTS, MANIFEST, REJECTED, DatasetWriter
from megatron_speech.data.dataset.documents_table import SCHEMA
from megatron_speech.data.dataset.indexed import TokenDataset, file_of
from megatron_speech.data.dataset.manifest import FilterStatistics, InputEntry, Manifest, Totals, sum_counts, sum_totals
from megatron_speech.data.dataset.totals_table import print_report
from megatron_speech.errors import InputError, command
from megatron_speech.files import canonical_json, sha256_file
from megatron_speech.preprocess.pool import interrupt_on_sigterm
from megatron_speech.preprocess.resume import report_resume

COPY_BYTES = 8 << 20

# Raise it when the same parts come to give other bytes: an unfinished merge is then not gone on with.
MERGE_VERSION = 1

_SHOWN = 8  # names in an error

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
    "filters_hash": "make them with one --filters file",
    "split_seed": "make them with one --split-seed",
    "append_eod": "make all of them with --append-eod, or none",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.description = (__doc__ or "").split("\n")[0]
    parser.add_argument(
        "--input", required=True, nargs="+", action="extend", metavar="P", help="prefixes of the datasets, in order"
    )
    parser.add_argument("--output-prefix", required=True, metavar="P", help="prefix of the joined dataset")
    parser.add_argument(
        "--allow-missing", action="store_true", help="join shards even where others of the same conversion are missing"
    )
    parser.add_argument("--restart", action="store_true", help="start over even if a stopped merge could be resumed")


def _check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse a prefix that is named twice."""
    seen: dict[Path, str] = {}
    for prefix in arguments.input:
        path = Path(prefix).resolve()
        if path in seen:
            raise InputError(f"--input names {prefix} twice; its documents would be there twice")
        seen[path] = prefix
    if Path(arguments.output_prefix).resolve() in seen:
        raise InputError(f"--output-prefix {arguments.output_prefix} is one of --input; name another")


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
        if content in contents and len(part):
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


def check_shards(parts: Sequence[TokenDataset]) -> None:
    """Refuse a conversion of which shards are missing, or lie in another order than its rows.

    Raises:
        InputError: naming the shards that are missing.
    """
    conversions: dict[bytes, list[TokenDataset]] = {}
    for part in parts:
        if _manifest(part).shard is not None:
            conversions.setdefault(_conversion(_manifest(part)), []).append(part)
    for shards in conversions.values():
        found = [name for part in shards for name in (_manifest(part).shard or "").split()]
        count = int(found[0].partition("/")[2])
        needed = [f"{index}/{count}" for index in range(count)]
        missing = [name for name in needed if name not in found]
        inputs = ", ".join(entry.path for entry in _manifest(shards[0]).inputs)
        if missing:
            raise InputError(
                f"shard {_list(missing)} of {inputs} is missing (found {_list(found)}); "
                "name it too, or pass --allow-missing to join what is there"
            )
        if found != needed:
            raise InputError(
                f"the shards of {inputs} are named as {_list(found)}; name them in order, each once, so that the "
                "documents keep the order of the input"
            )


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _conversion(manifest: Manifest) -> bytes:
    """What the shards of one conversion share, and other datasets do not."""
    count = (manifest.shard or "").partition("/")[2].partition(" ")[0]
    inputs = [entry.model_dump() for entry in manifest.inputs]
    return canonical_json([count, manifest.seed, manifest.options, inputs])


def copy_part(part: TokenDataset, writer: DatasetWriter, progress: Progress) -> None:
    """Append a dataset's files, checking their bytes on the way.

    Raises:
        InputError: a file does not have the SHA-256 that its manifest states.
    """
    for suffix in _manifest(part).files:
        if suffix != BIN:
            _check_hash(part, suffix, sha256_file(file_of(part.prefix, suffix)))
    digest = hashlib.sha256()
    with open(file_of(part.prefix, BIN), "rb") as handle:
        while chunk := handle.read(COPY_BYTES):
            digest.update(chunk)
            writer.add_raw(chunk)
            progress.update(len(chunk))
    _check_hash(part, BIN, digest.hexdigest())
    writer.add_lengths(part.id_counts)
    with pq.ParquetFile(file_of(part.prefix, DOCUMENTS)) as table:
        if table.schema_arrow != SCHEMA:
            raise InputError(
                f"{file_of(part.prefix, DOCUMENTS)}: its columns are not those of this version; recreate it"
            )
        for batch in table.iter_batches():
            writer.add_rows(batch)
    if REJECTED in _manifest(part).files:
        writer.add_rejected_lines(file_of(part.prefix, REJECTED))


def _check_hash(part: TokenDataset, suffix: str, found: str) -> None:
    needed = _manifest(part).files[suffix].sha256
    if found != needed:
        raise InputError(
            f"{file_of(part.prefix, suffix)}: SHA-256 is {found}, needed {needed} by its manifest: it is damaged; "
            "recreate this dataset"
        )


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
            "shard": _join_shards(manifests),
        }
    )


def _join(groups: Sequence[dict[str, Totals]], rate: float) -> dict[str, Totals]:
    names = sorted({name for group in groups for name in group})
    return {name: sum_totals([group[name] for group in groups if name in group], rate) for name in names}


def _join_shards(manifests: Sequence[Manifest]) -> str | None:
    """None where nothing is missing: whole inputs, or all N of N shards of each conversion."""
    found: dict[bytes, list[str]] = {}
    for manifest in manifests:
        if manifest.shard is not None:
            found.setdefault(_conversion(manifest), []).extend(manifest.shard.split())
    if all(len(set(names)) == int(names[0].partition("/")[2]) for names in found.values()):
        return None
    return " ".join(name for names in found.values() for name in names)


def fingerprint(parts: Sequence[TokenDataset]) -> dict[str, Any]:
    """Everything that decides the output: the parts, by their manifests, in order."""
    return {
        "command": "merge_datasets",
        "version": MERGE_VERSION,
        "parts": {part.prefix: sha256_file(file_of(part.prefix, MANIFEST)) for part in parts},
        "order": [part.prefix for part in parts],
    }


def merge(parts: Sequence[TokenDataset], writer: DatasetWriter) -> Manifest:
    """Copy the parts, from the first that was not copied before."""
    done = 0 if writer.state is None else int(writer.state["parts"])
    sizes = [_manifest(part).files[BIN].bytes for part in parts]
    with Progress("merge", total=sum(sizes), unit="B", initial=sum(sizes[:done])) as progress:
        for number, part in enumerate(parts[done:], done + 1):
            copy_part(part, writer, progress)
            if writer.due:
                writer.commit({"parts": number})
    return merge_manifests([_manifest(part) for part in parts])


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command on its own, as `preprocess/merge_datasets.py` does."""
    parser = argparse.ArgumentParser(prog="merge_datasets.py")
    add_arguments(parser)
    return merge_inputs(parser.parse_args(argv))


def run(arguments: argparse.Namespace) -> int:
    """Merge, as a command of the console script."""
    interrupt_on_sigterm()
    return merge_inputs(arguments)


def merge_inputs(arguments: argparse.Namespace) -> int:
    """Open, check, copy, report."""
    _check_arguments(arguments)
    parts = open_parts(arguments.input)
    if not arguments.allow_missing:
        check_shards(parts)
    known = fingerprint(parts)
    with DatasetWriter(arguments.output_prefix, parts[0].dtype, fingerprint=known, restart=arguments.restart) as writer:
        report_resume(writer)
        manifest = writer.finish() if writer.complete else writer.finish(merge(parts, writer))
    print_report(manifest)
    output(
        f"{arguments.output_prefix}: {manifest.documents:,} documents, {manifest.tokens:,} tokens, from {len(parts)}"
    )
    return 0
