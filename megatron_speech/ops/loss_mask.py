"""Loss mask: which token is learned at which position, with what weight, in which group.

`loss_mask` turns the tokens of a micro-batch and the lengths of its documents into everything that the model and
the loss need to know about them. It has three implementations that agree element for element: the PyTorch
reference below, which defines the result; C++ (csrc/loss_mask.cpp); and CUDA (csrc/loss_mask.cu). A CPU emulation
of the CUDA kernels' code exists for the tests.

The weight of a token is decided here and nowhere else: by the modality of the token that is to be predicted and by
whether it lies in a prompt (`LossPolicy`), and by what its document is (`document_flags`).

Shapes: B rows, S steps per row (`seq_length`), K streams, D documents in all rows together, V ids. A step holds one
id of each stream; documents, prompts, positions and `cu_seqlens` count steps. The axis of the streams may be left out
where K = 1: tokens [B, S + 1] give labels [B, S], tokens [B, S + 1, K] give labels [B, S, K].
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from megatron_speech.errors import InputError
from megatron_speech.modalities import MODALITIES
from megatron_speech.ops import cuda_library
from megatron_speech.ops.extension import extension, extension_status

logger = logging.getLogger(__name__)

IGNORE_LABEL = -100
NO_GROUP = -1
_MODALITIES = len(MODALITIES)
_MAX_WEIGHT = 1e6  # products of two stay far inside float32

# Bits of `document_flags`.
PROMPTLESS = 1  # the document has no prompt: what it learns weighs as outside one
UNLEARNED = 2  # nothing of the document is learned, as of padding between documents
TEXT_TARGET = 4  # the document's prompt ends at `text_prompt_end_id`: its target is text
_NO_PROMPT_END = torch.iinfo(torch.int64).max
_NO_FLAGS = np.zeros(0, np.uint8)

Implementation = Literal["auto", "reference", "cpp", "cuda"]


@dataclass(frozen=True)
class LossPolicy:
    """What a stage learns: weights by the modality of the token to be predicted, and inside prompts.

    PT, every token: `LossPolicy()`. SFT, only what follows `<speech_start>`, `<speech_end>` included:
    `LossPolicy(prompt=0.0, prompt_end_id=space.special("<speech_start>"))`.

    text, audio, special: weight of a label of that modality; it may be negative. prompt: factor on labels inside the
    document's prompt, which is every step up to and including the first whose stream 0 is `prompt_end_id`; a document
    that holds none is all prompt, unless it is flagged `PROMPTLESS`. prompt_end_id: -1 when documents have no prompt.
    text_prompt_end_id: takes its place in documents flagged `TEXT_TARGET`; not looked at where that is -1.

    Raises:
        InputError: a weight is not a number or beyond 1e6 in size; a prompt end is below -1.
    """

    text: float = 1.0
    audio: float = 1.0
    special: float = 1.0
    prompt: float = 1.0
    prompt_end_id: int = -1
    text_prompt_end_id: int = -1

    def __post_init__(self) -> None:
        for name in (*MODALITIES, "prompt"):
            value = getattr(self, name)
            if not -_MAX_WEIGHT <= value <= _MAX_WEIGHT:  # also false for NaN
                raise InputError(
                    f"loss weight {name} is {value}; it must lie between {-_MAX_WEIGHT:g} and {_MAX_WEIGHT:g}"
                )
        for name in ("prompt_end_id", "text_prompt_end_id"):
            if getattr(self, name) < -1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be a token id, or -1 for no prompts")

    @functools.cached_property
    def weights(self) -> np.ndarray:
        """float32 [2 * modalities]: by modality of the label outside the prompt, then inside it."""
        outside = np.array([getattr(self, name) for name in MODALITIES], np.float32)
        # Adding 0 makes -0, the product of a negative weight and 0, a plain 0.
        return np.concatenate([outside, outside * np.float32(self.prompt)]) + np.float32(0)


@dataclass
class MaskedBatch:
    """What `loss_mask` says about a micro-batch. All tensors are on the device of its tokens.

    labels: int64 [B, S, K]; the token of the same stream one step later when it belongs to the same document and has
        a weight, else -100. The last column's comes from the look-ahead step when its document goes on beyond the row.
    loss_weights: float32 [B, S, K]; 0 where there is nothing to learn.
    position_ids: int64 [B, S]; from 0 at each document's first step, and at the first step of the padding.
    group_ids: int32 [B, S, K]; document group * 3 + modality of the label, -1 where the weight is 0.
    cu_seqlens: int32 [D + B + 1]; borders of the segments of the flattened batch: 0, then for each row the ends
        of its documents (at most the row's end) and the row's end, which closes its padding.
    counts: int64 [4]; (document_tokens, pad_tokens, loss_tokens, prompt_tokens): steps inside documents and
        outside, labels with a weight, and steps inside documents that belong to a prompt.
    invalid: int64 [1]; tokens without a modality, and malformed lengths, groups and row pointers. Always 0 on
        the CPU, where they raise; on CUDA, where nothing is read back, a token without a modality is not learned
        and is counted here, to be read together with the metrics.
    """

    labels: torch.Tensor
    loss_weights: torch.Tensor
    position_ids: torch.Tensor
    group_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    counts: torch.Tensor
    invalid: torch.Tensor

    @classmethod
    def allocate(
        cls,
        rows: int,
        seq_length: int,
        documents: int,
        *,
        streams: int | None = None,
        device: torch.device | str = "cpu",
        pin_memory: bool = False,
    ) -> MaskedBatch:
        """Uninitialised tensors of the right shapes, to be filled through `loss_mask(..., out=...)`.

        `streams`: None where the tokens have no axis of streams.
        """
        labelled = (rows, seq_length) if streams is None else (rows, seq_length, streams)

        def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device, pin_memory=pin_memory)

        return cls(
            labels=empty(labelled, torch.int64),
            loss_weights=empty(labelled, torch.float32),
            position_ids=empty((rows, seq_length), torch.int64),
            group_ids=empty(labelled, torch.int32),
            cu_seqlens=empty((documents + rows + 1,), torch.int32),
            counts=empty((4,), torch.int64),
            invalid=empty((1,), torch.int64),
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by name, in the order of the fields."""
        return dict(vars(self))


@dataclass(frozen=True)
class _Batch:
    """The checked inputs, all on one device."""

    tokens: torch.Tensor
    document_lengths: torch.Tensor
    row_pointers: torch.Tensor
    document_groups: torch.Tensor
    modality_table: torch.Tensor
    document_flags: torch.Tensor | None

    @property
    def rows(self) -> int:
        return self.tokens.shape[0]

    @property
    def seq_length(self) -> int:
        return self.tokens.shape[1] - 1

    @property
    def streams(self) -> int | None:
        """None where the tokens have no axis of streams."""
        return self.tokens.shape[2] if self.tokens.dim() == 3 else None

    @property
    def documents(self) -> int:
        return self.document_lengths.shape[0]


def loss_mask(
    tokens: torch.Tensor,
    document_lengths: torch.Tensor,
    row_pointers: torch.Tensor,
    document_groups: torch.Tensor,
    modality_table: torch.Tensor,
    policy: LossPolicy,
    document_flags: torch.Tensor | None = None,
    *,
    implementation: Implementation = "auto",
    out: MaskedBatch | None = None,
) -> MaskedBatch:
    """Labels, loss weights, position ids, group ids, cu_seqlens and counts of a micro-batch.

    Row b holds the documents `row_pointers[b]:row_pointers[b + 1]`, laid end to end from column 0; a column is a step.
    A length may be 0. What the documents leave of the row is padding; what does not fit is cut by the row's edge, and
    documents that start at or after S are outside. Column S is the look-ahead: the next step of the document that
    holds column S-1, used only when that document goes on beyond the row. Prompt ends are searched in stream 0 of
    columns 0..S-1.

    The CUDA kernels run on PyTorch's current stream and never wait for the device.

    Args:
        tokens: int64 [B, S + 1], or [B, S + 1, K].
        document_lengths: int32 [D], steps.
        row_pointers: int32 [B + 1], from 0 to D.
        document_groups: int32 [D], at least 0.
        modality_table: uint8 [V], the modality of each id (0 text, 1 audio, 2 special); ids with any other value
            must not occur.
        policy: the weights.
        document_flags: uint8 [D], `PROMPTLESS` | `UNLEARNED` | `TEXT_TARGET` of each document, other bits are not
            looked at; None where no document has any.
        implementation: "auto" takes CUDA for tensors on a GPU and C++ on the CPU, else (said once) the reference.
        out: filled and returned when given (see `MaskedBatch.allocate`); else new tensors are made. After an
            InputError its content is undefined.

    Raises:
        InputError: shapes, dtypes or devices do not fit; more than 2^31 - 1 labels; the implementation cannot run
            here; and, on the CPU, a token outside the table, a negative length or group, or row pointers that do not
            divide the documents among the rows.
    """
    batch = _checked(tokens, document_lengths, row_pointers, document_groups, modality_table, document_flags)
    device = tokens.device
    chosen = _choose(implementation, device)
    if device.type == "cpu":
        _check_documents(batch)
    if out is None:
        out = MaskedBatch.allocate(batch.rows, batch.seq_length, batch.documents, streams=batch.streams, device=device)
    else:
        _check_out(out, batch)
    if chosen == "reference":
        _reference(batch, policy, out)
    elif chosen == "cpp":
        compiled = extension()
        assert compiled is not None  # _choose has made sure
        if not compiled.loss_mask(*_arrays(batch, policy), *(t.numpy() for t in out.tensors().values())):
            raise _bad_token(batch)
    else:
        _cuda(batch, policy, out)
    return out


def _emulate_cuda(
    tokens: torch.Tensor,
    document_lengths: torch.Tensor,
    row_pointers: torch.Tensor,
    document_groups: torch.Tensor,
    modality_table: torch.Tensor,
    policy: LossPolicy,
    document_flags: torch.Tensor | None = None,
    *,
    threads: Literal[4, 256] = 256,
    reverse: bool = False,
) -> MaskedBatch:
    """What the CUDA kernels' code does, run thread by thread (in reverse order if asked) on the CPU; for tests."""
    batch = _checked(tokens, document_lengths, row_pointers, document_groups, modality_table, document_flags)
    compiled = extension()
    if compiled is None:
        raise InputError(f"the emulation of the CUDA kernels needs the compiled extension: {extension_status()}")
    out = MaskedBatch.allocate(batch.rows, batch.seq_length, batch.documents, streams=batch.streams)
    outputs = (t.numpy() for t in out.tensors().values())
    compiled.loss_mask_emulated(*_arrays(batch, policy), *outputs, threads, reverse)
    return out


def _arrays(batch: _Batch, policy: LossPolicy) -> list[object]:
    inputs = (batch.tokens, batch.document_lengths, batch.row_pointers, batch.document_groups)
    flags = _NO_FLAGS if batch.document_flags is None else batch.document_flags.numpy()
    arrays = [*(tensor.numpy() for tensor in inputs), flags, batch.modality_table.numpy()]
    return [*arrays, policy.prompt_end_id, policy.text_prompt_end_id, policy.weights]


def _choose(implementation: str, device: torch.device) -> str:
    if implementation == "reference":
        return "reference"
    if implementation == "auto":
        if device.type == "cuda":
            library, reason = _cuda_library(device)
            if library is None:
                _say_no_cuda(reason)
            return "reference" if library is None else "cuda"
        return "cpp" if device.type == "cpu" and extension() is not None else "reference"
    if implementation not in ("cpp", "cuda"):
        raise InputError(f"loss mask implementation {implementation!r} is unknown; use auto, reference, cpp or cuda")
    needed = "cpu" if implementation == "cpp" else "cuda"
    if device.type != needed:
        raise InputError(f"loss mask implementation {implementation!r} needs tensors on {needed}, they are on {device}")
    if implementation == "cpp" and extension() is None:
        raise InputError(f"loss mask implementation 'cpp' is not there: extension {extension_status()}")
    if implementation == "cuda":
        library, reason = _cuda_library(device)
        if library is None:
            raise InputError(f"loss mask implementation 'cuda' is not there: {reason}")
    return implementation


@functools.cache
def _say_no_cuda(reason: str) -> None:
    logger.warning("the CUDA loss mask is not used, the PyTorch reference runs on the GPU instead: %s", reason)


# ---- Checks ----------------------------------------------------------------------------------------------------------


def _checked(
    tokens: torch.Tensor,
    document_lengths: torch.Tensor,
    row_pointers: torch.Tensor,
    document_groups: torch.Tensor,
    modality_table: torch.Tensor,
    document_flags: torch.Tensor | None,
) -> _Batch:
    expected = [
        ("tokens", tokens, torch.int64, 3 if tokens.dim() == 3 else 2),
        ("document_lengths", document_lengths, torch.int32, 1),
        ("row_pointers", row_pointers, torch.int32, 1),
        ("document_groups", document_groups, torch.int32, 1),
        ("modality_table", modality_table, torch.uint8, 1),
    ]
    if document_flags is not None:
        expected.append(("document_flags", document_flags, torch.uint8, 1))
    for name, tensor, dtype, dimensions in expected:
        if tensor.dtype != dtype or tensor.dim() != dimensions:
            raise InputError(
                f"loss_mask: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}; "
                f"{dtype} with {dimensions} dimension(s) is needed"
            )
        if tensor.device != tokens.device:
            raise InputError(f"loss_mask: {name} is on {tensor.device}, tokens on {tokens.device}; use one device")
    rows, columns, *rest = tokens.shape
    streams = rest[0] if rest else 1
    if columns < 2:
        raise InputError(f"loss_mask: tokens have {columns} columns; at least 1 position and the look-ahead are needed")
    if streams < 1:
        raise InputError("loss_mask: tokens have 0 streams; at least 1 is needed")
    if rows * (columns - 1) * streams > torch.iinfo(torch.int32).max or (columns - 1) * streams > 2**30:
        size = f"{rows} x {columns - 1}" + (f" x {streams}" if rest else "")
        raise InputError(f"loss_mask: {size} positions are more than int32 cu_seqlens can number")
    if row_pointers.shape[0] != rows + 1:
        raise InputError(f"loss_mask: {rows} rows need {rows + 1} row_pointers, found {row_pointers.shape[0]}")
    if document_groups.shape != document_lengths.shape:
        raise InputError(
            f"loss_mask: {document_lengths.shape[0]} document_lengths but {document_groups.shape[0]} document_groups"
        )
    if document_flags is not None and document_flags.shape != document_lengths.shape:
        raise InputError(
            f"loss_mask: {document_lengths.shape[0]} document_lengths but {document_flags.shape[0]} document_flags"
        )
    if not modality_table.shape[0]:
        raise InputError("loss_mask: modality_table is empty")
    ids, lengths, pointers, groups, table, *flags = (tensor.contiguous() for _, tensor, _, _ in expected)
    return _Batch(ids, lengths, pointers, groups, table, flags[0] if flags else None)


def _check_documents(batch: _Batch) -> None:
    lengths, groups = batch.document_lengths.numpy(), batch.document_groups.numpy()
    pointers = batch.row_pointers.numpy()
    if pointers[0] != 0 or pointers[-1] != batch.documents or (pointers[1:] < pointers[:-1]).any():
        raise InputError(
            f"loss_mask: row_pointers must rise from 0 to {batch.documents}, the number of documents; "
            f"found {pointers[:8].tolist()}{' …' if pointers.size > 8 else ''} ending in {int(pointers[-1])}"
        )
    for name, values in (("length", lengths), ("group", groups)):
        if values.size and values.min() < 0:
            first = int(np.argmax(values < 0))
            raise InputError(f"loss_mask: document {first} has {name} {int(values[first])}; it must be at least 0")


def _check_out(out: MaskedBatch, batch: _Batch) -> None:
    shape = (batch.rows, batch.seq_length)
    labelled = shape if batch.streams is None else (*shape, batch.streams)
    needed = {
        "labels": (labelled, torch.int64),
        "loss_weights": (labelled, torch.float32),
        "position_ids": (shape, torch.int64),
        "group_ids": (labelled, torch.int32),
        "cu_seqlens": ((batch.documents + batch.rows + 1,), torch.int32),
        "counts": ((4,), torch.int64),
        "invalid": ((1,), torch.int64),
    }
    for name, tensor in out.tensors().items():
        needed_shape, dtype = needed[name]
        fits = tuple(tensor.shape) == needed_shape and tensor.dtype == dtype and tensor.device == batch.tokens.device
        if not fits or not tensor.is_contiguous():
            raise InputError(
                f"loss_mask: out.{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; a contiguous "
                f"{dtype} {needed_shape} on {batch.tokens.device} is needed"
            )


def _bad_token(batch: _Batch) -> InputError:
    """Names the first token without a modality; there is one."""
    vocabulary = batch.modality_table.shape[0]
    known = (batch.tokens >= 0) & (batch.tokens < vocabulary)
    modality = batch.modality_table[torch.where(known, batch.tokens, 0)]
    place = (~known | (modality >= _MODALITIES)).nonzero()[0].tolist()
    token = int(batch.tokens[tuple(place)])
    where = ", ".join(f"{name} {at}" for name, at in zip(("row", "column", "stream"), place, strict=False))
    why = "has no modality" if 0 <= token < vocabulary else f"is outside the {vocabulary} ids of the token space"
    return InputError(
        f"loss_mask: token {token} at {where} {why}; the dataset and the token space do not belong "
        "together, or the data is damaged (check it with `megatron-speech inspect PREFIX --verify`)"
    )


# ---- The reference ---------------------------------------------------------------------------------------------------


def _reference(batch: _Batch, policy: LossPolicy, out: MaskedBatch) -> None:
    """Defines the result. Vectorised over all positions, on any device, without a wait for the device on CUDA.

    Segments are what cu_seqlens separates: each row's documents, then its padding. Document d of row b is segment
    d + b, the padding of row b is segment row_pointers[b + 1] + b. Positions count the steps of the flattened batch;
    what has a value for each stream is [B·S, K].
    """
    rows, seq_length, documents, streams = batch.rows, batch.seq_length, batch.documents, batch.streams or 1
    tokens, device = batch.tokens.view(rows, seq_length + 1, streams), batch.tokens.device
    pointers = batch.row_pointers.long()
    row_begins = torch.arange(rows, device=device) * seq_length

    # Where documents end: inside their row and beyond its edge (`ends`), and clamped to it (cu_seqlens).
    lengths = batch.document_lengths.long()
    totals = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    row_of_document = torch.searchsorted(pointers[1:], torch.arange(documents, device=device), right=True)
    ends = totals[1:] - totals[pointers[row_of_document]]
    document_segments = torch.arange(documents, device=device) + row_of_document
    padding_segments = pointers[1:] + torch.arange(rows, device=device)

    borders = lengths.new_zeros(documents + rows + 1)
    borders[document_segments + 1] = row_begins[row_of_document] + ends.clamp(max=seq_length)
    borders[padding_segments + 1] = row_begins + seq_length

    # The segment of each position, and what follows from it. Padding "ends" at 0: nothing in it has a successor.
    positions = torch.arange(rows * seq_length, device=device)
    segments = torch.searchsorted(borders[1:], positions, right=True)
    segment_ends = lengths.new_zeros(documents + rows)
    segment_ends[document_segments] = row_begins[row_of_document] + ends.clamp(max=seq_length + 1)
    segment_groups = batch.document_groups.new_zeros(documents + rows)
    segment_groups[document_segments] = batch.document_groups
    in_document = segment_ends[segments] > positions
    next_in_document = segment_ends[segments] > positions + 1
    has_prompt, may_label = in_document, next_in_document
    if batch.document_flags is not None:
        flags = torch.zeros(documents + rows, dtype=torch.uint8, device=device)
        flags[document_segments] = batch.document_flags
        has_prompt = in_document & ((flags & PROMPTLESS)[segments] == 0)
        may_label = next_in_document & ((flags & UNLEARNED)[segments] == 0)

    # The first prompt end of each document, in stream 0; a document without one is all prompt.
    in_prompt = next_in_prompt = torch.zeros_like(in_document)
    if policy.prompt_end_id >= 0:
        first = tokens[:, :seq_length, 0].reshape(-1)
        is_prompt_end = first == policy.prompt_end_id
        if batch.document_flags is not None:
            is_text_target = (flags & TEXT_TARGET)[segments] != 0
            is_prompt_end = torch.where(is_text_target, first == policy.text_prompt_end_id, is_prompt_end)
        prompt_ends = torch.full((documents + rows,), _NO_PROMPT_END, device=device)
        prompt_ends.scatter_reduce_(0, segments, torch.where(is_prompt_end, positions, _NO_PROMPT_END), "amin")
        in_prompt = has_prompt & (positions <= prompt_ends[segments])
        next_in_prompt = has_prompt & (positions + 1 <= prompt_ends[segments])

    # Modalities of all tokens, look-ahead included; a token without one is no label.
    known = (tokens >= 0) & (tokens < batch.modality_table.shape[0])
    modality = batch.modality_table[torch.where(known, tokens, 0)].long()
    valid = known & (modality < _MODALITIES)
    if device.type == "cpu" and not bool(valid.all()):
        raise _bad_token(batch)

    labels = tokens[:, 1:].reshape(-1, streams)
    label_modality = torch.where(valid, modality, 0)[:, 1:].reshape(-1, streams)
    has_label = may_label[:, None] & valid[:, 1:].reshape(-1, streams)
    policy_weights = torch.from_numpy(policy.weights).to(device, non_blocking=True)
    weights = policy_weights[label_modality + _MODALITIES * next_in_prompt.long()[:, None]]
    weights = torch.where(has_label, weights, 0.0)
    learned = weights != 0
    groups = segment_groups[segments][:, None] * _MODALITIES + label_modality.int()

    out.labels.copy_(torch.where(learned, labels, IGNORE_LABEL).view_as(out.labels))
    out.loss_weights.copy_(weights.view_as(out.loss_weights))
    out.position_ids.copy_((positions - borders[segments]).view(rows, seq_length))
    out.group_ids.copy_(torch.where(learned, groups, NO_GROUP).view_as(out.group_ids))
    out.cu_seqlens.copy_(borders)
    document_tokens = in_document.sum()
    out.counts.copy_(
        torch.stack([document_tokens, rows * seq_length - document_tokens, learned.sum(), in_prompt.sum()])
    )
    malformed = (
        (batch.document_lengths < 0).sum()
        + (batch.document_groups < 0).sum()
        + (pointers[1:] < pointers[:-1]).sum()
        + (pointers[0] != 0)
        + (pointers[-1] != documents)
    )
    out.invalid.copy_((~valid).sum() + malformed)


# ---- CUDA ------------------------------------------------------------------------------------------------------------


def _cuda_library(device: torch.device) -> tuple[Any, str]:
    return cuda_library.load(torch.cuda.get_device_capability(device))


def _cuda(batch: _Batch, policy: LossPolicy, out: MaskedBatch) -> None:
    device = batch.tokens.device
    library, _ = _cuda_library(device)
    workspace = torch.empty(batch.documents + batch.rows, dtype=torch.int32, device=device)
    flags = batch.document_flags
    inputs = (batch.tokens, batch.document_lengths, batch.row_pointers, batch.document_groups)
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device)
        status = library.megatron_speech_loss_mask(
            *(tensor.data_ptr() for tensor in inputs),
            None if flags is None else flags.data_ptr(),
            batch.modality_table.data_ptr(),
            batch.rows,
            batch.seq_length,
            batch.streams or 1,
            batch.documents,
            batch.modality_table.shape[0],
            policy.prompt_end_id,
            policy.text_prompt_end_id,
            policy.weights.ctypes.data,
            *(tensor.data_ptr() for tensor in out.tensors().values()),
            workspace.data_ptr(),
            workspace[batch.documents :].data_ptr(),
            stream.cuda_stream,
        )
    if status != 0:
        message = library.megatron_speech_cuda_error(status).decode()
        raise RuntimeError(f"the CUDA loss mask could not be launched: {message}")
