"""`megatron-speech token-space`: fix the id space of a project."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_speech.token_space import TokenSpace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "--text-tokenizer",
        required=True,
        metavar="T",
        help="a folder with a Hugging Face tokenizer.json, a sentencepiece .model file, or the word `bytes`",
    )
    parser.add_argument("--codec", required=True, metavar="C", help="name of the frozen audio codec, such as codec2")
    parser.add_argument(
        "--base",
        type=Path,
        metavar="DIR",
        help="Hugging Face model folder whose embedding rows are kept: text ids follow its config.json",
    )
    parser.add_argument(
        "--pad-multiple", type=int, default=128, metavar="N", help="round the table up to a multiple of N ids (128)"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="TS.json", help="the file to write")


def run(args: argparse.Namespace) -> int:
    """Build the id space and save it."""
    from megatron_speech.codecs import describe_codec

    space = TokenSpace.build(args.text_tokenizer, describe_codec(args.codec), args.base, args.pad_multiple)
    space.save(args.output)
    print(f"{args.output}: {space.describe()}")
    return 0
