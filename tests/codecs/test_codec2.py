"""Claims about codecs and Codec2 700C."""

from __future__ import annotations

import builtins
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_speech import codecs
from megatron_speech.codecs import Codec, codec2, describe_codec, get_codec
from megatron_speech.codecs.audio import read_audio
from megatron_speech.codecs.codec2 import Codec2, pack_frames, unpack_frames
from megatron_speech.errors import InputError


@pytest.fixture(scope="module")
def digits(fsdd: Path) -> list[np.ndarray]:
    """Every 150th real recording, at 8 kHz."""
    rows = [json.loads(line) for line in fsdd.read_text().splitlines()[::150]]
    return [read_audio(fsdd.parent / row["wav_path"], 8000) for row in rows]


@pytest.fixture(scope="module")
def codes_of_digits(digits: list[np.ndarray]) -> list[np.ndarray]:
    return [Codec2().encode(audio) for audio in digits]


def test_the_embedded_codec_is_700c_and_satisfies_the_interface() -> None:
    codec = get_codec("codec2")
    assert isinstance(codec, Codec)
    description = describe_codec("codec2")
    assert description.codebook_names == ("vq1", "vq2", "energy", "pitch")
    assert description.codebook_sizes == (512, 512, 16, 64)
    assert (description.sample_rate_hz, description.frame_rate_hz, description.tokens_per_second) == (8000, 25.0, 100.0)
    assert description.hash == codec.hash and len(codec.hash) == 64


def test_encoding_is_deterministic_and_covers_every_sample(
    digits: list[np.ndarray], codes_of_digits: list[np.ndarray]
) -> None:
    codec = Codec2()
    for audio, codes in zip(digits, codes_of_digits, strict=True):
        assert codes.dtype == np.int32
        assert codes.shape == (len(audio) // 320 + 1, 4)
        np.testing.assert_array_equal(codec.encode(audio), codes)


def test_every_frame_is_encoded_not_only_the_first(codes_of_digits: list[np.ndarray]) -> None:
    for codes in codes_of_digits:
        # What pycodec2 leaves behind when given several frames at once is zeros.
        assert codes[1:-1].any(axis=1).all()
        assert len(np.unique(codes, axis=0)) > len(codes) // 2


def test_codes_are_those_of_the_library_given_frame_by_frame(
    digits: list[np.ndarray], codes_of_digits: list[np.ndarray]
) -> None:
    """The reference: samples scaled by hand, bits read one by one."""
    import pycodec2

    audio, codes = digits[0], codes_of_digits[0]
    centred = audio.astype(np.float64) - audio.astype(np.float64).mean()
    samples = np.rint(centred / np.abs(centred).max() * 8000).astype(np.int16)
    samples = np.concatenate([samples, np.zeros(320, np.int16)])
    library = pycodec2.Codec2(700)
    for frame, expected in enumerate(codes):
        packed = library.encode(np.ascontiguousarray(samples[frame * 320 : (frame + 1) * 320]))
        bits = "".join(f"{byte:08b}" for byte in packed)
        assert [int(bits[a:b], 2) for a, b in ((0, 9), (9, 18), (18, 22), (22, 28))] == expected.tolist()


def test_memory_layout_of_the_audio_does_not_matter(digits: list[np.ndarray]) -> None:
    audio = digits[0]
    stereo = np.stack([audio, -audio], axis=1)
    np.testing.assert_array_equal(Codec2().encode(stereo[:, 0]), Codec2().encode(audio))
    np.testing.assert_array_equal(Codec2().encode(audio.astype(np.float64)), Codec2().encode(audio))


def test_level_and_offset_of_the_recording_do_not_matter(digits: list[np.ndarray]) -> None:
    """Powers of two and a half, so that rounding of the input itself plays no part."""
    audio = digits[0].astype(np.float64)
    np.testing.assert_array_equal(Codec2().encode(audio * 0.125 + 0.5), Codec2().encode(audio))


def test_gain_is_applied_after_normalisation(digits: list[np.ndarray]) -> None:
    clean, soft = Codec2().encode(digits[0]), Codec2().encode(digits[0], gain=0.25)
    assert soft[:, 2].mean() < clean[:, 2].mean() - 1  # energy code
    Codec2().encode(digits[0], gain=100.0)  # clips instead of wrapping or failing


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_silence_and_dc_are_encoded_as_silence(value: float) -> None:
    codes = Codec2().encode(np.full(3200, value, dtype=np.float32))
    assert codes.shape == (11, 4)
    np.testing.assert_array_equal(codes, Codec2().encode(np.zeros(3200, dtype=np.float32)))
    assert (codes[:, 3] == 0).all()  # nowhere voiced


@given(st.binary(max_size=400).map(lambda data: data[: len(data) // 4 * 4]))
def test_unpack_then_repack_is_byte_identical(data: bytes) -> None:
    packed = (np.frombuffer(data, dtype=">u4") & 0xFFFFFFF0).astype(">u4").tobytes()
    codes = unpack_frames(packed)
    assert codes.shape == (len(packed) // 4, 4)
    assert pack_frames(codes) == packed


@settings(max_examples=50)
@given(st.lists(st.tuples(*(st.integers(0, size - 1) for size in Codec2.codebook_sizes)), min_size=1, max_size=50))
def test_pack_then_unpack_gives_the_codes_back(rows: list[tuple[int, ...]]) -> None:
    codes = np.array(rows, dtype=np.int32)
    np.testing.assert_array_equal(unpack_frames(pack_frames(codes)), codes)


def test_bytes_of_another_mode_are_refused() -> None:
    with pytest.raises(InputError, match="whole number"):
        unpack_frames(b"\0\0\0")
    with pytest.raises(InputError, match="padding bits"):
        unpack_frames(b"\0\0\0\1")


def test_decoded_speech_has_the_spectrum_of_the_original(
    digits: list[np.ndarray], codes_of_digits: list[np.ndarray]
) -> None:
    correlations = []
    delay = 240  # samples by which the decoder lags
    for audio, codes in zip(digits, codes_of_digits, strict=True):
        decoded = Codec2().decode(codes)
        assert decoded.dtype == np.float32 and decoded.shape == (len(codes) * 320,)
        assert np.isfinite(decoded).all() and 0.01 < np.abs(decoded).max() <= 1.0
        original = audio[: len(decoded) - delay] / np.abs(audio).max() * 0.25
        decoded = decoded[delay : delay + len(original)]
        correlations.append(np.corrcoef(_band_energies(original), _band_energies(decoded))[0, 1])
    assert np.median(correlations) > 0.85
    assert min(correlations) > 0.7


def _band_energies(audio: np.ndarray) -> np.ndarray:
    """Log energies in 16 bands of 32 ms frames, flattened."""
    frames = audio[: len(audio) // 256 * 256].reshape(-1, 256) * np.hanning(256)
    power = np.abs(np.fft.rfft(frames, axis=1))[:, :128] ** 2
    return np.log(power.reshape(len(frames), 16, 8).sum(axis=2) + 1e-3).reshape(-1)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([[0, 0, 16, 0]], "code 16 at frame 0 is outside codebook 'energy', whose codes are 0..15"),
        ([[0, 0, 0, 0], [-1, 0, 0, 0]], "code -1 at frame 1 is outside codebook 'vq1'"),
        ([[0, 0, 0]], r"shape \[1, 3\]"),
        ([0, 0, 0, 0], r"shape \[4\]"),
        ([[0.0, 0.0, 0.0, 0.0]], "float64"),
    ],
)
def test_bad_codes_are_refused_by_name(codes: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Codec2().decode(np.array(codes))


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (np.zeros(0, np.float32), "empty"),
        (np.zeros((2, 8000), np.float32), "one channel"),
        (np.zeros(8000, np.int16), "floating-point"),
        (np.array([0.0, np.nan], np.float32), "NaN"),
        (np.array([0.0, np.inf], np.float32), "infinite"),
    ],
)
def test_audio_that_cannot_be_encoded_is_refused(audio: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Codec2().encode(audio)


def test_random_codes_decode_without_a_crash() -> None:
    rng = np.random.default_rng(0)
    codes = np.stack([rng.integers(0, size, 500) for size in Codec2.codebook_sizes], axis=1)
    assert np.isfinite(Codec2().decode(codes)).all()


def test_the_hash_changes_with_the_library_and_the_preprocessing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Codec2().hash
    try:
        codec2._hash.cache_clear()
        monkeypatch.setattr(codec2, "PREPROCESSING_VERSION", codec2.PREPROCESSING_VERSION + 1)
        other_preprocessing = Codec2().hash
        monkeypatch.undo()
        codec2._hash.cache_clear()
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0")
        other_library = Codec2().hash
    finally:
        monkeypatch.undo()
        codec2._hash.cache_clear()
    assert len({before, other_preprocessing, other_library}) == 3
    assert Codec2().hash == before


@pytest.mark.parametrize(("name", "nearest"), [("codec", "codec2"), ("Codec2", "codec2"), ("codek2", "codec2")])
def test_an_unknown_codec_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(InputError, match=f"did you mean '{nearest}'"):
        get_codec(name)


def test_a_codec_of_nothing_like_that_name_lists_what_there_is() -> None:
    with pytest.raises(InputError, match=r"no codec 'zzzzzz' Known here: codec2|no codec 'zzzzzz'.*codec2"):
        describe_codec("zzzzzz")


def test_missing_pycodec2_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_pycodec2(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "pycodec2":
            raise ModuleNotFoundError("No module named 'pycodec2'")
        return real(name, *args, **kwargs)

    codec2._library.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without_pycodec2)
    try:
        with pytest.raises(InputError, match=r"pip install 'megatron-speech\[codec2\]'"):
            Codec2().encode(np.zeros(320, np.float32))
    finally:
        monkeypatch.undo()
        codec2._library.cache_clear()


def test_describing_a_codec_loads_neither_the_library_nor_torch() -> None:
    script = (
        "import sys; from megatron_speech.codecs import describe_codec; describe_codec('codec2'); "
        "print(sorted({'pycodec2', 'torch', 'soundfile', 'soxr'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_another_package_registers_a_codec_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("other", "megatron_speech.codecs.codec2:Codec2", codecs.ENTRY_POINT_GROUP)
    impostor = importlib.metadata.EntryPoint("codec2", "nowhere:Codec", codecs.ENTRY_POINT_GROUP)
    broken = importlib.metadata.EntryPoint("broken", "nowhere:Codec", codecs.ENTRY_POINT_GROUP)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point, impostor, broken])
    assert codecs.codec_names() == ["broken", "codec2", "other"]
    assert isinstance(get_codec("other"), Codec)
    assert isinstance(get_codec("codec2"), Codec2)
    with pytest.raises(InputError, match=r"'broken'.*cannot be loaded"):
        get_codec("broken")
