"""The interface of row readers.

A reader hands out the rows of its files in batches. A batch is small, travels to a worker process, and is read there:
where files can be read from any position it says where the rows lie; of a stream it carries their bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

BATCH_ROWS = 1024
BATCH_BYTES = 4 << 20


class RowRejected(Exception):
    """A row that cannot be used. `rule` is counted, `reason` is written to the rejected rows."""

    def __init__(self, rule: str, reason: str, number: int = 0) -> None:
        super().__init__(rule, reason, number)
        self.rule = rule
        self.reason = reason
        self.number = number  # of the row, where it is known


@dataclass(slots=True)
class Row:
    """One row: its fields, or why it has none.

    `number` counts from 1: the line of a text file, the row of a table, the sample of an archive. A field `codes` or
    `text_ids` is an integer array where the file holds arrays. `notices` name what the file holds beside the row and
    are not read (`tar_member:.wav`); they are counted, and drop nothing.
    """

    number: int
    fields: dict[str, Any]
    rejected: RowRejected | None = None
    notices: tuple[str, ...] = ()


@dataclass
class Rows:
    """The rows of a batch by column. As a sequence it is the rows themselves; changing one changes no column.

    Attributes:
        number: of each row.
        fields: of each row; empty where the row has none.
        rejected: why rows have none, by index.
        notices: of rows that have any, by index.
    """

    number: Sequence[int]
    fields: list[dict[str, Any]]
    rejected: dict[int, RowRejected] = field(default_factory=dict)
    notices: dict[int, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Sequence[Row] | Rows) -> Rows:
        """The columns of some rows."""
        if isinstance(rows, Rows):
            return rows
        return cls(
            number=[row.number for row in rows],
            fields=[row.fields for row in rows],
            rejected={i: row.rejected for i, row in enumerate(rows) if row.rejected is not None},
            notices={i: row.notices for i, row in enumerate(rows) if row.notices},
        )

    def __len__(self) -> int:
        return len(self.fields)

    def __getitem__(self, index: int) -> Row:
        return Row(self.number[index], self.fields[index], self.rejected.get(index), self.notices.get(index, ()))

    def __iter__(self) -> Iterator[Row]:
        return map(self.__getitem__, range(len(self)))


class RowBatch(Protocol):
    """Some consecutive rows of a file."""

    @property
    def path(self) -> str:
        """The file; relative paths in its rows are relative to its folder."""
        ...

    @property
    def rows(self) -> int:
        """Number of rows."""
        ...

    def read(self) -> list[Row] | Rows:
        """Read and parse the rows, `rows` of them."""
        ...


class RowReader(Protocol):
    """Rows of one file, or of files that belong together. Making one opens nothing."""

    path: str
    files: tuple[str, ...]  # all that is read

    @property
    def known_rows(self) -> int | None:
        """Number of rows; None where counting them would mean to read the data, and no pass has yet."""
        ...

    @property
    def rows(self) -> int:
        """Number of rows, counted if need be."""
        ...

    def batches(self, start: int, stop: int | None = None) -> Iterator[RowBatch]:
        """Rows `start` to `stop` (from 0; None: the end), in order, in batches of at most `BATCH_ROWS`.

        After the last row of the reader has been reached, `known_rows` is known.
        """
        ...


class RowRun(RowBatch, Protocol):
    """A batch of which a part can be taken."""

    def part(self, first: int, last: int) -> RowBatch:
        """Its rows `first` to `last` (from 0)."""
        ...


class RunReader:
    """A reader of one file that is cut into runs, in order."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.files: tuple[str, ...] = (path,)

    def _runs(self) -> Iterator[RowRun]:
        """All runs of the file."""
        raise NotImplementedError

    def batches(self, start: int, stop: int | None = None) -> Iterator[RowBatch]:
        """Rows `start` to `stop` (from 0), in order."""
        position = 0
        for run in self._runs():
            if stop is not None and position >= stop:
                return
            first = max(start - position, 0)
            last = run.rows if stop is None else min(stop - position, run.rows)
            position += run.rows
            if first < last:
                yield run.part(first, last)


class StreamReader(RunReader):
    """A compressed or remote file: read from its beginning for every pass."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.known_rows: int | None = None

    def _stream(self) -> Iterator[RowRun]:
        """The runs, read from the file."""
        raise NotImplementedError

    def _runs(self) -> Iterator[RowRun]:
        rows = 0
        for run in self._stream():
            rows += run.rows
            yield run
        self.known_rows = rows

    @property
    def rows(self) -> int:
        """Number of rows; the file is read for it."""
        if self.known_rows is None:
            for _ in self._runs():
                pass
        assert self.known_rows is not None
        return self.known_rows


@dataclass(frozen=True)
class ReadOptions:
    """What some formats need to know beside their files."""

    tokenizer: str | None = None  # folder of the Hugging Face tokenizer that wrote the ids (LLaSA's memmaps)
    eod: int | None = None  # id that ends a document and is no part of it (megatron's .bin/.idx)
    recordings: bool = False  # rows are to be encoded: hand out where their recordings lie
