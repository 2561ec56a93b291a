"""Text as the model sees it: one normalisation for preprocessing, evaluation and generation.

The version is stored with every dataset. Whoever changes what a function here returns gives it a new name.
"""

from __future__ import annotations

import re
import unicodedata

NORMALIZATION_VERSION = "nfc-whitespace-1"

_BLANK_IN_LINE = re.compile(r"[^\S\n]+")
_LINE_END = re.compile(r" ?\n ?")
_EMPTY_LINES = re.compile(r"\n{3,}")


def normalize_transcript(text: str) -> str:
    """What is spoken: Unicode NFC, every run of whitespace one space, none at the ends."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def normalize_document(text: str) -> str:
    """Written text: as :func:`normalize_transcript` within a line; line ends and single empty lines are kept."""
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n")
    text = _LINE_END.sub("\n", _BLANK_IN_LINE.sub(" ", text))
    return _EMPTY_LINES.sub("\n\n", text).strip()
