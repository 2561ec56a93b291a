"""Building the sequence index of a stage: documents → strata → order → sequences → files.

    documents tables ─ read ─► strata ─ BlendOrder ─► documents in order ─ pack ─► segments ─► columns on disk
                                        └───────── a million documents at a time ──────────┘

Memory is what is known of every document (about 20 bytes each, the mapped lengths included) and a few pieces; the
order and the table are never held.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from megatron_speech.console import Progress
from megatron_speech.data.blend import order as ordering
from megatron_speech.data.blend import strata as blending
from megatron_speech.data.blend.order import DocumentStream, EpochPosition, OrderedDocuments
from megatron_speech.data.blend.strata import Blend
from megatron_speech.data.dataset.document_columns import DocumentTable, read_documents
from megatron_speech.data.dataset.indexed import TokenDataset
from megatron_speech.data.sequences import stitching
from megatron_speech.data.sequences.history import Continuation
from megatron_speech.data.sequences.index_cache import INDEX_VERSION, Build, TableWriter
from megatron_speech.data.sequences.packing import PackedRun, pack
from megatron_speech.files import canonical_json, sha256_hex
from megatron_speech.recipe.data import DataConfig
from megatron_speech.recipe.stage import StageDataConfig
from megatron_speech.tokens.templates import PROMPTLESS_TASKS

Report = dict[str, Any]
Split = Literal["train", "validation"]

# Fields of a stage that its sequences do not depend on: `tokens` and the batch only through `n_sequences`, `loss`
# only through what it decides (see `index_key`), the others not at all.
_WITHOUT_EFFECT = {"tokens", "global_batch_tokens", "loss", "max_epochs", "allow_text_in_sft"}


def index_key(
    stage: StageDataConfig,
    data: DataConfig,
    datasets: Mapping[str, TokenDataset],
    *,
    split: Split,
    n_sequences: int | None,
    seed: int,
    continuation: Continuation | None = None,
) -> str:
    """Hash of everything that the index is a function of.

    That is the datasets' contents, the fields of the stage and of the data section that matter, the seed, what an
    index before this one has taken, and the version of the code that builds it.
    """
    entries = []
    for name, dataset in datasets.items():
        assert dataset.manifest is not None
        files = {suffix: entry.sha256 for suffix, entry in dataset.manifest.files.items()}
        entries.append([name, dataset.manifest.task, files])
    fields = set(StageDataConfig.model_fields) - _WITHOUT_EFFECT
    if stage.shuffle_window is None or split == "validation":
        fields -= {"shuffle_window"}  # without it, keys are what they were before there was one
    streams = {dataset.streams for dataset in datasets.values()} - {1}
    return sha256_hex(
        canonical_json(
            {
                **({"streams": sorted(streams)} if streams else {}),  # so that keys of one stream stay what they were
                "version": INDEX_VERSION,
                "datasets": entries,
                "stage": stage.model_dump(mode="json", include=fields),
                "packing_mode": stage.packing_mode,
                "sft": stage.is_sft,
                "n_sequences": n_sequences,
                "validation_fraction": data.validation_fraction,
                "split_seed": data.split_seed,
                "split": split,
                "seed": seed,
                "continues": [continuation.from_sequence, continuation.digest] if continuation else None,
            }
        )
    )


def read_tables(stage: StageDataConfig, data: DataConfig, datasets: Mapping[str, TokenDataset]) -> list[DocumentTable]:
    """What the blend knows of the documents of each dataset; units of documents where the stage stitches.

    Raises:
        InputError: a damaged table, or metadata that a filter or stitching cannot use.
    """
    targets = stage.is_sft or stage.packing_mode == "bucket" or stage.stitch is not None
    tables: list[DocumentTable] = []
    for name, dataset in datasets.items():
        assert dataset.manifest is not None
        table = read_documents(name, dataset.manifest.task, dataset, data, targets=targets)
        table = blending.apply_filters(stage, table, dataset)
        if stage.stitch is not None:
            adjacency = stitching.Adjacency.read(dataset)
            table = stitching.stitch(table, adjacency, stage.stitch, max_tokens=stage.seq_length)
        tables.append(table)
    return tables


class _Tally:
    """What came out, per stratum, added up run by run.

    Whole numbers, but for the seconds: those are summed per run and then over the runs, in double precision, so the
    sum depends on nothing but the runs.
    """

    def __init__(self, strata: int) -> None:
        self.documents = np.zeros(strata, dtype=np.int64)
        self.tokens = np.zeros(strata, dtype=np.int64)
        self.counted = np.zeros(strata, dtype=np.int64)
        self.seconds = np.zeros(strata, dtype=np.float64)

    def add(self, run: PackedRun, stratum: np.ndarray) -> None:
        """Add a run whose segments belong to `stratum`."""
        strata = len(self.tokens)

        def sums(values: np.ndarray) -> np.ndarray:
            return np.bincount(stratum, values, minlength=strata)

        lengths = run.documents.length[run.position]
        counted = run.documents.counted[run.position]
        # A segment of a cut document: every token of it counts (a stage that does not count them all never cuts).
        cut = run.length != lengths
        seconds = run.documents.seconds[run.position].astype(np.float64)
        seconds[cut] *= run.length[cut] / lengths[cut]
        self.tokens += sums(run.length).astype(np.int64)
        self.counted += sums(np.where(cut, run.length, counted)).astype(np.int64)
        self.seconds += sums(seconds)

    def begin(self, stratum: np.ndarray, start: np.ndarray) -> None:
        """Count the documents of which the first token is there."""
        self.documents += np.bincount(stratum[start == 0], minlength=len(self.documents))


def index_builder(
    stage: StageDataConfig,
    data: DataConfig,
    datasets: Mapping[str, TokenDataset],
    *,
    split: Split,
    n_sequences: int | None,
    seed: int,
    continuation: Continuation | None = None,
) -> Build:
    """What :func:`~megatron_speech.data.sequences.index_cache.cached_table` builds the index of a stage with.

    Args:
        stage, data, datasets: what the sequences are made of.
        split: "train", or "validation": every held-out document once.
        n_sequences: how many there have to be; of validation at most, or None for all.
        seed: the run's seed.
        continuation: what an index before this one has taken: its sequences are empty in this one, which goes on
            with the documents that are still due.
    """

    def build(writer: TableWriter) -> tuple[list[int], Report]:
        tables = read_tables(stage, data, datasets)
        first = continuation.from_sequence if continuation else 0
        blend = blending.resolve(
            stage,
            tables,
            validation=split == "validation",
            tokens=None if n_sequences is None else (n_sequences - first) * stage.seq_length,
            taken=continuation.tokens if continuation else None,
        )
        begin = continuation.begin(blend, tables) if continuation else {}
        _write_empty(writer, first, joined=stage.stitch is not None)
        tally = _Tally(len(blend.strata))
        stratum_dataset = np.array([stratum.dataset for stratum in blend.strata], dtype=np.int32)
        order: DocumentStream
        if split == "validation":
            order = ordering.FixedOrder(stage, blend, tables, seed=data.split_seed)
        else:
            assert n_sequences is not None
            places = [] if stage.shuffle_window is None else [*map(_places, tables, datasets.values())]
            order = ordering.stage_order(stage, blend, tables, seed=seed, begin=begin, places=places)
        runs = pack(
            order,
            mode=stage.packing_mode,
            seq_length=stage.seq_length,
            open_sequences=stage.packing.open_sequences,
            max_tokens=stage.packing.max_tokens,
            n_sequences=None if n_sequences is None else n_sequences - first,
            targets_of=lambda documents: _targets(documents, stratum_dataset, tables),
        )
        with Progress("index", total=n_sequences, unit="sequences", initial=first) as progress:
            for run in runs:
                _write(writer, run, tables, stratum_dataset, tally)
                progress.update(len(run.seq_ends))
        return stratum_dataset.tolist(), _describe(blend, tables, tally, begin)

    return build


def _places(table: DocumentTable, dataset: TokenDataset) -> np.ndarray:
    """Where the rows of a table begin in `.bin`, int64, ascending; a stitched unit where its first document does."""
    if isinstance(table, stitching.StitchedTable):
        firsts: np.ndarray = dataset.pointers[table.unit_documents[table.unit_ptr[:-1]]]
        return firsts
    return dataset.pointers


def _write_empty(writer: TableWriter, sequences: int, *, joined: bool) -> None:
    """Sequences without segments, in place of those that an earlier index of the stage holds."""
    nothing = np.zeros(0, dtype=np.int32)
    columns = dict.fromkeys(["stratum", "document", "start", "length", *(["joined"] if joined else [])], nothing)
    writer.append(np.zeros(sequences, dtype=np.int64), **columns)


def _write(
    writer: TableWriter,
    run: PackedRun,
    tables: Sequence[DocumentTable],
    stratum_dataset: np.ndarray,
    tally: _Tally,
) -> None:
    stratum = run.documents.stratum[run.position]
    document = run.documents.document[run.position]
    tally.add(run, stratum)
    if any(isinstance(table, stitching.StitchedTable) for table in tables):
        seq_ptr = np.concatenate([np.zeros(1, np.int64), run.seq_ends])
        parts = stitching.expand(seq_ptr, stratum_dataset[stratum], document, run.start, run.length, tables)
        stratum = stratum[parts.segment]
        tally.begin(stratum, parts.start)
        writer.append(
            parts.seq_ptr[1:], stratum=stratum, document=parts.document, start=parts.start, length=parts.length,
            joined=parts.joined,
        )  # fmt: skip
        return
    tally.begin(stratum, run.start)
    writer.append(run.seq_ends, stratum=stratum, document=document, start=run.start, length=run.length)


def _targets(documents: OrderedDocuments, stratum_dataset: np.ndarray, tables: Sequence[DocumentTable]) -> np.ndarray:
    """Target tokens of documents, int32; of a text, which has no prompt, all tokens."""
    targets = documents.length.copy()
    dataset = stratum_dataset[documents.stratum]
    for index, table in enumerate(tables):
        if table.task not in PROMPTLESS_TASKS:
            chosen = np.flatnonzero(dataset == index)
            targets[chosen] = table.targets[documents.document[chosen]]
    return targets


def _describe(
    blend: Blend, tables: Sequence[DocumentTable], tally: _Tally, begin: Mapping[str, EpochPosition]
) -> Report:
    """What was asked for and what came out, per stratum: everything that a blend report sums up."""
    excluded = dict(blend.excluded)
    alone = {t.name: t.dropped for t in tables if isinstance(t, stitching.StitchedTable) and t.dropped}
    if alone:
        excluded["without_neighbour"] = alone

    def first_epoch(name: str) -> int:
        return begin[name].epoch + (not len(begin[name].due)) if name in begin else 0

    return {
        "groups": [list(label) for label in blend.labels],
        "strata": [
            {
                "name": stratum.name,
                "group": blend.groups[stratum.group],
                "task": stratum.task,
                "dataset": tables[stratum.dataset].name,
                "language": stratum.language,
                "source": stratum.source,
                "label": stratum.label,
                "target": stratum.share,
                "first_epoch": first_epoch(stratum.name),
                "documents_due": len(begin[stratum.name].due) if stratum.name in begin else len(stratum.documents),
                "documents_available": len(stratum.documents),
                "tokens_available": stratum.tokens,
                "documents": int(tally.documents[k]),
                "tokens": int(tally.tokens[k]),
                "counted_tokens": int(tally.counted[k]),
                "audio_seconds": float(tally.seconds[k]),
            }
            for k, stratum in enumerate(blend.strata)
        ],
        "masses": dict(zip(blend.groups, blend.masses, strict=True)),
        "excluded_documents": excluded,
        "limited": blend.limited,
        "split": {table.name: dataclasses.asdict(table.sides) for table in tables if table.sides is not None},
    }
