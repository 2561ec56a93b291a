"""The manifest of a dataset: what it is, what it was made of, and the hashes that tie its files together."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_speech.errors import InputError
from megatron_speech.files import atomic_write, canonical_json, read_json, sha256_hex

FORMAT_VERSION = 2


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Totals(_Part):
    """Sums over a group of documents; tokens are ids, whatever the number of streams."""

    documents: int = 0
    frames: int = Field(default=0, description="codec frames of target speech; references are not counted twice")
    seconds: float = Field(default=0.0, description="frames / frame rate")
    tokens: int = 0
    audio_tokens: int = 0
    text_tokens: int = 0
    target_tokens: int = Field(default=0, description="tokens after the SFT prompt")
    characters: int = Field(default=0, description="Unicode characters of the target texts, normalised")
    target_text_tokens: int = Field(default=0, description="text tokens of the target texts; references not counted")
    unknown_tokens: int = Field(default=0, description="of those, how many stand for text the tokenizer cannot spell")

    @property
    def fertility(self) -> float | None:
        """Text tokens per character; None without text."""
        return self.target_text_tokens / self.characters if self.characters else None

    @property
    def unknown_rate(self) -> float | None:
        """Share of the text tokens that stand for text the tokenizer cannot spell; None without text."""
        return self.unknown_tokens / self.target_text_tokens if self.target_text_tokens else None


# The fields of `Totals` that add up.
COUNTED = tuple(name for name in Totals.model_fields if name != "seconds")


class FileEntry(_Part):
    """A file of the dataset."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class CodecEntry(_Part):
    """The codec whose codes the audio ids stand for."""

    name: str
    hash: str
    frame_rate_hz: float
    codebooks: int


class FilterStatistics(_Part):
    """What became of the input's rows."""

    rows: int = Field(default=0, description="input rows looked at")
    kept: int = Field(default=0, description="rows that gave at least one document")
    dropped: dict[str, int] = Field(default_factory=dict, description="rows per rule that dropped them")


class InputEntry(_Part):
    """One input file."""

    path: str
    bytes: int
    rows: int


class Manifest(_Part):
    """`P.manifest.json`."""

    format_version: int = FORMAT_VERSION
    task: str
    dtype: str = Field(pattern="^(uint16|int32)$", description="numpy name of the ids on disk")
    streams: int = Field(default=1, ge=1, description="K: ids per step of a document's grid [steps, streams]")
    documents: int = Field(ge=0)
    tokens: int = Field(ge=0)
    token_space_hash: str
    template_hash: str
    codec: CodecEntry
    tokenizer_version: str
    normalization_version: str
    split_seed: int = Field(description="seed of the hash that draws the validation sources")
    seed: int | None = Field(
        description="seed of every choice of the conversion, such as references; null: merged from several"
    )
    append_eod: bool = False
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="the conversion's other choices; of a merged dataset: those that its parts share",
    )
    filters_hash: str = Field(default="", description="of the filters in `options`: parts of one dataset share it")
    forms: dict[str, int] = Field(default_factory=dict, description="documents per form of the task's template")
    notices: dict[str, int] = Field(default_factory=dict, description="rows that are kept but worth knowing of")
    totals: Totals
    languages: dict[str, Totals]
    sources: dict[str, Totals]
    filters: FilterStatistics
    inputs: list[InputEntry]
    shard: str | None = Field(default=None, description="I/N if only that shard of the input was converted")
    files: dict[str, FileEntry] = Field(description="file suffix: size and hash")


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read and check `P.manifest.json`.

    Raises:
        InputError: missing, not JSON, another format version, a field missing, unknown or of a wrong type, or fields
            that are not those that were written.
    """
    value = read_json(path, "manifest")
    stated = value.pop("sha256", None) if isinstance(value, dict) else None
    version = value.get("format_version") if isinstance(value, dict) else None
    if version != FORMAT_VERSION:
        raise InputError(
            f"manifest {path}: format_version is {version!r}, this version reads {FORMAT_VERSION}; "
            "recreate the dataset with preprocess/preprocess_data.py"
        )
    try:
        manifest = Manifest.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"manifest {path}: field {field}: {first['msg']}; restore the file, or recreate the dataset with "
            "preprocess/preprocess_data.py"
        ) from error
    found = sha256_hex(canonical_json(manifest.model_dump()))
    if found != stated:
        raise InputError(
            f"manifest {path}: its fields have SHA-256 {found}, needed {stated} by its field sha256: it was edited or "
            "damaged; restore the file, or recreate the dataset with preprocess/preprocess_data.py"
        )
    return manifest


def write_manifest(path: str | os.PathLike[str], manifest: Manifest) -> None:
    """Write `manifest`, whole or not at all; equal manifests give equal bytes."""
    with atomic_write(path) as handle:
        handle.write(manifest_bytes(manifest))


def manifest_bytes(manifest: Manifest) -> bytes:
    """The one way to write `manifest`: its fields, and the SHA-256 of them, as :func:`canonical_json` spells them."""
    value = manifest.model_dump()
    value["sha256"] = sha256_hex(canonical_json(value))
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def sum_totals(parts: Iterable[Totals], frame_rate_hz: float) -> Totals:
    """The sum of `parts`; seconds are recomputed from the frames, so that the order of summation cannot matter."""
    result = Totals()
    for part in parts:
        for field in COUNTED:
            setattr(result, field, getattr(result, field) + getattr(part, field))
    result.seconds = result.frames / frame_rate_hz
    return result


def sum_counts(parts: Iterable[dict[str, int]]) -> dict[str, int]:
    """Counts added key by key, keys sorted."""
    result: dict[str, int] = {}
    for part in parts:
        for key, count in part.items():
            result[key] = result.get(key, 0) + count
    return dict(sorted(result.items()))
