"""A fine-tuning loop as users of `transformers` write it: a causal LM, padded rows, labels of -100, AdamW.

The step is that of `transformers.Trainer`: gradient accumulation, the loss divided by the number of learned tokens of
the whole step, autocast for bf16, gradients clipped by their norm, fused AdamW without decay on norms. What Trainer
does around it (callbacks, accelerate) is left out, in the peer's favour.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch

from megatron_speech.convert.architectures import write_config
from megatron_speech.convert.tensors import HEAD, slots
from megatron_speech.errors import InputError
from megatron_speech.recipe.learning_rate import LearningRateConfig
from megatron_speech.recipe.model import ModelConfig
from megatron_speech.recipe.optimizer import OptimizerConfig
from megatron_speech.recipe.stage import StageConfig
from megatron_speech.tokens.space import TokenSpace

Attention = Literal["sdpa", "eager"]
ATTENTIONS = get_args(Attention)


class PeerSample(NamedTuple):
    """A row of a Hugging Face dataset: int64 [n] each; labels are -100 where nothing is learned, and not shifted."""

    input_ids: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class PeerSetting:
    """How the loop batches its samples.

    Attributes:
        rows: samples of a micro-batch (per_device_train_batch_size).
        pad_to: tokens that every sample is padded to; None: the longest of the micro-batch.
        group_by_length: micro-batches of samples of about one length, by Trainer's own sampler.
        bf16: autocast to bfloat16; weights and optimizer stay fp32.
        attention: attn_implementation; on a CPU, torch's SDPA in bf16 is slower than matrix products.
    """

    rows: int
    pad_to: int | None = None
    group_by_length: bool = False
    bf16: bool = False
    attention: Attention = "sdpa"

    def describe(self) -> str:
        """The setting in words."""
        padding = f"padded to {self.pad_to}" if self.pad_to is not None else "padded to the longest"
        grouped = ", grouped by length" if self.group_by_length else ""
        precision = "bf16 autocast" if self.bf16 else "fp32"
        return f"{precision}, {self.attention} attention, {self.rows} samples a micro-batch, {padding}{grouped}"


def transformers_model(
    config: ModelConfig, space: TokenSpace, max_positions: int, attention: Attention = "sdpa"
) -> Any:
    """The model of `transformers` that computes what `config` says, in fp32, with attn_implementation `attention`.

    Raises:
        InputError: transformers is not installed, or has no such model.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise InputError("the peer needs the package transformers: pip install 'transformers>=4.57,<6'") from error
    fields = write_config(
        config, vocab_size=space.size, dtype="float32", max_position=max_positions, special_ids=space.special_ids
    )
    peer = AutoConfig.for_model(fields.pop("model_type"), **{**fields, "use_cache": False})
    return AutoModelForCausalLM.from_config(peer, attn_implementation=attention, dtype=torch.float32).train()


def collate(samples: Sequence[PeerSample], pad_to: int | None, pad_id: int) -> dict[str, torch.Tensor]:
    """Samples padded on the right, as DataCollatorForSeq2Seq does: input_ids, attention_mask, labels, int64 [B, L]."""
    longest = max(len(sample.input_ids) for sample in samples)
    shape = len(samples), longest if pad_to is None else pad_to
    if longest > shape[1]:
        raise InputError(f"a sample has {longest} tokens, more than the {shape[1]} that it would be padded to")
    batch = {
        "input_ids": np.full(shape, pad_id, dtype=np.int64),
        "attention_mask": np.zeros(shape, dtype=np.int64),
        "labels": np.full(shape, -100, dtype=np.int64),
    }
    for row, sample in enumerate(samples):
        end = len(sample.input_ids)
        batch["input_ids"][row, :end] = sample.input_ids
        batch["attention_mask"][row, :end] = 1
        batch["labels"][row, :end] = sample.labels
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def steps_of(
    steps: Sequence[Sequence[PeerSample]], setting: PeerSetting, seed: int
) -> list[list[Sequence[PeerSample]]]:
    """The samples of some optimizer steps as micro-batches, step by step.

    Grouped by length, samples are sorted within runs of 50 steps, as Trainer's sampler does it; the micro-batches are
    then shuffled, so that every step and every turn has about as much to do, and shared out evenly.
    """
    if not setting.group_by_length:
        return [[step[first : first + setting.rows] for first in range(0, len(step), setting.rows)] for step in steps]
    from transformers.trainer_pt_utils import get_length_grouped_indices

    samples = [sample for step in steps for sample in step]
    generator = torch.Generator().manual_seed(seed)
    order = get_length_grouped_indices(
        [len(sample.input_ids) for sample in samples],
        math.ceil(len(samples) / len(steps)),
        mega_batch_mult=min(50, len(steps)),
        generator=generator,
    )
    grouped = [
        [samples[index] for index in order[first : first + setting.rows]]
        for first in range(0, len(order), setting.rows)
    ]
    shuffled = torch.randperm(len(grouped), generator=generator).numpy()
    shares = np.array_split(shuffled, min(len(steps), len(grouped)))
    return [[grouped[index] for index in share] for share in shares]


class PeerTrainer:
    """The loop.

    Args:
        model: of transformers, in training mode.
        stage: its learning rate and number of steps are the loop's.
        optimizer: AdamW's settings and the clip.
        setting: how samples are batched.
        pad_id: id of padding.
    """

    def __init__(
        self, model: Any, stage: StageConfig, optimizer: OptimizerConfig, setting: PeerSetting, pad_id: int
    ) -> None:
        self.model, self.setting, self.pad_id = model, setting, pad_id
        self.clip_grad = optimizer.clip_grad
        matrices = [p for p in model.parameters() if p.dim() > 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": optimizer.weight_decay},
                {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
            ],
            lr=stage.lr.peak,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
            fused=True,
        )
        # LambdaLR counts from 0 and gives the rate of the next step: step k of our schedule is its k - 1.
        scale = stage.lr.batch_factor(stage.global_batch_tokens) / stage.lr.peak
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate(stage.lr, step + 1, stage.steps) * scale
        )

    def step(self, micro_batches: Sequence[Sequence[PeerSample]]) -> tuple[torch.Tensor, int]:
        """One optimizer step; returns Σ ce / learned tokens (before the update) and the number of learned tokens."""
        batches = [collate(samples, self.setting.pad_to, self.pad_id) for samples in micro_batches]
        learned = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        total = torch.zeros(())
        for batch in batches:
            with self._autocast():
                loss = self.model(**batch, num_items_in_batch=learned).loss
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad if self.clip_grad > 0 else math.inf)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return total, learned

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16) if self.setting.bf16 else contextlib.nullcontext()


def learning_rate(config: LearningRateConfig, step: int, steps: int) -> float:
    """The learning rate of step `step` (from 1) of `steps`: the closed form of :class:`LearningRateConfig`."""
    warmup = config.warmup_steps(steps)
    if step <= warmup:
        return config.peak * step / warmup
    if config.schedule == "constant":
        return config.peak
    done = (step - warmup) / (steps - warmup)
    share = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.floor + (config.peak - config.floor) * share


def transformers_weights(
    named: Iterable[tuple[str, torch.Tensor]], config: ModelConfig, vocab_size: int
) -> dict[str, torch.Tensor]:
    """Our model's weights, whole and by global name, as `transformers` names and cuts them; fp32."""
    parameters = dict(named)
    return {
        slot.name: slot.taken_from(parameters[slot.parameter].detach()).float() for slot in slots(config, vocab_size)
    }


def load_weights(model: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Give `model` the weights of :func:`transformers_weights`; every parameter must be among them."""
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = {HEAD} if model.config.tie_word_embeddings else set()
    if set(missing) - tied or unexpected:
        raise ValueError(f"the peer's weights do not fit: missing {missing}, unexpected {unexpected}")
