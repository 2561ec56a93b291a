"""Claims about `megatron-speech decode`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from megatron_speech.cli import main
from megatron_speech.codecs.audio import read_audio
from megatron_speech.codecs.codec2 import Codec2
from megatron_speech.commands.decode import parse_tokens
from megatron_speech.convert.export_tokenizer import _names
from megatron_speech.errors import InputError
from megatron_speech.tokens.space import CodecDescription, TokenSpace


@pytest.fixture(scope="module")
def audio() -> np.ndarray:
    """One second of a voice-like sound, float32 [8000]."""
    time = np.arange(8000) / 8000
    return (0.3 * np.sin(2 * np.pi * 130 * time) * (1 + np.sin(2 * np.pi * 3 * time))).astype(np.float32)


@pytest.fixture(scope="module")
def codes(audio: np.ndarray) -> np.ndarray:
    return Codec2().encode(audio)


def tokens_of(codes: np.ndarray) -> str:
    """The codes as an exported tokenizer spells them."""
    space = TokenSpace.build("bytes", Codec2().describe())
    names = _names(space, {})
    return "".join(names[int(number)] for number in space.encode_codes(codes))


def is_of(path: Path, codes: np.ndarray) -> bool:
    """Whether a file is what codec2 makes of the codes: the noise of unvoiced sounds differs, levels do not."""
    found, expected = read_audio(path, 8000), Codec2().decode(codes)
    if len(found) != len(expected):
        return False
    power = [np.square(sound).reshape(-1, 320).mean(axis=1) for sound in (found, expected)]
    return bool(np.corrcoef(power)[0, 1] > 0.95)


def test_an_array_becomes_audio(tmp_path: Path, codes: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    for name, array in (("plain", codes), ("fortran", np.asfortranarray(codes.astype(np.uint16)))):
        np.save(tmp_path / f"{name}.npy", array)
        output = tmp_path / f"{name}.wav"
        arguments = ["--input", str(tmp_path / f"{name}.npy"), "--output", str(output)]
        assert main(["decode", "--codec", "codec2", *arguments]) == 0
        assert is_of(output, codes)
        assert f"{output}: 26 frames of codec2, 1.04 s" in capsys.readouterr().out


def test_tokens_as_an_exported_tokenizer_spells_them_become_audio(
    tmp_path: Path, codes: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = tokens_of(codes)
    assert tokens.startswith(f"<|vq1_{codes[0, 0]}|><|vq2_{codes[0, 1]}|><|energy_{codes[0, 2]}|>")
    (tmp_path / "a.txt").write_text(f"<bos><target_text>hello</target_text><speech_start>{tokens}<speech_end>\n")
    assert (
        main(["decode", "--codec", "codec2", "--input", str(tmp_path / "a.txt"), "--output", f"{tmp_path}/a.flac"]) == 0
    )
    assert is_of(tmp_path / "a.flac", codes) and soundfile.info(tmp_path / "a.flac").format == "FLAC"
    cut = tokens[: tokens.rindex("<|")]
    assert main(["decode", "--codec", "codec2", "--text", cut, "--output", str(tmp_path / "cut.wav")]) == 0
    assert "the last 3 of 103 audio tokens are no whole frame of 4: left out" in capsys.readouterr().err
    assert is_of(tmp_path / "cut.wav", codes[:-1])


class OneBook:
    """The description of a codec with one codebook."""

    name, codebook_names, codebook_sizes = "one", ("codes",), (10,)


def test_the_only_codebook_is_called_s_in_exported_tokens_or_by_its_name() -> None:
    space = TokenSpace.build("bytes", CodecDescription("one", "1" * 64, 16000, 50.0, ("codes",), (10,)))
    assert _names(space, {})[int(space.encode_codes(np.array([7]))[0])] == "<|s_7|>"
    for name in ("s", "codes"):
        np.testing.assert_array_equal(parse_tokens(f"<|{name}_7|> <|{name}_0|>\n", OneBook(), "x"), [[7], [0]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello", r"no audio token of the codec 'codec2'; they are spelled <\|vq1_0\|> <\|vq2_0\|>"),
        ("<|s_1|>", "no audio token"),
        ("<|vq2_1|><|vq1_1|>", r"audio token 1 is <\|vq2_1\|>, needed is one of codebook 'vq1'"),
        ("<|vq1_1|><|vq2_1|><|energy_1|><|pitch_1|>and<|vq1_1|>", "'and' stands between the audio tokens 4 and 5"),
        ("<|vq1_512|><|vq2_1|><|energy_1|><|pitch_1|>", "code 512 at frame 0 is outside codebook 'vq1'"),
        (f"<|vq1_{'9' * 99}|><|vq2_1|><|energy_1|><|pitch_1|>", "is outside codebook 'vq1'"),
    ],
)
def test_tokens_that_are_no_recording_are_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_tokens(text, Codec2(), "--text")


@pytest.fixture
def rows(tmp_path: Path, codes: np.ndarray) -> Path:
    """samples.jsonl of three samples, as encode-audio writes them, and codes inline."""
    np.save(tmp_path / "codes.npy", np.concatenate([codes[:10], codes]).astype(np.uint16))
    common = {"codec": "codec2", "codec_hash": Codec2().hash}
    lines = [
        {"sample_id": "first", "codes_path": "codes.npy", "code_offset": 0, "code_len": 10, **common},
        {"sample_id": "second", "codes_path": "codes.npy", "code_offset": 10, "code_len": len(codes), **common},
        {"sample_id": "inline", "codes": codes[:5].tolist(), **common},
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "samples.jsonl"


def test_rows_become_audio_one_or_all(rows: Path, codes: np.ndarray, tmp_path: Path) -> None:
    output = tmp_path / "b.wav"
    assert main(["decode", "--input", str(rows), "--sample-id", "second", "--output", str(output)]) == 0
    assert is_of(output, codes)
    assert main(["decode", "--input", str(rows), "--output-dir", str(tmp_path / "out")]) == 0
    listed = [json.loads(line) for line in (tmp_path / "out" / "decoded.jsonl").read_text().splitlines()]
    assert [(row["sample_id"], row["duration"]) for row in listed] == [
        ("first", 0.4),
        ("second", 1.04),
        ("inline", 0.2),
    ]
    for row, expected in zip(listed, (codes[:10], codes, codes[:5]), strict=True):
        assert is_of(tmp_path / "out" / row["wav_path"], expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "samples.jsonl", "--output", "a.wav"], "several rows; name one of them by --sample-id"),
        (["--input", "samples.jsonl", "--sample-id", "none", "--output", "a.wav"], "no row with sample_id 'none'"),
        (["--input", "codes.npy", "--output", "a.wav"], "--codec is missing"),
        (["--input", "codes.npy", "--codec", "codec2", "--output-dir", "d"], "--output-dir goes with rows"),
        (["--input", "absent.npy", "--codec", "codec2", "--output", "a.wav"], "absent.npy does not exist"),
        (["--input", "absent.txt", "--codec", "codec2", "--output", "a.wav"], "absent.txt cannot be read: No such"),
        (["--input", "text.npy", "--codec", "codec2", "--output", "a.wav"], "not a readable .npy file"),
        (["--input", "float.npy", "--codec", "codec2", "--output", "a.wav"], "float.npy: codes of the codec 'codec2'"),
        (["--input", "empty.npy", "--codec", "codec2", "--output", "a.wav"], "there are no codes"),
        (["--input", "codes.npy", "--codec", "codec3", "--output", "a.wav"], "did you mean 'codec2'"),
        (["--input", "other.jsonl", "--output", "a.wav"], "row 1 is of a codec with hash aaaaaaaaaaaa"),
        (["--input", "unnamed.jsonl", "--output", "a.wav"], "row 1 has no field codec; name the codec by --codec"),
        (["--input", "samples.jsonl", "--sample-id", "first", "--output", "a.m4a"], "ends in .m4a"),
    ],
)
def test_what_cannot_be_decoded_is_refused_in_a_sentence(
    rows: Path,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.npy").write_text("no array")
    np.save(tmp_path / "float.npy", np.zeros((3, 4)))
    np.save(tmp_path / "empty.npy", np.zeros((0, 4), np.int32))
    (tmp_path / "other.jsonl").write_text(json.dumps({"codes": [[0] * 4], "codec": "codec2", "codec_hash": "a" * 64}))
    (tmp_path / "unnamed.jsonl").write_text(json.dumps({"codes": [[0] * 4]}))
    assert main(["decode", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "a.wav").exists()
