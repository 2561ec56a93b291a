"""From YAML files and overrides to a checked recipe.

    base YAML(s) ← this YAML ← key=value overrides  →  Recipe (pydantic)  →  RUN/recipe.yaml

A key that the schema does not know is refused with its full dotted path and the nearest valid name. Relative
paths in a file are relative to that file; relative paths in `key=value` overrides are relative to the
directory the command runs in. The resolved recipe holds absolute paths only and reads back unchanged.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from megatron_speech.errors import InputError
from megatron_speech.recipe.init import fill_model
from megatron_speech.recipe.recipe import Recipe
from megatron_speech.remote import is_url
from megatron_speech.wording import suggestion


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe at `path`, apply `key=value` overrides, check every field.

    A top-level `base: other.yaml` (or a list of them) is read first and merged under this file. In overrides
    a list item is addressed by number (`stages.0.tokens=1000`), a stage also by name (`stages.pt.tokens=1000`).
    Null drops an entry whose name the recipe chooses (a dataset, a task's mass, a source's cap), and
    `init.checkpoint: null` the section `init`.

    Raises:
        InputError: an unreadable file, an unknown key (with the nearest valid one), a value out of range.
    """
    path = Path(path)
    config = _read_layers(path, seen=())
    for override in overrides:
        _apply_override(config, override)
    try:
        values = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise InputError(f"recipe {path}: {_first_line(error)}") from error
    assert isinstance(values, dict)
    _drop_entries(values)
    fill_model(values, str(path))
    if values.get("run_dir") is None and isinstance(values.get("name"), str):
        values["run_dir"] = str(path.resolve().parent / "runs" / values["name"])
    return parse_recipe(values, source=str(path))


def parse_recipe(values: dict[Any, Any], source: str) -> Recipe:
    """Check plain `values` (from YAML) against the schema; `source` names them in errors.

    Raises:
        InputError: one sentence for the first problem found, and how many more there are.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        # An unknown key explains a missing one beside it (a misspelt name is both), so it comes first.
        problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
        more = f" ({len(problems) - 1} more problem{'s' * (len(problems) > 2)} after this)" if len(problems) > 1 else ""
        raise InputError(f"recipe {source}: {_explain(dict(problems[0]))}{more}") from error


def _explain(problem: dict[str, Any]) -> str:
    """One pydantic problem as a sentence."""
    location: tuple[str | int, ...] = problem["loc"]
    dotted = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        return f"unknown key {dotted!r}; {suggestion(str(location[-1]), _known_keys(location[:-1]))}"
    if problem["type"] == "missing":
        return f"key {dotted!r} is missing and has no default"
    if problem["type"] == "value_error":  # raised by a validator of ours: already a sentence
        sentence = str(problem["ctx"]["error"])
        return sentence if not dotted or sentence.startswith((dotted, "stage ")) else f"{dotted}: {sentence}"
    return f"{dotted} = {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _known_keys(location: Sequence[str | int]) -> set[str]:
    """Names of the fields of the section at `location` ("stages", 0, "lr")."""
    models: list[type[BaseModel]] = [Recipe]
    for part in location:
        if isinstance(part, int):
            continue  # the item of a list: its model was entered with the list
        inner = [field.annotation for model in models if (field := model.model_fields.get(part)) is not None]
        models = [found for annotation in inner for found in _models_in(annotation)] or models
    return {name for model in models for name in model.model_fields}


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The pydantic models inside a type such as `list[StageConfig] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (list, dict, tuple, Union, UnionType, Annotated):
        for argument in get_args(annotation):
            yield from _models_in(argument)


def _read_layers(path: Path, seen: tuple[Path, ...]) -> DictConfig:
    """Read `path` over its bases; paths in each file become absolute against that file's folder."""
    path = path.resolve()
    if path in seen:
        raise InputError(f"recipe {path} is its own base (through {' → '.join(map(str, seen))}); break the circle")
    try:
        config = OmegaConf.load(path)
    except FileNotFoundError as error:
        raise InputError(f"recipe {path} does not exist; check the path") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {path} cannot be read: {error}") from error
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"recipe {path} is not valid YAML: {_first_line(error)}") from error
    layer = OmegaConf.to_container(config, resolve=False)
    if not isinstance(layer, dict) or not layer:
        raise InputError(f"recipe {path} holds no mapping of sections; it should start like `name: my_run`")
    bases = layer.pop("base", None)
    _absolutise(layer, path.parent)
    config = OmegaConf.create(layer)
    if bases is None:
        return config
    layers = [_read_layers(path.parent / str(base), (*seen, path)) for base in _as_list(bases)]
    merged = OmegaConf.merge(*layers, config)
    assert isinstance(merged, DictConfig)
    return merged


def _drop_entries(values: dict[Any, Any]) -> None:
    """Drop what null takes out of the mappings whose keys a recipe chooses, in place."""
    stages = values.get("stages")
    named: list[tuple[Any, str]] = [(values.get("data"), "datasets")]
    for stage in stages if isinstance(stages, list) else []:
        named += [(stage, "task_mass"), (stage, "source_caps")]
    for section, key in named:
        entries = section.get(key) if isinstance(section, dict) else None
        if isinstance(entries, dict):
            section[key] = {name: value for name, value in entries.items() if value is not None}
    init = values.get("init")
    if isinstance(init, dict) and "checkpoint" in init and init["checkpoint"] is None:
        values["init"] = None


def _absolutise(layer: dict[Any, Any], folder: Path) -> None:
    """Make the relative paths of a recipe layer absolute against `folder`, in place."""

    def absolute(value: Any, key: str) -> Any:
        if isinstance(value, str) and not value.strip():
            raise InputError(f"{key} is empty; name a path, or leave it out (an unset shell variable, perhaps?)")
        # An interpolation such as ${oc.env:DATA}/x is filled in later; it is expected to be absolute. A URL is.
        if not isinstance(value, str) or value.startswith("${") or is_url(value):
            return value
        return os.path.normpath(folder / Path(value).expanduser())

    data = layer.get("data")
    init = layer.get("init")
    for section, prefix, key in (
        (layer, "", "token_space"),
        (layer, "", "run_dir"),
        (data, "data.", "cache_dir"),
        (init, "init.", "checkpoint"),
    ):
        if isinstance(section, dict) and key in section:
            section[key] = absolute(section[key], prefix + key)
    datasets = data.get("datasets") if isinstance(data, dict) else None
    if isinstance(datasets, list):
        datasets[:] = [absolute(prefix, "data.datasets") for prefix in datasets]
    elif isinstance(datasets, dict):
        datasets.update({name: absolute(prefix, f"data.datasets.{name}") for name, prefix in datasets.items()})


def _apply_override(config: DictConfig, override: str) -> None:
    """Apply one `dotted.key=value`; the value is read as YAML."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise InputError(
            f"{override!r} is not of the form key=value, such as stages.0.tokens=1000; give it a value, or take it out"
        )
    if not text.strip():
        raise InputError(
            f"override {override!r} has no value (an unset shell variable, perhaps?); give one, or write {key}=null to "
            "take back what the recipe says"
        )
    stages = config.get("stages")
    if parts[0] == "stages" and len(parts) > 1 and isinstance(stages, ListConfig) and not parts[1].isdigit():
        names = [stage.get("name") for stage in stages]
        if parts[1] not in names:
            raise InputError(
                f"override {override!r}: no stage is named {parts[1]!r}; the stages are {', '.join(map(str, names))}"
            )
        parts[1] = str(names.index(parts[1]))
    try:
        value = OmegaConf.to_container(OmegaConf.create(f"value: {text}"))["value"]  # type: ignore[index, call-overload]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"override {override!r}: {text!r} is not a YAML value ({_first_line(error)})") from error
    layer: dict[str, Any] = {parts[-1]: value}
    for part in reversed(parts[:-1]):
        layer = {part: layer}
    _absolutise(layer, Path.cwd())
    node: Any = config
    for position, part in enumerate(parts):
        layer = layer[part]
        index: str | int = _list_index(part, node, override) if isinstance(node, ListConfig) else part
        if position == len(parts) - 1:
            node[index] = layer
            return
        if isinstance(node, DictConfig) and node.get(part) is None:
            node[part] = {}
        node = node[index]
        if not isinstance(node, DictConfig | ListConfig):
            raise InputError(f"override {override!r}: {'.'.join(parts[: position + 1])} holds a value, not a section")


def _list_index(part: str, node: ListConfig, override: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise InputError(
            f"override {override!r}: {part!r} is not an item of a list of {len(node)} (0 to {len(node) - 1})"
        )
    return int(part)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
