"""Filters: an ordered list of named rules in a YAML file, each of which drops rows and counts them under its name.

    filters:
      - {rule: language, keep: [hi, en-IN]}
      - {rule: duration, min_seconds: 0.5, max_seconds: 30}
      - {rule: field, name: poor_mos, field: dnsmos, min: 3.0}
      - {rule: duplicate}

A row meets the rules in their order and is counted under the first that drops it. What a rule reads of a row is the
row's own, so neither workers nor shards change what is dropped; `duplicate` alone needs an index of the whole input. No
language, script or source is built in: what is not in the file is not filtered.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeVar

import numpy as np
import regex
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from megatron_speech.data.dataset.totals_table import RULES
from megatron_speech.errors import InputError
from megatron_speech.files import canonical_json, sha256_hex
from megatron_speech.preprocess.columns import Samples
from megatron_speech.preprocess.readers.base import RowRejected
from megatron_speech.preprocess.samples import TRANSCRIBED
from megatron_speech.tokens.templates import TASKS
from megatron_speech.wording import suggestion

Value = TypeVar("Value")
Missing = Literal["keep", "drop"]


class BatchView(Protocol):
    """What rules see of a batch of rows; the rows are named by their index in the batch."""

    samples: Samples
    frame_rate_hz: float
    duplicates: np.ndarray | None  # bool [rows]

    def alive(self) -> list[int]:
        """Rows that nothing has dropped yet."""
        ...

    def load_codes(self, rows: Iterable[int]) -> None:
        """Read the codes of these rows; a row whose codes are unusable is alive no longer."""
        ...

    def encode_texts(self) -> None:
        """Turn the texts of all rows that are alive into ids."""
        ...

    def frames(self, row: int) -> int | None:
        """Frames of speech: as the row says, or of the codes that were read; None for a row without speech."""
        ...

    def spoken_texts(self, row: int) -> Sequence[str]:
        """The texts of a row without control tags, which nobody says."""
        ...

    def text_counts(self, row: int) -> tuple[int, int]:
        """(text tokens, those of them that the tokenizer cannot spell) of a row whose texts are ids."""
        ...


class FilterRule(BaseModel):
    """What all rules have in common."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    rule: str
    name: str = Field(default="", pattern=r"^[a-z0-9_.-]*$", description="what drops are counted under; default: rule")
    tasks: ClassVar[tuple[str, ...]] = TASKS

    @model_validator(mode="after")
    def _default_name(self) -> FilterRule:
        self.name = self.name or self.rule
        if self.name in RULES:
            raise ValueError(f"name {self.name!r} is what rows that cannot be used are counted under; give another")
        return self

    def prepare(self, batch: BatchView) -> None:
        """Ask the batch for what :meth:`reason` needs of it."""

    def reason(self, batch: BatchView, row: int) -> str | None:
        """Why the rule drops a row; None if it does not.

        Raises:
            RowRejected: the row holds a value that cannot be judged.
        """
        raise NotImplementedError


class _Range(FilterRule):
    @model_validator(mode="after")
    def _ordered(self) -> _Range:
        bounds = [getattr(self, name) for name in type(self).model_fields if name.startswith(("min", "max"))]
        low, high = (*bounds, None)[:2]
        if low is None and high is None:
            raise ValueError(f"rule {self.rule} {self.name!r} has neither a least nor a greatest value; give one")
        if low is not None and high is not None and low > high:
            raise ValueError(f"rule {self.rule} {self.name!r}: {low:g} to {high:g} holds no value")
        return self


def _outside(value: float, low: float | None, high: float | None) -> str | None:
    if low is not None and value < low:
        return f"below {low:g}"
    if high is not None and value > high:
        return f"above {high:g}"
    return None


def matches(tag: str, language_range: str) -> bool:
    """Whether a BCP-47 tag is within a range: RFC 4647 basic filtering.

    `hi` takes `hi` and `hi-Latn`, `zh-Hant` takes `zh-Hant-TW` but not `zh`, `*` takes everything; upper and lower
    case are the same, and so are `_` and `-`. `en` does not take `eng`.
    """
    wanted, found = _subtags(language_range), _subtags(tag)
    return wanted == ["*"] or found[: len(wanted)] == wanted


def _subtags(tag: str) -> list[str]:
    return tag.lower().replace("_", "-").split("-")


def for_language(values: dict[str, Value], tag: str) -> Value | None:
    """The value of the longest range that `tag` is within."""
    found = [name for name in values if matches(tag, name)]
    return values[max(found, key=lambda name: (name != "*", len(_subtags(name))))] if found else None


class Language(FilterRule):
    """Keep or drop rows by language."""

    rule: Literal["language"]
    keep: list[str] | None = Field(default=None, description="BCP-47 ranges to keep")
    drop: list[str] | None = Field(default=None, description="BCP-47 ranges to drop")

    @model_validator(mode="after")
    def _one(self) -> Language:
        if (self.keep is None) == (self.drop is None):
            raise ValueError(f"rule language {self.name!r} needs either keep or drop")
        if not (self.keep or self.drop):
            raise ValueError(f"rule language {self.name!r} names no language")
        return self

    def reason(self, batch: BatchView, row: int) -> str | None:
        """Why the row is dropped."""
        tag = batch.samples.language[row]
        found = any(matches(tag, name) for name in self.keep or self.drop or ())
        return f"language is {tag}" if found == (self.keep is None) else None


def row_seconds(batch: BatchView, row: int) -> float | None:
    """Seconds of a row: of its codes; of one without codes its field `duration`, or end_time less start_time.

    Raises:
        RowRejected: not a finite number, or negative.
    """
    frames = batch.frames(row)
    if frames is not None:
        return frames / batch.frame_rate_hz
    samples = batch.samples
    seconds = number_at(samples.rows[row].fields, "duration")
    start, end = samples.start_time[row], samples.end_time[row]
    if seconds is None and start is not None and end is not None:
        seconds = end - start
    if seconds is not None and seconds < 0:
        raise RowRejected("bad_field", f"lasts {seconds:g} s; needed a duration that is not negative")
    return seconds


def number_at(fields: dict[str, Any], path: str) -> float | None:
    """A number of the row: the field `path`, or `a.b` within the object `a`; None if there is none.

    Raises:
        RowRejected: not a number, or not finite.
    """
    value: Any = fields.get(path)
    if value is None and "." in path:
        value = fields
        for part in path.split("."):
            value = value.get(part) if isinstance(value, dict) else None
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RowRejected("bad_field", f"field {path} is {value!r:.40}, needed a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RowRejected("not_finite", f"field {path} is {number}; leave it out")
    return number


def _load_unknown_lengths(batch: BatchView) -> None:
    batch.load_codes([row for row in batch.alive() if batch.samples.codes[row] and batch.frames(row) is None])


class Duration(_Range):
    """Seconds of speech."""

    rule: Literal["duration"]
    min_seconds: float | None = None
    max_seconds: float | None = None
    missing: Missing = Field(default="drop", description="what becomes of a text row without a duration")

    def prepare(self, batch: BatchView) -> None:
        """Lengths that the rows do not state are those of their codes."""
        _load_unknown_lengths(batch)

    def reason(self, batch: BatchView, row: int) -> str | None:
        """Why the row is dropped."""
        seconds = row_seconds(batch, row)
        if seconds is None:
            return "has no duration" if self.missing == "drop" else None
        why = _outside(seconds, self.min_seconds, self.max_seconds)
        return why and f"lasts {seconds:.3f} s, {why}"


class Rate(BaseModel):
    """Bounds of one language."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    min: float | None = None
    max: float | None = None


class CharactersPerSecond(_Range):
    """Characters of the normalised text per second of speech: far off where text and speech do not belong together."""

    rule: Literal["characters_per_second"]
    min: float | None = None
    max: float | None = None
    by_language: dict[str, Rate] = Field(default_factory=dict, description="bounds in place of min and max")
    missing: Missing = "drop"
    tasks: ClassVar[tuple[str, ...]] = (*TRANSCRIBED, "text_lm")

    @model_validator(mode="after")
    def _ordered(self) -> CharactersPerSecond:
        if self.min is None and self.max is None and not self.by_language:
            raise ValueError(f"rule {self.rule} {self.name!r} has no bounds; give min, max or by_language")
        return self

    def prepare(self, batch: BatchView) -> None:
        """Lengths that the rows do not state are those of their codes."""
        _load_unknown_lengths(batch)

    def reason(self, batch: BatchView, row: int) -> str | None:
        """Why the row is dropped."""
        seconds = row_seconds(batch, row)
        if not seconds:
            return "has no duration" if self.missing == "drop" else None
        own = for_language(self.by_language, batch.samples.language[row]) or Rate(min=self.min, max=self.max)
        rate = sum(map(len, batch.spoken_texts(row))) / seconds
        why = _outside(rate, own.min, own.max)
        return why and f"{rate:.2f} characters per second, {why}"


class CodeLength(_Range):
    """Frames of codes."""

    rule: Literal["code_length"]
    min_frames: int | None = None
    max_frames: int | None = None
    tasks: ClassVar[tuple[str, ...]] = ("speech_lm", *TRANSCRIBED)

    def prepare(self, batch: BatchView) -> None:
        """Lengths that the rows do not state are those of their codes."""
        _load_unknown_lengths(batch)

    def reason(self, batch: BatchView, row: int) -> str | None:
        """Why the row is dropped."""
        frames = batch.frames(row)
        assert frames is not None
        why = _outside(frames, self.min_frames, self.max_frames)
        return why and f"{frames} frames, {why}"


class TextLength(_Range):
    """Characters of the normalised text."""

    rule: Literal["text_length"]
    min_characters: int | None = None
    max_characters: int | None = None
    tasks: ClassVar[tuple[str, ...]] = (*TRANSCRIBED, "text_lm")

    def reason(self, batch: BatchView, row: int) -> str | None:
        """Why the row is dropped."""
        if batch.samples.text_ids[row] is not None:  # has no characters
            return None
        characters = sum(map(len, batch.spoken_texts(row)))
        why = _outside(characters, self.min_characters, self.max_characters)
        return why and f"{characters} characters, {why}"


class NumericField(_Range):
    """Any number that the rows carry, such as a MOS."""

    rule: Literal["field"]
    field: str = Field(description="name of the field; a.b is b within the object a")
    min: float | None = None
    max: float | None = None
    missing: Missing = Field(default="drop", description="what becomes of rows without it")

    def reason(self, batch: BatchView, row: int) -> str | None:
        """Why the row is dropped."""
        value = number_at(batch.samples.rows[row].fields, self.field)
        if value is None:
            return f"has no field {self.field}" if self.missing == "drop" else None
        why = _outside(value, self.min, self.max)
        return why and f"{self.field} is {value:g}, {why}"


class Duplicate(FilterRule):
    """Rows that repeat the codes, or the text, of an earlier row anywhere in the input."""

    rule: Literal["duplicate"]
    of: Literal["codes", "text", "both"] | None = Field(default=None, description="default: codes; text of text_lm")

    def reason(self, batch: BatchView, row: int) -> str | None:
        """Why the row is dropped."""
        assert batch.duplicates is not None
        return "repeats an earlier row" if batch.duplicates[row] else None


class Script(FilterRule):
    """Share of letters of the allowed scripts. Marks and joiners that all scripts share are never foreign."""

    rule: Literal["script"]
    allow: list[str] | None = Field(default=None, description="Unicode scripts, such as Latin or Devanagari")
    by_language: dict[str, list[str]] = Field(default_factory=dict, description="scripts in place of allow")
    min_share: float = Field(default=1.0, ge=0, le=1, description="of letters and marks that have to be of them")
    without_letters: Missing = Field(default="keep", description="what becomes of a text without letters")
    tasks: ClassVar[tuple[str, ...]] = (*TRANSCRIBED, "text_lm")

    @field_validator("allow", "by_language")
    @classmethod
    def _known(cls, value: list[str] | dict[str, list[str]] | None) -> list[str] | dict[str, list[str]] | None:
        for scripts in value.values() if isinstance(value, dict) else [value or []]:
            foreign_letters(tuple(scripts))
        return value

    @model_validator(mode="after")
    def _some(self) -> Script:
        if not self.allow and not self.by_language:
            raise ValueError(f"rule script {self.name!r} allows no script; give allow or by_language")
        return self

    def reason(self, batch: BatchView, row: int) -> str | None:
        """Why the row is dropped."""
        allowed = for_language(self.by_language, batch.samples.language[row]) or self.allow
        texts = batch.spoken_texts(row)
        if allowed is None or not texts:
            return None
        text = "\n".join(texts)
        letters = len(_LETTERS.findall(text))
        if not letters:
            return "holds no letters" if self.without_letters == "drop" else None
        share = 1 - len(foreign_letters(tuple(allowed)).findall(text)) / letters
        return f"{share:.1%} of the letters are {' or '.join(allowed)}" if share < self.min_share else None


_LETTERS = regex.compile(r"[\p{L}\p{M}]")


@functools.cache
def foreign_letters(scripts: tuple[str, ...]) -> regex.Pattern[str]:
    """Matches a letter or mark of none of the scripts.

    Raises:
        ValueError: Unicode has no such script.
    """
    known = []
    for name in (*scripts, "Common", "Inherited"):
        try:
            if not regex.fullmatch(r"[\w ]+", name):
                raise regex.error("not a name")
            regex.compile(rf"\p{{Script={name}}}")
        except regex.error as error:
            raise ValueError(f"Unicode has no script {name!r}; name one such as Latin, Devanagari, Arab") from error
        known.append(rf"\p{{Script={name}}}")
    return regex.compile(rf"(?V1)[[\p{{L}}\p{{M}}]--[{''.join(known)}]]")


class Unsupported(FilterRule):
    """Share of text tokens that stand for something the tokenizer cannot spell."""

    rule: Literal["unsupported"]
    max_share: float = Field(default=0.0, ge=0, le=1)
    tasks: ClassVar[tuple[str, ...]] = (*TRANSCRIBED, "text_lm")

    def prepare(self, batch: BatchView) -> None:
        """Texts as ids."""
        batch.encode_texts()

    def reason(self, batch: BatchView, row: int) -> str | None:
        """Why the row is dropped."""
        tokens, unknown = batch.text_counts(row)
        if not tokens or unknown / tokens <= self.max_share:
            return None
        return f"the tokenizer cannot spell {unknown} of {tokens} tokens"


_KINDS: dict[str, type[FilterRule]] = {
    "language": Language,
    "duration": Duration,
    "characters_per_second": CharactersPerSecond,
    "code_length": CodeLength,
    "text_length": TextLength,
    "field": NumericField,
    "duplicate": Duplicate,
    "script": Script,
    "unsupported": Unsupported,
}

AnyRule = Annotated[
    Language
    | Duration
    | CharactersPerSecond
    | CodeLength
    | TextLength
    | NumericField
    | Duplicate
    | Script
    | Unsupported,
    Field(discriminator="rule"),
]


class Filters(BaseModel):
    """The content of a `--filters` file."""

    model_config = ConfigDict(extra="forbid")
    filters: list[AnyRule] = Field(default_factory=list)

    @model_validator(mode="after")
    def _unique(self) -> Filters:
        names = [rule.name for rule in self.filters]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two rules are named {name!r}; give each a name of its own")
        if sum(rule.rule == "duplicate" for rule in self.filters) > 1:
            raise ValueError("there are two rules duplicate; one is all there can be")
        return self

    @property
    def has_duplicate_rule(self) -> bool:
        """Whether a rule needs an index of the whole input."""
        return any(rule.rule == "duplicate" for rule in self.filters)

    def resolved(self) -> list[dict[str, Any]]:
        """The rules with all defaults, JSON-able: what the manifest says."""
        return [rule.model_dump(mode="json") for rule in self.filters]

    @property
    def hash(self) -> str:
        """SHA-256 of :meth:`resolved`."""
        return sha256_hex(canonical_json(self.resolved()))

    @classmethod
    def load(cls, path: str | os.PathLike[str], task: str) -> Filters:
        """Read a file of rules for a conversion of `task`.

        Raises:
            InputError: not readable, an unknown key or rule (with the nearest known one), or a rule that the task's
                rows cannot meet.
        """
        try:
            with open(path, encoding="utf-8") as handle:
                content = yaml.safe_load(handle)
        except OSError as error:
            raise InputError(f"--filters {path} cannot be read: {error.strerror or error}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"--filters {path} is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict):
            raise InputError(f"--filters {path} holds no mapping; needed `filters:` and a list of rules under it")
        try:
            filters = cls.model_validate(content)
        except ValidationError as error:
            raise InputError(f"--filters {path}: {_explain(error)}") from error
        return filters._for_task(task, path)

    def _for_task(self, task: str, path: str | os.PathLike[str]) -> Filters:
        rules = []
        for rule in self.filters:
            of = getattr(rule, "of", None)
            wrong = (task == "text_lm" and of in ("codes", "both")) or (task == "speech_lm" and of in ("text", "both"))
            if task not in rule.tasks or wrong:
                what = f"rule {rule.rule} of {of}" if wrong else f"rule {rule.rule}"
                raise InputError(f"--filters {path}: {what} is not for --task {task}; leave it out")
            if isinstance(rule, Duplicate) and of is None:
                rule = rule.model_copy(update={"of": "text" if task == "text_lm" else "codes"})
            rules.append(rule)
        return Filters(filters=rules)


def _explain(error: ValidationError) -> str:
    """The first problem as a sentence; an unknown key explains a missing one beside it, so it comes first."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    problem: Any = problems[0]
    place = problem["loc"]
    where = f"rule {place[1] + 1}" if len(place) > 1 and isinstance(place[1], int) else "the file"
    if problem["type"] == "extra_forbidden":
        known = _known_keys(place[:-1])
        return f"{where}: unknown key {place[-1]!r}; {suggestion(str(place[-1]), known)}"
    if problem["type"] == "union_tag_invalid":
        found = problem["ctx"]["tag"]
        return f"{where}: unknown rule {found!r}; {suggestion(found, list(_KINDS))}"
    if problem["type"] == "union_tag_not_found":
        return f"{where}: key 'rule' is missing; needed one of {', '.join(_KINDS)}"
    if problem["type"] == "value_error":
        return f"{where}: {problem['ctx']['error']}"
    key = ".".join(str(part) for part in place[3:]) or ".".join(map(str, place))
    return f"{where}: {key} is {problem['input']!r:.60}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _known_keys(place: tuple[int | str, ...]) -> list[str]:
    if not place:
        return list(Filters.model_fields)
    if len(place) > 3:  # within by_language
        return list(Rate.model_fields)
    return list(_KINDS[str(place[2])].model_fields)


def find_duplicates(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Which rows repeat an earlier one.

    Args:
        low, high: uint64 [rows], the two halves of a 128-bit hash; both 0: a row that takes no part.

    Returns:
        bool [rows]: true for all but the first of equal ones.
    """
    result = np.zeros(len(low), dtype=bool)
    parts = 1 if len(low) < 1 << 20 else 64  # sorted part by part: bounds the temporary arrays
    for part in range(parts):
        mine = (high % np.uint64(parts) == part) & ((low != 0) | (high != 0))
        rows = np.flatnonzero(mine)
        rows = rows[np.lexsort((low[rows], high[rows]))]  # stable: equal ones stay in the order of the input
        same = (low[rows][1:] == low[rows][:-1]) & (high[rows][1:] == high[rows][:-1])
        result[rows[1:][same]] = True
    return result
