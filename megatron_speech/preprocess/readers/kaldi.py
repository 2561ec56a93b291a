"""Data folders of Kaldi and ESPnet (kaldi-asr.org/doc/data_prep.html): lists of `key value`, one file for each field.

    wav.scp    recording → path of a recording            segments   utterance → recording, start, end (seconds)
    text       utterance → transcript                     utt2spk    utterance → speaker
    utt2lang   utterance → language                       utt2dur    utterance → duration (seconds)

Without `segments` every recording is one utterance. Only `wav.scp` must be there. A path that is a command (`… |`), or
an entry of a Kaldi archive (`X.ark:1234`), is refused: nothing here runs commands. The lists are held in memory.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_speech.errors import InputError
from megatron_speech.preprocess.readers import source
from megatron_speech.preprocess.readers.base import BATCH_ROWS, Row, RowBatch, RowRejected
from megatron_speech.preprocess.readers.recognise import base_of, recognised

_FIELDS = {"text": "transcript", "utt2spk": "speaker_id", "utt2lang": "language", "utt2dur": "duration"}
_LISTS = ("wav.scp", "segments", *_FIELDS)
_ARCHIVE_ENTRY = re.compile(r".+\.ark:\d+(\[.*\])?")


@dataclass(frozen=True)
class KaldiBatch:
    """Some utterances: the number of the line that names each, its fields, and why there are none."""

    path: str
    found: list[tuple[int, dict[str, Any], RowRejected | None]]

    @property
    def rows(self) -> int:
        """Number of utterances."""
        return len(self.found)

    def read(self) -> list[Row]:
        """The rows."""
        return [Row(number, dict(fields), rejected) for number, fields, rejected in self.found]


@dataclass
class _Lists:
    """The lists of a folder. Keys are in the order of their lists.

    Attributes:
        recordings: path of each.
        segments: value of each utterance; None where every recording is one.
        values: of each other list by utterance.
        orphans: (list, line, utterance) of what no utterance is.
        base: what stands before relative paths.
    """

    recordings: dict[str, str]
    segments: dict[str, str] | None
    values: dict[str, dict[str, str]]
    orphans: list[tuple[str, int, str]]
    base: str

    def __post_init__(self) -> None:
        self.utterances = list(self.recordings if self.segments is None else self.segments)

    def __len__(self) -> int:
        return len(self.utterances) + len(self.orphans)

    def entry(self, i: int) -> tuple[int, dict[str, Any], RowRejected | None]:
        """What is known of utterance `i`; those that only some lists know come last."""
        if i >= len(self.utterances):
            name, number, key = self.orphans[i - len(self.utterances)]
            where = "wav.scp" if self.segments is None else "segments"
            reason = f"{name} line {number}: utterance {key} is not in {where}"
            return number, {"sample_id": key}, RowRejected("kaldi_key", reason)
        key, rejected = self.utterances[i], None
        fields: dict[str, Any] = {"sample_id": key}
        try:
            if self.segments is None:
                fields |= {"source_id": key, "wav_path": self.base + self.recordings[key]}
            else:
                fields |= self._segment(key, self.segments[key])
        except RowRejected as error:
            rejected = error
        for name, values in self.values.items():
            value = values.get(key)
            if value:
                fields[_FIELDS[name]] = _seconds(value) if name == "utt2dur" else value
        return i + 1, fields, rejected

    def _segment(self, key: str, value: str) -> dict[str, Any]:
        """`recording start end [channel]`; an end of -1 is that of the recording."""
        parts = value.split()
        if len(parts) not in (3, 4):
            reason = f"segments: {key} has {len(parts)} values, needed recording, start and end"
            raise RowRejected("bad_line", reason)
        path = self.recordings.get(parts[0])
        if path is None:
            raise RowRejected("kaldi_key", f"segments: recording {parts[0]} of {key} is not in wav.scp")
        start, end = _seconds(parts[1]), _seconds(parts[2])
        fields = {"source_id": parts[0], "wav_path": self.base + path, "start_time": start}
        if end != -1:
            fields["end_time"] = end
        if len(parts) == 4:
            fields["channel"] = int(parts[3]) if parts[3].isdecimal() else parts[3]
        return fields


class KaldiReader:
    """One data folder. Its lists are read when rows are first asked for."""

    def __init__(self, folder: str, names: list[str]) -> None:
        self._folder = folder
        self._there = [name for name in _LISTS if name in names]
        self.path = source.join(folder, "segments" if "segments" in names else "wav.scp")
        self.files: tuple[str, ...] = tuple(source.join(folder, name) for name in self._there)
        self._lists: _Lists | None = None

    @property
    def known_rows(self) -> int:
        """Number of utterances."""
        return len(self._opened())

    rows = known_rows

    def batches(self, start: int, stop: int | None = None) -> Iterator[RowBatch]:
        """Utterances `start` to `stop` (from 0), in order."""
        lists = self._opened()
        stop = len(lists) if stop is None else min(stop, len(lists))
        for first in range(start, stop, BATCH_ROWS):
            yield KaldiBatch(self.path, [lists.entry(i) for i in range(first, min(first + BATCH_ROWS, stop))])

    def _read(self, name: str) -> Iterator[tuple[int, str, str]]:
        """(number of the line, key, value) of a list."""
        path = source.join(self._folder, name)
        with source.open_binary(path, sequential=True) as handle:
            for number, line in enumerate(handle, 1):
                if number == 1 and (reason := recognised(line)):
                    raise InputError(f"input {path} is not a list of Kaldi: {reason}")
                try:
                    parts = line.decode("utf-8").split(maxsplit=1)
                except UnicodeDecodeError as error:
                    raise InputError(f"input {path} line {number} is not UTF-8: {error}; convert it") from error
                if parts:
                    yield number, parts[0], parts[1].strip() if len(parts) > 1 else ""

    def _add(self, name: str, number: int, key: str, value: str, to: dict[str, str]) -> None:
        if key in to:
            path = source.join(self._folder, name)
            raise InputError(f"input {path} line {number}: {key} is there twice; leave one of them")
        to[key] = value

    def _opened(self) -> _Lists:
        if self._lists is None:
            recordings: dict[str, str] = {}
            for number, key, value in self._read("wav.scp"):
                self._add("wav.scp", number, key, self._recording(key, number, value), recordings)
            segments: dict[str, str] | None = None
            if "segments" in self._there:
                segments = {}
                for number, key, value in self._read("segments"):
                    self._add("segments", number, key, value, segments)
            known = {key: key for key in (recordings if segments is None else segments)}
            values: dict[str, dict[str, str]] = {}
            orphans: list[tuple[str, int, str]] = []
            orphan_keys: set[str] = set()
            for name in (name for name in self._there if name in _FIELDS):
                values[name] = {}
                for number, key, value in self._read(name):
                    if key in known:
                        # One text for the same key and speaker: there are many utterances.
                        self._add(name, number, known[key], sys.intern(value), values[name])
                    elif key not in orphan_keys:
                        orphan_keys.add(key)
                        orphans.append((name, number, key))
            lists = _Lists(recordings, segments, values, orphans, base_of(self._folder, recordings.values()))
            if not len(lists):
                raise InputError(f"input {self.path} holds no rows; recreate it, or leave it out")
            self._lists = lists
        return self._lists

    def _recording(self, key: str, number: int, value: str) -> str:
        where = f"input {source.join(self._folder, 'wav.scp')} line {number}: recording {key}"
        if value.endswith("|") or value.startswith("|"):
            raise InputError(
                f"{where} is the output of a command ({value if len(value) <= 60 else value[:57] + '...'}), and none "
                "is run here; write its output to a file and name that (a .flac, .mp3 or .sph that it only decodes can "
                "be named itself)"
            )
        if _ARCHIVE_ENTRY.fullmatch(value):
            raise InputError(
                f"{where} lies in an archive of Kaldi ({value}), which is not read; write the recordings as files: "
                "wav-copy scp:wav.scp, or ESPnet's format_wav_scp.sh"
            )
        if not value or value == "-":
            raise InputError(f"{where} has no path; name its file")
        return value


def _seconds(text: str) -> float | str:
    """A time; what is none stays a text, which the checks of fields then refuse by name."""
    try:
        return float(text)
    except ValueError:
        return text


def is_kaldi(names: list[str]) -> bool:
    """Whether a folder with these files is a data folder of Kaldi."""
    return "wav.scp" in names
