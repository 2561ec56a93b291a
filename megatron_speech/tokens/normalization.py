"""Text as the model sees it: one normalisation for preprocessing, evaluation and generation.

The version is stored with every dataset. A change of what a function here returns needs a new version name.

What is done, for every script alike: Unicode NFC; blanks made one space each; control characters and byte-order
marks taken out. What is left alone: everything that carries meaning in some script, above all the joiners U+200C
and U+200D (they decide how Indic, Arabic and emoji sequences are written), the zero-width space of scripts without
blanks, and direction marks.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np

NORMALIZATION_VERSION = "nfc-whitespace-2"

# Control characters (Cc) that are no whitespace, and U+FEFF: a byte-order mark that was left in a text.
_INVISIBLE = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ufeff]")
# Whatever a document might have to be changed for, but for runs of spaces and line ends.
_UNUSUAL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff]")
# Characters without a width of their own. Beside others they decide how those are written; alone they are no text.
_ZERO_WIDTH = "\u200b\u200c\u200d\u2060"
_SPACE, _LINE_FEED, _TROUBLE = 1, 2, 8
# Of each code point up to U+FFFF one of these, or 0, which is also right for all beyond.
_KINDS = np.zeros(1 << 16, dtype=np.uint8)
_KINDS[[code for code in range(1 << 16) if _UNUSUAL.match(chr(code))]] = _TROUBLE
_KINDS[[ord(" "), ord("\n")]] = _SPACE, _LINE_FEED
_IS_ZERO_WIDTH = np.zeros(1 << 16, dtype=bool)
_IS_ZERO_WIDTH[list(map(ord, _ZERO_WIDTH))] = True
_BLANK_IN_LINE = re.compile(r"[^\S\n]+")
_LINE_END = re.compile(r" ?\n ?")
_EMPTY_LINES = re.compile(r"\n{3,}")


def _composed(text: str) -> str:
    """NFC of the text without invisible characters: they are taken out first, since they keep accents from letters."""
    if text.isascii():
        return text
    return unicodedata.normalize("NFC", text)


def normalize_transcript(text: str) -> str:
    """What is spoken: Unicode NFC, no control characters, every run of whitespace one space, none at the ends.

    A text of nothing but zero-width characters (U+200B to U+200D, U+2060, U+FEFF) is empty.
    """
    return _unless_invisible(" ".join(_composed(_INVISIBLE.sub("", text)).split()))


def _unless_invisible(text: str) -> str:
    """The text, or none where nothing in it can be seen."""
    return text if text[:1] not in _ZERO_WIDTH or text.strip(_ZERO_WIDTH + " \n") else ""


def normalize_document(text: str) -> str:
    """Written text: as :func:`normalize_transcript` within a line; line ends and single empty lines are kept."""
    if _UNUSUAL.search(text) is not None:
        text = _INVISIBLE.sub("", text)
        text = _composed(text).replace("\r\n", "\n").replace("\r", "\n")
        text = _BLANK_IN_LINE.sub(" ", text)
    else:
        text = _composed(text)
        if "  " in text:
            text = _BLANK_IN_LINE.sub(" ", text)
    if " \n" in text or "\n " in text:
        text = _LINE_END.sub("\n", text)
    if "\n\n\n" in text:
        text = _EMPTY_LINES.sub("\n\n", text)
    return _unless_invisible(text.strip())


def normalize_transcripts(texts: Sequence[str]) -> list[str]:
    """:func:`normalize_transcript` of each."""
    return _normalize_all(texts, normalize_transcript, _SPACE)


def normalize_documents(texts: Sequence[str]) -> list[str]:
    """:func:`normalize_document` of each."""
    return _normalize_all(texts, normalize_document, _LINE_FEED)


def _normalize_all(texts: Sequence[str], normalize: Callable[[str], str], allowed: int) -> list[str]:
    """`normalize` of each text. Most are normal as they are, which is seen of all at once.

    A text stays as it is if it is NFC and holds no unusual character, no blank at its ends, and no two blanks side by
    side but for two line ends. `allowed`: the greatest kind of character that is none to look at.
    """
    result = list(texts)
    joined = "".join(result)
    if not joined:
        return [normalize(text) for text in result]
    codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)
    kinds = _KINDS.take(codes, mode="clip")
    ends = np.fromiter(itertools.accumulate(map(len, result)), np.int64, len(result))
    odd = kinds > allowed
    pairs = kinds[:-1] * kinds[1:]
    odd[1:] |= (pairs == _SPACE * _SPACE) | (pairs == _SPACE * _LINE_FEED)
    empty_lines = pairs == _LINE_FEED * _LINE_FEED
    odd[2:] |= empty_lines[1:] & empty_lines[:-1]
    odd[ends[ends > 0] - 1] |= kinds[ends[ends > 0] - 1] > 0
    starts = np.concatenate([[0], ends[:-1]])
    starts = starts[starts < len(kinds)]
    odd[starts] |= (kinds[starts] > 0) | _IS_ZERO_WIDTH.take(codes[starts], mode="clip")
    looked_at = set(np.searchsorted(ends, np.flatnonzero(odd), side="right").tolist())
    if not joined.isascii() and not unicodedata.is_normalized("NFC", joined):
        looked_at.update(i for i, text in enumerate(result) if not unicodedata.is_normalized("NFC", text))
    for i in looked_at:
        result[i] = normalize(result[i])
    return result
