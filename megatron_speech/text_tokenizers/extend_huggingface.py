"""New merges and ids after those of a Hugging Face byte-level BPE tokenizer (GPT-2, LLaMA-3, Qwen).

Merges apply by rank, so new ones apply to what the base's own have left. A new token may only be made of bytes that
text of other scripts cannot hold: whole characters, one of them new, or a beginning that only characters of new scripts
have. So text without new characters keeps its ids.

The library numbers added tokens after the model's vocabulary, whatever the file says. Each added token of the base is
therefore written into the vocabulary with its id: nothing merges into it, and its id stays.
"""

from __future__ import annotations

import copy
import functools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from megatron_speech.errors import InputError
from megatron_speech.text_tokenizers.merges import learn_merges
from megatron_speech.text_tokenizers.scripts import is_assigned
from megatron_speech.text_tokenizers.targets import Targets


def _byte_letters() -> dict[str, int]:
    """GPT-2's letter of each byte → the byte: printable Latin-1 stands for itself, the others follow from U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + i): byte for i, byte in enumerate(other)}


BYTE_OF = _byte_letters()


def to_bytes(token: str) -> bytes | None:
    """The bytes of a byte-level token; None for a token that is not made of byte letters."""
    try:
        return bytes(BYTE_OF[letter] for letter in token)
    except KeyError:
        return None


class HuggingFaceBase:
    """A byte-level BPE `tokenizer.json` that is to be extended."""

    def __init__(self, payload: bytes, where: str) -> None:
        self.where = where
        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(payload.decode("utf-8"))
            self.file: dict[str, Any] = json.loads(payload)
        except Exception as error:  # the library raises a bare Exception
            raise InputError(f"{where} is not a Hugging Face tokenizer: {error}") from error
        self._refuse_other_kinds()
        self.vocabulary: dict[str, int] = self.file["model"]["vocab"]
        self.added: Mapping[str, int] = {token["content"]: token["id"] for token in self.file["added_tokens"]}
        self._refuse_moved_ids()
        spelled = (to_bytes(token) or b"" for token in self.vocabulary)
        self._letters = {character for data in spelled for character in data.decode("utf-8", "ignore")}
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()

    @property
    def kind(self) -> str:
        """What is extended."""
        return "byte-level bpe"

    @property
    def size(self) -> int:
        """One more than the highest id."""
        return max([*self.vocabulary.values(), *self.added.values()]) + 1

    def _refuse_other_kinds(self) -> None:
        model = self.file["model"]
        parts = json.dumps([self.file.get("pre_tokenizer"), self.file.get("normalizer")])
        if model["type"] != "BPE" or model.get("byte_fallback") or '"ByteLevel"' not in parts:
            found = f"{model['type']} with byte fallback" if model.get("byte_fallback") else model["type"]
            raise InputError(
                f"{self.where} is a {found} tokenizer; of Hugging Face tokenizers only byte-level BPE is extended: "
                "name the sentencepiece tokenizer.model that such a tokenizer was made from"
            )
        for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
            if model.get(name):
                raise InputError(
                    f"{self.where}: field model.{name} is {model[name]!r}, which changes how merges apply; "
                    "such a tokenizer is not extended"
                )

    def _refuse_moved_ids(self) -> None:
        """A file whose ids have holes can say one id and mean another: the library renumbers added tokens."""
        for token, number in self.added.items():
            got = self.tokenizer.token_to_id(token)
            if got != number:
                raise InputError(
                    f"{self.where}: token {token!r} has id {number:,} in the file but {got:,} when it is loaded, "
                    "because the ids before it do not follow on each other; rewrite the file with ids that do"
                )
        ids = Counter(
            [*self.vocabulary.values(), *(i for token, i in self.added.items() if token not in self.vocabulary)]
        )
        twice = [number for number, count in ids.items() if count > 1]
        if twice:
            raise InputError(f"{self.where}: id {min(twice):,} stands for more than one token; needed one id per token")

    def covers(self, character: str) -> bool:
        """Whether the character is whole in some token."""
        return character.isspace() or character in self._letters

    def normalize(self, text: str) -> str:
        """The text as the tokenizer's normaliser leaves it."""
        return text if self.tokenizer.normalizer is None else str(self.tokenizer.normalizer.normalize_str(text))

    def extend(self, passages: Sequence[str], targets: Targets, pieces: int, first_id: int, coverage: float) -> bytes:
        """The tokenizer with `pieces` more tokens, the first of them with id `first_id`.

        `coverage` is not used: every character has its bytes.

        Raises:
            InputError: the passages do not yield so many.
        """
        del coverage
        words = self._words(passages, targets)
        merges = learn_merges(words, pieces, functools.partial(_may_be, targets), set(self.vocabulary))
        new = [merge.piece for merge in merges if merge.new]
        if len(new) < pieces:
            raise InputError(
                f"--pieces is {pieces:,}, but the input yields at most {len(new):,} new pieces; "
                + (f"ask for {len(new):,}, or give more text" if new else "give more text of the new scripts")
            )
        result = copy.deepcopy(self.file)
        vocabulary, listed = result["model"]["vocab"], result["model"]["merges"]
        vocabulary.update(self.added)
        vocabulary.update({piece: first_id + i for i, piece in enumerate(new)})
        as_text = bool(listed) and isinstance(listed[0], str)
        seen = {entry if as_text else tuple(entry) for entry in listed}
        for merge in merges:
            entry = f"{merge.left} {merge.right}" if as_text else (merge.left, merge.right)
            if entry not in seen:  # a symbol that is made in two ways can meet an old neighbour again
                seen.add(entry)
                listed.append(entry)
        return json.dumps(result, ensure_ascii=False, indent=2).encode() + b"\n"

    def _words(self, passages: Sequence[str], targets: Targets) -> dict[tuple[str, ...], int]:
        """Words with new characters as the base's merges leave them → how often they occur."""
        counts: Counter[str] = Counter()
        split = self.tokenizer.pre_tokenizer
        for passage in passages:
            text = self.normalize(passage)
            words = [word for word, _ in split.pre_tokenize_str(text)] if split is not None else [text]
            counts.update(words)
        result: dict[tuple[str, ...], int] = {}
        for word, count in sorted(counts.items()):
            data = to_bytes(word)
            if data is None:
                raise InputError(f"{self.where}: its pre-tokenizer does not yield bytes ({word!r}); it is not extended")
            if targets.any_in(data.decode("utf-8", "ignore")):
                symbols = tuple(token.value for token in self.tokenizer.model.tokenize(word))
                result[symbols] = result.get(symbols, 0) + count
        return result


def _may_be(targets: Targets, token: str) -> bool:
    """Whether these bytes can only occur in text with new characters, and make a sensible token."""
    data = to_bytes(token)
    if data is None:
        return False
    data = data.removeprefix(b" ")
    if not data or data[0] & 0xC0 == 0x80:  # begins inside a character
        return False
    whole, rest = _cut(data)
    if whole:
        return targets.is_piece(whole) and not rest
    spelled = _beginning_with(rest) if len(rest) > 1 else ()
    return bool(spelled) and all(targets.is_new(character) for character in spelled)


def _cut(data: bytes) -> tuple[str, bytes]:
    """Whole characters, and the beginning of one more; ("", data) where the bytes are not that."""
    for end in range(len(data), max(len(data) - 4, 0), -1):
        try:
            return data[:end].decode("utf-8"), data[end:]
        except UnicodeDecodeError:
            continue
    return "", data


@functools.cache
def _beginning_with(prefix: bytes) -> tuple[str, ...]:
    """All assigned characters whose UTF-8 begins with `prefix` (2 or 3 bytes)."""
    length = 2 if prefix[0] < 0xE0 else 3 if prefix[0] < 0xF0 else 4
    missing = length - len(prefix)
    bits = prefix[0] & (0xFF >> (length + 1))
    for byte in prefix[1:]:
        bits = bits << 6 | byte & 0x3F
    first = bits << 6 * missing
    codes = range(first, min(first + (1 << 6 * missing), 0x110000))
    return tuple(chr(code) for code in codes if is_assigned(chr(code)))
