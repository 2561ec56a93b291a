"""Claims about backbones: the same logits and the same greedy speech as transformers, and back again bit by bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from backbones import CODEC, KINDS, VOCABULARY, make_backbone
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_speech import cli
from megatron_speech.generation.engine import SpeechGenerator
from megatron_speech.generation.requests import GenerationRequest
from megatron_speech.generation.sampling import SamplingConfig
from megatron_speech.model.packed import PackedSequences
from megatron_speech.tokens.space import TokenSpace
from megatron_speech.training.checkpoint.load import load_for_inference

Import = Callable[..., Path]
CASES = [(kind, tied) for kind in KINDS for tied in (True, False)]
NAMES = [f"{kind}-{'tied' if tied else 'untied'}" for kind, tied in CASES]


def export(checkpoint: Path, *flags: str) -> Path:
    output = checkpoint.parent / f"{checkpoint.name}-exported"
    assert cli.main(["convert", "export-hf", "--checkpoint", str(checkpoint), "--output", str(output), *flags]) == 0
    return output


def our_logits(checkpoint: Path, ids: torch.Tensor) -> torch.Tensor:
    """[B, S] ids as packed documents → [B, S, padded vocabulary]."""
    model, _, _ = load_for_inference(checkpoint)
    rows, length = ids.shape
    packed = PackedSequences.build(torch.arange(0, rows * length + 1, length, dtype=torch.int32))
    with torch.no_grad():
        return model(ids.reshape(1, -1), None, None, packed_seq_params=packed).view(rows, length, -1)


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tied"), CASES, ids=NAMES)
def test_logits_are_those_of_transformers_both_ways(tmp_path: Path, imported: Import, kind: str, tied: bool) -> None:
    theirs = make_backbone(tmp_path / "hf", kind, tied=tied, max_shard_size="100KB" if tied else "5GB")
    checkpoint = imported(tmp_path / "hf")
    folder = export(checkpoint, "--max-shard-size", "60KB" if tied else "5GB")
    # Longer than the first training of the rotary scaling, so that every frequency shows.
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, VOCABULARY, (2, 150)))
    with torch.no_grad():
        wanted = theirs(ids).logits
    assert (our_logits(checkpoint, ids)[..., :VOCABULARY] - wanted).abs().max() <= 1e-4
    again = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(again) is type(theirs)
    with torch.no_grad():
        assert torch.equal(again(ids).logits[..., :VOCABULARY], wanted)
    new = torch.randint(VOCABULARY, again.config.vocab_size, (1, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (our_logits(checkpoint, new)[..., : again.config.vocab_size] - again(new).logits).abs().max() <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_round_trip_keeps_every_bit(tmp_path: Path, imported: Import, kind: str, dtype: torch.dtype) -> None:
    make_backbone(tmp_path / "hf", kind, dtype=dtype, max_shard_size="200KB")
    checkpoint = imported(tmp_path / "hf")
    assert json.loads((checkpoint / "checkpoint.json").read_text())["precision"] == (
        "fp32" if dtype == torch.float32 else "bf16"
    )
    folder = export(checkpoint, "--max-shard-size", "60KB")
    before, after = all_tensors(tmp_path / "hf"), all_tensors(folder)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        rows = len(tensor) if name in ("model.embed_tokens.weight", "lm_head.weight") else None
        assert after[name].dtype == dtype and torch.equal(after[name][:rows], tensor), name
    # And a second time, from what was exported: the new rows too.
    again = folder.parent / "again"
    arguments = ["--token-space", str(folder / "token_space.json"), "--output", str(again)]
    assert cli.main(["convert", "import-hf", "--input", str(folder), *arguments]) == 0
    twice = all_tensors(export(again))
    assert twice.keys() == after.keys() and all(torch.equal(twice[name], after[name]) for name in twice)


def test_shards_are_no_larger_than_asked_and_indexed(tmp_path: Path, imported: Import) -> None:
    make_backbone(tmp_path / "hf", "llama")
    folder = export(imported(tmp_path / "hf"), "--max-shard-size", "130KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 2 and sorted(set(index["weight_map"].values())) == shards
    total = 0
    for name in shards:
        tensors = load_file(folder / name)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= 130_000 or len(tensors) == 1
        total += size
        with safe_open(folder / name, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
    assert index["metadata"]["total_size"] == total


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("qwen2", False), ("qwen3", True)])
def test_greedy_speech_is_that_of_transformers(tmp_path: Path, imported: Import, kind: str, tied: bool) -> None:
    make_backbone(tmp_path / "hf", kind, tied=tied)
    checkpoint = imported(tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(export(checkpoint))
    generator = SpeechGenerator.from_checkpoint(checkpoint)
    space = generator.space
    requests = [GenerationRequest(text) for text in ("one two", "three", "four four four")]
    results = generator.generate(requests, SamplingConfig(temperature=0.0, max_seconds=0.8))
    end = space.special("<speech_end>")
    legal = {*space.codebooks[0].ids.tolist(), end}
    for request, result in zip(requests, results, strict=True):
        prompt = torch.from_numpy(generator.prompt(request)[None].astype(np.int64))
        spoken = model.generate(
            prompt,
            do_sample=False,
            max_new_tokens=40,
            eos_token_id=end,
            suppress_tokens=[i for i in range(space.size) if i not in legal],
            begin_suppress_tokens=[end],
        )[0, prompt.shape[1] :].tolist()
        assert result.ended == (end in spoken)
        assert space.encode_codes(result.codes).tolist() == [i for i in spoken if i != end]


@pytest.mark.slow
def test_tokenizer_and_generation_config_have_every_id(tmp_path: Path, imported: Import) -> None:
    for kind in ("llama", "qwen2"):
        make_backbone(tmp_path / kind, kind, tied=True)
        checkpoint = imported(tmp_path / kind)
        folder = export(checkpoint)
        space = TokenSpace.load(checkpoint / "token_space.json")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert len(tokenizer) == space.size == json.loads((folder / "config.json").read_text())["vocab_size"]
        names = [f"<|s_{code}|>" for code in range(CODEC.codebook_sizes[0])]
        assert tokenizer.convert_tokens_to_ids(names) == space.codebooks[0].ids.tolist()
        for name, number in space.special_ids.items():
            assert tokenizer.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(number)) == number
            if number >= VOCABULARY:
                assert tokenizer.convert_ids_to_tokens(number) == name
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (space.special("<bos>"), space.special("<eos>"))
        for text in ("one two three 12345", "नमस्ते e\u0301te"):
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == space.encode_text(text).tolist()
        speech = tokenizer("<speech_start><|s_7|><|s_0|><speech_end>", add_special_tokens=False)["input_ids"]
        start, end = space.special("<speech_start>"), space.special("<speech_end>")
        assert speech == [start, *space.encode_codes(np.array([7, 0])).tolist(), end]
        generation = transformers.GenerationConfig.from_pretrained(folder)
        assert generation.eos_token_id == [end, space.special("<eos>")]


def test_a_model_of_bytes_exports_as_llama_with_a_tokenizer_of_bytes(tmp_path: Path) -> None:
    from toy_runs import make_token_space

    from megatron_speech.model.builder import build_model
    from megatron_speech.parallel import groups
    from megatron_speech.recipe.model import ModelConfig
    from megatron_speech.training.checkpoint.save import save_weights

    several = CODEC.__class__("toy", "toy-2", 8000, 25.0, ("vq", "pitch"), (16, 8))
    space = make_token_space(tmp_path / "ts.json", several)
    config = ModelConfig.model_validate({"preset": "tiny"})
    if not torch.distributed.is_initialized():
        groups.initialize()
    chunks = build_model(config, space.padded_size, valid_vocab_size=space.size, seed=3)
    path = tmp_path / "checkpoint"
    save_weights(path, space=space, model=config, precision="fp32", max_seq_length=64, chunks=chunks)
    folder = export(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is transformers.LlamaForCausalLM and model.config.vocab_size == space.size
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "a ü नमस्ते\n  b"
    assert tokenizer(text)["input_ids"] == list(text.encode()) == space.encode_text(text).tolist()
    assert tokenizer.decode(list(text.encode())) == text
    assert (
        tokenizer.convert_tokens_to_ids(["<|vq_3|>", "<|pitch_7|>"]) == space.encode_codes(np.array([[3, 7]])).tolist()
    )
    ids = torch.arange(space.size)[None]
    with torch.no_grad():
        assert (our_logits(path, ids)[..., : space.size] - model(ids).logits).abs().max() <= 1e-4


def test_what_a_tokenizer_cannot_keep_is_said(
    tmp_path: Path, imported: Import, capsys: pytest.CaptureFixture[str]
) -> None:
    """A Qwen2 model with LLaMA's tokenizer, and a sentencepiece model."""
    import sentencepiece
    from backbones import make_tokenizer

    from megatron_speech.convert.export_tokenizer import write_tokenizer

    make_backbone(tmp_path / "hf", "qwen2", tied=True, tokenizer=make_tokenizer())
    folder = export(imported(tmp_path / "hf"))
    assert "open it with PreTrainedTokenizerFast" in capsys.readouterr().out
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    space = TokenSpace.load(folder / "token_space.json")
    assert tokenizer("one 12345", add_special_tokens=False)["input_ids"] == space.encode_text("one 12345").tolist()

    (tmp_path / "text.txt").write_text("one two three four five six seven\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "spm"),
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    space = TokenSpace.build(tmp_path / "spm.model", CODEC)
    assert "token_space.json" in write_tokenizer(tmp_path, space, 64, "LlamaForCausalLM")[0]
    assert (tmp_path / "tokenizer.model").read_bytes() == space.text_payload
    assert not (tmp_path / "tokenizer.json").exists()
