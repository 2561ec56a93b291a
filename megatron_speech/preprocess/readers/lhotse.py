"""Cuts of Lhotse (lhotse.readthedocs.io): `cuts.jsonl.gz`, JSON lines or an array, known by their `type`.

A `MonoCut` with at most one supervision is a row: recording, start, duration and channel, and the supervision's text,
speaker and language. What is not one segment of one file as it is, is rejected by name: several supervisions, other
kinds of cuts, recordings that are commands or lie in memory or in a Shar, and transforms (Speed, Volume, Resample …),
which change what is heard and are done by Lhotse alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_speech.preprocess.readers import source
from megatron_speech.preprocess.readers.base import Row, RowBatch, RowReader, RowRejected
from megatron_speech.preprocess.readers.recognise import base_of
from megatron_speech.remote import is_url

_CUT = re.compile(rb'"type"\s*:\s*"(?:MonoCut|MultiCut|MixedCut|PaddingCut|DataCut)"')
_RECORDING = re.compile(rb'\s*\[?\s*\{\s*"id"\s*:\s*"[^"]*"\s*,\s*"sources"\s*:\s*\[\s*\{')
_SUPERVISION = re.compile(
    rb'\s*\[?\s*\{\s*"id"\s*:\s*"[^"]*"\s*,\s*"recording_id"\s*:\s*"[^"]*"\s*,\s*"start"\s*:[^,]*,'
    rb'\s*"duration"\s*:[^,]*,\s*"channel"\s*:(?![^}\n]*(?:path|file|audio|codes)"\s*:)'
)
_KINDS = {
    "MultiCut": "several channels at once; write a cut for each channel: cut.to_mono()",
    "MixedCut": "several recordings mixed or joined; store them: cuts.save_audios(folder)",
    "PaddingCut": "silence without a recording; leave it out",
}
# A supervision may end this much behind its cut: times are rounded.
_TOLERANCE_SECONDS = 0.05

_USED = frozenset(("id", "start", "duration", "channel", "supervisions", "recording", "type", "custom"))
_USED_OF_SUPERVISION = frozenset(
    ("id", "recording_id", "start", "duration", "channel", "text", "language", "speaker", "gender", "custom")
)


@dataclass(frozen=True)
class CutsBatch:
    """Rows of another batch, as cuts."""

    inner: RowBatch

    @property
    def path(self) -> str:
        """The list of cuts."""
        return self.inner.path

    @property
    def rows(self) -> int:
        """Number of cuts."""
        return self.inner.rows

    def read(self) -> list[Row]:
        """Read the cuts as rows."""
        rows = list(self.inner.read())
        for row in rows:
            if row.rejected is not None:
                continue
            try:
                row.fields, unread = row_of_cut(row.fields)
                row.notices = tuple(f"lhotse_field:{name}" for name in unread)
            except RowRejected as error:
                row.rejected = error
            except (TypeError, ValueError, KeyError, AttributeError) as error:
                row.rejected = RowRejected("bad_cut", f"the row is no cut of Lhotse: {error!r}")
        paths = (str(row.fields["wav_path"]) for row in rows if row.rejected is None)
        if base := base_of(source.folder(self.path), paths):
            for row in rows:
                where = row.fields.get("wav_path", "")
                if row.rejected is None and not os.path.isabs(where) and not is_url(where):
                    row.fields["wav_path"] = base + where
        return rows


def row_of_cut(cut: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The row that a cut is, and the names of its fields that are not read.

    Raises:
        RowRejected: unsupported_cut, with the reason; bad_cut.
    """
    kind = cut.get("type", "MonoCut")
    if kind != "MonoCut":
        what = _KINDS.get(kind, "of a kind that is not read")
        raise RowRejected("unsupported_cut", f"cut {cut.get('id')} is a {kind}: {what}")
    supervisions = cut.get("supervisions") or []
    if len(supervisions) > 1:
        raise RowRejected(
            "unsupported_cut",
            f"cut {cut['id']} has {len(supervisions)} supervisions; cut it at them: cuts.trim_to_supervisions()",
        )
    start, duration = float(cut["start"]), float(cut["duration"])
    fields: dict[str, Any] = {"sample_id": cut["id"], "start_time": start, "end_time": round(start + duration, 6)}
    fields |= _recording_of(cut)
    unread = [name for name, value in cut.items() if name not in _USED and value]
    for part in (cut, *supervisions):
        if part.get("custom"):
            fields["custom"] = fields.get("custom", {}) | part["custom"]
    for supervision in supervisions:
        begin, length = float(supervision["start"]), float(supervision["duration"])
        if begin < -_TOLERANCE_SECONDS or begin + length > duration + _TOLERANCE_SECONDS:
            raise RowRejected(
                "unsupported_cut",
                f"cut {cut['id']} holds only a part of its supervision ({begin:g} to {begin + length:g} of 0 to "
                f"{duration:g} s), so that its text says more than is heard; cut it at its supervisions: "
                "cuts.trim_to_supervisions()",
            )
        for theirs, ours in (("text", "transcript"), ("speaker", "speaker_id"), ("language", "language")):
            if supervision.get(theirs) is not None:
                fields[ours] = supervision[theirs]
        if supervision.get("gender") is not None:
            fields["gender"] = supervision["gender"]
        unread += [
            f"supervision.{name}" for name, value in supervision.items() if name not in _USED_OF_SUPERVISION and value
        ]
    return fields, unread


def _recording_of(cut: dict[str, Any]) -> dict[str, Any]:
    """wav_path, source_id and channel of a cut's recording."""
    recording = cut.get("recording")
    if not recording:
        raise RowRejected("unsupported_cut", f"cut {cut['id']} has features and no recording; needed is the audio")
    if recording.get("transforms"):
        names = [str(step.get("name")) if isinstance(step, dict) else str(step) for step in recording["transforms"]]
        raise RowRejected(
            "unsupported_cut",
            f"cut {cut['id']}: its recording is changed by {', '.join(names)}, which only Lhotse does; store what is "
            "heard: cuts.save_audios(folder)",
        )
    channel = cut.get("channel", 0)
    for place in recording["sources"]:
        channels = list(place.get("channels") or [0])
        if channel not in channels:
            continue
        if place["type"] not in ("file", "url"):
            raise RowRejected(
                "unsupported_cut",
                f"cut {cut['id']}: its recording is of type {place['type']}, needed a file; store it: "
                "cuts.save_audios(folder)",
            )
        fields = {"wav_path": place["source"], "source_id": recording["id"]}
        if len(channels) > 1:
            fields["channel"] = channels.index(channel)
        return fields
    raise RowRejected("bad_cut", f"cut {cut['id']} is of channel {channel}, which no file of its recording holds")


class CutsReader:
    """A list of cuts, read by the reader of JSON lines or of a JSON array."""

    def __init__(self, inner: RowReader) -> None:
        self._inner = inner
        self.path = inner.path
        self.files = inner.files

    @property
    def known_rows(self) -> int | None:
        """Number of cuts, where it is known."""
        return self._inner.known_rows

    @property
    def rows(self) -> int:
        """Number of cuts, counted if need be."""
        return self._inner.rows

    def batches(self, start: int, stop: int | None = None) -> Iterator[RowBatch]:
        """Cuts `start` to `stop` (from 0), in order."""
        return map(CutsBatch, self._inner.batches(start, stop))


def holds_cuts(head: bytes) -> bool:
    """Whether JSON that begins with `head` is a list of cuts."""
    return _CUT.search(head) is not None


def other_manifest(head: bytes) -> str | None:
    """What a list of Lhotse that is none of cuts is; None if it is no such list."""
    if holds_cuts(head):
        return None
    if _SUPERVISION.match(head) is not None:
        return "supervisions without recordings"
    if _RECORDING.match(head) is not None:
        return "recordings without supervisions"
    return None
