"""Documents of a whole batch at once: what :func:`megatron_speech.tasks.compile_document` gives one by one.

The templates are read from the same table. What all documents of a form have in common is looked up once; the ids
of all of them are then joined in a single copy.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_speech.tasks import CODES, PROMPT_CODES, PROMPT_END, REF_CODES, REF_TEXT, TEXT, templates
from megatron_speech.token_space import TokenSpace

AUDIO_FIELDS = (CODES, PROMPT_CODES, REF_CODES)
TEXT_FIELDS = (TEXT, REF_TEXT)


@dataclass(frozen=True)
class CompiledBatch:
    """Documents end to end, and of each of them its counts, int64 [D].

    Attributes:
        flat: ids in the dtype on disk.
        tokens: ids of the document.
        audio: ids of codes, references included.
        text: ids of texts, references included; those of turns are not counted here.
        target: ids after the SFT prompt.
    """

    flat: np.ndarray
    tokens: np.ndarray
    audio: np.ndarray
    text: np.ndarray
    target: np.ndarray


@dataclass(frozen=True)
class _Template:
    """A form's parts: ids that are the same in every document, or the name of a field."""

    parts: tuple[np.ndarray | str, ...]
    constant: int  # ids that are the same
    constant_target: int  # of those, how many come after the prompt
    target_fields: frozenset[str]  # fields after the prompt


@functools.lru_cache(maxsize=64)
def _template(
    sequences: tuple[tuple[str, tuple[int, ...]], ...], names: tuple[str, ...], append_eod: bool
) -> _Template:
    ids = dict(sequences)
    if append_eod and names[-1] != "<eos>":
        names = (*names, "<eos>")
    after = names[names.index(PROMPT_END) + 1 :] if PROMPT_END in names else []
    parts: list[np.ndarray | str] = []
    for is_field, group in itertools.groupby(names, lambda name: name.startswith("{")):
        if is_field:
            parts += list(group)
        else:
            parts.append(np.array([i for name in group for i in ids[name]], dtype=np.int32))
    return _Template(
        parts=tuple(parts),
        constant=sum(len(ids[name]) for name in names if not name.startswith("{")),
        constant_target=sum(len(ids[name]) for name in after if not name.startswith("{")),
        target_fields=frozenset(name for name in after if name.startswith("{")),
    )


def compile_batch(
    space: TokenSpace,
    task: str,
    forms: Sequence[str],
    fields: dict[str, list[np.ndarray | None]],
    *,
    append_eod: bool,
) -> CompiledBatch:
    """Documents of one task, in order.

    Args:
        space: the id space that the ids belong to.
        task: "speech_lm", "tts" or "text_lm".
        forms: of each document, the name of its form in `templates`.
        fields: field of a template → int32 ids for each document; None for a document whose form has no such field.
        append_eod: end every document with `<eos>` where its template does not.
    """
    count = len(forms)
    sequences = tuple((name, space.sequence(name)) for name in space.special_ids)
    known = templates(space, task)
    lengths = {name: np.fromiter((0 if v is None else len(v) for v in column), np.int64, count)
               for name, column in fields.items()}  # fmt: skip
    zero = np.zeros(count, dtype=np.int64)
    tokens, target = sum(lengths.values(), zero), zero.copy()
    pieces: list[tuple[np.ndarray, ...]] = [()] * count
    kinds = sorted(set(forms))
    for form in kinds:
        template = _template(sequences, known[form], append_eod)
        chosen: Sequence[int] | range = range(count)
        at: slice | list[int] = slice(None)
        if len(kinds) > 1:
            chosen = at = [i for i, name in enumerate(forms) if name == form]
        tokens[at] += template.constant
        target[at] += template.constant_target + sum(lengths[name][at] for name in template.target_fields)
        columns: list[Sequence[Any]] = []
        for part in template.parts:
            if not isinstance(part, str):
                columns.append([part] * len(chosen))
            else:
                column = fields[part]
                columns.append(column if len(kinds) == 1 else [column[i] for i in chosen])
        rows = zip(*columns, strict=True)
        if len(kinds) == 1:
            pieces = list(rows)
        else:
            for i, row in zip(chosen, rows, strict=True):
                pieces[i] = row
    flat = np.zeros(int(tokens.sum()), dtype=space.dtype)
    if count:
        # Ids are within the space, so the narrower type of the disk holds them all.
        np.concatenate(list(itertools.chain.from_iterable(pieces)), out=flat, casting="unsafe")
    return CompiledBatch(
        flat=flat,
        tokens=tokens,
        audio=sum((lengths[name] for name in AUDIO_FIELDS if name in lengths), zero),
        text=sum((lengths[name] for name in TEXT_FIELDS if name in lengths), zero),
        target=target,
    )
