"""What a frozen audio codec offers to the rest of the project."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

from megatron_speech.errors import InputError
from megatron_speech.tokens.space import CodecDescription


@runtime_checkable
class Codec(Protocol):
    """Audio to a grid of codes `[T, K]` and back: T frames in time, K codebooks per frame.

    A codec of another package registers a class without constructor arguments under the entry-point group
    `megatron_speech.codecs`; its name there is what `--codec` takes.

    Attributes:
        name: what users call it.
        hash: SHA-256 (hex) over everything that decides the codes: weights or library version, mode, layout,
            preprocessing. Two codecs with one hash give the same codes for the same audio.
        sample_rate_hz: of the audio that `encode` takes and `decode` gives, mono.
        frame_rate_hz: frames per second of audio.
        codebook_names, codebook_sizes: K of each; a code of codebook k is in [0, codebook_sizes[k]).
    """

    name: str
    sample_rate_hz: int
    frame_rate_hz: float
    codebook_names: tuple[str, ...]
    codebook_sizes: tuple[int, ...]

    @property
    def hash(self) -> str:
        """SHA-256, 64 hex digits; may raise InputError where what the codec needs is not installed."""
        ...

    def encode(self, audio: np.ndarray, *, gain: float = 1.0) -> np.ndarray:
        """Codes int32 [T, K] of `audio`, float [n], mono, at `sample_rate_hz`, nominally in [-1, 1].

        Deterministic. `gain` is a linear factor applied after any level normalisation of the codec's own, so that
        augmentation by level is not undone by it.

        Raises:
            InputError: the audio is empty, not one-dimensional or not finite.
        """
        ...

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Audio float32 [n] at `sample_rate_hz` of `codes`, an integer array [T, K].

        Raises:
            InputError: the array has another shape or type, or a code lies outside its codebook.
        """
        ...

    def describe(self) -> CodecDescription:
        """Name, hash, rates and codebooks, for token spaces and manifests."""
        ...


def check_audio(audio: np.ndarray) -> None:
    """Refuse what no codec can encode.

    Raises:
        InputError: `audio` is not a non-empty, one-dimensional, finite floating-point array.
    """
    if audio.ndim != 1 or not np.issubdtype(audio.dtype, np.floating):
        raise InputError(
            f"audio is an array of shape {list(audio.shape)} and type {audio.dtype}; "
            "a codec takes one channel of floating-point samples, shape [n]"
        )
    if audio.size == 0:
        raise InputError("audio is empty; a codec needs at least one sample")
    if not np.isfinite(audio).all():
        raise InputError("audio holds NaN or infinite samples; repair or leave out the recording")


def check_codes(codec: Codec | CodecDescription | type[Codec], codes: np.ndarray) -> None:
    """Refuse codes that are not an integer array [T, K] within the codebooks of `codec`.

    Everything that comes from a codec or goes into one passes here: a codec may be another package's.

    Raises:
        InputError: naming the codec, what was found and what is needed; of codes that are outside the first, its frame
            and its codebook.
    """
    names, sizes = codec.codebook_names, codec.codebook_sizes
    needed = f"needed are integers of shape [frames, {len(sizes)}], one column for each of {', '.join(names)}"
    if not isinstance(codes, np.ndarray):
        raise InputError(f"codes of the codec {codec.name!r} are of type {type(codes).__name__}; {needed}, in NumPy")
    if codes.ndim != 2 or codes.shape[1] != len(sizes) or not np.issubdtype(codes.dtype, np.integer):
        raise InputError(
            f"codes of the codec {codec.name!r} are an array of shape {list(codes.shape)} and type {codes.dtype}; "
            f"{needed}"
        )
    outside = (codes < 0) | (codes >= np.asarray(sizes))
    if outside.any():
        frame, column = (int(index) for index in np.argwhere(outside)[0])
        raise InputError(
            f"code {int(codes[frame, column])} at frame {frame} is outside codebook {names[column]!r}, whose codes are "
            f"0..{sizes[column] - 1} in the codec {codec.name!r}"
        )


def encode_checked(codec: Codec, audio: np.ndarray, *, gain: float = 1.0) -> np.ndarray:
    """Codes [T, K] of `audio` (see :meth:`Codec.encode`), at least one frame.

    Raises:
        InputError: the audio cannot be encoded, or the codec gives what are no codes of it.
    """
    codes = codec.encode(audio, gain=gain)
    check_codes(codec, codes)
    if not len(codes):
        raise InputError(f"the codec {codec.name!r} gave no frames for {len(audio)} samples; needed is one or more")
    return codes


def decode_checked(codec: Codec, codes: np.ndarray) -> np.ndarray:
    """Audio float32 [n] of codes [T, K] (see :meth:`Codec.decode`).

    Raises:
        InputError: the codes are not the codec's, or it gives what is no audio.
    """
    check_codes(codec, codes)
    audio = codec.decode(codes)
    is_audio = isinstance(audio, np.ndarray) and audio.ndim == 1 and np.issubdtype(audio.dtype, np.floating)
    if not is_audio or not np.isfinite(audio).all():
        found = (
            f"an array of shape {list(audio.shape)} and type {audio.dtype}{' with NaN or infinity' if is_audio else ''}"
            if isinstance(audio, np.ndarray)
            else f"a {type(audio).__name__}"
        )
        raise InputError(
            f"the codec {codec.name!r} decoded {len(codes)} frames to {found}; needed are finite floating-point "
            "samples of shape [n]"
        )
    return audio.astype(np.float32, copy=False)
