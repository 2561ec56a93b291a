"""A batch of rows to a batch of documents: what every worker process does."""

from __future__ import annotations

import functools
import itertools
import mmap
import pickle
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from megatron_speech.data.dataset.documents_table import SCHEMA, derive_columns
from megatron_speech.data.dataset.manifest import Totals
from megatron_speech.data.dataset.split import name_hash
from megatron_speech.errors import InputError
from megatron_speech.files import sha256_hex
from megatron_speech.preprocess.batch import Batch, split_at_duplicate
from megatron_speech.preprocess.codes import CodesLoader
from megatron_speech.preprocess.columns import Constant, Samples, pick, read_samples, to_arrow
from megatron_speech.preprocess.compile_batch import Column, CompiledBatch, compile_batch
from megatron_speech.preprocess.filters import Filters
from megatron_speech.preprocess.readers.base import RowBatch
from megatron_speech.preprocess.references import COVERED, Keys, mix
from megatron_speech.preprocess.samples import CodesAt, SampleRules
from megatron_speech.ragged import edges, runs
from megatron_speech.tokens.control_tags import encode_tagged
from megatron_speech.tokens.normalization import NORMALIZATION_VERSION
from megatron_speech.tokens.space import TokenSpace
from megatron_speech.tokens.templates import (
    CODES,
    PROMPT_CODES,
    REF_CODES,
    REF_TEXT,
    SEGMENTS,
    TEXT,
    TURNS,
    check_role,
    segment_ids,
    turn_ids,
)


@dataclass(frozen=True)
class Records:
    """Files with every row of the input as a reference needs it: pickles, and where each begins (int64 [rows + 1])."""

    data: Path
    offsets: Path


@dataclass(frozen=True)
class ConversionJob:
    """Everything that decides what a row becomes. It travels to every worker."""

    space: TokenSpace
    rules: SampleRules
    references: int = 0  # references (or prompts) per sample; 0: plain documents only
    drop_without_reference: bool = False  # what becomes of a sample without one: dropped, or a plain document
    interleave: int = 0  # segments of a recording in a document of the task interleaved
    seed: int = 0
    append_eod: bool = False
    control_tags: bool = False  # `[[pause]]` in texts is a token
    records: Records | None = None
    filters: Filters = field(default_factory=Filters)

    @property
    def needs_index(self) -> bool:
        """Whether the whole input is indexed before the first document is made."""
        return self.references > 0 or self.interleave > 0 or self.filters.has_duplicate_rule


@dataclass(frozen=True)
class Work:
    """One item of work: rows, and what the index of the whole input says of each of them."""

    batch: RowBatch
    candidates: np.ndarray | None = (
        None  # int64 [rows, candidates]: rows that may be its reference; -1, or no column: none
    )
    plain: np.ndarray | None = None  # bool [rows]: make a plain document of this row all the same
    duplicates: np.ndarray | None = None  # bool [rows]: it repeats an earlier row


@dataclass
class Documents:
    """What a batch of rows became. Mergeable: all but flat, lengths and table are counts."""

    flat: np.ndarray
    lengths: np.ndarray
    table: pa.RecordBatch
    rows: int
    kept: int
    dropped: Counter[str]
    notices: Counter[str]
    forms: Counter[str]
    totals: dict[tuple[str, str], Totals]  # (language, source)
    rejected: list[dict[str, Any]] = field(default_factory=list)  # filtered rows are marked


class _Record(NamedTuple):
    """What a reference to a row needs of it."""

    sample_id: str
    source_id: str
    text: str | None
    codes: CodesAt


@dataclass(frozen=True)
class Reference:
    """Another sample as a reference or prompt."""

    sample_id: str
    source_id: str
    text_ids: np.ndarray | None
    code_ids: np.ndarray
    text: str | None = None


@dataclass
class _Interleaved:
    """A document of the segments of a recording, and its counts."""

    segments: list[tuple[str, np.ndarray]] = field(default_factory=list)
    transcripts: list[str] = field(default_factory=list)  # of all segments, spoken ones too
    characters: int = 0  # of text segments
    text: int = 0  # ids of text segments
    audio: int = 0  # ids of speech segments


class Converter:
    """Rows to documents. One per worker process; it keeps code files open between batches."""

    def __init__(self, job: ConversionJob) -> None:
        self.job = job
        self.space = job.space
        self.loader = CodesLoader(job.space)
        self.tokenizer_version = tokenizer_version(job.space)
        self.rules_before, self.duplicate, self.rules_after = split_at_duplicate(job.filters)
        self._record_data: mmap.mmap | None = None
        if job.records is not None:
            with open(job.records.data, "rb") as handle:
                self._record_data = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
            self._record_offsets = np.load(job.records.offsets, mmap_mode="r")

    # ---- rows to samples

    def read(self, batch: RowBatch) -> Batch:
        """The rows of a batch as samples.

        Raises:
            InputError: codes of another codec than the token space's.
        """
        samples = read_samples(self.job.rules, batch.read(), batch.path)
        if self.job.rules.needs_codes:
            self._check_codec(samples, batch.path)
        elif not isinstance(samples.roles, Constant):
            self._check_roles(samples, batch.path)
        return Batch(
            self.space,
            self.loader,
            samples,
            batch.path,
            has_texts=self.job.rules.task != "speech_lm",
            control_tags=self.job.control_tags,
        )

    def _check_codec(self, samples: Samples, path: str) -> None:
        codec = self.space.codec
        if set(samples.codec_hash) <= {codec.hash, None}:
            return
        for row, found in enumerate(samples.codec_hash):
            if found is not None and found != codec.hash and row not in samples.rejected:
                raise InputError(
                    f"{path} line {samples.number[row]}: codec_hash is {found}, needed {codec.hash} "
                    f"({codec.name}) of the token space; encode the audio with that codec, or make another token space"
                )

    def _check_roles(self, samples: Samples, path: str) -> None:
        for row, roles in enumerate(samples.roles):
            if roles is not None and row not in samples.rejected:
                for role in set(roles):
                    try:
                        check_role(self.space, role)
                    except InputError as error:
                        raise InputError(f"{path} line {samples.number[row]}: {error}") from error

    # ---- the index of the whole input

    def index(self, source: RowBatch) -> IndexedRows:
        """Keys of the rows, and records of those that can be references."""
        batch = self.read(source)
        batch.apply(self.rules_before)
        content = None
        if self.duplicate is not None:
            content = batch.content_hashes(self.duplicate.of or "codes")
            batch.apply(self.rules_after)
        if self.job.interleave:
            # A document needs all of its segments: what cannot be used has to be known before they are chosen.
            batch.load_codes(batch.alive())
            batch.encode_texts()
        alive = batch.alive()
        records = [b""] * len(batch.samples)
        if self.job.references or self.job.interleave:
            samples = batch.samples
            for row in alive:
                place = samples.codes[row]
                assert place is not None
                text = samples.texts[row][0] if samples.texts[row] else None
                record = (samples.sample_id[row], samples.source_id[row], text, tuple(place))
                records[row] = pickle.dumps(record, protocol=5)
        return IndexedRows(Keys.of(batch.samples, alive, content), records)

    # ---- references

    def references(self, candidates: np.ndarray) -> list[list[Reference]]:
        """For each row of `candidates`, int64 [n, candidates], its first usable ones, at most `job.references`."""
        wanted = self.job.references
        first = [int(row) for row in np.unique(candidates[:, :wanted]) if row >= 0]
        known: dict[int, Reference | None] = dict(zip(first, self._load_references(first), strict=True))
        result = []
        for row in candidates:
            found: list[Reference] = []
            for number in row.tolist():
                if number < 0 or len(found) == wanted:
                    break
                if number not in known:  # a spare, because an earlier one is unusable
                    known[number] = self._load_references([number])[0]
                reference = known[number]
                if reference is not None:
                    found.append(reference)
            result.append(found)
        return result

    def _load_references(self, numbers: Sequence[int]) -> list[Reference | None]:
        assert self._record_data is not None
        records = []
        for number in numbers:
            begin, end = int(self._record_offsets[number]), int(self._record_offsets[number + 1])
            sample_id, source_id, text, place = pickle.loads(self._record_data[begin:end])
            records.append(_Record(sample_id, source_id, text, CodesAt(*place)))
        codes = self.loader.encode([record.codes for record in records])
        written = [record.text for record in records if record.text is not None]
        encoded = (
            encode_tagged(self.space, written)[0] if self.job.control_tags else self.space.encode_text_batch(written)
        )
        texts = iter(encoded)
        result: list[Reference | None] = []
        for record, ids in zip(records, codes.ids, strict=True):
            text_ids = next(texts) if record.text is not None else None
            usable = ids is not None and (text_ids is None or len(text_ids) > 0)
            result.append(
                Reference(record.sample_id, record.source_id, text_ids, ids, record.text)  # type: ignore[arg-type]
                if usable
                else None
            )
        return result

    def following(self, candidates: np.ndarray) -> dict[int, list[Reference]]:
        """The segments that follow the first one of each document, by its row.

        Args:
            candidates: int64 [rows, segments], see :func:`references.following_segments`.

        Raises:
            InputError: a segment cannot be read any more.
        """
        heads = np.flatnonzero(candidates[:, 0] >= 0)
        wanted = candidates[heads]
        counts = (wanted >= 0).sum(axis=1).tolist()
        numbers = [int(number) for number in wanted.ravel() if number >= 0]
        loaded = iter(zip(numbers, self._load_references(numbers), strict=True))
        result: dict[int, list[Reference]] = {}
        for head, count in zip(heads.tolist(), counts, strict=True):
            result[head] = []
            for number, reference in itertools.islice(loaded, count):
                if reference is None:
                    raise InputError(
                        f"row {number + 1} of the input could be read when it was indexed, and cannot be now: its "
                        "codes have changed; start again with --restart"
                    )
                result[head].append(reference)
        return result

    # ---- documents

    def convert(self, work: Work) -> Documents:
        """Documents of a batch of rows."""
        batch = self.read(work.batch)
        batch.duplicates = work.duplicates
        batch.apply(self.job.filters.filters)
        batch.load_codes(batch.alive())
        batch.encode_texts()
        rows = batch.alive()
        references: list[list[Reference]] | None = None
        if self.job.interleave:
            assert work.candidates is not None
            usable = np.zeros(len(batch.samples), dtype=bool)
            usable[rows] = True
            candidates = np.where(usable[:, None], work.candidates, -1)
            plan = _Plan(self, batch)
            plan.add_interleaved(rows, candidates, self.following(candidates))
            return plan.finish()
        if work.candidates is not None:
            usable = np.zeros(len(batch.samples), dtype=bool)
            usable[rows] = True
            references = self.references(np.where(usable[:, None], work.candidates, -1))
        plan = _Plan(self, batch)
        if references is None:
            plan.add_plain(rows)
        else:
            plan.add_with_references(rows, references, work.plain)
        return plan.finish()


# Columns of the documents table that are columns of the samples.
_OF_SAMPLE = (
    "sample_id",
    "source_id",
    "segment_order",
    "start_time",
    "end_time",
    "speaker_id",
    "language",
    "dataset_source",
    "transcript_native",
    "transcript_romanized",
    "extra",
)


class _Plan:
    """Which documents a batch gives; :meth:`finish` makes all of them at once."""

    def __init__(self, converter: Converter, batch: Batch) -> None:
        self.job = converter.job
        self.space = converter.space
        self.tokenizer_version = converter.tokenizer_version
        self.batch = batch
        self.notices = Counter(batch.samples.notices)
        # Of each document: its row, its form, its reference, and the first and one after the last of its texts.
        nothing = np.zeros(0, dtype=np.int64)
        self.row, self.begin, self.end = nothing, nothing, nothing
        self.form: list[str] = []
        self.reference: list[Reference | None] = []
        self.interleaved: list[_Interleaved] = []
        self.kept: list[int] = []

    def add_plain(self, rows: list[int]) -> None:
        """Documents of samples without a reference: one each, but of text rows one of each text or conversation."""
        self.kept, self.row = rows, np.array(rows, dtype=np.int64)
        self.form = ["plain"] * len(rows)
        self._find_texts()
        if self.job.rules.task == "text_lm":
            turns = np.array([roles is not None for roles in pick(self.batch.samples.roles, rows)], dtype=bool)
            count = np.where(turns, 1, self.end - self.begin)
            last = np.repeat(np.where(turns, self.end, 0), count)
            self.row = np.repeat(self.row, count)
            self.begin = runs(self.begin, count)
            self.end = np.maximum(self.begin + 1, last)
            self.form = ["turns" if many else "plain" for many in np.repeat(turns, count).tolist()]

    def add_with_references(self, rows: list[int], references: list[list[Reference]], plain: np.ndarray | None) -> None:
        """Documents of samples of speech: one per reference, or a plain one."""
        task, chosen = self.job.rules.task, []
        for row in rows:
            found: Sequence[Reference | None] = references[row]
            if plain is not None and plain[row]:
                found = [None]
            elif not found:
                self.notices["rows_without_reference"] += 1
                if self.job.drop_without_reference:
                    self.batch.drop(row, "no_reference", "no other recording of the speaker can be its reference")
                    continue
                found = [None]
            self.kept.append(row)
            for reference in found:
                chosen.append(row)
                self.reference.append(reference)
                self.form.append("plain" if reference is None else "cloning" if task == "tts" else "continuation")
        self.row = np.array(chosen, dtype=np.int64)
        self._find_texts()

    def add_interleaved(self, rows: list[int], candidates: np.ndarray, following: dict[int, list[Reference]]) -> None:
        """Documents of the segments of a recording; a row without a neighbour gives none."""
        covered = candidates[:, 0] == COVERED
        chosen = []
        for row in rows:
            if row in following:
                chosen.append(row)
            elif not covered[row]:
                self.batch.drop(row, "no_neighbour", "no segment of its source follows it or comes before it")
                continue
            self.kept.append(row)
        self.row = np.array(chosen, dtype=np.int64)
        self.form = ["plain"] * len(chosen)
        self._find_texts()
        sources = name_hash(pa.array([self.batch.samples.source_id[row] for row in chosen], pa.string()))
        # Half of the recordings begin with text. A recording's documents all do, or none.
        begins_with_text = (mix(sources, self.job.seed, 5) & np.uint64(1)).astype(bool)
        self.interleaved = [
            self._interleaved(row, following[row], begins_with_text=text)
            for row, text in zip(chosen, begins_with_text.tolist(), strict=True)
        ]

    def _interleaved(self, row: int, following: list[Reference], *, begins_with_text: bool) -> _Interleaved:
        texts, codes = self.batch.texts, self.batch.codes[row]
        assert texts is not None and codes is not None
        head = Reference("", "", texts.ids[int(texts.rows[row])], codes, self.batch.samples.texts[row][0])
        result = _Interleaved()
        for k, segment in enumerate([head, *following]):
            assert segment.text_ids is not None and segment.text is not None
            result.transcripts.append(segment.text)
            if (k % 2 == 0) == begins_with_text:
                result.segments.append(("text", segment.text_ids))
                result.characters += len(segment.text)
                result.text += len(segment.text_ids)
            else:
                result.segments.append(("speech", segment.code_ids))
                result.audio += len(segment.code_ids)
        return result

    def _find_texts(self) -> None:
        texts = self.batch.texts
        of_row = texts.rows if texts is not None else np.zeros(len(self.batch.samples) + 1, dtype=np.int64)
        self.begin, self.end = of_row[self.row], of_row[self.row + 1]

    def _fields(self) -> dict[str, Column]:
        task, batch = self.job.rules.task, self.batch
        fields: dict[str, Column] = {}
        if task == "interleaved":
            return {SEGMENTS: [segment_ids(self.space, document.segments) for document in self.interleaved]}
        if self.job.rules.needs_codes:
            fields[CODES] = self._of_rows(batch.codes)
        if batch.texts is not None:
            fields[TEXT] = batch.texts.ids.take(self.begin)
        if any(self.reference):
            codes = [reference.code_ids if reference else None for reference in self.reference]
            fields[PROMPT_CODES if task == "speech_lm" else REF_CODES] = codes
            if task == "tts":
                fields[REF_TEXT] = [reference.text_ids if reference else None for reference in self.reference]
        if "turns" in self.form:
            fields[TURNS] = [self._turns(i) if form == "turns" else None for i, form in enumerate(self.form)]
        return fields

    def _turns(self, document: int) -> np.ndarray:
        texts = self.batch.texts
        assert texts is not None
        ids = [texts.ids[i] for i in range(self.begin[document], self.end[document])]
        return turn_ids(self.space, list(zip(self.batch.samples.roles[self.row[document]] or [], ids, strict=True)))

    @functools.cached_property
    def _one_each(self) -> bool:
        """One document of every row, as nearly always."""
        return np.array_equal(self.row, np.arange(len(self.batch.samples)))

    def _of_rows(self, column: Sequence[Any]) -> Sequence[Any]:
        """What a column of the rows holds for each document."""
        return column if self._one_each else pick(column, self.row.tolist())

    def _text_columns(self) -> dict[str, np.ndarray]:
        """Of each document's own text: characters, tokens made of them, and unknown ones. Given ids count as none."""
        texts = self.batch.texts
        if self.job.interleave:
            return self._interleaved_text_columns()
        if texts is None:
            zero = np.zeros(len(self.row), dtype=np.int64)
            return {"characters": zero, "target_text_tokens": zero, "unknown_tokens": zero}

        def total(values: np.ndarray) -> np.ndarray:
            so_far = edges(values)
            return so_far[self.end] - so_far[self.begin]

        return {
            "characters": total(texts.characters),
            "target_text_tokens": total(np.where(texts.given, 0, texts.ids.lengths)),
            "unknown_tokens": total(np.where(texts.given, 0, texts.unknown)),
        }

    def _interleaved_text_columns(self) -> dict[str, np.ndarray]:
        unknown = self.space.unknown_id
        columns = {
            "characters": [document.characters for document in self.interleaved],
            "target_text_tokens": [document.text for document in self.interleaved],
            "unknown_tokens": [
                sum(int((ids == unknown).sum()) for kind, ids in document.segments if kind == "text")
                if unknown is not None
                else 0
                for document in self.interleaved
            ],
        }
        return {name: np.array(values, dtype=np.int64) for name, values in columns.items()}

    def finish(self) -> Documents:
        """All documents, as the writer takes them."""
        rules, batch = self.job.rules, self.batch
        fields = self._fields()
        compiled = compile_batch(self.space, rules.task, self.form, fields, append_eod=self.job.append_eod)
        counts = self._text_columns()
        text = compiled.text
        if "turns" in self.form:
            turns = np.array([form == "turns" for form in self.form])
            text = np.where(turns, counts["target_text_tokens"], text)
        frames = np.zeros(len(self.row), dtype=np.int64)
        audio, target = compiled.audio, compiled.target
        if self.job.interleave:
            text = counts["target_text_tokens"]
            audio = np.array([document.audio for document in self.interleaved], dtype=np.int64)
            # What follows the first <speech_start>: <bos>, and the text before it if there is any, are the prompt.
            before = [2 + (len(d.segments[0][1]) if d.segments[0][0] == "text" else 0) for d in self.interleaved]
            target = compiled.tokens - np.array(before, dtype=np.int64)
            frames += audio // self.space.codebook_count
        elif rules.needs_codes:
            frames += compiled.lengths[CODES] // self.space.codebook_count
        counts |= {
            "documents": np.ones(len(self.row), dtype=np.int64),
            "frames": frames,
            "tokens": compiled.tokens,
            "audio_tokens": audio,
            "text_tokens": text,
            "target_tokens": target,
        }
        if rules.needs_codes:
            without = sum(batch.samples.codec_hash[row] is None for row in self.kept)
            if without:
                self.notices["rows_without_codec_hash"] += without
        lengths = compiled.tokens.astype(np.int32)
        return Documents(
            flat=compiled.flat,
            lengths=lengths,
            table=derive_columns(self._table(compiled, counts), compiled.flat, lengths),
            rows=len(batch.samples),
            kept=len(self.kept),
            dropped=batch.dropped,
            notices=self.notices,
            forms=Counter(self.form),
            totals=self._totals(counts),
            rejected=batch.rejected,
        )

    def _table(self, compiled: CompiledBatch, counts: dict[str, np.ndarray]) -> pa.RecordBatch:
        """The rows of the documents table, but for what follows from names and ids."""
        rules, codec, batch, count = self.job.rules, self.space.codec, self.batch, len(self.row)
        columns: dict[str, Any] = {name: self._of_rows(getattr(batch.samples, name)) for name in _OF_SAMPLE}
        for name in ("audio_tokens", "text_tokens", "tokens", "target_tokens"):
            columns[name] = counts[name].astype(np.int32)
        if rules.needs_codes:
            columns["code_len"] = counts["frames"].astype(np.int32)
            columns["duration_seconds"] = counts["frames"] / codec.frame_rate_hz
            columns["checksum"] = self._of_rows(batch.checksums)
        if self.job.interleave:
            # The first segment's own, which are not the document's.
            for name in ("checksum", "end_time", "transcript_romanized"):
                columns[name] = Constant(None, count)
            columns["transcript_native"] = [" ".join(document.transcripts) for document in self.interleaved]
        if any(self.reference):
            columns["reference_sample_id"] = [reference and reference.sample_id for reference in self.reference]
            columns["reference_source_id"] = [reference and reference.source_id for reference in self.reference]
        constants = {
            "task": rules.task,
            "codec_hash": codec.hash if rules.needs_codes else None,
            "tokenizer_version": self.tokenizer_version,
            "normalization_version": NORMALIZATION_VERSION,
        }
        columns |= {name: Constant(constants.get(name), count) for name in SCHEMA.names if name not in columns}
        arrays = [to_arrow(columns[name], kind) for name, kind in zip(SCHEMA.names, SCHEMA.types, strict=True)]
        return pa.record_batch(arrays, schema=SCHEMA)

    def _totals(self, counts: dict[str, np.ndarray]) -> dict[tuple[str, str], Totals]:
        samples = self.batch.samples
        columns = self._of_rows(samples.language), self._of_rows(samples.dataset_source)
        index: dict[tuple[str, str], int] = {}
        group = np.array([index.setdefault(key, len(index)) for key in zip(*columns, strict=True)], dtype=np.int64)
        sums = np.zeros((len(index), len(counts)), dtype=np.int64)
        np.add.at(sums, group, np.stack(list(counts.values()), axis=1))
        return {key: Totals(**dict(zip(counts, sums[i].tolist(), strict=True))) for key, i in index.items()}


@dataclass(frozen=True)
class IndexedRows:
    """What the choice of references needs of a batch."""

    keys: Keys
    records: list[bytes]


def tokenizer_version(space: TokenSpace) -> str:
    """Names the text tokenizer: its kind and the beginning of its file's hash."""
    return space.text_kind if not space.text_payload else f"{space.text_kind}:{sha256_hex(space.text_payload)[:16]}"


# The two functions that worker processes run; their state is a Converter.


def convert_batch(converter: Converter, work: Work) -> Documents:
    """Rows to documents."""
    return converter.convert(work)


def index_batch(converter: Converter, batch: RowBatch) -> IndexedRows:
    """Rows to the keys by which references and duplicates are found, and records from which references are made."""
    return converter.index(batch)
