"""`megatron-speech schema [--json|--markdown|--fields]`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from megatron_speech.console import output
from megatron_speech.errors import InputError
from megatron_speech.recipe import schema
from megatron_speech.wording import nearest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("keys", nargs="*", metavar="KEY", help="only these keys, and those below: stages.lr")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="a JSON schema for editors, docs/recipe.schema.json")
    form.add_argument("--markdown", action="store_true", help="the page docs/recipe.md")
    form.add_argument("--fields", action="store_true", help="the keys as a JSON list: type, default, unit, meaning")


def run(args: argparse.Namespace) -> int:
    """Print what a recipe may say."""
    rows = schema.rows()
    for key in args.keys:
        if not any(_is_of(row, key) for row in rows):
            near = nearest(key, [row.key for row in rows], cutoff=0.0)
            raise InputError(f"a recipe has no key {key!r}; nearest: {near!r}")
    chosen = [row for row in rows if not args.keys or any(_is_of(row, key) for key in args.keys)]
    if args.json:
        output(json.dumps(schema.json_schema(), indent=2, ensure_ascii=False))
    elif args.markdown:
        output(schema.markdown().rstrip("\n"))
    elif args.fields:
        output(json.dumps([asdict(row) for row in chosen], indent=2, ensure_ascii=False))
    else:
        for row in chosen:
            unit = f" [{row.unit}]" if row.unit else ""
            output(f"{row.key}: {row.type}{unit}, default {row.default}\n    {row.meaning}")
    return 0


def _is_of(row: schema.KeyRow, key: str) -> bool:
    return row.key == key or row.key.startswith(key + ".")
