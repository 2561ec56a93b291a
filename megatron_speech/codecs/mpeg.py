"""MPEG audio (MP3) as its frames, counted: what players and libsndfile give as its length is often an estimate.

Without the tag that an encoder puts in front (Xing, Info or VBRI), libsndfile takes the first frame's bit rate for that
of all and stops at the length that follows. Files that were joined byte by byte stop at the length of the first. Here
every frame is found, and each part is given to libsndfile with a tag that says how many there are.

Formats: ISO/IEC 11172-3 and 13818-3 (frame header); the Xing, LAME and VBRI tags as mpg123 and LAME read them.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from megatron_speech.codecs.containers import AudioError, breaks_off, id3_size

_BIT_RATES = {  # kbit/s by (version 1 or 2, layer)
    (1, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (1, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (2, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_SAMPLE_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}  # by version bits
# Bytes that may precede the first frame, such as the rest of a frame where a stream was joined.
_LEADING_JUNK = 1 << 16
_TAG = re.compile(b"Xing|Info|VBRI")
# Samples by which mpg123, libsndfile's decoder, lags behind the frames; it takes them away where there is a tag.
DECODER_DELAY = 529
# mpg123 adds in another order from frame to frame; begun a multiple of these frames on, it rounds as it would have.
_ROUNDING_CYCLE = 8
# Frames behind which a decoder that began anywhere is where one is that began at the start.
_WARM_UP_FRAMES = 3


@dataclass(frozen=True)
class FrameKind:
    """What frames of one stream have in common."""

    layer: int
    sample_rate_hz: int
    samples: int  # per frame
    channels: int


@dataclass(frozen=True)
class MpegPart:
    """A run of frames of one kind, with the tag of its encoder if it has one.

    Attributes:
        kind: of all its frames.
        frames: byte offset of each frame that holds sound, and the byte behind the last.
        tag: (first byte, byte behind the last) of the frame that holds the tag; None: there is none, or one that
            libsndfile does not read.
        tag_frames: how many frames the tag announces; None: it does not say.
        delays: samples that the encoder added in front and at the end, as LAME's tag says.
    """

    kind: FrameKind
    frames: list[int]
    tag: tuple[int, int] | None
    tag_frames: int | None
    delays: tuple[int, int] = (0, 0)

    @property
    def frame_count(self) -> int:
        """Frames that hold sound."""
        return len(self.frames) - 1

    @property
    def skipped(self) -> tuple[int, int]:
        """Samples that a decoder takes away at the start and the end, by the tag and by its own delay."""
        delay, padding = self.delays
        return delay + DECODER_DELAY, max(padding - DECODER_DELAY, 0)

    def content(self, data: bytes) -> bytes:
        """A file of this part alone, whose tag says how many frames it has."""
        sound = data[self.frames[0] : self.frames[-1]]
        if self.kind.layer != 3:  # no tags, and one bit rate for all frames
            return sound
        if self.tag is None:
            return _xing_frame(data, self.frames[0], self.kind, self.frame_count) + sound
        tag = bytearray(data[self.tag[0] : self.tag[1]])
        if self.tag_frames != self.frame_count:
            at = max(tag.find(b"Xing"), tag.find(b"Info")) + 8
            tag[at : at + 4] = self.frame_count.to_bytes(4, "big")
        return bytes(tag) + sound

    def content_of(self, data: bytes, start: int, stop: int) -> tuple[bytes, int]:
        """A file of the frames that samples `start` to `stop` of the part need; and how many come before them.

        libsndfile's own search gives silence for the first frames behind it where the bit rate is low: a frame may
        begin in the bytes of up to 511 before it, which are those of many frames then. Here the frames that hold
        these bytes are given too, their sound taken out of them.
        """
        samples, skip = self.kind.samples, self.skipped[0]
        first, last = (skip + start) // samples, min(-(-(skip + stop) // samples), self.frame_count)
        heard = first - _WARM_UP_FRAMES
        begin = heard
        reservoir = 0
        limit = 511 if samples == 1152 else 255
        while begin > 0 and reservoir < limit:
            begin -= 1
            reservoir += self.frames[begin + 1] - self.frames[begin] - self._side_info(data, begin)[1]
        begin -= begin % _ROUNDING_CYCLE
        if begin <= 0:
            begin = heard = 0
        sound = bytearray(data[self.frames[begin] : self.frames[last]])
        reservoir = 0
        for frame in range(begin, heard):
            at, end = self._side_info(data, frame)
            size = end - at
            # The only field that is not 0: how many bytes before it the frame begins.
            value = min(reservoir, limit) << (8 * size - limit.bit_length())
            at += self.frames[frame] - self.frames[begin]
            sound[at : at + size] = value.to_bytes(size, "big")
            reservoir += self.frames[frame + 1] - self.frames[frame] - end
        tag = _xing_frame(data, self.frames[0], self.kind, last - begin)
        return tag + bytes(sound), skip + start - begin * samples - DECODER_DELAY

    def _side_info(self, data: bytes, frame: int) -> tuple[int, int]:
        """(where the side information of a frame begins, where it ends), in bytes from the frame's first."""
        at = 4 if data[self.frames[frame] + 1] & 1 else 6  # behind the header and its checksum
        return at, at + _side_bytes(self.kind)


def _side_bytes(kind: FrameKind) -> int:
    if kind.samples == 1152:
        return 17 if kind.channels == 1 else 32
    return 9 if kind.channels == 1 else 17


@functools.cache
def _frame_table() -> list[tuple[int, FrameKind] | None]:
    """(bytes, kind) by bytes 1 and 2 of a frame's header (16 bits), without channels; None: no frame begins so."""
    table: list[tuple[int, FrameKind] | None] = [None] * (1 << 16)
    for bits in range(0xE000, 1 << 16):
        version, layer = bits >> 11 & 3, 4 - (bits >> 9 & 3)
        rate_code, bit_rate_code, padding = bits >> 2 & 3, bits >> 4 & 15, bits >> 1 & 1
        if version == 1 or layer == 4 or rate_code == 3 or bit_rate_code in (0, 15):
            continue
        rate = _SAMPLE_RATES[version][rate_code]
        bit_rate = 1000 * _BIT_RATES[1 if version == 3 else 2, layer][bit_rate_code]
        samples = 384 if layer == 1 else 576 if layer == 3 and version != 3 else 1152
        size = (12 * bit_rate // rate + padding) * 4 if layer == 1 else samples // 8 * bit_rate // rate + padding
        table[bits] = size, FrameKind(layer, rate, samples, 0)
    return table


def split_parts(data: bytes, path: object) -> list[MpegPart]:
    """The parts of an MPEG audio file, in order: several where files were joined.

    Raises:
        AudioError: unreadable: there are no frames, the last is cut, some are missing, or bytes between them are of
            none.
    """
    table = _frame_table()
    parts: list[MpegPart] = []
    run: list[int] = []  # offsets of the frames of the part that is being read
    kind: tuple[FrameKind, int] | None = None  # without channels, and the channels
    ends = position = 0
    tag: tuple[int, int] | None = None
    announced: int | None = None
    delays = (0, 0)
    tags = sorted((match.start() for match in _TAG.finditer(data)), reverse=True)  # or what looks like one

    def close() -> None:
        nonlocal run, tag, announced, delays, kind
        if kind is not None and (run or announced):
            found = len(run)
            if announced is not None and found < announced:
                raise breaks_off(path, f"{found} frames of MPEG audio", str(announced))
            if run:
                base, channels = kind
                exact = FrameKind(base.layer, base.sample_rate_hz, base.samples, channels)
                parts.append(MpegPart(exact, [*run, ends], tag, announced, delays))
        run, tag, announced, delays, kind = [], None, None, (0, 0), None

    while True:
        while position + 4 <= len(data) and data[position] == 0xFF:
            entry = table[data[position + 1] << 8 | data[position + 2]]
            if entry is None:
                break
            size, base = entry
            end = position + size
            if end > len(data):
                raise breaks_off(path, f"{len(data)} bytes, within a frame of MPEG audio,", f"at least {end}")
            channels = 1 if data[position + 3] >> 6 == 3 else 2
            if kind is None or (base is not kind[0] and base != kind[0]) or channels != kind[1]:
                close()
                kind = base, channels
            while tags and tags[-1] < position:
                tags.pop()
            if tags and tags[-1] < end and base.layer == 3 and (found := _read_tag(data, position, end)) is not None:
                close()
                kind = base, channels
                tag, announced, delays = found
            else:
                # A part ends where its tag says, if frames without a tag follow. Encoders differ by one or two in
                # what they count.
                if announced is not None and len(run) == announced and _many_follow(data, position, table):
                    close()
                    kind = base, channels
                run.append(position)
                ends = end
            position = end
        position, is_boundary = _skip_foreign(data, position, table, path, started=bool(run or parts or tag))
        if position >= len(data):
            break
        if is_boundary:
            close()
    close()
    if not parts:
        raise AudioError("unreadable", f"{path} cannot be read as audio: it holds no frame of MPEG audio")
    return parts


def _read_tag(data: bytes, start: int, end: int) -> tuple[tuple[int, int] | None, int | None, tuple[int, int]] | None:
    """(where the tag is that libsndfile reads, frames and delays that it announces); None: the frame is sound."""
    frame = data[start:end]
    if (at := frame.find(b"VBRI", 36, 40)) >= 0:
        return None, int.from_bytes(frame[at + 14 : at + 18], "big") or None, (0, 0)
    at = max(frame.find(b"Xing", 13, 44), frame.find(b"Info", 13, 44))
    if at < 0:
        return None
    flags = int.from_bytes(frame[at + 4 : at + 8], "big")
    count = int.from_bytes(frame[at + 8 : at + 12], "big") if flags & 1 else 0
    if not count:
        return None, None, (0, 0)
    lame = at + 8 + 4 * (flags & 1) + 4 * (flags >> 1 & 1) + 100 * (flags >> 2 & 1) + 4 * (flags >> 3 & 1)
    has_delays = len(frame) >= lame + 24 and frame[lame] != 0  # an encoder that leaves its name empty tells nothing
    delays = int.from_bytes(frame[lame + 21 : lame + 24], "big") if has_delays else 0
    return (start, end), count, (delays >> 12, delays & 0xFFF)


def _many_follow(data: bytes, position: int, table: list[tuple[int, FrameKind] | None]) -> bool:
    """Whether more than two frames lie from `position` on."""
    for _ in range(3):
        entry = _entry_at(data, position, table)
        if entry is None:
            return False
        position += entry[0]
    return True


def _entry_at(data: bytes, position: int, table: list[tuple[int, FrameKind] | None]) -> tuple[int, FrameKind] | None:
    if position + 4 > len(data) or data[position] != 0xFF:
        return None
    return table[data[position + 1] << 8 | data[position + 2]]


def _skip_foreign(
    data: bytes, position: int, table: list[tuple[int, FrameKind] | None], path: object, *, started: bool
) -> tuple[int, bool]:
    """(where frames or the end come next, whether what was skipped stands between two recordings)."""
    boundary = False
    while position < len(data):
        head = data[position : position + 32]
        if size := id3_size(head):
            position, boundary = position + size, started
        elif head.startswith(b"TAG"):
            position, boundary = position + 128, started
        elif head.startswith(b"APETAGEX") and len(head) == 32:
            length = int.from_bytes(head[12:16], "little")
            is_header = head[23] & 0x20  # else the tag's end, whose beginning had no header of its own
            position, boundary = position + (length + 32 if is_header else 32), started
        elif head.startswith(b"LYRICSBEGIN") and (at := data.find(b"LYRICS200", position)) >= 0:
            position, boundary = at + 9, started
        elif head[0] == 0 and (padding := _zeros(data, position)):
            position += padding
        elif _entry_at(data, position, table) is not None:
            return position, boundary
        elif not started and (at := _first_frame(data, position, table)) >= 0:
            return at, False
        elif not started:
            raise AudioError("unreadable", f"{path} cannot be read as audio: it holds no frame of MPEG audio")
        elif len(data) - position < 4 or (_first_frame(data, position, table) < 0 and _is_text(data[position:])):
            return len(data), boundary  # a tag of another kind
        else:
            raise AudioError(
                "unreadable",
                f"{path} is damaged: byte {position} does not begin a frame of MPEG audio; copy it again, or, if it "
                "sounds whole, convert it (ffmpeg -i OLD NEW.flac)",
            )
    return len(data), boundary


def _is_text(data: bytes) -> bool:
    return len(data) < _LEADING_JUNK and data[:4].isalnum()


def _zeros(data: bytes, position: int) -> int:
    """Zero bytes from `position` on."""
    block = data[position : position + _LEADING_JUNK]
    return len(block) - len(block.lstrip(b"\0"))


def _first_frame(data: bytes, position: int, table: list[tuple[int, FrameKind] | None]) -> int:
    """Offset, at most 64 KiB on, of a frame that another of its kind follows; -1: there is none."""
    limit = min(len(data), position + _LEADING_JUNK)
    while 0 <= (position := data.find(b"\xff", position, limit)):
        entry = _entry_at(data, position, table)
        if entry is not None:
            following = _entry_at(data, position + entry[0], table)
            if following is not None and following[1] == entry[1]:
                return position
        position += 1
    return -1


def _xing_frame(data: bytes, first: int, kind: FrameKind, count: int) -> bytes:
    """A frame that holds a Xing tag of `count` frames, of the kind of the frame at `first`."""
    head = bytearray(data[first : first + 4])
    head[1] |= 1  # no checksum
    head[2] = head[2] & 0x0C | 0x90  # 128 or 80 kbit/s, without padding: room for the tag at any sample rate
    size = (_frame_table()[head[1] << 8 | head[2]] or (0,))[0]
    side = _side_bytes(kind)
    frame = bytearray(size)
    frame[:4] = head
    frame[4 + side : 4 + side + 12] = b"Xing" + (1).to_bytes(4, "big") + count.to_bytes(4, "big")
    return bytes(frame)
