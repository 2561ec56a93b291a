"""megatron-core's GPT with packed documents and a head that computes only the logits somebody needs."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from torch import Tensor

from megatron_speech.model.packed import PackedSequences
from megatron_speech.model.rotary import rotary_tables
from megatron_speech.model.specs import LastLayer
from megatron_speech.model.targets import TOKENS, HeadTargets, Losses
from megatron_speech.ops.cross_entropy import linear_cross_entropy
from megatron_speech.recipe.model import ModelConfig


class SpeechGPTModel(GPTModel):
    """A pipeline stage (or the whole) of the language model; made by :func:`megatron_speech.model.builder.build_model`.

    A micro-batch [B, S] comes flattened to one row of T = B·S tokens, with its documents in `packed_seq_params`.
    megatron-core's schedules therefore get `micro_batch_size=1, seq_length=B·S`: that is the shape that
    travels between pipeline stages.
    """

    model_config: ModelConfig
    valid_vocab_size: int
    fused_attention: bool  # attention is Transformer Engine's, and so is what it wants of PackedSequences

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        targets: HeadTargets | None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> Tensor | Losses:
        """Run this stage.

        Args:
            input_ids: [1, T] int64.
            position_ids: ignored in favour of `packed_seq_params.position_ids`, which every stage has.
            attention_mask: none: documents and causality say it all.
            targets: what the head is to learn; None for logits.
            packed_seq_params: where the documents lie, required on every stage. With targets its `head_rows` become
                theirs.

        Returns:
            Before the last stage: hidden states [T, 1, H]. Last stage, with targets: :class:`Losses` of them. Without:
            logits [rows, padded vocabulary] fp32 for `packed_seq_params.head_rows` (all tokens if None), −inf for
            padding ids, whole on every tensor-parallel rank.
        """
        if not isinstance(packed_seq_params, PackedSequences):
            raise TypeError("SpeechGPTModel needs packed_seq_params: a PackedSequences of the micro-batch")
        if targets is not None:
            packed_seq_params.head_rows = targets.rows
        # megatron-core hands what it calls labels on to `_postprocess` as it is.
        result: Tensor | Losses = super().forward(
            input_ids, position_ids, attention_mask, labels=targets, packed_seq_params=packed_seq_params
        )
        return result

    def _preprocess(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        decoder_input: Tensor | None = None,
        inference_context: Any = None,
        packed_seq_params: PackedSequences | None = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Any, ...]:
        if decoder_input is None and self.pre_process:
            decoder_input = self.embedding(input_ids=input_ids, position_ids=position_ids)
        assert packed_seq_params is not None
        rope = self.rotary_pos_emb
        if self.fused_attention != (packed_seq_params.qkv_format == "thd"):
            raise TypeError(f"PackedSequences.build needs fused={self.fused_attention} for this model")
        if self.fused_attention:
            # Angles of positions 0, 1 …; megatron-core's attention turns every document by them from its start.
            angles = rope(packed_seq_params.max_seqlen_q, packed_seq=True)
            return decoder_input, angles, None, None, None, padding_mask
        if packed_seq_params.rotary is None:
            assert packed_seq_params.position_ids is not None
            if rope.inv_freq.device != packed_seq_params.position_ids.device:
                rope.inv_freq = rope.inv_freq.to(packed_seq_params.position_ids.device)
            packed_seq_params.rotary = rotary_tables(rope.inv_freq, packed_seq_params.position_ids)
        # Rotary embeddings go to the attention with the packed parameters, so the decoder gets none.
        return decoder_input, None, None, None, None, padding_mask

    def _postprocess(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: HeadTargets | None,
        *args: Any,
        packed_seq_params: PackedSequences | None = None,
        **kwargs: Any,
    ) -> Tensor | Losses:
        if not self.post_process:
            return hidden_states
        assert packed_seq_params is not None
        table = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        table_VH = table if table is not None else self.output_layer.weight
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            # Each rank's gradient is a part of a sum over the vocabulary: the backward pass reduce-scatters it.
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=group)
        else:
            hidden_states = copy_to_tensor_model_parallel_region(hidden_states, group=group)
        rows, hidden_RH = packed_seq_params.head_rows, hidden_states.squeeze(1)
        if rows is not None and not (self.decoder.layers and isinstance(self.decoder.layers[-1], LastLayer)):
            hidden_RH = hidden_RH.index_select(0, rows)
        targets = labels
        if targets is None:
            return self._logits(hidden_RH, table_VH)
        loss = linear_cross_entropy(
            hidden_RH,
            table_VH,
            targets.labels,
            targets.weights,
            vocab_size=self.valid_vocab_size,
            label_smoothing=targets.label_smoothing,
            z_loss=targets.z_loss,
            group=group if group.size() > 1 else None,
        )
        return Losses({TOKENS: loss})

    def _logits(self, hidden_RH: Tensor, table_VH: Tensor) -> Tensor:
        logits = gather_from_tensor_model_parallel_region(hidden_RH @ table_VH.t(), group=self.pg_collection.tp)
        logits = logits.float()
        if self.valid_vocab_size < logits.shape[-1]:
            if logits.requires_grad:  # autograd lets nobody write into what the gathering returned
                logits = logits.clone()
            logits[:, self.valid_vocab_size :] = float("-inf")
        return logits

    @property
    def device(self) -> torch.device:
        """Where the parameters lie."""
        return next(self.parameters()).device
