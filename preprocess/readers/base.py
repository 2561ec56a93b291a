"""The interface of row readers.

A reader knows how many rows its file has and hands them out in batches. A batch is small, travels to a worker
process, and is read there: for most formats it says where the rows lie and does not hold them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

# As files.canonical_json; made once, since it runs for every row.
_EXTRA = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)

BATCH_ROWS = 512
BATCH_BYTES = 4 << 20


class RowRejected(Exception):
    """A row that cannot be used. `rule` is counted, `reason` is written to the rejected rows."""

    def __init__(self, rule: str, reason: str, number: int = 0) -> None:
        super().__init__(rule, reason, number)
        self.rule = rule
        self.reason = reason
        self.number = number  # of the row, where it is known


@dataclass(frozen=True)
class Row:
    """One row: its fields, or why it has none. `number` counts from 1: the line of a text file."""

    number: int
    fields: dict[str, Any]
    rejected: RowRejected | None = None


class RowBatch(Protocol):
    """Some consecutive rows of a file."""

    @property
    def path(self) -> str:
        """The file."""
        ...

    @property
    def rows(self) -> int:
        """Number of rows."""
        ...

    def read(self) -> list[Row]:
        """Read and parse the rows, `rows` of them."""
        ...


class RowReader(Protocol):
    """A file of rows."""

    path: str
    rows: int

    def batches(self, start: int, stop: int) -> Iterator[RowBatch]:
        """Rows `start` to `stop` (from 0), in order, in batches of at most `BATCH_ROWS`."""
        ...


def extra_json(fields: dict[str, Any]) -> str | None:
    """Fields without a column of their own as a JSON object; None if there are none.

    Raises:
        RowRejected: a number in them is not finite.
    """
    try:
        return _EXTRA.encode(fields) if fields else None
    except ValueError as error:
        raise RowRejected("not_finite", f"one of the fields {', '.join(fields)} holds NaN or infinity") from error
