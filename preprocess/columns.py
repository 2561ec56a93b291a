"""Rows to samples by the batch: one pass per field over all rows, instead of one over all fields per row.

Only rows in which every field is of the usual kind are taken that way. Any other one goes through
:meth:`SampleRules.sample`, which says what is wrong with it, or that nothing is. Both ways give the same sample.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_speech.text import normalize_document, normalize_transcript
from preprocess.readers import source
from preprocess.readers.base import Row, RowRejected
from preprocess.samples import TEXT_IDS, TRANSCRIPTS, CodesAt, Sample, SampleRules, extra_json

_TEXT_OR_NONE = {str, type(None)}
_INTEGER_OR_NONE = {int, type(None)}

# The columns that are one value of the sample each.
VALUES = (
    "sample_id",
    "source_id",
    "language",
    "dataset_source",
    "segment_order",
    "start_time",
    "end_time",
    "speaker_id",
    "transcript_native",
    "transcript_romanized",
    "codec_hash",
    "codes",
    "texts",
    "roles",
    "text_ids",
    "extra",
)


@dataclass
class Samples:
    """Samples of a batch, column by column; entries of `rejected` rows mean nothing.

    Attributes:
        rows: the rows that the samples are made of.
        number: of each row.
        rejected: rows that are no sample, and why.
        notices: counted for the report.
    """

    rows: list[Row]
    number: list[int]
    sample_id: list[str]
    source_id: list[str]
    language: list[str]
    dataset_source: list[str]
    segment_order: list[int | None]
    start_time: list[float | None]
    end_time: list[float | None]
    speaker_id: list[str | None]
    transcript_native: list[str | None]
    transcript_romanized: list[str | None]
    codec_hash: list[str | None]
    codes: list[CodesAt | None]
    texts: list[list[str]]
    roles: list[list[str] | None]
    text_ids: list[np.ndarray | None]
    extra: list[str | None]
    rejected: dict[int, RowRejected] = field(default_factory=dict)
    notices: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.number)

    def put(self, index: int, sample: Sample) -> None:
        """Fill in a sample that was made on its own."""
        for name in VALUES:
            getattr(self, name)[index] = getattr(sample, name)

    def get(self, index: int) -> Sample:
        """One sample."""
        return Sample(number=self.number[index], **{name: getattr(self, name)[index] for name in VALUES})


def read_samples(rules: SampleRules, rows: list[Row], path: str) -> Samples:
    """The samples in `rows` of the file `path`: what `rules.sample` gives for each."""
    columns = _Columns(rules, rows, path)
    samples = columns.samples()
    for index in sorted(columns.odd):
        try:
            samples.put(index, rules.sample(rows[index], path))
        except RowRejected as error:
            samples.rejected[index] = error
    for row in rows:
        if row.notices:
            samples.notices.update(row.notices)
    return samples


class _Columns:
    """Reads columns of fields; `odd` are the rows that have to be looked at on their own."""

    def __init__(self, rules: SampleRules, rows: list[Row], path: str) -> None:
        self.rules = rules
        self.rows = rows
        self.path = path
        self.fields = [row.fields for row in rows]
        self.odd = {i for i, row in enumerate(rows) if row.rejected is not None}

    def _get(self, name: str) -> list[Any]:
        return [fields.get(name) for fields in self.fields]

    def _mark(self, column: list[Any], is_odd: Callable[[Any], bool]) -> list[Any]:
        """Note the rows whose value is odd, and take it out."""
        odd = [i for i, value in enumerate(column) if is_odd(value)]
        self.odd.update(odd)
        for i in odd:
            column[i] = None
        return column

    def texts(self, name: str) -> list[str | None]:
        """Texts that are not empty, or None."""
        column = self._get(name)
        if not set(map(type, column)) <= _TEXT_OR_NONE:
            self._mark(column, lambda value: type(value) not in _TEXT_OR_NONE)
        return [value or None for value in column] if "" in column else column

    def integers(self, name: str) -> list[int | None]:
        """Whole numbers that a float holds exactly, or None."""
        column = self._get(name)
        kinds = set(map(type, column))
        if kinds == {type(None)}:
            return column
        if kinds == {int} and min(column) > -(2**53) and max(column) < 2**53:
            return column
        return self._mark(
            column, lambda value: type(value) not in _INTEGER_OR_NONE or (value is not None and abs(value) >= 2**53)
        )

    def floats(self, name: str) -> list[float | None]:
        """Finite numbers, or None."""
        column = self._get(name)
        kinds = set(map(type, column))
        if kinds == {type(None)} or (kinds == {float} and all(map(math.isfinite, column))):
            return column
        self._mark(
            column,
            lambda value: (
                value is not None
                and not (type(value) is float and math.isfinite(value))
                and not (type(value) is int and abs(value) < 2**53)
            ),
        )
        return [None if value is None else float(value) for value in column]

    def samples(self) -> Samples:
        """All rows; what stands in those of `odd` means nothing yet."""
        count = len(self.rows)
        stem = source.stem(self.path)
        number = [row.number for row in self.rows]
        sample_id = [value or f"{stem}-{n:08d}" for value, n in zip(self.texts("sample_id"), number, strict=True)]
        source_id = [value or own for value, own in zip(self.texts("source_id"), sample_id, strict=True)]
        default = self.rules.dataset_source or stem
        dataset_source = [value or default for value in self.texts("dataset_source")]
        native, second = self.texts("transcript"), self.texts("transcript_native")
        if None in native:
            native = [value or other for value, other in zip(native, second, strict=True)]
        nothing: list[Any] = [None] * count
        texts: list[list[str]] = [[] for _ in range(count)]
        if self.rules.task == "tts":
            texts = [[text] for text in self._transcripts()]
        elif self.rules.task == "text_lm":
            texts = self._documents()
        return Samples(
            rows=self.rows,
            number=number,
            sample_id=sample_id,
            source_id=source_id,
            language=self._languages(),
            dataset_source=dataset_source,
            segment_order=self.integers("segment_order"),
            start_time=self.floats("start_time"),
            end_time=self.floats("end_time"),
            speaker_id=self.texts("speaker_id"),
            transcript_native=native,
            transcript_romanized=self.texts("transcript_romanized"),
            codec_hash=self.texts("codec_hash"),
            codes=self._codes() if self.rules.needs_codes else nothing,
            texts=texts,
            roles=list(nothing),
            text_ids=list(nothing),
            extra=self._extra(),
        )

    def _languages(self) -> list[str]:
        column = self.texts("language")
        if None in column:
            default = self.rules.language or ("und" if not self.rules.needs_codes else None)
            if default is None:
                self.odd.update(i for i, value in enumerate(column) if value is None)
            column = [value or default for value in column]
        return column  # type: ignore[return-value]  # None only in odd rows

    def _codes(self) -> list[CodesAt | None]:
        checksum, length = self.texts("checksum"), self.integers("code_len")
        inline = self._get("codes")
        path, offset = self.texts("codes_path"), self.integers("code_offset")
        folder = source.folder(self.path)
        local = "" if source.is_url(folder) else os.path.join(folder, "")
        result: list[CodesAt | None] = []
        known: dict[str, str] = {}
        for i, codes in enumerate(inline):
            frames, begin, where = length[i], offset[i], path[i]
            if codes is not None:
                result.append(CodesAt(codes, None, None, frames, checksum[i]))
            elif where is None or (begin is not None and (frames is None or begin < 0)) or (frames or 0) < 0:
                self.odd.add(i)
                result.append(None)
            else:
                located = known.get(where)
                if located is None:
                    plain = local and where[0] != "/" and ":" not in where
                    located = known[where] = local + where if plain else source.join(folder, where)
                result.append(CodesAt(None, located, begin, frames, checksum[i]))
        return result

    def _transcripts(self) -> list[str]:
        names = TRANSCRIPTS[self.rules.transcript]
        column = self._get(names[0])
        for name in names[1:]:
            column = [other if value is None else value for value, other in zip(column, self._get(name), strict=True)]
        return self._normal(column, normalize_transcript)

    def _documents(self) -> list[list[str]]:
        for name in ("messages", "turns", TEXT_IDS):
            self.odd.update(i for i, fields in enumerate(self.fields) if fields.get(name) is not None)
        columns = [self._normal(self._get(key), normalize_document) for key in self.rules.json_keys]
        return [list(texts) for texts in zip(*columns, strict=True)]

    def _normal(self, column: list[Any], normalize: Callable[[str], str]) -> list[str]:
        if set(map(type, column)) != {str}:
            self._mark(column, lambda value: type(value) is not str)
            column = ["" if value is None else value for value in column]
        result = list(map(normalize, column))
        if "" in result:
            self.odd.update(i for i, text in enumerate(result) if not text)
        return result

    def _extra(self) -> list[str | None]:
        used = self.rules.used_fields()
        result: list[str | None] = []
        for i, fields in enumerate(self.fields):
            more = fields.keys() - used
            try:
                result.append(extra_json({name: fields[name] for name in more}) if more and i not in self.odd else None)
            except RowRejected:
                self.odd.add(i)
                result.append(None)
        return result


def join_texts(texts: Sequence[list[str]]) -> list[str]:
    """All texts, row after row."""
    return [text for row in texts for text in row]
