"""The console script `megatron-speech`: one subcommand per room, each imported only when it is called."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from megatron_speech import __version__
from megatron_speech.environment import prepare_imports
from megatron_speech.errors import InputError, command
from megatron_speech.wording import suggestion

# name → (module with add_arguments(parser) and run(args), one line of help)
COMMANDS: dict[str, tuple[str, str]] = {
    "token-space": ("megatron_speech.commands.token_space", "fix the id space: text | specials | audio codes"),
    "tokenizer": ("megatron_speech.commands.tokenizer", "train, extend or measure a text tokenizer"),
    "encode-audio": ("megatron_speech.preprocess.encode_audio", "recordings to codes"),
    "preprocess-data": ("megatron_speech.preprocess.preprocess_data", "codes, pairs or text to a token dataset"),
    "merge-datasets": ("megatron_speech.preprocess.merge_datasets", "token datasets joined into one"),
    "blend": ("megatron_speech.commands.blend", "target and realised proportions of a recipe's stages"),
    "inspect": ("megatron_speech.commands.inspect", "what a dataset is; --verify reads every byte"),
    "stage-datasets": ("megatron_speech.commands.stage_datasets", "a recipe's datasets copied to this node's disk"),
    "estimate": ("megatron_speech.commands.estimate", "what each layout takes of a GPU's memory, without a GPU"),
    "train": ("megatron_speech.commands.train", "train the stages of a recipe, or continue a run"),
    "compare": ("megatron_speech.commands.compare", "two runs: losses, speed, memory, and whether one is worse"),
    "schema": ("megatron_speech.commands.schema", "every key of a recipe: type, default, unit, meaning"),
    "generate": ("megatron_speech.commands.generate", "speech from a checkpoint"),
    "transcribe": ("megatron_speech.commands.transcribe", "the text of recordings, from a checkpoint of the task asr"),
    "decode": ("megatron_speech.commands.decode", "codes, or tokens that stand for them, to audio"),
    "evaluate": (
        "megatron_speech.commands.evaluate",
        "generate and score fixed canaries: report.json, report.html",
    ),
    "convert": ("megatron_speech.commands.convert", "Hugging Face folders to checkpoints and back"),
    "benchmark": ("megatron_speech.commands.benchmark", "measured figures, with device, versions and commit"),
}


def build_parser(name: str | None) -> argparse.ArgumentParser:
    """The parser; only subcommand `name` gets its arguments, so that no other room is imported."""
    parser = argparse.ArgumentParser(
        prog="megatron-speech", description="A Megatron-style training stack for speech language models."
    )
    parser.add_argument("--version", action="version", version=f"megatron-speech {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for key, (module, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(key, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if key == name:
            importlib.import_module(module).add_arguments(subparser)
    return parser


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run `megatron-speech ARGUMENTS` (the process's own by default) and return the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = next((word for word in arguments if not word.startswith("-")), None)
    if name is not None and name not in COMMANDS:
        raise InputError(f"megatron-speech has no command {name!r}; {suggestion(name, COMMANDS)}")
    prepare_imports()  # before any room imports megatron-core
    parser = build_parser(name)
    args, rest = parser.parse_known_args(arguments)
    # argparse takes key=value overrides only where they follow the recipe at once; after an option is as clear.
    overrides = [word for word in rest if "=" in word and not word.startswith("-")]
    unknown = [word for word in rest if word not in overrides or not hasattr(args, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        args.overrides = [*args.overrides, *overrides]
    return importlib.import_module(COMMANDS[args.command][0]).run(args)


if __name__ == "__main__":
    sys.exit(main())
