"""Datasets written here train in stock megatron-core, and files written as upstream's tool writes them train here."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from megatron_speech.benchmark.data_text import Peer, compare_ids
from megatron_speech.benchmark.measure import run_measured
from megatron_speech.benchmark.peer_loader import Tokenizer
from megatron_speech.data.dataset.indexed import TokenDataset
from megatron_speech.data.dataset.verify import verify_dataset
from megatron_speech.environment import prepare_imports

SEQ_LENGTH = 64
TEXTS = ["one two three", "four", "five six", "seven eight nine ten " * 9, "नमस्ते दुनिया", "ሰላም ለዓለም"] * 20


def upstream_dataset(prefixes, tokenizer, cache, samples, *, documents=True, masks=False):
    """The training split of megatron-core's own builder, dataset and blend, called as its pretrain_gpt.py does."""
    prepare_imports()
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=5,
        sequence_length=SEQ_LENGTH,
        blend=([str(prefix) for prefix in prefixes], None if len(prefixes) == 1 else [1.0] * len(prefixes)),
        split="1,0,0",
        path_to_cache=str(cache),
        tokenizer=tokenizer,
        reset_position_ids=documents,
        reset_attention_mask=documents,
        eod_mask_loss=documents,
        create_attention_mask=masks,
    )
    train, _, _ = BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config).build()
    return train


def upstream_tokenizer(space, eod):
    return Tokenizer(space.special(eod), space.special("<pad>"), space.padded_size)


@pytest.fixture(scope="module")
def written(toy_space, make_dataset, document, tmp_path_factory):
    """Speech pairs and text, written by this project's writer."""
    folder = tmp_path_factory.mktemp("written")
    lengths = np.random.default_rng(0).integers(3, 90, 60)
    pairs = [document(codes=int(n), text=1 + int(n) // 5) for n in lengths]
    text = [document(text=int(n)) for n in lengths]
    return {
        "tts": make_dataset(folder / "tts", toy_space, "tts", pairs),
        "text_lm": make_dataset(folder / "text", toy_space, "text_lm", text, seed=1),
    }


@pytest.mark.parametrize("task", ["tts", "text_lm"])
def test_every_sample_of_upstreams_dataset_holds_the_tokens_written_here(written, toy_space, tmp_path, task):
    dataset = written[task]
    samples = dataset.lengths.sum() // SEQ_LENGTH
    theirs = upstream_dataset([dataset.prefix], upstream_tokenizer(toy_space, "<eos>"), tmp_path, int(samples))
    (stock,) = [theirs] if hasattr(theirs, "document_index") else theirs.datasets
    order = np.concatenate([dataset.document(int(i)) for i in stock.document_index])
    assert len(stock) >= samples - 1
    for i, place in enumerate(stock.shuffle_index):
        sample = stock[i]
        expected = order[place * SEQ_LENGTH : (place + 1) * SEQ_LENGTH + 1]
        np.testing.assert_array_equal(sample["tokens"].numpy(), expected[:-1])
        np.testing.assert_array_equal(sample["labels"].numpy(), expected[1:])


def test_a_tiny_stock_model_learns_from_datasets_written_here(written, toy_space, tmp_path):
    from megatron_speech.parallel import cpu_runtime, groups

    if not cpu_runtime.needed():
        pytest.skip("this machine has CUDA; the test is of the CPU")
    prefixes = [dataset.prefix for dataset in written.values()]
    groups.destroy()
    groups.initialize(seed=3)
    try:
        data = upstream_dataset(prefixes, upstream_tokenizer(toy_space, "<eos>"), tmp_path, 120, masks=True)
        losses = train_stock_model(data, toy_space.padded_size)
    finally:
        groups.destroy()
    assert np.mean(losses[:3]) > 0.9 * math.log(toy_space.padded_size)
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])


def train_stock_model(data, vocab_size):
    """Losses of 30 steps of megatron-core's GPTModel, four sequences each."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    shape = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    config = TransformerConfig(
        **shape, use_cpu_initialization=True, pipeline_dtype=torch.float32, attention_dropout=0.0, hidden_dropout=0.0
    )
    torch.manual_seed(0)
    model = GPTModel(config, get_gpt_layer_local_spec(), vocab_size, SEQ_LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = iter(torch.utils.data.DataLoader(data, batch_size=4))
    losses = []
    for _ in range(30):
        batch = next(loader)
        per_token = model(batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"])
        loss = (per_token * batch["loss_mask"]).sum() / batch["loss_mask"].sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def write_as_upstream(prefix, documents, vocab_size):
    """What tools/preprocess_data.py does with the ids of each document, eod included."""
    prepare_imports()
    from megatron.core.datasets import indexed_dataset

    dtype = indexed_dataset.DType.optimal_dtype(vocab_size)
    builder = indexed_dataset.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for ids in documents:
        builder.add_document(ids, [len(ids)])
    builder.finalize(f"{prefix}.idx")


def convert(repository, *arguments, expect=0):
    done = subprocess.run(
        [sys.executable, repository / "preprocess" / "preprocess_data.py", "--workers", "1", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def taken_over(toy_space, repository, tmp_path_factory):
    """(folder, documents): files as upstream's tool writes them, and the dataset that they became here."""
    folder = tmp_path_factory.mktemp("upstream")
    toy_space.save(folder / "ts.json")
    documents = [[*toy_space.encode_text(text).tolist(), toy_space.special("<eos>")] for text in TEXTS]
    write_as_upstream(folder / "up_text_document", documents, toy_space.text_size + 16)
    flags = ("--task", "text_lm", "--input", folder / "up_text_document.idx", "--language", "en")
    convert(repository, *flags, "--token-space", folder / "ts.json", "--output-prefix", folder / "text")
    return folder, documents


def test_documents_of_upstreams_builder_keep_their_ids(taken_over, toy_space):
    folder, documents = taken_over
    dataset = TokenDataset(folder / "text")
    assert len(dataset) == len(documents)
    for i, ids in enumerate(documents):
        # The document here is <bos> text <eos>: upstream's own end is taken off, and stands once.
        assert dataset.document(i).tolist() == [toy_space.special("<bos>"), *ids]
    verify_dataset(dataset.prefix, require_manifest=dataset.manifest is not None).require()


def test_files_of_upstreams_builder_train_here(taken_over, tmp_path):
    from megatron_speech.cli import main

    folder, _ = taken_over
    recipe = {
        "name": "taken-over",
        "seed": 1,
        "token_space": str(folder / "ts.json"),
        "run_dir": str(tmp_path / "run"),
        "model": {"preset": "tiny", "num_query_groups": 4},
        "data": {"datasets": [str(folder / "text")], "validation_fraction": 0.0},
        "stages": [
            {
                "name": "pt",
                "task_mass": {"text_lm": 1.0},
                "tokens": 12 * 512,
                "seq_length": SEQ_LENGTH,
                "micro_batch_size": 2,
                "global_batch_tokens": 512,
                "max_epochs": 100,
                "lr": {"peak": 5e-3, "end": 1e-3, "warmup": 0.25},
            }
        ],
        "checkpoint": {"interval_steps": 0},
        "validation": {"interval_steps": 0},
        "logging": {"interval_steps": 1, "tensorboard": False},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["train", str(path)]) == 0
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 12 and losses[-1] < 0.8 * losses[0]


def test_ids_that_are_no_text_of_the_token_space_are_refused(toy_space, repository, tmp_path):
    toy_space.save(tmp_path / "ts.json")
    write_as_upstream(tmp_path / "up", [[5, 6, toy_space.size + 1]] * 3, 32_000)
    flags = ("--task", "text_lm", "--input", tmp_path / "up.idx", "--token-space", tmp_path / "ts.json")
    done = convert(repository, *flags, "--output-prefix", tmp_path / "text", expect=2)
    assert done.stderr.count("\n") == 1 and "text_id_outside_tokenizer" in done.stderr
    assert not (tmp_path / "text.bin").exists()


def test_upstreams_own_tool_gives_the_text_ids_that_ours_gives(repository, tmp_path):
    """MEGATRON_LM names a checkout, MEGATRON_LM_PYTHON an interpreter with what its tools import."""
    from megatron_speech.benchmark.data_corpus import BenchmarkCorpus
    from megatron_speech.benchmark.data_text import prepare

    checkout = os.environ.get("MEGATRON_LM")
    if checkout is None:
        pytest.skip("MEGATRON_LM is not set: no checkout of Megatron-LM to run the real tool of")
    peer = Peer(Path(checkout), os.environ.get("MEGATRON_LM_PYTHON", sys.executable))
    peer.check()
    tokenizer, space = prepare(tmp_path, None, 2000, seed=0)
    text = tmp_path / "text.jsonl"
    BenchmarkCorpus("transcripts").write_jsonl(text, 500)
    run_measured(peer.command(text, tokenizer, tmp_path / "up", 1), peer.environment)
    flags = ("--task", "text_lm", "--token-space", space, "--language", "en")
    convert(repository, *flags, "--input", text, "--output-prefix", tmp_path / "ours")
    assert compare_ids(tmp_path / "ours", tmp_path / "up_text_document")["identical"]
    # And the files that the tool left are taken over with the same ids; its eod is the tokenizer's own.
    eod = json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"]["<|end|>"]
    taken = ("--input", tmp_path / "up_text_document.idx", "--input-eod", eod, "--output-prefix", tmp_path / "taken")
    convert(repository, *flags, *taken)
    assert (tmp_path / "taken.bin").read_bytes() == (tmp_path / "ours.bin").read_bytes()
