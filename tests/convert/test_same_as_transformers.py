"""Claims about config.json: read as transformers reads it; an import that would compute something else is refused."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from backbones import CODEC, KINDS, edit_config, make_backbone
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_speech import cli
from megatron_speech.convert import import_hf as importing
from megatron_speech.convert import probe
from megatron_speech.convert.architectures import read_config
from megatron_speech.errors import InputError
from megatron_speech.tokens.space import TokenSpace

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES = st.fixed_dictionaries(
    {},
    optional={
        "rope_type": st.sampled_from(["default", "llama3"]),
        "type": st.sampled_from(["default", "llama3"]),
        "rope_theta": st.sampled_from([1e4, 5e5]),
        "factor": st.sampled_from([2.0, 8.0]),
        "original_max_position_embeddings": st.sampled_from([32, 64]),
    },
).map(lambda rope: {**LLAMA3, **rope} if "llama3" in (rope.get("rope_type"), rope.get("type")) else rope)
CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "rope_scaling": st.none() | ROPES,
        "rope_parameters": st.none() | ROPES,
        "rope_theta": st.sampled_from([2e4, 1e6]),
        "original_max_position_embeddings": st.sampled_from([16, 128]),
        "max_position_embeddings": st.sampled_from([256, 512]),
        "head_dim": st.sampled_from([16, 32]),
    },
)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), CONFIGS)
def test_rotary_frequencies_are_those_of_transformers_whatever_stands_beside_what(
    tmp_path_factory: pytest.TempPathFactory, kind: str, changes: dict[str, Any]
) -> None:
    folder = tmp_path_factory.getbasetemp() / "rotary"
    folder.mkdir(exist_ok=True)
    shape = {
        "architectures": [ARCHITECTURES[kind]], "model_type": kind, "hidden_size": 64, "intermediate_size": 160,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320, "head_dim": 16,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**shape, **changes}))
    config = transformers.AutoConfig.from_pretrained(folder)
    model, _ = read_config(folder)
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    rotary = type(theirs.model.rotary_emb)(config)
    torch.testing.assert_close(model.inverse_frequencies(), rotary.inv_freq, rtol=1e-6, atol=0)
    assert model.max_position_embeddings == config.max_position_embeddings


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_by_layer_type_are_refused(tmp_path: Path, kind: str) -> None:
    make_backbone(tmp_path, kind, tokenizer=None)
    nested = {name: {"rope_type": "default", "rope_theta": 1e4} for name in ("full_attention", "sliding_attention")}
    edit_config(tmp_path, rope_parameters=nested, layer_types=["full_attention"] * 2)
    if kind != "llama":  # whose class in transformers reads none of them
        with pytest.raises(KeyError):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="rope_parameters holds rotary parameters of their own for full_attention"):
        read_config(tmp_path)
    # What stands beside takes its place.
    edit_config(tmp_path, rope_scaling={"rope_type": "default", "rope_theta": 7e4})
    assert read_config(tmp_path)[0].rope_base == 7e4
    assert transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters["rope_theta"] == 7e4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone whose config.json has a scaling beside other rotary parameters; and the token space for it."""
    path = tmp_path_factory.mktemp("same") / "hf"
    make_backbone(path, "llama", tied=True)
    edit_config(
        path,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        rope_scaling={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3},
        original_max_position_embeddings=16,
    )
    TokenSpace.build(path, CODEC, base=path).save(path.parent / "ts.json")
    return path


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*flags: str) -> tuple[int, str, str]:
        arguments = ["--input", str(folder), "--token-space", str(folder.parent / "ts.json")]
        status = cli.main(["convert", "import-hf", *arguments, "--output", str(tmp_path / "out"), *flags])
        return (status, *capsys.readouterr())

    return call


def test_an_import_says_how_far_its_logits_are_from_those_of_transformers(run: Run) -> None:
    status, output, _ = run()
    assert status == 0
    assert f"logits of 32 tokens are those of transformers {transformers.__version__} (largest difference" in output


def test_bf16_is_compared_as_it_was_rounded_and_kept_bit_by_bit(run: Run, tmp_path: Path) -> None:
    from megatron_speech.training.checkpoint.load import load_for_inference

    assert run("--precision", "bf16")[0] == 0
    model = load_for_inference(tmp_path / "out")[0]
    probed = [parameter.clone() for parameter in model.parameters()]
    (tmp_path / "out").rename(tmp_path / "first")
    assert run("--precision", "bf16", "--no-probe")[0] == 0
    again = load_for_inference(tmp_path / "out")[0].parameters()
    assert all(torch.equal(one, two) and one.dtype == torch.bfloat16 for one, two in zip(probed, again, strict=True))


def changed(field: str, value: Any) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        model, config = read_config(folder)
        return model.model_copy(update={field: value}), config

    return read


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("rope_scaling", None, ["rotary frequencies differ by up to"]),
        ("rope_base", 1e4, ["rotary frequencies differ by up to"]),
        ("norm_epsilon", 0.5, ["logits of 32 tokens differ by up to", "tolerance"]),
    ],
)
def test_an_import_that_computes_something_else_is_refused_with_the_difference(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, value: Any, words: list[str]
) -> None:
    monkeypatch.setattr(importing, "read_config", changed(field, value))
    status, _, error = run()
    assert status == 2 and all(word in error for word in words) and "--no-probe" in error
    assert not (tmp_path / "out").exists()
    assert run("--no-probe")[0] == 0


def test_what_keeps_the_comparison_from_being_made_is_said(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_free_bytes", lambda: 1000.0)
    status, output, _ = run()
    assert status == 0 and "not compared with those of transformers: that takes 0.0 GB of memory, and 0.0" in output


def test_an_import_without_transformers_says_that_it_is_not_compared(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else found(name))
    status, output, _ = run()
    assert status == 0 and "not compared with those of transformers: transformers is not installed" in output


def test_a_folder_that_transformers_does_not_load_is_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("no such model\nmore")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", refuse)
    status, _, error = run()
    assert status == 2 and "(OSError: no such model)" in error and "--no-probe" in error
    assert not (tmp_path / "out").exists()
