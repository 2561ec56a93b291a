"""How fast an interval of steps was: tokens, FLOPs and their share of what the GPU could do.

    tokens_per_second          document tokens (padding is not counted) / seconds of the interval
    tokens_per_second_per_gpu  that / processes
    tflops_per_gpu             (tokens · body + learned · (head + top)) / seconds / processes / 10¹²
    mfu                        tflops_per_gpu / dense bf16 peak of the GPU

Seconds are those of training steps, the wait for data included; validation and saving are not. `body` is 6 per
parameter of the layers' matrices plus 6 · layers · heads · head width · reach for causal attention, where `reach` is
the number of tokens that attention sees: the length of a token's document, on average over tokens. `head` is
6 · hidden · vocabulary, for the tokens whose logits are computed: those that are learned. `top` is the MLP of the last
layer, 6 · 3 · hidden · width, where it too runs for those alone; then `body` is without it, and else `top` is 0.
Recomputation is not counted. In fine-tuning, where prompts are not learned, a count of all of that for every token
would report work that is not done.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_speech.recipe.model import ModelConfig


@dataclass(frozen=True)
class Interval:
    """Some steps of training.

    Attributes:
        seconds: of the steps, on the host's clock.
        steps: how many.
        waited: seconds of them that this process waited for data.
        tokens: document tokens, over all ranks.
        learned: tokens that carry loss, over all ranks.
        pad_fraction: padding / positions.
    """

    seconds: float
    steps: int
    waited: float
    tokens: float
    learned: float
    pad_fraction: float

    def record(
        self,
        model: ModelConfig,
        vocabulary: int,
        *,
        reach: float,
        processes: int,
        peak_tflops: float | None,
        last_mlp_on_learned_only: bool = False,
    ) -> dict[str, float | None]:
        """The fields of metrics.jsonl.

        Args:
            model: its shape.
            vocabulary: ids of the head.
            reach: tokens that attention sees, on average over tokens.
            processes: GPUs, or processes without one.
            peak_tflops: of the GPU; None where it is not known.
            last_mlp_on_learned_only: the last layer's MLP runs for learned tokens alone.
        """
        body = model.flops_per_token(reach, 0)
        head = model.flops_per_token(reach, vocabulary) - body
        top = 18.0 * model.hidden_size * model.ffn_hidden_size if last_mlp_on_learned_only else 0.0
        tflops = (self.tokens * (body - top) + self.learned * (head + top)) / self.seconds / processes / 1e12
        return {
            "tokens_per_second": self.tokens / self.seconds,
            "tokens_per_second_per_gpu": self.tokens / self.seconds / processes,
            "tflops_per_gpu": tflops,
            "mfu": tflops / peak_tflops if peak_tflops else None,
            "pad_fraction": self.pad_fraction,
            "learned_fraction": self.learned / self.tokens if self.tokens else 0.0,
            "data_wait_seconds": self.waited / self.steps,
            "step_seconds": self.seconds / self.steps,
        }
