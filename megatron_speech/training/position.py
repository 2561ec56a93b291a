"""Where a run stands: everything follows from the number of optimizer steps taken.

And from where a stage ended before its budget did (`early_stop`): `ended` maps the names of such stages to the steps
that they took.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megatron_speech.recipe.recipe import Recipe
from megatron_speech.recipe.stage import StageConfig

Ended = Mapping[str, int]
_NONE: Ended = MappingProxyType({})


def steps_of(stage: StageConfig, ended: Ended = _NONE) -> int:
    """Steps of the stage: what its budget pays for, or what it took until it ended early."""
    return min(stage.steps, ended.get(stage.name, stage.steps))


def total_steps(recipe: Recipe, ended: Ended = _NONE) -> int:
    """Optimizer steps over all stages."""
    return sum(steps_of(stage, ended) for stage in recipe.stages)


@dataclass(frozen=True)
class Position:
    """The state of progress after `step` optimizer steps; a pure function of the recipe, `step` and `ended`.

    Attributes:
        step: optimizer steps taken, over all stages.
        stage_index: the stage that the next step belongs to, or the number of stages when the run is over.
        stage_step: optimizer steps taken in that stage.
        consumed_sequences: sequences trained on, over all stages.
        consumed_tokens: positions trained on, over all stages, padding included.
    """

    step: int
    stage_index: int
    stage_step: int
    consumed_sequences: int
    consumed_tokens: int

    @staticmethod
    def at_step(recipe: Recipe, step: int, ended: Ended = _NONE) -> Position:
        """The position after `step` steps of `recipe`."""
        left, sequences, tokens = step, 0, 0
        for index, stage in enumerate(recipe.stages):
            steps = steps_of(stage, ended)
            taken = stage.sequences_after(min(left, steps))
            sequences += taken
            tokens += taken * stage.seq_length
            if left < steps:
                return Position(step, index, left, sequences, tokens)
            left -= steps
        if left:
            raise ValueError(
                f"step {step} is past the end of recipe {recipe.name} ({total_steps(recipe, ended)} steps)"
            )
        return Position(step, len(recipe.stages), 0, sequences, tokens)

    def stage_of_last_step(self, recipe: Recipe) -> tuple[int, StageConfig]:
        """(index, stage) that the step just taken belonged to; the first stage before any step."""
        index = self.stage_index if self.stage_step or not self.stage_index else self.stage_index - 1
        return index, recipe.stages[index]

    def as_record(self, recipe: Recipe) -> dict[str, int | str]:
        """The position as the fields that metrics.jsonl and status.json share."""
        return {
            "step": self.step,
            "stage": self.stage_of_last_step(recipe)[1].name,
            "consumed_sequences": self.consumed_sequences,
            "consumed_tokens": self.consumed_tokens,
        }


class RunProgress:
    """Where a run stands while it goes on.

    Args:
        recipe: of the run.
        step: optimizer steps taken so far.
        ended: stages that ended before their budget did, see the module.

    Attributes:
        position: after the last step.
    """

    def __init__(self, recipe: Recipe, step: int = 0, ended: Ended = _NONE) -> None:
        self.recipe = recipe
        self._ended = dict(ended)
        self.position = Position.at_step(recipe, step, self._ended)

    @property
    def ended(self) -> Ended:
        """Steps of the stages that ended before their budget did."""
        return self._ended

    @property
    def total_steps(self) -> int:
        """Optimizer steps over all stages, as far as is known now."""
        return total_steps(self.recipe, self._ended)

    @property
    def finished(self) -> bool:
        """Whether no stage is left."""
        return self.position.stage_index == len(self.recipe.stages)

    def move_to(self, step: int) -> None:
        """Stand after `step` steps."""
        self.position = Position.at_step(self.recipe, step, self._ended)

    def end_stage(self) -> None:
        """End the running stage here, whatever is left of its budget."""
        stage = self.recipe.stages[self.position.stage_index]
        self._ended[stage.name] = self.position.stage_step
        self.move_to(self.position.step)

    def steps_taken(self, index: int) -> int:
        """Steps taken so far in stage `index`, which is the running one or over."""
        if self.position.stage_index == index:
            return self.position.stage_step
        return steps_of(self.recipe.stages[index], self._ended)

    def as_record(self) -> dict[str, int | str]:
        """See :meth:`Position.as_record`."""
        return self.position.as_record(self.recipe)
