"""Stage sections `packing` and `stitch`: how documents fill sequences."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_speech.recipe.base import StrictConfig


class PackingConfig(StrictConfig):
    """Stage section `packing`: how documents fill sequences of `seq_length` tokens."""

    mode: Literal["auto", "cut", "fit", "bucket"] = Field(
        default="auto",
        description="cut: documents run on over sequence edges, no padding; fit: a document is never cut; bucket: a "
        "sequence is a rectangle of whole documents of about the same target length; auto: cut where loss.prompt is "
        "1, else fit",
    )
    oversize: Literal["refuse", "drop"] = Field(
        default="refuse", description="fit and bucket: what to do with documents longer than a sequence holds"
    )
    max_tokens: int | None = Field(
        default=None,
        gt=0,
        description="bucket only: documents of a sequence × length of the longest of them; null: seq_length",
    )
    open_sequences: int = Field(
        default=512,
        ge=1,
        description="fit and bucket: the packer's look-ahead, in sequences (at the beginning of a stage, an eighth of "
        "what lies before); more pads less, and reorders over a longer run",
    )


class StitchConfig(StrictConfig):
    """Stage section `stitch`: adjacent segments of one recording become one long document, up to `seq_length`.

    Adjacent: same source, same speaker and language, consecutive `segment_order`, and a gap within the bounds.
    """

    max_gap_seconds: float = Field(
        default=1.0, ge=0.0, description="longest silence between the end of a segment and the start of the next"
    )
    max_overlap_seconds: float = Field(
        default=0.1, ge=0.0, description="furthest that a segment may start before the end of the one before"
    )
    singles: Literal["keep", "drop"] = Field(
        default="keep", description="documents without a neighbour: keep them as they are, or leave them out, counted"
    )
    missing: Literal["refuse", "single"] = Field(
        default="refuse",
        description="documents without source, speaker, segment_order or times, which nothing can be joined to: refuse "
        "the dataset, or take them as documents without a neighbour",
    )


class ShuffleWindowConfig(StrictConfig):
    """Stage section `shuffle_window`: an epoch takes the dataset a few shards at a time, and mixes only those.

    A shard is a run of documents that lie together in `.bin`. Its size should be that of `data.stage_datasets: shards`
    (64 MiB for a `.bin` of up to 1 TiB) or a multiple of it: the two then have edges in common.
    """

    shards: int = Field(default=16, gt=0, description="shards that are mixed with one another, of each stratum")
    shard_mib: float = Field(default=64.0, gt=0.0, description="size of a shard: bytes of `.bin`")

    @property
    def shard_bytes(self) -> int:
        """Bytes of a shard."""
        return max(1, round(self.shard_mib * 2**20))
