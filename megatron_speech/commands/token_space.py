"""`megatron-speech token-space`: fix the id space of a project."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from megatron_speech.console import output
from megatron_speech.errors import InputError
from megatron_speech.files import read_json
from megatron_speech.tokens.layouts import LAYOUTS, OWN
from megatron_speech.tokens.space import CodecDescription, TokenSpace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "--text-tokenizer",
        required=True,
        metavar="T",
        help="a folder with a Hugging Face tokenizer.json, a sentencepiece .model file, or the word `bytes`",
    )
    parser.add_argument(
        "--codec",
        required=True,
        metavar="C",
        help="name of the frozen audio codec, such as codec2; or a .json file that describes one which is not "
        "installed: name, hash, sample_rate_hz, frame_rate_hz, codebook_names, codebook_sizes",
    )
    parser.add_argument(
        "--base",
        type=Path,
        metavar="DIR",
        help="Hugging Face model folder whose embedding rows are kept: text ids follow its config.json",
    )
    parser.add_argument(
        "--pad-multiple", type=int, default=128, metavar="N", help="round the table up to a multiple of N ids (128)"
    )
    parser.add_argument(
        "--layout",
        choices=(OWN, *LAYOUTS),
        default=OWN,
        help="own (default), or the ids of another project, whose checkpoints are to be trained on or served; "
        "--text-tokenizer names its tokenizer, or the one it extended",
    )
    parser.add_argument(
        "--control",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="control tags with ids of their own, such as pause or style-whisper: [[pause]] in a text, where "
        "preprocess-data and generate are told --control-tags",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="TS.json", help="the file to write")


def run(args: argparse.Namespace) -> int:
    """Build the id space and save it."""
    from megatron_speech.codecs import describe_codec

    codec = read_codec_description(args.codec) if args.codec.endswith(".json") else describe_codec(args.codec)
    space = TokenSpace.build(args.text_tokenizer, codec, args.base, args.pad_multiple, args.layout, args.control)
    space.save(args.output)
    output(f"{args.output}: {space.describe()}")
    return 0


def read_codec_description(path: str) -> CodecDescription:
    """A codec that is known by its description alone: enough to train on its codes, not to decode them.

    Raises:
        InputError: the file is missing, or a field is missing, unknown or of the wrong type.
    """
    value = read_json(path, "codec description")
    names = [field.name for field in dataclasses.fields(CodecDescription)]
    if not isinstance(value, dict) or set(value) != set(names):
        raise InputError(f"codec description {path} holds {', '.join(value) or 'nothing'}; needed: {', '.join(names)}")
    try:
        return TypeAdapter(CodecDescription).validate_python(value)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"]))
        message = problem["msg"].removeprefix("Value error, ")
        raise InputError(f"codec description {path}: {where + ': ' if where else ''}{message}") from error
