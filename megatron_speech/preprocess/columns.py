"""Rows to samples by the batch: one pass per field over all rows, instead of one over all fields per row.

Only rows in which every field is of the usual kind are taken that way. Any other one goes through
:meth:`SampleRules.sample`, which says what is wrong with it, or that nothing is. Both ways give the same sample.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_speech.preprocess.fields import OUTSIDE, local_name
from megatron_speech.preprocess.readers import source
from megatron_speech.preprocess.readers.base import Row, RowRejected, Rows
from megatron_speech.preprocess.samples import (
    CONVERSATIONS,
    TEXT_IDS,
    TRANSCRIPTS,
    CodesAt,
    Sample,
    SampleRules,
    extra_json,
)
from megatron_speech.remote import is_url
from megatron_speech.tokens.normalization import normalize_documents, normalize_transcripts

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


class Constant(Sequence[Any]):
    """A column that holds the same in every row: of most fields, that they are not there."""

    def __init__(self, value: Any, count: int) -> None:
        self.value, self._count = value, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        return self.value

    def __iter__(self) -> Iterator[Any]:
        return itertools.repeat(self.value, self._count)


def pick(column: Sequence[Any], rows: Sequence[int]) -> Sequence[Any]:
    """Some rows of a column."""
    return Constant(column.value, len(rows)) if isinstance(column, Constant) else [column[row] for row in rows]


def to_arrow(column: Sequence[Any] | np.ndarray, kind: pa.DataType) -> pa.Array:
    """A column as Arrow has it."""
    return _repeated(column.value, len(column), kind) if isinstance(column, Constant) else pa.array(column, kind)


@functools.lru_cache(maxsize=256)  # every batch needs the same
def _repeated(value: Any, count: int, kind: pa.DataType) -> pa.Array:
    return pa.nulls(count, kind) if value is None else pa.repeat(pa.scalar(value, kind), count)


@dataclass
class Samples:
    """Samples of a batch, column by column; entries of `rejected` rows mean nothing.

    Attributes:
        rows: the rows that the samples are made of.
        number: of each row.
        rejected: rows that are no sample, and why.
        notices: counted for the report.
    """

    rows: Rows
    number: Sequence[int]
    sample_id: Sequence[str]
    source_id: Sequence[str]
    language: Sequence[str]
    dataset_source: Sequence[str]
    segment_order: Sequence[int | None]
    start_time: Sequence[float | None]
    end_time: Sequence[float | None]
    speaker_id: Sequence[str | None]
    transcript_native: Sequence[str | None]
    transcript_romanized: Sequence[str | None]
    codec_hash: Sequence[str | None]
    codes: Sequence[CodesAt | None]
    texts: Sequence[Sequence[str]]
    roles: Sequence[list[str] | None]
    text_ids: Sequence[np.ndarray | None]
    extra: Sequence[str | None]
    rejected: dict[int, RowRejected] = field(default_factory=dict)
    notices: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.number)

    def put(self, samples: dict[int, Sample]) -> None:
        """Fill in samples that were made on their own, by index."""
        for name in VALUES if samples else ():
            column = list(getattr(self, name))
            for index, sample in samples.items():
                column[index] = getattr(sample, name)
            setattr(self, name, column)


def read_samples(rules: SampleRules, rows: Sequence[Row] | Rows, path: str) -> Samples:
    """The samples in `rows` of the file `path`: what `rules.sample` gives for each."""
    rows = Rows.of(rows)
    present: set[str] = set().union(*rows.fields)
    renamed, errors = rules.names.rename(rows.fields, present)
    for index, problem in errors.items():
        rows.rejected.setdefault(index, RowRejected(problem.rule, problem.reason))
    columns = _Columns(rules, rows, path, set().union(*rows.fields) if renamed else present)
    samples = columns.samples()
    alone = {}
    for index in sorted(columns.odd):
        try:
            if index in rows.rejected:
                raise rows.rejected[index]
            alone[index] = rules.named_sample(rows.fields[index], rows.number[index], path)
        except RowRejected as error:
            samples.rejected[index] = error
    samples.put(alone)
    for notices in rows.notices.values():
        samples.notices.update(notices)
    samples.notices.update(renamed)
    if "\n/" in "\n" + "\n".join(samples.source_id):
        left = (name for i, name in enumerate(samples.source_id) if i not in samples.rejected)
        samples.notices[OUTSIDE] += sum(name.startswith("/") for name in left)
    return samples


class _Columns:
    """Reads columns of fields; `odd` are the rows that have to be read one by one."""

    def __init__(self, rules: SampleRules, rows: Rows, path: str, present: set[str]) -> None:
        self.rules = rules
        self.rows = rows
        self.path = path
        self.fields = rows.fields
        self.odd = set(rows.rejected)
        self.present = present
        self.nothing = Constant(None, len(rows))

    def _get(self, name: str) -> Any:
        """The column of a field: a list, or `nothing`."""
        return [fields.get(name) for fields in self.fields] if name in self.present else self.nothing

    def _mark(self, column: list[Any], is_odd: Callable[[Any], bool]) -> list[Any]:
        """Note the rows whose value is odd, and take it out."""
        odd = [i for i, value in enumerate(column) if is_odd(value)]
        self.odd.update(odd)
        for i in odd:
            column[i] = None
        return column

    def texts(self, name: str) -> Sequence[str | None]:
        """Texts that are not empty, or None."""
        column = self._get(name)
        if column is self.nothing:
            return column
        if not set(map(type, column)) <= _TEXT_OR_NONE:
            self._mark(column, lambda value: type(value) not in _TEXT_OR_NONE)
        return [value or None for value in column] if "" in column else column

    def integers(self, name: str) -> Sequence[int | None]:
        """Whole numbers that a float holds exactly, or None."""
        column = self._get(name)
        if column is self.nothing:
            return column
        kinds = set(map(type, column))
        if kinds == {int} and min(column) > -(2**53) and max(column) < 2**53:
            return column
        return self._mark(
            column, lambda value: type(value) not in _INTEGER_OR_NONE or (value is not None and abs(value) >= 2**53)
        )

    def floats(self, name: str) -> Sequence[float | None]:
        """Finite numbers, or None."""
        column = self._get(name)
        if column is self.nothing or (set(map(type, column)) == {float} and all(map(math.isfinite, column))):
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

    def _or(self, column: Sequence[Any], other: Sequence[Any]) -> Any:
        """`column`, and where it holds None, `other`."""
        if column is self.nothing:
            return other
        return [own or another for own, another in zip(column, other, strict=True)] if None in column else column

    def _local(self, names: Sequence[str]) -> Sequence[str]:
        """Names without the place where the corpus lies."""
        joined = "\n".join(names)
        if not joined.startswith("/") and "\n/" not in joined and "://" not in joined:
            return names
        folder = source.folder(self.path)
        return [local_name(name, folder) for name in names]

    def samples(self) -> Samples:
        """All rows; the values of `odd` rows are not valid yet."""
        count = len(self.rows)
        stem = source.stem(self.path)
        template = self.rules.stems.get(self.path, stem).replace("%", "%%") + "-%08d"
        sample_id: Any = self.texts("sample_id")
        if sample_id is self.nothing or None in sample_id:
            sample_id = self._or(sample_id, [template % number for number in self.rows.number])
        native = self.texts("transcript")
        texts: Sequence[Sequence[str]] = Constant((), count)
        if self.rules.needs_transcripts:
            texts = list(zip(self._transcripts(), strict=True))
        elif self.rules.task == "text_lm":
            texts = self._documents()
        return Samples(
            rows=self.rows,
            number=self.rows.number,
            sample_id=sample_id,
            source_id=self._local(self._or(self.texts("source_id"), sample_id)),
            language=self._languages(),
            dataset_source=self._or(self.texts("dataset_source"), Constant(self.rules.dataset_source or stem, count)),
            segment_order=self.integers("segment_order"),
            start_time=self.floats("start_time"),
            end_time=self.floats("end_time"),
            speaker_id=self.texts("speaker_id"),
            transcript_native=self._or(native, self.texts("transcript_native")),
            transcript_romanized=self.texts("transcript_romanized"),
            codec_hash=self.texts("codec_hash"),
            codes=self._codes() if self.rules.needs_codes else self.nothing,
            texts=texts,
            roles=self.nothing,
            text_ids=self.nothing,
            extra=self._extra(),
        )

    def _languages(self) -> Sequence[str]:
        column = self.texts("language")
        default = self.rules.language or ("und" if not self.rules.needs_codes else None)
        if default is None:
            self.odd.update(i for i, value in enumerate(column) if value is None)
        return self._or(column, Constant(default, len(column)))

    def _codes(self) -> Sequence[CodesAt | None]:
        checksum, length = self.texts("checksum"), self.integers("code_len")
        inline = self._get("codes")
        path, offset = self.texts("codes_path"), self.integers("code_offset")
        folder = source.folder(self.path)
        local = "" if is_url(folder) else os.path.join(folder, "")
        result: list[CodesAt | None] = []
        known: dict[str, str] = {}
        rows = zip(inline, length, offset, path, checksum, strict=True)
        for i, (codes, frames, begin, where, stated) in enumerate(rows):
            if codes is not None:
                result.append(CodesAt(codes, None, None, frames, stated))
            elif where is None or (begin is not None and (frames is None or begin < 0)) or (frames or 0) < 0:
                self.odd.add(i)
                result.append(None)
            else:
                located = known.get(where)
                if located is None:
                    plain = local and where[0] != "/" and ":" not in where
                    located = known[where] = local + where if plain else source.join(folder, where)
                result.append(CodesAt(None, located, begin, frames, stated))
        return result

    def _transcripts(self) -> list[str]:
        names = TRANSCRIPTS[self.rules.transcript]
        column = self._get(names[0])
        for name in names[1:]:
            if name in self.present:
                column = [mine if mine is not None else its for mine, its in zip(column, self._get(name), strict=True)]
        return self._normal(column, normalize_transcripts)

    def _documents(self) -> Sequence[Sequence[str]]:
        for name in (*CONVERSATIONS, TEXT_IDS):
            if name in self.present:
                self.odd.update(i for i, fields in enumerate(self.fields) if fields.get(name) is not None)
        columns = [self._normal(self._get(key), normalize_documents) for key in self.rules.json_keys]
        return list(zip(*columns, strict=True))

    def _normal(self, column: Sequence[Any], normalize: Callable[[Sequence[str]], list[str]]) -> list[str]:
        if set(map(type, column)) != {str}:
            column = [
                "" if value is None else value for value in self._mark(list(column), lambda v: type(v) is not str)
            ]
        result = normalize(column)
        if "" in result:
            self.odd.update(i for i, text in enumerate(result) if not text)
        return result

    def _extra(self) -> Sequence[str | None]:
        used = self.rules.used_fields()
        if self.present <= used:
            return self.nothing
        result: list[str | None] = []
        for i, fields in enumerate(self.fields):
            more = fields.keys() - used
            try:
                result.append(extra_json({name: fields[name] for name in more}) if more and i not in self.odd else None)
            except RowRejected:
                self.odd.add(i)
                result.append(None)
        return result
