"""A batch of rows to a batch of documents: what every worker process does."""

from __future__ import annotations

import mmap
import pickle
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_speech.data.documents_table import SCHEMA, derive_columns
from megatron_speech.data.manifest import Totals
from megatron_speech.errors import InputError
from megatron_speech.files import sha256_hex
from megatron_speech.tasks import compile_document, count_target_tokens
from megatron_speech.text import NORMALIZATION_VERSION
from megatron_speech.token_space import TokenSpace
from preprocess.codes import CodesLoader, EncodedCodes
from preprocess.readers.base import RowBatch, RowRejected
from preprocess.references import Keys
from preprocess.samples import Sample, SampleRules


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


@dataclass(frozen=True)
class Work:
    """One item of work: rows, and for each of them the row numbers of what it may quote (-1: none; no column: none)."""

    batch: RowBatch
    candidates: np.ndarray | None = None  # int64 [rows, candidates]
    plain: np.ndarray | None = None  # bool [rows]: make a plain document of this row all the same


@dataclass
class Documents:
    """What a batch of rows became. Mergeable: all but ids, lengths and table are counts."""

    flat: np.ndarray
    lengths: np.ndarray
    table: pa.RecordBatch
    rows: int
    kept: int
    dropped: Counter[str]
    notices: Counter[str]
    forms: Counter[str]
    totals: dict[tuple[str, str], Totals]  # (language, source)
    rejected: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Quote:
    """Another sample as a reference or prompt."""

    sample_id: str
    source_id: str
    text_ids: np.ndarray | None
    code_ids: np.ndarray


@dataclass(frozen=True)
class Encoded:
    """A sample with its texts and codes as ids."""

    sample: Sample
    texts: list[np.ndarray]
    codes: EncodedCodes | None


class Converter:
    """Rows to documents. One per worker process; it keeps code files open between batches."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.space = job.space
        self.loader = CodesLoader(job.space)
        self.tokenizer_version = tokenizer_version(job.space)
        self._record_data: mmap.mmap | None = None
        if job.records is not None:
            with open(job.records.data, "rb") as handle:
                self._record_data = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
            self._record_offsets = np.load(job.records.offsets, mmap_mode="r")

    # ---- rows to samples

    def parse(self, batch: RowBatch) -> list[Sample | RowRejected]:
        """Samples of a batch in the order of its rows, or why a row is none.

        Raises:
            InputError: codes of another codec than the token space's.
        """
        result: list[Sample | RowRejected] = []
        for row in batch.read():
            try:
                sample = self.job.rules.sample(row, batch.path)
            except RowRejected as error:
                error.number = row.number
                result.append(error)
                continue
            codec = self.space.codec
            if sample.codec_hash is not None and self.job.rules.needs_codes and sample.codec_hash != codec.hash:
                raise InputError(
                    f"{batch.path} line {row.number}: codec_hash is {sample.codec_hash}, needed {codec.hash} "
                    f"({codec.name}) of the token space; encode the audio with that codec, or make another token space"
                )
            result.append(sample)
        return result

    def encode(self, samples: Sequence[Sample]) -> list[Encoded | RowRejected]:
        """Texts and codes of samples as ids."""
        texts = iter(self.space.encode_text_batch([text for sample in samples for text in sample.texts]))
        places = [sample.codes for sample in samples if sample.codes is not None]
        codes = iter(self.loader.encode(places))
        result: list[Encoded | RowRejected] = []
        for sample in samples:
            text_ids = [next(texts) for _ in sample.texts]
            code = next(codes) if sample.codes is not None else None
            if any(len(ids) == 0 for ids in text_ids):
                result.append(RowRejected("no_tokens", "the text tokenizer yields nothing for the text"))
            elif isinstance(code, RowRejected):
                result.append(code)
            else:
                result.append(Encoded(sample, text_ids, code))
        return result

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
        samples: list[Sample] = []
        for number in numbers:
            begin, end = int(self._record_offsets[number]), int(self._record_offsets[number + 1])
            samples.append(pickle.loads(self._record_data[begin:end]))
        return [
            Quote(item.sample.sample_id, item.sample.source_id, item.texts[0] if item.texts else None, item.codes.ids)
            if isinstance(item, Encoded) and item.codes is not None
            else None
            for item in self.encode(samples)
        ]

    # ---- documents

    def convert(self, work: Work) -> Documents:
        """Documents of a batch of rows."""
        parsed = self.parse(work.batch)
        encoded = iter(self.encode([sample for sample in parsed if isinstance(sample, Sample)]))
        outcomes = [next(encoded) if isinstance(item, Sample) else item for item in parsed]
        quotes: list[list[Quote]] = [[] for _ in outcomes]
        if work.candidates is not None:
            usable = np.array([isinstance(item, Encoded) for item in outcomes])
            quotes = self.quotes(np.where(usable[:, None], work.candidates, -1))
        builder = _Builder(self)
        for i, (item, sample) in enumerate(zip(outcomes, parsed, strict=True)):
            if isinstance(item, RowRejected):
                builder.reject(work.batch.path, sample, item)
            elif self.job.quotes == 0 or (work.plain is not None and work.plain[i]):
                builder.add(item, [])
            elif quotes[i]:
                builder.add(item, quotes[i])
            else:
                builder.without_quote(item)
        return builder.finish(len(outcomes))


@dataclass(frozen=True)
class _Emitted:
    """A document and what its row of the documents table is made of."""

    item: Encoded
    quote: Quote | None
    document: np.ndarray
    audio_tokens: int
    text_tokens: int
    target_tokens: int


# Columns of the documents table that are attributes of the sample.
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


class _Builder:
    """Collects the documents of a batch."""

    def __init__(self, converter: Converter) -> None:
        self.job = converter.job
        self.space = converter.space
        self.tokenizer_version = converter.tokenizer_version
        self.emitted: list[_Emitted] = []
        self.dropped: Counter[str] = Counter()
        self.notices: Counter[str] = Counter()
        self.forms: Counter[str] = Counter()
        self.rejected: list[dict[str, Any]] = []
        self.kept = 0

    def reject(self, path: str, sample: Sample | RowRejected, why: RowRejected) -> None:
        number = sample.number
        row = {"input": path, "line": number, "rule": why.rule, "reason": why.reason}
        if isinstance(sample, Sample):
            row["sample_id"] = sample.sample_id
        self.rejected.append(row)
        self.dropped[why.rule] += 1

    def without_quote(self, item: Encoded) -> None:
        self.notices["rows_without_reference"] += 1
        if self.job.drop_unquoted:
            self.dropped["no_reference"] += 1
        else:
            self.add(item, [])

    def add(self, item: Encoded, quotes: Sequence[Quote]) -> None:
        """The documents of one sample: one per quote, or one plain one (one per text of a text row)."""
        self.kept += 1
        if item.codes is not None and item.sample.codec_hash is None:
            self.notices["rows_without_codec_hash"] += 1
        task = self.job.rules.task
        if task == "speech_lm":
            for quote in quotes:
                self._emit("continuation", item, quote, prompt_code_ids=quote.code_ids)
            if not quotes:
                self._emit("plain", item)
        elif task == "tts":
            for quote in quotes:
                reference = {"ref_text_ids": quote.text_ids, "ref_code_ids": quote.code_ids}
                self._emit("cloning", item, quote, text_ids=item.texts[0], **reference)
            if not quotes:
                self._emit("plain", item, text_ids=item.texts[0])
        elif item.sample.roles is not None:
            self._emit("turns", item, turns=list(zip(item.sample.roles, item.texts, strict=True)))
        else:
            for ids in item.texts:
                self._emit("plain", item, text_ids=ids)

    def _emit(self, form: str, item: Encoded, quote: Quote | None = None, **ids: Any) -> None:
        if item.codes is not None:
            ids["code_ids"] = item.codes.ids
        document = compile_document(self.space, self.job.rules.task, append_eod=self.job.append_eod, **ids)
        audio = sum(len(value) for name, value in ids.items() if name.endswith("code_ids"))
        text = sum(len(value) for name, value in ids.items() if name.endswith("text_ids"))
        text += sum(len(turn) for _, turn in ids.get("turns", ()))
        target = count_target_tokens(self.space, document)
        self.emitted.append(_Emitted(item, quote, document, audio, text, target))
        self.forms[form] += 1

    def _columns(self) -> dict[str, list[Any]]:
        emitted, rules, codec = self.emitted, self.job.rules, self.space.codec
        samples = [one.item.sample for one in emitted]
        codes = [one.item.codes for one in emitted]
        columns: dict[str, list[Any]] = {name: [getattr(sample, name) for sample in samples] for name in _OF_SAMPLE}
        columns |= {
            "code_len": [code.frames if code else None for code in codes],
            "duration_seconds": [code.frames / codec.frame_rate_hz if code else None for code in codes],
            "checksum": [code.checksum if code else None for code in codes],
            "audio_tokens": [one.audio_tokens for one in emitted],
            "text_tokens": [one.text_tokens for one in emitted],
            "tokens": [len(one.document) for one in emitted],
            "target_tokens": [one.target_tokens for one in emitted],
            "reference_sample_id": [one.quote.sample_id if one.quote else None for one in emitted],
            "reference_source_id": [one.quote.source_id if one.quote else None for one in emitted],
            "task": [rules.task] * len(emitted),
            "codec_hash": [codec.hash if rules.needs_codes else None] * len(emitted),
            "tokenizer_version": [self.tokenizer_version] * len(emitted),
            "normalization_version": [NORMALIZATION_VERSION] * len(emitted),
        }
        return columns

    def _totals(self) -> dict[tuple[str, str], Totals]:
        sums: dict[tuple[str, str], np.ndarray] = {}
        for one in self.emitted:
            sample, codes = one.item.sample, one.item.codes
            frames = codes.frames if codes else 0
            counts = (1, frames, len(one.document), one.audio_tokens, one.text_tokens, one.target_tokens)
            key = (sample.language, sample.dataset_source)
            if key in sums:
                sums[key] += counts
            else:
                sums[key] = np.array(counts, dtype=np.int64)
        names = ("documents", "frames", "tokens", "audio_tokens", "text_tokens", "target_tokens")
        return {key: Totals(**dict(zip(names, counts.tolist(), strict=True))) for key, counts in sums.items()}

    def finish(self, rows: int) -> Documents:
        """All documents, as the writer takes them."""
        documents = [one.document for one in self.emitted]
        flat = (np.concatenate(documents) if documents else np.zeros(0, np.int32)).astype(self.space.dtype)
        lengths = np.array([len(document) for document in documents], dtype=np.int32)
        columns = self._columns()
        missing = [None] * len(documents)
        table = pa.record_batch([pa.array(columns.get(f.name, missing), f.type) for f in SCHEMA], schema=SCHEMA)
        return Documents(
            flat=flat,
            lengths=lengths,
            table=derive_columns(table, flat, lengths),
            rows=rows,
            kept=self.kept,
            dropped=self.dropped,
            notices=self.notices,
            forms=self.forms,
            totals=self._totals(),
            rejected=self.rejected,
        )


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
    """Rows to the keys by which references are chosen, and records from which they are made."""
    samples = [item if isinstance(item, Sample) else None for item in converter.parse(batch)]
    return IndexedRows(Keys.of(samples), [pickle.dumps(sample) if sample else b"" for sample in samples])
