r"""Control tags in text: `[[pause]]`, a token of its own that the token space declares, where a caller asks for them.

Text is text unless it is read through this module: the same characters in a transcript that is read as usual are
letters. Where tags are read, `\[[pause]]` is the text `[[pause]]`, and a tag that was never declared is an error, not
text that somebody would hear.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from megatron_speech.errors import InputError
from megatron_speech.ragged import Ragged
from megatron_speech.tokens.space import TokenSpace
from megatron_speech.wording import suggestion

_TAG = re.compile(r"(\\?)\[\[([^\[\]]*)\]\]")


class UnknownTag(InputError):
    """A text names a control that the token space does not declare."""


def split_tags(text: str, known: Mapping[str, int]) -> list[str | int]:
    """A text as pieces: text, and the ids of its tags. No piece is empty.

    Args:
        text: normalised.
        known: name of each control that there is → its id.

    Raises:
        UnknownTag: a tag of another name.
    """
    pieces: list[str | int] = []
    plain, begin = "", 0
    for match in _TAG.finditer(text):
        plain += text[begin : match.start()]
        begin = match.end()
        if match[1]:
            plain += match[0][1:]
            continue
        if match[2] not in known:
            raise UnknownTag(
                f"{match[0]} is a control tag that the token space does not declare; {suggestion(match[2], known)}; "
                f"write \\{match[0]} where it is to be said"
            )
        if plain:
            pieces.append(plain)
        pieces.append(known[match[2]])
        plain = ""
    plain += text[begin:]
    return [*pieces, plain] if plain else pieces


def without_tags(text: str) -> str:
    """What of a text is said: its tags taken out, escaped ones as they are spelled."""
    if "[[" not in text:
        return text
    return _TAG.sub(lambda match: match[0][1:] if match[1] else "", text)


def encode_tagged(space: TokenSpace, texts: Sequence[str]) -> tuple[Ragged, dict[int, str]]:
    """Ids of texts with control tags.

    Args:
        space: the id space.
        texts: normalised.

    Returns:
        Ids of each text, int32 [n] each; and of texts that name an unknown control, by index, why. Those have no ids.
    """
    known = space.controls
    pieces: list[str] = []  # that are text, of all texts
    plans: list[list[int]] = []  # of each text: indices of its pieces, or -1 - id of a tag
    problems: dict[int, str] = {}
    tagged = False
    for index, text in enumerate(texts):
        if "[[" not in text:
            plans.append([len(pieces)])
            pieces.append(text)
            continue
        tagged, plan = True, []
        try:
            for piece in split_tags(text, known):
                if isinstance(piece, int):
                    plan.append(-1 - piece)
                else:
                    plan.append(len(pieces))
                    pieces.append(piece)
        except UnknownTag as error:
            problems[index] = str(error)
        plans.append(plan)
    ids = Ragged.of(space.encode_text_batch(pieces))
    if not tagged:
        return ids, problems
    nothing = np.zeros(0, np.int32)
    parts: list[list[np.ndarray]] = []
    for index, plan in enumerate(plans):
        one = [ids[piece] if piece >= 0 else np.array([-1 - piece], np.int32) for piece in plan]
        parts.append([] if index in problems else one)
    return Ragged.of([np.concatenate(part) if part else nothing for part in parts]), problems
