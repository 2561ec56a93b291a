"""Byte-level BPE by the compiled kernel: the ids of a Hugging Face `tokenizer.json`, an order of magnitude faster.

The kernel takes tokenizers of the common kind: byte-level BPE without a normaliser, cut by the pattern of GPT-2,
Llama 3 or Qwen 2. What is a letter, a number or a space is taken from the tokenizers library itself, so that both agree
on every character. Any other tokenizer stays with the library.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_speech.ops.extension import extension
from megatron_speech.ragged import Ragged

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    None: 0,  # ByteLevel's own, GPT-2's
    _CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST: 1,
    _CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST: 2,
}
"""Split pattern → number of the kernel's scanner."""

# Planes with assigned characters; elsewhere nothing is a letter, a number or a space.
_ASKED = (range(0, 0xD800), range(0xE000, 0x40000), range(0xE0000, 0xE1000))


class ByteLevelEncoder:
    """Text to ids; remembers the words it has met. Belongs to one process and one thread."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def encode_batch(self, texts: Sequence[str]) -> Ragged:
        """Ids of each text, int32 [n]."""
        flat, ends = self._kernel.encode(list(texts))
        return Ragged(flat, np.concatenate([np.zeros(1, np.int64), ends]))


def make(payload: bytes) -> ByteLevelEncoder | None:
    """The encoder of a `tokenizer.json`; None where the kernel is not there, or would not give the library's ids."""
    module = extension()
    spec = json.loads(payload)
    pattern = _pattern(spec)
    if module is None or pattern is None or not _plain_bpe(spec):
        return None
    vocabulary = spec["model"]["vocab"]
    letters = byte_letters()
    if any(letter not in vocabulary for letter in letters):
        return None
    merges = _merges(spec["model"])
    if merges is None:
        return None
    pieces = []
    if spec["model"].get("ignore_merges"):
        byte_of = {letter: byte for byte, letter in enumerate(letters)}
        for piece, number in vocabulary.items():
            if all(letter in byte_of for letter in piece):
                pieces.append((bytes(byte_of[letter] for letter in piece), number))
    byte_ids = np.array([vocabulary[letter] for letter in letters], dtype=np.int32)
    return ByteLevelEncoder(module.ByteBpe(pattern, byte_ids, merges, character_classes(), pieces))


def _pattern(spec: dict[str, Any]) -> int | None:
    """Number of the scanner for the tokenizer's pre-tokenizer; None if there is none for it."""
    stages = spec.get("pre_tokenizer") or {}
    stages = stages.get("pretokenizers", [stages])
    *before, last = stages
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", True):
        return None
    own_pattern = last.get("use_regex", True)
    if not before:
        return PATTERNS[None] if own_pattern else None
    split = before[0]
    if own_pattern or len(before) > 1 or split.get("type") != "Split":
        return None
    if split.get("behavior") != "Isolated" or split.get("invert"):
        return None
    return PATTERNS.get(split.get("pattern", {}).get("Regex", ""))


def _plain_bpe(spec: dict[str, Any]) -> bool:
    model = spec["model"]
    return (
        model.get("type") == "BPE"
        and spec.get("normalizer") is None
        and not any(model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
        # Text that spells a special token is text here; other added tokens would have to be found in it.
        and all(token.get("special") for token in spec.get("added_tokens") or [])
    )


def _merges(model: dict[str, Any]) -> np.ndarray | None:
    """int32 [3, M]: left, right and merged id of each merge, by rank; None if one is not in the vocabulary."""
    vocabulary = model["vocab"]
    result = []
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ids = tuple(vocabulary.get(piece) for piece in (left, right, left + right))
        if None in ids:
            return None
        result.append(ids)
    return np.array(result, dtype=np.int32).reshape(-1, 3).T.copy()


@functools.cache
def byte_letters() -> tuple[str, ...]:
    """The letter that byte-level tokenizers write for each byte: itself if printable, else one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return tuple(chr(byte) if byte in printable else chr(next(spare)) for byte in range(256))


@functools.cache
def character_classes() -> np.ndarray:
    """uint8 [0x110000]: 1 letter, 2 number, 3 space, 0 other, as the tokenizers library sees each code point."""
    import tokenizers

    codes = np.concatenate([np.arange(part.start, part.stop) for part in _ASKED])
    text = "".join(map(chr, codes.tolist()))
    result = np.zeros(0x110000, dtype=np.uint8)
    for number, others in ((1, r"[^\p{L}]+"), (2, r"[^\p{N}]+"), (3, r"\S+")):
        # What is left when all others are removed; Split would give their places, but takes ten times as long.
        left = tokenizers.normalizers.Replace(tokenizers.Regex(others), "").normalize_str(text)
        result[np.frombuffer(left.encode("utf-32-le"), dtype="<u4")] = number
    return result
