"""What a recipe may say is told in full: every key has a meaning, and page and JSON schema are those of the code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_speech import cli
from megatron_speech.recipe import schema

KEYS = {row.key: row for row in schema.rows()}


def test_every_key_has_a_type_a_default_and_a_meaning() -> None:
    assert len(KEYS) > 150
    assert [row.key for row in KEYS.values() if not (row.type and row.default and row.meaning)] == []
    assert not [row.key for row in KEYS.values() if row.meaning.startswith(("Recipe section", "Stage section"))]


@pytest.mark.parametrize(
    ("key", "kind", "default", "unit"),
    [
        ("stages.tokens", "integer > 0", "required", "tokens"),
        ("stages.lr.warmup", "number ≥ 0", "0.0", "share or steps"),
        ("stages.lr.peak", "number > 0, ≤ 10", "required", ""),
        ("stages.loss.prompt", "number ≥ 0, ≤ 1", "1.0", ""),
        ("watchdog.floor_seconds", "number > 0", "300.0", "s"),
        ("data.cache_gib", "number > 0 or null", "null", "GiB"),
        ("checkpoint.upload.wait_minutes", "number ≥ 0", "30.0", "min"),
        ("parallel.tensor", "integer ≥ 1", "1", "ranks"),
        ("stages.checkpoint.every", "integer > 0", "required", "steps"),
        ("precision", "`fp32` or `bf16` or `fp8`", "fp32", ""),
        ("deterministic", "true or false", "false", ""),
        ("model.num_layers", "integer > 0", "of the preset", "layers"),
        ("profile.ranks", "list of integer", "[0]", "ranks"),
    ],
)
def test_a_key_is_told_as_people_write_it(key: str, kind: str, default: str, unit: str) -> None:
    row = KEYS[key]
    assert (row.type, row.default, row.unit) == (kind, default, unit)


def test_the_page_and_the_json_schema_are_those_of_the_code(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option, name in (("--markdown", "recipe.md"), ("--json", "recipe.schema.json")):
        assert cli.main(["schema", option]) == 0
        found = (repository / "docs" / name).read_text(encoding="utf-8")
        assert capsys.readouterr().out == found, f"megatron-speech schema {option} > docs/{name}"


def test_some_keys_are_printed_alone_and_an_unknown_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schema", "--fields", "ema"]) == 0
    assert [row["key"] for row in json.loads(capsys.readouterr().out)] == ["ema", "ema.decay", "ema.use_for_validation"]
    assert cli.main(["schema", "stages.lr.peek"]) == 2
    assert "nearest: 'stages.lr.peak'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def validator() -> Any:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(schema.json_schema())
    return jsonschema.Draft202012Validator(schema.json_schema())


def test_shipped_recipes_and_those_of_the_page_are_valid_by_the_json_schema(validator: Any, repository: Path) -> None:
    files = [*(repository / "examples" / "recipes").glob("*.yaml"), *(repository / "examples").glob("*/recipe.yaml")]
    assert len(files) >= 5
    for path in files:
        errors = [error.message for error in validator.iter_errors(yaml.safe_load(path.read_text(encoding="utf-8")))]
        assert errors == [], path
    for path in (repository / "examples" / "recipes").glob("*.yaml"):
        named = path.read_text(encoding="utf-8").splitlines()[0].partition("$schema=")[2]
        assert (path.parent / named).resolve() == repository / "docs" / "recipe.schema.json"


STAGE = {"name": "pt", "tokens": "0.5M", "seq_length": 64, "global_batch_tokens": 5.12e2, "lr": {"peak": 1e-3}}


@pytest.mark.parametrize(
    "layer",
    [
        {"base": "other.yaml", "data": {"datasets": {"text": None}}},
        {"base": ["a.yaml", "b.yaml"], "checkpoint": {"upload": "s3://bucket/run"}},
        {"stages": [{**STAGE, "checkpoint": 1000}]},
        {"stages": [{**STAGE, "checkpoint": [{"every": "2 k", "until": 20000}, {"every": 5000}]}]},
        {"init": {"checkpoint": None}, "run_dir": "${oc.env:RUN}"},
    ],
    ids=str,
)
def test_short_forms_and_layers_are_valid(validator: Any, layer: dict[str, Any]) -> None:
    assert [error.message for error in validator.iter_errors(layer)] == []


@pytest.mark.parametrize(
    "layer",
    [
        {"sead": 1},
        {"precision": "fp17"},
        {"stages": [{**STAGE, "lr": {"peak": -1}}]},
        {"stages": [{key: value for key, value in STAGE.items() if key != "lr"}]},
        {"stages": [{**STAGE, "tokens": "many"}]},
        {"parallel": {"tensor": "0.5M"}},
        {"stages": [{**STAGE, "loss": {"prompt": 2}}]},
    ],
    ids=str,
)
def test_what_a_recipe_must_not_say_is_not_valid(validator: Any, layer: dict[str, Any]) -> None:
    assert list(validator.iter_errors(layer))
