"""Data folders of Kaldi and ESPnet (kaldi-asr.org/doc/data_prep.html): lists of `key value`, one file for each field.

    wav.scp    recording → path of a recording            segments   utterance → recording, start, end (seconds)
    text       utterance → transcript                     utt2spk    utterance → speaker
    utt2lang   utterance → language                       utt2dur    utterance → duration (seconds)

Without `segments` every recording is one utterance. Only `wav.scp` must be there. A path that is a command (`… |`), or
an entry of a Kaldi archive (`X.ark:1234`), is refused: nothing here runs commands. The lists are held in memory, some
500 bytes an utterance.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_speech.errors import InputError
from megatron_speech.preprocess.readers import source
from megatron_speech.preprocess.readers.base import BATCH_ROWS, Row, RowBatch, RowRejected
from megatron_speech.preprocess.readers.recognise import recognised
from megatron_speech.remote import is_url

_FIELDS = {"text": "transcript", "utt2spk": "speaker_id", "utt2lang": "language", "utt2dur": "duration"}
_LISTS = ("wav.scp", "segments", *_FIELDS)
_ARCHIVE_ENTRY = re.compile(r".+\.ark:\d+(\[.*\])?")


class _Entry(NamedTuple):
    """One utterance: the line that names it, its fields or why there are none."""

    number: int
    fields: dict[str, Any]
    rejected: RowRejected | None


@dataclass(frozen=True)
class KaldiBatch:
    """Some utterances."""

    path: str
    entries: list[_Entry]

    @property
    def rows(self) -> int:
        """Number of utterances."""
        return len(self.entries)

    def read(self) -> list[Row]:
        """The rows."""
        return [Row(entry.number, dict(entry.fields), entry.rejected) for entry in self.entries]


class KaldiReader:
    """One data folder. Its lists are read when rows are first asked for."""

    def __init__(self, folder: str, names: list[str]) -> None:
        self._folder = folder
        self._there = [name for name in _LISTS if name in names]
        self.path = source.join(folder, "segments" if "segments" in names else "wav.scp")
        self.files: tuple[str, ...] = tuple(source.join(folder, name) for name in self._there)
        self._entries: list[_Entry] | None = None

    @property
    def known_rows(self) -> int:
        """Number of utterances."""
        return len(self._opened())

    rows = known_rows

    def batches(self, start: int, stop: int | None = None) -> Iterator[RowBatch]:
        """Utterances `start` to `stop` (from 0), in order."""
        entries = self._opened()
        stop = len(entries) if stop is None else min(stop, len(entries))
        for first in range(start, stop, BATCH_ROWS):
            yield KaldiBatch(self.path, entries[first : min(first + BATCH_ROWS, stop)])

    def _read(self, name: str) -> dict[str, tuple[int, str]]:
        """Key → (number of the line, value) of a list."""
        path = source.join(self._folder, name)
        result: dict[str, tuple[int, str]] = {}
        with source.open_binary(path, sequential=True) as handle:
            for number, line in enumerate(handle, 1):
                if number == 1 and (reason := recognised(line)):
                    raise InputError(f"input {path} is not a list of Kaldi: {reason}")
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise InputError(f"input {path} line {number} is not UTF-8: {error}; convert it") from error
                parts = text.split(maxsplit=1)
                if not parts:
                    continue
                key = parts[0]
                if key in result:
                    raise InputError(f"input {path} line {number}: {key} is there twice; leave one of them")
                result[key] = number, parts[1].strip() if len(parts) > 1 else ""
        return result

    def _opened(self) -> list[_Entry]:
        if self._entries is None:
            lists = {name: self._read(name) for name in self._there}
            recordings = {key: self._recording(key, *entry) for key, entry in lists.pop("wav.scp").items()}
            segments = lists.pop("segments", None)
            base = _base(self._folder, list(recordings.values()))
            if segments is None:
                entries = [
                    _Entry(i, {"sample_id": key, "source_id": key, "wav_path": base + path}, None)
                    for i, (key, path) in enumerate(recordings.items(), 1)
                ]
            else:
                entries = [_segment(key, *entry, recordings, base) for key, entry in segments.items()]
            known = {str(entry.fields["sample_id"]): entry for entry in entries}
            for name, values in lists.items():
                for key, (number, value) in values.items():
                    entry = known.get(key)
                    if entry is None:
                        where = "segments" if segments is not None else "wav.scp"
                        reason = f"{name} line {number}: utterance {key} is not in {where}"
                        known[key] = entry = _Entry(number, {"sample_id": key}, RowRejected("kaldi_key", reason))
                        entries.append(entry)
                    if value:
                        entry.fields[_FIELDS[name]] = _seconds(value) if name == "utt2dur" else value
            if not entries:
                raise InputError(f"input {self.path} holds no rows; recreate it, or leave it out")
            self._entries = entries
        return self._entries

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


def _base(folder: str, paths: list[str]) -> str:
    """What stands before relative paths. Kaldi's are of the folder in which its commands run; often that is this."""
    relative = next((path for path in paths if not os.path.isabs(path) and not is_url(path)), None)
    if relative is None or is_url(folder) or os.path.exists(os.path.join(folder, relative)):
        return ""
    return os.path.join(os.getcwd(), "") if os.path.exists(relative) else ""


def _segment(key: str, number: int, value: str, recordings: dict[str, str], base: str) -> _Entry:
    """`recording start end [channel]` as an utterance; an end of -1 is that of the recording."""
    parts = value.split()
    fields: dict[str, Any] = {"sample_id": key}
    if len(parts) not in (3, 4):
        reason = f"segments line {number}: {key} has {len(parts)} values, needed recording, start and end"
        return _Entry(number, fields, RowRejected("bad_line", reason))
    path = recordings.get(parts[0])
    if path is None:
        reason = f"segments line {number}: recording {parts[0]} of {key} is not in wav.scp"
        return _Entry(number, fields, RowRejected("kaldi_key", reason))
    start, end = _seconds(parts[1]), _seconds(parts[2])
    fields |= {"source_id": parts[0], "wav_path": base + path, "start_time": start}
    if end != -1:
        fields["end_time"] = end
    if len(parts) == 4:
        fields["channel"] = int(parts[3]) if parts[3].isdecimal() else parts[3]
    return _Entry(number, fields, None)


def _seconds(text: str) -> float | str:
    """A time; what is none stays a text, which the checks of fields then refuse by name."""
    try:
        return float(text)
    except ValueError:
        return text


def is_kaldi(names: list[str]) -> bool:
    """Whether a folder with these files is a data folder of Kaldi."""
    return "wav.scp" in names
