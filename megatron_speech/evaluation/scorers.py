"""Scorers: transcripts by pocketsphinx, error rates, repeated frames.

A score means nothing without its ceiling (the same scorer on the real recording, and on that recording after the
codec) and without chance (the same transcripts against other items' texts). The functions here compute all three.
"""

from __future__ import annotations

import importlib.util
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import soxr

from megatron_speech.errors import InputError

# Languages whose transcripts the scorers here can be trusted with.
SCORED_LANGUAGES = ("en",)

_RATE_HZ = 16_000
_PEAK = 12_000.0
# Faint noise under and around the utterance. Digital silence before it, or noise that stops where it begins, costs
# pocketsphinx up to 25 points of accuracy on spoken digits (60 against 85 %).
_PADDING_SECONDS = 0.1
_NOISE_RMS = 60.0


def missing_packages() -> list[str]:
    """The packages of the `evaluation` extra that are not installed."""
    return [name for name in ("pocketsphinx", "jiwer") if importlib.util.find_spec(name) is None]


def can_score(language: str) -> bool:
    """Whether a word error rate in `language` (BCP-47) means anything with the scorers here."""
    return language.lower().replace("_", "-").split("-")[0] in SCORED_LANGUAGES


def normalise_text(text: str) -> str:
    """Lower case, punctuation but apostrophes dropped, single spaces: what two transcripts are compared in."""
    text = unicodedata.normalize("NFKC", text).lower().replace("’", "'")
    text = "".join(" " if unicodedata.category(c)[0] in "PSZC" and c != "'" else c for c in text)
    return " ".join(re.sub(r"(?<!\w)'|'(?!\w)", " ", text).split())


def prepare_audio(audio: np.ndarray, sample_rate_hz: int) -> np.ndarray:
    """The signal that pocketsphinx is given: 16 kHz, no DC, peak 12,000, in faint noise that begins 100 ms before it.

    Args:
        audio: float [n], mono, any scale.
        sample_rate_hz: its rate.

    Returns:
        int16 [m], 100 ms longer on either side. The noise is the same for every utterance: transcripts repeat.
    """
    signal = np.asarray(audio, dtype=np.float64)
    if signal.size:
        # The offset goes first: the resampler would see a step at either end.
        signal = soxr.resample(signal - signal.mean(), sample_rate_hz, _RATE_HZ)
        signal = signal * (_PEAK / max(float(np.abs(signal).max()), 1e-9))
    signal = np.pad(signal, round(_PADDING_SECONDS * _RATE_HZ))
    noise = np.random.default_rng(0).normal(0.0, _NOISE_RMS, len(signal))
    return (signal + noise).round().clip(-32768, 32767).astype(np.int16)


class PocketSphinx:
    """pocketsphinx with its embedded American-English model: a fixed list of phrases, or free speech.

    With phrases it has no reject: noise too is answered with a phrase, so chance is 1 / number of phrases.

    Args:
        phrases: the sentences of the grammar, or None for free speech with the embedded language model.
        repeated: an utterance is any number of the phrases, one after another, instead of one of them.

    Raises:
        InputError: pocketsphinx is not installed, no phrase is given, or a word is not in its dictionary.
    """

    def __init__(self, phrases: Sequence[str] | None = None, *, repeated: bool = False) -> None:
        if importlib.util.find_spec("pocketsphinx") is None:
            raise InputError("pocketsphinx is not installed; pip install 'megatron-speech[evaluation]'")
        import pocketsphinx

        if phrases is None:
            self.phrases: tuple[str, ...] | None = None
            self._decoder = pocketsphinx.Decoder(loglevel="FATAL")
            return
        self.phrases = tuple(dict.fromkeys(normalise_text(phrase) for phrase in phrases))
        if not self.phrases or not all(self.phrases):
            raise InputError("the pocketsphinx grammar needs phrases of at least one word each")
        self._decoder = pocketsphinx.Decoder(lm=None, fwdflat=False, bestpath=False, loglevel="FATAL")
        unknown = self.unknown_words()
        if unknown:
            raise InputError(
                f"pocketsphinx has no pronunciation of {', '.join(map(repr, unknown[:5]))}"
                f"{' …' if len(unknown) > 5 else ''}; use words of its English dictionary, or free mode"
            )
        alternatives = " | ".join(f"({phrase})" for phrase in self.phrases)
        rule = f"({alternatives})+" if repeated else alternatives
        self._decoder.add_jsgf_string("phrases", f"#JSGF V1.0;\ngrammar phrases;\npublic <phrase> = {rule};\n")
        self._decoder.activate_search("phrases")

    def unknown_words(self) -> list[str]:
        """Words of the phrases that the dictionary lacks."""
        words = dict.fromkeys(word for phrase in self.phrases or () for word in phrase.split())
        return [word for word in words if self._decoder.lookup_word(word) is None]

    def transcribe(self, audio: np.ndarray, sample_rate_hz: int) -> str:
        """The transcript of `audio`, float [n] mono: normalised text, "" for nothing."""
        samples = prepare_audio(audio, sample_rate_hz)
        # Without this the features' running mean carries over and a result depends on the utterance before it.
        self._decoder.reinit_feat()
        self._decoder.start_utt()
        self._decoder.process_raw(samples.tobytes(), full_utt=True)
        self._decoder.end_utt()
        hypothesis = self._decoder.hyp()
        return normalise_text(hypothesis.hypstr) if hypothesis else ""


@dataclass(frozen=True)
class ErrorRates:
    """Error rates of a set of transcripts.

    Attributes:
        items: utterances scored.
        wer: word edits / reference words over the whole set.
        cer: character edits / reference characters over the whole set.
        exact: share of utterances whose normalised transcript equals the reference.
    """

    items: int
    wer: float
    cer: float
    exact: float


def error_rates(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorRates | None:
    """WER, CER and share of exact matches of `hypotheses` against `references`; None for an empty set.

    Raises:
        InputError: a reference has no word left after normalisation.
    """
    import jiwer

    if not references:
        return None
    wanted = [normalise_text(text) for text in references]
    heard = [normalise_text(text) for text in hypotheses]
    if not all(wanted):
        raise InputError(f"expected text {references[wanted.index('')]!r} has no word in it; there is nothing to score")
    return ErrorRates(
        items=len(wanted),
        wer=float(jiwer.wer(wanted, heard)),
        cer=float(jiwer.cer(wanted, heard)),
        exact=sum(a == b for a, b in zip(wanted, heard, strict=True)) / len(wanted),
    )


def chance_rates(references: Sequence[str], hypotheses: Sequence[str]) -> ErrorRates | None:
    """The same transcripts scored against the texts of *other* items: what a model deaf to its text would get.

    Every transcript is paired with every distinct text of the set but its own; error rates are averaged over the
    pairs, which keeps a scorer's bias towards some words in the figure. None where the set holds one text only.
    """
    wanted = [normalise_text(text) for text in references]
    distinct = list(dict.fromkeys(wanted))
    if len(distinct) < 2:
        return None
    pairs: dict[tuple[str, str], int] = {}
    for own, heard in zip(wanted, map(normalise_text, hypotheses), strict=True):
        pairs[own, heard] = pairs.get((own, heard), 0) + 1
    references_, hypotheses_ = [], []
    for (own, heard), count in pairs.items():
        for other in distinct:
            if other != own:
                references_ += [other] * count
                hypotheses_ += [heard] * count
    return error_rates(references_, hypotheses_)


# A loop is a stretch of at least this many blocks, one after the other …
LOOP_REPEATS = 4
# … that lasts at least this long. Longer blocks than this are not looked for.
LOOP_SECONDS = 0.4
LOOP_BLOCK_SECONDS = 2.0


def is_loop(codes: np.ndarray, frame_rate_hz: float) -> bool:
    """Whether an utterance is caught in a loop.

    It is when some block of 1 frame to 2 seconds, equal in all codes, comes at least 4 times in a row and the
    stretch lasts at least 0.4 s. The block may be one frame (a stuck sound) or a word. Codecs may map digital
    silence to one frame over and over, so a loop rate is to be read beside the rate on real recordings.

    Args:
        codes: int [T, K].
        frame_rate_hz: frames per second.
    """
    if not len(codes):
        return False
    ids = np.unique(codes.reshape(len(codes), -1), axis=0, return_inverse=True)[1].reshape(-1)
    shortest = math.ceil(LOOP_SECONDS * frame_rate_hz - 1e-9)
    longest_block = max(1, round(LOOP_BLOCK_SECONDS * frame_rate_hz))
    for period in range(1, min(len(ids) // LOOP_REPEATS, longest_block) + 1):
        # c[t] = c[t - period] so many times in a row makes a stretch of `period` more frames.
        needed = max(LOOP_REPEATS * period, shortest) - period
        same = np.concatenate([[0], np.cumsum(ids[period:] == ids[:-period])])
        if needed < len(same) and bool((same[needed:] - same[:-needed] == needed).any()):
            return True
    return False
