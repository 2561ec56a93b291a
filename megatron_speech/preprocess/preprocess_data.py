"""Codes, pairs or text to a token dataset: P.bin, P.idx, P.manifest.json, P.docs.parquet.

The input's rows are cut into batches, which worker processes read, check, encode and compile into documents; one
writer appends them in the order of the input, so the bytes do not depend on the number of workers. Cloning and
continuation index the whole input once before that, to choose the reference of each sample.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import tempfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_speech import __version__
from megatron_speech.console import Progress, output, tables
from megatron_speech.data.dataset.dataset_writer import BIN, DOCUMENTS, IDX, MANIFEST, REJECTED, DatasetWriter
from megatron_speech.data.dataset.documents_table import SCHEMA
from megatron_speech.data.dataset.manifest import (
    CodecEntry,
    FilterStatistics,
    InputEntry,
    Manifest,
    Totals,
    sum_counts,
    sum_totals,
)
from megatron_speech.data.dataset.totals_table import print_report
from megatron_speech.errors import InputError, command
from megatron_speech.files import sha256_hex
from megatron_speech.preprocess.documents import (
    ConversionJob,
    Converter,
    IndexedRows,
    Records,
    Work,
    convert_batch,
    index_batch,
    tokenizer_version,
)
from megatron_speech.preprocess.fields import MAP_HELP, parse_map, warn_of_unused
from megatron_speech.preprocess.filters import Filters, find_duplicates
from megatron_speech.preprocess.pool import available_cores, interrupt_on_sigterm, map_ordered
from megatron_speech.preprocess.prepass import index_input
from megatron_speech.preprocess.readers.base import BATCH_ROWS, ReadOptions
from megatron_speech.preprocess.readers.open import InputFiles, input_entries
from megatron_speech.preprocess.references import following_segments, fraction_of, previous_segment, same_speaker
from megatron_speech.preprocess.resume import report_resume
from megatron_speech.preprocess.samples import TRANSCRIBED, TRANSCRIPTS, SampleRules
from megatron_speech.preprocess.tally import Tally
from megatron_speech.tokens.normalization import NORMALIZATION_VERSION
from megatron_speech.tokens.space import TokenSpace
from megatron_speech.tokens.templates import TASKS, render, template_hash, templates

# Raise it when the same arguments and input come to mean other bytes: unfinished work is then not gone on with.
CONVERSION_VERSION = 2

# Arguments that do not decide the output; the token space and the filters do by their hash, not by their path.
UNDECIDING = ("workers", "output_prefix", "token_space", "dry_run", "restart", "filters")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.description = (__doc__ or "").split("\n")[0]
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    add = parser.add_argument
    add("--task", required=True, choices=TASKS, help="what the documents are")
    add(
        "--input",
        required=True,
        nargs="+",
        action="extend",
        metavar="FILE",
        help="paths, URLs, globs or brace ranges of .jsonl, .json, .parquet or .tar (.gz and .zst too), X.offsets.npy, "
        "a vectorised folder, S_input_ids.memmap, a megatron .idx, or what docs/data.md lists; repeatable",
    )
    add("--input-tokenizer", metavar="DIR", help="tokenizer that wrote S_input_ids.memmap or S_pretraining_codes.npy")
    add(
        "--input-eod",
        type=int,
        metavar="ID",
        help="id that ends the documents of a megatron .idx, taken off them (default: <eos> of the token space)",
    )
    add("--token-space", required=True, metavar="TS.json", help="made by `megatron-speech token-space`")
    add("--output-prefix", required=True, metavar="P", help="writes P.bin P.idx P.manifest.json P.docs.parquet")
    add("--workers", type=int, default=available_cores(), help="processes; the output does not depend on it")
    add("--shard", default="0/1", metavar="I/N", help="convert the I-th (from 0) of N equal parts of the rows")
    add("--append-eod", action="store_true", help="end every document with <eos>")
    add("--max-rejected", type=float, default=0.01, help="share of unusable rows above which nothing is written")
    add("--filters", metavar="FILE.yaml", help="rules that drop rows; each drop is counted under its rule's name")
    add(
        "--max-unknown",
        type=float,
        default=0.01,
        help="share of text tokens that the tokenizer cannot spell above which nothing is written",
    )
    add("--seed", type=int, default=0, help="of the choice of references")
    add("--split-seed", type=int, default=0, help="of the later choice of validation sources; kept in the manifest")
    add("--language", metavar="TAG", help="BCP-47 tag of rows that name no language")
    add("--source", metavar="NAME", help="dataset_source of rows that name none (default: the input's file name)")
    add("--map", action="append", metavar="NAME=THEIRS", help=MAP_HELP)
    add("--dry-run", action="store_true", help="do everything but write: totals, drops and a few documents")
    add("--first-rows", type=int, metavar="N", help="with --dry-run: read the first N rows only")
    add("--restart", action="store_true", help="start over even if a stopped conversion could be resumed")
    text = parser.add_argument_group("text_lm")
    text.add_argument(
        "--json-keys",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY",
        help="fields with text, a document each (text where none is named)",
    )
    add(
        "--transcript",
        choices=tuple(TRANSCRIPTS),
        default="native",
        help=f"which transcript is the text of {', '.join(TRANSCRIBED)} (%(default)s)",
    )
    add(
        "--control-tags",
        action="store_true",
        help="[[pause]] in a text is the token that the token space declares (token-space --control); else it is text",
    )
    tts = parser.add_argument_group("tts")
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
    interleaved = parser.add_argument_group("interleaved")
    interleaved.add_argument(
        "--interleave",
        type=int,
        default=4,
        metavar="N",
        help="segments of a recording (segment_order) in a document, in turn as text and as speech (%(default)s)",
    )
    speech = parser.add_argument_group("speech_lm")
    speech.add_argument(
        "--continuation",
        action="store_true",
        help="put the previous segment (same source and speaker, segment_order one less) before each; "
        "first segments stay plain",
    )


def _checked(arguments: argparse.Namespace) -> argparse.Namespace:
    """The arguments as the conversion reads them; what needs no input to be refused is refused."""
    arguments = argparse.Namespace(**{name: value for name, value in vars(arguments).items() if name != "command"})
    arguments.json_keys = arguments.json_keys or ["text"]
    _check_arguments(arguments)
    arguments.map = parse_map(arguments.map)
    arguments.filters = Filters.load(arguments.filters, arguments.task) if arguments.filters else Filters()
    return arguments


def _check_arguments(arguments: argparse.Namespace) -> None:
    match = re.fullmatch(r"(\d+)/(\d+)", arguments.shard)
    if match is None or int(match[1]) >= int(match[2]):
        raise InputError(f"--shard is {arguments.shard!r}, needed I/N with I from 0 to N-1, such as 0/8")
    arguments.shard = (int(match[1]), int(match[2]))
    if arguments.first_rows is not None and (arguments.first_rows < 1 or not arguments.dry_run):
        raise InputError(
            f"--first-rows {arguments.first_rows} is only for --dry-run, and needs 1 or more; leave it out"
        )
    shares = [(name, 0, 1) for name in ("max_rejected", "max_unknown", "plain_fraction")]
    ranges = (*shares, ("workers", 1, 4096), ("references", 1, 64), ("interleave", 2, 64))
    for name, low, high in ranges:
        value = getattr(arguments, name)
        if not low <= value <= high:
            raise InputError(f"--{name.replace('_', '-')} is {value}, needed {low} to {high}")
    cloning = arguments.cloning != "none"
    for flag, given, allowed, where in (
        ("--json-keys", arguments.json_keys != ["text"], arguments.task == "text_lm", "--task text_lm"),
        ("--transcript", arguments.transcript != "native", arguments.task in TRANSCRIBED, "tasks with transcripts"),
        ("--control-tags", arguments.control_tags, arguments.task != "speech_lm", "tasks with text"),
        ("--interleave", arguments.interleave != 4, arguments.task == "interleaved", "--task interleaved"),
        ("--cloning", cloning, arguments.task == "tts", "--task tts"),
        ("--references", arguments.references != 1, cloning, "--cloning same-speaker"),
        ("--plain-fraction", arguments.plain_fraction != 0, cloning, "--cloning same-speaker"),
        ("--without-reference", arguments.without_reference != "plain", cloning, "--cloning same-speaker"),
        ("--continuation", arguments.continuation, arguments.task == "speech_lm", "--task speech_lm"),
    ):
        if given and not allowed:
            raise InputError(f"{flag} is only for {where}; leave it out")


def make_job(arguments: argparse.Namespace, space: TokenSpace, inputs: InputFiles) -> ConversionJob:
    """What the arguments ask of a worker."""
    rules = SampleRules(
        task=arguments.task,
        transcript=arguments.transcript,
        json_keys=tuple(arguments.json_keys),
        language=arguments.language,
        dataset_source=arguments.source,
        given_names=arguments.map,
        stems=inputs.stems(),
    )
    references = arguments.references if arguments.cloning != "none" else int(arguments.continuation)
    drop = arguments.without_reference == "drop"
    return ConversionJob(
        space,
        rules,
        references=references,
        drop_without_reference=drop,
        interleave=arguments.interleave if arguments.task == "interleaved" else 0,
        seed=arguments.seed,
        append_eod=arguments.append_eod,
        control_tags=arguments.control_tags,
        filters=arguments.filters,
    )


def _workers(arguments: argparse.Namespace, rows: int | None) -> int:
    return arguments.workers if rows is None else min(arguments.workers, -(-rows // BATCH_ROWS))


@dataclass(frozen=True)
class Choices:
    """What was decided from the index of the whole input, row by row."""

    rows: int
    records: Records
    candidates: np.ndarray | None = None  # int64 [rows, candidates]: rows that may be the reference of each row
    plain: np.ndarray | None = None  # bool [rows]: stays plain all the same
    duplicates: np.ndarray | None = None  # bool [rows]: repeats an earlier row


def choose(arguments: argparse.Namespace, inputs: InputFiles, job: ConversionJob, folder: Path) -> Choices:
    """Index the whole input, and choose the reference of each row."""
    known, first_rows = inputs.known_rows, arguments.first_rows

    def index(start: int) -> Generator[IndexedRows, None, None]:
        batches = inputs.batches(start, first_rows)
        return map_ordered(
            index_batch, batches, workers=_workers(arguments, known), make_state=Converter, arguments=(job,)
        )

    indexed = index_input(folder / "look", index, known, "index the input")
    keys, duplicates = indexed.keys, None
    if job.filters.has_duplicate_rule:
        duplicates = find_duplicates(keys.content_low, keys.content_high)
        keys = replace(keys, usable=keys.usable & ~duplicates)
    choices = Choices(rows=len(keys), records=indexed.records, duplicates=duplicates)
    if job.interleave:
        return replace(choices, candidates=following_segments(keys, job.interleave))
    if not job.references:
        return choices
    pick = previous_segment if arguments.continuation else same_speaker
    return replace(
        choices,
        candidates=pick(keys, job.references, arguments.seed),
        plain=fraction_of(keys.sample, arguments.plain_fraction, arguments.seed),
    )


def _work(batches: Iterator[Any], row: int, choices: Choices | None) -> Iterator[Work]:
    for batch in batches:
        mine = slice(row, row + batch.rows)
        columns = (choices.candidates, choices.plain, choices.duplicates) if choices is not None else ()
        yield Work(batch, *(None if column is None else column[mine] for column in columns))
        row += batch.rows


def shard_rows(arguments: argparse.Namespace, inputs: InputFiles, choices: Choices | None) -> tuple[int, int | None]:
    """The first row of the shard, and the one after its last; None if that is the end, wherever it is.

    Rows are counted only where that takes no pass over the data, or where a shard needs it.
    """
    index, count = arguments.shard
    if choices is not None:
        rows = choices.rows
    elif count == 1 and inputs.known_rows is None:
        return 0, arguments.first_rows
    else:
        rows = inputs.rows
    if arguments.first_rows is not None:
        rows = min(rows, arguments.first_rows)
    start, stop = rows * index // count, rows * (index + 1) // count
    if start == stop and rows:
        raise InputError(f"--shard {index}/{count} holds none of the {rows:,} rows; use fewer shards")
    return start, stop


def make_manifest(arguments: argparse.Namespace, inputs: InputFiles, space: TokenSpace, tally: Tally) -> Manifest:
    """The manifest, but for what the writer knows (files, documents, tokens)."""
    rate = space.codec.frame_rate_hz
    groups = {key: sum_totals([totals], rate) for key, totals in tally.totals.items()}
    options: dict[str, Any] = {"language": arguments.language, "source": arguments.source}
    options["filters"] = arguments.filters.resolved()
    if arguments.control_tags:
        options["control_tags"] = True
    if arguments.map:
        options["map"] = dict(arguments.map)
    if arguments.task == "text_lm":
        options["json_keys"] = arguments.json_keys
    elif arguments.task == "speech_lm":
        options["continuation"] = arguments.continuation
    elif arguments.task == "asr":
        options["transcript"] = arguments.transcript
    elif arguments.task == "interleaved":
        options |= {"transcript": arguments.transcript, "interleave": arguments.interleave}
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
        template_hash=template_hash(arguments.task),
        codec=CodecEntry(
            name=space.codec.name, hash=space.codec.hash, frame_rate_hz=rate, codebooks=space.codebook_count
        ),
        tokenizer_version=tokenizer_version(space),
        normalization_version=NORMALIZATION_VERSION,
        split_seed=arguments.split_seed,
        seed=arguments.seed,
        append_eod=arguments.append_eod,
        options=options,
        filters_hash=arguments.filters.hash,
        forms=sum_counts([tally.forms]),
        notices=sum_counts([tally.notices]),
        totals=sum_totals(groups.values(), rate),
        languages=_by(groups, 0, rate),
        sources=_by(groups, 1, rate),
        filters=FilterStatistics(rows=tally.rows, kept=tally.kept, dropped=sum_counts([tally.dropped])),
        inputs=[InputEntry(path=path, bytes=size, rows=rows) for path, size, rows in input_entries(inputs)],
        shard=f"{index}/{count}" if count > 1 else None,
        files={},
    )


def _by(groups: dict[tuple[str, str], Totals], part: int, rate: float) -> dict[str, Totals]:
    names = sorted({key[part] for key in groups})
    return {name: sum_totals([totals for key, totals in groups.items() if key[part] == name], rate) for name in names}


def convert(
    arguments: argparse.Namespace, space: TokenSpace, inputs: InputFiles, writer: DatasetWriter | None, folder: Path
) -> tuple[Manifest, Tally]:
    """Convert, and write if there is a writer, from where it stopped.

    Raises:
        InputError: unusable arguments or input.
    """
    job = make_job(arguments, space, inputs)
    choices = choose(arguments, inputs, job, folder) if job.needs_index else None
    if choices is not None and (job.references or job.interleave):
        job = replace(job, records=choices.records)
    first, stop = shard_rows(arguments, inputs, choices)
    rows = None if stop is None else stop - first
    tally = Tally() if writer is None or writer.state is None else Tally.from_json(writer.state)
    start = first + tally.rows
    stream = map_ordered(
        convert_batch,
        _work(inputs.batches(start, stop), start, choices),
        workers=_workers(arguments, rows),
        make_state=Converter,
        arguments=(job,),
    )
    # closing: an error here must end the workers now, not when the generator is collected
    with (
        contextlib.closing(stream),
        Progress(arguments.task, total=rows, unit="row", initial=tally.rows) as progress,
    ):
        for batch in stream:
            tally.add(batch)
            tally.check(rows, arguments.max_rejected, last=False)
            if writer is not None:
                writer.add(batch.flat, batch.lengths, batch.table)
                writer.add_rejected(batch.rejected)
                if writer.due:
                    writer.commit(tally.to_json())
            progress.update(batch.rows)
    tally.check(rows, arguments.max_rejected, last=True)
    tally.check_unknown(arguments.max_unknown)
    warn_of_unused(arguments.map, tally.notices)
    return make_manifest(arguments, inputs, space, tally), tally


def fingerprint(arguments: argparse.Namespace, inputs: InputFiles, space: TokenSpace) -> dict[str, Any]:
    """Everything that decides the output, and so whether unfinished work can be gone on with.

    Files of codes that rows name are not checked: there may be one for each row.
    """
    options = {name: value for name, value in vars(arguments).items() if name not in UNDECIDING}
    return {
        "command": "preprocess_data",
        "version": f"{__version__}.{CONVERSION_VERSION}",
        "options": options,
        "inputs": {str(entry["path"]): entry for entry in inputs.fingerprints()},
        "token_space": space.hash,
        "filters": arguments.filters.hash,
        "templates": template_hash(arguments.task),
        "normalization": NORMALIZATION_VERSION,
        "columns": sha256_hex(str(SCHEMA).encode()),
    }


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command on its own, as `preprocess/preprocess_data.py` does."""
    parser = argparse.ArgumentParser(prog="preprocess_data.py")
    add_arguments(parser)
    return convert_input(parser.parse_args(argv))


def run(arguments: argparse.Namespace) -> int:
    """Convert, as a command of the console script."""
    interrupt_on_sigterm()
    return convert_input(arguments)


def convert_input(arguments: argparse.Namespace) -> int:
    """Convert the input that the command line names, and report."""
    arguments = _checked(arguments)
    space = TokenSpace.load(arguments.token_space)
    space.require_one_stream("preprocess_data")
    if arguments.control_tags and not space.controls:
        raise InputError(
            f"--control-tags: token space {arguments.token_space} declares no control; make one with `megatron-speech "
            "token-space --control pause`, or leave the flag out"
        )
    templates(space, arguments.task)  # refuses a task that models of another layout do not know
    if arguments.cloning != "none" and "cloning" not in templates(space, "tts"):
        raise InputError(
            f"--cloning {arguments.cloning}: token space {arguments.token_space} has the layout of {space.layout}, "
            "whose models know no marks of a reference; leave it out (they clone by beginning the speech, in generate)"
        )
    eod = space.special("<eos>") if arguments.input_eod is None else arguments.input_eod
    inputs = InputFiles(arguments.input, ReadOptions(tokenizer=arguments.input_tokenizer, eod=eod))
    _check_paths(arguments, inputs)
    if arguments.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            manifest, tally = convert(arguments, space, inputs, None, Path(folder))
        print_report(manifest)
        console = tables()
        for i, document in enumerate(tally.shown):
            console.print(f"document {i}: {render(space, document)}", markup=False, soft_wrap=True)
        output("dry run: nothing was written")
        return 0
    known = fingerprint(arguments, inputs, space)
    with DatasetWriter(arguments.output_prefix, space.dtype, fingerprint=known, restart=arguments.restart) as writer:
        report_resume(writer)
        if writer.complete:
            manifest = writer.finish()
        else:
            manifest = writer.finish(convert(arguments, space, inputs, writer, writer.folder)[0])
    print_report(manifest)
    size = manifest.files[BIN].bytes
    output(f"{arguments.output_prefix}: {manifest.documents:,} documents, {manifest.tokens:,} tokens, {size:,} bytes")
    return 0


def _check_paths(arguments: argparse.Namespace, inputs: InputFiles) -> None:
    suffixes = (BIN, IDX, DOCUMENTS, REJECTED, MANIFEST)
    outputs = {Path(f"{arguments.output_prefix}{suffix}").resolve() for suffix in suffixes}
    for reader in inputs.readers:
        for path in reader.files:
            if Path(path).resolve() in outputs:
                raise InputError(f"input {path} would be overwritten by --output-prefix {arguments.output_prefix}")
