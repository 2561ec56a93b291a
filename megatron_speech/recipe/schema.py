"""What a recipe may say, told by its pydantic models: as rows, as a page, as a JSON schema for editors.

Light to import: no torch.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megatron_speech.recipe.model import PRESETS
from megatron_speech.recipe.numbers import human_integer
from megatron_speech.recipe.recipe import Recipe

# What the last word of a key counts or measures. A number whose key is in neither is a plain number.
_UNITS = {
    "tokens": "tokens", "seconds": "s", "minutes": "min", "gib": "GiB", "mib": "MiB", "steps": "steps",
    "epochs": "epochs", "layers": "layers", "ranks": "ranks", "sequences": "sequences", "heads": "heads",
    "groups": "heads",
}  # fmt: skip
_UNITS_OF_KEYS = {
    "stages.seq_length": "tokens", "stages.batch_ramp.start": "tokens", "stages.batch_ramp.increment": "tokens",
    "stages.batch_ramp.over": "tokens", "stages.micro_batch_size": "sequences", "stages.epoch_limit": "epochs",
    "stages.strata.epoch_limit": "epochs", "stages.checkpoint.every": "steps", "stages.checkpoint.until": "steps",
    "stages.lr.warmup": "share or steps", "stages.lr.decay": "share or steps", "stages.early_stop.patience":
    "validations", "stages.early_stop.min_delta": "nats", "model.rope_scaling.original_max_position": "tokens",
    "checkpoint.keep_last": "checkpoints", "checkpoint.keep_every": "steps", "checkpoint.upload.keep_last":
    "checkpoints", "checkpoint.upload.max_waiting": "checkpoints", "data.prefetch": "global batches", "data.workers":
    "threads", "spikes.window": "steps", "spikes.skip_limit": "steps", "spikes.rewind_limit": "rollbacks",
    "fp8.amax_history": "steps", "fp8.bf16_ends": "layers", "profile.warmup": "steps", "parallel.tensor": "ranks",
    "parallel.pipeline": "ranks", "parallel.context": "ranks", "parallel.virtual_pipeline": "chunks",
    "stages.shuffle_window.shards": "shards", "parallel.pipeline_layout": "layers", "optimizer.freeze_rows": "ids",
}  # fmt: skip


@dataclass(frozen=True)
class KeyRow:
    """One key of a recipe.

    Attributes:
        key: dotted; `stages` stands for each stage of the list.
        type: as people write it.
        default: as YAML, or `required`.
        unit: of a number; empty where there is none.
        meaning: what it does; of a section, what it is about.
        section: whether it has keys of its own.
    """

    key: str
    type: str
    default: str
    unit: str
    meaning: str
    section: bool


def rows() -> list[KeyRow]:
    """Every key of a recipe, in the order of the schema, sections before their keys."""
    return list(_rows(Recipe, ""))


def _rows(model: type[BaseModel], prefix: str) -> Iterator[KeyRow]:
    for name, field in model.model_fields.items():
        key = prefix + name
        inner = next(_models(field.annotation), None)
        if inner is not None:
            yield KeyRow(key, _type(field.annotation), _default(field), "", _meaning(field, inner), section=True)
            yield from _rows(inner, key + ".")
        else:
            kind = _type(field.annotation, field)
            numeric = bool({"integer", "number", "token count"} & set(re.findall(r"token count|[a-z]+", kind)))
            unit = (_UNITS_OF_KEYS.get(key) or _UNITS.get(name.split("_")[-1], "")) if numeric else ""
            yield KeyRow(key, kind, _default(field, model), unit, _meaning(field, None), section=False)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (list, dict, tuple, Union, types.UnionType, Annotated):
        for argument in get_args(annotation):
            yield from _models(argument)


def _meaning(field: FieldInfo, section: type[BaseModel] | None) -> str:
    if field.description:
        return field.description
    # "Recipe section `ema`: a moving average …": what comes after the name.
    first = (section.__doc__ or "").strip().split("\n\n")[0] if section is not None else ""
    return re.sub(r"\s+", " ", re.sub(r"^(Recipe|Stage) section `\w+`: ", "", first)).rstrip(".")


_NAMES: dict[Any, str] = {int: "integer", float: "number", str: "text", bool: "true or false", Any: "any value"}


def _type(annotation: Any, field: FieldInfo | None = None) -> str:
    """The type as people write it, with the bounds of `field`."""
    bounds = _bounds(field) if field is not None else ""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0]) + bounds
    if origin in (Union, types.UnionType):
        null = type(None) in arguments
        parts = [_type(one) for one in arguments if one is not type(None)]
        return " or ".join(parts) + bounds + (" or null" if null else "")
    if origin is Literal:
        return " or ".join(f"`{one}`" for one in arguments)
    if origin in (list, tuple):
        return "list of " + _type(arguments[0])
    if origin is dict:
        return f"mapping, name: {_type(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return _NAMES[annotation] + bounds


def _bounds(field: FieldInfo) -> str:
    words = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    found = [
        f"{words[name]} {_plain(getattr(one, name))}"
        for one in _metadata(field)
        for name in words
        if getattr(one, name, None) is not None
    ]
    return f" {', '.join(found)}" if found else ""


def _plain(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _metadata(field: FieldInfo) -> Iterator[Any]:
    for one in field.metadata:
        yield from one.metadata if isinstance(one, FieldInfo) else [one]


def _default(field: FieldInfo, model: type[BaseModel] | None = None) -> str:
    if model is not None and model.__name__ == "ModelConfig" and field.is_required():
        return "of the preset"
    if field.default_factory is not None:
        empty = field.default_factory()  # type: ignore[call-arg]
        return "its defaults" if isinstance(empty, BaseModel) else ("{}" if isinstance(empty, dict) else "[]")
    if field.default is PydanticUndefined:
        return "required"
    if field.default is None:
        return "null"
    if isinstance(field.default, bool):
        return str(field.default).lower()
    if isinstance(field.default, tuple):
        return str(list(field.default))
    return str(field.default)


# ------------------------------------------------------------------------------------------ as a page

_HEADER = """# The recipe, key by key

Written by `megatron-speech schema --markdown`; a test compares it with the code. [training.md](training.md) says how
the parts work together. `key=value` on the command line takes the same names; a stage is named by its name
(`stages.pt.tokens=2M`). Counts of tokens may be written 500000, 5e5, 500k or 0.5M. A number has to be finite, and an
unknown key is refused. `base: other.yaml`, or a list, is read first and merged under the file; null drops an entry of a
mapping whose names the recipe chooses.

[recipe.schema.json](recipe.schema.json) is the same for editors: with
`# yaml-language-server: $schema=…/recipe.schema.json` as the first line of a recipe they complete and check keys.
"""


def markdown() -> str:
    """docs/recipe.md: a table per section."""
    known = rows()
    parts = [_HEADER, _table("The top level", "", [row for row in known if "." not in row.key])]
    for section in known:
        if section.section:
            below = [row for row in known if row.key.rpartition(".")[0] == section.key]
            parts.append(_table(f"`{section.key}`", f"{_sentence(section.meaning)}\n", below))
    presets = ", ".join(f"`{name}`" for name in PRESETS)
    parts.append(f"## Presets of `model`\n\n{presets}.\n")
    return "\n".join(parts)


def _table(title: str, text: str, keys: list[KeyRow]) -> str:
    lines = [
        f"## {title}",
        "",
        *([text] if text else []),
        "| key | type | default | unit | meaning |",
        "|---|---|---|---|---|",
    ]
    for row in keys:
        meaning = row.meaning.replace("<", "\\<")  # else a page takes `<name>` for a tag
        cells = (f"`{row.key.rpartition('.')[2]}`", row.type, row.default, row.unit, meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


# ----------------------------------------------------------------------------------- as a JSON schema

_COUNT = {
    "anyOf": [
        {"type": "number", "exclusiveMinimum": 0},
        {"type": "string", "pattern": "^[0-9][0-9_]*(\\.[0-9]+)?\\s*[kKMGBT]$"},
    ]
}
_INTERPOLATION = {"type": "string", "pattern": "\\$\\{.*\\}"}
_NAMED = {"type": "object", "additionalProperties": {"type": ["string", "null"]}}  # null drops one of the base
_MASSES = {"type": "object", "additionalProperties": {"type": ["number", "null"]}}
_SHORTHANDS: dict[tuple[str, str], list[dict[str, Any]]] = {
    ("StageConfig", "checkpoint"): [_COUNT],
    ("StageConfig", "task_mass"): [_MASSES],
    ("StageConfig", "source_caps"): [_MASSES],
    ("CheckpointConfig", "upload"): [{"type": "string"}],
    ("DataConfig", "datasets"): [_NAMED],
    ("InitConfig", "checkpoint"): [{"type": "null"}],
}
_LIST_ITEMS = ("StageConfig", "StratumConfig", "IntervalConfig", "LearningRateConfig")


def json_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a recipe file as people write it, for editors.

    A file may be a layer over its `base`, so that nothing is required but within the items of lists, which are not
    merged. Short forms (0.5M; one number as a checkpoint's cadence; a URL as `upload`) and interpolations are allowed.
    """
    schema = Recipe.model_json_schema(mode="validation")
    definitions: dict[str, Any] = schema["$defs"]
    models: dict[str, type[BaseModel]] = {
        Recipe.__name__: Recipe,
        **{model.__name__: model for model in _all_models(Recipe)},
    }
    for name, part in (*definitions.items(), (Recipe.__name__, schema)):
        if name not in _LIST_ITEMS:
            part.pop("required", None)
        for key, field in models[name].model_fields.items():
            shorthand = [_COUNT] if human_integer in _functions(field) else []
            shorthand += _SHORTHANDS.get((name, key), [])
            part["properties"][key] = _as_written(part["properties"][key], shorthand)
    path = {"type": "string"}
    schema["properties"]["base"] = {
        "anyOf": [path, {"type": "array", "items": path}],
        "description": "recipes that are read first, and merged under this one",
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _all_models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for field in model.model_fields.values():
        for inner in _models(field.annotation):
            yield inner
            yield from _all_models(inner)


def _functions(field: FieldInfo) -> list[Any]:
    """The validators in a field's type."""

    def inside(annotation: Any) -> Iterator[Any]:
        for one in getattr(annotation, "__metadata__", ()):
            yield getattr(one, "func", None)
        for argument in get_args(annotation):
            yield from inside(argument)

    return [getattr(one, "func", None) for one in field.metadata] + list(inside(field.annotation))


def _as_written(value: dict[str, Any], shorthand: list[dict[str, Any]]) -> dict[str, Any]:
    """A key's schema with what else may stand in its place."""
    about = {name: part for name, part in value.items() if name in ("description", "default")}
    rest = {name: part for name, part in value.items() if name not in ("description", "default", "title")}
    ways = rest.pop("anyOf") if set(rest) == {"anyOf"} else [rest]
    return {"anyOf": [*ways, *shorthand, _INTERPOLATION], **about}
