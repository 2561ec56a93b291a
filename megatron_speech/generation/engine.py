"""Batched generation: of speech (prompts in, codes out) and of text (speech in, its transcript out).

Requests of a batch have prompts of any length but stand at the same position of their *target*: the prompts are
prefilled as one packed row, then every request takes one token per step, so each step has one short list of legal
ids. Requests that have ended are dropped from the batch once a quarter of it is idle.

A request's result is a function of the model, the prompt and the seed: its noise does not know what else is in the
batch. (Logits may differ in their last bits with the shape of a batch, as matrix products do.)

Shapes: B requests in flight, V ids, K codebooks, T frames.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_speech.codecs import Codec, decode_checked, encode_checked, get_codec
from megatron_speech.codecs.audio import read_audio
from megatron_speech.errors import InputError
from megatron_speech.generation.prompts import Utterance
from megatron_speech.generation.requests import GenerationRequest
from megatron_speech.generation.sampling import (
    LegalCodes,
    LegalIds,
    LegalText,
    SamplingConfig,
    illegal_share,
    not_finite,
    probabilities,
    sample,
    uniform_noise,
)
from megatron_speech.model.gpt import SpeechGPTModel
from megatron_speech.model.packed import PackedSequences
from megatron_speech.model.state import GenerationState
from megatron_speech.tokens.control_tags import encode_tagged
from megatron_speech.tokens.normalization import normalize_transcript
from megatron_speech.tokens.space import TokenSpace
from megatron_speech.tokens.templates import compile_cloning_prompt, compile_prompt
from megatron_speech.training.checkpoint.load import load_for_inference

# Requests in flight at once. A step of a small model costs nearly the same for 1 as for 100 of them.
DEFAULT_BATCH_SIZE = 128

# Rows of ended requests are computed in vain until they are more than this share of the batch; dropping them
# copies the cache, so it is not done for each one.
_IDLE_SHARE = 0.25


@dataclass(frozen=True, kw_only=True)
class _Sampled:
    """How the sampling of one request went.

    Attributes:
        ended: the model itself ended, with `<speech_end>` or `</target_text>`.
        stop_reason: "end", or the limit that cut it (a stop failure): "max_seconds" of speech, "max_tokens" of text, or
            "context" (no room left in the model's sequence length).
        prompt_tokens: length of the prompt.
        generated_tokens: tokens sampled, the end included.
        invalid_token_rate: mean probability (temperature 1) that the model put on ids which were not legal at their
            place: the invalid-token rate that unrestricted sampling would have had.
        invalid_argmax_rate: share of positions at which the most probable id was not a legal one.
    """

    ended: bool
    stop_reason: str
    prompt_tokens: int
    generated_tokens: int
    invalid_token_rate: float
    invalid_argmax_rate: float


@dataclass(frozen=True, kw_only=True)
class GenerationResult(_Sampled):
    """One utterance as the model gave it; `codes` int32 [T, K], T >= 1."""

    codes: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Transcription(_Sampled):
    """What a model of the task `asr` writes down of one recording: its `text`."""

    text: str


class NotFiniteError(Exception):
    """A model's logits are NaN or infinite.

    Attributes:
        row: of the batch.
        position: of the first audio token that could not be drawn, counted from 0.
    """

    def __init__(self, row: int, position: int) -> None:
        super().__init__(f"the logits of row {row} are not finite at audio token {position}")
        self.row, self.position = row, position


class DecodingSession(Protocol):
    """What the engine asks of a model: rows of a batch, fed token by token.

    streams: ids that a row takes at each step; :func:`decode_batch` samples one.
    """

    streams: int

    def prefill(self, prompts: Sequence[np.ndarray]) -> Tensor:
        """Feed the prompts (int32 [n_b] each); logits [B, V] of what follows each."""
        ...

    def step(self, ids_B: Tensor) -> Tensor:
        """Feed one more id per row, int64 [B]; logits [B, V] of what follows."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but `rows`, int64, ascending."""
        ...


# (rows, most positions that any row will take) → a session with room for them.
SessionFactory = Callable[[int, int], DecodingSession]


class CachedSession:
    """A :class:`DecodingSession` of a megatron-core model with the state of its layers: keys and values."""

    streams = 1
    # Room for so many new tokens is taken at once: most speech ends long before its limit.
    ROOM_TOKENS = 256

    def __init__(self, model: SpeechGPTModel, rows: int, capacity: int) -> None:
        self._model = model
        self._rows = rows
        self._capacity = capacity
        self._state = GenerationState(0, 0, model.device)

    def prefill(self, prompts: Sequence[np.ndarray]) -> Tensor:
        """Feed the prompts end to end; logits fp32 [B, V] of what follows each."""
        lengths = [len(prompt) for prompt in prompts]
        room = min(self._capacity, max(lengths) + self.ROOM_TOKENS)
        self._state = GenerationState(self._rows, room, self._model.device)
        packed = self._state.prefill(lengths)
        ids_T = torch.from_numpy(np.concatenate(prompts).astype(np.int64)).to(self._model.device)
        return self._forward(ids_T, packed)

    def step(self, ids_B: Tensor) -> Tensor:
        """Feed one more id per row; logits fp32 [B, V] of what follows."""
        state = self._state
        if state.lengths.max() == state.max_length:
            state.grow(min(self._capacity, 2 * state.max_length))
        return self._forward(ids_B, state.decode())

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but `rows`."""
        self._state.keep(rows.cpu().numpy())

    def _forward(self, ids_T: Tensor, packed: PackedSequences) -> Tensor:
        assert packed.position_ids is not None
        logits: Tensor = self._model(
            ids_T.unsqueeze(0), packed.position_ids.unsqueeze(0), None, packed_seq_params=packed
        )
        return logits


def decode_batch(
    session: DecodingSession,
    prompts: Sequence[np.ndarray],
    seeds: Sequence[int],
    unit_limits: Sequence[int],
    legal: LegalIds,
    config: SamplingConfig,
    device: torch.device,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Sample a batch of utterances, or of their texts, to their ends.

    Args:
        session: fresh, for `len(prompts)` rows.
        prompts: int32 ids, each ending where the target begins.
        seeds: one per prompt.
        unit_limits: units (frames of speech, tokens of text) after which a request is stopped, at least 1.
        legal: the legal ids by position.
        config: how tokens are drawn.
        device: where the session's logits live.

    Returns:
        ids int64 [B, max tokens] (what lies past a row's length means nothing), lengths int64 [B] in tokens, ended bool
        [B], and diagnostics float64 [B, 2]: sums over the sampled positions of illegal mass and of illegal argmax.

    The host waits for the device once per unit, to learn who has ended.

    Raises:
        NotFiniteError: the model's logits for a request that has not ended are NaN or infinite.
        InputError: a row of the session takes several ids a step.
    """
    if session.streams != 1:
        raise InputError(
            f"the model takes {session.streams} ids a step (streams), but generation samples one; generate with a "
            "model of one stream"
        )
    count = len(prompts)
    limits_B = torch.tensor(unit_limits, device=device) * legal.unit_tokens
    ids_BT = torch.zeros(count, int(limits_B.max()), dtype=torch.int64, device=device)
    lengths_B = limits_B.clone()
    ended_B = torch.zeros(count, dtype=torch.bool, device=device)
    diagnostics_B2 = torch.zeros(count, 2, dtype=torch.float64, device=device)
    # A seed may be any integer; the noise takes its low 64 bits, as a signed number.
    seeds_B = torch.tensor([(seed + 2**63) % 2**64 - 2**63 for seed in seeds], device=device)
    penalise = config.repetition_penalty != 1.0

    rows_B = torch.arange(count, device=device)  # where each row of the session belongs in the results
    live_B = torch.ones(count, dtype=torch.bool, device=device)  # rows of the session that have not ended
    logits_BV = session.prefill(prompts)
    seen_BV = torch.zeros(count, logits_BV.shape[1], dtype=torch.bool, device=device) if penalise else None
    # The first position at which a request's logits were not finite, or `never`.
    never = torch.iinfo(torch.int64).max
    broken_B = torch.full((count,), never, device=device)
    position = 0
    while True:
        legal_n = legal.at(position)
        legal_Bn = logits_BV.index_select(1, legal_n)
        broken_B[rows_B] = torch.where(
            not_finite(legal_Bn) & live_B, broken_B[rows_B].clamp(max=position), broken_B[rows_B]
        )
        found_B2 = torch.stack(illegal_share(logits_BV, legal_Bn), 1).double()
        diagnostics_B2[rows_B] += found_B2 * live_B.unsqueeze(1)
        probs_Bn = probabilities(legal_Bn, config, None if seen_BV is None else seen_BV.index_select(1, legal_n))
        chosen_B = legal_n[sample(probs_Bn, uniform_noise(seeds_B, position))]
        if position and position % legal.unit_tokens == 0:
            ends_B = live_B & (chosen_B == legal.end_id)
            ended_B[rows_B[ends_B]] = True
            # Whoever has reached the limit could still say that it has ended, but nothing else.
            reached_B = limits_B[rows_B] <= position
            stops_B = ends_B | (live_B & reached_B)
            lengths_B[rows_B[stops_B]] = position
            live_B = live_B & ~stops_B
            alive, full, broken = torch.stack([live_B.sum(), (reached_B & ~live_B).sum(), broken_B.amin()]).tolist()
            if broken != never:
                raise NotFiniteError(int(broken_B.argmin()), int(broken))
            if alive == 0:
                break
            # A row at its limit must go at once: the cache has no room for it to idle in.
            if full or alive < (1 - _IDLE_SHARE) * len(live_B):
                keep = live_B.nonzero().squeeze(1)
                session.keep(keep)
                rows_B, seeds_B, chosen_B, live_B = rows_B[keep], seeds_B[keep], chosen_B[keep], live_B[keep]
                seen_BV = None if seen_BV is None else seen_BV[keep]
        # Ended rows that are still in the batch go on with what they sampled; nobody reads it.
        ids_BT[rows_B, position] = chosen_B
        if seen_BV is not None:
            seen_BV.scatter_(1, chosen_B.unsqueeze(1), True)
        logits_BV = session.step(chosen_B)
        position += 1
    return ids_BT.cpu().numpy(), lengths_B.cpu().numpy(), ended_B.cpu().numpy(), diagnostics_B2.cpu().numpy()


class SpeechGenerator:
    """Speech from a model: text (and a reference voice) in, codes and audio out; and the text of speech.

    Args:
        open_session: makes a :class:`DecodingSession` of so many rows, each of at most so many positions.
        space: the id space that the model was trained with.
        max_sequence_length: positions that the model has, prompt and speech together.
        device: where the model is.
    """

    def __init__(
        self, open_session: SessionFactory, space: TokenSpace, *, max_sequence_length: int, device: torch.device
    ) -> None:
        space.require_one_stream("generation")
        self.space = space
        self.max_sequence_length = max_sequence_length
        self.device = device
        self.checkpoint: dict[str, Any] = {}
        self._open_session = open_session
        self._legal_codes, self._legal_text = LegalCodes(space, device), LegalText(space, device)
        self._codec: Codec | None = None

    @classmethod
    def from_checkpoint(cls, path: str | Path, *, ema: bool = False) -> SpeechGenerator:
        """Open a checkpoint directory, or a run directory (its newest checkpoint).

        Args:
            path: of the checkpoint or the run.
            ema: use the moving average of its weights.

        Raises:
            InputError: there is no sound checkpoint at `path`, or it has no moving average.
        """
        # Not at the top: opening a checkpoint imports megatron-core's whole training side.

        if not Path(path).exists():
            raise InputError(f"checkpoint {path} does not exist; name a run directory or one of its checkpoints")
        model, space, info = load_for_inference(path, ema=ema)
        generator = cls(
            functools.partial(CachedSession, model),
            space,
            max_sequence_length=int(info.fields["max_seq_length"]),
            device=model.device,
        )
        generator.checkpoint = {
            "path": str(info.path),
            **{key: info.fields[key] for key in ("step", "stage", "consumed_tokens") if key in info.fields},
            **({"ema": True} if ema else {}),
        }
        return generator

    @property
    def codec(self) -> Codec:
        """The codec that the token space names, loaded when first needed.

        Raises:
            InputError: it is not installed, or the installed one gives other codes (its hash differs).
        """
        if self._codec is None:
            codec = get_codec(self.space.codec.name)
            if codec.hash != self.space.codec.hash:
                raise InputError(
                    f"codec {codec.name} has hash {codec.hash[:12]}… here but {self.space.codec.hash[:12]}… in the "
                    "checkpoint's token space: its codes would mean other sounds; install the codec's version that "
                    "the training data was encoded with"
                )
            self._codec = codec
        return self._codec

    def encode_audio(self, path: str | Path) -> np.ndarray:
        """Codes int32 [T, K] of a recording, as preprocessing makes them.

        Raises:
            InputError: the file is missing, unreadable or empty.
        """
        return encode_checked(self.codec, read_audio(path, self.codec.sample_rate_hz))

    def decode_audio(self, codes: np.ndarray) -> np.ndarray:
        """Audio float32 [n] at `codec.sample_rate_hz` of codes [T, K]."""
        return decode_checked(self.codec, codes)

    def prompt(self, request: GenerationRequest) -> np.ndarray:
        """The ids that the model is given for `request`, int32 [n].

        Raises:
            InputError: empty text, or only one of reference text and reference codes.
        """
        text = normalize_transcript(request.text)
        if not text:
            raise InputError("the text to be spoken is empty; give at least one word")
        if (request.reference_codes is None) != (request.reference_text is None):
            given, lacking = ("text", "audio") if request.reference_codes is None else ("audio", "text")
            raise InputError(
                f"a reference {given} was given without a reference {lacking}; cloning needs a recording and what is "
                "said in it, plain speech neither"
            )
        if request.reference_codes is None or request.reference_text is None:
            return compile_prompt(self.space, "tts", text_ids=self._text_ids([text], request.control_tags)[0])
        reference_text = normalize_transcript(request.reference_text)
        if not reference_text:
            raise InputError("the reference text is empty; give what is said in the reference audio")
        reference_ids = self.space.encode_codes(request.reference_codes)
        if not request.control_tags:
            return compile_cloning_prompt(self.space, text, reference_text, reference_ids)
        text_ids, ref_text_ids = self._text_ids([text, reference_text], True)
        return compile_prompt(
            self.space, "tts", text_ids=text_ids, ref_text_ids=ref_text_ids, ref_code_ids=reference_ids
        )

    def _text_ids(self, texts: Sequence[str], control_tags: bool) -> Sequence[np.ndarray]:
        if not control_tags:
            return self.space.encode_text_batch(texts)
        ids, problems = encode_tagged(self.space, texts)
        if problems:
            raise InputError(next(iter(problems.values())))
        return ids

    def _frame_limit(self, prompt: np.ndarray, config: SamplingConfig) -> tuple[int, str]:
        """(frames that may follow a prompt, what stops it there)."""
        wanted = max(1, math.floor(config.max_seconds * self.space.codec.frame_rate_hz + 1e-9))
        room = (self.max_sequence_length - len(prompt)) // self.space.codebook_count
        if room < 1:
            raise InputError(
                f"a prompt of {len(prompt):,} tokens leaves no room for speech in the model's sequence of "
                f"{self.max_sequence_length:,}; shorten the text or the reference audio"
            )
        return (wanted, "max_seconds") if wanted <= room else (room, "context")

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        config: SamplingConfig | None = None,
        *,
        batch_size: int = DEFAULT_BATCH_SIZE,
        progress: Callable[[int], object] | None = None,
    ) -> list[GenerationResult]:
        """Speak `requests`, in batches; results in their order.

        All prompts are checked before the first token is sampled.

        Args:
            requests: what to say.
            config: how tokens are drawn; the defaults of :class:`SamplingConfig`.
            batch_size: requests in flight at once. Results do not depend on it.
            progress: called with the number of utterances done, after each batch.

        Raises:
            InputError: a request that cannot be spoken, by its place in `requests`; or the model's logits are not
                finite.
        """
        config = config or SamplingConfig()
        prompts, limits = [], []
        for index, request in enumerate(requests):
            try:
                prompts.append(self.prompt(request))
                limits.append(self._frame_limit(prompts[-1], config))
            except InputError as error:
                raise InputError(f"request {index}: {error}" if len(requests) > 1 else str(error)) from error
        seeds = [request.seed for request in requests]
        found = self._sample(prompts, seeds, limits, self._legal_codes, config, batch_size, progress)
        return [GenerationResult(codes=self.space.decode_codes(ids), **more) for ids, more in found]

    def transcribe(
        self,
        speech: Sequence[np.ndarray],
        config: SamplingConfig | None = None,
        *,
        max_tokens: int = 1024,
        seed: int = 0,
        batch_size: int = DEFAULT_BATCH_SIZE,
        progress: Callable[[int], object] | None = None,
    ) -> list[Transcription]:
        """Write down what is said in `speech`, in batches; results in its order. For a model of the task `asr`.

        Args:
            speech: codes of recordings, int [T, K] each.
            config: how tokens are drawn; greedily if None. `max_seconds` is not used.
            max_tokens: of text; what is longer is cut there (a stop failure).
            seed: of the noise, the same for each recording.
            batch_size: recordings in flight at once. Results do not depend on it.
            progress: called with the number of recordings done, after each batch.

        Raises:
            InputError: speech that leaves no room for text, by its place; a token space without this task.
        """
        prompts, limits = [], []
        for index, codes in enumerate(speech):
            prompt = compile_prompt(self.space, "asr", code_ids=self.space.encode_codes(codes))
            room = self.max_sequence_length - len(prompt)
            if room < 1:
                raise InputError(
                    f"recording {index}: its {len(prompt):,} tokens leave no room for text in the model's sequence of "
                    f"{self.max_sequence_length:,}; cut it into shorter ones"
                )
            prompts.append(prompt)
            limits.append((max_tokens, "max_tokens") if max_tokens <= room else (room, "context"))
        config = config or SamplingConfig(temperature=0.0)
        found = self._sample(prompts, [seed] * len(prompts), limits, self._legal_text, config, batch_size, progress)
        return [Transcription(text=self.space.decode_text(ids).strip(), **more) for ids, more in found]

    def _sample(
        self,
        prompts: Sequence[np.ndarray],
        seeds: Sequence[int],
        limits: Sequence[tuple[int, str]],
        legal: LegalIds,
        config: SamplingConfig,
        batch_size: int,
        progress: Callable[[int], object] | None,
    ) -> list[tuple[np.ndarray, dict[str, Any]]]:
        """Of each prompt the ids that follow it, int64 [n], and the result's other fields.

        `limits`: of each, the units after which it is stopped, and the name of that.
        """
        # Prompts of like length share a batch: the cache is as long as the longest.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        results: dict[int, tuple[np.ndarray, dict[str, Any]]] = {}
        with torch.inference_mode():
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                capacity = max(len(prompts[i]) + limits[i][0] * legal.unit_tokens for i in batch)
                try:
                    ids, lengths, ended, diagnostics = decode_batch(
                        self._open_session(len(batch), capacity),
                        [prompts[i] for i in batch],
                        [seeds[i] for i in batch],
                        [limits[i][0] for i in batch],
                        legal,
                        config,
                        self.device,
                    )
                except NotFiniteError as error:
                    raise InputError(
                        f"request {batch[error.row]}: the model's logits are NaN or infinite at token {error.position} "
                        f"of what it generates ({legal.unit} {error.position // legal.unit_tokens}); its weights have "
                        "left the numbers, or bf16 overflows: take an earlier checkpoint of the run"
                    ) from error
                for row, i in enumerate(batch):
                    # One position more than tokens was sampled: the end, or what the limit cut off.
                    invalid_token_rate, invalid_argmax_rate = diagnostics[row] / (lengths[row] + 1)
                    results[i] = (
                        ids[row, : lengths[row]],
                        {
                            "ended": bool(ended[row]),
                            "stop_reason": "end" if ended[row] else limits[i][1],
                            "prompt_tokens": len(prompts[i]),
                            "generated_tokens": int(lengths[row]) + int(ended[row]),
                            "invalid_token_rate": float(invalid_token_rate),
                            "invalid_argmax_rate": float(invalid_argmax_rate),
                        },
                    )
                if progress is not None:
                    progress(len(batch))
        return [results[i] for i in range(len(prompts))]


def to_requests(generator: SpeechGenerator, utterances: Sequence[Utterance]) -> list[GenerationRequest]:
    """Encode the reference recordings (each once) and make the engine's requests.

    Raises:
        InputError: a recording is missing, unreadable or empty, or the text does not fit the model; by place.
    """
    codes: dict[Path, np.ndarray] = {}
    requests = []
    for utterance in utterances:
        path = utterance.reference_audio
        try:
            if path is not None and path not in codes:
                codes[path] = generator.encode_audio(path)
            request = GenerationRequest(
                text=utterance.text,
                seed=utterance.seed,
                language=utterance.language,
                reference_codes=None if path is None else codes[path],
                reference_text=utterance.reference_text,
                control_tags=utterance.control_tags,
            )
            generator.prompt(request)
        except InputError as error:
            raise InputError(f"{utterance.where}: {error}") from error
        requests.append(request)
    return requests
