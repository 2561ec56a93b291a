"""What a layout asks of a rank: parameters, memory by kind, FLOPs. Arithmetic only: no torch, no GPU.

**Parameters** are exact. With h hidden size, f width of the MLP, q = heads·d and k = query groups·d widths of queries
and of keys, t tensor-parallel ranks and V rows of the token table (padded to a multiple of 128·t), a rank holds

    per layer   h·(2q + 2k)/t + 3·h·f/t + 2h              (+ 2d norms of heads, + (q + 2k)/t biases, where used)
    first piece V·h/t          last piece V·h/t + h       (one table where both are one piece and the head is tied)

A tied head on another pipeline rank than the table is a copy: it takes memory there, and is no further parameter.

**Memory** counts what has to be there at one time, so that a layout is refused only when it cannot run; what a run
takes beyond it (the allocator's fragments, libraries' workspaces, NCCL, batches on their way) is not counted. With P
parameters of the rank, a bytes of an activation (2 in bf16 and fp8, 4 in fp32) and D ranks that share the optimizer's
state (data × context, with the distributed optimizer; else 1):

    weights      a·P                                      (+ 2 bytes of every matrix of the layers in fp8: the copies
                                                          for both directions)
    gradients    4·P                                      (summed in fp32)
    optimizer    8·P/D in fp32 (two moments), 12·P/D in bf16 and fp8 (and fp32 masters); + 4·P/D with `ema`
    activations  kept from the forward to the backward pass, see below
    head         (4 + a)·V/t·min(R, chunk) logits and their gradient (4 in fp32: in place), 4·V·h/t of the table's
                 gradient (a·V·h/t where R fits one chunk on a GPU), and T·a·h + 2·R·a·h of the rows on their way,
                 for R positions that carry loss

**Activations** of the torch back-end. A micro-batch has T = micro_batch_size·seq_length/context positions. A layer
keeps, per position,

    a·(2h/s + 2h/s + (q + 2k)/t + q/t + 3f/t) + 8/s + 4·heads/t bytes

for: the inputs of both norms and what they give (s = t under sequence parallelism, else 1); queries, keys and values,
and what attention gave; gate, linear and product of SwiGLU; the norms' scales and attention's log-sums. On a CPU the
log-sums are made again, and queries that share keys are there twice (+ q/t): projected and in rows of their own. Norms
of heads add what they read.
`recompute full` keeps the input of a layer (a·h/s) and, while one is computed again, that layer's all; `selective`
drops what is kept within the parts that it names: of mlp 3f/t, of core_attn the log-sums alone, since queries, keys,
values and output are its neighbours' too. A pipeline rank holds the layers of several micro-batches at once: rank r of
p stages min(m, p - r) of m under 1F1B, and min(m·v, 2(p - r - 1) + (v - 1)·p + 1) pieces under the interleaved
schedule with v pieces a rank. Of the T - R positions without loss the last layer does not keep what belongs to its MLP
and to the last norm, a·(3h + 3f/t) + 8 bytes, where it leaves them out (`specs.LastLayer`).

**FLOPs** per token are those of :meth:`ModelConfig.flops_per_token`, and recomputation beside them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from megatron_speech.model.layer_plan import last_mlp_on_learned_only, layer_kinds
from megatron_speech.model.pipeline_split import split_layers
from megatron_speech.recipe.model import ModelConfig
from megatron_speech.recipe.precision import Precision
from megatron_speech.recipe.recompute import RecomputeConfig

GIB = 2.0**30
_TABLE_MULTIPLE = 128
# As in ops/cross_entropy.py: elements of a chunk of logits, and rows that a chunk has at least.
_CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 28}
_MIN_CHUNK_ROWS = 128


@dataclass(frozen=True)
class MemoryLayout:
    """How a model is divided, and what goes through it at a time.

    Attributes:
        tensor, pipeline, virtual_pipeline, context, data: ranks, and pieces a pipeline rank has.
        split: layers of every piece of the model, in its order: piece c lies on pipeline rank c mod `pipeline`.
        sequence_parallel, distributed_optimizer: as in the recipe.
        precision, recompute: as in the recipe.
        positions: micro_batch_size × seq_length.
        learned: share of the positions that carry loss.
        micro_batches: per step and data-parallel rank.
        ema: whether a moving average of the weights is kept.
        device: "cuda" or "cpu".
    """

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    context: int = 1
    data: int = 1
    split: tuple[int, ...] = ()
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    precision: Precision = "bf16"
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    positions: int = 2048
    learned: float = 1.0
    micro_batches: int = 1
    ema: bool = False
    device: str = "cuda"

    @property
    def ranks(self) -> int:
        """Processes."""
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def activation_bytes(self) -> int:
        """Of one activation, and of one weight."""
        return 4 if self.precision == "fp32" else 2

    def pieces(self, stage: int) -> list[int]:
        """The pieces of the model on a pipeline rank."""
        return list(range(stage, len(self.split), self.pipeline))


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, by kind."""

    parameters: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.head

    def describe(self) -> str:
        """In words, in GiB."""
        parts = ("weights", "gradients", "optimizer", "activations", "head")
        return ", ".join(f"{name} {getattr(self, name) / GIB:.2f}" for name in parts)


def divided(config: ModelConfig, vocab_size: int, seq_length: int, layout: MemoryLayout) -> MemoryLayout:
    """`layout` with its layers shared out as the builder does, where `split` does not say.

    Raises:
        InputError: too few layers for the pipeline.
    """
    if layout.split:
        return layout
    pieces = layout.virtual_pipeline if layout.virtual_pipeline > 1 else None
    return replace(layout, split=split_layers(config, vocab_size, layout.pipeline, pieces, seq_length))


def table_rows(vocab_size: int, tensor: int) -> int:
    """Rows of the token table with its padding, over all tensor-parallel ranks."""
    multiple = _TABLE_MULTIPLE * tensor
    return math.ceil(vocab_size / multiple) * multiple


def layer_parameters(config: ModelConfig, tensor: int) -> tuple[int, int]:
    """(in matrices, in norms and biases) of one layer on one tensor-parallel rank."""
    h, f = config.hidden_size, config.ffn_hidden_size
    q, k = config.num_attention_heads * config.kv_channels, config.num_query_groups * config.kv_channels
    matrices = h * (2 * q + 2 * k) // tensor + 3 * h * f // tensor
    vectors = 2 * h
    if config.qk_norm:
        vectors += 2 * config.kv_channels
    if config.qkv_bias:
        vectors += (q + 2 * k) // tensor
    return matrices, vectors


def rank_parameters(config: ModelConfig, vocab_size: int, layout: MemoryLayout, stage: int = 0) -> int:
    """Elements of all parameters of a rank of pipeline stage `stage`; a tied head apart from its table counts again."""
    pieces, last = layout.pieces(stage), len(layout.split) - 1
    total = sum(layout.split[piece] for piece in pieces) * sum(layer_parameters(config, layout.tensor))
    table = table_rows(vocab_size, layout.tensor) // layout.tensor * config.hidden_size
    if 0 in pieces:
        total += table
    if last in pieces:
        total += config.hidden_size
        if not (config.tie_embeddings and 0 in pieces):
            total += table
    return total


def layer_activations(config: ModelConfig, layout: MemoryLayout) -> tuple[float, float]:
    """(kept per layer, kept of a layer that is computed again while it is) in bytes, for one position of the rank."""
    a, t = layout.activation_bytes, layout.tensor
    s = t if layout.sequence_parallel else 1
    h, f, heads = config.hidden_size, config.ffn_hidden_size, config.num_attention_heads
    q, k = heads * config.kv_channels, config.num_query_groups * config.kv_channels
    copied = q if layout.device == "cpu" and heads != config.num_query_groups else 0
    log_sums = 0.0 if layout.device == "cpu" else 4 * heads / t
    attention = a * (q + 2 * k + copied) / t + log_sums
    if config.qk_norm:
        attention += a * (2 * q + 2 * k - copied) / t + 4 * (heads + config.num_query_groups) / t
    kept = 4 * a * h / s + 8 / s + attention + a * q / t + a * 3 * f / t
    if layout.recompute.mode == "none":
        return kept, 0.0
    if layout.recompute.mode == "full":
        return a * h / s, kept
    less = 0.0
    if "mlp" in layout.recompute.parts:
        less += a * 3 * f / t
    if "core_attn" in layout.recompute.parts:
        less += log_sums
    return kept - less, less


def in_flight(layout: MemoryLayout, stage: int) -> float:
    """Micro-batches whose activations a pipeline rank holds at once, for all of its layers."""
    stages, pieces, m = layout.pipeline, layout.virtual_pipeline, layout.micro_batches
    if stages == 1:
        return 1.0
    if pieces == 1:
        return float(min(m, stages - stage))
    return min(m * pieces, 2 * (stages - stage - 1) + (pieces - 1) * stages + 1) / pieces


def memory(config: ModelConfig, vocab_size: int, layout: MemoryLayout, stage: int = 0) -> Memory:
    """What a rank of pipeline stage `stage` holds at the fullest moment of a step, in bytes (see the module)."""
    a, h = layout.activation_bytes, config.hidden_size
    parameters = rank_parameters(config, vocab_size, layout, stage)
    pieces, last = layout.pieces(stage), len(layout.split) - 1
    layers = sum(layout.split[piece] for piece in pieces)
    weights = float(a * parameters)
    if layout.precision == "fp8":
        weights += 2.0 * layers * layer_parameters(config, layout.tensor)[0]
    sharers = layout.data * layout.context if layout.distributed_optimizer else 1
    states = (8 if layout.precision == "fp32" else 12) + (4 if layout.ema else 0)
    positions = layout.positions / layout.context
    per_layer, again = layer_activations(config, layout)
    recomputed = layers
    if layout.recompute.mode == "full" and layout.recompute.layers is not None:
        recomputed = sum(min(layout.split[piece], layout.recompute.layers) for piece in pieces)
    whole = layer_activations(config, replace(layout, recompute=RecomputeConfig()))[0]
    kept = positions * (recomputed * per_layer + (layers - recomputed) * whole)
    activations = in_flight(layout, stage) * kept + positions * again
    head = 0.0
    if last in pieces:
        activations -= positions * (1.0 - layout.learned) * _left_out(config, layout)
        activations += positions * (a * h + 4) / (layout.tensor if layout.sequence_parallel else 1)
        head = _head_bytes(vocab_size, layout, h, positions)
    activations += positions * 4 * config.kv_channels  # cosines and sines
    return Memory(parameters, weights, 4.0 * parameters, float(states) * parameters / sharers, activations, head)


def _left_out(config: ModelConfig, layout: MemoryLayout) -> float:
    """Bytes that the last layer's MLP and the last norm do not keep of a position without loss."""
    if not last_mlp_on_learned_only(
        layer_kinds(config)[-1],
        torch_backend=layout.precision != "fp8" and layout.context == 1,
        sequence_parallel=layout.sequence_parallel and layout.tensor > 1,
        layers=layout.split[-1],
    ):
        return 0.0
    norm = layout.activation_bytes * config.hidden_size + 4.0
    if layout.recompute.mode == "full" and (layout.recompute.layers or layout.split[-1]) >= layout.split[-1]:
        return norm
    mlp = 0.0 if "mlp" in layout.recompute.parts else 3 * config.ffn_hidden_size / layout.tensor
    return norm + layout.activation_bytes * (2 * config.hidden_size + mlp) + 4.0


def _head_bytes(vocab_size: int, layout: MemoryLayout, hidden: int, positions: float) -> float:
    """What the head takes while it runs: rows, a chunk of logits with its gradient, and the gradient of the table."""
    a, rows = layout.activation_bytes, layout.learned * positions
    table = table_rows(vocab_size, layout.tensor) // layout.tensor
    chunk = max(_MIN_CHUNK_ROWS, _CHUNK_ELEMENTS[layout.device] // table // 64 * 64)
    logits = 4 + (a if a < 4 else 0)
    gradient = a if rows <= chunk and layout.device == "cuda" else 4
    return a * hidden * (positions + 2 * rows) + logits * table * min(rows, chunk) + gradient * table * hidden


def max_rank_memory(config: ModelConfig, vocab_size: int, layout: MemoryLayout) -> Memory:
    """The memory of the pipeline stage that needs most."""
    return max(
        (memory(config, vocab_size, layout, stage) for stage in range(layout.pipeline)), key=lambda found: found.total
    )


@dataclass(frozen=True)
class Remedy:
    """A change to a recipe, what a rank then needs in bytes, and whether that is little enough."""

    change: str
    total: float
    enough: bool

    def __str__(self) -> str:
        return f"{self.change} ({self.total / GIB:.1f} GiB)"


def remedies(config: ModelConfig, vocab_size: int, layout: MemoryLayout, limit: float) -> list[Remedy]:
    """Single changes to a layout that bring a rank below `limit` bytes, the least costly first.

    Where none does, those that come nearest.
    """
    changes: list[tuple[str, MemoryLayout]] = []
    if layout.data > 1 and not layout.distributed_optimizer:
        changes.append(("parallel.distributed_optimizer: true", replace(layout, distributed_optimizer=True)))
    changes.append(("micro_batch_size or seq_length half as large", replace(layout, positions=layout.positions // 2)))
    if layout.recompute.mode != "full":
        changes.append(("recompute.mode: full", replace(layout, recompute=RecomputeConfig(mode="full"))))
    # Ranks on one machine share its memory: more of them there are no remedy.
    for times in (2, 4, 8) if layout.device == "cuda" else ():
        # On the same GPUs where they divide, else on as many times more.
        fewer = times if layout.data % times == 0 else 1
        base = replace(layout, data=layout.data // fewer, micro_batches=layout.micro_batches * fewer)
        tensor, pipeline = layout.tensor * times, layout.pipeline * times
        if config.num_query_groups % tensor == 0 and config.ffn_hidden_size % tensor == 0:
            changes.append((f"parallel.tensor: {tensor}", replace(base, tensor=tensor)))
        if pipeline * layout.virtual_pipeline <= config.num_layers:
            longer = divided(config, vocab_size, layout.positions, replace(base, pipeline=pipeline, split=()))
            changes.append((f"parallel.pipeline: {pipeline}", longer))
    found = []
    for change, changed in changes:
        total = max_rank_memory(config, vocab_size, changed).total
        found.append(Remedy(change, total, total <= limit))
    return [remedy for remedy in found if remedy.enough] or sorted(found, key=lambda remedy: remedy.total)
