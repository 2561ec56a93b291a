"""The id space of a run: text | specials | codebooks, fixed once, saved, hashed, checked everywhere.

    0 ............ text_size ........... +specials ........ +codebook 0 ... +codebook K-1 ... size ... padded_size
    text pieces    named specials        audio codes, one id range per codebook            inert padding

A codec with several codebooks is flattened frame by frame, so that one document stays one run of ids (S = 1) and
the id alone tells which codebook a code belongs to. The saved JSON holds the tokenizer itself: a checkpoint with
its `token_space.json` needs nothing else to turn text into ids.
"""

from __future__ import annotations

import base64
import functools
import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_speech.errors import InputError
from megatron_speech.files import canonical_json, read_json, sha256_hex, write_json
from megatron_speech.text_tokenizers import byte_level

FORMAT_VERSION = 1

MODALITY_TEXT, MODALITY_AUDIO, MODALITY_SPECIAL = 0, 1, 2
MODALITIES = ("text", "audio", "special")

SPECIALS = (
    "<pad>",
    "<bos>",
    "<eos>",
    "<speech_start>",
    "<speech_end>",
    "<speech_sep>",
    "<ref_text>",
    "</ref_text>",
    "<ref_speech>",
    "</ref_speech>",
    "<target_text>",
    "</target_text>",
    "<user>",
    "</user>",
    "<assistant>",
    "</assistant>",
)

# megatron-core stores ids below 65,500 as uint16 (its `DType.optimal_dtype`).
UINT16_LIMIT = 65_500


@dataclass(frozen=True)
class CodecDescription:
    """What the id space and the manifests need to know of a codec, without loading it."""

    name: str
    hash: str
    sample_rate_hz: int
    frame_rate_hz: float
    codebook_names: tuple[str, ...]
    codebook_sizes: tuple[int, ...]

    @property
    def codebook_count(self) -> int:
        """Codes per frame."""
        return len(self.codebook_sizes)

    @property
    def tokens_per_second(self) -> float:
        """Audio tokens per second of sound."""
        return self.frame_rate_hz * self.codebook_count


@dataclass(frozen=True)
class Codebook:
    """One codebook's range of ids: codes 0..size-1 are ids offset..offset+size-1."""

    name: str
    size: int
    offset: int


class TextEncoder(Protocol):
    """Text to ids of the text range and back.

    `unknown_id` stands for text that the vocabulary cannot spell; None where every text can be spelled.
    """

    size: int
    unknown_id: int | None

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32 [n]."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        ...


class _BytesEncoder:
    """UTF-8 bytes as ids: any script, no vocabulary file."""

    size = 256
    unknown_id: int | None = None

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
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

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.asarray(ids, dtype=np.int32) for ids in self._processor.encode(list(texts), out_type=int)]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._processor.decode([int(i) for i in ids]))


class _HuggingFaceEncoder:
    """A Hugging Face `tokenizer.json`."""

    def __init__(self, payload: bytes) -> None:
        import tokenizers

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

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self._kernel is not None:
            return self._kernel.encode_batch(texts)
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False))

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)


_ENCODERS: dict[str, Callable[[bytes], TextEncoder]] = {
    "sentencepiece": _SentencePieceEncoder,
    "huggingface": _HuggingFaceEncoder,
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


@dataclass(frozen=True)
class TokenSpace:
    """Every id that a run can see, and how text and codes become ids.

    Attributes:
        text_kind: "bytes", "sentencepiece" or "huggingface".
        text_payload: the tokenizer file's content (empty for bytes).
        text_size: number of ids reserved for text, from id 0.
        special_ids: name → id. Usually right after the text; `<bos>` and `<eos>` of a base model keep its ids.
        codec: the frozen codec whose codes the audio ids stand for.
        codebooks: the audio id ranges, in the order in which a frame is flattened.
        size: number of ids in use; ids from `size` to `padded_size` never occur.
        padded_size: rows of the embedding table, a multiple of `pad_multiple`.
    """

    text_kind: str
    text_payload: bytes
    text_size: int
    special_ids: dict[str, int]
    codec: CodecDescription
    codebooks: tuple[Codebook, ...]
    size: int
    padded_size: int

    # ---- making, saving, opening

    @classmethod
    def build(
        cls,
        text_tokenizer: str | Path,
        codec: CodecDescription,
        base: str | Path | None = None,
        pad_multiple: int = 128,
    ) -> TokenSpace:
        """Lay out a new id space.

        Args:
            text_tokenizer: "bytes", a folder with `tokenizer.json`, or a sentencepiece `.model` file.
            codec: the codec's description (`codecs.describe_codec`).
            base: a Hugging Face model folder whose embedding rows are to be kept: its `config.json` decides how
                many ids belong to text and which of them are `<bos>` and `<eos>`.
            pad_multiple: `padded_size` is rounded up to a multiple of this.

        Raises:
            InputError: a file is missing or unusable, or the tokenizer yields nothing for plain text.
        """
        kind, payload, encoder = open_text_tokenizer(text_tokenizer)
        if all(len(ids) == 0 for ids in encoder.encode_batch(["hello", "one two three", "नमस्ते"])):
            raise InputError(
                f"text tokenizer {text_tokenizer} yields no token for plain text (vocabulary of {encoder.size}); "
                "name a trained tokenizer, or bytes"
            )
        text_size = encoder.size
        kept: dict[str, int] = {}
        if base is not None:
            text_size, kept = _base_layout(Path(base), encoder)
        next_id = text_size
        special_ids = {}
        for name in SPECIALS:
            if name in kept:
                special_ids[name] = kept[name]
            else:
                special_ids[name] = next_id
                next_id += 1
        codebooks = []
        for name, codebook_size in zip(codec.codebook_names, codec.codebook_sizes, strict=True):
            codebooks.append(Codebook(name, int(codebook_size), next_id))
            next_id += int(codebook_size)
        if not codebooks:
            raise InputError(f"codec {codec.name} has no codebook; a token space needs at least one")
        padded_size = -(-next_id // pad_multiple) * pad_multiple
        return cls(kind, payload, text_size, special_ids, codec, tuple(codebooks), next_id, padded_size)

    def _layout(self) -> dict[str, Any]:
        """Everything but the tokenizer's bytes, as JSON-able values; the hash is taken over this."""
        return {
            "format_version": FORMAT_VERSION,
            "text": {
                "kind": self.text_kind,
                "sha256": sha256_hex(self.text_payload),
                "size": self.text_size,
            },
            "specials": self.special_ids,
            "codec": asdict(self.codec),
            "codebooks": [asdict(codebook) for codebook in self.codebooks],
            "size": self.size,
            "padded_size": self.padded_size,
        }

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of the layout and of the tokenizer's bytes: equal hashes mean equal ids for equal input."""
        # A round trip through JSON makes tuples lists, as they are in the file.
        return sha256_hex(canonical_json(json.loads(json.dumps(self._layout()))))

    def save(self, path: str | Path) -> None:
        """Write the id space, tokenizer included, as one JSON file, whole or not at all."""
        value = self._layout()
        value["text"]["payload"] = base64.b64encode(zlib.compress(self.text_payload, 9)).decode("ascii")
        value["hash"] = self.hash
        write_json(path, value)

    @classmethod
    def load(cls, path: str | Path) -> TokenSpace:
        """Open a saved id space and check it against its own hash.

        Raises:
            InputError: not a token space file, another format version, or content that does not match the hash.
        """
        value = read_json(path, "token space")
        try:
            found = value["format_version"]
            if found != FORMAT_VERSION:
                raise InputError(
                    f"token space {path}: format_version is {found}, this version reads {FORMAT_VERSION}; "
                    "make it anew with `megatron-speech token-space`"
                )
            codec = dict(value["codec"])
            codec["codebook_names"] = tuple(codec["codebook_names"])
            codec["codebook_sizes"] = tuple(codec["codebook_sizes"])
            space = cls(
                text_kind=value["text"]["kind"],
                text_payload=zlib.decompress(base64.b64decode(value["text"]["payload"])),
                text_size=value["text"]["size"],
                special_ids=dict(value["specials"]),
                codec=CodecDescription(**codec),
                codebooks=tuple(Codebook(**codebook) for codebook in value["codebooks"]),
                size=value["size"],
                padded_size=value["padded_size"],
            )
            needed = value["hash"]
        except (KeyError, TypeError, ValueError, zlib.error) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"token space {path} is not a token space file (field {error}); "
                "make it with `megatron-speech token-space`"
            ) from error
        if space.hash != needed:
            raise InputError(
                f"token space {path}: hash is {space.hash[:12]}… by content but {needed[:12]}… by its `hash` field: "
                "the file was edited or damaged; make it anew with `megatron-speech token-space`"
            )
        return space

    # ---- text

    @functools.cached_property
    def _encoder(self) -> TextEncoder:
        return encoder_of(self.text_kind, self.text_payload, "the token space's text tokenizer")

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes build their own encoder: a sentencepiece or tokenizers object need not travel.
        return {key: value for key, value in self.__dict__.items() if key != "_encoder"}

    def encode_text(self, text: str) -> np.ndarray:
        """Ids of one text, int32 [n]; no specials are added or recognised."""
        return self._encoder.encode_batch([text])[0]

    def encode_text_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of many texts, each int32 [n]."""
        return self._encoder.encode_batch(texts)

    def decode_text(self, ids: Iterable[int]) -> str:
        """Text of ids of the text range."""
        return self._encoder.decode([int(i) for i in ids])

    @property
    def unknown_id(self) -> int | None:
        """The id that stands for text the tokenizer cannot spell; None for bytes and byte-level tokenizers."""
        return self._encoder.unknown_id

    # ---- codes

    @property
    def codebook_count(self) -> int:
        """Audio tokens per frame."""
        return len(self.codebooks)

    @property
    def tokens_per_second(self) -> float:
        """Audio tokens per second of sound."""
        return self.codec.tokens_per_second

    @property
    def audio_start(self) -> int:
        """First audio id; audio ids are audio_start..size-1."""
        return self.codebooks[0].offset

    @functools.cached_property
    def _code_offsets(self) -> np.ndarray:
        return np.array([codebook.offset for codebook in self.codebooks], dtype=np.int32)

    @functools.cached_property
    def _code_sizes(self) -> np.ndarray:
        return np.array([codebook.size for codebook in self.codebooks], dtype=np.int64)

    def encode_codes(self, codes: np.ndarray) -> np.ndarray:
        """Flatten a grid of codes frame by frame into ids.

        Args:
            codes: integers [frames, codebooks], or [frames] for a codec with one codebook.

        Returns:
            int32 [frames * codebooks]: id = codebook offset + code.

        Raises:
            InputError: wrong shape or dtype, or a code outside its codebook.
        """
        codes = np.asarray(codes)
        if codes.ndim == 1 and self.codebook_count == 1:
            codes = codes[:, None]
        if codes.ndim != 2 or codes.shape[1] != self.codebook_count or not np.issubdtype(codes.dtype, np.integer):
            raise InputError(
                f"codes are {codes.dtype} of shape {list(codes.shape)}; codec {self.codec.name} needs integers "
                f"[frames, {self.codebook_count}]"
            )
        if codes.size:
            bad = (codes.min(axis=0) < 0) | (codes.max(axis=0) >= self._code_sizes)
            if bad.any():
                k = int(np.argmax(bad))
                column = codes[:, k]
                frame = int(np.argmax((column < 0) | (column >= self._code_sizes[k])))
                raise InputError(
                    f"code {int(column[frame])} at frame {frame} is outside codebook {self.codebooks[k].name!r} "
                    f"(0 to {self.codebooks[k].size - 1}) of codec {self.codec.name}; encode the audio with that codec"
                )
        return (codes.astype(np.int32) + self._code_offsets).reshape(-1)

    def decode_codes(self, ids: np.ndarray) -> np.ndarray:
        """Ids of whole frames back to codes, int32 [frames, codebooks].

        Raises:
            InputError: not whole frames, or an id outside the codebook whose turn it is.
        """
        ids = np.asarray(ids)
        if ids.size % self.codebook_count:
            raise InputError(
                f"{ids.size} audio ids are not whole frames of {self.codebook_count} codebooks; cut at a frame edge"
            )
        codes = ids.reshape(-1, self.codebook_count).astype(np.int64) - self._code_offsets
        if codes.size and ((codes < 0) | (codes >= self._code_sizes)).any():
            frame, k = np.argwhere((codes < 0) | (codes >= self._code_sizes))[0]
            raise InputError(
                f"id {int(ids.reshape(-1, self.codebook_count)[frame, k])} at frame {int(frame)} is not a code of "
                f"codebook {self.codebooks[int(k)].name!r}; audio ids come in codebook order, frame by frame"
            )
        return codes.astype(np.int32)

    # ---- tables for masks and sampling

    def special(self, name: str) -> int:
        """Id of a named special, such as `<speech_start>`."""
        return self.special_ids[name]

    def modality_table(self) -> np.ndarray:
        """uint8 [padded_size]: MODALITY_TEXT, MODALITY_AUDIO or MODALITY_SPECIAL of every id."""
        table = np.full(self.padded_size, MODALITY_SPECIAL, dtype=np.uint8)
        table[: self.text_size] = MODALITY_TEXT
        table[self.audio_start : self.size] = MODALITY_AUDIO
        table[list(self.special_ids.values())] = MODALITY_SPECIAL
        return table

    def codebook_table(self) -> np.ndarray:
        """int16 [padded_size]: index of the codebook of every id, -1 for ids that are no code."""
        table = np.full(self.padded_size, -1, dtype=np.int16)
        for index, codebook in enumerate(self.codebooks):
            table[codebook.offset : codebook.offset + codebook.size] = index
        return table

    @property
    def dtype(self) -> type[np.uint16] | type[np.int32]:
        """Type of ids on disk: the smallest that megatron-core's format has for this size."""
        return np.uint16 if self.size < UINT16_LIMIT else np.int32

    def describe(self) -> str:
        """One line for logs."""
        books = " ".join(f"{book.name}:{book.size}" for book in self.codebooks)
        return (
            f"token space {self.hash[:12]}: {self.size:,} ids ({self.padded_size:,} padded) = text {self.text_size:,} "
            f"({self.text_kind}) + {len(SPECIALS)} specials + {self.codec.name} [{books}]"
        )


def _base_layout(base: Path, encoder: TextEncoder) -> tuple[int, dict[str, int]]:
    """Text size and kept special ids of a Hugging Face model folder whose embedding rows are to be kept."""
    config = read_json(base / "config.json", "base model config")
    vocab_size = config.get("vocab_size") if isinstance(config, dict) else None
    if not isinstance(vocab_size, int):
        raise InputError(
            f"base model config {base / 'config.json'}: field vocab_size is {vocab_size!r}, needed: an integer"
        )
    kept = {}
    for name, field in (("<bos>", "bos_token_id"), ("<eos>", "eos_token_id")):
        found = config.get(field)
        if isinstance(found, list):  # LLaMA-3 Instruct lists several ends of turn; the first is the end of text
            found = found[0] if found else None
        if isinstance(found, int) and 0 <= found < vocab_size:
            kept[name] = found
    if len(set(kept.values())) < len(kept):  # Qwen's base models use one id for both; a start must not look like an end
        del kept["<bos>"]
    # Embedding tables are often padded past the tokenizer: new ids begin after the last existing row.
    return max(vocab_size, encoder.size), kept
