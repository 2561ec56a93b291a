"""Where a run stands: everything follows from the number of optimizer steps taken."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_speech.training.recipe import Recipe, StageConfig


@dataclass(frozen=True)
class Position:
    """The state of progress after `step` optimizer steps; a pure function of the recipe and `step`.

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
    def at_step(recipe: Recipe, step: int) -> Position:
        """The position after `step` steps of `recipe`."""
        left, sequences, tokens = step, 0, 0
        for index, stage in enumerate(recipe.stages):
            taken = min(left, stage.steps)
            sequences += taken * stage.global_batch_sequences
            tokens += taken * stage.global_batch_tokens
            if left < stage.steps:
                return Position(step, index, left, sequences, tokens)
            left -= stage.steps
        if left:
            raise ValueError(f"step {step} is past the end of recipe {recipe.name} ({recipe.total_steps} steps)")
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
