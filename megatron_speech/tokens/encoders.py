"""Text to ids and back: UTF-8 bytes, sentencepiece models, Hugging Face tokenizers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_speech.errors import InputError
from megatron_speech.tokens import byte_level


class TextEncoder(Protocol):
    """Text to ids of the text range and back.

    `unknown_id` stands for text that the vocabulary cannot spell; None where every text can be spelled.
    """

    size: int
    unknown_id: int | None

    def encode_batch(self, texts: Sequence[str]) -> Sequence[np.ndarray]:
        """Ids of each text, int32 [n]."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        ...


class _BytesEncoder:
    """UTF-8 bytes as ids: any script, no vocabulary file."""

    size = 256
    unknown_id: int | None = None

    def encode_batch(self, texts: Sequence[str]) -> Sequence[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")


class _SentencePieceEncoder:
    """A sentencepiece `.model`."""

    def __init__(self, payload: bytes) -> None:
        import sentencepiece

        self._processor = sentencepiece.SentencePieceProcessor(model_proto=payload)
        self.size = self._processor.vocab_size()
        self.unknown_id: int | None = self._processor.unk_id()

    def encode_batch(self, texts: Sequence[str]) -> Sequence[np.ndarray]:
        return [np.asarray(ids, dtype=np.int32) for ids in self._processor.encode(list(texts), out_type=int)]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._processor.decode([int(i) for i in ids]))


class HuggingFaceEncoder:
    """A Hugging Face `tokenizer.json`.

    Args:
        payload: the file.
        outside_text: an entry of its `added_tokens` → whether text that spells it is plain text all the same. Special
            tokens always are.
    """

    def __init__(self, payload: bytes, outside_text: Callable[[dict[str, Any]], bool] | None = None) -> None:
        import tokenizers

        if outside_text is not None:
            payload = _without_added_tokens(payload, outside_text)
        self._tokenizer = tokenizers.Tokenizer.from_str(payload.decode("utf-8"))
        # A transcript that happens to hold "<|eot_id|>" is text, not a control token.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        model = json.loads(payload)["model"]
        unknown = model.get("unk_token")
        # A Unigram model names its unknown token by id, the others by the token; byte-level ones name none.
        self.unknown_id: int | None = model.get("unk_id") if unknown is None else self.token_id(unknown)
        # The compiled kernel where it takes the tokenizer: the same ids, ten times as fast.
        self._kernel = byte_level.make(payload)

    def encode_batch(self, texts: Sequence[str]) -> Sequence[np.ndarray]:
        """Ids of each text, int32 [n]."""
        if self._kernel is not None:
            return self._kernel.encode_batch(texts)
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False))

    def token_id(self, token: str) -> int | None:
        """Id of a token; None if there is none of that name."""
        return self._tokenizer.token_to_id(token)


def _without_added_tokens(payload: bytes, outside_text: Callable[[dict[str, Any]], bool]) -> bytes:
    """A `tokenizer.json` that takes the added tokens for which `outside_text` holds for plain text."""
    spec = json.loads(payload)
    added = spec.get("added_tokens") or []
    kept = [token for token in added if not outside_text(token)]
    if len(kept) == len(added):
        return payload
    spec["added_tokens"], spec["post_processor"] = kept, None  # which may name them, and is not used here
    return json.dumps(spec, ensure_ascii=False).encode()


_ENCODERS: dict[str, Callable[[bytes], TextEncoder]] = {
    "sentencepiece": _SentencePieceEncoder,
    "huggingface": HuggingFaceEncoder,
}


def encoder_of(kind: str, payload: bytes, where: str = "the text tokenizer") -> TextEncoder:
    """The encoder of a tokenizer's kind and file content; `where` names it in errors."""
    if kind == "bytes":
        return _BytesEncoder()
    if kind not in _ENCODERS:
        raise InputError(
            f"{where}: text tokenizer kind {kind!r} is unknown; needed: bytes, sentencepiece or huggingface"
        )
    try:
        return _ENCODERS[kind](payload)
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
