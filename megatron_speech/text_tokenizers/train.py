"""sentencepiece models trained from text, with no normalisation and no control pieces of their own.

Text is normalised once, by `megatron_speech.tokens.normalization`, before training and before encoding:
sentencepiece's own normaliser is the identity, so that decode(encode(text)) is the text. Beginnings, ends and padding
are ids of the token space, which adds them after the text. Training runs in one thread: the same sample gives the same
bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sentencepiece

from megatron_speech.errors import InputError

_TOO_LARGE = re.compile(r"Vocabulary size too high.*<= (\d+)")
_TOO_SMALL = re.compile(r"Vocabulary size is smaller than required_chars\. \d+ vs (\d+)")

# What each line of a document ends with. As a symbol of its own it is in every vocabulary, and no piece spans it.
_LINE_END = "\n"


@dataclass(frozen=True)
class TrainOptions:
    """How a model is trained.

    Attributes:
        model: "unigram" (Kudo 2018) or "bpe" (Sennrich, Haddow & Birch 2016).
        vocab_size: pieces of the model, the unknown piece, the line end and byte pieces included.
        byte_fallback: characters that have no piece become their UTF-8 bytes, 256 pieces, instead of unknown.
        character_coverage: share of the sample's characters whose letters get a piece each.
        up_to: take fewer pieces where the text yields no more, instead of refusing.
    """

    model: str
    vocab_size: int
    byte_fallback: bool = True
    character_coverage: float = 0.9995
    up_to: bool = False


class VocabularyTooLarge(Exception):
    """The text does not yield so many pieces; `largest` is what sentencepiece says that it yields."""

    def __init__(self, largest: int) -> None:
        super().__init__(largest)
        self.largest = largest


def train(passages: Sequence[str], options: TrainOptions) -> bytes:
    """A sentencepiece `.model` of the passages.

    Raises:
        InputError: a vocabulary size that the text cannot have (unless `up_to`); the sentence names the nearest that
            works.
    """
    if options.vocab_size < 1:
        raise InputError(f"--vocab-size is {options.vocab_size}; needed 1 or more")
    if not 0 < options.character_coverage <= 1:
        raise InputError(f"--character-coverage is {options.character_coverage}; needed above 0 and at most 1")
    model, size = train_up_to(
        passages,
        options.vocab_size,
        model_type=options.model,
        byte_fallback=options.byte_fallback,
        character_coverage=options.character_coverage,
        user_defined_symbols=[_LINE_END],
    )
    if size < options.vocab_size and not options.up_to:
        raise InputError(
            f"--vocab-size is {options.vocab_size:,}, but this text yields at most {size:,} pieces; "
            f"ask for {size:,} or fewer, add --up-to, or give more text"
        )
    return model


def train_up_to(lines: Sequence[str], vocab_size: int, **options: Any) -> tuple[bytes, int]:
    """A model with `vocab_size` pieces, or with as many as the lines yield, and how many those are.

    Raises:
        InputError: fewer pieces than letters.
    """
    while True:
        try:
            return run_trainer(iter(lines), vocab_size=vocab_size, **options), vocab_size
        except VocabularyTooLarge as error:
            # sentencepiece's bound can shift a little when it is asked for: a smaller seed is pruned otherwise.
            vocab_size = min(error.largest, vocab_size - 1)


def run_trainer(lines: Iterator[str], **options: Any) -> bytes:
    """Run sentencepiece's trainer on lines of text, with identity normalisation and only the unknown piece.

    Raises:
        VocabularyTooLarge: fewer pieces than asked for.
        InputError: fewer pieces asked for than letters.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            max_sentence_length=1 << 20,
            input_sentence_size=0,
            shuffle_input_sentence=False,
            num_threads=1,
            minloglevel=2,
            **options,
        )
    except RuntimeError as error:
        message = str(error)
        if found := _TOO_LARGE.search(message):
            raise VocabularyTooLarge(int(found[1])) from error
        if found := _TOO_SMALL.search(message):
            raise InputError(
                f"the vocabulary of {options['vocab_size']:,} pieces has no room for the {int(found[1]):,} letters and "
                "bytes of this text; ask for more pieces, or lower --character-coverage"
            ) from error
        raise InputError(f"sentencepiece cannot train on this text: {message}") from error
    return model.getvalue()
