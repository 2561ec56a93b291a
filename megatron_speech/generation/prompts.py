"""What is to be spoken, as users write it down: text, a voice by a recording, a seed."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from megatron_speech.errors import InputError

# An id becomes a file name on any system.
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}")


@dataclass(frozen=True)
class Utterance:
    """One line of speech to be made.

    Attributes:
        id: names the wav; letters, digits, `.`, `_` and `-`.
        text: what is said.
        seed: of the sampling noise.
        language: BCP-47, for reports.
        reference_audio: a recording of the voice to be cloned.
        reference_text: what is said in it. Both or neither.
        where: file and line, or flag, for error messages.
        extra: further fields, carried to the output.
        control_tags: whether `[[pause]]` in the texts is a token.
    """

    id: str
    text: str
    seed: int = 0
    language: str | None = None
    reference_audio: Path | None = None
    reference_text: str | None = None
    where: str = "--text"
    extra: dict[str, Any] = field(default_factory=dict)
    control_tags: bool = False

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise InputError(f"{self.where}: text is empty; give at least one word to be spoken")
        if not _ID.fullmatch(self.id):
            raise InputError(
                f"{self.where}: id {self.id!r} cannot name a file; use letters, digits, '.', '_' and '-', at most 120, "
                "a letter or digit first"
            )
        if (self.reference_audio is None) != (self.reference_text is None):
            given, lacking = (
                ("reference_text", "reference_audio") if self.reference_audio is None
                else ("reference_audio", "reference_text")
            )  # fmt: skip
            raise InputError(
                f"{self.where}: {given} was given without {lacking}; a voice needs a recording and what is said in it"
            )
        if self.reference_text is not None and not self.reference_text.strip():
            raise InputError(f"{self.where}: reference_text is empty; give what is said in reference_audio")


def read_prompts(path: Path, first_seed: int, *, control_tags: bool = False) -> list[Utterance]:
    """Read prompts.jsonl: one object per line with `text` and, as needed, `id`, `seed`, `language`,
    `reference_audio` (relative to the file, or absolute) and `reference_text`. Other fields are carried along.

    Without `id` an utterance is called by its number (00000); without `seed` it gets `first_seed` + its number, so
    that equal texts sound different.

    Raises:
        InputError: naming the file, the line and the field.
    """
    utterances: list[Utterance] = []
    names: dict[str, int] = {}
    for number, row in read_json_lines(path, "prompts file"):
        where = f"{path} line {number}"
        for key, kinds in (
            ("text", str), ("id", str), ("seed", int), ("language", (str, type(None))),
            ("reference_audio", (str, type(None))), ("reference_text", (str, type(None))),
        ):  # fmt: skip
            if key in row and (not isinstance(row[key], kinds) or isinstance(row[key], bool)):
                wanted = "a whole number" if kinds is int else "a string"
                raise InputError(f"{where}: {key} is {row[key]!r}, needed: {wanted}")
        if "text" not in row:
            raise InputError(f"{where}: field text is missing; give what is to be spoken")
        reference = row.pop("reference_audio", None)
        utterance = Utterance(
            id=row.pop("id", f"{len(utterances):05d}"),
            text=row.pop("text"),
            seed=row.pop("seed", first_seed + len(utterances)),
            language=row.pop("language", None),
            reference_audio=None if reference is None else (path.parent / reference).resolve(),
            reference_text=row.pop("reference_text", None),
            where=where,
            extra=row,
            control_tags=control_tags,
        )
        if utterance.id in names:
            raise InputError(f"{where}: id {utterance.id!r} is also that of line {names[utterance.id]}; ids are unique")
        names[utterance.id] = number
        utterances.append(utterance)
    if not utterances:
        raise InputError(f"prompts file {path} has no line; give one JSON object per utterance")
    return utterances


def read_json_lines(path: Path, what: str) -> list[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line of a JSONL file that is not blank.

    Raises:
        InputError: the file cannot be read, or a line is not one JSON object.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"{what} {path} does not exist; check the path") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{what} {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    rows = []
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line, parse_constant=_refuse_constant)
            except ValueError as error:
                raise InputError(f"{path} line {number} is not JSON ({error}); mend or remove it") from error
            if not isinstance(row, dict):
                raise InputError(f"{path} line {number} is a JSON {type(row).__name__}, needed: one object per line")
            rows.append((number, row))
    return rows


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
