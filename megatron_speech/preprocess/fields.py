"""Names of fields: what other projects' lists call the fields that rows have here, in one table.

The table holds the names of NeMo's manifests, Lhotse, Hugging Face datasets, Common Voice, CosyVoice, Emilia and plain
lists. Both scripts read rows through it; rows that use this project's names alone are not touched. What would change
which audio or which text is meant, and cannot be done, is refused by its name.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from megatron_speech.errors import InputError
from megatron_speech.remote import is_url
from megatron_speech.wording import suggestion

logger = logging.getLogger(__name__)


class FieldError(Exception):
    """A row whose fields cannot be understood: `rule` to count by, `reason` for people."""

    def __init__(self, rule: str, reason: str) -> None:
        super().__init__(rule, reason)
        self.rule = rule
        self.reason = reason


# Who reads the rows: encode_audio.py, preprocess_data.py for a task of speech, or for text_lm.
Use = Literal["encode", "speech", "text"]

# Times that differ by less are the same time, written with another number of digits.
_SAME_TIME_SECONDS = 1e-3


class Field(NamedTuple):
    """One field, and what others call it.

    `same` are names that hold just this: a row in which two of them differ is refused. `instead` are names that hold
    it where none of those is there, and are fields of their own beside one; the first that is there is taken.
    """

    name: str
    kind: Literal["path", "text", "name", "order", "seconds", "channel"]
    same: tuple[str, ...] = ()
    instead: tuple[str, ...] = ()
    ours: tuple[str, ...] = ()  # other names of this project that hold it
    uses: tuple[Use, ...] = ("encode", "speech")


_STARTS_MS = ("start_ms", "offset_ms")

FIELDS = (
    Field(
        "wav_path",
        "path",
        ("audio_filepath", "audio_path", "audio_file", "audio_filename", "audio", "wav", "wav_file", "wav_filename"),
        ("file_name", "filepath", "file_path", "file", "path"),
        uses=("encode",),
    ),
    Field(
        "transcript",
        "text",
        ("text", "sentence", "transcription"),
        ("normalized_text", "text_normalized", "raw_transcription", "raw_text", "text_original"),
        ours=("transcript_native",),
    ),
    Field("language", "name", ("lang",), ("locale", "source_lang")),
    Field("language", "name", ("lang",), ("locale",), uses=("text",)),
    Field("speaker_id", "name", ("speaker", "spk", "spk_id"), ("speaker_name", "client_id")),
    Field("sample_id", "name", (), ("utt", "utt_id", "utterance_id", "_id", "id")),
    Field("source_id", "name", (), ("recording_id", "audio_id")),
    Field("dataset_source", "name", (), ("dataset_name",)),
    Field("segment_order", "order", (), ("segment_index", "segment_idx")),
    Field(
        "start_time",
        "seconds",
        ("start", "offset", "begin", "begin_time", "segment_start", "start_sec", "start_seconds", *_STARTS_MS),
    ),
    Field("end_time", "seconds", ("end", "segment_end", "end_sec", "end_seconds", "end_ms")),
    Field("duration", "seconds", ("duration_sec", "duration_seconds", "duration_ms")),
    Field("channel", "channel", ("channel_selector", "audio_channel"), uses=("encode",)),
)

# Fields with a meaning of their own that have no name elsewhere; --map knows them too.
_OTHERS = (
    "codec_hash",
    "checksum",
    "code_len",
    "code_offset",
    "codes",
    "codes_path",
    "text_ids",
    "transcript_code_mixed",
    "transcript_native",
    "transcript_romanized",
    "transcript_tagged",
)

# What encode_audio writes into every row, beside this project's names of all fields that it knew.
_WRITTEN = frozenset(("codec", "codec_hash", "code_offset"))

# Counts in a unit that only the file's own rate makes a time.
_IN_SAMPLES = (
    "start_frame", "end_frame", "frame_offset", "start_sample", "end_sample", "sample_start", "sample_end",
    "offset_samples", "start_samples", "end_samples",
)  # fmt: skip
_OF_CUTS = ("supervisions", "recording", "tracks", "transforms")

# All names under which a row may say what it is a part of.
SOURCE_NAMES = frozenset(
    name for field in FIELDS if field.name == "source_id" for name in (field.name, *field.same, *field.instead)
)

# Names of nothing but a recording.
RECORDING_NAMES = frozenset(name for field in FIELDS if field.name == "wav_path" for name in (field.name, *field.same))


class _Step(NamedTuple):
    """A field, and the names under which rows of a batch hold it; `given`: the one that --map says."""

    field: Field
    same: tuple[str, ...]
    instead: tuple[str, ...]
    given: str | None = None


@dataclass(frozen=True)
class FieldNames:
    """How the fields of rows are called.

    Attributes:
        use: who reads the rows.
        given: (name here, name in the rows) of --map; an empty second one: no field of the rows is it.
    """

    use: Use = "speech"
    given: tuple[tuple[str, str], ...] = ()

    @functools.cached_property
    def _watched(self) -> frozenset[str]:
        """Names that make a row one to look at."""
        names = {name for pair in self.given for name in pair}
        for field in self._fields:
            names.update((*field.same, *field.instead))
        if self.use == "encode":
            names.update((*_IN_SAMPLES, *_OF_CUTS, "channel"))
        if self.use != "text":
            names.add("target_lang")
        return frozenset(names)

    @functools.cached_property
    def _fields(self) -> tuple[Field, ...]:
        return tuple(field for field in FIELDS if self.use in field.uses)

    @functools.cached_property
    def _plans(self) -> dict[frozenset[str], tuple[_Step, ...]]:
        return {}

    def _plan(self, present: frozenset[str]) -> tuple[_Step, ...]:
        plan = self._plans.get(present)
        if plan is None:
            given = dict(self.given)
            steps = [_Step(field, (), (), given[field.name]) for field in self._fields if field.name in given]
            known = {field.name for field in self._fields}
            steps += [_Step(Field(ours, "text"), (), (), theirs) for ours, theirs in self.given if ours not in known]
            for field in self._fields:
                same = tuple(name for name in field.same if name in present)
                instead = tuple(name for name in field.instead if name in present)
                if field.name not in given and (same or instead or (field.kind == "channel" and "channel" in present)):
                    steps.append(_Step(field, same, instead))
            plan = self._plans[present] = tuple(steps)
        return plan

    def rename(self, rows: list[dict[str, Any]], present: set[str]) -> tuple[Counter[str], dict[int, FieldError]]:
        """Give the fields of a batch of rows their names here; `present` are the names of all its fields.

        Renamed rows take the place of others in the list; the others are not touched.

        Returns:
            How many fields were renamed, by `field:theirs->ours`; the rows that cannot be understood, by index.
        """
        renamed: Counter[str] = Counter()
        errors: dict[int, FieldError] = {}
        if self._watched.isdisjoint(present):
            return renamed, errors
        alike = self._alike(rows, present)
        if alike is not None:
            if alike:
                rows[:] = [{alike.get(name, name): value for name, value in fields.items()} for fields in rows]
            return Counter({f"field:{theirs}->{ours}": len(rows) for theirs, ours in alike.items()}), errors
        for i, fields in enumerate(rows):
            try:
                rows[i], found = self.of_row(fields)
                renamed.update(found)
            except FieldError as error:
                errors[i] = error
        return renamed, errors

    def _alike(self, rows: list[dict[str, Any]], present: set[str]) -> dict[str, str] | None:
        """Names to replace, where every row has the same ones and nothing is to be decided; else None."""
        if self.use == "encode" or self.given or "target_lang" in present or present >= _WRITTEN:
            return None
        alike: dict[str, str] = {}
        for step in self._plan(self._watched.intersection(present)):
            field = step.field
            if field.kind not in ("text", "name"):
                return None
            theirs = (*step.same, *step.instead)
            ours = [name for name in (field.name, *field.ours) if name in present]
            if ours:
                values = [fields.get(ours[0]) for fields in rows]
                if step.same or None in values or "" in values:
                    return None
                continue
            values = [fields.get(theirs[0]) for fields in rows]
            if len(theirs) > 1 or set(map(type, values)) != {str} or "" in values:
                return None
            alike[theirs[0]] = field.name
        return alike

    def of_row(self, fields: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """A row's fields by their names here, and what was renamed: `field:theirs->ours` each.

        Raises:
            FieldError: field_conflict, unsupported_field, bad_segment.
        """
        present = self._watched.intersection(fields)
        written = fields.keys() >= _WRITTEN
        if not present or (written and not self.given):
            return fields, []
        if not written:
            self._refuse_foreign(fields)
        found: dict[str, Any] = {}
        gone: set[str] = set()
        notices: list[str] = []
        foreign_start = False
        for step in self._plan(present):
            name = step.field.name
            if written and step.given is None:
                continue
            if name == "wav_path" and (fields.get("wav_offset") is not None or fields.get("wav_row") is not None):
                continue  # the recording lies in a file with others; another path is that of where it once lay
            if step.given is not None:
                theirs = _mapped(fields, step, found, gone, notices)
            else:
                theirs = self._take(fields, step, found, gone, notices)
            foreign_start = foreign_start or (name == "start_time" and theirs)
        if foreign_start:
            _end_of_segment(fields, found, gone)
        if not found and not gone:
            return fields, []
        result = {name: value for name, value in fields.items() if name not in gone}
        result.update(found)
        return result, notices

    def _take(
        self, fields: dict[str, Any], step: _Step, found: dict[str, Any], gone: set[str], notices: list[str]
    ) -> bool:
        """Find a field; whether it is there under another name."""
        field = step.field
        where: str | None = None
        value: Any = None
        for name in (field.name, *field.ours):
            if fields.get(name) not in (None, ""):
                where, value = name, fields[name]
                break
        if field.kind == "channel" and where is not None:
            found[where] = value = _one_channel(where, value)
        own = where
        for name in step.same:
            theirs = self._value(field, name, fields[name])
            if theirs is None:
                if field.kind == "channel" and fields[name] is not None:  # the average, which is taken anyway
                    gone.add(name)
                continue
            if where is None:
                where, value = name, theirs
            elif not _same(field.kind, value, theirs):
                raise FieldError(
                    "field_conflict",
                    f"field {where} is {_short(fields[where])} and field {name} is {_short(fields[name])}, and both "
                    f"are the {field.name}; leave one out, or say which it is: --map {field.name}={where}",
                )
            gone.add(name)
        for name in step.instead if where is None else ():
            theirs = self._value(field, name, fields[name])
            if theirs is not None:
                where, value = name, theirs
                gone.add(name)
                break
        if where is None or where == own:
            return False
        found[field.name] = value
        notices.append(f"field:{where}->{field.name}")
        return True

    def _value(self, field: Field, name: str, value: Any) -> Any:
        """A value under a name of others as it is here; None: it is not what the field holds."""
        if value is None or value == "":
            return None
        kind = field.kind
        if kind == "path":
            if isinstance(value, dict):  # as datasets of Hugging Face have it
                return value.get("path") if isinstance(value.get("path"), str) else None
            if isinstance(value, list):
                raise FieldError(
                    "unsupported_field", f"field {name} is {_short(value)}; needed is the path of one recording"
                )
            return value if isinstance(value, str) else None
        if kind == "text":
            return value if isinstance(value, str) else None
        if kind == "name":
            return value if isinstance(value, str) or type(value) is int else None
        if kind == "order":
            return value if type(value) is int else None
        if kind == "channel":
            return _one_channel(name, value)
        if not _is_number(value):  # of an encoder refused by its name here; of others it may be anything
            return value if self.use == "encode" else None
        return round(value / 1000, 6) if name.endswith("_ms") else value

    def _refuse_foreign(self, fields: dict[str, Any]) -> None:
        """Refuse what says which audio or text is meant in a way that is not understood."""
        if self.use == "text":
            return
        target, language = fields.get("target_lang"), fields.get("source_lang")
        if target is not None and language is not None and target != language:
            raise FieldError(
                "unsupported_field",
                f"field target_lang is {_short(target)} and source_lang {_short(language)}: the text is a translation "
                "of the speech and not its transcript; leave such rows out",
            )
        if self.use != "encode":
            return
        for name in _IN_SAMPLES:
            if fields.get(name) is not None and not self._is_given(name):
                raise FieldError(
                    "unsupported_field",
                    f"field {name} is {_short(fields[name])}, counted in samples or frames; needed are seconds: "
                    "start_time and end_time",
                )
        for name in _OF_CUTS:
            if isinstance(fields.get(name), dict | list) and fields[name] and not self._is_given(name):
                raise FieldError(
                    "unsupported_field",
                    f"field {name} is part of a cut of Lhotse, of which this list gives no recording that is read as "
                    "it is; needed are wav_path, start_time, end_time and transcript of each segment",
                )
        audio = fields.get("audio")
        if isinstance(audio, dict) and audio.get("array") is not None and not isinstance(audio.get("path"), str):
            raise FieldError(
                "unsupported_field", "field audio holds the samples as numbers; needed is the path of a recording"
            )

    def _is_given(self, theirs: str) -> bool:
        return any(name == theirs for _, name in self.given)


def _mapped(fields: dict[str, Any], step: _Step, found: dict[str, Any], gone: set[str], notices: list[str]) -> bool:
    """Take a field from where --map says it is, and from nowhere else; whether it is there under another name."""
    name, theirs = step.field.name, step.given or ""
    value = fields.get(theirs) if theirs else None
    if theirs == name:
        return False
    if value is None or value == "":
        # A row without it has no such field, but for the names that every row has.
        if name not in ("sample_id", "source_id") and name in fields:
            gone.add(name)
            notices.append(f"field:{name} not read")
        return False
    if step.field.kind == "channel":
        value = _one_channel(theirs, value)
    elif step.field.kind == "path" and isinstance(value, dict):
        value = value.get("path")
    elif step.field.kind == "seconds" and theirs.endswith("_ms") and _is_number(value):
        value = round(value / 1000, 6)
    if name in fields:
        notices.append(f"field:{name} not read")
    gone.add(theirs)
    found[name] = value
    notices.append(f"field:{theirs}->{name}")
    return True


def _end_of_segment(fields: dict[str, Any], found: dict[str, Any], gone: set[str]) -> None:
    """A start and a duration are a segment where no end is given."""

    def value(name: str) -> Any:
        return found[name] if name in found else None if name in gone else fields.get(name)

    start, duration = value("start_time"), value("duration")
    if value("end_time") is not None or duration is None or not _is_number(start):
        return
    if not _is_number(duration) or duration <= 0:
        raise FieldError("bad_segment", f"field duration is {_short(duration)}, needed are seconds, more than 0")
    found["end_time"] = round(start + duration, 6)


def _one_channel(name: str, value: Any) -> int | None:
    """The channel that a field names, from 0; None: the average of all.

    Raises:
        FieldError: it names several, or is no channel.
    """
    one = value[0] if isinstance(value, list) and len(value) == 1 else value
    if isinstance(one, str):
        if one in ("average", "avg", "mean"):
            return None
        one = int(one) if re.fullmatch(r"\d{1,3}", one) else one
    if type(one) is int and one >= 0:
        return one
    several = " (several channels)" if isinstance(one, list) else ""
    raise FieldError(
        "unsupported_field",
        f"field {name} is {_short(value)}{several}; needed is the number of one channel, from 0, or none for the "
        "average of all (--map channel= reads no field as it)",
    )


def _same(kind: str, one: Any, other: Any) -> bool:
    if kind == "seconds":
        return _is_number(one) and _is_number(other) and abs(one - other) <= _SAME_TIME_SECONDS
    return " ".join(str(one).split()) == " ".join(str(other).split())


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def parse_map(values: Sequence[str] | None, *, more: Sequence[str] = ()) -> tuple[tuple[str, str], ...]:
    """The pairs of `--map NAME=THEIRS`, sorted.

    Args:
        values: as given.
        more: names that are known beside those of the table.

    Raises:
        InputError: no such pair, an unknown name, or one that is given twice.
    """
    known = {*(field.name for field in FIELDS), *_OTHERS, *more}
    result: dict[str, str] = {}
    for value in values or ():
        ours, sign, theirs = value.partition("=")
        if not sign or not ours:
            raise InputError(f"--map {value}: needed NAME=THEIRS, such as transcript=sentence")
        if ours == "text":
            raise InputError(
                f"--map {value}: the text of documents is named by --json-keys, and what is spoken is the transcript: "
                f"--map transcript={theirs}"
            )
        if ours not in known:
            raise InputError(f"--map {value}: {ours} is no field that is read; {suggestion(ours, known)}")
        if ours in result:
            raise InputError(f"--map names {ours} twice ({result[ours]} and {theirs}); leave one of them out")
        result[ours] = theirs
    return tuple(sorted(result.items()))


MAP_HELP = (
    "the field NAME is called THEIRS in the rows, whatever else they hold; THEIRS empty: no field is it; repeatable. "
    "Names of NeMo, Lhotse, Hugging Face, Common Voice, CosyVoice and Emilia are known without it"
)


def warn_of_unused(given: Sequence[tuple[str, str]], notices: Mapping[str, int]) -> None:
    """Say which fields of --map no row had."""
    for ours, theirs in given:
        if theirs and ours != theirs and not notices.get(f"field:{theirs}->{ours}"):
            logger.warning("--map %s=%s: no row that was read has a field %s", ours, theirs, theirs)


# ---------------------------------------------------------------------------------------------------- sources

OUTSIDE = "source_id:absolute path outside the list's folder"


def local_name(name: str, folder: str) -> str:
    """A name without the place of the corpus: an absolute path or URL under `folder` relative to it.

    Others stay as they are. `folder` is that of the list which the name stands in.
    """
    name, folder = _without_file(name), _without_file(folder)
    if is_url(name):
        if name.lower().startswith(("http://", "https://")):
            name = re.split(r"[?#]", name, maxsplit=1)[0]  # a signature is no part of what it names
        inside = folder.rstrip("/") + "/"
        return name[len(inside) :] if is_url(folder) and name.startswith(inside) else name
    if not name.startswith("/") or is_url(folder):
        return name
    for base in _spellings(folder):
        if name.startswith(base):
            return name[len(base) :] or name
    return name


def recording_name(path: str, folder: str) -> str:
    """What a recording is known by: its path as the list spells it, or relative to the list where it is absolute."""
    name, folder = local_name(path, folder), _without_file(folder)
    if name.startswith("/") and not is_url(folder):
        base = os.path.abspath(folder or ".")
        if os.path.commonpath([base, name]) != "/":  # a corpus in several folders is moved as a whole
            return os.path.relpath(name, base)
    return name


def _without_file(path: str) -> str:
    return path[len("file://") :] if path[:7].lower() == "file://" else path


@functools.lru_cache(maxsize=64)
def _spellings(folder: str) -> tuple[str, ...]:
    """A folder's absolute paths with a slash behind: as named, and behind symbolic links."""
    paths = dict.fromkeys((os.path.abspath(folder or "."), os.path.realpath(folder or ".")))
    return tuple(path.rstrip("/") + "/" for path in paths)


def distinct_names(paths: Sequence[str]) -> dict[str, str]:
    """What to call each of some files: its name, with as many folders before it as tell those of one name apart."""
    parts = {path: _parts(path) for path in dict.fromkeys(paths)}
    result: dict[str, str] = {}
    depth = 1
    left = list(parts)
    while left:
        names = {path: "/".join(parts[path][-depth:]) for path in left}
        count = Counter(names.values())
        again = []
        for path in left:
            if count[names[path]] == 1 or depth >= len(parts[path]):
                result[path] = names[path]
            else:
                again.append(path)
        left, depth = again, depth + 1
    return {path: result[path] for path in parts}


def _parts(path: str) -> list[str]:
    if is_url(path):
        plain = re.split(r"[?#]", path, maxsplit=1)[0] if path.lower().startswith(("http://", "https://")) else path
        return plain.rstrip("/").split("/")
    return [part.encode("utf-8", "replace").decode() for part in os.path.abspath(path).split("/")]
