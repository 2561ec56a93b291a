#!/usr/bin/env python3
"""A small multilingual speech corpus out of nothing: numbers and phrases spoken by espeak-ng.

    python examples/quickstart/make_corpus.py --output-dir corpus --utterances 1200

Writes `wavs/LANGUAGE/SPEAKER/NNNNN.wav` (22,050 Hz, mono, 16 bit), `samples.jsonl` (one line per recording),
`text.jsonl` (text, language, dataset_source: for text_lm) and `vocabulary.json` (what can be said in each language).

espeak-ng is GPL-3 and stays outside the package: it comes from the wheel espeakng-loader, is called through ctypes,
and only in processes that this script starts. Each speaker of each language has a process of its own, because
espeak-ng carries state from one utterance to the next: so the corpus depends on the arguments alone, and not on the
number of workers.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from tqdm import tqdm

# A checkout runs as it is, installed or not, from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_speech.errors import InputError, command
from megatron_speech.files import atomic_write, prepare_output_directory, write_json

SAMPLE_RATE_HZ = 22050
TRIM_LEVEL = 200  # int16; below it espeak-ng's own silence begins and ends an utterance
TRIM_MARGIN_SECONDS = 0.03
LEAST_PEAK = 1000  # int16; a voice that stays below it is broken
LONGEST_DATA_PATH_BYTES = 120  # libespeak-ng's buffer for it has 160 bytes, and it adds file names
LEAST_SECONDS, MOST_SECONDS = 0.1, 15.0


@dataclass(frozen=True)
class Language:
    """What is said in one language; `voice` is espeak-ng's name of it."""

    voice: str
    numbers: tuple[str, ...]  # one to ten
    phrases: tuple[str, ...]
    # The same words in Latin letters, where they are not written so.
    romanized_numbers: tuple[str, ...] = ()
    romanized_phrases: tuple[str, ...] = ()

    @property
    def romanization(self) -> dict[str, str]:
        """Native to romanized, word or phrase; empty for a language in Latin letters."""
        native = self.numbers + self.phrases if self.romanized_numbers else ()
        return dict(zip(native, self.romanized_numbers + self.romanized_phrases, strict=True))


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(" | ") if "|" in text else text.split())


LANGUAGES = {
    "en": Language(
        "en-us",
        _words("one two three four five six seven eight nine ten"),
        _words("hello | thank you | yes | no | water | good night"),
    ),
    "hi": Language(
        "hi",
        _words("एक दो तीन चार पाँच छह सात आठ नौ दस"),
        _words("नमस्ते | धन्यवाद | हाँ | नहीं | पानी | शुभ रात्रि"),
        _words("ek do teen chaar paanch chhah saat aath nau das"),
        _words("namaste | dhanyavaad | haan | nahin | paani | shubh raatri"),
    ),
    "am": Language(
        "am",
        _words("አንድ ሁለት ሦስት አራት አምስት ስድስት ሰባት ስምንት ዘጠኝ አሥር"),
        _words("ሰላም | አመሰግናለሁ | አዎ | አይደለም | ውሃ | ደህና ነኝ"),
        _words("and hulet sost arat amist siddist sebat simmint zetegn asir"),
        _words("selam | ameseginalehu | awo | aydelem | wuha | dehna negn"),
    ),
    "ta": Language(
        "ta",
        _words("ஒன்று இரண்டு மூன்று நான்கு ஐந்து ஆறு ஏழு எட்டு ஒன்பது பத்து"),
        _words("வணக்கம் | நன்றி | ஆம் | இல்லை | தண்ணீர் | நல்ல இரவு"),
        _words("ondru irandu moondru naangu aindhu aaru ezhu ettu onbadhu paththu"),
        _words("vanakkam | nandri | aam | illai | thanneer | nalla iravu"),
    ),
    "sw": Language(
        "sw",
        _words("moja mbili tatu nne tano sita saba nane tisa kumi"),
        _words("habari | asante | ndiyo | hapana | maji | usiku mwema"),
    ),
    "bn": Language(
        "bn",
        _words("এক দুই তিন চার পাঁচ ছয় সাত আট নয় দশ"),
        _words("নমস্কার | ধন্যবাদ | হ্যাঁ | না | জল | শুভ রাত্রি"),
        _words("ek dui tin char panch chhoy shat aat noy dosh"),
        _words("nomoshkar | dhonnobad | hyan | na | jol | shubho ratri"),
    ),
}


@dataclass(frozen=True)
class Voice:
    """A speaker: a variant of espeak-ng's voices, pitch (0 to 99) and rate (words per minute)."""

    name: str
    variant: str
    pitch: int
    rate: int


# Variants without `breath` in their definition (f2, f3, f5 have it): espeak-ng's breath noise differs from run to run.
VOICES = (
    Voice("ada", "f1", 62, 145),
    Voice("ben", "m6", 38, 145),
    Voice("chi", "edward", 45, 140),
    Voice("dan", "m7", 30, 165),
    Voice("eve", "f4", 50, 160),
    Voice("fox", "Andy", 45, 145),
)


@dataclass(frozen=True)
class SpeakerJob:
    """All utterances of one speaker of one language: `utterances` of them, or as many as fill `seconds`."""

    language: str
    voice: Voice
    utterances: int | None
    seconds: float | None
    words: tuple[int, int]  # numbers in an utterance: fewest, most
    seed: int
    directory: str
    data: str  # espeak-ng's

    @property
    def speaker_id(self) -> str:
        """Speakers are per language, so that the reference of a cloning sample is in its own language."""
        return f"{self.language}-{self.voice.name}"


@contextlib.contextmanager
def voice_data() -> Iterator[str]:
    """Path of espeak-ng's data, by way of a symbolic link where the wheel lies too deep for libespeak-ng."""
    import espeakng_loader

    data = espeakng_loader.get_data_path()
    with contextlib.ExitStack() as stack:
        if len(os.fsencode(data)) > LONGEST_DATA_PATH_BYTES:
            link = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="espeak-"))) / "espeak-ng-data"
            link.symlink_to(data)
            data = str(link)
        yield data


class Espeak:
    """libespeak-ng of the espeakng-loader wheel, one voice, synthesis into memory."""

    _CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    # From speak_lib.h: AUDIO_OUTPUT_RETRIEVAL, espeakINITIALIZE_DONT_EXIT, espeakCHARS_UTF8, POS_CHARACTER.
    _RETRIEVAL, _DO_NOT_EXIT, _UTF8, _BY_CHARACTER = 1, 0x8000, 1, 1
    _RATE, _PITCH = 1, 3

    def __init__(self, voice: str, data: str) -> None:
        """Load the library, with its voices in the folder `data`, and choose a voice."""
        import espeakng_loader

        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        rate = self._library.espeak_Initialize(self._RETRIEVAL, 0, os.fsencode(data), self._DO_NOT_EXIT)
        if rate != SAMPLE_RATE_HZ:
            raise InputError(
                f"espeak-ng did not start with the data in {data} (status {rate}); reinstall espeakng-loader"
            )
        self._pieces: list[np.ndarray] = []
        self._callback = self._CALLBACK(self._receive)  # kept: ctypes does not
        self._library.espeak_SetSynthCallback(self._callback)
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise InputError(f"espeak-ng has no voice {voice!r}; leave its language out of --languages")

    def _receive(self, samples: Any, count: int, _events: Any) -> int:
        if samples and count > 0:
            self._pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, text: str, *, pitch: int, rate: int) -> np.ndarray:
        """int16 [n] at 22,050 Hz, without the silence around it."""
        self._pieces.clear()
        self._library.espeak_SetParameter(self._PITCH, pitch, 0)
        self._library.espeak_SetParameter(self._RATE, rate, 0)
        data = text.encode("utf-8")
        self._library.espeak_Synth(
            data, ctypes.c_size_t(len(data) + 1), 0, self._BY_CHARACTER, 0, self._UTF8, None, None
        )
        self._library.espeak_Synchronize()
        audio = np.concatenate([np.zeros(0, dtype=np.int16), *self._pieces])
        loud = np.flatnonzero(np.abs(audio.astype(np.int32)) > TRIM_LEVEL)
        if not len(loud):
            return audio[:0]
        margin = round(TRIM_MARGIN_SECONDS * SAMPLE_RATE_HZ)
        return audio[max(loud[0] - margin, 0) : loud[-1] + margin + 1]


class Deck:
    """Endless draws from a list in which every item comes up equally often."""

    def __init__(self, items: tuple[str, ...], generator: random.Random) -> None:
        self._items, self._generator = items, generator
        self._left: list[str] = []

    def draw(self) -> str:
        """The next item."""
        if not self._left:
            self._left = list(self._items)
            self._generator.shuffle(self._left)
        return self._left.pop()


def _compose(numbers: Deck, phrases: Deck, words: tuple[int, int], generator: random.Random) -> list[str]:
    """One utterance: a phrase one time in four, else some numbers, the fewest as often as the most."""
    if generator.random() < 0.25:
        return [phrases.draw()]
    return [numbers.draw() for _ in range(generator.randint(*words))]


def synthesise(job: SpeakerJob) -> list[dict[str, Any]]:
    """Synthesise one speaker's recordings; their rows of samples.jsonl."""
    language = LANGUAGES[job.language]
    generator = random.Random(f"{job.seed}/{job.speaker_id}")
    numbers, phrases = Deck(language.numbers, generator), Deck(language.phrases, generator)
    romanization = language.romanization
    espeak = Espeak(f"{language.voice}+{job.voice.variant}", job.data)
    rows: list[dict[str, Any]] = []
    spoken_seconds = 0.0
    while len(rows) < job.utterances if job.utterances is not None else spoken_seconds < (job.seconds or 0.0):
        items = _compose(numbers, phrases, job.words, generator)
        # No two recordings of a sentence are alike: nobody says a thing twice in the same way.
        pitch = job.voice.pitch + generator.randint(-4, 4)
        rate = round(job.voice.rate * generator.uniform(0.93, 1.07))
        text = " ".join(items)
        audio = espeak.say(text, pitch=pitch, rate=rate)
        seconds = len(audio) / SAMPLE_RATE_HZ
        if not LEAST_SECONDS <= seconds <= MOST_SECONDS or int(np.abs(audio.astype(np.int32)).max()) < LEAST_PEAK:
            raise InputError(
                f"espeak-ng's voice {language.voice}+{job.voice.variant} gave {seconds:.2f} s of (nearly) silent audio "
                f"for {text!r}; leave {job.language} out of --languages"
            )
        name = f"{job.language}/{job.voice.name}/{len(rows):05d}"
        path = Path(job.directory, "wavs", f"{name}.wav")
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, audio, SAMPLE_RATE_HZ, subtype="PCM_16")
        row = {
            "sample_id": name,
            "source_id": name,
            "wav_path": f"wavs/{name}.wav",
            "transcript": text,
            "language": job.language,
            "speaker_id": job.speaker_id,
            "dataset_source": "espeak-ng",
            "sample_rate": SAMPLE_RATE_HZ,
            "duration": round(seconds, 6),
        }
        if romanization:
            row["transcript_romanized"] = " ".join(romanization[item] for item in items)
        rows.append(row)
        spoken_seconds += seconds
    return rows


def compose_text(languages: list[str], lines: int, seed: int) -> list[dict[str, str]]:
    """`lines` lines of text of the same vocabulary, in turn by language: three to eight items each."""
    generator = random.Random(f"{seed}/text")
    decks = {name: Deck(LANGUAGES[name].numbers * 2 + LANGUAGES[name].phrases, generator) for name in languages}
    return [
        {
            "text": ", ".join(decks[name].draw() for _ in range(generator.randint(3, 8))),
            "language": name,
            "dataset_source": "espeak-ng-vocabulary",
        }
        for name in (languages[index % len(languages)] for index in range(lines))
    ]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        prog="make_corpus.py",
        description="Synthesise a small multilingual speech corpus with espeak-ng: numbers and short phrases, several "
        "speakers per language. The same arguments give the same bytes, whatever --workers.",
    )
    parser.add_argument("--output-dir", required=True, type=Path, metavar="D", help="made if it is not there")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument(
        "--utterances", type=int, metavar="N", help="recordings in all, spread over the speakers (default: 1200)"
    )
    amount.add_argument("--hours", type=float, metavar="H", help="hours of speech in all, instead of a number")
    parser.add_argument(
        "--languages",
        default=",".join(LANGUAGES),
        metavar="L,L",
        help="BCP-47 codes, separated by commas (default and all there are: %(default)s)",
    )
    parser.add_argument(
        "--speakers", type=int, default=4, metavar="N", help=f"per language, 1 to {len(VOICES)} (default: %(default)s)"
    )
    parser.add_argument(
        "--min-words", type=int, default=1, metavar="N", help="numbers in one utterance at least (default: %(default)s)"
    )
    parser.add_argument(
        "--max-words", type=int, default=3, metavar="N", help="numbers in one utterance at most (default: %(default)s)"
    )
    parser.add_argument(
        "--text-lines", type=int, default=2000, metavar="N", help="lines of text.jsonl (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    if arguments.hours is None and arguments.utterances is None:
        arguments.utterances = 1200
    most_words = arguments.max_words
    limits = {"speakers": len(VOICES), "max_words": 20, "min_words": most_words, "workers": 1024, "utterances": 10**7}
    for name, most in limits.items():
        value = getattr(arguments, name)
        if value is not None and not 1 <= value <= most:
            raise InputError(f"--{name.replace('_', '-')} is {value}; needed is a number from 1 to {most}")
    if arguments.hours is not None and not 0 < arguments.hours <= 10_000:
        raise InputError(f"--hours is {arguments.hours}; needed are hours, more than 0 and at most 10000")
    if arguments.text_lines < 0:
        raise InputError(f"--text-lines is {arguments.text_lines}; needed is a number from 0 up")
    arguments.languages = list(dict.fromkeys(arguments.languages.split(",")))
    if unknown := [name for name in arguments.languages if name not in LANGUAGES]:
        raise InputError(f"--languages names {unknown[0]!r}; there is text for {', '.join(LANGUAGES)}")
    return arguments


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command; see the module's docstring."""
    arguments = parse_arguments(argv)
    try:
        import espeakng_loader  # noqa: F401  (the library itself is loaded by the speakers' processes)
    except ImportError as error:
        raise InputError("the corpus needs espeakng-loader; pip install 'megatron-speech[quickstart]'") from error
    output: Path = arguments.output_dir
    prepare_output_directory(output)
    with tempfile.TemporaryDirectory(dir=output, prefix=".corpus-") as work:
        with voice_data() as data:
            rows = _synthesise_all(arguments, work, data)
        (output / "samples.jsonl").unlink(missing_ok=True)  # of an earlier run: it must not name the new recordings
        shutil.rmtree(output / "wavs", ignore_errors=True)
        os.replace(Path(work, "wavs"), output / "wavs")
    write_json(
        output / "vocabulary.json",
        {
            name: {"numbers": LANGUAGES[name].numbers, "phrases": LANGUAGES[name].phrases}
            for name in arguments.languages
        },
    )
    _write_lines(output / "text.jsonl", compose_text(arguments.languages, arguments.text_lines, arguments.seed))
    _write_lines(output / "samples.jsonl", rows)
    _report(rows)
    print(f"{output / 'samples.jsonl'}: {len(rows)} recordings; {output / 'text.jsonl'}: {arguments.text_lines} lines")
    return 0


def _synthesise_all(arguments: argparse.Namespace, work: str, data: str) -> list[dict[str, Any]]:
    speakers = [(language, voice) for voice in VOICES[: arguments.speakers] for language in arguments.languages]
    jobs = []
    for index, (language, voice) in enumerate(speakers):
        utterances = seconds = None
        if arguments.hours is None:
            utterances = arguments.utterances // len(speakers) + (index < arguments.utterances % len(speakers))
        else:
            seconds = arguments.hours * 3600 / len(speakers)
        words = (arguments.min_words, arguments.max_words)
        jobs.append(SpeakerJob(language, voice, utterances, seconds, words, arguments.seed, work, data))
    Path(work, "wavs").mkdir()
    rows: list[dict[str, Any]] = []
    # The fork server never loads espeak-ng: each of its children begins with a fresh library.
    context = multiprocessing.get_context("forkserver")
    pool = ProcessPoolExecutor(min(arguments.workers, len(jobs)), context, max_tasks_per_child=1)
    with pool, tqdm(total=len(jobs), unit="speaker", desc="synthesise", disable=None) as progress:
        try:
            for spoken in pool.map(synthesise, jobs):
                rows += spoken
                progress.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    # Recordings of all languages and speakers in turn: any head of the file is a small corpus of the same kind.
    rows.sort(key=lambda row: (row["sample_id"].rsplit("/", 1)[1], row["speaker_id"]))
    return rows


def _write_lines(path: Path, rows: list[dict[str, Any]] | list[dict[str, str]]) -> None:
    with atomic_write(path, "w") as handle:
        handle.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _report(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("language")
    for column in ("speakers", "recordings", "seconds"):
        table.add_column(column, justify="right")
    for language in dict.fromkeys(row["language"] for row in rows):
        own = [row for row in rows if row["language"] == language]
        speakers = len({row["speaker_id"] for row in own})
        table.add_row(language, str(speakers), f"{len(own):,}", f"{sum(row['duration'] for row in own):,.1f}")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
