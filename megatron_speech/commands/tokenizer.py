"""`megatron-speech tokenizer`: train a text tokenizer, extend one for new scripts, measure one."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from megatron_speech.console import output, tables
from megatron_speech.errors import InputError

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the three subcommands."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="{train,extend,report}")
    _add_train(actions.add_parser("train", help="a sentencepiece model of any text stream"))
    _add_extend(actions.add_parser("extend", help="new pieces after a tokenizer's own ids, for new scripts"))
    _add_report(actions.add_parser("report", help="tokens per character and unknown tokens, by language and script"))


def _add_input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        nargs="+",
        action="extend",
        required=True,
        metavar="F",
        help="text: .jsonl (.gz, .zst) or .parquet, paths or URLs",
    )
    parser.add_argument(
        "--json-keys", nargs="+", default=["text"], metavar="KEY", help="fields with text (text); transcript for speech"
    )
    parser.add_argument(
        "--language-field", default="language", metavar="KEY", help="field with the language (language)"
    )


def _add_sample(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sample-characters",
        type=int,
        default=100_000_000,
        metavar="N",
        help="learn from a sample of at most about N characters, which bounds the memory (100,000,000)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="languages weigh characters^T in the sample; 1 leaves them as they are, 0 makes them equal (1)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sample (0)")
    parser.add_argument(
        "--character-coverage",
        type=float,
        default=0.9995,
        metavar="C",
        help="share of the sample's characters whose letters get a piece each (0.9995)",
    )


def _add_train(parser: argparse.ArgumentParser) -> None:
    _add_input(parser)
    parser.add_argument("--model", choices=("unigram", "bpe"), default="unigram", help="kind of model (unigram)")
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N", help="pieces, byte pieces included")
    parser.add_argument("--up-to", action="store_true", help="fewer pieces where the text yields no more")
    parser.add_argument(
        "--byte-fallback",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="spell letters without a piece in UTF-8 bytes (256 pieces) instead of losing them (on)",
    )
    _add_sample(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="T.model", help="the model to write")


def _add_extend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base", required=True, metavar="T", help="a sentencepiece .model, or a Hugging Face folder (byte-level BPE)"
    )
    _add_input(parser)
    parser.add_argument("--pieces", type=int, required=True, metavar="N", help="number of new pieces")
    parser.add_argument(
        "--scripts",
        default="auto",
        metavar="S,S",
        help="Unicode scripts that get new pieces, such as Ethiopic,Tamil; auto: those that the base does not cover",
    )
    parser.add_argument(
        "--first-id",
        type=int,
        metavar="I",
        help="the first new id (default: after the base's last id, and after vocab_size of its config.json)",
    )
    _add_sample(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="T2", help="the .model or folder to write")


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer", required=True, metavar="T", help="a Hugging Face folder, a sentencepiece .model, or `bytes`"
    )
    _add_input(parser)
    parser.add_argument(
        "--max-unknown",
        type=float,
        metavar="SHARE",
        help="refuse where more than this share of a language's tokens is unknown",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    """Run the subcommand.

    Raises:
        InputError: an input or tokenizer cannot be used.
    """
    return {"train": _train, "extend": _extend, "report": _report}[args.action](args)


def _corpus(args: argparse.Namespace) -> Any:
    from megatron_speech.text_tokenizers.corpus import Corpus

    return Corpus(args.input, tuple(args.json_keys), args.language_field)


def _check_sample(args: argparse.Namespace) -> None:
    if args.sample_characters < 1:
        raise InputError(f"--sample-characters is {args.sample_characters}; needed 1 or more")
    if not 0 <= args.temperature <= 1:
        raise InputError(f"--temperature is {args.temperature}; needed from 0 (languages equal) to 1 (as they are)")
    if not 0 < args.character_coverage <= 1:
        raise InputError(f"--character-coverage is {args.character_coverage}; needed above 0 and at most 1")


def _train(args: argparse.Namespace) -> int:
    import sentencepiece

    from megatron_speech.files import sha256_hex
    from megatron_speech.text_tokenizers.corpus import draw_sample
    from megatron_speech.text_tokenizers.extend import RECORD_VERSION, check_model_output, write_model
    from megatron_speech.text_tokenizers.train import TrainOptions, train
    from megatron_speech.tokens.normalization import NORMALIZATION_VERSION

    _check_sample(args)
    check_model_output(args.output)
    corpus = _corpus(args)
    sample = draw_sample(corpus, args.sample_characters, args.seed, args.temperature)
    options = TrainOptions(args.model, args.vocab_size, args.byte_fallback, args.character_coverage, args.up_to)
    payload = train(sample.passages, options)
    pieces = int(sentencepiece.SentencePieceProcessor(model_proto=payload).vocab_size())
    record = {
        "format_version": RECORD_VERSION,
        "made_by": "train",
        "kind": "sentencepiece",
        "model": args.model,
        "sha256": sha256_hex(payload),
        "ids": pieces,
        "byte_fallback": args.byte_fallback,
        "character_coverage": args.character_coverage,
        "normalization_version": NORMALIZATION_VERSION,
        "sample": {
            "seed": args.seed,
            "temperature": args.temperature,
            "characters": sample.characters,
            "characters_read": dict(sorted(sample.characters_read.items())),
        },
    }
    write_model(args.output, payload, record)
    _note(corpus)
    read, used = sum(sample.characters_read.values()), sum(sample.characters.values())
    output(f"{args.output}: {args.model}, {pieces:,} pieces, of {used:,} characters ({read:,} read)")
    return 0


def _extend(args: argparse.Namespace) -> int:
    from megatron_speech.text_tokenizers.extend import ExtendOptions, check_output, extend, write_extension
    from megatron_speech.text_tokenizers.scripts import parse_scripts

    _check_sample(args)
    check_output(args.base, args.output)
    corpus = _corpus(args)
    options = ExtendOptions(
        pieces=args.pieces,
        scripts=None if args.scripts == "auto" else parse_scripts(args.scripts.split(",")),
        first_id=args.first_id,
        sample_characters=args.sample_characters,
        temperature=args.temperature,
        seed=args.seed,
        character_coverage=args.character_coverage,
    )
    extension = extend(args.base, corpus, options)
    write_extension(extension, args.base, args.output)
    _note(corpus)
    record = extension.record
    last = record["first_new_id"] + record["new_ids"] - 1
    output(
        f"{args.output}: {record['new_ids']:,} new pieces for {', '.join(record['scripts'])}, "
        f"ids {record['first_new_id']:,} to {last:,} (the base has {record['base']['ids']:,} ids)"
    )
    for script, one in extension.fertility.items():
        before, after = one.before / one.characters, one.after / one.characters
        unknown = ""
        if one.unknown_before:
            unknown = f", unknown {one.unknown_before / one.before:.1%} → {one.unknown_after / one.after:.1%}"
        output(f"  {script}: {before:.3f} → {after:.3f} tokens per character{unknown} ({one.characters:,} characters)")
    return 0


def _report(args: argparse.Namespace) -> int:
    from megatron_speech.text_tokenizers.fertility import by_language, measure, refuse_unknown, total
    from megatron_speech.tokens.encoders import open_text_tokenizer

    if args.max_unknown is not None and not 0 <= args.max_unknown <= 1:
        raise InputError(f"--max-unknown is {args.max_unknown}; needed a share from 0 to 1")
    corpus = _corpus(args)
    measures = measure(corpus, *open_text_tokenizer(args.tokenizer))
    everything = total(list(measures.values()))
    if args.json:
        value = {
            "tokenizer": args.tokenizer,
            "rows": corpus.rows,
            "rows_without_text": dict(sorted(corpus.dropped.items())),
            "total": everything.to_json(),
            "languages": {name: one.to_json() for name, one in by_language(measures).items()},
            "groups": [
                {"language": language, "script": script, **one.to_json()}
                for (language, script), one in measures.items()
            ],
        }
        output(json.dumps(value, indent=2, ensure_ascii=False))
    else:
        _print_report(args.tokenizer, measures, everything)
        _note(corpus)
    if args.max_unknown is not None:
        refuse_unknown(measures, args.max_unknown, args.tokenizer)
    return 0


def _print_report(tokenizer: str, measures: dict[tuple[str, str], Any], everything: Any) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(f"{tokenizer}: tokens by language and script"))
    for name in ("language", "script"):
        table.add_column(name)
    for name in ("texts", "characters", "tokens", "tokens/character", "tokens/word", "tokens/byte"):
        table.add_column(name, justify="right")
    for name in ("unknown", "bytes", "not back"):
        table.add_column(name, justify="right")
    rows = [*((*key, one) for key, one in measures.items()), ("all", "", everything)]
    for language, script, one in rows:
        if one is everything:
            table.add_section()
        counts = (one.texts, one.characters, one.tokens)
        rates = [one.rate("tokens", name) for name in ("characters", "words", "bytes")]
        shares = [one.rate(name, "tokens") for name in ("unknown_tokens", "byte_tokens")]
        cells = [f"{count:,}" for count in counts] + [f"{rate:.3f}" for rate in rates]
        cells += [f"{share:.2%}" for share in shares] + [f"{one.round_trip_failures:,}"]
        table.add_row(escape(language), script, *cells)
    console = tables()
    console.print(table)
    if everything.failure:
        text, decoded = (value if len(value) <= 60 else value[:57] + "..." for value in everything.failure)
        console.print(f"not back: {text!r} decodes to {decoded!r}", markup=False, soft_wrap=True)


def _note(corpus: Any) -> None:
    """Rows without text, on stderr."""
    if note := corpus.describe_dropped():
        logger.info("%s", note)
