"""Codec2 in its 700C mode as a discrete codec: 25 frames a second, four codebooks, 100 tokens a second.

One frame is 320 samples at 8 kHz (40 ms) and 28 bits, most significant bit first, padded to four bytes:

    vq1 (9) | vq2 (9) | energy (4) | pitch (6; 0 = unvoiced) | 0000

700C is the one mode of Codec2 whose fields are plain binary numbers; all others Gray-code them.
"""

from __future__ import annotations

import functools
import importlib.metadata
import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np

from megatron_speech.codecs.base import check_audio, check_codes
from megatron_speech.errors import InputError
from megatron_speech.files import canonical_json, sha256_hex
from megatron_speech.tokens.space import CodecDescription

MODE = 700
FRAME_SAMPLES = 320
FRAME_BYTES = 4
FIELDS = (("vq1", 9), ("vq2", 9), ("energy", 4), ("pitch", 6))

# Raised whenever `Codec2.encode` would give other codes for the same audio.
PREPROCESSING_VERSION = 1
# int16 peak after normalisation. The energy code spans about 40 dB: at a peak of 16,000 it saturates in one frame of
# nine, at 2,000 soft speech falls below its floor.
PEAK = 8000.0
# A recording whose peak stays below half a step of 16-bit audio is silence: raising it would only raise rounding noise.
SILENCE_PEAK = 0.5 / 32768

_WIDTHS = np.array([bits for _, bits in FIELDS])
# Shift of each field in the frame read as one big-endian 32-bit word.
_SHIFTS = (8 * FRAME_BYTES - np.cumsum(_WIDTHS)).astype(np.uint32)
_MASKS = ((1 << _WIDTHS) - 1).astype(np.uint32)


def unpack_frames(packed: bytes | np.ndarray) -> np.ndarray:
    """Codes int32 [T, 4] of T frames of four bytes each.

    Raises:
        InputError: the length is not a whole number of frames, or padding bits are set.
    """
    data = np.frombuffer(packed, dtype=np.uint8) if isinstance(packed, bytes) else packed
    if data.size % FRAME_BYTES:
        raise InputError(f"{data.size} bytes of Codec2 700C are not a whole number of {FRAME_BYTES}-byte frames")
    words = np.ascontiguousarray(data).reshape(-1).view(">u4").astype(np.uint32)
    if (words & 0xF).any():
        raise InputError("the four padding bits of a Codec2 700C frame are not zero; the bytes are of another mode")
    return ((words[:, None] >> _SHIFTS) & _MASKS).astype(np.int32)


def pack_frames(codes: np.ndarray) -> bytes:
    """The T * 4 bytes of codes [T, 4]; the inverse of :func:`unpack_frames`.

    Raises:
        InputError: a code is outside its codebook.
    """
    check_codes(Codec2, codes)
    words = np.bitwise_or.reduce(codes.astype(np.uint32) << _SHIFTS, axis=1)
    return words.astype(">u4").tobytes()


class Codec2:
    """Codec2 700C (David Rowe's libcodec2 through pycodec2). See :class:`megatron_speech.codecs.base.Codec`."""

    name = "codec2"
    sample_rate_hz = 8000
    frame_rate_hz = sample_rate_hz / FRAME_SAMPLES
    codebook_names = tuple(name for name, _ in FIELDS)
    codebook_sizes = tuple(1 << bits for _, bits in FIELDS)

    @property
    def hash(self) -> str:
        """SHA-256 over the mode, bit layout, preprocessing and the version of the wheel that bundles libcodec2."""
        return _hash()

    def describe(self) -> CodecDescription:
        """The codec in numbers; reads the version of pycodec2 but does not load it."""
        return CodecDescription(
            name=self.name,
            hash=self.hash,
            sample_rate_hz=self.sample_rate_hz,
            frame_rate_hz=self.frame_rate_hz,
            codebook_names=self.codebook_names,
            codebook_sizes=self.codebook_sizes,
        )

    def encode(self, audio: np.ndarray, *, gain: float = 1.0) -> np.ndarray:
        """Codes int32 [n // 320 + 1, 4] of mono `audio`, float [n] at 8 kHz.

        DC is removed, the peak set to about 8,000 of int16, then scaled by `gain` (and clipped at full scale).
        At least one sample and at most 320 of silence are added at the end: the last frame is always whole, and
        always sees the speech die away.

        Raises:
            InputError: the audio is empty, not one-dimensional or not finite.
        """
        check_audio(audio)
        codec = _library().Codec2(MODE)  # state crosses frames: a fresh one for each utterance
        frames = _prepare(audio, gain).reshape(-1, FRAME_SAMPLES)
        # Given several frames, pycodec2 encodes the first and leaves the rest zero without a word.
        return unpack_frames(b"".join(codec.encode(frame) for frame in frames))

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Audio float32 [T * 320] at 8 kHz of integer `codes` [T, 4].

        Two calls in one process differ in the phase of unvoiced sounds: libcodec2 draws it from one random number
        generator of the whole process, which cannot be reset. Compare codes, never samples, or use
        :meth:`decode_isolated`.

        Raises:
            InputError: the shape is another, or a code is outside its codebook.
        """
        packed = pack_frames(codes)
        codec = _library().Codec2(MODE)
        audio = np.empty((len(packed) // FRAME_BYTES, FRAME_SAMPLES), dtype=np.int16)
        for index in range(len(audio)):
            # Like encode: only the first frame of several would be decoded.
            audio[index] = codec.decode(packed[index * FRAME_BYTES : (index + 1) * FRAME_BYTES])
        return audio.reshape(-1).astype(np.float32) / 32768

    def decode_isolated(self, utterances: Iterable[np.ndarray], *, workers: int = 1) -> Iterator[np.ndarray]:
        """Decode each utterance in a process of its own that has decoded nothing before: same codes, same samples.

        Costs some 10 ms per utterance over :meth:`decode`. The caller's main module is imported by the processes,
        so a script calls this below `if __name__ == "__main__":`, as for any use of `multiprocessing`.
        """
        # A forked child inherits the generator's state; the fork server has never decoded: its children are fresh.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["pycodec2", __name__])
        with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as pool:
            yield from pool.map(self.decode, utterances)


def _prepare(audio: np.ndarray, gain: float) -> np.ndarray:
    """int16 [T * 320]: without DC, at the codec's level, padded to T = n // 320 + 1 frames."""
    centred = audio.astype(np.float64) - np.mean(audio, dtype=np.float64)
    peak = float(np.abs(centred).max())
    scale = gain * PEAK / peak if peak >= SILENCE_PEAK else 0.0
    padded = np.zeros((len(audio) // FRAME_SAMPLES + 1) * FRAME_SAMPLES, dtype=np.int16)
    # The library reads the array's memory as it lies; a fresh array is contiguous whatever `audio` was.
    padded[: len(audio)] = np.clip(np.rint(centred * scale), -32768, 32767)
    return padded


@functools.cache
def _library() -> Any:
    try:
        import pycodec2
    except ImportError as error:
        raise InputError(_MISSING.format(f" ({error})")) from error
    return pycodec2


_MISSING = "the codec 'codec2' needs pycodec2, which cannot be loaded here{}; pip install 'megatron-speech[codec2]'"


@functools.cache
def _hash() -> str:
    try:
        version = importlib.metadata.version("pycodec2")
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(_MISSING.format("")) from error
    identity = {
        "codec": Codec2.name,
        "mode": "700C",
        "fields": FIELDS,
        "preprocessing": PREPROCESSING_VERSION,
        "pycodec2": version,
    }
    return sha256_hex(canonical_json(identity))
