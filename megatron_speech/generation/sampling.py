"""Choosing the next token: legal ids, filters, and noise that belongs to one request.

Shapes: B requests in flight, V ids of the (padded) vocabulary, n legal ids at the present position,
K codebooks, t the index of the token within the generated speech (frame t // K, codebook t % K).

All requests of a batch stand at the same t, so the legal ids are one short list for the whole batch and
nothing here loops over requests in Python.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_speech.errors import InputError
from megatron_speech.modalities import MODALITY_TEXT
from megatron_speech.tokens.space import TokenSpace

# Constants of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014),
# as signed 64-bit integers because torch multiplies those with wrap-around on every device.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn. Applied in this order: repetition penalty, temperature, top-k, top-p.

    Attributes:
        temperature: divides the logits; 0 takes the most probable legal id (greedy).
        top_k: keep the k most probable legal ids; 0 keeps all.
        top_p: keep the smallest set of most probable legal ids whose probability reaches p; 1 keeps all.
        repetition_penalty: logits of ids that this utterance has already produced are divided by it where
            positive and multiplied by it where negative (Keskar et al. 2019, CTRL); 1 is off. The prompt is not
            counted: a reference voice must be free to be repeated. Small codebooks (an energy of 16 levels) are
            soon wholly "repeated", so values above about 1.2 hurt them.
        max_seconds: speech longer than this is cut there and counted as a stop failure.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    max_seconds: float = 30.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise InputError(f"{field.name} is {value!r}; it must be a finite number")
        if self.temperature < 0:
            raise InputError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if self.top_k < 0 or self.top_k != int(self.top_k):
            raise InputError(f"top_k is {self.top_k}; it must be a whole number, 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it must be above 0 and at most 1 (off)")
        if self.repetition_penalty <= 0:
            raise InputError(f"repetition_penalty is {self.repetition_penalty}; it must be above 0 (1 is off)")
        if self.max_seconds <= 0:
            raise InputError(f"max_seconds is {self.max_seconds}; it must be above 0")


class LegalIds(Protocol):
    """The ids that may come at each position of what is generated, which ends with `end_id`.

    It may end where a whole number of units of `unit_tokens` tokens precedes, but not before the first.
    """

    end_id: int
    unit: str  # in messages: what `unit_tokens` tokens are
    unit_tokens: int

    def at(self, position: int) -> Tensor:
        """Legal ids int64 [n] of token `position` (0 is the first token after the prompt)."""
        ...


class LegalText:
    """The ids that may come in generated text: those of text, and after the first one `</target_text>`."""

    unit, unit_tokens = "token", 1

    def __init__(self, space: TokenSpace, device: torch.device) -> None:
        self.end_id = space.special("</target_text>")
        is_text = space.modality_table() == MODALITY_TEXT
        is_text[: space.text_size] &= ~space.control_ids
        text = torch.from_numpy(np.flatnonzero(is_text)).to(device)
        self._first, self._later = text, torch.cat([text, torch.tensor([self.end_id], device=device)])

    def at(self, position: int) -> Tensor:
        """Legal ids int64 [n] of token `position` (0 is the first token after `<target_text>`)."""
        return self._first if position == 0 else self._later


class LegalCodes:
    """The ids that may come at each position of generated speech.

    Token t belongs to codebook t mod K. `<speech_end>` may come at a frame edge (t mod K = 0), but not at t = 0:
    an utterance has at least one frame.
    """

    def __init__(self, space: TokenSpace, device: torch.device) -> None:
        self.end_id = space.special("<speech_end>")
        self.unit, self.unit_tokens = "frame", space.codebook_count
        codebooks = [torch.from_numpy(c.ids.astype("int64")).to(device) for c in space.codebooks]
        self._first = codebooks[0]
        self._cycle = list(codebooks)
        self._cycle[0] = torch.cat([codebooks[0], torch.tensor([self.end_id], device=device)])

    def at(self, position: int) -> Tensor:
        """Legal ids int64 [n] of token `position` (0 is the first token after `<speech_start>`)."""
        return self._first if position == 0 else self._cycle[position % self.unit_tokens]


def illegal_share(logits_BV: Tensor, legal_Bn: Tensor) -> tuple[Tensor, Tensor]:
    """How much an unrestricted model would have erred: (invalid-token rate [B], argmax is invalid [B]).

    Args:
        logits_BV: logits float [B, V] of the whole vocabulary.
        legal_Bn: the columns of it that are legal, float [B, n].

    Returns:
        The softmax mass (at temperature 1, float32) on illegal ids, which is the expected invalid-token rate of
        unrestricted sampling, and bool: the most probable id of all is an illegal one.
    """
    log_mass = torch.logsumexp(legal_Bn.float(), 1) - torch.logsumexp(logits_BV.float(), 1)
    return -torch.expm1(log_mass.clamp(max=0.0)), legal_Bn.amax(1) < logits_BV.amax(1)


def not_finite(logits_Bn: Tensor) -> Tensor:
    """Rows that nothing can be drawn from, bool [B]: with a NaN or +infinity, or with nothing above -infinity."""
    return ~torch.isfinite(logits_Bn.amax(1))


def probabilities(logits_Bn: Tensor, config: SamplingConfig, seen_Bn: Tensor | None = None) -> Tensor:
    """The distribution that is sampled from, float64 [B, n], rows sum to 1.

    Args:
        logits_Bn: logits of the legal ids, float [B, n].
        config: see :class:`SamplingConfig`. Ties are broken in favour of the earlier column, so exactly
            min(top_k, n) ids survive top-k.
        seen_Bn: bool [B, n], which of the ids the utterance has already produced; needed when
            `config.repetition_penalty` is not 1.
    """
    logits_Bn = logits_Bn.double()
    if config.repetition_penalty != 1.0 and seen_Bn is not None:
        penalty = config.repetition_penalty
        penalised_Bn = torch.where(logits_Bn > 0, logits_Bn / penalty, logits_Bn * penalty)
        logits_Bn = torch.where(seen_Bn, penalised_Bn, logits_Bn)
    if config.temperature == 0:
        return torch.zeros_like(logits_Bn).scatter_(1, logits_Bn.argmax(1, keepdim=True), 1.0)
    probs_Bn = torch.softmax(logits_Bn / config.temperature, 1)
    size = probs_Bn.shape[1]
    if (config.top_k == 0 or config.top_k >= size) and config.top_p >= 1:
        return probs_Bn
    ranked_Bn, order_Bn = torch.sort(probs_Bn, dim=1, descending=True, stable=True)
    if 0 < config.top_k < size:
        ranked_Bn[:, int(config.top_k) :] = 0.0
        ranked_Bn /= ranked_Bn.sum(1, keepdim=True)
    if config.top_p < 1:
        # An id stays while the mass before it has not reached p: the most probable one always stays.
        before_Bn = ranked_Bn.cumsum(1) - ranked_Bn
        ranked_Bn = ranked_Bn.masked_fill(before_Bn >= config.top_p, 0.0)
        ranked_Bn /= ranked_Bn.sum(1, keepdim=True)
    return torch.zeros_like(probs_Bn).scatter_(1, order_Bn, ranked_Bn)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's `>>` on int64 copies the sign bit."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _splitmix64(state: Tensor) -> Tensor:
    value = state + _GOLDEN
    value = (value ^ _shift_right(value, 30)) * _MIX_1
    value = (value ^ _shift_right(value, 27)) * _MIX_2
    return value ^ _shift_right(value, 31)


def uniform_noise(seeds_B: Tensor, position: int) -> Tensor:
    """One uniform number in [0, 1) per request, float64 [B]: a function of (seed, position) and nothing else.

    Counter-based (SplitMix64 over the seed, then over the position), so that a request draws the same noise
    alone, in any batch, at any place in it, and on any device.

    Args:
        seeds_B: int64 [B].
        position: index of the token within the generated speech.
    """
    bits = _splitmix64(_splitmix64(seeds_B) + position)
    return _shift_right(bits, 11).double() * 2.0**-53


def sample(probs_Bn: Tensor, uniform_B: Tensor) -> Tensor:
    """Draw one column per row by inverting the cumulative distribution, int64 [B].

    A column of probability 0 is never drawn. Of a row that is not finite (see :func:`not_finite`) the last column is
    drawn: an index that is there, for the caller to refuse.

    Args:
        probs_Bn: float64 [B, n], not negative, each row with a positive sum.
        uniform_B: float64 [B] in [0, 1).
    """
    cumulative_Bn = probs_Bn.cumsum(1)
    total_B = cumulative_Bn[:, -1]
    # Rounding may lift u * total to total itself, beyond the last column that has any mass.
    target_B = torch.minimum(uniform_B * total_B, torch.nextafter(total_B, torch.zeros_like(total_B)))
    drawn_B = torch.searchsorted(cumulative_Bn, target_B.unsqueeze(1), right=True).squeeze(1)
    return drawn_B.clamp_(max=probs_Bn.shape[1] - 1)
