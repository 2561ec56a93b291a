"""`megatron-speech convert import-hf | export-hf`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_speech.console import output
from megatron_speech.convert.safetensors_folder import parse_size
from megatron_speech.files import prepare_output_directory

# Not imported from new_rows: --help needs no torch.
_NEW_ROWS = ("covariance", "normal", "mean")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The two directions and their flags."""
    ways = parser.add_subparsers(dest="way", required=True, metavar="WAY")
    back = ways.add_parser("import-hf", help="a Hugging Face folder → a checkpoint that a recipe's `init` starts from")
    back.add_argument(
        "--input", required=True, type=Path, metavar="HF", help="folder with config.json and safetensors files"
    )
    back.add_argument(
        "--token-space",
        required=True,
        type=Path,
        metavar="TS.json",
        help="the ids, made with `megatron-speech token-space --text-tokenizer HF --base HF`",
    )
    back.add_argument("--output", required=True, type=Path, metavar="CKPT", help="the checkpoint's directory")
    back.add_argument(
        "--new-rows",
        choices=_NEW_ROWS,
        default="covariance",
        help="rows of new ids, from the rows of the backbone's tokens: normal with their mean and covariance "
        "(default), normal with their mean and each dimension's variance, or their mean",
    )
    back.add_argument("--seed", type=int, default=0, help="of the new rows (0)")
    back.add_argument(
        "--precision", choices=("fp32", "bf16"), help="of the checkpoint; default: as the folder's weights are"
    )
    back.add_argument(
        "--unwrap",
        action="store_true",
        help="names of tensors have parts of wrappers (_orig_mod of torch.compile, module of DDP): leave them out",
    )
    back.add_argument(
        "--no-probe",
        action="store_true",
        help="do not compare the logits of a few tokens with those of transformers (done where it is installed and 4 "
        "bytes a parameter of memory are free)",
    )
    out = ways.add_parser("export-hf", help="a checkpoint → a folder that `transformers` loads")
    out.add_argument(
        "--checkpoint", required=True, type=Path, metavar="CKPT", help="a checkpoint, or a run directory (its newest)"
    )
    out.add_argument("--output", required=True, type=Path, metavar="HF", help="the folder to write")
    out.add_argument(
        "--max-shard-size", default="4GB", metavar="SIZE", help="largest safetensors file, in KB, MB or GB (4GB)"
    )
    out.add_argument(
        "--max-position-embeddings",
        type=int,
        metavar="TOKENS",
        help="longest sequence that config.json names; default: the backbone's own, or the run's longest if that is "
        "longer or there was no backbone",
    )
    out.add_argument("--ema", action="store_true", help="the moving average of the weights, where the run kept one")


def run(args: argparse.Namespace) -> int:
    """Convert one way; returns the exit status."""
    from megatron_speech.parallel import groups

    prepare_output_directory(args.output.absolute().parent)
    try:
        return _convert(args)
    finally:
        groups.destroy()


def _convert(args: argparse.Namespace) -> int:
    if args.way == "import-hf":
        from megatron_speech.convert import import_hf

        done = import_hf.import_hf(
            args.input,
            args.token_space,
            args.output,
            new_rows=args.new_rows,
            seed=args.seed,
            precision=args.precision,
            unwrap=args.unwrap,
            compare_logits=not args.no_probe,
        )
        output(import_hf.describe(done, args.output))
        return 0
    from megatron_speech.convert import export_hf

    size = parse_size(args.max_shard_size)
    written = export_hf.export_hf(
        args.checkpoint,
        args.output,
        max_shard_bytes=size,
        ema=args.ema,
        max_position=args.max_position_embeddings,
    )
    output(export_hf.describe(written, args.output))
    return 0
