"""The id space of a run: text | specials | codebooks, fixed once, saved, hashed, checked everywhere.

    0 ............ text_size ........... +specials ........ +codebook 0 ... +codebook K-1 ... size ... padded_size
    text pieces    named specials        audio codes, one id range per codebook            inert padding

(`<system>` and `</system>`, which came later, are the last two ids before `size`.)

A codec with several codebooks is flattened frame by frame, so that one document stays one run of ids (K = 1 stream)
and the id alone tells which codebook a code belongs to. The layouts of other projects (`token_layouts`) have the same
parts in another order. The saved JSON holds the tokenizer itself: a checkpoint with
its `token_space.json` needs nothing else to turn text into ids.
"""

from __future__ import annotations

import base64
import functools
import json
import logging
import math
import numbers
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_speech.errors import InputError
from megatron_speech.files import canonical_json, read_json, sha256_hex, write_json
from megatron_speech.modalities import MODALITY_AUDIO, MODALITY_SPECIAL, MODALITY_TEXT
from megatron_speech.tokens.encoders import HuggingFaceEncoder, TextEncoder, encoder_of, open_text_tokenizer
from megatron_speech.tokens.layouts import OWN, known_layout, resolve

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2

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
    "<system>",
    "</system>",
)
# Specials that came later: behind the codes, so that a space laid out anew has all other ids where they were. Spaces
# saved before that lack them.
_BEHIND_THE_CODES = ("<system>", "</system>")

_CONTROL = re.compile(r"[a-z][a-z0-9_-]{0,31}")

# megatron-core stores ids below 65,500 as uint16 (its `DType.optimal_dtype`).
UINT16_LIMIT = 65_500


def check_description(
    where: str,
    sample_rate_hz: int,
    frame_rate_hz: float,
    codebook_names: Sequence[str],
    codebook_sizes: Sequence[int],
) -> None:
    """Refuse rates and codebooks that are none, of the codec that errors call `where`.

    Raises:
        InputError: a rate is not a positive number, the names are not as many as the sizes, one of them twice, or a
            size is not a positive integer.
    """
    for name, rate, kinds in (
        ("sample_rate_hz", sample_rate_hz, numbers.Integral),
        ("frame_rate_hz", frame_rate_hz, numbers.Real),
    ):
        if isinstance(rate, bool) or not isinstance(rate, kinds) or not 0 < rate < math.inf:
            needed = "a positive integer" if kinds is numbers.Integral else "a positive number"
            raise InputError(f"{where} has {name} {rate!r}; needed is {needed}")
    for name, values in (("codebook_names", codebook_names), ("codebook_sizes", codebook_sizes)):
        if not isinstance(values, list | tuple):
            raise InputError(f"{where} has {name} {values!r}; needed is a tuple, an entry per codebook")
    if len(codebook_names) != len(codebook_sizes) or not codebook_sizes:
        raise InputError(
            f"{where} has {len(codebook_names)} codebook_names ({', '.join(map(str, codebook_names))}) and "
            f"{len(codebook_sizes)} codebook_sizes ({', '.join(map(str, codebook_sizes))}); needed is one of each per "
            "codebook, and at least one codebook"
        )
    for book, size in zip(codebook_names, codebook_sizes, strict=True):
        if not isinstance(book, str) or not book or list(codebook_names).count(book) > 1:
            raise InputError(f"{where} has a codebook called {book!r}; needed is a name of its own for each")
        if isinstance(size, bool) or not isinstance(size, numbers.Integral) or size < 1:
            raise InputError(f"{where} has size {size!r} for codebook {book!r}; needed is a positive integer")


@dataclass(frozen=True)
class CodecDescription:
    """What the id space and the manifests need to know of a codec, without loading it."""

    name: str
    hash: str
    sample_rate_hz: int
    frame_rate_hz: float
    codebook_names: tuple[str, ...]
    codebook_sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        check_description(
            f"the codec {self.name!r}",
            self.sample_rate_hz,
            self.frame_rate_hz,
            self.codebook_names,
            self.codebook_sizes,
        )

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
    """One codebook's ids: codes 0..size-1 are ids offset..offset+size-1, or those of `table`.

    Attributes:
        name, size: as the codec says.
        offset: the lowest id.
        table: id of each code, little-endian int32, where they are not in order; else None.
    """

    name: str
    size: int
    offset: int
    table: bytes | None = None

    @property
    def ids(self) -> np.ndarray:
        """Id of each code, int32 [size]."""
        if self.table is None:
            return np.arange(self.offset, self.offset + self.size, dtype=np.int32)
        return np.frombuffer(self.table, dtype="<i4").astype(np.int32)

    @classmethod
    def of_ids(cls, name: str, ids: Sequence[int]) -> Codebook:
        """The codebook whose code i is `ids[i]`."""
        array = np.asarray(ids, dtype="<i4")
        offset = int(array.min())
        in_order = np.array_equal(array, np.arange(offset, offset + len(array)))
        return cls(name, len(array), offset, None if in_order else array.tobytes())

    def described(self, *, whole: bool) -> dict[str, Any]:
        """JSON-able; the table itself if `whole`, else its hash."""
        value: dict[str, Any] = {"name": self.name, "size": self.size, "offset": self.offset}
        if self.table is not None:
            value["ids_sha256"] = sha256_hex(self.table)
            if whole:
                value["ids"] = _packed(self.table)
        return value


@dataclass(frozen=True)
class TokenSpace:
    """Every id that a run can see, and how text and codes become ids.

    Attributes:
        text_kind: "bytes", "sentencepiece" or "huggingface".
        text_payload: the tokenizer file's content (empty for bytes).
        text_size: number of ids reserved for text, from id 0.
        special_ids: name → id. Usually right after the text; `<bos>` and `<eos>` of a base model keep its ids.
        layout: "own", or whose order of ids and prompt it is (`token_layouts.LAYOUTS`).
        sequences: special → ids that stand in its place in a document, where that is not its id alone.
        streams: K, ids per step of a document; 1 for documents that are one run of ids.
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
    layout: str = OWN
    sequences: dict[str, tuple[int, ...]] = field(default_factory=dict)
    streams: int = 1

    # ---- making, saving, opening

    @classmethod
    def build(
        cls,
        text_tokenizer: str | Path,
        codec: CodecDescription,
        base: str | Path | None = None,
        pad_multiple: int = 128,
        layout: str = OWN,
        controls: Sequence[str] = (),
    ) -> TokenSpace:
        """Lay out a new id space.

        Args:
            text_tokenizer: "bytes", a folder with `tokenizer.json`, or a sentencepiece `.model` file.
            codec: the codec's description (`codecs.describe_codec`).
            base: a Hugging Face model folder whose embedding rows are to be kept: its `config.json` decides how
                many ids belong to text and which of them are `<bos>` and `<eos>`.
            pad_multiple: `padded_size` is rounded up to a multiple of this.
            layout: "own", or the name of another project's.
            controls: names of control tags, such as `pause`: each a special `[[pause]]` with an id of its own.

        Raises:
            InputError: a file is missing or unusable, the tokenizer yields nothing for plain text, it does not have
                the tokens of the layout, or a control has a name that cannot be.
        """
        _check_controls(controls, layout)
        kind, payload, encoder = open_text_tokenizer(text_tokenizer)
        if all(len(ids) == 0 for ids in encoder.encode_batch(["hello", "one two three", "नमस्ते"])):
            raise InputError(
                f"text tokenizer {text_tokenizer} yields no token for plain text (vocabulary of {encoder.size}); "
                "name a trained tokenizer, or bytes"
            )
        if layout != OWN:
            return cls._build_known(layout, kind, payload, encoder, codec, base, pad_multiple, text_tokenizer)
        text_size = encoder.size
        kept: dict[str, int] = {}
        if base is not None:
            text_size, kept = _base_layout(Path(base), encoder)
        next_id = text_size
        special_ids = {}
        for name in (name for name in SPECIALS if name not in _BEHIND_THE_CODES):
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
        for name in (*_BEHIND_THE_CODES, *(f"[[{control}]]" for control in controls)):
            special_ids[name] = next_id
            next_id += 1
        padded_size = -(-next_id // pad_multiple) * pad_multiple
        return cls(kind, payload, text_size, special_ids, codec, tuple(codebooks), next_id, padded_size)

    @classmethod
    def _build_known(
        cls,
        layout: str,
        kind: str,
        payload: bytes,
        encoder: TextEncoder,
        codec: CodecDescription,
        base: str | Path | None,
        pad_multiple: int,
        source: str | Path,
    ) -> TokenSpace:
        known = known_layout(layout)
        if not isinstance(encoder, HuggingFaceEncoder):
            raise InputError(f"text tokenizer {source} is of kind {kind}; the layout {layout} needs a tokenizer.json")
        if codec.codebook_count != 1:
            raise InputError(
                f"codec {codec.name} has {codec.codebook_count} codebooks; the layout {layout} has one code per frame"
            )
        found = resolve(
            known,
            SPECIALS,
            codec.codebook_sizes[0],
            token_id=encoder.token_id,
            vocabulary_size=encoder.size,
            encode=lambda text: encoder.encode_batch([text])[0].tolist(),
            where=f"text tokenizer {source}",
        )
        size = found.size
        if base is not None:
            size = max(size, _base_vocab_size(Path(base))[1])
        return cls(
            kind,
            payload,
            found.text_size,
            found.special_ids,
            codec,
            (Codebook.of_ids(codec.codebook_names[0], found.code_ids),),
            size,
            -(-size // pad_multiple) * pad_multiple,
            layout,
            found.sequences,
        )

    def _layout(self, *, whole: bool = False) -> dict[str, Any]:
        """Everything but the tokenizer's bytes and (unless `whole`) tables, as JSON-able values: what is hashed."""
        return {
            "format_version": FORMAT_VERSION,
            "layout": self.layout,
            "text": {
                "kind": self.text_kind,
                "sha256": sha256_hex(self.text_payload),
                "size": self.text_size,
            },
            "specials": self.special_ids,
            "codec": asdict(self.codec),
            "sequences": self.sequences,
            "codebooks": [codebook.described(whole=whole) for codebook in self.codebooks],
            "size": self.size,
            "padded_size": self.padded_size,
            # Left out for one stream: files and hashes of those spaces stay what they were before there were others.
            **({"streams": self.streams} if self.streams != 1 else {}),
        }

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of the layout and of the tokenizer's bytes: equal hashes mean equal ids for equal input."""
        # A round trip through JSON makes tuples lists, as they are in the file.
        return sha256_hex(canonical_json(json.loads(json.dumps(self._layout()))))

    def save(self, path: str | Path) -> None:
        """Write the id space, tokenizer included, as one JSON file, whole or not at all."""
        value = self._layout(whole=True)
        value["text"]["payload"] = _packed(self.text_payload)
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
                    "recreate it with `megatron-speech token-space`"
                )
            codec = dict(value["codec"])
            codec["codebook_names"] = tuple(codec["codebook_names"])
            codec["codebook_sizes"] = tuple(codec["codebook_sizes"])
            space = cls(
                text_kind=value["text"]["kind"],
                text_payload=_unpacked(value["text"]["payload"]),
                text_size=value["text"]["size"],
                special_ids=dict(value["specials"]),
                codec=CodecDescription(**codec),
                codebooks=tuple(
                    Codebook(
                        book["name"], book["size"], book["offset"], _unpacked(book["ids"]) if "ids" in book else None
                    )
                    for book in value["codebooks"]
                ),
                size=value["size"],
                padded_size=value["padded_size"],
                layout=value["layout"],
                sequences={name: tuple(ids) for name, ids in value["sequences"].items()},
                streams=value.get("streams", 1),
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
                "the file was edited or damaged; recreate it with `megatron-speech token-space`"
            )
        return space

    def require_one_stream(self, what: str) -> None:
        """Do nothing in a space of one stream; `what` is the part that cannot read or make others yet, as a noun.

        Raises:
            InputError: the space has several streams.
        """
        if self.streams != 1:
            raise InputError(
                f"the token space has {self.streams} streams, and {what} is made for documents of 1 stream; use a "
                "token space whose codebooks are flattened into one"
            )

    # ---- text

    @functools.cached_property
    def _encoder(self) -> TextEncoder:
        # Marks and codes that the tokenizer has tokens for: a transcript that holds "<|s_7|>" is text, not a code.
        control = {*self.special_ids.values(), *range(self.text_size, self.size)}
        return encoder_of(self.text_kind, self.text_payload, "the token space's text tokenizer", control)

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes build their own encoder: a sentencepiece or tokenizers object need not travel.
        return {key: value for key, value in self.__dict__.items() if key not in ("_encoder", "control_ids")}

    def encode_text(self, text: str) -> np.ndarray:
        """Ids of one text, int32 [n]; no specials are added or recognised."""
        return self._encoder.encode_batch([text])[0]

    def encode_text_batch(self, texts: Sequence[str]) -> Sequence[np.ndarray]:
        """Ids of many texts, each int32 [n]."""
        return self._encoder.encode_batch(texts)

    def decode_text(self, ids: Iterable[int]) -> str:
        """Text of ids of the text range."""
        return self._encoder.decode([int(i) for i in ids])

    @functools.cached_property
    def control_ids(self) -> np.ndarray:
        """Ids of the text range that text never becomes , bool [text_size]."""
        table = np.zeros(self.text_size, dtype=bool)
        own = self._encoder.control_ids[: self.text_size]
        table[: len(own)] = own
        table[[number for number in self.special_ids.values() if number < self.text_size]] = True
        return table

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
        return self.place_codes(codes.astype(np.int32))

    def place_codes(self, codes: np.ndarray) -> np.ndarray:
        """Ids of codes that were checked before: int32 [frames, codebooks] to int32 [frames * codebooks]."""
        if self._in_order:
            return (codes + self._code_offsets).reshape(-1)
        columns = [book.ids[codes[:, k]] for k, book in enumerate(self.codebooks)]
        return np.stack(columns, axis=1).reshape(-1)

    @functools.cached_property
    def _in_order(self) -> bool:
        return all(book.table is None for book in self.codebooks)

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
        grid = ids.reshape(-1, self.codebook_count).astype(np.int64)
        inside = (grid >= 0) & (grid < self.padded_size)
        known = np.where(inside, grid, 0)
        good = inside & (self._codebook_of_id[known] == np.arange(self.codebook_count))
        if not good.all():
            frame, k = np.argwhere(~good)[0]
            raise InputError(
                f"id {int(grid[frame, k])} at frame {int(frame)} is not a code of "
                f"codebook {self.codebooks[int(k)].name!r}; audio ids come in codebook order, frame by frame"
            )
        return self._code_of_id[grid]

    # ---- tables for masks and sampling

    def special(self, name: str) -> int:
        """Id of a named special, such as `<speech_start>`."""
        return self.special_ids[name]

    @functools.cached_property
    def controls(self) -> dict[str, int]:
        """Control tags by name, without their brackets → id."""
        return {name[2:-2]: number for name, number in self.special_ids.items() if name.startswith("[[")}

    def sequence(self, name: str) -> tuple[int, ...]:
        """What stands for a special in a document: its id, or where the layout is another project's, more."""
        return self.sequences.get(name, (self.special_ids[name],))

    def modality_table(self) -> np.ndarray:
        """uint8 [padded_size]: MODALITY_TEXT, MODALITY_AUDIO or MODALITY_SPECIAL of every id."""
        table = np.full(self.padded_size, MODALITY_SPECIAL, dtype=np.uint8)
        table[: self.text_size] = MODALITY_TEXT
        for codebook in self.codebooks:
            table[codebook.ids] = MODALITY_AUDIO
        table[list(self.special_ids.values())] = MODALITY_SPECIAL
        return table

    def codebook_table(self) -> np.ndarray:
        """int16 [padded_size]: index of the codebook of every id, -1 for ids that are no code."""
        return self._codebook_of_id.copy()

    def code_table(self) -> np.ndarray:
        """int32 [padded_size]: code of every id, -1 for ids that are no code."""
        return self._code_of_id.copy()

    @functools.cached_property
    def _codebook_of_id(self) -> np.ndarray:
        table = np.full(self.padded_size, -1, dtype=np.int16)
        for index, codebook in enumerate(self.codebooks):
            table[codebook.ids] = index
        return table

    @functools.cached_property
    def _code_of_id(self) -> np.ndarray:
        table = np.full(self.padded_size, -1, dtype=np.int32)
        for codebook in self.codebooks:
            table[codebook.ids] = np.arange(codebook.size, dtype=np.int32)
        return table

    @property
    def dtype(self) -> type[np.uint16] | type[np.int32]:
        """Type of ids on disk: the smallest that megatron-core's format has for this size."""
        return np.uint16 if self.size < UINT16_LIMIT else np.int32

    def describe(self) -> str:
        """One line for logs."""
        whose = "" if self.layout == OWN else f" in the layout of {self.layout}"
        books = " ".join(f"{book.name}:{book.size}" for book in self.codebooks)
        return (
            f"token space {self.hash[:12]}{whose}: {self.size:,} ids ({self.padded_size:,} padded) = "
            f"text {self.text_size:,} ({self.text_kind}) + {len(self.special_ids)} specials + "
            f"{self.codec.name} [{books}]"
        )


def _check_controls(controls: Sequence[str], layout: str) -> None:
    for name in controls:
        if not _CONTROL.fullmatch(name):
            raise InputError(
                f"control {name!r} cannot be a tag; needed are a lower-case letter and then letters, digits, _ and -, "
                "32 at most, such as pause or style-whisper"
            )
        if list(controls).count(name) > 1:
            raise InputError(f"control {name!r} is named twice; name it once")
    if controls and layout != OWN:
        raise InputError(
            f"controls ({', '.join(controls)}) need ids of their own, which the layout of {layout} has none for; leave "
            "them out, or use the own layout"
        )


def _packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 9)).decode("ascii")


def _unpacked(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))


def _base_vocab_size(base: Path) -> tuple[dict[str, Any], int]:
    """config.json of a Hugging Face model folder, and the rows of its embedding table."""
    config = read_json(base / "config.json", "base model config")
    vocab_size = config.get("vocab_size") if isinstance(config, dict) else None
    if not isinstance(vocab_size, int):
        raise InputError(
            f"base model config {base / 'config.json'}: field vocab_size is {vocab_size!r}, needed: an integer"
        )
    return config, vocab_size


def _base_layout(base: Path, encoder: TextEncoder) -> tuple[int, dict[str, int]]:
    """Text size and kept special ids of a Hugging Face model folder whose embedding rows are to be kept."""
    config, vocab_size = _base_vocab_size(base)
    kept = {}
    for name, key in (("<bos>", "bos_token_id"), ("<eos>", "eos_token_id")):
        found = config.get(key)
        if isinstance(found, list):  # LLaMA-3 Instruct lists several ends of turn; the first is the end of text
            found = found[0] if found else None
        if not isinstance(found, int) or not 0 <= found < vocab_size:
            continue
        if encoder.is_text(found) or found == encoder.unknown_id:
            logger.warning(
                "%s: %s is %d, which is %r in the tokenizer, not a control token: %s gets an id of its own",
                base / "config.json", key, found, encoder.decode([found]), name,
            )  # fmt: skip
            continue
        kept[name] = found
    if len(set(kept.values())) < len(kept):  # Qwen's base models use one id for both; a start must not look like an end
        del kept["<bos>"]
    # Embedding tables are often padded past the tokenizer: new ids begin after the last existing row.
    return max(vocab_size, encoder.size), kept
