"""Megatron-core's own GPTDataset behind a torch DataLoader: tokens per second into batches, over files of ours.

    python -m megatron_speech.benchmark.peer_loader PREFIX --tokens 1e8 --documents --json F

The classes are those of the installed megatron-core, unchanged; what `megatron.training` would put around them (a
sampler that counts up) is a range of numbers here.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron_speech.environment import prepare_imports
from megatron_speech.files import write_json


class Tokenizer:
    """The few things that GPTDataset asks of a tokenizer."""

    def __init__(self, eod: int, pad: int, vocab_size: int) -> None:
        self.eod = self.eos = eod
        self.pad = pad
        self.vocab_size = vocab_size
        self.special_tokens_dict = {"eos_token": eod, "pad_token": pad}
        self.unique_identifiers = {"class": type(self).__name__, "eod": eod}


def build_dataset(
    prefix: Path, *, samples: int, seq_length: int, tokenizer: Tokenizer, cache: Path, documents: bool, seed: int
) -> Any:
    """The stock training split (all of it) of the dataset at `prefix`, `samples` sequences of `seq_length`.

    Args:
        prefix: P of P.bin and P.idx.
        samples: sequences to draw.
        seq_length: tokens of a sequence.
        tokenizer: says which id ends a document.
        cache: folder of the indices that are built.
        documents: positions begin anew after the end of a document, and that end's successor is not learned.
        seed: of the order.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend=([str(prefix)], None),
        split="1,0,0",
        path_to_cache=str(cache),
        tokenizer=tokenizer,
        reset_position_ids=documents,
        reset_attention_mask=False,
        eod_mask_loss=documents,
        create_attention_mask=False,
    )
    train, _, _ = BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config).build()
    return train


def measure(
    prefix: Path, *, tokens: int, seq_length: int, micro_batch_size: int, documents: bool, seed: int
) -> dict[str, Any]:
    """Read `tokens` tokens in micro-batches, in this process."""
    from torch.utils.data import BatchSampler, DataLoader

    from megatron_speech.benchmark.loader import toy_space

    space = toy_space()
    batches = max(1, tokens // (seq_length * micro_batch_size))
    samples = batches * micro_batch_size
    tokenizer = Tokenizer(space.special("<speech_end>"), space.special("<pad>"), space.size)
    with tempfile.TemporaryDirectory(prefix="megatron-speech-peer-") as cache:
        dataset = build_dataset(
            prefix,
            samples=samples,
            seq_length=seq_length,
            tokenizer=tokenizer,
            cache=Path(cache),
            documents=documents,
            seed=seed,
        )
        loader = DataLoader(dataset, batch_sampler=BatchSampler(range(samples), micro_batch_size, drop_last=False))
        read = 0
        begin, cpu = time.perf_counter(), time.process_time()
        for batch in loader:
            read += batch["tokens"].numel()
        wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
    return {
        "tokens": read,
        "documents": documents,
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "tokens_per_second": read / wall,
        "tokens_per_cpu_second": read / cpu,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("prefix", type=Path, help="P of P.bin and P.idx, made by megatron_speech.benchmark.loader")
    add("--tokens", type=float, default=1e8, help="tokens to read (default: 1e8)")
    add("--seq-length", type=int, default=2048, help="tokens of a sequence (default: 2048)")
    add("--micro-batch-size", type=int, default=4, help="rows (default: 4)")
    add("--documents", action="store_true", help="reset positions and mask the loss at the ends of documents")
    add("--seed", type=int, default=0, help="of the order (default: 0)")
    add("--json", type=Path, required=True, metavar="F", help="write the figures to this file")
    args = parser.parse_args()
    prepare_imports()
    figures = measure(
        args.prefix,
        tokens=int(args.tokens),
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        documents=args.documents,
        seed=args.seed,
    )
    write_json(args.json, figures)


if __name__ == "__main__":
    main()
