"""Documents of a whole batch at once: what :func:`megatron_speech.tokens.templates.compile_document` gives one by one.

The templates are read from the same table. What all documents of a form have in common is looked up once; each part
of a template is then put in its place in all of them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_speech.ragged import Ragged, runs
from megatron_speech.tokens.space import TokenSpace
from megatron_speech.tokens.templates import CODES, PROMPT_CODES, REF_CODES, REF_TEXT, TEXT, prompt_end, templates

AUDIO_FIELDS = (CODES, PROMPT_CODES, REF_CODES)
TEXT_FIELDS = (TEXT, REF_TEXT)


Column = Ragged | Sequence[np.ndarray | None]


@dataclass(frozen=True)
class CompiledBatch:
    """Documents end to end, and of each of them its counts, int64 [D].

    Attributes:
        flat: ids in the dtype on disk.
        lengths: of each field.
        tokens: ids of the document.
        audio: ids of codes, references included.
        text: ids of texts, references included; those of turns are not counted here.
        target: ids after the SFT prompt.
    """

    flat: np.ndarray
    lengths: dict[str, np.ndarray]
    tokens: np.ndarray
    audio: np.ndarray
    text: np.ndarray
    target: np.ndarray


@dataclass(frozen=True)
class _Template:
    """A form's parts: ids that are the same in every document, or the name of a field."""

    parts: tuple[np.ndarray | str, ...]
    fields: tuple[str, ...]
    constant: int  # ids that are the same
    constant_target: int  # of those, how many come after the prompt
    target_fields: frozenset[str]  # fields after the prompt


@functools.lru_cache(maxsize=64)
def _template(
    sequences: tuple[tuple[str, tuple[int, ...]], ...], names: tuple[str, ...], end: str, append_eod: bool
) -> _Template:
    ids = dict(sequences)
    if append_eod and names[-1] != "<eos>":
        names = (*names, "<eos>")
    after = names[names.index(end) + 1 :] if end in names else []
    parts: list[np.ndarray | str] = []
    for is_field, group in itertools.groupby(names, lambda name: name.startswith("{")):
        if is_field:
            parts += list(group)
        else:
            parts.append(np.array([i for name in group for i in ids[name]], dtype=np.int32))
    return _Template(
        parts=tuple(parts),
        fields=tuple(part for part in parts if isinstance(part, str)),
        constant=sum(len(ids[name]) for name in names if not name.startswith("{")),
        constant_target=sum(len(ids[name]) for name in after if not name.startswith("{")),
        target_fields=frozenset(name for name in after if name.startswith("{")),
    )


def compile_batch(
    space: TokenSpace,
    task: str,
    forms: Sequence[str],
    fields: dict[str, Column],
    *,
    append_eod: bool,
) -> CompiledBatch:
    """Documents of one task, in order.

    Args:
        space: the id space that the ids belong to.
        task: one of `TASKS`.
        forms: of each document, the name of its form in `templates`.
        fields: field of a template → int32 ids for each document; anything for one whose form has no such field.
        append_eod: end every document with `<eos>` where its template does not.
    """
    count = len(forms)
    sequences = tuple((name, space.sequence(name)) for name in space.special_ids)
    lengths = {name: np.zeros(count, dtype=np.int64) for name in fields}
    tokens, target = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
    known = templates(space, task)
    kinds = []  # of the forms that there are: the template, and its documents
    for form in sorted(set(forms)):
        template = _template(sequences, known[form], prompt_end(task), append_eod)
        at = np.flatnonzero([name == form for name in forms])
        kinds.append((template, at))
        for name in template.fields:
            lengths[name][at] = _lengths(fields[name])[at]
        tokens[at] = template.constant + sum(lengths[name][at] for name in template.fields)
        target[at] = template.constant_target + sum(lengths[name][at] for name in template.target_fields)
    ends = np.cumsum(tokens)
    flat = np.empty(int(ends[-1]) if count else 0, dtype=space.dtype)
    for template, at in kinds:
        place = (ends - tokens)[at]  # of the next part in each document
        for part in template.parts:
            if isinstance(part, str):
                _put(flat, place, fields[part], at)
                place = place + lengths[part][at]
            else:
                flat[place[:, None] + np.arange(len(part))] = part
                place = place + len(part)
    zero = np.zeros(count, dtype=np.int64)
    return CompiledBatch(
        flat=flat,
        lengths=lengths,
        tokens=tokens,
        audio=sum((lengths[name] for name in AUDIO_FIELDS if name in lengths), zero),
        text=sum((lengths[name] for name in TEXT_FIELDS if name in lengths), zero),
        target=target,
    )


def _lengths(column: Column) -> np.ndarray:
    if isinstance(column, Ragged):
        return column.lengths
    return np.fromiter((0 if ids is None else len(ids) for ids in column), np.int64, len(column))


def _put(flat: np.ndarray, places: np.ndarray, column: Column, chosen: np.ndarray) -> None:
    """Put the ids of the documents `chosen` where `places` says. They are within the space, so its dtype holds them."""
    if isinstance(column, Ragged):
        some = column.take(chosen)
        flat[runs(places, some.lengths)] = some.flat
    else:
        for place, i in zip(places.tolist(), chosen.tolist(), strict=True):
            ids = column[i]
            assert ids is not None
            flat[place : place + len(ids)] = ids
