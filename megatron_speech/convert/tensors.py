"""Which Hugging Face tensor is which part of which parameter.

megatron-core keeps query, key and value in one matrix, in the order of query groups (the queries of a group, its key,
its value), and the two matrices of SwiGLU in another, gate first. A part is a view of the parameter, so the same table
serves both ways and no matrix is put together beside the model.

Shapes: V ids, H hidden size, F width of the MLP, G query groups, N query heads of a group, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from megatron_speech.recipe.model import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Slot:
    """A tensor of a Hugging Face file and its place in the model.

    Attributes:
        name: in the file.
        shape: in the file.
        parameter: the model's, by its global name (`builder.global_named_parameters`).
        view: parameter → the part of it, of any shape with the tensor's elements in its order.
    """

    name: str
    shape: tuple[int, ...]
    parameter: str
    view: Callable[[Tensor], Tensor]

    def read_into(self, parameter: Tensor, tensor: Tensor) -> None:
        """Copy `tensor` into its part of the parameter."""
        part = self.view(parameter)
        part.copy_(tensor.reshape(part.shape))

    def taken_from(self, parameter: Tensor) -> Tensor:
        """The tensor as the file has it; on the CPU, contiguous, and with a storage of its own."""
        return self.view(parameter).reshape(self.shape).to("cpu", copy=True)


def slots(model: ModelConfig, vocab_size: int) -> list[Slot]:
    """Every tensor of a Hugging Face file of this shape, in the order of the computation.

    Args:
        model: shape.
        vocab_size: rows of the tables in the file; further rows of the model's are no part of it.
    """
    h, f, d, groups = model.hidden_size, model.ffn_hidden_size, model.kv_channels, model.num_query_groups
    per_group = model.num_attention_heads // groups
    found = [_table(EMBEDDING, "embedding.word_embeddings.weight", vocab_size, h)]
    for layer in range(model.num_layers):
        theirs, ours = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        attention, theirs_attention = ours + "self_attention.", theirs + "self_attn."
        found.append(_whole(theirs + "input_layernorm.weight", ours + "input_layernorm.weight", h))
        heads_of = {"q": (0, per_group), "k": (per_group, per_group + 1), "v": (per_group + 1, per_group + 2)}
        for name, (start, last) in heads_of.items():
            heads = groups * (last - start)
            found.append(
                Slot(
                    f"{theirs_attention}{name}_proj.weight",
                    (heads * d, h),
                    attention + "linear_qkv.weight",
                    _heads(groups, per_group, d, start, last),
                )
            )
            if model.qkv_bias:
                found.append(
                    Slot(
                        f"{theirs_attention}{name}_proj.bias",
                        (heads * d,),
                        attention + "linear_qkv.bias",
                        _heads(groups, per_group, d, start, last),
                    )
                )
        if model.qk_norm:
            found.append(_whole(theirs_attention + "q_norm.weight", attention + "q_layernorm.weight", d))
            found.append(_whole(theirs_attention + "k_norm.weight", attention + "k_layernorm.weight", d))
        width = model.num_attention_heads * d
        found.append(_whole(theirs_attention + "o_proj.weight", attention + "linear_proj.weight", h, width))
        found.append(_whole(theirs + "post_attention_layernorm.weight", ours + "pre_mlp_layernorm.weight", h))
        for number, name in enumerate(("gate", "up")):
            found.append(Slot(f"{theirs}mlp.{name}_proj.weight", (f, h), ours + "mlp.linear_fc1.weight", _half(number)))
        found.append(_whole(theirs + "mlp.down_proj.weight", ours + "mlp.linear_fc2.weight", h, f))
    found.append(_whole("model.norm.weight", "decoder.final_layernorm.weight", h))
    if not model.tie_embeddings:
        found.append(_table(HEAD, "output_layer.weight", vocab_size, h))
    return found


def _whole(name: str, parameter: str, *shape: int) -> Slot:
    return Slot(name, shape, parameter, lambda tensor: tensor)


def _table(name: str, parameter: str, rows: int, columns: int) -> Slot:
    return Slot(name, (rows, columns), parameter, lambda tensor: tensor[:rows])


def _heads(groups: int, per_group: int, width: int, start: int, stop: int) -> Callable[[Tensor], Tensor]:
    """[G·(N+2)·D, …] → the heads `start` to `stop` of every group, [G, stop − start, D, …]."""

    def view(tensor: Tensor) -> Tensor:
        return tensor.view(groups, per_group + 2, width, *tensor.shape[1:])[:, start:stop]

    return view


def _half(number: int) -> Callable[[Tensor], Tensor]:
    """[2·F, H] → one half of it."""
    return lambda tensor: tensor.chunk(2)[number]
