#!/usr/bin/env python3
"""Codes, pairs or text to a token dataset: P.bin, P.idx, P.manifest.json, P.docs.parquet.

The input's rows are cut into batches, which worker processes read, check, encode and compile into documents; one
writer appends them in the order of the input, so the bytes do not depend on the number of workers. Cloning and
continuation look over the whole input once before that, to choose what each sample refers to.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

# A checkout runs as it is, installed or not, from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_speech.data.dataset_writer import DatasetWriter
from megatron_speech.data.manifest import (
    CodecEntry,
    FilterStatistics,
    InputEntry,
    Manifest,
    Totals,
    sum_counts,
    sum_totals,
)
from megatron_speech.data.report import make_console, print_report
from megatron_speech.errors import InputError, command
from megatron_speech.tasks import TASKS, TEMPLATE_HASH, render
from megatron_speech.text import NORMALIZATION_VERSION
from megatron_speech.token_space import TokenSpace
from preprocess.documents import Converter, Documents, Job, Records, Work, convert_batch, index_batch, tokenizer_version
from preprocess.pool import available_cores, interrupt_on_sigterm, map_ordered
from preprocess.readers.base import BATCH_ROWS
from preprocess.readers.open import Inputs
from preprocess.references import Keys, fraction_of, previous_segment, same_speaker
from preprocess.samples import TRANSCRIPTS, SampleRules

SHOWN_DOCUMENTS = 3
SHOWN_REASONS = 3


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--task", required=True, choices=TASKS, help="what the documents are")
    add("--input", required=True, nargs="+", metavar="FILE", help="samples.jsonl with codes, text .jsonl, or .parquet")
    add("--token-space", required=True, metavar="TS.json", help="made by `megatron-speech token-space`")
    add("--output-prefix", required=True, metavar="P", help="writes P.bin P.idx P.manifest.json P.docs.parquet")
    add("--workers", type=int, default=available_cores(), help="processes; the output does not depend on it")
    add("--shard", default="0/1", metavar="I/N", help="convert the I-th (from 0) of N equal parts of the rows")
    add("--append-eod", action="store_true", help="end every document with <eos>")
    add("--max-rejected", type=float, default=0.01, help="share of unusable rows above which nothing is written")
    add("--seed", type=int, default=0, help="of the choice of references")
    add("--split-seed", type=int, default=0, help="of the later choice of validation sources; kept in the manifest")
    add("--language", metavar="TAG", help="BCP-47 tag of rows that name no language")
    add("--source", metavar="NAME", help="dataset_source of rows that name none (default: the input's file name)")
    add("--dry-run", action="store_true", help="do everything but write: totals, drops and a few documents")
    text = parser.add_argument_group("text_lm")
    text.add_argument(
        "--json-keys", nargs="+", default=["text"], metavar="KEY", help="fields with text, a document each"
    )
    tts = parser.add_argument_group("tts")
    tts.add_argument("--transcript", choices=tuple(TRANSCRIPTS), default="native", help="which transcript is the text")
    tts.add_argument(
        "--cloning",
        choices=("none", "same-speaker"),
        default="none",
        help="same-speaker: put text and speech of another recording of the speaker before the target",
    )
    tts.add_argument("--references", type=int, default=1, help="documents per sample, each with another reference")
    tts.add_argument("--plain-fraction", type=float, default=0.0, help="share of the samples that stay plain anyway")
    tts.add_argument(
        "--without-reference",
        choices=("plain", "drop"),
        default="plain",
        help="samples whose speaker has no other recording: a plain document, or none",
    )
    speech = parser.add_argument_group("speech_lm")
    speech.add_argument(
        "--continuation",
        action="store_true",
        help="put the previous segment (same source and speaker, segment_order one less) before each; "
        "first segments stay plain",
    )
    arguments = parser.parse_args(argv)
    _check_arguments(arguments)
    return arguments


def _check_arguments(arguments: argparse.Namespace) -> None:
    match = re.fullmatch(r"(\d+)/(\d+)", arguments.shard)
    if match is None or int(match[1]) >= int(match[2]):
        raise InputError(f"--shard is {arguments.shard!r}, needed I/N with I from 0 to N-1, such as 0/8")
    arguments.shard = (int(match[1]), int(match[2]))
    ranges = (("max_rejected", 0, 1), ("plain_fraction", 0, 1), ("workers", 1, 4096), ("references", 1, 64))
    for name, low, high in ranges:
        value = getattr(arguments, name)
        if not low <= value <= high:
            raise InputError(f"--{name.replace('_', '-')} is {value}, needed {low} to {high}")
    cloning = arguments.cloning != "none"
    for flag, given, allowed, where in (
        ("--json-keys", arguments.json_keys != ["text"], arguments.task == "text_lm", "--task text_lm"),
        ("--transcript", arguments.transcript != "native", arguments.task == "tts", "--task tts"),
        ("--cloning", cloning, arguments.task == "tts", "--task tts"),
        ("--references", arguments.references != 1, cloning, "--cloning same-speaker"),
        ("--plain-fraction", arguments.plain_fraction != 0, cloning, "--cloning same-speaker"),
        ("--without-reference", arguments.without_reference != "plain", cloning, "--cloning same-speaker"),
        ("--continuation", arguments.continuation, arguments.task == "speech_lm", "--task speech_lm"),
    ):
        if given and not allowed:
            raise InputError(f"{flag} is only for {where}; leave it out")


def make_job(arguments: argparse.Namespace, space: TokenSpace) -> Job:
    """What the arguments ask of a worker."""
    rules = SampleRules(
        task=arguments.task,
        transcript=arguments.transcript,
        json_keys=tuple(arguments.json_keys),
        language=arguments.language,
        dataset_source=arguments.source,
    )
    quotes = arguments.references if arguments.cloning != "none" else int(arguments.continuation)
    drop = arguments.without_reference == "drop"
    return Job(space, rules, quotes=quotes, drop_unquoted=drop, append_eod=arguments.append_eod)


@dataclass
class Tally:
    """Counts over all batches so far."""

    rows: int = 0
    kept: int = 0
    documents: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    notices: Counter[str] = field(default_factory=Counter)
    forms: Counter[str] = field(default_factory=Counter)
    totals: dict[tuple[str, str], list[Totals]] = field(default_factory=dict)
    rejected: int = 0
    reasons: list[str] = field(default_factory=list)
    shown: list[np.ndarray] = field(default_factory=list)

    def add(self, batch: Documents) -> None:
        """Count a batch in."""
        self.rows += batch.rows
        self.kept += batch.kept
        self.documents += len(batch.lengths)
        self.dropped += batch.dropped
        self.notices += batch.notices
        self.forms += batch.forms
        self.rejected += len(batch.rejected)
        for row in batch.rejected[: max(0, SHOWN_REASONS - len(self.reasons))]:
            self.reasons.append(f"{row['input']} line {row['line']}: {row['reason']}")
        for key, totals in batch.totals.items():
            self.totals.setdefault(key, []).append(totals)
        missing = SHOWN_DOCUMENTS - len(self.shown)
        if missing > 0:
            self.shown += np.split(batch.flat, np.cumsum(batch.lengths))[: min(missing, len(batch.lengths))]

    def check(self, rows: int, max_rejected: float, *, last: bool) -> None:
        """Refuse an input with too many unusable rows, as soon as it is sure; at the end also one without any usable.

        Raises:
            InputError: saying how many rows were rejected by which rule, and the first reasons.
        """
        if self.rejected <= max_rejected * rows and not (last and self.kept == 0):
            return
        if self.kept == 0 and set(self.dropped) == {"no_tokens"}:
            raise InputError(
                f"the text tokenizer yields nothing: none of the {self.rows:,} texts looked at gave a token; "
                "make a token space with a trained tokenizer, or with `bytes`"
            )
        rules = ", ".join(f"{rule} {count:,}" for rule, count in self.dropped.most_common())
        limit = f"more than --max-rejected {max_rejected:g} of the rows"
        raise InputError(
            f"{sum(self.dropped.values()):,} of the {self.rows:,} rows looked at ({rows:,} in all) cannot be used "
            f"({rules}), {limit if self.kept else 'and no row is left'}; nothing was written; "
            f"first: {'; '.join(self.reasons) or rules}"
        )


def choose_quotes(
    arguments: argparse.Namespace, inputs: Inputs, job: Job, folder: Path
) -> tuple[Records, np.ndarray, np.ndarray]:
    """Look over the whole input: (records of all rows, candidates int64 [rows, n], bool [rows] of rows kept plain)."""
    records = Records(folder / "records.bin", folder / "records.npy")
    keys: list[Keys] = []
    sizes: list[np.ndarray] = []
    batches = inputs.batches(0, inputs.rows)
    indexed = map_ordered(
        index_batch, batches, workers=_workers(arguments, inputs.rows), make_state=Converter, arguments=(job,)
    )
    with (
        contextlib.closing(indexed),
        open(records.data, "wb") as handle,
        tqdm(total=inputs.rows, unit="row", desc="choose references", disable=None) as progress,
    ):
        for part in indexed:
            keys.append(part.keys)
            sizes.append(np.array([len(record) for record in part.records], dtype=np.int64))
            handle.writelines(part.records)
            progress.update(len(part.keys))
        handle.write(b"\0")  # an empty file cannot be mapped
    np.save(records.offsets, np.cumsum(np.concatenate([[0], *sizes])))
    joined = Keys.join(keys)
    choose = previous_segment if arguments.continuation else same_speaker
    return (
        records,
        choose(joined, job.quotes, arguments.seed),
        fraction_of(joined.sample, arguments.plain_fraction, arguments.seed),
    )


def _workers(arguments: argparse.Namespace, rows: int) -> int:
    return min(arguments.workers, -(-rows // BATCH_ROWS))


def documents(
    arguments: argparse.Namespace, inputs: Inputs, job: Job, rows: range, folder: Path
) -> Generator[Documents, None, None]:
    """Documents of the shard's rows, batch by batch, in the order of the input."""
    batches = inputs.batches(rows.start, rows.stop)
    if job.quotes:
        records, candidates, plain = choose_quotes(arguments, inputs, job, folder)
        job = Job(**{**job.__dict__, "records": records})
        work = _work_with_quotes(batches, rows.start, candidates, plain)
    else:
        work = (Work(batch) for batch in batches)
    return map_ordered(
        convert_batch, work, workers=_workers(arguments, len(rows)), make_state=Converter, arguments=(job,)
    )


def _work_with_quotes(batches: Iterator[Any], row: int, candidates: np.ndarray, plain: np.ndarray) -> Iterator[Work]:
    for batch in batches:
        yield Work(batch, candidates[row : row + batch.rows], plain[row : row + batch.rows])
        row += batch.rows


def make_manifest(arguments: argparse.Namespace, inputs: Inputs, space: TokenSpace, tally: Tally) -> Manifest:
    """The manifest, but for what the writer knows (files, documents, tokens)."""
    rate = space.codec.frame_rate_hz
    groups = {key: sum_totals(parts, rate) for key, parts in tally.totals.items()}
    options: dict[str, Any] = {"language": arguments.language, "source": arguments.source}
    if arguments.task == "text_lm":
        options["json_keys"] = arguments.json_keys
    elif arguments.task == "speech_lm":
        options["continuation"] = arguments.continuation
    else:
        for name in ("transcript", "cloning", "references", "plain_fraction", "without_reference"):
            options[name] = getattr(arguments, name)
    index, count = arguments.shard
    return Manifest(
        task=arguments.task,
        dtype=np.dtype(space.dtype).name,
        documents=tally.documents,
        tokens=sum(part.tokens for part in groups.values()),
        token_space_hash=space.hash,
        template_hash=TEMPLATE_HASH,
        codec=CodecEntry(
            name=space.codec.name, hash=space.codec.hash, frame_rate_hz=rate, codebooks=space.codebook_count
        ),
        tokenizer_version=tokenizer_version(space),
        normalization_version=NORMALIZATION_VERSION,
        split_seed=arguments.split_seed,
        seed=arguments.seed,
        append_eod=arguments.append_eod,
        options=options,
        forms=sum_counts([tally.forms]),
        notices=sum_counts([tally.notices]),
        totals=sum_totals(groups.values(), rate),
        languages=_by(groups, 0, rate),
        sources=_by(groups, 1, rate),
        filters=FilterStatistics(rows=tally.rows, kept=tally.kept, dropped=sum_counts([tally.dropped])),
        inputs=[
            InputEntry(path=reader.path, bytes=Path(reader.path).stat().st_size, rows=reader.rows)
            for reader in inputs.readers
        ],
        shard=f"{index}/{count}" if count > 1 else None,
        files={},
    )


def _by(groups: dict[tuple[str, str], Totals], part: int, rate: float) -> dict[str, Totals]:
    names = sorted({key[part] for key in groups})
    return {name: sum_totals([totals for key, totals in groups.items() if key[part] == name], rate) for name in names}


def convert(arguments: argparse.Namespace, writer: DatasetWriter | None, folder: Path) -> None:
    """Convert, and write if there is a writer.

    Raises:
        InputError: unusable arguments or input.
    """
    space = TokenSpace.load(arguments.token_space)
    inputs = Inputs(arguments.input)
    index, count = arguments.shard
    rows = range(inputs.rows * index // count, inputs.rows * (index + 1) // count)
    if not rows:
        raise InputError(f"--shard {index}/{count} holds none of the {inputs.rows:,} rows; use fewer shards")
    tally = Tally()
    stream = documents(arguments, inputs, make_job(arguments, space), rows, folder)
    # closing: an error here must end the workers now, not when the generator is collected
    with contextlib.closing(stream), tqdm(total=len(rows), unit="row", desc=arguments.task, disable=None) as progress:
        for batch in stream:
            tally.add(batch)
            tally.check(len(rows), arguments.max_rejected, last=False)
            if writer is not None:
                writer.add(batch.flat, batch.lengths, batch.table)
                writer.add_rejected(batch.rejected)
            progress.update(batch.rows)
    tally.check(len(rows), arguments.max_rejected, last=True)
    manifest = make_manifest(arguments, inputs, space, tally)
    if writer is not None:
        manifest = writer.finish(manifest)
    print_report(manifest)
    if writer is not None:
        size = manifest.files[".bin"].bytes
        counts = f"{manifest.documents:,} documents, {manifest.tokens:,} tokens, {size:,} bytes"
        print(f"{arguments.output_prefix}: {counts}")
        return
    console = make_console()
    for i, document in enumerate(tally.shown):
        console.print(f"document {i}: {render(space, document)}", markup=False, soft_wrap=True)
    print("dry run: nothing was written")


@command
def main(argv: list[str] | None = None) -> None:
    """Parse, convert, report."""
    arguments = parse_arguments(argv)
    _check_paths(arguments)
    if arguments.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            convert(arguments, None, Path(folder))
        return
    space = TokenSpace.load(arguments.token_space)
    with DatasetWriter(arguments.output_prefix, space.dtype) as writer:
        convert(arguments, writer, writer.folder)


def _check_paths(arguments: argparse.Namespace) -> None:
    outputs = {Path(f"{arguments.output_prefix}{suffix}").resolve() for suffix in (".docs.parquet", ".rejected.jsonl")}
    for path in arguments.input:
        if Path(path).resolve() in outputs:
            raise InputError(f"input {path} would be overwritten by --output-prefix {arguments.output_prefix}")


if __name__ == "__main__":
    interrupt_on_sigterm()
    sys.exit(main())
