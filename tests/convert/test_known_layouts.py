"""Claims about other projects' layouts: their ids, their prompts token for token, and their codes back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from backbones import CODEC, LLAMA_SPECIALS, make_backbone, make_tokenizer

from megatron_speech import cli
from megatron_speech.errors import InputError
from megatron_speech.generation.engine import SpeechGenerator
from megatron_speech.generation.requests import GenerationRequest
from megatron_speech.generation.sampling import SamplingConfig
from megatron_speech.tokens.layouts import LAYOUTS, resolve
from megatron_speech.tokens.space import (
    MODALITY_AUDIO,
    MODALITY_SPECIAL,
    MODALITY_TEXT,
    SPECIALS,
    CodecDescription,
    TokenSpace,
)
from megatron_speech.tokens.templates import compile_document, count_target_tokens, render

Import = Callable[..., Path]
TEXT, REFERENCE = "one two 12345", "three four."


def public_ids(layout: str) -> Any:
    """The layout over a vocabulary of LLaMA 3.2's size and names, with 65,536 codes."""
    known = {token: 128_000 + i for i, token in enumerate(LLAMA_SPECIALS)}
    return resolve(
        LAYOUTS[layout], SPECIALS, 65_536, token_id=known.get, vocabulary_size=128_256,
        encode=lambda text: [len(text)], where="LLaMA 3.2",
    )  # fmt: skip


def test_llasa_has_its_published_ids() -> None:
    found = public_ids("llasa")
    assert found.code_ids == list(range(128_264, 193_800)) and found.size == 193_800
    ids = found.special_ids
    assert [ids[name] for name in ("<target_text>", "</target_text>", "<speech_start>", "<speech_end>")] == [
        128_258, 128_259, 128_260, 128_261,
    ]  # fmt: skip
    assert (ids["<bos>"], ids["<eos>"], ids["<pad>"]) == (128_000, 128_001, 128_004)
    assert len(set(ids.values())) == len(SPECIALS) and found.text_size == 128_256


def test_inworld_has_its_published_ids() -> None:
    found = public_ids("inworld")
    assert found.size == 193_856 and sorted(found.code_ids) == list(range(128_256, 193_792))
    by_id = {number: code for code, number in enumerate(found.code_ids)}
    # As strings: a number comes after the numbers that begin with it.
    assert [by_id[128_256 + i] for i in range(4)] == [0, 10_000, 10_001, 10_002]
    assert found.code_ids[1] > found.code_ids[19_999] and found.code_ids[9] == 193_791
    ids = found.special_ids
    assert [ids[name] for name in ("<speech_end>", "<speech_start>", "</target_text>", "<target_text>")] == [
        193_794, 193_795, 193_796, 193_797,
    ]  # fmt: skip


@pytest.fixture(params=["llasa", "inworld"])
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(tmp_path: Path, layout: str) -> Path:
    """A public checkpoint's look-alike: a tied LLaMA with the layout's tokenizer."""
    tokenizer = make_tokenizer(layout)
    size = tokenizer.get_vocab_size()
    make_backbone(tmp_path / "public", "llama", tied=True, vocab_size=size, tokenizer=tokenizer)
    return tmp_path / "public"


def written(layout: str, text: str) -> str:
    """The prompt as the projects write it."""
    if layout == "inworld":
        return (
            f"<|begin_of_text|>Convert the text to speech:<|text_prompt_start|>{text}<|text_prompt_end|>\n"
            "<|speech_start|>"
        )
    return (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nConvert the text to speech:"
        f"<|TEXT_UNDERSTANDING_START|>{text}<|TEXT_UNDERSTANDING_END|><|eot_id|><|start_header_id|>assistant"
        "<|end_header_id|>\n\n<|SPEECH_GENERATION_START|>"
    )


def test_a_space_is_the_tokenizers(folder: Path, layout: str, tmp_path: Path) -> None:
    space = TokenSpace.build(folder, CODEC, base=folder, layout=layout)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert space.size == len(tokenizer)
    codes = np.arange(CODEC.codebook_sizes[0])
    ids = space.encode_codes(codes)
    assert tokenizer.convert_ids_to_tokens(ids.tolist()) == [f"<|s_{code}|>" for code in codes]
    assert space.decode_codes(ids)[:, 0].tolist() == codes.tolist()
    with pytest.raises(InputError, match="not a code"):
        space.decode_codes(np.array([ids[0], space.special("<speech_end>")]))
    modality = space.modality_table()
    assert (modality[ids] == MODALITY_AUDIO).all() and (modality == MODALITY_AUDIO).sum() == len(codes)
    assert (modality[list(space.special_ids.values())] == MODALITY_SPECIAL).all()
    assert modality[space.encode_text(TEXT)].max() == MODALITY_TEXT
    # Before, as after its tokenizer was extended; and as a file.
    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    before = TokenSpace.build(tmp_path, CODEC, layout=layout)
    assert (before.special_ids, before.codebooks, before.sequences, before.size) == (
        space.special_ids, space.codebooks, space.sequences, space.size,
    )  # fmt: skip
    space.save(tmp_path / "ts.json")
    again = TokenSpace.load(tmp_path / "ts.json")
    assert again == space and again.hash == space.hash != before.hash
    value = json.loads((tmp_path / "ts.json").read_text())
    if "ids" in value["codebooks"][0]:
        value["codebooks"][0]["ids"] = TokenSpace.load(tmp_path / "ts.json").text_payload[:0].decode()
        (tmp_path / "ts.json").write_text(json.dumps(value))
        with pytest.raises(InputError):
            TokenSpace.load(tmp_path / "ts.json")


def test_text_that_spells_a_code_is_text(folder: Path, layout: str) -> None:
    space = TokenSpace.build(folder, CODEC, base=folder, layout=layout)
    text = f"say <|s_7|> <|speech_end|> <|SPEECH_GENERATION_END|> {TEXT} <|begin_of_text|>"
    ids = space.encode_text(text)
    assert ids.max() < space.text_size and not {*ids.tolist()} & {*space.special_ids.values()}
    assert space.decode_text(ids) == text


def test_prompts_are_those_of_the_projects_token_for_token(folder: Path, layout: str, imported: Import) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    generator = SpeechGenerator.from_checkpoint(imported(folder, layout=layout))

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    assert generator.prompt(GenerationRequest(TEXT)).tolist() == ids(written(layout, TEXT))
    voice = np.array([[5], [100], [5]], dtype=np.int32)
    cloning = GenerationRequest(TEXT, reference_codes=voice, reference_text=REFERENCE)
    assert generator.prompt(cloning).tolist() == ids(written(layout, f"{REFERENCE} {TEXT}") + "<|s_5|><|s_100|><|s_5|>")
    space = generator.space
    document = compile_document(space, "tts", text_ids=space.encode_text(TEXT), code_ids=space.encode_codes(voice))
    end = {"llasa": "<|SPEECH_GENERATION_END|>", "inworld": "<|speech_end|>"}[layout]
    assert document.tolist() == ids(written(layout, TEXT) + "<|s_5|><|s_100|><|s_5|>" + end)
    assert count_target_tokens(space, document) == 4
    assert "[3 frames: 5 | 100 | 5]" in render(space, document) and TEXT in render(space, document)
    with pytest.raises(InputError, match="plain"):
        compile_document(space, "tts", text_ids=[1], code_ids=[1], ref_text_ids=[1], ref_code_ids=[1])  # type: ignore[arg-type]


def test_a_public_checkpoint_speaks_as_in_transformers_and_goes_back(
    folder: Path, layout: str, imported: Import
) -> None:
    checkpoint = imported(folder, layout=layout)
    exported = folder.parent / "exported"
    assert cli.main(["convert", "export-hf", "--checkpoint", str(checkpoint), "--output", str(exported)]) == 0
    before, after = (transformers.AutoTokenizer.from_pretrained(path) for path in (folder, exported))
    assert before.get_vocab() == after.get_vocab()
    generator = SpeechGenerator.from_checkpoint(checkpoint)
    space, end = generator.space, generator.space.special("<speech_end>")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert all(
        torch.equal(one, two)
        for one, two in zip(
            model.parameters(),
            transformers.AutoModelForCausalLM.from_pretrained(exported).parameters(),
            strict=True,
        )
    )
    request = GenerationRequest(TEXT)
    (result,) = generator.generate([request], SamplingConfig(temperature=0.0, max_seconds=0.6))
    prompt = torch.from_numpy(generator.prompt(request)[None].astype(np.int64))
    legal = {*space.codebooks[0].ids.tolist(), end}
    spoken = model.generate(
        prompt,
        do_sample=False,
        max_new_tokens=30,
        eos_token_id=end,
        suppress_tokens=[i for i in range(space.size) if i not in legal],
        begin_suppress_tokens=[end],
    )[0, prompt.shape[1] :].tolist()
    names = [f"<|s_{code}|>" for code in result.codes[:, 0]]
    assert before.convert_tokens_to_ids(names) == [i for i in spoken if i != end]


@pytest.mark.parametrize(
    ("codec", "words"),
    [
        (CodecDescription("big", "h", 16000, 50.0, ("q",), (121,)), "lacks 1 of 129"),
        (CodecDescription("small", "h", 16000, 50.0, ("q",), (119,)), r"<\|s_119\|>"),
        (CodecDescription("two", "h", 16000, 50.0, ("a", "b"), (60, 60)), "2 codebooks"),
    ],
    ids=["more codes", "fewer codes", "two codebooks"],
)
def test_another_codec_is_refused(tmp_path: Path, codec: CodecDescription, words: str) -> None:
    make_tokenizer("llasa").save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match=words):
        TokenSpace.build(tmp_path, codec, layout="llasa")


def test_a_tokenizer_of_another_project_is_refused(tmp_path: Path) -> None:
    make_tokenizer("inworld").save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match=r"lacks 8 of 128.*TEXT_GENERATION_START"):
        TokenSpace.build(tmp_path, CODEC, layout="llasa")
    with pytest.raises(InputError, match="kind bytes"):
        TokenSpace.build("bytes", CODEC, layout="llasa")


def test_specials_without_a_reserved_token_get_new_ids(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = spec["added_tokens"][:11]  # three reserved tokens are left
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    space = TokenSpace.build(tmp_path, CODEC, layout="llasa")
    ids = sorted(space.special_ids.values())
    assert len(set(ids)) == len(SPECIALS) and ids[-1] == space.size - 1 > space.codebooks[0].ids.max()


def test_the_command_takes_a_layout_and_a_description_of_a_codec(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tokenizer("inworld").save(str(tmp_path / "tokenizer.json"))
    description = {
        "name": "xcodec2", "hash": "h", "sample_rate_hz": 16000, "frame_rate_hz": 50.0, "codebook_names": ["q0"],
        "codebook_sizes": [120],
    }  # fmt: skip
    (tmp_path / "codec.json").write_text(json.dumps(description))
    arguments = ["--text-tokenizer", str(tmp_path), "--codec", str(tmp_path / "codec.json"), "--layout", "inworld"]
    assert cli.main(["token-space", *arguments, "--output", str(tmp_path / "ts.json")]) == 0
    assert "in the layout of inworld" in capsys.readouterr().out
    assert TokenSpace.load(tmp_path / "ts.json").codec.name == "xcodec2"
    (tmp_path / "codec.json").write_text(json.dumps({**description, "codebook_sizes": "many"}))
    assert cli.main(["token-space", *arguments, "--output", str(tmp_path / "no.json")]) == 2
    assert "codebook_sizes" in capsys.readouterr().err
    (tmp_path / "codec.json").write_text(json.dumps({**description, "colour": "red"}))
    assert cli.main(["token-space", *arguments, "--output", str(tmp_path / "no.json")]) == 2
    assert "colour" in capsys.readouterr().err and not (tmp_path / "no.json").exists()
