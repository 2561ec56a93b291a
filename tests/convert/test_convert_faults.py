"""Claims about what is refused: damaged folders, other models, ids that do not go together; nothing is left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import CODEC, edit_config, make_backbone, make_tokenizer
from safetensors.torch import load_file, save_file

from megatron_speech import cli
from megatron_speech.tokens.space import TokenSpace
from megatron_speech.training.checkpoint.load import load_for_inference


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound backbone and the token space for it."""
    folder = tmp_path_factory.mktemp("good") / "hf"
    make_backbone(folder, "qwen2", tied=True)
    TokenSpace.build(folder, CODEC, base=folder).save(folder.parent / "ts.json")
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def tied_head_of_its_own(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}))


FREQUENCIES = "model.layers.0.self_attn.rotary_emb.inv_freq"
Q = "model.layers.1.self_attn.q_proj.weight"
FAULTS: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "a missing tensor": (lambda f: rewrite(f, lambda t: t.pop(Q)), [Q, "lacks"]),
    "a wrong shape": (
        lambda f: rewrite(f, lambda t: t.update({Q: t[Q][:32].clone()})), [Q, "[32, 64]", "[64, 64]"],
    ),
    "an extra tensor": (
        lambda f: rewrite(f, lambda t: t.update({"model.layers.0.self_attn.sinks": torch.ones(4)})),
        ["model.layers.0.self_attn.sinks", "another model"],
    ),
    "a truncated file": (truncate, ["model.safetensors", "readable"]),
    "a head that is not the table": (tied_head_of_its_own, ["lm_head.weight", "tie"]),
    "weights of two types": (
        lambda f: rewrite(f, lambda t: t.update({Q: t[Q].bfloat16()})), ["BF16 and F32", "--precision"],
    ),
    "half precision": (
        lambda f: rewrite(f, lambda t: t.update({name: t[name].half() for name in t})), ["F16", "--precision"],
    ),
    "integers": (
        lambda f: rewrite(f, lambda t: t.update({Q: t[Q].to(torch.int8)})), ["I8", "needed"],
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["model.safetensors.index.json", "save_pretrained"]),
    "another architecture": (lambda f: edit_config(f, architectures=["MixtralForCausalLM"]), ["MixtralForCausalLM"]),
    "no head": (lambda f: edit_config(f, architectures=["Qwen2Model"]), ["Qwen2Model", "Qwen2ForCausalLM"]),
    "a sliding window": (lambda f: edit_config(f, use_sliding_window=True), ["use_sliding_window", "True"]),
    "layers with windows": (lambda f: edit_config(f, layer_types=["sliding_attention"] * 2), ["layer_types"]),
    "experts": (lambda f: edit_config(f, num_experts=8), ["num_experts", "8"]),
    "partial rotary": (lambda f: edit_config(f, partial_rotary_factor=0.5), ["partial_rotary_factor", "0.5"]),
    "another scaling": (
        lambda f: edit_config(f, rope_parameters=None, rope_scaling={"type": "yarn", "factor": 4.0}), ["'yarn'"],
    ),
    "half a scaling": (
        lambda f: edit_config(f, rope_parameters={"rope_type": "llama3", "factor": 4.0}), ["low_freq_factor"],
    ),
    "another activation": (lambda f: edit_config(f, hidden_act="gelu"), ["hidden_act", "'gelu'"]),
    "quantised": (lambda f: edit_config(f, quantization_config={"bits": 4}), ["quantization_config"]),
    "other biases": (
        lambda f: edit_config(f, architectures=["LlamaForCausalLM"], model_type="llama", attention_bias=True),
        ["attention_bias"],
    ),
    "another type than architecture": (
        lambda f: edit_config(f, architectures=["LlamaForCausalLM"]), ["LlamaForCausalLM", "model_type", "'qwen2'"],
    ),
    "rotary parameters by layer type": (
        lambda f: edit_config(f, rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 1e4}}),
        ["rope_parameters", "full_attention", "same for all layers"],
    ),
    "a scaling that is a word": (lambda f: edit_config(f, rope_scaling="llama3"), ["rope_scaling", "'llama3'"]),
    "weights of another file": (
        lambda f: edit_config(f, transformers_weights="other.safetensors"), ["transformers_weights", "'other.saf"],
    ),
    "a weight that is not a number": (
        lambda f: rewrite(f, lambda t: t[Q].view(-1)[:2].fill_(float("nan"))), [Q, "2 of 4,096", "not finite"],
    ),
    "a weight without bound": (
        lambda f: rewrite(f, lambda t: t["model.norm.weight"][3:4].fill_(float("-inf"))),
        ["model.norm.weight", "1 of 64", "not finite"],
    ),
    "rotary frequencies of another base": (
        lambda f: rewrite(f, lambda t: t.update({FREQUENCIES: 1 / 1e4 ** (torch.arange(8) / 8)})),
        [FREQUENCIES, "1e+06", "rope_theta", "take the tensor out"],
    ),
    "rotary frequencies of another width": (
        lambda f: rewrite(f, lambda t: t.update({FREQUENCIES: torch.ones(4)})), [FREQUENCIES, "1e+06"],
    ),
    "an adapter beside the model": (
        lambda f: (f / "adapter_config.json").write_text("{}"), ["adapter_config.json", "merge_and_unload"],
    ),
    "an adapter for a model": (
        lambda f: save_file({"base_model.model.layers.0.x.lora_A.weight": torch.ones(2)}, f / "model.safetensors"),
        ["lora_A", "merge_and_unload"],
    ),
    "a pickle": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), ["pytorch_model.bin", "pickle"],
    ),
    "shards without their index": (
        lambda f: (f / "model.safetensors").rename(f / "model-00001-of-00002.safetensors"),
        ["model-00001-of-00002.safetensors", "need their index"],
    ),
    "no shape": (lambda f: edit_config(f, intermediate_size=None), ["intermediate_size"]),
    "an impossible shape": (lambda f: edit_config(f, num_key_value_heads=3), ["num_query_groups"]),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_imported_is_refused_by_name(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    for path in good.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    injure, words = FAULTS[fault]
    injure(folder)
    output = tmp_path / "out" / "checkpoint"
    arguments = ["--input", str(folder), "--token-space", str(good.parent / "ts.json"), "--output", str(output)]
    assert cli.main(["convert", "import-hf", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and all(word in error for word in words), error
    assert list(output.parent.iterdir()) == []


def test_an_index_that_names_what_is_not_there_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], good: Path
) -> None:
    folder = tmp_path / "hf"
    make_backbone(folder, "qwen2", tied=True, max_shard_size="100KB")
    arguments = ["--token-space", str(good.parent / "ts.json"), "--output", str(tmp_path / "out")]

    def refused() -> str:
        assert cli.main(["convert", "import-hf", "--input", str(folder), *arguments]) == 2
        return capsys.readouterr().err

    index = folder / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    moved = {**value["weight_map"], "model.norm.weight": "model-00001-of-00006.safetensors"}
    first = sorted(set(value["weight_map"].values()))[0]
    moved["model.norm.weight"] = first if value["weight_map"]["model.norm.weight"] != first else "other"
    index.write_text(json.dumps({"weight_map": moved}))
    assert "model.norm.weight is not in" in refused()
    index.write_text(json.dumps(value))
    (folder / first).unlink()
    assert first in refused()


def imports(folder: Path, output: Path, good: Path, *flags: str) -> bool:
    arguments = ["--input", str(folder), "--token-space", str(good.parent / "ts.json"), "--output", str(output)]
    return cli.main(["convert", "import-hf", *arguments, *flags]) == 0


@pytest.mark.parametrize("stale", [True, False], ids=["an index out of date", "two whole models"])
def test_two_models_in_one_folder_are_refused_and_the_advice_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], good: Path, stale: bool
) -> None:
    folder = tmp_path / "hf"
    make_backbone(folder, "qwen2", tied=True, max_shard_size="100KB")
    for path in (folder / "model.safetensors", folder / "config.json"):
        path.write_bytes((good / path.name).read_bytes())
    index = folder / "model.safetensors.index.json"
    if stale:
        for path in folder.glob("model-*.safetensors"):
            path.unlink()
    assert not imports(folder, tmp_path / "no", good)
    error = capsys.readouterr().err
    assert "model.safetensors" in error and str(index) in error
    assert error.rstrip().endswith(f"delete {index}" if stale else f"{folder / 'model.safetensors'}, or {index}")
    (index if stale else folder / "model.safetensors").unlink()
    assert imports(folder, tmp_path / "yes", good)
    assert "those of transformers" in capsys.readouterr().out


def test_an_index_of_the_one_file_is_no_second_model(tmp_path: Path, good: Path) -> None:
    shutil.copytree(good, tmp_path / "hf")
    names = load_file(good / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert imports(tmp_path / "hf", tmp_path / "out", good)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rotary_frequencies_that_follow_from_the_base_are_left_aside(
    tmp_path: Path, good: Path, dtype: torch.dtype
) -> None:
    shutil.copytree(good, tmp_path / "hf")
    frequencies = 1 / 1e6 ** (torch.arange(0, 16, 2) / 16)
    names = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(2)]
    rewrite(tmp_path / "hf", lambda t: t.update({name: frequencies.to(dtype, copy=True) for name in names}))
    assert imports(tmp_path / "hf", tmp_path / "out", good)
    assert json.loads((tmp_path / "out" / "checkpoint.json").read_text())["precision"] == "fp32"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace("model.", "model.module.", 1),
        lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
    ],
    ids=["torch.compile", "DDP", "both", "inside", "one layer"],
)
def test_a_wrapped_model_is_refused_and_the_advice_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], good: Path, wrap: Callable[[str], str]
) -> None:
    shutil.copytree(good, tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    save_file({wrap(name): tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    assert not imports(tmp_path / "hf", tmp_path / "no", good)
    error = capsys.readouterr().err
    assert "wrapped model" in error and "import it with --unwrap" in error and "save_pretrained" in error
    assert imports(tmp_path / "hf", tmp_path / "yes", good, "--unwrap")
    assert "were not compared" in capsys.readouterr().out
    assert imports(good, tmp_path / "plain", good)
    ours, plain = (load_for_inference(tmp_path / name)[0].state_dict() for name in ("yes", "plain"))
    assert all(torch.equal(ours[name], plain[name]) for name in plain if isinstance(plain[name], torch.Tensor))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: TokenSpace.build(folder, CODEC), ["320 rows", "--base"]),
        (lambda folder: TokenSpace.build("bytes", CODEC), ["256 ids", "--base"]),
        (lambda folder: TokenSpace.build(other_tokenizer(folder), CODEC, base=folder), ["another id", "<|eot_id|>"]),
    ],
    ids=["no base", "bytes", "another tokenizer"],
)
def test_ids_that_are_not_the_backbones_are_refused(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Any, words: list[str]
) -> None:
    make(good).save(tmp_path / "ts.json")
    arguments = ["--token-space", str(tmp_path / "ts.json"), "--output", str(tmp_path / "out")]
    assert cli.main(["convert", "import-hf", "--input", str(good), *arguments]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error


def other_tokenizer(folder: Path) -> Path:
    """The folder's tokenizer with two tokens changed places."""
    spec = json.loads((folder / "tokenizer.json").read_text())
    tokens = {token["content"]: token for token in spec["added_tokens"]}
    one, two = tokens["<|eot_id|>"], tokens["<|eom_id|>"]
    one["content"], two["content"] = two["content"], one["content"]
    path = folder.parent / "other"
    path.mkdir(exist_ok=True)
    (path / "tokenizer.json").write_text(json.dumps(spec))
    return path


def test_an_extended_tokenizer_keeps_the_backbones_rows(good: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(qwen=True)
    size = tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"piece{i}" for i in range(320 - size + 5)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    space = TokenSpace.build(tmp_path, CODEC, base=good)
    assert space.text_size == 325
    space.save(tmp_path / "ts.json")
    arguments = ["--token-space", str(tmp_path / "ts.json"), "--output", str(tmp_path / "out")]
    assert cli.main(["convert", "import-hf", "--input", str(good), *arguments]) == 0
    assert json.loads((tmp_path / "out" / "checkpoint.json").read_text())["source"]["new_rows"]["count"] == (
        space.size - 320
    )


def test_what_exists_is_not_overwritten(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    arguments = ["--token-space", str(good.parent / "ts.json"), "--output", str(tmp_path)]
    assert cli.main(["convert", "import-hf", "--input", str(good), *arguments]) == 2
    assert cli.main(["convert", "export-hf", "--checkpoint", str(good), "--output", str(tmp_path)]) == 2
    assert "exists" in capsys.readouterr().err and (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("size", ["5", "0GB", "GB", "5 TB"])
def test_a_shard_size_that_is_none_is_refused(
    size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], good: Path
) -> None:
    arguments = ["--checkpoint", str(good), "--output", str(tmp_path / "x"), "--max-shard-size", size]
    assert cli.main(["convert", "export-hf", *arguments]) == 2
    assert "--max-shard-size" in capsys.readouterr().err
