"""`where:` filters of a stratum: conditions on columns of the documents table, evaluated row group by row group.

    where:
      speaker_id: [ann, bob]              # one of these
      duration_seconds: {min: 2, max: 20} # both ends belong to it
      extra.mos: {min: 3.5}               # a field of the input that has no column of its own
      extra.channel: {not: phone}         # everything else, rows without a value included
      reference_sample_id: {null: true}   # rows without a value

A row without a value passes `not` and `null: true` and nothing else. Conditions are typed: a number is not compared
with a text column. Only the columns that a filter names are read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj
import pyarrow.parquet as pq

from megatron_speech.errors import InputError
from megatron_speech.wording import suggestion

EXTRA = "extra."
MAX_FILTERS = 64  # distinct filters of one stage: bits of a document's marks
Kind = Literal["text", "number", "truth"]
_NAMES = {"text": "text", "number": "a number", "truth": "true or false"}
_HINT_ROWS = 4096


@dataclass(frozen=True)
class Condition:
    """What one column has to be. `kind` is the type of the values; None where only `null` is tested."""

    column: str
    kind: Kind | None
    values: tuple[Any, ...] | None = None
    minimum: float | None = None
    maximum: float | None = None
    excluded: tuple[Any, ...] | None = None
    null: bool | None = None


def _kind(value: Any) -> Kind | None:
    if isinstance(value, bool):
        return "truth"
    if isinstance(value, int | float):
        return "number" if math.isfinite(value) else None
    return "text" if isinstance(value, str) else None


def _values(field: str, value: Any) -> tuple[tuple[Any, ...], Kind]:
    """The values of a scalar or a list, and their common kind."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    kinds = {_kind(item) for item in values}
    if not values or None in kinds or len(kinds) != 1:
        raise InputError(
            f"{field} is {value!r}; needed: texts, numbers, or true and false, all of one kind (a missing value is "
            "{null: true})"
        )
    (kind,) = kinds
    assert kind is not None
    return values, kind


def _condition(field: str, column: str, value: Any) -> Condition:
    if not isinstance(value, Mapping):
        values, kind = _values(field, value)
        return Condition(column, kind, values=values)
    known = ("min", "max", "not", "null")
    for key in value:
        if key not in known:
            raise InputError(f"{field} has the key {key!r}; {suggestion(str(key), known)}")
    if "null" in value:
        if len(value) > 1 or not isinstance(value["null"], bool):
            raise InputError(f"{field} is {dict(value)!r}; null stands alone and is true or false")
        return Condition(column, None, null=value["null"])
    if not value:
        raise InputError(f"{field} is empty; give a value, a list, or one of min, max, not, null")
    bounds = {key: value[key] for key in ("min", "max") if key in value}
    for key, bound in bounds.items():
        if _kind(bound) != "number":
            raise InputError(f"{field}.{key} is {bound!r}; a bound is a finite number")
    if len(bounds) == 2 and bounds["min"] > bounds["max"]:
        raise InputError(f"{field}: min {bounds['min']:g} is above max {bounds['max']:g}: nothing lies between them")
    excluded, kind = _values(f"{field}.not", value["not"]) if "not" in value else (None, "number")
    if bounds and kind != "number":
        raise InputError(f"{field}: min and max are numbers, not is {value['not']!r}; give values of one kind")
    return Condition(column, kind, minimum=bounds.get("min"), maximum=bounds.get("max"), excluded=excluded)


def parse(where: Mapping[str, Any], field: str) -> list[Condition]:
    """The conditions of a `where:` section; `field` names it in errors.

    Raises:
        InputError: a value of no use: another type, an unknown key, bounds the wrong way round.
    """
    return [_condition(f"{field}.{column}", column, value) for column, value in where.items()]


# ---- evaluation


def _column_kind(kind: pa.DataType) -> Kind | None:
    if pa.types.is_boolean(kind):
        return "truth"
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return "number"
    return "text" if pa.types.is_string(kind) or pa.types.is_large_string(kind) else None


def _test(condition: Condition, column: pa.Array) -> pa.Array:
    """Which rows pass, bool without nulls."""
    if condition.null is not None:
        return pc.is_null(column) if condition.null else pc.is_valid(column)
    if pa.types.is_integer(column.type) and any(
        isinstance(value, float)
        for value in (condition.minimum, condition.maximum, *(condition.values or ()), *(condition.excluded or ()))
    ):
        column = column.cast(pa.float64(), safe=False)
    passes = pa.array(np.ones(len(column), dtype=bool))
    if condition.values is not None:
        passes = _one_of(column, condition.values)
    if condition.minimum is not None:
        passes = pc.and_(passes, pc.greater_equal(column, pa.scalar(condition.minimum)).fill_null(False))
    if condition.maximum is not None:
        passes = pc.and_(passes, pc.less_equal(column, pa.scalar(condition.maximum)).fill_null(False))
    if condition.excluded is not None:
        passes = pc.and_(passes, pc.invert(_one_of(column, condition.excluded)))
    return passes


def _one_of(column: pa.Array, values: Sequence[Any]) -> pa.Array:
    """Which rows hold one of `values`, bool without nulls."""
    passes = pa.array(np.zeros(len(column), dtype=bool))
    for value in values:
        passes = pc.or_(passes, pc.equal(column, pa.scalar(value)).fill_null(False))
    return passes


def _extra_columns(path: Path, extra: pa.Array, kinds: Mapping[str, Kind | None]) -> dict[str, pa.Array]:
    """Fields of the JSON objects in column `extra`, null where an object has no such field.

    Args:
        path: the table, for errors.
        extra: strings; null is an object without fields.
        kinds: field → the type that it has to have; None: whichever.
    """
    types = {"text": pa.string(), "number": pa.float64(), "truth": pa.bool_()}
    filled = extra.cast(pa.string()).fill_null("{}")
    filled = pc.if_else(pc.equal(filled, ""), "{}", filled)
    together = pa.ListArray.from_arrays(pa.array([0, len(filled)], pa.int32()), filled)
    data = pc.binary_join(together, "\n")[0].as_buffer()

    def read(fields: Mapping[str, Kind | None]) -> dict[str, pa.Array]:
        schema = pa.schema([(name, types[kind]) for name, kind in fields.items() if kind is not None])
        # A field that is only tested for presence may be of any type: it is inferred.
        unexpected = "infer" if None in fields.values() else "ignore"
        table = pj.read_json(
            pa.BufferReader(data),
            read_options=pj.ReadOptions(use_threads=False, block_size=data.size + 1),
            parse_options=pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior=unexpected),
        )
        if table.num_rows != len(extra):
            raise InputError(
                f"{path}: column extra holds {table.num_rows} JSON objects in {len(extra)} rows; it is damaged"
            )
        held = table.column_names
        return {name: table[name].combine_chunks() if name in held else pa.nulls(len(extra)) for name in fields}

    try:
        return read(kinds)
    except pa.ArrowInvalid:
        columns: dict[str, pa.Array] = {}
    for name, kind in kinds.items():  # one by one, to name the field
        try:
            columns |= read({name: kind})
        except pa.ArrowInvalid as error:
            needed = f"where compares it with {_NAMES[kind]}" if kind is not None else "needed JSON objects"
            raise InputError(
                f"{path}: field {name} of column extra is not of one type ({str(error).splitlines()[0]}); {needed}: "
                "compare it with what it holds"
            ) from error
    return columns


def _extra_names(file: pq.ParquetFile) -> set[str]:
    """Names of the fields in `extra`, of the first rows: for hints in errors."""
    names: set[str] = set()
    for batch in file.iter_batches(batch_size=_HINT_ROWS, row_groups=[0], columns=["extra"]):
        for text in batch["extra"].to_pylist():
            names.update(json.loads(text) if text else ())
        break
    return names


def marks(path: Path, filters: Sequence[Sequence[Condition]], rows: int, field: str) -> np.ndarray:
    """Which of `filters` each row of the documents table at `path` passes.

    Args:
        path: P.docs.parquet.
        filters: at most MAX_FILTERS lists of conditions; a row passes a list if it passes all of it.
        rows: number of documents.
        field: names the filters in errors.

    Returns:
        Unsigned integers [rows], just wide enough: bit i is set where the row passes filters[i].

    Raises:
        InputError: too many filters, a column that the table lacks, or one of another type than its condition.
    """
    if len(filters) > MAX_FILTERS:
        raise InputError(f"{field}: {len(filters)} different where filters; at most {MAX_FILTERS} fit into one stage")
    dtype = np.min_scalar_type((1 << len(filters)) - 1)
    result = np.zeros(rows, dtype=dtype)
    conditions = [condition for group in filters for condition in group]
    if not conditions or not rows:
        return result
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            _check_columns(path, file, conditions, field)
            wanted = {condition.column for condition in conditions}
            names = sorted({"extra" if column.startswith(EXTRA) else column for column in wanted})
            kinds: dict[str, Kind | None] = {}
            for condition in conditions:
                if condition.column.startswith(EXTRA):
                    name = condition.column.removeprefix(EXTRA)
                    kinds[name] = condition.kind or kinds.get(name)
            seen = dict.fromkeys(kinds, False)
            row = 0
            for number in range(file.num_row_groups):
                group = file.read_row_group(number, columns=names)
                columns = {name: group[name].combine_chunks() for name in names}
                if kinds:
                    for name, column in _extra_columns(path, columns["extra"], kinds).items():
                        columns[EXTRA + name] = column
                        seen[name] |= column.null_count < len(column)
                for bit, tests in enumerate(filters):
                    passes = np.ones(group.num_rows, dtype=bool)
                    for condition in tests:
                        passes &= _test(condition, columns[condition.column]).to_numpy(zero_copy_only=False)
                    result[row : row + group.num_rows] |= passes.astype(dtype) << dtype.type(bit)
                row += group.num_rows
            for name, found in seen.items():
                if not found:
                    known = _extra_names(file)
                    raise InputError(
                        f"{path}: {field} names {EXTRA}{name}, a field that no document has; {suggestion(name, known)}"
                    )
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; restore it, or recreate the dataset") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} is not a readable parquet file: {error}; recreate the dataset") from error
    return result


def _check_columns(path: Path, file: pq.ParquetFile, conditions: Iterable[Condition], field: str) -> None:
    schema = file.schema_arrow
    for condition in conditions:
        column = condition.column
        if column.startswith(EXTRA) and len(column) > len(EXTRA):
            if "extra" not in schema.names:
                raise InputError(f"{path}: column extra is missing, which {field} names; recreate the dataset")
            continue
        if column not in schema.names:
            raise InputError(
                f"{path}: {field} names the column {column!r}, but the documents table has no such column; "
                f"{suggestion(column, schema.names)} (a field without a column is extra.NAME)"
            )
        found = _column_kind(schema.field(column).type)
        if condition.kind is not None and found != condition.kind:
            raise InputError(
                f"{path}: {field} compares the column {column} with {_NAMES[condition.kind]}, but it holds "
                f"{_NAMES[found] if found else schema.field(column).type}; compare it with what it holds"
            )
