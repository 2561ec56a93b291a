"""Text as the model sees it: one normalisation for preprocessing, evaluation and generation.

The version is stored with every dataset. Whoever changes what a function here returns gives it a new name.

What is done, for every script alike: Unicode NFC; blanks made one space each; control characters and byte-order
marks taken out. What is left alone: everything that carries meaning in some script, above all the joiners U+200C
and U+200D (they decide how Indic, Arabic and emoji sequences are written), the zero-width space of scripts without
blanks, and direction marks.
"""

from __future__ import annotations

import re
import unicodedata

NORMALIZATION_VERSION = "nfc-whitespace-2"

# Control characters (Cc) that are no whitespace, and U+FEFF: a byte-order mark that was left in a text.
_INVISIBLE = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ufeff]")
# Whatever a document might have to be changed for, but for runs of spaces and line ends.
_UNUSUAL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff]")
_BLANK_IN_LINE = re.compile(r"[^\S\n]+")
_LINE_END = re.compile(r" ?\n ?")
_EMPTY_LINES = re.compile(r"\n{3,}")


def _composed(text: str) -> str:
    """NFC of the text without invisible characters: they are taken out first, since they keep accents from letters."""
    if text.isascii():
        return text
    return unicodedata.normalize("NFC", text)


def normalize_transcript(text: str) -> str:
    """What is spoken: Unicode NFC, no control characters, every run of whitespace one space, none at the ends."""
    return " ".join(_composed(_INVISIBLE.sub("", text)).split())


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
    return text.strip()
