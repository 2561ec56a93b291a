"""Generate the canaries, transcribe them, and summarise the figures.

Every error rate stands beside its ceilings and beside chance:

    generated      the scorer on the generated speech
    round_trip     the same scorer on the original recordings after the codec: what a perfect model could reach
    original       the same scorer on the original recordings
    chance         the transcripts of `generated` scored against the texts of other canaries
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from megatron_speech.codecs import encode_checked
from megatron_speech.codecs.audio import read_audio, write_wav
from megatron_speech.errors import InputError
from megatron_speech.evaluation.canaries import Canary, CanarySet
from megatron_speech.evaluation.scorers import (
    LOOP_BLOCK_SECONDS,
    LOOP_REPEATS,
    LOOP_SECONDS,
    PocketSphinx,
    can_score,
    chance_rates,
    error_rates,
    is_loop,
    missing_packages,
    normalise_text,
)
from megatron_speech.generation.engine import GenerationResult, SpeechGenerator, to_requests
from megatron_speech.generation.prompts import Utterance

FORMAT_VERSION = 1

LOOP_DEFINITION = (
    f"an utterance loops when a block of 1 frame to {LOOP_BLOCK_SECONDS:g} s, equal in all codes, comes at least "
    f"{LOOP_REPEATS} times in a row over at least {LOOP_SECONDS:g} s"
)

ProgressCallback = Callable[[int, str], Any]


@dataclass(frozen=True)
class Clip:
    """Audio and its transcript (None: not transcribed)."""

    audio: np.ndarray
    transcript: str | None = None


@dataclass
class GeneratedItem:
    """One generated utterance with everything that is known about it."""

    canary: Canary
    utterance: Utterance
    result: GenerationResult
    generated: Clip
    loop: bool


@dataclass
class Recording:
    """A canary's original recording, and the same after the codec."""

    original: Clip
    round_trip: Clip
    loop: bool


@dataclass
class Evaluation:
    """All audio and transcripts; `report` is the JSON of them."""

    items: list[GeneratedItem]
    recordings: dict[str, Recording]
    sample_rate_hz: int
    report: dict[str, Any]


def evaluate(
    generator: SpeechGenerator,
    canaries: CanarySet,
    where: str,
    output_dir: Path,
    *,
    batch_size: int = 128,
    progress: ProgressCallback | None = None,
) -> Evaluation:
    """Generate all canaries, write their wavs to `output_dir`/wavs, and score them.

    Every input (references, originals) is read and checked before the first token is sampled.

    Args:
        generator: the model.
        canaries: the texts, and the scorer.
        where: the canary file's name, for errors.
        output_dir: exists and can be written to.
        batch_size: utterances in flight at once.
        progress: called with (steps done, what is being done).

    Raises:
        InputError: a canary whose text cannot be synthesised, or a recording that cannot be read.
    """
    tick: ProgressCallback = progress or (lambda count, what: None)
    pairs = list(canaries.utterances(where))
    requests = to_requests(generator, [utterance for _, utterance in pairs])
    rate, frame_rate = generator.codec.sample_rate_hz, generator.codec.frame_rate_hz
    originals = _read_originals(canaries, where, rate)
    scorer, scorer_report, notes = _open_scorer(canaries)

    def transcribe(canary: Canary, audio: np.ndarray) -> Clip:
        if scorer is None or not can_score(canary.language):
            return Clip(audio)
        return Clip(audio, scorer.transcribe(audio, rate))

    results = generator.generate(
        requests, canaries.sampling, batch_size=batch_size, progress=lambda count: tick(count, "generate")
    )
    (output_dir / "wavs").mkdir(exist_ok=True)
    spoken = []
    for (canary, utterance), result in zip(pairs, results, strict=True):
        audio = generator.decode_audio(result.codes)
        write_wav(output_dir / "wavs" / f"{utterance.id}.wav", audio, rate)
        spoken.append(
            GeneratedItem(canary, utterance, result, transcribe(canary, audio), is_loop(result.codes, frame_rate))
        )
        tick(1, "transcribe")
    real = {}
    for canary in canaries.items:
        if canary.id in originals:
            codes = encode_checked(generator.codec, originals[canary.id])
            real[canary.id] = Recording(
                original=transcribe(canary, originals[canary.id]),
                round_trip=transcribe(canary, generator.decode_audio(codes)),
                loop=is_loop(codes, frame_rate),
            )
            tick(1, "transcribe the originals")

    languages = sorted({canary.language for canary in canaries.items})
    unheard = [language for language in languages if not can_score(language)]
    if scorer is not None and unheard:
        notes.append(
            f"no error rate is claimed for {', '.join(unheard)}: the scorer transcribes English only; their durations, "
            "ends, loops and invalid-token rate are reported"
        )
    if scorer is not None and not real:
        notes.append(
            "no item names original_audio: the scorer's own ceilings are unknown, so its rates cannot be judged"
        )

    def group(rows: Sequence[GeneratedItem]) -> dict[str, Any]:
        return summarise(rows, real, rate, phrases=len(scorer.phrases) if scorer and scorer.phrases else None)

    report = {
        "format_version": FORMAT_VERSION,
        "name": canaries.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "checkpoint": generator.checkpoint,
        "codec": {"name": generator.space.codec.name, "hash": generator.space.codec.hash},
        "decoding": canaries.decoding.model_dump(),
        "scorer": scorer_report,
        "loop_definition": LOOP_DEFINITION,
        "notes": notes,
        "overall": group(spoken),
        "by_language": {
            language: group([row for row in spoken if row.canary.language == language]) for language in languages
        },
        "by_category": {
            category: group([row for row in spoken if row.canary.category == category])
            for category in sorted({canary.category for canary in canaries.items})
        },
        "items": [_item_report(row, real.get(row.canary.id), rate) for row in spoken],
    }
    return Evaluation(spoken, real, rate, report)


def _read_originals(canaries: CanarySet, where: str, sample_rate_hz: int) -> dict[str, np.ndarray]:
    originals = {}
    for number, canary in enumerate(canaries.items):
        if can_score(canary.language) and not normalise_text(canary.expected_text):
            raise InputError(
                f"{where}, items.{number} ({canary.id}): nothing in {canary.expected_text!r} can be transcribed; give "
                "in `expected` which words it should sound like"
            )
        if canary.original_audio is not None:
            try:
                originals[canary.id] = read_audio(canary.original_audio, sample_rate_hz)
            except InputError as error:
                raise InputError(f"{where}, items.{number} ({canary.id}), original_audio: {error}") from error
    return originals


def _open_scorer(canaries: CanarySet) -> tuple[PocketSphinx | None, dict[str, Any], list[str]]:
    """(the scorer or None, its description for the report, notes)."""
    if canaries.scorer is None:
        note = "the canary file names no scorer: no error rates"
        return None, {"kind": None, "applied": False, "reason": note}, [note]
    grammar = canaries.scorer.grammar
    described: dict[str, Any] = {"kind": canaries.scorer.kind, "mode": "free" if grammar is None else "grammar"}
    missing = missing_packages()
    if missing:
        reason = f"{' and '.join(missing)} not installed (pip install 'megatron-speech[evaluation]')"
    else:
        try:
            scorer = PocketSphinx(grammar)
        except InputError as error:
            reason = str(error)
        else:
            if scorer.phrases is not None:
                described["phrases"] = list(scorer.phrases)
            return scorer, {**described, "applied": True, "reason": None}, []
    return None, {**described, "applied": False, "reason": reason}, [f"error rates are left out: {reason}"]


def summarise(
    rows: Sequence[GeneratedItem], real: dict[str, Recording], sample_rate_hz: int, *, phrases: int | None
) -> dict[str, Any]:
    """The figures of a group of utterances.

    `eos_rate` and `loop_rate` are shares of utterances, `stop_failures` is a count; `invalid_token_rate` and
    `invalid_argmax_rate` are means over sampled tokens of what an unrestricted model would have done; durations are
    in seconds; `duration_ratio` is the mean of generated / original duration. `speech` is None where nothing was
    transcribed.
    """
    # One position more than audio tokens is sampled: the end, or what the limit cut off.
    weights = np.array([row.result.codes.size + 1 for row in rows], dtype=np.float64)
    seconds = np.array([len(row.generated.audio) / sample_rate_hz for row in rows])
    originals = [real[name] for name in dict.fromkeys(row.canary.id for row in rows) if name in real]
    ratios = [
        len(row.generated.audio) / len(real[row.canary.id].original.audio) for row in rows if row.canary.id in real
    ]
    return {
        "utterances": len(rows),
        "eos_rate": float(np.mean([row.result.ended for row in rows])),
        "stop_failures": sum(not row.result.ended for row in rows),
        "loop_rate": float(np.mean([row.loop for row in rows])),
        "loop_rate_original": float(np.mean([item.loop for item in originals])) if originals else None,
        "invalid_token_rate": float(np.average([row.result.invalid_token_rate for row in rows], weights=weights)),
        "invalid_argmax_rate": float(np.average([row.result.invalid_argmax_rate for row in rows], weights=weights)),
        "duration_seconds": {
            "mean": float(seconds.mean()),
            "min": float(seconds.min()),
            "max": float(seconds.max()),
            "total": float(seconds.sum()),
        },
        "duration_ratio": float(np.mean(ratios)) if ratios else None,
        "speech": _speech(rows, real, phrases),
    }


def _speech(rows: Sequence[GeneratedItem], real: dict[str, Recording], phrases: int | None) -> dict[str, Any] | None:
    heard = [
        (row.canary.expected_text, row.generated.transcript) for row in rows if row.generated.transcript is not None
    ]
    if not heard:
        return None
    wanted, transcripts = zip(*heard, strict=True)
    items = {row.canary.id: row.canary for row in rows}
    scored = [
        (item.expected_text, real[name]) for name, item in items.items() if name in real and can_score(item.language)
    ]

    def ceiling(clips: Sequence[Clip]) -> dict[str, Any] | None:
        rates = error_rates([text for text, _ in scored], [clip.transcript or "" for clip in clips])
        return None if rates is None else asdict(rates)

    generated, chance = error_rates(wanted, transcripts), chance_rates(wanted, transcripts)
    return {
        "generated": None if generated is None else asdict(generated),
        "round_trip": ceiling([found.round_trip for _, found in scored]),
        "original": ceiling([found.original for _, found in scored]),
        "chance": None if chance is None else asdict(chance),
        # A grammar has no reject: guessing one of its sentences is right this often.
        "guess_exact": None if phrases is None else 1 / phrases,
    }


def _item_report(row: GeneratedItem, real: Recording | None, sample_rate_hz: int) -> dict[str, Any]:
    def heard(clip: Clip | None) -> dict[str, Any] | None:
        if clip is None:
            return None
        rates = None if clip.transcript is None else error_rates([row.canary.expected_text], [clip.transcript])
        return {
            "seconds": len(clip.audio) / sample_rate_hz,
            "transcript": clip.transcript,
            "wer": None if rates is None else rates.wer,
            "cer": None if rates is None else rates.cer,
        }

    canary, result = row.canary, row.result
    return {
        "id": row.utterance.id,
        "canary": canary.id,
        "text": canary.text,
        "expected": canary.expected_text,
        "language": canary.language,
        "category": canary.category,
        "seed": row.utterance.seed,
        "reference_audio": None if canary.reference_audio is None else str(canary.reference_audio),
        "wav_path": f"wavs/{row.utterance.id}.wav",
        "frames": len(result.codes),
        "ended": result.ended,
        "stop_reason": result.stop_reason,
        "loop": row.loop,
        "invalid_token_rate": result.invalid_token_rate,
        "invalid_argmax_rate": result.invalid_argmax_rate,
        "prompt_tokens": result.prompt_tokens,
        "generated_tokens": result.generated_tokens,
        "generated": heard(row.generated),
        "round_trip": heard(real.round_trip if real else None),
        "original": heard(real.original if real else None),
    }
