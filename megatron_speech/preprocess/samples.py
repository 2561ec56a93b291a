"""A row's fields, checked: what a sample is, whatever file it came from."""

from __future__ import annotations

import datetime
import decimal
import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import orjson

from megatron_speech.preprocess.fields import RECORDING_NAMES, FieldError, FieldNames, local_name
from megatron_speech.preprocess.readers import source
from megatron_speech.preprocess.readers.base import Row, RowRejected
from megatron_speech.tokens.normalization import normalize_document, normalize_transcript
from megatron_speech.tokens.templates import ROLES, SYSTEM

# --transcript: the field of the row that is spoken text
TRANSCRIPTS = {
    "native": ("transcript", "transcript_native"),
    "romanized": ("transcript_romanized",),
    "code_mixed": ("transcript_code_mixed",),
    "tagged": ("transcript_tagged",),
}

# Fields with a column, or an end, of their own; all others are kept in the column `extra`.
OWN_FIELDS = frozenset(
    "sample_id source_id segment_order start_time end_time speaker_id language dataset_source transcript "
    "transcript_native transcript_romanized codes codes_path code_offset code_len codec_hash checksum".split()
)


# Fields that hold a conversation, and what others call its roles (ShareGPT: human and gpt).
CONVERSATIONS = ("messages", "turns", "conversations")
_ROLE_NAMES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}

# Pretokenised text: ids of the token space's own text tokenizer.
TEXT_IDS = "text_ids"


class CodesAt(NamedTuple):
    """Where a sample's codes lie: in the row itself, or in a file (all of it, or frames offset to offset+length)."""

    inline: Any = None
    path: str | None = None
    offset: int | None = None
    length: int | None = None
    checksum: str | None = None


@dataclass
class Sample:
    """One usable row. Text is normalised; codes are not read yet."""

    number: int
    sample_id: str
    source_id: str
    language: str
    dataset_source: str
    segment_order: int | None = None
    start_time: float | None = None
    end_time: float | None = None
    speaker_id: str | None = None
    transcript_native: str | None = None
    transcript_romanized: str | None = None
    codec_hash: str | None = None
    codes: CodesAt | None = None
    texts: tuple[str, ...] = ()
    roles: list[str] | None = None  # one per text, for a conversation
    text_ids: np.ndarray | None = None  # int [n], in place of texts
    extra: str | None = None


# Tasks of speech with its transcript.
TRANSCRIBED = ("tts", "asr", "interleaved")


@dataclass(frozen=True)
class SampleRules:
    """How rows become samples."""

    task: str
    transcript: str = "native"
    json_keys: tuple[str, ...] = ("text",)
    language: str | None = None  # of rows that name none
    dataset_source: str | None = None
    given_names: tuple[tuple[str, str], ...] = ()  # of --map: see `fields.FieldNames`
    stems: Mapping[str, str] = field(default_factory=dict)  # of files whose name alone would not tell them apart

    @functools.cached_property
    def names(self) -> FieldNames:
        """How fields are called."""
        return FieldNames("speech" if self.needs_codes else "text", self.given_names)

    @property
    def needs_codes(self) -> bool:
        """Whether the task is made of speech."""
        return self.task in ("speech_lm", *TRANSCRIBED)

    @property
    def needs_transcripts(self) -> bool:
        """Whether its speech comes with what is said in it."""
        return self.task in TRANSCRIBED

    def sample(self, row: Row, path: str) -> Sample:
        """The sample in `row` of the file `path`.

        Raises:
            RowRejected: a field is missing or unusable.
        """
        if row.rejected is not None:
            raise row.rejected
        try:
            fields, _ = self.names.of_row(row.fields)
        except FieldError as error:
            raise RowRejected(error.rule, error.reason) from error
        return self.named_sample(fields, row.number, path)

    def named_sample(self, fields: dict[str, Any], number: int, path: str) -> Sample:
        """The sample of fields that have their names here; otherwise as :meth:`sample`."""
        stem = source.stem(path)
        sample_id = _text(fields, "sample_id") or f"{self.stems.get(path, stem)}-{number:08d}"
        own = OWN_FIELDS
        sample = Sample(
            number=number,
            sample_id=sample_id,
            source_id=local_name(_text(fields, "source_id") or sample_id, source.folder(path)),
            language=self._language(fields),
            dataset_source=_text(fields, "dataset_source") or self.dataset_source or stem,
            segment_order=_integer(fields, "segment_order"),
            start_time=_number(fields, "start_time"),
            end_time=_number(fields, "end_time"),
            speaker_id=_text(fields, "speaker_id"),
            transcript_native=_text(fields, "transcript") or _text(fields, "transcript_native"),
            transcript_romanized=_text(fields, "transcript_romanized"),
            codec_hash=_text(fields, "codec_hash"),
        )
        if self.needs_codes:
            sample.codes = _codes_at(fields, source.folder(path))
        if self.needs_transcripts:
            sample.texts = (_transcript(fields, TRANSCRIPTS[self.transcript]),)
        elif self.task == "text_lm" and fields.get(TEXT_IDS) is not None:
            sample.text_ids = _text_ids(fields[TEXT_IDS])
            own = own | {TEXT_IDS}
        elif self.task == "text_lm":
            sample.roles, sample.texts, used = _written_text(fields, self.json_keys)
            own = own | used
        sample.extra = extra_json({name: value for name, value in fields.items() if name not in own})
        return sample

    def used_fields(self) -> frozenset[str]:
        """Fields of a row that do not go into the column `extra`, but for conversations and pretokenised text."""
        return OWN_FIELDS | set(self.json_keys) if self.task == "text_lm" else OWN_FIELDS

    def _language(self, fields: dict[str, Any]) -> str:
        language = _text(fields, "language") or self.language
        if language is None and self.needs_codes:
            raise RowRejected("missing_field", "field language is missing; needed a BCP-47 tag (or --language)")
        return language or "und"


def _text(fields: dict[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is None or value == "":
        return None
    if isinstance(value, int) and not isinstance(value, bool):  # ids are often numbers
        return str(value)
    if not isinstance(value, str):
        raise RowRejected("bad_field", f"field {name} is {_short(value)}, needed text")
    return value


def _number(fields: dict[str, Any], name: str) -> float | None:
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RowRejected("bad_field", f"field {name} is {_short(value)}, needed a number")
    try:
        if not math.isfinite(value):
            raise RowRejected("not_finite", f"field {name} is {value}; leave it out")
        return float(value)
    except OverflowError as error:
        raise RowRejected("bad_field", f"field {name} is {_short(value)}, which is beyond any float") from error


def _integer(fields: dict[str, Any], name: str) -> int | None:
    value = _number(fields, name)
    if value is None:
        return None
    if not value.is_integer() or abs(value) >= 2**53:
        raise RowRejected("bad_field", f"field {name} is {_short(fields[name])}, needed a whole number")
    return int(value)


def _codes_at(fields: dict[str, Any], folder: str) -> CodesAt:
    checksum = _text(fields, "checksum")
    length = _integer(fields, "code_len")
    if fields.get("codes") is not None:
        return CodesAt(inline=fields["codes"], length=length, checksum=checksum)
    path = _text(fields, "codes_path")
    if path is None:
        needed = "codes_path or codes"
        recording = next((name for name in fields if name in RECORDING_NAMES), None)
        if recording is not None:
            raise RowRejected(
                "missing_field", f"field {needed} is missing; encode {recording} with preprocess/encode_audio.py first"
            )
        raise RowRejected("missing_field", f"field {needed} is missing")
    offset = _integer(fields, "code_offset")
    if offset is not None and length is None:
        raise RowRejected("missing_field", "field code_len is missing; it is needed beside code_offset")
    if (offset or 0) < 0 or (length or 0) < 0:
        raise RowRejected("bad_field", f"code_offset {offset} and code_len {length} must not be negative")
    return CodesAt(path=source.join(folder, path), offset=offset, length=length, checksum=checksum)


def _transcript(fields: dict[str, Any], names: tuple[str, ...]) -> str:
    for name in names:
        value = fields.get(name)
        if value is None:
            continue
        if not isinstance(value, str):
            raise RowRejected("bad_field", f"field {name} is {_short(value)}, needed text")
        text = normalize_transcript(value)
        if not text:
            raise RowRejected("empty_text", f"field {name} is empty")
        return text
    raise RowRejected("missing_field", f"field {names[0]} is missing")


def _written_text(fields: dict[str, Any], keys: tuple[str, ...]) -> tuple[list[str] | None, tuple[str, ...], set[str]]:
    """(roles or None, texts, fields used) of a text row: a conversation if there is one, else the named fields."""
    for name in CONVERSATIONS:
        if fields.get(name) is not None:
            roles, texts = _conversation(fields[name], name)
            system = fields.get(SYSTEM)
            if system in (None, "") or SYSTEM in roles:
                return roles, tuple(texts), {name}
            more_roles, more_texts = _conversation([{"role": SYSTEM, "content": system}], SYSTEM)
            return more_roles + roles, (*more_texts, *texts), {name, SYSTEM}
    texts = []
    for key in keys:
        if fields.get(key) is None:
            raise RowRejected("missing_field", f"field {key} is missing")
        if not isinstance(fields[key], str):
            raise RowRejected("bad_field", f"field {key} is {_short(fields[key])}, needed text")
        text = normalize_document(fields[key])
        if not text:
            raise RowRejected("empty_text", f"field {key} is empty")
        texts.append(text)
    return None, tuple(texts), set(keys)


def _conversation(turns: Any, name: str) -> tuple[list[str], list[str]]:
    """Roles and texts of `[{"role": …, "content": …}, …]`, `[{"from": …, "value": …}, …]` or `[[role, text], …]`."""
    if isinstance(turns, str) and turns.lstrip()[:1] == "[":  # as tables without columns of lists hold it
        try:
            turns = orjson.loads(turns)
        except ValueError as error:
            raise RowRejected("bad_turns", f"field {name} is {_short(turns)}, needed a list of turns") from error
    if not isinstance(turns, list) or not turns:
        raise RowRejected("bad_turns", f"field {name} is {_short(turns)}, needed a list of turns")
    roles, texts = [], []
    for i, turn in enumerate(turns):
        role, content = _turn(turn)
        role = _ROLE_NAMES.get(role, role) if isinstance(role, str) else role
        if role not in ROLES:
            needed = " or ".join(ROLES)
            raise RowRejected("bad_turns", f"field {name}: role of turn {i} is {_short(role)}, needed {needed}")
        if not isinstance(content, str):
            raise RowRejected("bad_turns", f"field {name}: content of turn {i} is {_short(content)}, needed text")
        text = normalize_document(content)
        if not text:
            raise RowRejected("empty_text", f"field {name}: turn {i} is empty")
        roles.append(role)
        texts.append(text)
    return roles, texts


def _turn(turn: Any) -> tuple[Any, Any]:
    if isinstance(turn, dict):
        if "from" in turn and "role" not in turn:
            return turn["from"], turn.get("value")
        return turn.get("role"), turn.get("content", turn.get("text"))
    if isinstance(turn, list) and len(turn) == 2:
        return turn[0], turn[1]
    return None, None


def _text_ids(value: Any) -> np.ndarray:
    try:
        ids = np.asarray(value)
    except ValueError as error:
        raise RowRejected("bad_field", f"field {TEXT_IDS} is no list of integers") from error
    if ids.ndim != 1 or not (np.issubdtype(ids.dtype, np.integer) or not ids.size):
        found = f"{ids.dtype} of shape {list(ids.shape)}"
        raise RowRejected("bad_field", f"field {TEXT_IDS} holds {found}, needed integers [tokens]")
    return ids


_AS_THEY_ARE = frozenset((str, int, bool, type(None)))


def extra_json(fields: dict[str, Any]) -> str | None:
    """Fields without a column of their own as a JSON object, keys sorted; None if there are none.

    Raises:
        RowRejected: a number in them is not finite.
    """
    if not fields:
        return None
    if not set(map(type, fields.values())) <= _AS_THEY_ARE:
        fields = {name: _plain(value, name) for name, value in fields.items()}
    try:
        return orjson.dumps(fields, option=orjson.OPT_SORT_KEYS).decode()
    except TypeError:  # an integer beyond 64 bits
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _plain(value: Any, name: str) -> Any:
    """A cell as JSON can hold it; parquet has types of its own: times become ISO 8601, maps objects."""
    if isinstance(value, float):
        if not math.isfinite(value):
            raise RowRejected("not_finite", f"field {name} holds NaN or infinity; leave it out")
        return float(value)
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(item, name) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist(), name)
    if isinstance(value, list) and value and all(type(item) is tuple and type(item[0]) is str for item in value):
        return {key: _plain(item, name) for key, item in value}  # as pyarrow gives a map
    if isinstance(value, (list, tuple)):
        return [_plain(item, name) for item in value]
    if isinstance(value, (datetime.date, datetime.time)):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, decimal.Decimal) and math.isfinite(value) and len(value.as_tuple().digits) <= 15:
        return float(value)  # which is written with the same digits
    if isinstance(value, np.generic):
        return _plain(value.item(), name)
    return str(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
