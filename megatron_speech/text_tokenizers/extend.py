"""A tokenizer with new pieces after its own ids: which scripts, which rows, what changed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_speech.errors import InputError
from megatron_speech.files import atomic_write, prepare_output_directory, read_json, sha256_hex, write_json
from megatron_speech.text_tokenizers.corpus import Corpus, draw_sample
from megatron_speech.text_tokenizers.extend_huggingface import HuggingFaceBase
from megatron_speech.text_tokenizers.extend_sentencepiece import SentencePieceBase
from megatron_speech.text_tokenizers.scripts import main_script
from megatron_speech.text_tokenizers.targets import Targets, coverage, new_scripts
from megatron_speech.tokens.encoders import TextEncoder, encoder_of, open_text_tokenizer
from megatron_speech.tokens.normalization import NORMALIZATION_VERSION

RECORD_VERSION = 1
ENCODE_AT_ONCE = 1_000

# Of a Hugging Face folder: what belongs to the tokenizer and stays true. vocab.json and merges.txt would be outdated.
_COPIED = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


class Base(Protocol):
    """A tokenizer that can be extended."""

    @property
    def kind(self) -> str:
        """What it is, in words."""
        ...

    @property
    def size(self) -> int:
        """One more than its highest id."""
        ...

    @property
    def added(self) -> Mapping[str, int]:
        """Control tokens, which text may spell out without becoming them."""
        ...

    def covers(self, character: str) -> bool:
        """Whether the character has a token of its own."""
        ...

    def normalize(self, text: str) -> str:
        """Text as its tokens spell it."""
        ...

    def extend(self, passages: Sequence[str], targets: Targets, pieces: int, first_id: int, coverage: float) -> bytes:
        """The tokenizer's file with `pieces` more tokens from `first_id` on."""
        ...


@dataclass(frozen=True)
class ExtendOptions:
    """How a tokenizer is extended.

    Attributes:
        pieces: number of new pieces.
        scripts: Unicode script names; None: those of the input that the base does not cover.
        first_id: new ids begin here, or after the base's highest id and its model's embedding rows.
        sample_characters, temperature, seed: of the sample (`corpus.draw_sample`).
        character_coverage: share of the new scripts' characters whose letters get a piece each.
    """

    pieces: int
    scripts: tuple[str, ...] | None = None
    first_id: int | None = None
    sample_characters: int = 100_000_000
    temperature: float = 1.0
    seed: int = 0
    character_coverage: float = 0.9995


@dataclass(frozen=True)
class Fertility:
    """Tokens of the sample's passages of one script, by the base and by the extended tokenizer; unknown ones too."""

    characters: int
    before: int
    after: int
    unknown_before: int
    unknown_after: int


@dataclass(frozen=True)
class Extension:
    """An extended tokenizer, not yet written.

    Attributes:
        kind: "sentencepiece" or "huggingface".
        payload: content of the `.model` or of `tokenizer.json`.
        record: what was extended, JSON-able: the base's hash, the first new id, how many.
        fertility: main script of a passage → tokens before and after.
    """

    kind: str
    payload: bytes
    record: dict[str, Any]
    fertility: dict[str, Fertility]


def extend(source: str | Path, corpus: Corpus, options: ExtendOptions) -> Extension:
    """Extend the tokenizer `source` (a sentencepiece `.model`, a Hugging Face folder) for new scripts.

    Raises:
        InputError: the tokenizer cannot be extended, or the input does not yield so many pieces.
    """
    if options.pieces < 1:
        raise InputError(f"--pieces is {options.pieces}; needed 1 or more")
    kind, payload, encoder = open_text_tokenizer(source)
    base = _open_base(kind, payload, str(source))
    rows = _embedding_rows(Path(source), base.size)
    first_id = options.first_id if options.first_id is not None else rows
    if first_id < base.size:
        raise InputError(f"--first-id is {first_id:,}, but {source} has ids up to {base.size - 1:,}; needed a later id")
    scripts = options.scripts if options.scripts is not None else _find_scripts(base, corpus)
    targets = Targets(scripts, base.covers)
    sample = draw_sample(
        corpus,
        options.sample_characters,
        options.seed,
        options.temperature,
        wanted=lambda passage: targets.has_script(base.normalize(passage)),
    )
    if not sample.passages:
        raise InputError(f"the input holds no {' or '.join(scripts)} text; give text of the scripts to be added")
    new_payload = base.extend(sample.passages, targets, options.pieces, first_id, options.character_coverage)
    extended = encoder_of(kind, new_payload)
    unchanged = [passage for passage in sample.others if not targets.any_in(base.normalize(passage))]
    _check(encoder, extended, [*unchanged, *base.added])
    record = {
        "format_version": RECORD_VERSION,
        "made_by": "extend",
        "kind": kind,
        "model": base.kind,
        "sha256": sha256_hex(new_payload),
        "base": {"name": Path(source).name, "sha256": sha256_hex(payload), "ids": base.size, "rows": rows},
        "scripts": list(scripts),
        "first_new_id": first_id,
        "new_ids": options.pieces,
        "normalization_version": NORMALIZATION_VERSION,
        "sample": {"characters": sum(map(len, sample.passages)), "seed": options.seed},
    }
    return Extension(kind, new_payload, record, _fertility(encoder, extended, sample.passages))


def _open_base(kind: str, payload: bytes, where: str) -> Base:
    if kind == "sentencepiece":
        return SentencePieceBase(payload, where)
    if kind == "huggingface":
        return HuggingFaceBase(payload, where)
    raise InputError("--base bytes spells every script already and has no pieces; name a tokenizer that has")


def _embedding_rows(source: Path, size: int) -> int:
    """Rows of the base model's embedding table where its config.json lies beside: often padded past the tokenizer."""
    folder = _model_folder(source)
    if folder is None or not (folder / "config.json").is_file():
        return size
    config = folder / "config.json"
    found = read_json(config, "base model config")
    rows = found.get("vocab_size") if isinstance(found, dict) else None
    return max(size, rows) if isinstance(rows, int) else size


def _model_folder(source: Path) -> Path | None:
    """The folder of a base model, whether it or its tokenizer file was named; None for a file of another name."""
    if source.is_dir():
        return source
    return source.parent if source.name in ("tokenizer.json", "tokenizer.model") else None


def _find_scripts(base: Base, corpus: Corpus) -> tuple[str, ...]:
    counts: Counter[str] = Counter()
    for batch in corpus.batches("scripts"):
        for text in batch:
            counts.update(base.normalize(text.text))
    return new_scripts(coverage(counts, base.covers))


def _check(encoder: TextEncoder, extended: TextEncoder, texts: Sequence[str]) -> None:
    for first in range(0, len(texts), ENCODE_AT_ONCE):
        some = texts[first : first + ENCODE_AT_ONCE]
        pairs = zip(some, encoder.encode_batch(some), extended.encode_batch(some), strict=True)
        for text, old, new in pairs:
            if old.tolist() != new.tolist():
                raise InputError(
                    "the base tokenizer cannot be extended without changing the ids of other text "
                    f"({text[:40]!r} would become {new.tolist()[:8]} instead of {old.tolist()[:8]})"
                )


def _fertility(encoder: TextEncoder, extended: TextEncoder, passages: Sequence[str]) -> dict[str, Fertility]:
    sums: dict[str, np.ndarray] = {}
    for first in range(0, len(passages), ENCODE_AT_ONCE):
        some = passages[first : first + ENCODE_AT_ONCE]
        for text, old, new in zip(some, encoder.encode_batch(some), extended.encode_batch(some), strict=True):
            unknown = [
                0 if e.unknown_id is None else np.count_nonzero(ids == e.unknown_id)
                for e, ids in ((encoder, old), (extended, new))
            ]
            counts = np.array([len(text), len(old), len(new), *unknown], dtype=np.int64)
            script = main_script(text)
            sums[script] = sums.get(script, np.zeros(5, dtype=np.int64)) + counts
    ordered = sorted(sums.items(), key=lambda item: (-item[1][0], item[0]))
    return {script: Fertility(*counts.tolist()) for script, counts in ordered}


# ---- writing


def write_extension(extension: Extension, source: str | Path, output: Path) -> None:
    """Write the tokenizer: a `.model` with `.model.json` beside it, or a folder with `extension.json` inside.

    Raises:
        InputError: the output cannot be written to.
    """
    if extension.kind == "sentencepiece":
        write_model(output, extension.payload, extension.record)
    else:
        _write_folder(Path(source), output, extension)


def check_output(source: str | Path, output: Path) -> None:
    """Look at the output of `extend` before any work is done.

    Raises:
        InputError: a name or place that cannot be written to, or the base itself.
    """
    kind, _, _ = open_text_tokenizer(source)
    if Path(source).resolve() == output.resolve():
        raise InputError(f"--output is the base itself, {output}; name another file or folder")
    if kind == "sentencepiece":
        check_model_output(output)
        return
    if output.exists() and not (output / "extension.json").is_file():
        raise InputError(f"--output {output} exists and is not an extended tokenizer; name a new folder")
    prepare_output_directory(output.resolve().parent)


def check_model_output(output: Path) -> None:
    """Look at the name and place of a `.model` before any work is done.

    Raises:
        InputError: a name that would not be read as a sentencepiece model, or a place that cannot be written to.
    """
    if output.suffix != ".model" or output.is_dir():
        raise InputError(f"--output is {output}; needed the name of a file that ends in .model")
    prepare_output_directory(output.resolve().parent)


def write_model(output: Path, payload: bytes, record: dict[str, Any]) -> None:
    """Write a `.model` file, and beside it `.model.json`: where it comes from.

    Raises:
        InputError: a name that would not be read as a sentencepiece model, or a place that cannot be written to.
    """
    check_model_output(output)
    with atomic_write(output) as handle:
        handle.write(payload)
    write_json(f"{output}.json", record)


def _write_folder(source: Path, output: Path, extension: Extension) -> None:
    with tempfile.TemporaryDirectory(dir=output.resolve().parent, prefix=f".{output.name}.") as temporary:
        folder = Path(temporary) / "new"
        folder.mkdir()
        beside = _model_folder(source)
        found = [] if beside is None else [beside / name for name in _COPIED if (beside / name).is_file()]
        for path in found:
            shutil.copyfile(path, folder / path.name)
        with atomic_write(folder / "tokenizer.json") as handle:
            handle.write(extension.payload)
        write_json(folder / "extension.json", extension.record)
        if output.exists():
            os.replace(output, Path(temporary) / "old")
        os.replace(folder, output)
