"""Which learning rate and which weight decay each parameter has, as groups of megatron-core's optimizer.

A rule depends on a parameter's global name only (layers numbered through the whole model), so it is the same under
every layout.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from megatron.core.optimizer import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from torch import Tensor

from megatron_speech.model.builder import EMBEDDING, HEAD, SpeechGPTModel, global_named_parameters
from megatron_speech.recipe.optimizer import OptimizerConfig


@dataclass(frozen=True, order=True)
class ParameterRule:
    """How the optimizer treats a parameter.

    Attributes:
        lr_multiplier: of the stage's learning rate.
        weight_decay: per step and unit of learning rate (AdamW's decoupled decay).
    """

    lr_multiplier: float
    weight_decay: float


def parameter_rule(name: str, dimensions: int, *, section: OptimizerConfig, layers: int, tied: bool) -> ParameterRule:
    """The rule of the parameter with the global name `name`.

    Args:
        name: as :func:`~megatron_speech.model.builder.global_named_parameters` gives it.
        dimensions: of the parameter; norms and biases have one.
        section: the recipe's section `optimizer`.
        layers: of the whole model.
        tied: whether the token table is the output head too.
    """
    if name == EMBEDDING:
        # A tied table is the head as well: it is trained as the model's top, not as its bottom.
        above, table = (0 if tied else layers), section.embeddings
    elif name == HEAD:
        above, table = 0, section.head
    else:
        layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
        above, table = (layers - 1 - int(layer[1]) if layer else 0), None
    decay = 0.0 if dimensions == 1 else section.weight_decay
    multiplier = section.layer_lr_decay**above
    if table is not None:
        multiplier *= table.lr_multiplier
        decay = decay if table.weight_decay is None else table.weight_decay
    return ParameterRule(multiplier, decay)


def parameter_rules(chunks: list[SpeechGPTModel], section: OptimizerConfig) -> dict[Tensor, ParameterRule]:
    """The rule of every parameter of this rank's model chunks."""
    return {
        parameter: parameter_rule(
            name,
            parameter.dim(),
            section=section,
            layers=chunk.model_config.num_layers,
            tied=chunk.model_config.tie_embeddings,
        )
        for chunk in chunks
        for name, parameter in global_named_parameters(chunk)
    }


def group_overrides(rules: Mapping[Tensor, ParameterRule]) -> dict[ParamKey, ParamGroupOverride]:
    """`rules` as megatron-core's `config_overrides`: one group of parameters per rule.

    The decay itself stands in `wd_mult`, and schedules multiply by a base of 1: megatron-core tells the groups of a
    checkpoint apart by `lr_mult` and `wd_mult`, and a base of 0 could not be told from none.
    """

    def key(rule: ParameterRule) -> ParamKey:
        return ParamKey(predicate=ParamPredicate(name=str(rule), fn=lambda parameter: rules.get(parameter) == rule))

    return {
        key(rule): ParamGroupOverride(lr_mult=rule.lr_multiplier, wd_mult=rule.weight_decay)
        for rule in sorted(set(rules.values()))
    }
