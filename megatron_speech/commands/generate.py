"""`megatron-speech generate`: speech from a checkpoint."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_speech.console import Progress, output
from megatron_speech.errors import InputError
from megatron_speech.files import atomic_write, prepare_output_directory
from megatron_speech.generation.engine import to_requests
from megatron_speech.generation.prompts import Utterance, read_prompts

if TYPE_CHECKING:
    from megatron_speech.generation.engine import GenerationResult, SpeechGenerator


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `megatron-speech generate`."""
    parser.add_argument(
        "--checkpoint", required=True, type=Path, help="a checkpoint, or a run directory (its newest checkpoint)"
    )
    parser.add_argument("--ema", action="store_true", help="use the moving average of the weights")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", help="text to synthesise; writes one recording to --output")
    what.add_argument(
        "--input",
        type=Path,
        metavar="PROMPTS.jsonl",
        help="one object per line: text, and as needed id, seed, language, reference_audio (relative to the file), "
        "reference_text; other fields are carried to generated.jsonl. Writes to --output-dir",
    )
    parser.add_argument(
        "--control-tags",
        action="store_true",
        help="[[pause]] in a text is the token that the token space declares; else it is text",
    )
    parser.add_argument("--language", help="BCP-47 language of --text, for the record")
    parser.add_argument(
        "--reference-audio", type=Path, metavar="WAV", help="wav, flac, mp3 or ogg of the speaker to clone"
    )
    parser.add_argument("--reference-text", help="transcript of --reference-audio")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="OUT.wav",
        help="the file for --text; its ending names its format (wav, flac, mp3, ogg, opus, …)",
    )
    parser.add_argument(
        "--output-dir", type=Path, metavar="DIR", help="for --input: wavs/, codes.npy and generated.jsonl go here"
    )
    add_sampling_arguments(parser)
    parser.add_argument(
        "--seed", type=int, default=0, help="of the noise; prompt i of --input without one gets SEED + i (0)"
    )
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="utterances in flight at once (128)")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of :class:`megatron_speech.generation.sampling.SamplingConfig`."""
    parser.add_argument("--temperature", type=float, default=0.8, help="divides the logits; 0 is greedy (0.8)")
    parser.add_argument("--top-k", type=int, default=0, help="keep the k most probable legal ids; 0 keeps all (0)")
    parser.add_argument("--top-p", type=float, default=1.0, help="keep the most probable ids up to this mass (1: all)")
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="against codes that were already spoken; 1 is off (1)"
    )
    parser.add_argument(
        "--max-seconds", type=float, default=30.0, help="longer speech is cut and counted as a stop failure (30)"
    )


def run(args: argparse.Namespace) -> int:
    """Generate speech for the text or the prompts; returns the exit status."""
    if args.text is not None:
        _require(args, "--text", needed="output", refused=("output_dir",))
        from megatron_speech.codecs.audio import check_output_format

        check_output_format(args.output)
        utterances = [
            Utterance(
                id="speech",
                text=args.text,
                seed=args.seed,
                language=args.language,
                reference_audio=args.reference_audio,
                reference_text=args.reference_text,
                control_tags=args.control_tags,
            )
        ]
    else:
        _require(
            args, "--input", needed="output_dir", refused=("output", "language", "reference_audio", "reference_text")
        )
        utterances = read_prompts(args.input, args.seed, control_tags=args.control_tags)
    if args.batch_size < 1:
        raise InputError(f"--batch-size is {args.batch_size}; it must be 1 or more")
    if not args.checkpoint.exists():
        raise InputError(f"checkpoint {args.checkpoint} does not exist; name a run directory or one of its checkpoints")

    share_cores()
    # Slow to import, and not needed to refuse what is wrong with the flags.
    from megatron_speech.generation.engine import SpeechGenerator
    from megatron_speech.generation.sampling import SamplingConfig

    config = SamplingConfig(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
        max_seconds=args.max_seconds,
    )
    prepare_output_directory(args.output_dir or args.output.absolute().parent)
    generator = SpeechGenerator.from_checkpoint(args.checkpoint, ema=args.ema)
    requests = to_requests(generator, utterances)
    started = time.monotonic()
    with Progress("generate", total=len(requests), unit="utterances") as bar:
        results = generator.generate(requests, config, batch_size=args.batch_size, progress=bar.update)
    seconds = time.monotonic() - started
    if args.text is not None:
        from megatron_speech.codecs.audio import write_audio

        write_audio(args.output, generator.decode_audio(results[0].codes), generator.codec.sample_rate_hz)
        where = str(args.output)
    else:
        where = str(write_generated(args.output_dir, generator, utterances, results))
    output(f"{where}: {summary(generator, results, seconds)}")
    return 0


def share_cores() -> None:
    """Let waiting threads sleep; call it before torch is imported.

    A decoding step is hundreds of small operations. OpenMP's threads spin between them, and on a machine with other
    work each spins away the time that the one with work to do needs: ten times slower was seen.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _require(args: argparse.Namespace, mode: str, needed: str, refused: Sequence[str]) -> None:
    """Flags that `mode` needs, and flags that it would otherwise ignore without a word."""

    def flag(name: str) -> str:
        return "--" + name.replace("_", "-")

    if getattr(args, needed) is None:
        raise InputError(f"{mode} needs {flag(needed)}: where the speech is to be written")
    for name in refused:
        if getattr(args, name) is not None:
            remedy = "write it into the prompts file" if name != "output" and mode == "--input" else "leave it out"
            raise InputError(f"{flag(name)} does not go with {mode}, which writes to {flag(needed)}; {remedy}")


def summary(generator: SpeechGenerator, results: Sequence[GenerationResult], seconds: float) -> str:
    """One line on what was generated in `seconds` of sampling."""
    frames = sum(len(result.codes) for result in results)
    spoken = frames / generator.space.codec.frame_rate_hz
    ended = sum(result.ended for result in results)
    mass = sum(result.invalid_token_rate for result in results) / len(results)
    noun = "utterance" if len(results) == 1 else "utterances"
    return (
        f"{len(results)} {noun}, {spoken:.1f} s of speech sampled in {seconds:.1f} s ({spoken / seconds:.1f}× real "
        f"time), {ended} ended by themselves, {len(results) - ended} cut; invalid-token rate {100 * mass:.2f} %"
    )


def write_generated(
    directory: Path, generator: SpeechGenerator, utterances: Sequence[Utterance], results: Sequence[GenerationResult]
) -> Path:
    """Write wavs, codes and, last, generated.jsonl; returns the path of the last.

    A row holds the prompt's fields and `wav_path` and `codes_path` (relative to the file), `code_offset`, `code_len`
    (frames), `duration` (seconds), `ended`, `stop_reason`, `prompt_tokens`, `generated_tokens`, `invalid_token_rate`
    and `invalid_argmax_rate` (see :class:`megatron_speech.generation.engine.GenerationResult`).
    """
    import numpy as np

    from megatron_speech.codecs.audio import write_wav

    rate = generator.codec.sample_rate_hz
    (directory / "wavs").mkdir(exist_ok=True)
    with atomic_write(directory / "codes.npy") as handle:
        np.save(handle, np.concatenate([result.codes for result in results]))
    rows, offset = [], 0
    for utterance, result in zip(utterances, results, strict=True):
        audio = generator.decode_audio(result.codes)
        write_wav(directory / "wavs" / f"{utterance.id}.wav", audio, rate)
        rows.append(
            {
                **utterance.extra,
                "id": utterance.id,
                "wav_path": f"wavs/{utterance.id}.wav",
                "text": utterance.text,
                "language": utterance.language,
                "seed": utterance.seed,
                "reference_audio": None if utterance.reference_audio is None else str(utterance.reference_audio),
                "reference_text": utterance.reference_text,
                "codes_path": "codes.npy",
                "code_offset": offset,
                "code_len": len(result.codes),
                "duration": len(audio) / rate,
                "ended": result.ended,
                "stop_reason": result.stop_reason,
                "prompt_tokens": result.prompt_tokens,
                "generated_tokens": result.generated_tokens,
                "invalid_token_rate": result.invalid_token_rate,
                "invalid_argmax_rate": result.invalid_argmax_rate,
            }
        )
        offset += len(result.codes)
    with atomic_write(directory / "generated.jsonl", "w") as handle:
        handle.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    return directory / "generated.jsonl"
