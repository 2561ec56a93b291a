"""Text to ids and back: UTF-8 bytes, sentencepiece models, Hugging Face tokenizers.

Text never becomes a control token. What is one (:mod:`control_tokens`) keeps its id and its name when ids are
decoded, but no text spells it: the tokenizer that encodes is a copy in which those tokens have other names. Ordinary
added tokens (a run of spaces, an emoji) are found in text as the tokenizer says. Every batch of ids is looked over
once more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron_speech.errors import InputError
from megatron_speech.ragged import Ragged
from megatron_speech.tokens import byte_level
from megatron_speech.tokens.control_tokens import HuggingFaceVocabulary, SentencePieceVocabulary

_SHOWN = 40


class TextEncoder(Protocol):
    """Text to ids of the text range and back.

    `unknown_id` stands for text that the vocabulary cannot spell; None where every text can be spelled. `control_ids`
    are those below `size` that text never becomes, bool [size].
    """

    size: int
    unknown_id: int | None
    control_ids: np.ndarray

    def encode_batch(self, texts: Sequence[str]) -> Ragged:
        """Ids of each text, int32 [n].

        Raises:
            InputError: a text needs an id that is a control token of the token space: the space is not usable.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        ...

    def is_text(self, number: int) -> bool:
        """Whether some text becomes this id."""
        ...


class _BytesEncoder:
    """UTF-8 bytes as ids: any script, no vocabulary file."""

    size = 256
    unknown_id: int | None = None

    def __init__(self, control_ids: Collection[int] = ()) -> None:
        self.control_ids = _table(self.size, control_ids)

    def encode_batch(self, texts: Sequence[str]) -> Ragged:
        ids = [np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8) for text in texts]
        return _checked(self, texts, Ragged.of(ids))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")

    def is_text(self, number: int) -> bool:
        return 0 <= number < self.size and not self.control_ids[number]


class _SentencePieceEncoder:
    """A sentencepiece `.model`."""

    def __init__(self, payload: bytes, control_ids: Collection[int] = ()) -> None:
        import sentencepiece

        self._whole = sentencepiece.SentencePieceProcessor(model_proto=payload)
        self.size = self._whole.vocab_size()
        self.unknown_id: int | None = self._whole.unk_id()
        self._vocabulary = SentencePieceVocabulary(payload, control_ids)
        self.control_ids = _table(self.size, self._vocabulary.control - ({self.unknown_id} - set(control_ids)))
        hidden = self._vocabulary.without_control()
        self._processor = self._whole if hidden is None else sentencepiece.SentencePieceProcessor(model_proto=hidden)

    def encode_batch(self, texts: Sequence[str]) -> Ragged:
        ids = self._processor.encode(list(texts), out_type=int)
        return _checked(self, texts, Ragged.of([np.asarray(one, dtype=np.int32) for one in ids]))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._whole.decode([int(i) for i in ids]))

    def is_text(self, number: int) -> bool:
        return self._vocabulary.is_text(number)


class HuggingFaceEncoder:
    """A Hugging Face `tokenizer.json`.

    Args:
        payload: the file.
        control_ids: ids that text may not become, beside those that the file says are control tokens.
    """

    def __init__(self, payload: bytes, control_ids: Collection[int] = ()) -> None:
        import tokenizers

        self._whole = tokenizers.Tokenizer.from_str(payload.decode("utf-8"))
        self._ids: dict[str, int] = self._whole.get_vocab(with_added_tokens=True)
        self.size = max(self._ids.values(), default=-1) + 1
        self._vocabulary = HuggingFaceVocabulary(payload, self._ids, control_ids)
        self.unknown_id: int | None = self._vocabulary.unknown_id
        self.control_ids = _table(self.size, self._vocabulary.control - ({self.unknown_id} - set(control_ids)))
        hidden = self._vocabulary.without_control()
        # The compiled kernel where it takes the tokenizer: the same ids, ten times as fast.
        self._kernel = byte_level.make(payload if hidden is None else hidden)
        self._tokenizer = self._whole
        if hidden is not None and self._kernel is None:
            self._tokenizer = tokenizers.Tokenizer.from_str(hidden.decode("utf-8"))
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def encode_batch(self, texts: Sequence[str]) -> Ragged:
        """Ids of each text, int32 [n]."""
        if self._kernel is not None:
            return _checked(self, texts, self._kernel.encode_batch(texts))
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return _checked(self, texts, Ragged.of([np.array(encoding.ids, dtype=np.int32) for encoding in encodings]))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        return str(self._whole.decode([int(i) for i in ids], skip_special_tokens=False))

    def token_id(self, token: str) -> int | None:
        """Id of a token; None if there is none of that name."""
        return self._ids.get(token)

    def is_text(self, number: int) -> bool:
        """Whether some text becomes this id."""
        return self._vocabulary.is_text(number)


def _table(size: int, ids: Collection[int | None]) -> np.ndarray:
    """Bool [size]: which ids are among `ids`."""
    table = np.zeros(size, dtype=bool)
    table[[number for number in ids if number is not None and 0 <= number < size]] = True
    return table


def _checked(encoder: TextEncoder, texts: Sequence[str], ids: Ragged) -> Ragged:
    """The ids, none of which is a control token.

    Raises:
        InputError: one is. A control token that a character cannot do without is the only way.
    """
    found = encoder.control_ids[ids.flat]
    if not found.any():
        return ids
    place = int(np.argmax(found))
    number = int(ids.flat[place])
    text = texts[int(np.searchsorted(ids.bounds, place, side="right")) - 1]
    shown = text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
    raise InputError(
        f"text {shown!r} becomes id {number} of the text tokenizer ({encoder.decode([number])!r}), which is a control "
        "token of the token space: text and marks would be one; make the space anew with `megatron-speech "
        "token-space`, which gives the mark an id of its own"
    )


_ENCODERS: dict[str, Callable[[bytes, Collection[int]], TextEncoder]] = {
    "sentencepiece": _SentencePieceEncoder,
    "huggingface": HuggingFaceEncoder,
}


def encoder_of(
    kind: str, payload: bytes, where: str = "the text tokenizer", control_ids: Collection[int] = ()
) -> TextEncoder:
    """The encoder of a tokenizer's kind and file content; `where` names it in errors.

    `control_ids` are ids that text may not become, beside those that the tokenizer itself says are control tokens.
    """
    if kind == "bytes":
        return _BytesEncoder(control_ids)
    if kind not in _ENCODERS:
        raise InputError(
            f"{where}: text tokenizer kind {kind!r} is unknown; needed: bytes, sentencepiece or huggingface"
        )
    try:
        return _ENCODERS[kind](payload, control_ids)
    # sentencepiece raises RuntimeError, tokenizers a bare Exception subclass of its own: both mean a bad file.
    except Exception as error:
        raise InputError(f"{where} is not a usable {kind} tokenizer: {error}") from error


def _read_text_tokenizer(source: str | Path) -> tuple[str, bytes]:
    """Find the tokenizer that `source` names: ("bytes" | folder | file) → (kind, file content)."""
    if str(source) == "bytes":
        return "bytes", b""
    path = Path(source)
    if path.is_dir():
        for name, kind in (("tokenizer.json", "huggingface"), ("tokenizer.model", "sentencepiece")):
            if (path / name).is_file():
                return kind, (path / name).read_bytes()
        raise InputError(
            f"text tokenizer folder {path} holds neither tokenizer.json nor tokenizer.model; "
            "name a Hugging Face folder, a sentencepiece .model file, or bytes"
        )
    if not path.is_file():
        raise InputError(
            f"text tokenizer {path} does not exist; name a Hugging Face folder, a sentencepiece .model file, or bytes"
        )
    kind = "sentencepiece" if path.suffix == ".model" else "huggingface"
    return kind, path.read_bytes()


def open_text_tokenizer(source: str | Path) -> tuple[str, bytes, TextEncoder]:
    """Open what `--text-tokenizer` names: its kind ("bytes", "sentencepiece", "huggingface"), its file, its encoder.

    Raises:
        InputError: it does not exist or is no tokenizer.
    """
    kind, payload = _read_text_tokenizer(source)
    return kind, payload, encoder_of(kind, payload, f"text tokenizer {source}")
