"""Claims about codecs of other packages: what they describe and give is checked where it comes in."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import soundfile

from megatron_speech import codecs
from megatron_speech.codecs import check_codes, decode_checked, describe_codec, encode_checked, get_codec
from megatron_speech.commands.token_space import read_codec_description
from megatron_speech.errors import InputError
from megatron_speech.preprocess import encode_audio
from megatron_speech.tokens.space import CodecDescription


class ThreeBooks:
    """A codec of three codebooks that gives what a test says."""

    name = "three"
    hash = "3" * 64
    sample_rate_hz = 8000
    frame_rate_hz = 25.0
    codebook_names: Any = ("a", "b", "c")
    codebook_sizes: Any = (8, 8, 4)
    gives: ClassVar[Any] = None  # codes that encode gives in place of zeros
    sounds: ClassVar[Any] = None  # audio that decode gives in place of a tone

    def encode(self, audio: np.ndarray, *, gain: float = 1.0) -> Any:
        return np.zeros((len(audio) // 320 + 1, 3), np.int32) if self.gives is None else self.gives

    def decode(self, codes: np.ndarray) -> Any:
        return np.full(320 * len(codes), 0.1, np.float32) if self.sounds is None else self.sounds

    def describe(self) -> CodecDescription:
        return CodecDescription(
            self.name, self.hash, self.sample_rate_hz, self.frame_rate_hz, self.codebook_names, self.codebook_sizes
        )


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> type[ThreeBooks]:
    """The class behind the codec 'three', registered as another package would."""

    class Plugin(ThreeBooks):
        pass

    class Point:
        name, value = "three", "other_package:Plugin"

        @staticmethod
        def load() -> type[ThreeBooks]:
            return Plugin

    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [Point])
    assert codecs.ENTRY_POINT_GROUP == "megatron_speech.codecs"
    return Plugin


BAD_CODES = [
    (np.zeros((5, 4), np.int32), r"codec 'three' are an array of shape \[5, 4\].*\[frames, 3\].*a, b, c"),
    (np.zeros((3, 5), np.int32), r"shape \[3, 5\]"),
    (np.zeros(15, np.int32), r"shape \[15\]"),
    (np.zeros((1, 5, 3), np.int32), r"shape \[1, 5, 3\]"),
    (np.zeros((5, 3), np.float32), "type float32"),
    (np.zeros((5, 3), bool), "type bool"),
    ([[0, 0, 0]], "of type list"),
    (None, "of type NoneType"),
    (np.array([[0, 0, 0], [0, -1, 0]]), r"code -1 at frame 1 is outside codebook 'b', whose codes are 0..7"),
    (np.array([[0, 0, 4]]), r"code 4 at frame 0 is outside codebook 'c', whose codes are 0..3 in the codec 'three'"),
]


@pytest.mark.parametrize(("codes", "message"), BAD_CODES)
def test_codes_that_are_none_of_the_codec_are_refused_in_a_sentence(codes: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_codes(ThreeBooks(), codes)
    with pytest.raises(InputError, match=message):
        decode_checked(ThreeBooks(), codes)


def test_codes_of_every_integer_type_and_of_no_frames_are_codes() -> None:
    for dtype in (np.uint8, np.int16, np.uint16, np.int64, np.uint64):
        check_codes(ThreeBooks(), np.full((4, 3), 3, dtype))
    check_codes(ThreeBooks(), np.zeros((0, 3), np.int32))


@pytest.mark.parametrize(("codes", "message"), [pair for pair in BAD_CODES if pair[0] is not None])
def test_encoding_stops_at_a_codec_that_gives_what_are_no_codes(
    plugin: type[ThreeBooks], codes: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four columns for three codebooks were once wrapped into other frames, and -1 became 65535."""
    plugin.gives = codes
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).uniform(-0.1, 0.1, 8000), 8000)
    (tmp_path / "samples.jsonl").write_text('{"wav_path": "a.wav"}\n')
    arguments = ["--input", str(tmp_path / "samples.jsonl"), "--codec", "three", "--output-dir", str(tmp_path / "out")]
    assert encode_audio.main([*arguments, "--workers", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error and "'three'" in error
    assert not (tmp_path / "out").exists()
    plugin.gives = None
    assert encode_audio.main([*arguments, "--workers", "1"]) == 0
    assert np.load(tmp_path / "out" / "codes-00000-of-00001.npy").shape == (26, 3)


def test_encoding_stops_at_the_recording_that_is_encoded_to_what_are_no_codes(
    plugin: type[ThreeBooks],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = ThreeBooks.encode

    def encode(self: ThreeBooks, audio: np.ndarray, *, gain: float = 1.0) -> np.ndarray:
        return right(self, audio, gain=gain) - (8 if audio.any() else 0)  # silence, which is tried first, is right

    monkeypatch.setattr(plugin, "encode", encode)
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).uniform(-0.1, 0.1, 8000), 8000)
    (tmp_path / "samples.jsonl").write_text('{"wav_path": "a.wav"}\n')
    arguments = ["--input", str(tmp_path / "samples.jsonl"), "--codec", "three", "--output-dir", str(tmp_path / "out")]
    assert encode_audio.main([*arguments, "--workers", "1"]) == 2
    assert "a.wav was encoded to what are no codes: code -8 at frame 0" in capsys.readouterr().err


def test_no_frames_for_audio_are_no_encoding(plugin: type[ThreeBooks]) -> None:
    plugin.gives = np.zeros((0, 3), np.int32)
    with pytest.raises(InputError, match="no frames for 8000 samples"):
        encode_checked(get_codec("three"), np.zeros(8000, np.float32))


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (np.zeros((1, 320), np.float32), r"shape \[1, 320\]"),
        (np.zeros(320, np.int16), "type int16"),
        (np.array([0, np.nan], np.float32), "NaN"),
        ([0.0], "a list"),
    ],
)
def test_audio_that_is_none_is_refused_when_decoding(plugin: type[ThreeBooks], audio: Any, message: str) -> None:
    plugin.sounds = audio
    with pytest.raises(InputError, match=f"'three' decoded 2 frames to .*{message}"):
        decode_checked(get_codec("three"), np.zeros((2, 3), np.int32))


BAD_DESCRIPTIONS = [
    ({"codebook_names": ("a", "b", "c", "d")}, r"4 codebook_names \(a, b, c, d\) and 3 codebook_sizes \(8, 8, 4\)"),
    ({"codebook_names": (), "codebook_sizes": ()}, "at least one codebook"),
    ({"codebook_names": ("a", "a", "b")}, "a codebook called 'a'; needed is a name of its own"),
    ({"codebook_sizes": (8, 0, 4)}, "size 0 for codebook 'b'"),
    ({"codebook_sizes": (8, 8.5, 4)}, "size 8.5 for codebook 'b'|valid integer"),
    ({"codebook_sizes": 8}, "codebook_sizes 8; needed is a tuple|valid tuple"),
    ({"sample_rate_hz": 0}, "sample_rate_hz 0; needed is a positive integer"),
    ({"sample_rate_hz": 8000.5}, "sample_rate_hz 8000.5|valid integer"),
    ({"frame_rate_hz": -25.0}, "frame_rate_hz -25.0; needed is a positive number"),
    ({"frame_rate_hz": float("inf")}, "frame_rate_hz inf; needed is a positive number"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD_DESCRIPTIONS)
def test_a_codec_that_describes_itself_wrongly_is_refused_when_opened(
    plugin: type[ThreeBooks], wrong: dict[str, Any], message: str, tmp_path: Path
) -> None:
    for name, value in wrong.items():
        setattr(plugin, name, value)
    with pytest.raises(InputError, match=message):
        get_codec("three")
    fields = {name: getattr(plugin, name) for name in CodecDescription.__dataclass_fields__}
    (tmp_path / "codec.json").write_text(json.dumps(fields))
    with pytest.raises(InputError, match=rf"codec.json: .*({message})"):
        read_codec_description(str(tmp_path / "codec.json"))


def test_a_codec_that_says_one_thing_and_is_another_is_refused(
    plugin: type[ThreeBooks], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert describe_codec("three").codebook_sizes == (8, 8, 4)
    monkeypatch.setattr(plugin, "describe", lambda self: CodecDescription("three", "3" * 64, 8000, 50.0, ("a",), (8,)))
    with pytest.raises(InputError, match=r"describes its frame_rate_hz as 50.0, but has 25.0"):
        describe_codec("three")


def test_a_class_that_is_no_codec_is_refused_by_what_it_lacks(
    plugin: type[ThreeBooks], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(ThreeBooks, "decode")
    with pytest.raises(InputError, match="it has no decode"):
        get_codec("three")

    def needs_a_folder(self: ThreeBooks, folder: str) -> None: ...

    monkeypatch.setattr(plugin, "__init__", needs_a_folder)
    with pytest.raises(InputError, match=r"cannot be made: TypeError.*folder"):
        get_codec("three")
