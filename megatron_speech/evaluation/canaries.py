"""The canary file: a fixed set of texts, decoded the same way at every checkpoint.

    name: digits
    decoding: {temperature: 0.6, max_seconds: 3}
    scorer: {kind: pocketsphinx, grammar: [one, two, three]}     # without grammar: free speech
    seeds: [0, 1]                                                 # for items that name none
    items:
      - {id: en-1, text: one, language: en, category: numbers,
         reference_audio: voice.wav, reference_text: two,          # the speaker; both or neither
         original_audio: one.wav,                                  # a real recording of it, for the ceilings
         expected: one, seeds: [7]}

Paths are relative to the file, or absolute.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError, model_validator

from megatron_speech.errors import InputError
from megatron_speech.generation.prompts import Utterance
from megatron_speech.generation.sampling import SamplingConfig
from megatron_speech.tokens.control_tags import without_tags
from megatron_speech.wording import suggestion


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Decoding(_Section):
    """Fixed decoding parameters, as in :class:`megatron_speech.generation.sampling.SamplingConfig`."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    max_seconds: float = 30.0


class Scorer(_Section):
    """The transcriber. With a grammar, pocketsphinx picks one of its sentences; without, it decodes free English."""

    kind: Literal["pocketsphinx"] = "pocketsphinx"
    grammar: list[str] | None = Field(None, min_length=1)


class Canary(_Section):
    """One text to generate speech for.

    Attributes:
        id: letters, digits, `.`, `_`, `-`; names the wavs.
        text: what the model is given.
        language: BCP-47; error rates are computed where the scorer can transcribe it.
        category: any name; figures are given by language and by category.
        expected: the transcript that the scorer should give, where that is not `text` (numbers, abbreviations).
        reference_audio, reference_text: of the speaker to clone.
        original_audio: a real recording of the same words, from which the scorer's ceilings are taken.
        seeds: one utterance is generated for each.
    """

    id: str
    text: str
    language: str = "und"
    category: str = "general"
    expected: str | None = None
    reference_audio: Path | None = None
    reference_text: str | None = None
    original_audio: Path | None = None
    seeds: list[StrictInt] | None = Field(None, min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _one_seed(cls, values: Any) -> Any:
        if isinstance(values, dict) and "seed" in values and "seeds" not in values:
            values = {**values, "seeds": [values["seed"]]}
            del values["seed"]
        return values

    @property
    def expected_text(self) -> str:
        """The transcript that the scorer should give."""
        return self.text if self.expected is None else self.expected


class CanarySet(_Section):
    """A canary file; with `control_tags`, `[[pause]]` in its texts is a token that nobody hears."""

    version: Literal[1] = 1
    name: str = "canaries"
    decoding: Decoding = Decoding()
    scorer: Scorer | None = None
    seeds: list[StrictInt] = Field([0], min_length=1)
    control_tags: bool = False
    items: list[Canary] = Field(min_length=1)

    @model_validator(mode="after")
    def _expect_what_is_said(self) -> CanarySet:
        if not self.control_tags:
            return self
        said = [
            item if item.expected is not None else item.model_copy(update={"expected": _said(item.text)})
            for item in self.items
        ]
        object.__setattr__(self, "items", said)  # as the validator of a frozen model has to
        return self

    @property
    def sampling(self) -> SamplingConfig:
        """The decoding parameters as generation takes them. Raises InputError for impossible ones."""
        return SamplingConfig(**self.decoding.model_dump())

    def utterances(self, where: str) -> Iterator[tuple[Canary, Utterance]]:
        """Every canary with each of its seeds; `where` names the file in errors."""
        for number, item in enumerate(self.items):
            for seed in item.seeds or self.seeds:
                yield (
                    item,
                    Utterance(
                        id=f"{item.id}_{seed}",
                        text=item.text,
                        seed=seed,
                        language=item.language,
                        reference_audio=item.reference_audio,
                        reference_text=item.reference_text,
                        where=f"{where}, items.{number} ({item.id})",
                        control_tags=self.control_tags,
                    ),
                )


def _said(text: str) -> str:
    return " ".join(without_tags(text).split())


def load_canaries(path: Path) -> CanarySet:
    """Read and check a canary file; paths in it become absolute.

    Raises:
        InputError: the file or a field cannot be used; an unknown field is answered with the nearest known one.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"canary file {path} does not exist; check the path") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"canary file {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise InputError(f"canary file {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise InputError(
            f"canary file {path} holds no mapping; it should start like `name: my_canaries` and list items"
        )
    try:
        canaries = CanarySet.model_validate(values)
    except ValidationError as error:
        problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
        raise InputError(f"canary file {path}: {_explain(problems[0]['loc'], dict(problems[0]))}") from error
    try:
        _ = canaries.sampling
    except InputError as error:
        raise InputError(f"canary file {path}, decoding: {error}") from error
    folder = path.resolve().parent
    items = []
    names: set[str] = set()
    for item in canaries.items:
        if item.id in names:
            raise InputError(f"canary file {path}: two items have the id {item.id!r}; ids are unique")
        names.add(item.id)
        if len(set(item.seeds or canaries.seeds)) < len(item.seeds or canaries.seeds):
            raise InputError(
                f"canary file {path}: item {item.id} names a seed twice; the same utterance would be generated twice"
            )
        paths = {
            name: (folder / value).resolve()
            for name in ("reference_audio", "original_audio")
            if (value := getattr(item, name)) is not None
        }
        items.append(item.model_copy(update=paths))
    return canaries.model_copy(update={"items": items})


def _explain(location: Sequence[str | int], problem: dict[str, Any]) -> str:
    """One pydantic problem as a sentence."""
    dotted = ".".join(map(str, location))
    if problem["type"] == "extra_forbidden":
        known = _fields_at(location[:-1])
        return f"unknown field {dotted!r}; {suggestion(str(location[-1]), known)}"
    if problem["type"] == "missing":
        return f"field {dotted!r} is missing and has no default"
    hint = "; put it in quotes" if problem["type"] == "string_type" else ""
    return f"{dotted} is {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}{hint}"


def _fields_at(location: Sequence[str | int]) -> set[str]:
    """Names of the fields of the section at `location`, such as ("items", 0)."""
    model: type[BaseModel] = CanarySet
    for part in location:
        if isinstance(part, str) and part in model.model_fields:
            annotation = model.model_fields[part].annotation
            candidates = [annotation, *get_args(annotation)] if get_origin(annotation) else [annotation]
            model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), model)
    return set(model.model_fields)
