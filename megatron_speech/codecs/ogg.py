"""Ogg files as their links: Vorbis and Opus streams one behind the other, of which decoders read the first only.

Format: RFC 3533. A page says which stream (serial number) it is of and whether it is that stream's first or last.
"""

from __future__ import annotations

import struct
import zlib

from megatron_speech.codecs.containers import AudioError, breaks_off

_FIRST, _LAST = 2, 4
_AUDIO = (b"\x01vorbis", b"OpusHead", b"\x7fFLAC", b"Speex   ")


def split_links(data: bytes, path: object) -> list[tuple[int, int]]:
    """(first byte, byte behind the last) of each link of an Ogg file, in order.

    Raises:
        AudioError: unreadable: a page is cut, damaged or missing, the last page of a stream of sound is not there, or
            two streams of sound are interleaved.
    """
    starts: list[int] = []
    numbers: dict[int, int] = {}  # of the last page of each stream of the link
    open_streams: dict[int, bool] = {}  # serial → whether it is sound; those of the link that have not ended
    sounds = 0
    heading = False
    position = 0
    while position < len(data):
        if data[position : position + 4] != b"OggS":
            if not data[position:].strip(b"\0"):
                break  # padding
            _refuse_junk(data, position, path)
        segments = data[position + 26] if position + 27 <= len(data) else 0
        body = position + 27 + segments
        end = body + sum(data[position + 27 : body])
        if position + 27 > len(data) or end > len(data):
            raise breaks_off(path, f"{len(data)} bytes, within a page of Ogg,", "a stream without its last page")
        flags, granule, serial, number, checksum = struct.unpack_from("<xBqIII", data, position + 4)
        if _checksum(data[position : position + 22] + bytes(4) + data[position + 26 : end]) != checksum:
            raise AudioError(
                "unreadable", f"{path} is damaged: the checksum of the page at byte {position} is wrong; copy it again"
            )
        if flags & _FIRST:
            if not heading:
                _require_end(open_streams, path, position)
                starts.append(position)
                numbers.clear()
                open_streams.clear()
                sounds = 0
            is_sound = data[body:end].startswith(_AUDIO)
            sounds += is_sound
            if sounds > 1:
                raise AudioError(
                    "unreadable", f"{path} holds several streams of sound at once; extract the one that is meant"
                )
            open_streams[serial] = is_sound
        elif not starts:
            raise AudioError("unreadable", f"{path} begins in the middle of a stream of Ogg; copy it from its start")
        # A stream that was joined late (a radio's) begins anywhere, but goes on without a gap.
        elif serial in numbers and number != numbers[serial] + 1 and granule != 0 and numbers[serial] > 2:
            raise AudioError(
                "unreadable",
                f"{path} lacks the pages {numbers[serial] + 1} to {number - 1} of its stream; copy it again",
            )
        heading = bool(flags & _FIRST)
        numbers[serial] = number
        if flags & _LAST:
            open_streams.pop(serial, None)
        position = end
    _require_end(open_streams, path, len(data))
    return list(zip(starts, [*starts[1:], len(data)], strict=True))


def _checksum(page: bytes) -> int:
    """CRC-32 of a page: zlib's polynomial, but with the bits in the other order and without its inversions."""
    crc = zlib.crc32(page.translate(_REVERSED), 0xFFFF_FFFF) ^ 0xFFFF_FFFF
    return int.from_bytes(crc.to_bytes(4, "little").translate(_REVERSED), "big")


_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _require_end(open_streams: dict[int, bool], path: object, position: int) -> None:
    if any(open_streams.values()):
        raise AudioError(
            "unreadable",
            f"{path} breaks off at byte {position}: the last page of its stream is missing; copy it again, or, if it "
            "is all that was recorded, rewrite it (ffmpeg -i OLD -c copy NEW)",
        )


def _refuse_junk(data: bytes, position: int, path: object) -> None:
    raise AudioError("unreadable", f"{path} is damaged: byte {position} does not begin a page of Ogg; copy it again")
