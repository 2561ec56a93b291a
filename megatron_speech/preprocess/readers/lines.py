"""Lists of recordings that are lines of text: Common Voice's `.tsv`, and `metadata.csv` as LJSpeech has it.

Common Voice (github.com/common-voice/CorporaCreator writes it: tabs, a header, no quoting):

    client_id  path  sentence  …  locale  …       recordings lie in `clips/` beside the list

LJSpeech (keithito.com/LJ-Speech-Dataset): no header, no quoting; recordings lie in `wavs/` beside the list:

    ID|text|normalised text                       wavs/ID.wav; without the third, the second is what is spoken
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron_speech.errors import InputError
from megatron_speech.preprocess.readers import source
from megatron_speech.preprocess.readers.base import BATCH_BYTES, BATCH_ROWS, Row, RowRejected, StreamReader
from megatron_speech.preprocess.readers.compression import DamagedInput

COMMON_VOICE = ("path", "sentence")  # columns by which its lists are known

_COMMON_VOICE_NAMES = {"sentence": "transcript", "client_id": "speaker_id", "locale": "language"}
_MAX_LINE_BYTES = 16 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_AUDIO_ENDINGS = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a")


@dataclass(frozen=True)
class LinesBatch:
    """Some lines of a list, as they are.

    Attributes:
        path: the list.
        numbers: of the lines, from 1.
        lines: without their ends.
        header: names of the columns; of LJSpeech's list none.
        folder: of the recordings, beside the list; empty: the list's own.
    """

    path: str
    numbers: list[int]
    lines: list[bytes]
    header: tuple[str, ...]
    folder: str

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.lines)

    def part(self, first: int, last: int) -> LinesBatch:
        """Rows `first` to `last` of the batch."""
        return replace(self, numbers=self.numbers[first:last], lines=self.lines[first:last])

    def read(self) -> list[Row]:
        """Parse the lines."""
        parse = self._common_voice if self.header else self._ljspeech
        rows = []
        for number, line in zip(self.numbers, self.lines, strict=True):
            row = Row(number, {})
            try:
                row.fields = parse(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                row.rejected = RowRejected("bad_text", f"the line is not UTF-8: {error}")
            except RowRejected as error:
                row.rejected = error
            rows.append(row)
        return rows

    def _common_voice(self, line: str) -> dict[str, Any]:
        cells = line.split("\t")
        if len(cells) != len(self.header):
            raise RowRejected("bad_line", f"the line has {len(cells)} columns, needed {len(self.header)} as the header")
        cell = dict(zip(self.header, cells, strict=True))
        name = cell.pop("path")
        if not name:
            raise RowRejected("missing_field", "column path is empty")
        fields: dict[str, Any] = {_COMMON_VOICE_NAMES.get(key, key): value for key, value in cell.items() if value}
        base, ending = os.path.splitext(name)
        fields.setdefault("sample_id", os.path.basename(base if ending.lower() in _AUDIO_ENDINGS else name))
        # The first releases name their clips without the ending.
        fields["wav_path"] = self._beside(name if ending.lower() in _AUDIO_ENDINGS else f"{name}.mp3")
        return fields

    def _ljspeech(self, line: str) -> dict[str, Any]:
        cells = line.split("|")
        if not 2 <= len(cells) <= 3 or not cells[0]:
            raise RowRejected(
                "bad_line", f"the line has {len(cells)} columns, needed ID|text or ID|text|normalised text"
            )
        name, raw = cells[0], cells[1]
        fields: dict[str, Any] = {"sample_id": name, "transcript": cells[2] if len(cells) == 3 and cells[2] else raw}
        if fields["transcript"] != raw:
            fields["raw_text"] = raw
        ending = os.path.splitext(name)[1].lower()
        fields["wav_path"] = self._beside(name if ending in _AUDIO_ENDINGS else f"{name}.wav")
        return fields

    def _beside(self, name: str) -> str:
        return source.join(self.folder, name) if self.folder and "/" not in name else name


class LinesReader(StreamReader):
    """One such list."""

    def __init__(self, path: str, *, has_header: bool) -> None:
        super().__init__(path)
        self._has_header = has_header

    def _folder(self) -> str:
        name = "clips" if self._has_header else "wavs"
        return name if source.is_folder(source.join(source.folder(self.path), name)) else ""

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        with source.open_binary(self.path, sequential=True) as handle:
            number = 0
            while line := handle.readline(_MAX_LINE_BYTES):
                number += 1
                if len(line) == _MAX_LINE_BYTES:
                    raise InputError(f"input {self.path} line {number} is longer than {_MAX_LINE_BYTES >> 20} MiB")
                line = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
                yield number, line.rstrip(b"\r\n")

    def _header(self, line: bytes) -> tuple[str, ...]:
        names = tuple(line.decode("utf-8", "replace").split("\t"))
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"input {self.path} has the column {twice!r} twice; leave one of them")
        return names

    def _stream(self) -> Iterator[LinesBatch]:
        header: tuple[str, ...] = ()
        folder, size, done = self._folder(), 0, 0
        numbers: list[int] = []
        lines: list[bytes] = []
        try:
            for number, line in self._lines():
                if self._has_header and number == 1:
                    header = self._header(line)
                    continue
                if not line.strip():
                    continue
                numbers.append(number)
                lines.append(line)
                size += len(line)
                if len(lines) == BATCH_ROWS or size >= BATCH_BYTES:
                    yield LinesBatch(self.path, numbers, lines, header, folder)
                    done += len(lines)
                    numbers, lines, size = [], [], 0
        except DamagedInput as error:
            raise InputError(f"{error}; {done + len(lines):,} rows were read before that; restore the file") from error
        if lines:
            yield LinesBatch(self.path, numbers, lines, header, folder)
        elif not done:
            raise InputError(f"input {self.path} holds no rows; recreate it, or leave it out")


def is_common_voice(head: bytes) -> bool:
    """Whether a `.tsv` that begins with `head` is a list of Common Voice."""
    names = head.removeprefix(_BYTE_ORDER_MARK).split(b"\n", 1)[0].rstrip(b"\r").split(b"\t")
    return all(name.encode() in names for name in COMMON_VOICE)


def is_ljspeech(head: bytes) -> bool:
    """Whether a `.csv` that begins with `head` is a list as LJSpeech has it."""
    cells = head.removeprefix(_BYTE_ORDER_MARK).split(b"\n", 1)[0].split(b"|")
    return 2 <= len(cells) <= 3 and bool(cells[0]) and b"," not in cells[0]
