"""Parameters that stay as they are, and rows of the token tables that do, bit for bit."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_speech.errors import InputError
from megatron_speech.model.builder import EMBEDDING, HEAD, SpeechGPTModel, global_named_parameters
from megatron_speech.recipe.optimizer import OptimizerConfig
from megatron_speech.tokens.space import TokenSpace
from megatron_speech.training.optim.masters import Master
from megatron_speech.training.optim.parameters import ParameterRule


def freeze_parameters(chunks: list[SpeechGPTModel], patterns: list[str]) -> None:
    """Take the parameters that match out of training; before anything is built around them. A collective.

    A frozen parameter has no gradient, moments or masters: it costs nothing and counts in no norm.

    Args:
        chunks: this rank's model chunks.
        patterns: shell patterns of global names, layers numbered through the whole model from 0
            (`decoder.layers.[0-3].*`, `embedding.*`). A tied head has its table's name.

    Raises:
        InputError: a pattern that matches nothing, or nothing that is left to train.
    """
    if not patterns:
        return
    matched: set[str] = set()
    names, trained = set(), False
    for chunk in chunks:
        for name, parameter in global_named_parameters(chunk):
            names.add(name)
            hits = [pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)]
            matched.update(hits)
            if hits:
                parameter.requires_grad = False
            else:
                trained = True
    found: list[tuple[set[str], set[str], bool]] = [(set(), set(), False)] * dist.get_world_size()
    dist.all_gather_object(found, (matched, names, trained))
    matched = set().union(*(each[0] for each in found))
    names = set().union(*(each[1] for each in found))
    for pattern in patterns:
        if pattern not in matched:
            raise InputError(
                f"optimizer.freeze: {pattern!r} matches no parameter; their names are like "
                f"{', '.join(_examples(names))}"
            )
    if not any(each[2] for each in found):
        raise InputError(f"optimizer.freeze: {', '.join(patterns)} leave no parameter to train; drop one of them")
    for chunk in chunks:
        if chunk.pre_process:
            # Recomputed layers have gradients only where what goes into them asks for one.
            chunk.embedding.register_forward_hook(_ask_for_gradient)


def _ask_for_gradient(_module: object, _inputs: object, hidden: Tensor) -> None:
    if torch.is_grad_enabled() and not hidden.requires_grad:
        hidden.requires_grad_()


def _examples(names: Iterable[str]) -> list[str]:
    """The names of the tables, of the last norm, and of one layer."""
    return sorted(name for name in names if ".layers." not in name or ".layers.0." in name)


def frozen_ids(section: OptimizerConfig, space: TokenSpace) -> int:
    """Ids from 0 on whose rows of the token tables are frozen: the number that `freeze_rows` stands for.

    Raises:
        InputError: there are not that many ids.
    """
    if section.freeze_rows is None:
        return 0
    rows = space.text_size if section.freeze_rows == "text" else section.freeze_rows
    if rows >= space.size:
        raise InputError(
            f"optimizer.freeze_rows: ids below {rows} are to be frozen, and the token space has {space.size}; freeze "
            "fewer, or the whole table with optimizer.freeze"
        )
    return rows


@dataclass(frozen=True)
class _Table:
    """A token table's master: its first `frozen` elements stay, the others decay by hand."""

    master: Master
    frozen: int
    rule: ParameterRule


class FrozenRows:
    """The rows of ids below `ids` in the token table and the head, kept bit for bit while the other rows train.

    AdamW leaves a value alone whose gradient and moments are zero, but for its weight decay, which knows whole groups
    only. So the frozen rows' gradients are cleared before they are measured, their moments at a stage's begin, and
    the tables' decay is applied here, to the other rows. No copy of the rows is needed.

    Args:
        ids: number of frozen ids.
        owned: this rank's masters.
        chunks: this rank's model chunks.
        rules: of the parameters; the optimizer is built with no decay of the tables (:func:`without_table_decay`).
    """

    def __init__(
        self, ids: int, owned: list[Master], chunks: list[SpeechGPTModel], rules: Mapping[Tensor, ParameterRule]
    ) -> None:
        tables = set(token_tables(chunks))
        rank = parallel_state.get_tensor_model_parallel_rank()
        self._tables = []
        for master in owned:
            if master.parameter in tables:
                rows, width = master.parameter.shape
                own = min(max(0, ids - rank * rows), rows)  # of this tensor-parallel rank's slice
                frozen = min(max(0, own * width - master.start), master.values.numel())
                self._tables.append(_Table(master, frozen, rules[master.parameter]))

    def clear_gradients(self) -> None:
        """Drop what the frozen rows' gradients hold: called before the norm is taken."""
        for table in self._tables:
            gradient = table.master.values.grad
            if gradient is not None:
                gradient.view(-1)[: table.frozen].zero_()

    def clear_moments(self, state: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
        """Drop what an optimizer state brought along for the frozen rows."""
        for table in self._tables:
            for name, values in state.get(table.master.values, {}).items():
                if name in ("exp_avg", "exp_avg_sq"):
                    values.view(-1)[: table.frozen].zero_()

    def decay(self, learning_rate: float, taken: Tensor | None) -> None:
        """Decay the rows that train, as AdamW would have: called before the update.

        Args:
            learning_rate: of the step, before multipliers.
            taken: 1 where the update is to take place, 0 where it is skipped, on the device; None: it takes place.
        """
        for table in self._tables:
            amount = learning_rate * table.rule.lr_multiplier * table.rule.weight_decay
            if amount > 0.0:
                factor = 1.0 - amount if taken is None else 1.0 - amount * taken
                table.master.values.view(-1)[table.frozen :].mul_(factor)


def without_table_decay(
    rules: Mapping[Tensor, ParameterRule], chunks: list[SpeechGPTModel]
) -> dict[Tensor, ParameterRule]:
    """`rules` with no weight decay of the token tables."""
    tables = set(token_tables(chunks))
    return {p: replace(rule, weight_decay=0.0) if p in tables else rule for p, rule in rules.items()}


def token_tables(chunks: list[SpeechGPTModel]) -> list[Tensor]:
    """The token table and the output head, as far as they are on this rank."""
    return [
        parameter for chunk in chunks for name, parameter in global_named_parameters(chunk) if name in (EMBEDDING, HEAD)
    ]
