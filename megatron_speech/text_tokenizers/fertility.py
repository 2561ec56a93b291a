"""What a tokenizer makes of a text stream: fertility, unknown tokens, byte fallback, round trips."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_speech.errors import InputError
from megatron_speech.text_tokenizers.corpus import Corpus
from megatron_speech.text_tokenizers.extend_huggingface import to_bytes
from megatron_speech.text_tokenizers.scripts import main_script
from megatron_speech.tokens.encoders import TextEncoder

EXAMPLES = 5  # texts and letters shown of what goes wrong
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass
class Measure:
    """Sums over texts.

    Attributes:
        texts, characters, words, bytes, tokens: what was read and what it became; words are what blanks separate.
        unknown_tokens: tokens that stand for text the vocabulary cannot spell.
        byte_tokens: tokens of bytes that are no whole characters: byte fallback, or unmerged bytes.
        round_trip_failures: texts that decode to something else.
        unknown_characters: letters that are unknown by themselves, with their counts.
        failure: the first text that decodes to something else, and what it decodes to.
    """

    texts: int = 0
    characters: int = 0
    words: int = 0
    bytes: int = 0
    tokens: int = 0
    unknown_tokens: int = 0
    byte_tokens: int = 0
    round_trip_failures: int = 0
    unknown_characters: Counter[str] = field(default_factory=Counter)
    failure: tuple[str, str] | None = None

    def add(self, other: Measure) -> None:
        """Add the sums of other texts."""
        for name in ("texts", "characters", "words", "bytes", "tokens", "unknown_tokens", "byte_tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.round_trip_failures += other.round_trip_failures
        self.unknown_characters.update(other.unknown_characters)
        self.failure = self.failure or other.failure

    def rate(self, numerator: str, denominator: str) -> float:
        """One sum over another; 0 where there is nothing."""
        below = getattr(self, denominator)
        return getattr(self, numerator) / below if below else 0.0

    def to_json(self) -> dict[str, Any]:
        """Sums and rates."""
        return {
            "texts": self.texts,
            "characters": self.characters,
            "words": self.words,
            "bytes": self.bytes,
            "tokens": self.tokens,
            "tokens_per_character": self.rate("tokens", "characters"),
            "tokens_per_word": self.rate("tokens", "words"),
            "tokens_per_byte": self.rate("tokens", "bytes"),
            "unknown_tokens": self.unknown_tokens,
            "unknown_rate": self.rate("unknown_tokens", "tokens"),
            "byte_tokens": self.byte_tokens,
            "byte_rate": self.rate("byte_tokens", "tokens"),
            "round_trip_failures": self.round_trip_failures,
            "unknown_characters": dict(_most_common(self.unknown_characters, EXAMPLES)),
            "round_trip_example": list(self.failure) if self.failure else None,
        }


def _most_common(counts: Counter[str], number: int) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:number]


def measure(corpus: Corpus, kind: str, payload: bytes, encoder: TextEncoder) -> dict[tuple[str, str], Measure]:
    """Read a corpus and measure a tokenizer on it.

    Args:
        corpus: the texts.
        kind, payload, encoder: of the tokenizer (`tokens.encoders.open_text_tokenizer`).

    Returns:
        (language, main script of the text) → sums, the most frequent first.
    """
    is_byte = byte_table(kind, payload, encoder.size)
    spells = _Speller(encoder)
    result: dict[tuple[str, str], Measure] = {}
    for batch in corpus.batches("measure"):
        encoded = encoder.encode_batch([text.text for text in batch])
        for text, ids in zip(batch, encoded, strict=True):
            sums = result.setdefault((text.language, main_script(text.text)), Measure())
            sums.add(_measure_text(text.text, ids, is_byte, encoder, spells))
    return dict(sorted(result.items(), key=lambda item: (-item[1].characters, item[0])))


def _measure_text(
    text: str, ids: np.ndarray, is_byte: np.ndarray, encoder: TextEncoder, spells: Callable[[str], bool]
) -> Measure:
    decoded = encoder.decode(ids.tolist())
    unknown = 0 if encoder.unknown_id is None else int(np.count_nonzero(ids == encoder.unknown_id))
    return Measure(
        texts=1,
        characters=len(text),
        words=len(text.split()),
        bytes=len(text.encode("utf-8")),
        tokens=len(ids),
        unknown_tokens=unknown,
        byte_tokens=int(np.count_nonzero(is_byte[ids])),
        round_trip_failures=decoded != text,
        unknown_characters=Counter(c for c in text if not c.isspace() and not spells(c)) if unknown else Counter(),
        failure=(text, decoded) if decoded != text else None,
    )


class _Speller:
    """Whether a character by itself has a spelling; asked once per character."""

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder
        self._known: dict[str, bool] = {}

    def __call__(self, character: str) -> bool:
        if character not in self._known:
            ids = self._encoder.encode_batch([character])[0]
            self._known[character] = self._encoder.unknown_id not in ids.tolist()
        return self._known[character]


def byte_table(kind: str, payload: bytes, size: int) -> np.ndarray:
    """Which ids, bool [size], are bytes of no whole characters."""
    table = np.zeros(size, dtype=bool)
    if kind == "bytes":
        table[0x80:] = True
    elif kind == "sentencepiece":
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_proto=payload)
        table[:] = [processor.is_byte(number) for number in range(size)]
    else:
        file = json.loads(payload)
        if file["model"]["type"] == "BPE":
            byte_level = '"ByteLevel"' in json.dumps([file.get("pre_tokenizer"), file.get("normalizer")])
            for token, number in file["model"]["vocab"].items():
                table[number] = _is_partial(token) if byte_level else _BYTE_PIECE.fullmatch(token) is not None
    return table


def _is_partial(token: str) -> bool:
    data = to_bytes(token)
    if data is None:
        return False
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return True
    return False


def total(measures: Sequence[Measure]) -> Measure:
    """The sums of all."""
    result = Measure()
    for one in measures:
        result.add(one)
    return result


def by_language(measures: dict[tuple[str, str], Measure]) -> dict[str, Measure]:
    """The sums of each language, whatever the script."""
    languages: dict[str, Measure] = {}
    for (language, _), one in measures.items():
        languages.setdefault(language, Measure()).add(one)
    return languages


def refuse_unknown(measures: dict[tuple[str, str], Measure], limit: float, tokenizer: str) -> None:
    """Check the unknown rate of each language.

    Raises:
        InputError: above `limit` in some; names the worst of them, and letters that are unknown.
    """
    bad = {name: one for name, one in by_language(measures).items() if one.rate("unknown_tokens", "tokens") > limit}
    if not bad:
        return
    worst = sorted(bad.items(), key=lambda item: (-item[1].rate("unknown_tokens", "tokens"), item[0]))[:3]
    listed = []
    for language, one in worst:
        letters = " ".join(letter for letter, _ in _most_common(one.unknown_characters, EXAMPLES))
        listed.append(f"{language} {one.rate('unknown_tokens', 'tokens'):.2%}" + (f" ({letters} …)" if letters else ""))
    more = f" and {len(bad) - len(worst)} more" if len(bad) > len(worst) else ""
    raise InputError(
        f"tokenizer {tokenizer}: unknown tokens in {', '.join(listed)}{more}, needed at most {limit:.2%} of the tokens "
        "of each language; extend it with `megatron-speech tokenizer extend`, or train one with --byte-fallback"
    )
