"""How a recipe's model is computed: back-end, layers per pipeline chunk, recomputation; chosen, built and reported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core import parallel_state

from megatron_speech.data.loading.context_parallel import share_micro_batches
from megatron_speech.data.loading.loader import MicroBatch
from megatron_speech.model.builder import build_model, layer_split
from megatron_speech.model.gpt import SpeechGPTModel
from megatron_speech.model.layer_plan import last_mlp_on_learned_only, layer_kinds
from megatron_speech.model.specs import Backend, choose_backend
from megatron_speech.recipe.recipe import Recipe
from megatron_speech.tokens.space import TokenSpace


@dataclass(frozen=True)
class Execution:
    """What a run's model runs on; needs the parallel state.

    split: layers of every pipeline chunk, in the order of the model.
    """

    recipe: Recipe
    vocab_size: int
    backend: Backend
    split: tuple[int, ...]

    @classmethod
    def choose(cls, recipe: Recipe, space: TokenSpace) -> Execution:
        """From the recipe and this machine; an InputError for what cannot be."""
        backend = choose_backend(recipe.model.backend, recipe.precision, recipe.parallel.context)
        split = layer_split(recipe.model, space.padded_size, _longest(recipe), recipe.parallel.pipeline_layout)
        return cls(recipe, space.size, backend, split)

    @property
    def last_mlp_on_learned_only(self) -> bool:
        """Whether the last layer's MLP runs for learned tokens alone."""
        parallel = self.recipe.parallel
        return last_mlp_on_learned_only(
            layer_kinds(self.recipe.model)[-1],
            torch_backend=self.backend.name == "torch",
            sequence_parallel=parallel.sequence_parallel and parallel.tensor > 1,
            layers=self.split[-1],
        )

    def build(self, space: TokenSpace) -> list[SpeechGPTModel]:
        """This rank's model chunks."""
        space.require_one_stream("the model")
        recipe = self.recipe
        return build_model(
            recipe.model,
            space.padded_size,
            precision=recipe.precision,
            max_sequence_length=_longest(recipe),
            seed=recipe.seed if recipe.init is None else None,  # which is loaded: drawing 8 B weights takes minutes
            valid_vocab_size=space.size,
            sequence_parallel=recipe.parallel.sequence_parallel,
            pipeline_layout=self.split,
            fp8=recipe.fp8,
            recompute=recipe.recompute,
            backend=self.backend.name,
            deterministic_mode=recipe.deterministic,
        )

    def local_micro_batches(self, batches: list[MicroBatch]) -> list[MicroBatch]:
        """What of a step's micro-batches this rank computes: all, or its share under context parallelism."""
        context = self.recipe.parallel.context
        if context == 1:
            return batches
        rank = parallel_state.get_context_parallel_rank()
        parallel = self.recipe.parallel
        multiple = self.recipe.fp8.token_multiple(parallel.tensor, parallel.sequence_parallel)
        return share_micro_batches(batches, context, rank, multiple=multiple)

    def record(self) -> dict[str, Any]:
        """For environment.json."""
        return {
            "backend": self.backend.name,
            "backend_reason": self.backend.reason,
            "layers_per_pipeline_chunk": list(self.split),
        }

    def lines(self, reaches: Sequence[float]) -> list[str]:
        """For the log; `reaches`: what a token sees on average, by stage of the recipe."""
        recipe = self.recipe
        lines = [f"layers run on {self.backend}"]
        if len(self.split) > 1:
            how = "as parallel.pipeline_layout says" if recipe.parallel.pipeline_layout else "balanced by cost"
            lines.append(f"layers of the pipeline's chunks: {' + '.join(map(str, self.split))}, {how}")
        if recipe.recompute.mode != "none":
            said: dict[str, list[str]] = {}
            for stage, reach in zip(recipe.stages, reaches, strict=True):
                line = recipe.recompute.describe(recipe.model, reach, self.vocab_size, self.split)
                said.setdefault(line, []).append(stage.name)
            for line, stages in said.items():
                lines.append(line if len(said) == 1 else f"{', '.join(stages)}: {line}")
        return lines


def _longest(recipe: Recipe) -> int:
    return max(stage.seq_length for stage in recipe.stages)
