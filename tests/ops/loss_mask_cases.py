"""Random micro-batches for the loss mask, and a per-token oracle that shares nothing with the implementations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from megatron_speech.ops.loss_mask import PROMPTLESS, TEXT_TARGET, UNLEARNED, LossPolicy, MaskedBatch


@dataclass
class Case:
    tokens: torch.Tensor
    document_lengths: torch.Tensor
    row_pointers: torch.Tensor
    document_groups: torch.Tensor
    modality_table: torch.Tensor
    policy: LossPolicy
    document_flags: torch.Tensor | None = None

    @property
    def inputs(self) -> tuple:
        return (
            self.tokens,
            self.document_lengths,
            self.row_pointers,
            self.document_groups,
            self.modality_table,
            self.policy,
            self.document_flags,
        )


def make_case(
    rows: list[list[int]],
    seq_length: int,
    policy: LossPolicy,
    *,
    tokens: np.ndarray | None = None,
    modality_table: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    flags: np.ndarray | None = None,
    streams: int | None = None,
) -> Case:
    """A case from the document lengths of each row; without `streams` the tokens have no axis of them."""
    shape = (len(rows), seq_length + 1) if streams is None else (len(rows), seq_length + 1, streams)
    lengths = [length for row in rows for length in row]
    table = np.arange(30) % 3 if modality_table is None else modality_table
    if tokens is None:
        tokens = np.random.default_rng(0).integers(0, len(table), shape)
    return Case(
        tokens=torch.from_numpy(np.asarray(tokens, np.int64).reshape(shape)),
        document_lengths=torch.tensor(lengths, dtype=torch.int32),
        row_pointers=torch.tensor(np.cumsum([0, *map(len, rows)]), dtype=torch.int32),
        document_groups=torch.tensor(
            np.arange(len(lengths)) if groups is None else np.asarray(groups), dtype=torch.int32
        ),
        modality_table=torch.from_numpy(np.asarray(table, np.uint8)),
        policy=policy,
        document_flags=None if flags is None else torch.from_numpy(np.asarray(flags, np.uint8)),
    )


def random_case(rng: np.random.Generator, *, max_rows: int = 4, max_seq_length: int = 40) -> Case:
    seq_length = int(rng.integers(1, max_seq_length + 1))
    vocabulary = int(rng.integers(1, 25))
    rows = []
    for _ in range(int(rng.integers(0, max_rows + 1))):
        # From nothing to far more than the row holds; lengths of 0 and borders exactly at the edge are frequent.
        lengths = rng.integers(0, rng.integers(1, seq_length + 4), int(rng.integers(0, 9)))
        lengths[rng.random(lengths.size) < 0.2] = 0
        if lengths.size and rng.random() < 0.4:
            before = int(lengths[:-1].sum())
            lengths[-1] = max(0, seq_length - before) + int(rng.integers(0, 3))
        if lengths.size and rng.random() < 0.05:
            lengths[int(rng.integers(lengths.size))] = 2**31 - 1
        rows.append(lengths.tolist())
    # Many weights are 0 or 1, as in real policies, and some are below 0; prompt ends are frequent, rare, outside the
    # table, or not used.
    weights = np.where(rng.random(4) < 0.5, rng.integers(0, 2, 4), rng.uniform(-0.5, 1, 4)).tolist()
    ends = rng.integers(-1, vocabulary + 2, 2).tolist()
    policy = LossPolicy(*weights, prompt_end_id=ends[0], text_prompt_end_id=ends[1])
    documents = sum(map(len, rows))
    streams = [None, None, 1, 2, 3, 8][int(rng.integers(6))]
    return make_case(
        rows,
        seq_length,
        policy,
        tokens=rng.integers(0, vocabulary, (len(rows), seq_length + 1, streams or 1)),
        modality_table=rng.integers(0, 3, vocabulary),
        groups=rng.integers(0, 50, documents),
        flags=rng.integers(0, 8, documents) if rng.random() < 0.5 else None,
        streams=streams,
    )


PATHS = (
    "no row", "an empty row", "padding", "an empty document", "a cut document", "a document that ends at the edge",
    "a document behind the edge", "a document of several blocks of 4", "a border of documents inside a block of 4",
    "no prompt end", "a prompt end", "two prompt ends in a document", "a prompt end in the look-ahead",
    "a document without a prompt end", "a prompt end of a text target", "a prompt end of the other kind",
)  # fmt: skip


def paths(case: Case) -> set[str]:
    """Which of PATHS the case takes."""
    seq_length, end = case.tokens.shape[1] - 1, case.policy.prompt_end_id
    first = case.tokens if case.tokens.dim() == 2 else case.tokens[..., 0]  # of several streams, this one ends prompts
    pointers, lengths = case.row_pointers.tolist(), case.document_lengths.tolist()
    flags = [0] * len(lengths) if case.document_flags is None else case.document_flags.tolist()
    ends_of = (end, case.policy.text_prompt_end_id)
    taken = {"no prompt end" if end < 0 else "a prompt end"}
    if not len(first):
        taken.add("no row")
    for row, tokens in enumerate(first.tolist()):
        begins = 0
        for document in range(pointers[row], pointers[row + 1]):
            length, is_text = lengths[document], bool(flags[document] & TEXT_TARGET)
            ends = begins + length
            own, other = (
                tokens[begins : min(ends, seq_length)].count(ends_of[which]) for which in (is_text, not is_text)
            )
            inside = tokens[begins : min(ends, seq_length)].count(end)
            found = {
                "a prompt end of a text target": end >= 0 and is_text and own > 0,
                "a prompt end of the other kind": end >= 0 and ends_of[0] != ends_of[1] and other > 0,
                "an empty document": length == 0,
                "a cut document": begins < seq_length < ends,
                "a document that ends at the edge": begins < seq_length == ends,
                "a document behind the edge": begins >= seq_length and length > 0,
                "a document of several blocks of 4": min(ends, seq_length) // 4 - begins // 4 > 1,
                "a border of documents inside a block of 4": 0 < ends < seq_length and ends % 4 > 0,
                "two prompt ends in a document": end >= 0 and inside > 1,
                "a document without a prompt end": end >= 0 and begins < seq_length and length > 0 and not inside,
                "a prompt end in the look-ahead": end >= 0 and tokens[-1] == end and begins < seq_length < ends,
            }
            taken |= {path for path, is_taken in found.items() if is_taken}
            begins = ends
        taken |= {"an empty row"} if begins == 0 else {"padding"} if begins < seq_length else set()
    return taken


def oracle(case: Case) -> dict[str, list]:
    """The definition, token by token; the lists of labels, weights and groups run over rows, columns and streams."""
    rows, seq_length = case.tokens.shape[0], case.tokens.shape[1] - 1
    table, policy = case.modality_table.tolist(), case.policy
    by_modality = [policy.text, policy.audio, policy.special]
    pointers, lengths = case.row_pointers.tolist(), case.document_lengths.tolist()
    groups = case.document_groups.tolist()
    flags = [0] * len(lengths) if case.document_flags is None else case.document_flags.tolist()
    grid = case.tokens if case.tokens.dim() == 3 else case.tokens.unsqueeze(-1)
    labels, weights, position_ids, group_ids, cu_seqlens = [], [], [], [], [0]
    counts = [0, 0, 0, 0]
    for row in range(rows):
        tokens = grid[row].tolist()
        owner: list[int | None] = []  # of each column, up to and including the look-ahead
        begins = {}
        for document in range(pointers[row], pointers[row + 1]):
            begins[document] = len(owner)
            owner += [document] * min(lengths[document], seq_length + 1 - len(owner))
            cu_seqlens.append(row * seq_length + min(len(owner), seq_length))
        padding_begins = len(owner)
        owner += [None] * (seq_length + 1 - len(owner))
        cu_seqlens.append((row + 1) * seq_length)
        in_prompt = [False] * (seq_length + 1)
        if policy.prompt_end_id >= 0:
            closed = set()
            for column in range(seq_length + 1):
                document = owner[column]
                has_prompt = document is not None and not flags[document] & PROMPTLESS
                in_prompt[column] = has_prompt and document not in closed
                is_text = document is not None and flags[document] & TEXT_TARGET
                end = policy.text_prompt_end_id if is_text else policy.prompt_end_id
                if tokens[column][0] == end and column < seq_length:
                    closed.add(document)
        for column in range(seq_length):
            document = owner[column]
            for label in tokens[column + 1]:
                weight = np.float32(0)
                if document is not None and owner[column + 1] == document and not flags[document] & UNLEARNED:
                    weight = np.float32(by_modality[table[label]])
                    if in_prompt[column + 1]:
                        weight = weight * np.float32(policy.prompt)
                labels.append(label if weight else -100)
                weights.append(float(weight))
                group_ids.append(groups[document] * 3 + table[label] if weight else -1)
                counts[2] += bool(weight)
            position_ids.append(column - (padding_begins if document is None else begins[document]))
            counts[0] += document is not None
            counts[1] += document is None
            counts[3] += in_prompt[column]
    return {
        "labels": labels,
        "loss_weights": weights,
        "position_ids": position_ids,
        "group_ids": group_ids,
        "cu_seqlens": cu_seqlens,
        "counts": counts,
        "invalid": [0],
    }


def differences(found: MaskedBatch, expected: MaskedBatch) -> list[str]:
    """Names of the tensors that are not equal, element for element and in dtype and shape."""
    return [
        name
        for name, tensor in expected.tensors().items()
        if getattr(found, name).dtype != tensor.dtype or not torch.equal(getattr(found, name).cpu(), tensor)
    ]
