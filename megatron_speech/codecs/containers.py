"""What the container of a recording says of its own length, so that one that breaks off is never taken for whole.

libsndfile reads what is there of a file that breaks off, without a word. Every container announces its length
somewhere: a size in front of the samples (wav, RF64, W64, AIFF, AU, CAF, NIST, MP4), a count of samples or a checksum
(FLAC), or a mark on the last piece (Ogg, MPEG: see ogg.py and mpeg.py). Programs that write into a pipe cannot go back
to put the size in, and leave 0 or the largest number there is: such a recording reaches to the end of the file.
"""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass
from typing import BinaryIO

from megatron_speech.errors import InputError

# Sizes from here on are not sizes of a 32-bit container, but what a program writes that does not know the size.
_UNKNOWN_32_BIT = 0x7F00_0000
_UNKNOWN_64_BIT = 1 << 60


class AudioError(InputError):
    """A recording that cannot be used; `reason` is a short name to count by."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[AudioError], tuple[str, str]]:
        """Both arguments, so that the error survives the way back from a worker process."""
        return type(self), (self.reason, str(self))


def breaks_off(path: object, found: str, announced: str) -> AudioError:
    """The error of a file that is shorter than it says."""
    return AudioError("unreadable", f"{path} breaks off after {found} of {announced}; copy it again")


@dataclass(frozen=True)
class _Samples:
    """Where the samples of a file lie.

    Attributes:
        start: their first byte.
        announced: bytes of them, as the header says; 0 where it says nothing; None: a number that says "unknown".
        field: (position, bytes, byte order) of that number; None where it is not one number.
        extra: bytes that the number counts beside those from `start` on.
    """

    start: int
    announced: int | None
    field: tuple[int, int, str] | None
    extra: int = 0

    @classmethod
    def of(cls, start: int, number: int, field: tuple[int, int, str], extra: int = 0) -> _Samples:
        """From the number in the header."""
        unknown = _UNKNOWN_32_BIT if field[1] == 4 else _UNKNOWN_64_BIT
        return cls(start, None if number >= unknown else max(number - extra, 0), field, extra)


def kind_of(head: bytes) -> str | None:
    """The container that a file's first 64 bytes (behind an ID3 tag) are of; None: of none of those known here."""
    four = head[:4]
    if four in (b"RIFF", b"RIFX", b"RF64", b"BW64") and head[8:12] == b"WAVE":
        return "wav"
    if four == b"riff" and head[24:28] == b"wave":
        return "w64"
    if four == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return "aiff"
    known = {
        b".snd": "au", b"dns.": "au", b"NIST": "nist", b"caff": "caf", b"fLaC": "flac", b"OggS": "ogg",
        b"\x1a\x45\xdf\xa3": "matroska", b"\x30\x26\xb2\x75": "asf",
    }  # fmt: skip
    if four in known:
        return known[four]
    if head[4:8] == b"ftyp":
        return "mp4"
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0:
        return "aac" if head[1] & 0xF6 == 0xF0 else "mpeg"
    return None


def id3_size(head: bytes) -> int:
    """Bytes of the ID3v2 tag that `head` (10 bytes or more) begins with; 0 where it begins with none."""
    if len(head) < 10 or head[:3] != b"ID3" or max(head[6:10]) > 127:
        return 0
    size = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
    return 10 + size + (10 if head[5] & 0x10 else 0)


def complete(file: BinaryIO, kind: str, path: object) -> bytes | None:
    """Check the announced length of the file; its bytes with the length put in, where libsndfile needs that.

    Args:
        file: the recording.
        kind: of :func:`kind_of`.
        path: its name, for errors.

    Returns:
        None where libsndfile reads the file as it is.

    Raises:
        AudioError: unreadable: it is shorter than it says, or two recordings are joined in one file.
    """
    size = _size_of(file)
    if kind == "flac":
        return _complete_flac(file, size, path)
    if kind in ("mp4", "matroska"):
        (_check_mp4 if kind == "mp4" else _check_matroska)(file, size, path)
        return None
    if kind not in _WALKS:
        return None
    samples = _WALKS[kind](file, size)
    if samples is None and kind == "nist":  # of a compressed kind
        return None
    if samples is None:
        raise AudioError("unreadable", f"{path} breaks off within its header, after {size} bytes; copy it again")
    found = size - samples.start
    if samples.announced:
        if found < samples.announced:
            raise breaks_off(path, f"{found} bytes of audio", f"{samples.announced}")
        if found > samples.announced:
            _refuse_second(file, kind, samples.start + samples.announced, path)
        return None
    if samples.field is None or (samples.announced is None and kind not in ("caf", "w64")):
        return None  # libsndfile reads on to the end of the file
    if samples.announced == 0 and not _is_streamed(file, samples.start, found):
        return None
    position, width, order = samples.field
    file.seek(0)
    data = bytearray(file.read())
    value = min(found + samples.extra, (1 << 8 * width) - 1)
    data[position : position + width] = value.to_bytes(width, "little" if order == "<" else "big")
    return bytes(data)


def _size_of(file: BinaryIO) -> int:
    """Bytes of the file; of a local one without moving in it, which would empty its buffer."""
    try:
        return os.fstat(file.fileno()).st_size
    except OSError:  # bytes in memory
        return file.seek(0, os.SEEK_END)


def samples_of(file: BinaryIO, kind: str) -> bytes:
    """The bytes of the samples themselves, of a file that :func:`complete` found whole."""
    size = _size_of(file)
    samples = _WALKS[kind](file, size)
    assert samples is not None, "libsndfile found samples where there are none"
    file.seek(samples.start)
    return file.read(samples.announced or -1)


def _is_streamed(file: BinaryIO, start: int, found: int) -> bool:
    """Whether what follows a size of 0 is samples: else it is nothing, or another chunk."""
    if found < 8:
        return found > 0
    file.seek(start)
    name, size = struct.unpack("<4sI", file.read(8))
    return not (name.isalnum() or name.strip().isalnum()) or size > found - 8


def _refuse_second(file: BinaryIO, kind: str, end: int, path: object) -> None:
    """Files that were joined byte by byte: all readers take the first for the whole."""
    if kind not in ("wav", "aiff", "caf", "au"):
        return
    file.seek(end)
    head = file.read(65)
    for shift in (0, 1):  # the byte that pads an odd size may be missing
        if kind_of(head[shift:]) == kind:
            raise AudioError(
                "unreadable",
                f"{path} holds another recording behind the end of the first, at byte {end + shift}: files were "
                "joined byte by byte; cut it there",
            )


def _walk_wav(file: BinaryIO, size: int) -> _Samples | None:
    file.seek(0)
    magic = file.read(4)
    order = ">" if magic == b"RIFX" else "<"
    wide: tuple[int, int] | None = None  # (position, value) of the 64-bit size
    position = 12
    while position + 8 <= size:
        file.seek(position)
        head = file.read(24)
        name, length = struct.unpack(f"{order}4sI", head[:8])
        if name == b"ds64" and len(head) == 24:
            wide = position + 16, struct.unpack("<Q", head[16:24])[0]
        if name == b"data":
            if wide is not None and magic in (b"RF64", b"BW64") and length == 0xFFFF_FFFF:
                return _Samples.of(position + 8, wide[1], (wide[0], 8, "<"))
            return _Samples.of(position + 8, length, (position + 4, 4, order))
        position += 8 + length + length % 2
    return None


def _walk_w64(file: BinaryIO, size: int) -> _Samples | None:
    position = 40
    while position + 24 <= size:
        file.seek(position)
        name, length = struct.unpack("<16sQ", file.read(24))
        if name[:4] == b"data":
            return _Samples.of(position + 24, length, (position + 16, 8, "<"), extra=24)
        if length < 24:
            return None
        position += (length + 7) // 8 * 8
    return None


def _walk_aiff(file: BinaryIO, size: int) -> _Samples | None:
    position = 12
    while position + 8 <= size:
        file.seek(position)
        name, length = struct.unpack(">4sI", file.read(8))
        if name == b"SSND":
            return _Samples.of(position + 16, length, (position + 4, 4, ">"), extra=8)
        position += 8 + length + length % 2
    return None


def _walk_au(file: BinaryIO, size: int) -> _Samples | None:
    file.seek(0)
    head = file.read(12)
    if len(head) < 12:
        return None
    order = ">" if head[:4] == b".snd" else "<"
    start, announced = struct.unpack(f"{order}II", head[4:])
    return _Samples.of(start, announced, (8, 4, order))


def _walk_caf(file: BinaryIO, size: int) -> _Samples | None:
    position = 8
    while position + 12 <= size:
        file.seek(position)
        name, length = struct.unpack(">4sQ", file.read(12))
        if name == b"data":  # the number counts a four-byte count of edits in front of the samples
            return _Samples.of(position + 16, length, (position + 4, 8, ">"), extra=4)
        position += 12 + length
    return None


_NIST_FIELD = re.compile(rb"^(\w+) -i (-?\d+)\s*$", re.MULTILINE)


def _walk_nist(file: BinaryIO, size: int) -> _Samples | None:
    file.seek(0)
    head = file.read(1024)
    fields = {name.decode(): int(value) for name, value in _NIST_FIELD.findall(head)}
    start = head[8:16].strip()
    if not start.isdigit() or (b"sample_coding" in head and b"shorten" in head) or "sample_count" not in fields:
        return None
    frame = fields.get("channel_count", 1) * fields.get("sample_n_bytes", 2)
    return _Samples(int(start), max(fields["sample_count"], 0) * frame, None)


_WALKS = {
    "wav": _walk_wav,
    "w64": _walk_w64,
    "aiff": _walk_aiff,
    "au": _walk_au,
    "caf": _walk_caf,
    "nist": _walk_nist,
}


def _check_mp4(file: BinaryIO, size: int, path: object) -> None:
    position = 0
    while position + 8 <= size:
        file.seek(position)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        if length == 1 and len(head) == 16:
            length = int.from_bytes(head[8:], "big")
        if length == 0:  # up to the end of the file
            return
        if position + length > size:
            raise breaks_off(path, f"{size} bytes", f"{position + length}")
        position += max(length, 8)


def _check_matroska(file: BinaryIO, size: int, path: object) -> None:
    """The segment, which holds all the rest, has a size; one of ones alone is that of a stream (RFC 8794, 6.2)."""
    position = 0
    for identifier in (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"):
        file.seek(position)
        head = file.read(12)
        width = 9 - head[4].bit_length() if len(head) > 4 else 0
        if len(head) < 12 or head[:4] != identifier or not 1 <= width <= 8:
            return  # for PyAV to say
        value = int.from_bytes(head[4 : 4 + width], "big") & ((1 << 7 * width) - 1)
        if value == (1 << 7 * width) - 1:
            return
        position += 4 + width + value
    if position > size:
        raise breaks_off(path, f"{size} bytes", f"{position}")


# ---------------------------------------------------------------------------------------------------- flac


def _complete_flac(file: BinaryIO, size: int, path: object) -> bytes | None:
    """The file with its number of samples, where the header does not have it: counted from the last frame."""
    file.seek(0)
    head = file.read(42)
    if len(head) < 42:
        raise breaks_off(path, f"{size} bytes", "a FLAC header of 42")
    if int.from_bytes(head[21:26], "big") & 0xF_FFFF_FFFF:
        return None  # decoding all of them is the check
    file.seek(0)
    data = bytearray(file.read())
    fixed = int.from_bytes(head[8:10], "big")
    total = _last_flac_sample(data, fixed)
    if total is None:
        raise breaks_off(path, f"{size} bytes, within a frame of FLAC,", "a stream of unknown length")
    data[21:26] = (int.from_bytes(data[21:26], "big") | total).to_bytes(5, "big")
    return bytes(data)


def _last_flac_sample(data: bytearray, fixed: int) -> int | None:
    """Samples up to the end of the last frame, which reaches to the end of `data` by its checksum; None if none does.

    Format: RFC 9639, 9.1 (frame header) and 9.3 (CRC-16 over the whole frame).
    """
    position = len(data)
    while (position := data.rfind(b"\xff", 42, position)) >= 0 and position > len(data) - (1 << 21):
        if len(data) - position < 10 or data[position + 1] & 0xFE != 0xF8:
            continue
        code = data[position + 2] >> 4
        number, cursor = _coded_number(data, position + 4)
        if number is None or code == 0:
            continue
        if code == 6:
            length, cursor = data[cursor] + 1, cursor + 1
        elif code == 7:
            length, cursor = int.from_bytes(data[cursor : cursor + 2], "big") + 1, cursor + 2
        elif code == 1:
            length = 192
        else:
            length = 576 << (code - 2) if code < 6 else 256 << (code - 8)
        cursor += {12: 1, 13: 2, 14: 2}.get(data[position + 2] & 15, 0)
        if cursor >= len(data) or _crc(data[position:cursor], 8, 0x07) != data[cursor]:
            continue
        if _crc(data[position:], 16, 0x8005) != 0:
            return None
        return (number if data[position + 1] & 1 else number * fixed) + length
    return None


def _coded_number(data: bytearray, position: int) -> tuple[int | None, int]:
    """(the number coded as UTF-8 codes its code points, up to 36 bits; the position behind it)."""
    first = data[position]
    if first < 0x80:
        return first, position + 1
    extra = 7 - (first ^ 0xFF).bit_length()
    if not 1 <= extra <= 6 or position + extra >= len(data):
        return None, position
    value = first & ((1 << (6 - extra)) - 1) if extra < 6 else 0
    for byte in data[position + 1 : position + 1 + extra]:
        if byte & 0xC0 != 0x80:
            return None, position
        value = value << 6 | byte & 0x3F
    return value, position + 1 + extra


def _crc(data: bytearray, bits: int, polynomial: int) -> int:
    mask, top = (1 << bits) - 1, bits - 1
    table = []
    for byte in range(256):
        value = byte << (bits - 8)
        for _ in range(8):
            value = (value << 1 ^ (polynomial if value >> top & 1 else 0)) & mask
        table.append(value)
    crc = 0
    for byte in data:
        crc = crc << 8 & mask ^ table[crc >> (bits - 8) ^ byte]
    return crc
