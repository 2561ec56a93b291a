"""Claims about an exported folder: it speaks by its own script, is for texts as long as its backbone's, knows <bos>."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers
from backbones import KINDS, VOCABULARY, make_backbone, make_tokenizer

from megatron_speech import cli
from megatron_speech.codecs import describe_codec, get_codec
from megatron_speech.convert.export_guide import prompt_ids
from megatron_speech.model.builder import build_model
from megatron_speech.parallel import groups
from megatron_speech.recipe.model import ModelConfig
from megatron_speech.tokens.space import CodecDescription, TokenSpace
from megatron_speech.tokens.templates import compile_prompt
from megatron_speech.training.checkpoint.save import save_weights

Import = Callable[..., Path]
pytest.importorskip("pycodec2", reason="pycodec2 is not installed: `make venv` installs it")
CODEC = describe_codec("codec2")


def export(checkpoint: Path, *flags: str) -> Path:
    output = checkpoint.parent / f"{checkpoint.name}-exported"
    assert cli.main(["convert", "export-hf", "--checkpoint", str(checkpoint), "--output", str(output), *flags]) == 0
    return output


def exported(folder: Path, text_tokenizer: str | Path = "bytes", *flags: str, **changes: Any) -> Path:
    """A model of random weights in the id space of `text_tokenizer`, as a Hugging Face folder."""
    config = ModelConfig.model_validate({"preset": "tiny", **changes})
    space = TokenSpace.build(text_tokenizer, CODEC)
    if not torch.distributed.is_initialized():
        groups.initialize()
    chunks = build_model(config, space.padded_size, valid_vocab_size=space.size, seed=3)
    save_weights(folder / "ckpt", space=space, model=config, precision="fp32", max_seq_length=640, chunks=chunks)
    return export(folder / "ckpt", *flags)


def speak(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the folder's script, for short: half a second; returns its variables."""
    path = folder / "generation_config.json"
    config = json.loads(path.read_text())
    assert config["max_new_tokens"] == 30 * CODEC.tokens_per_second
    path.write_text(json.dumps({**config, "max_new_tokens": int(0.52 * CODEC.frame_rate_hz) * CODEC.codebook_count}))
    monkeypatch.setattr("sys.argv", ["speak.py", text, str(folder.parent / "out.wav")])
    return runpy.run_path(str(folder / "speak.py"))


def sentencepiece_model(folder: Path) -> Path:
    import sentencepiece

    (folder / "text.txt").write_text("one two three four five six seven\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "spm"), vocab_size=40, hard_vocab_limit=False,
        minloglevel=2,
    )  # fmt: skip
    return folder / "spm.model"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "llama", "qwen2"])
def test_the_script_of_a_folder_speaks(
    tmp_path: Path, imported: Import, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    if kind in KINDS:
        make_backbone(tmp_path / "hf", kind, tied=True)
        space = TokenSpace.build(tmp_path / "hf", CODEC, base=tmp_path / "hf")
        space.save(tmp_path / "ts.json")
        arguments = ["--token-space", str(tmp_path / "ts.json"), "--output", str(tmp_path / "ckpt"), "--no-probe"]
        assert cli.main(["convert", "import-hf", "--input", str(tmp_path / "hf"), *arguments]) == 0
        folder = export(tmp_path / "ckpt")
    else:
        folder = exported(tmp_path, "bytes" if kind == "bytes" else sentencepiece_model(tmp_path))
    space = TokenSpace.load(folder / "token_space.json")
    found = speak(folder, " one  two\n", monkeypatch)
    assert found["prompt"] == compile_prompt(space, "tts", text_ids=space.encode_text("one two")).tolist()
    spoken = [number for number in found["found"] if number != found["END"]]
    codes = space.decode_codes(np.array(spoken))  # refuses what is no code, or not its codebook's turn
    assert len(codes) > 0 and found["frames"].tolist() == codes.tolist()
    audio, rate = soundfile.read(tmp_path / "out.wav", dtype="float32")
    codec = get_codec("codec2")
    # Codec 2 draws phases at random: the same length, and sound.
    assert rate == codec.sample_rate_hz and len(audio) == len(codec.decode(codes)) and np.abs(audio).max() > 0


def test_the_script_refuses_text_that_spells_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = exported(tmp_path)
    names = [f"<|{CODEC.codebook_names[0]}_3|>", "<speech_end>"]
    with pytest.raises(SystemExit, match="spells a control token"):
        speak(folder, f"one {names[0]}", monkeypatch)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer(names[1], split_special_tokens=True)["input_ids"] == list(names[1].encode())


@pytest.mark.slow
def test_the_readme_shows_prompt_ids_and_tokens_of_the_folder(tmp_path: Path) -> None:
    make_backbone(tmp_path / "hf", "llama", tied=True)
    TokenSpace.build(tmp_path / "hf", CODEC, base=tmp_path / "hf").save(tmp_path / "ts.json")
    arguments = ["--token-space", str(tmp_path / "ts.json"), "--output", str(tmp_path / "ckpt"), "--no-probe"]
    assert cli.main(["convert", "import-hf", "--input", str(tmp_path / "hf"), *arguments]) == 0
    folder = export(tmp_path / "ckpt")
    readme = (folder / "README.md").read_text()
    space = TokenSpace.load(folder / "token_space.json")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    written = re.search(r"## Prompt\n\n```\n(.*)\n```", readme)
    assert written is not None and written[1].startswith("<|begin_of_text|><target_text>TEXT")
    before, after = prompt_ids(space)
    text = space.encode_text("one two").tolist()
    ids = tokenizer(written[1].replace("TEXT", "one two"), add_special_tokens=False)["input_ids"]
    assert ids == [*before, *text, *after] == compile_prompt(space, "tts", text_ids=np.array(text)).tolist()
    for book in space.codebooks:
        (row,) = re.findall(rf"\| `{book.name}` \| {book.size:,} \| (\d+) … (\d+) \| `(.*)` \|", readme)
        assert (int(row[0]), int(row[1])) == (book.ids[0], book.ids[-1])
        assert tokenizer.convert_tokens_to_ids(row[2].replace("\\|", "|")) == book.ids[0]
    for name, number in space.special_ids.items():
        (token,) = re.findall(rf"\| `{name}` \| {number} \| `(.*)` \|", readme)
        assert tokenizer.convert_tokens_to_ids(token.replace("\\|", "|")) == number
    assert "megatron-speech decode --codec codec2 --input codes.npy --output out.wav" in readme
    assert "up to 256 tokens" in readme


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_start_of_the_backbones_own_is_known_by_both_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    make_backbone(tmp_path / "hf", kind, tied=True)
    space = TokenSpace.build(tmp_path / "hf", CODEC, base=tmp_path / "hf")
    space.save(tmp_path / "ts.json")
    arguments = ["--token-space", str(tmp_path / "ts.json"), "--output", str(tmp_path / "ckpt"), "--no-probe"]
    assert cli.main(["convert", "import-hf", "--input", str(tmp_path / "hf"), *arguments]) == 0
    folder = export(tmp_path / "ckpt")
    start, end = space.special("<bos>"), space.special("<eos>")
    assert start < VOCABULARY and end < VOCABULARY
    opened = [transformers.PreTrainedTokenizerFast.from_pretrained(folder)]
    if kind == "qwen2":
        assert "does not know <bos> and <eos>: write <|begin_of_text|>" in capsys.readouterr().out
    else:
        opened.append(transformers.AutoTokenizer.from_pretrained(folder))
    text = space.encode_text("one e\u0301").tolist()
    for tokenizer in opened:
        for begin, stop in (("<bos>", "<eos>"), ("<|begin_of_text|>", "<|end_of_text|>")):
            ids = tokenizer(f"{begin}one e\u0301{stop}<speech_start>{begin}", add_special_tokens=False)["input_ids"]
            assert ids == [start, *text, end, space.special("<speech_start>"), start]
        assert tokenizer.decode([start]) == "<|begin_of_text|>" and len(tokenizer) == space.size


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def test_an_export_is_for_texts_as_long_as_its_backbone_is(tmp_path: Path, imported: Import) -> None:
    make_backbone(tmp_path / "hf", "llama", tied=True, max_position_embeddings=131_072)
    checkpoint = imported(tmp_path / "hf", "--no-probe")
    folder = export(checkpoint)
    assert config_of(folder)["max_position_embeddings"] == 131_072
    assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == 131_072
    for value in ("0", "-5"):
        arguments = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "no")]
        assert cli.main(["convert", "export-hf", *arguments, "--max-position-embeddings", value]) == 2


@pytest.mark.parametrize(
    ("own", "flags", "wanted"),
    [(None, (), 640), (131_072, (), 131_072), (512, (), 640), (131_072, ("--max-position-embeddings", "4096"), 4096)],
    ids=["no backbone", "a longer backbone", "a shorter backbone", "as asked"],
)
def test_the_length_is_the_backbones_or_the_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], own: int | None, flags: tuple[str, ...], wanted: int
) -> None:
    folder = exported(tmp_path, "bytes", *flags, max_position_embeddings=own)
    assert config_of(folder)["max_position_embeddings"] == wanted
    assert f"for up to {wanted:,} tokens (this run's sequences had 640)" in capsys.readouterr().out


def test_codes_that_are_not_in_order_are_listed_by_their_tokens(
    tmp_path: Path, imported: Import, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layout of Inworld, whose codes are sorted as strings."""
    tokenizer = make_tokenizer("inworld")
    make_backbone(tmp_path / "hf", "llama", tied=True, vocab_size=tokenizer.get_vocab_size(), tokenizer=tokenizer)
    folder = export(imported(tmp_path / "hf", "--no-probe", layout="inworld"))
    assert config_of(folder)["vocab_size"] == tokenizer.get_vocab_size()
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**config, "max_new_tokens": 5}))
    monkeypatch.setattr("sys.argv", ["speak.py", "one", str(tmp_path / "out.wav")])
    played: list[np.ndarray] = []
    monkeypatch.setattr("megatron_speech.codecs.get_codec", lambda name: Toy(played))
    found = runpy.run_path(str(folder / "speak.py"))
    space = TokenSpace.load(folder / "token_space.json")
    spoken = [number for number in found["found"] if number != found["END"]]
    assert played[0].tolist() == space.decode_codes(np.array(spoken)).tolist()
    assert "by token" in (folder / "README.md").read_text()


class Toy:
    """A codec that plays silence, and keeps what it was given."""

    sample_rate_hz = 16000

    def __init__(self, played: list[np.ndarray]) -> None:
        self.played = played

    def decode(self, codes: np.ndarray) -> np.ndarray:
        self.played.append(codes)
        return np.zeros(len(codes) * 320, np.float32)


def test_guides_of_several_codebooks_name_each_in_its_turn() -> None:
    from megatron_speech.convert.export_guide import readme

    space = TokenSpace.build("bytes", CodecDescription("two", "h", 8000, 25.0, ("vq", "pitch"), (16, 8)))
    text = readme(space, {}, "LlamaForCausalLM", 64, 64)
    assert "frames of `vq` `pitch`, one id of each in this order" in text and "2 codes per frame" in text
