"""A batch of rows to a batch of documents: what every worker process does."""

from __future__ import annotations

import mmap
import pickle
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from megatron_speech.data.documents_table import SCHEMA, derive_columns
from megatron_speech.data.manifest import Totals
from megatron_speech.errors import InputError
from megatron_speech.files import sha256_hex
from megatron_speech.tasks import CODES, PROMPT_CODES, REF_CODES, REF_TEXT, TEXT, TURNS, turn_ids
from megatron_speech.text import NORMALIZATION_VERSION
from megatron_speech.token_space import TokenSpace
from preprocess.batch import Batch, split_at_duplicate
from preprocess.codes import CodesLoader
from preprocess.columns import Samples, read_samples
from preprocess.compile_batch import CompiledBatch, compile_batch
from preprocess.filters import Filters
from preprocess.readers.base import RowBatch
from preprocess.references import Keys
from preprocess.samples import CodesAt, SampleRules


@dataclass(frozen=True)
class Records:
    """Files with every row of the input as a reference needs it: pickles, and where each begins (int64 [rows + 1])."""

    data: Path
    offsets: Path


@dataclass(frozen=True)
class Job:
    """Everything that decides what a row becomes. It travels to every worker."""

    space: TokenSpace
    rules: SampleRules
    quotes: int = 0  # references (or prompts) per sample; 0: plain documents only
    drop_unquoted: bool = False  # what becomes of a sample without one: dropped, or a plain document
    append_eod: bool = False
    records: Records | None = None
    filters: Filters = field(default_factory=Filters)

    @property
    def looks_over(self) -> bool:
        """Whether the whole input has to be looked over before the first document is made."""
        return self.quotes > 0 or self.filters.finds_duplicates


@dataclass(frozen=True)
class Work:
    """One item of work: rows, and what the look over the whole input found of each of them."""

    batch: RowBatch
    candidates: np.ndarray | None = None  # int64 [rows, candidates]: rows that it may quote; -1, or no column: none
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
    rejected: list[dict[str, Any]] = field(default_factory=list)  # filtered ones say so


class _Record(NamedTuple):
    """A row as a reference is made of it."""

    sample_id: str
    source_id: str
    text: str | None
    codes: CodesAt


@dataclass(frozen=True)
class Quote:
    """Another sample as a reference or prompt."""

    sample_id: str
    source_id: str
    text_ids: np.ndarray | None
    code_ids: np.ndarray


class Converter:
    """Rows to documents. One per worker process; it keeps code files open between batches."""

    def __init__(self, job: Job) -> None:
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
        return Batch(self.space, self.loader, samples, batch.path, has_texts=self.job.rules.task != "speech_lm")

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

    # ---- the look over the whole input

    def index(self, source: RowBatch) -> IndexedRows:
        """Keys of the rows, and records of those that can be quoted."""
        batch = self.read(source)
        batch.apply(self.rules_before)
        content = None
        if self.duplicate is not None:
            content = batch.content_hashes(self.duplicate.of or "codes")
            batch.apply(self.rules_after)
        alive = batch.alive()
        records = [b""] * len(batch.samples)
        if self.job.quotes:
            samples = batch.samples
            for row in alive:
                place = samples.codes[row]
                assert place is not None
                text = samples.texts[row][0] if samples.texts[row] else None
                record = (samples.sample_id[row], samples.source_id[row], text, tuple(place))
                records[row] = pickle.dumps(record, protocol=5)
        return IndexedRows(Keys.of(batch.samples, alive, content), records)

    # ---- quotes

    def quotes(self, candidates: np.ndarray) -> list[list[Quote]]:
        """For each row of `candidates`, int64 [n, candidates], its first usable ones, at most `job.quotes`."""
        wanted = self.job.quotes
        first = [int(row) for row in np.unique(candidates[:, :wanted]) if row >= 0]
        known: dict[int, Quote | None] = dict(zip(first, self._load_quotes(first), strict=True))
        result = []
        for row in candidates:
            found: list[Quote] = []
            for number in row.tolist():
                if number < 0 or len(found) == wanted:
                    break
                if number not in known:  # a spare, because an earlier one is unusable
                    known[number] = self._load_quotes([number])[0]
                quote = known[number]
                if quote is not None:
                    found.append(quote)
            result.append(found)
        return result

    def _load_quotes(self, numbers: Sequence[int]) -> list[Quote | None]:
        assert self._record_data is not None
        records = []
        for number in numbers:
            begin, end = int(self._record_offsets[number]), int(self._record_offsets[number + 1])
            sample_id, source_id, text, place = pickle.loads(self._record_data[begin:end])
            records.append(_Record(sample_id, source_id, text, CodesAt(*place)))
        codes = self.loader.encode([record.codes for record in records])
        texts = iter(self.space.encode_text_batch([record.text for record in records if record.text is not None]))
        result: list[Quote | None] = []
        for record, ids in zip(records, codes.ids, strict=True):
            text_ids = next(texts) if record.text is not None else None
            usable = ids is not None and (text_ids is None or len(text_ids) > 0)
            result.append(Quote(record.sample_id, record.source_id, text_ids, ids) if usable else None)  # type: ignore[arg-type]
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
        quotes: list[list[Quote]] | None = None
        if work.candidates is not None:
            usable = np.zeros(len(batch.samples), dtype=bool)
            usable[rows] = True
            quotes = self.quotes(np.where(usable[:, None], work.candidates, -1))
        plan = _Plan(self, batch)
        if quotes is None:
            plan.add_plain(rows)
        else:
            for row in rows:
                if work.plain is not None and work.plain[row]:
                    plan.add(row, [])
                elif quotes[row]:
                    plan.add(row, quotes[row])
                else:
                    plan.without_quote(row)
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
        self.kept: list[int] = []
        self.notices = Counter(batch.samples.notices)
        # Of each document: its row, its form, which of the row's texts it holds (-1: all or none), what it quotes.
        self.row: list[int] = []
        self.form: list[str] = []
        self.text: list[int] = []
        self.quote: list[Quote | None] = []

    def add_plain(self, rows: list[int]) -> None:
        """Documents of samples that quote nothing."""
        if self.job.rules.task == "text_lm":
            for row in rows:
                self.add(row, [])
            return
        self.kept = rows
        self.row = rows
        self.form = ["plain"] * len(rows)
        self.text = [0 if self.job.rules.task == "tts" else -1] * len(rows)
        self.quote = [None] * len(rows)

    def without_quote(self, row: int) -> None:
        self.notices["rows_without_reference"] += 1
        if self.job.drop_unquoted:
            self.batch.dropped["no_reference"] += 1
        else:
            self.add(row, [])

    def add(self, row: int, quotes: Sequence[Quote]) -> None:
        """The documents of one sample: one per quote, or one plain one (one per text of a text row)."""
        self.kept.append(row)
        task = self.job.rules.task
        if task == "text_lm":
            if self.batch.samples.roles[row] is not None:
                self._emit(row, "turns", -1, None)
            else:
                for i in range(len(self.batch.texts[row] or ())):
                    self._emit(row, "plain", i, None)
            return
        text = 0 if task == "tts" else -1
        for quote in quotes:
            self._emit(row, "cloning" if task == "tts" else "continuation", text, quote)
        if not quotes:
            self._emit(row, "plain", text, None)

    def _emit(self, row: int, form: str, text: int, quote: Quote | None) -> None:
        self.row.append(row)
        self.form.append(form)
        self.text.append(text)
        self.quote.append(quote)

    def _fields(self) -> dict[str, list[np.ndarray | None]]:
        task, batch = self.job.rules.task, self.batch
        fields: dict[str, list[np.ndarray | None]] = {}
        if task != "text_lm":
            fields[CODES] = [batch.codes[row] for row in self.row]
        if task != "speech_lm":
            texts = [batch.texts[row] or [] for row in self.row]
            fields[TEXT] = [mine[i] if i >= 0 else None for mine, i in zip(texts, self.text, strict=True)]
        if any(self.quote):
            codes = [quote.code_ids if quote else None for quote in self.quote]
            fields[PROMPT_CODES if task == "speech_lm" else REF_CODES] = codes
            if task == "tts":
                fields[REF_TEXT] = [quote.text_ids if quote else None for quote in self.quote]
        if "turns" in self.form:
            fields[TURNS] = [self._turns(row) if i < 0 else None for row, i in zip(self.row, self.text, strict=True)]
        return fields

    def _turns(self, row: int) -> np.ndarray:
        roles = self.batch.samples.roles[row] or []
        return turn_ids(self.space, list(zip(roles, self.batch.texts[row] or [], strict=True)))

    def _text_columns(self) -> dict[str, np.ndarray]:
        """Of each document's own text: characters, tokens made of them, and unknown ones. Given ids count as none."""
        samples, count = self.batch.samples, len(self.row)
        columns = {name: np.zeros(count, np.int64) for name in ("characters", "target_text_tokens", "unknown_tokens")}
        if self.job.rules.task == "speech_lm":
            return columns
        unknown = self.space.unknown_id
        for i, (row, text) in enumerate(zip(self.row, self.text, strict=True)):
            texts, ids = samples.texts[row], self.batch.texts[row] or []
            if not texts:
                continue
            if text >= 0:
                texts, ids = texts[text : text + 1], ids[text : text + 1]
            columns["characters"][i] = sum(map(len, texts))
            columns["target_text_tokens"][i] = sum(map(len, ids))
            if unknown is not None and self.batch.unknown[row]:
                columns["unknown_tokens"][i] = sum(int(np.count_nonzero(part == unknown)) for part in ids)
        return columns

    def finish(self) -> Documents:
        """All documents, as the writer takes them."""
        rules, batch = self.job.rules, self.batch
        compiled = compile_batch(self.space, rules.task, self.form, self._fields(), append_eod=self.job.append_eod)
        counts = self._text_columns()
        text = compiled.text
        if "turns" in self.form:
            turns = np.array([form == "turns" for form in self.form])
            text = np.where(turns, counts["target_text_tokens"], text)
        if rules.needs_codes:
            frames = np.array([batch.frames(row) for row in self.row], dtype=np.int64)
        else:
            frames = np.zeros(len(self.row), dtype=np.int64)
        counts |= {
            "documents": np.ones(len(self.row), dtype=np.int64),
            "frames": frames,
            "tokens": compiled.tokens,
            "audio_tokens": compiled.audio,
            "text_tokens": text,
            "target_tokens": compiled.target,
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
        whole = self.row == list(range(len(batch.samples)))  # one document a row, as nearly always
        columns: dict[str, Any] = {}
        for name in _OF_SAMPLE:
            column = getattr(batch.samples, name)
            columns[name] = column if whole else [column[row] for row in self.row]
        for name in ("audio_tokens", "text_tokens", "tokens", "target_tokens"):
            columns[name] = counts[name].astype(np.int32)
        if rules.needs_codes:
            columns["code_len"] = counts["frames"].astype(np.int32)
            columns["duration_seconds"] = counts["frames"] / codec.frame_rate_hz
            columns["checksum"] = [batch.checksums[row] for row in self.row]
        if any(self.quote):
            columns["reference_sample_id"] = [quote and quote.sample_id for quote in self.quote]
            columns["reference_source_id"] = [quote and quote.source_id for quote in self.quote]
        constants = {
            "task": rules.task,
            "codec_hash": codec.hash if rules.needs_codes else None,
            "tokenizer_version": self.tokenizer_version,
            "normalization_version": NORMALIZATION_VERSION,
        }
        arrays = []
        for column_field in SCHEMA:
            name, kind = column_field.name, column_field.type
            if name in columns:
                arrays.append(pa.array(columns[name], kind))
            else:
                value = constants.get(name)
                arrays.append(pa.nulls(count, kind) if value is None else pa.repeat(pa.scalar(value, kind), count))
        return pa.record_batch(arrays, schema=SCHEMA)

    def _totals(self, counts: dict[str, np.ndarray]) -> dict[tuple[str, str], Totals]:
        samples = self.batch.samples
        index: dict[tuple[str, str], int] = {}
        group = np.array(
            [index.setdefault((samples.language[row], samples.dataset_source[row]), len(index)) for row in self.row],
            dtype=np.int64,
        )
        sums = {}
        for name, values in counts.items():
            sums[name] = np.zeros(len(index), dtype=np.int64)
            np.add.at(sums[name], group, values)
        return {key: Totals(**{name: int(values[i]) for name, values in sums.items()}) for key, i in index.items()}


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
