"""`megatron-speech transcribe`: the text of recordings, from a checkpoint that learned the task `asr`."""

from __future__ import annotations

import argparse
import json
import time
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_speech.commands.generate import share_cores
from megatron_speech.console import Progress, output
from megatron_speech.errors import InputError
from megatron_speech.files import atomic_write, prepare_output_directory
from megatron_speech.generation.prompts import read_json_lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `megatron-speech transcribe`."""
    add = parser.add_argument
    add("--checkpoint", required=True, type=Path, help="a checkpoint, or a run directory (its newest checkpoint)")
    add("--ema", action="store_true", help="use the moving average of the weights")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--audio", nargs="+", type=Path, metavar="WAV", help="recordings: wav, flac, mp3 or ogg")
    what.add_argument(
        "--input",
        type=Path,
        metavar="SAMPLES.jsonl",
        help="one object per line with wav_path (relative to the file); a transcript is compared with what is heard",
    )
    add("--output", type=Path, metavar="OUT.jsonl", help="the texts, one object per line (default: stdout)")
    add("--temperature", type=float, default=0.0, help="divides the logits; 0 is greedy (0)")
    add("--seed", type=int, default=0, help="of the noise, where the temperature is not 0 (0)")
    add("--max-tokens", type=int, default=1024, metavar="N", help="text that is longer is cut (1024)")
    add("--batch-size", type=int, default=64, metavar="N", help="recordings in flight at once (64)")


def run(args: argparse.Namespace) -> int:
    """Write the texts; with transcripts, their error rates too.

    Raises:
        InputError: a flag, a file or the checkpoint cannot be used.
    """
    for name in ("max_tokens", "batch_size"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be 1 or more")
    rows = _rows(args)
    if args.output is not None:
        prepare_output_directory(args.output.absolute().parent)
    share_cores()
    # Slow to import, and not needed to refuse what is wrong with the flags.
    from megatron_speech.generation.engine import SpeechGenerator
    from megatron_speech.generation.sampling import SamplingConfig

    config = SamplingConfig(temperature=args.temperature)
    generator = SpeechGenerator.from_checkpoint(args.checkpoint, ema=args.ema)
    speech = []
    for row in rows:
        try:
            speech.append(generator.encode_audio(row["path"]))
        except InputError as error:
            raise InputError(f"{row['where']}: {error}") from error
    started = time.monotonic()
    with Progress("transcribe", total=len(rows), unit="recordings") as bar:
        found = generator.transcribe(
            speech,
            config,
            max_tokens=args.max_tokens,
            seed=args.seed,
            batch_size=args.batch_size,
            progress=bar.update,
        )
    seconds = time.monotonic() - started
    lines = []
    for row, result in zip(rows, found, strict=True):
        value = {**row["fields"], "text": result.text, "ended": result.ended, "stop_reason": result.stop_reason}
        value["generated_tokens"] = result.generated_tokens
        lines.append(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")
    if args.output is None:
        output("".join(lines), end="")
        return 0
    with atomic_write(args.output, "w") as handle:
        handle.writelines(lines)
    spoken = sum(map(len, speech)) / generator.space.codec.frame_rate_hz
    cut = sum(not result.ended for result in found)
    output(
        f"{args.output}: {len(rows)} texts of {spoken:.1f} s of speech in {seconds:.1f} s "
        f"({spoken / seconds:.1f}× real time), {cut} cut{_scored(rows, [result.text for result in found])}"
    )
    return 0


def _rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Of each recording: its path, what to call it in errors, fields of its output line, its transcript or None."""
    if args.audio is not None:
        return [
            {"path": path, "where": "--audio", "fields": {"wav_path": str(path)}, "transcript": None}
            for path in args.audio
        ]
    rows = []
    for number, fields in read_json_lines(args.input, "samples file"):
        where = f"{args.input} line {number}"
        wav_path, transcript = fields.get("wav_path"), fields.get("transcript")
        if not isinstance(wav_path, str) or not wav_path:
            raise InputError(f"{where}: wav_path is {wav_path!r}, needed is the path of a recording")
        if transcript is not None and not isinstance(transcript, str):
            raise InputError(f"{where}: transcript is {transcript!r}, needed is text")
        path = (args.input.parent / wav_path).resolve()
        rows.append({"path": path, "where": where, "fields": fields, "transcript": transcript})
    if not rows:
        raise InputError(f"samples file {args.input} has no line; give one JSON object per recording")
    return rows


def _scored(rows: Sequence[dict[str, Any]], texts: Sequence[str]) -> str:
    """Error rates of what was heard, where there are transcripts to compare with."""
    pairs = [
        (comparable(row["transcript"]), comparable(text))
        for row, text in zip(rows, texts, strict=True)
        if row["transcript"] is not None
    ]
    pairs = [(reference, heard) for reference, heard in pairs if reference]
    if not pairs:
        return ""
    try:
        import jiwer
    except ImportError:
        return "; no error rates: jiwer is not installed (pip install 'megatron-speech[evaluation]')"
    references, heard = (list(column) for column in zip(*pairs, strict=True))
    word, character = jiwer.wer(references, heard), jiwer.cer(references, heard)
    return (
        f"; against {len(pairs)} transcripts: {100 * word:.1f} % word errors, {100 * character:.1f} % character errors"
    )


def comparable(text: str) -> str:
    """Text without case, punctuation and repeated spaces, in any script: what error rates are counted on."""
    folded = unicodedata.normalize("NFC", text).casefold()
    kept = "".join(" " if unicodedata.category(letter)[0] in "PZC" else letter for letter in folded)
    return " ".join(kept.split())
