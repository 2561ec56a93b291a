"""A stage whose blend changes while it is being trained: what was taken before the change, and what is still due.

A stage is trained on the sequences of one index, and after a change (weights, filters, an added or grown dataset)
on those of another, which begins where the first one was left: sequences are numbered through the whole stage. The
second order takes over from the first, document by document:

    turns[d]    how many epochs document d has had its turn in
    epochs[k]   the epoch that stratum k was in: its documents with turns <= epochs[k] are due, and come first

Documents that the stage did not know before have had no turn and are due at once. When nothing is due any more, the
stratum goes on with epochs of all of its documents. So no document comes again before those that are due, whatever
changed. A document that was cut by the end of the old index is due again, whole.

The list of a stage's indices with the reason of each change is its history; checkpoints and blend.json hold it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_speech.data.blend.order import EpochPosition
from megatron_speech.data.blend.strata import Blend, check_stage
from megatron_speech.data.dataset.document_columns import DocumentTable
from megatron_speech.data.dataset.indexed import CODE_OF_DTYPE, HEADER, MAGIC, VERSION, TokenDataset
from megatron_speech.data.sequences.index_cache import INDEX_VERSION
from megatron_speech.data.sequences.packing import SegmentTable
from megatron_speech.errors import InputError
from megatron_speech.files import atomic_write, canonical_json, sha256_hex
from megatron_speech.recipe.data import DataConfig
from megatron_speech.recipe.stage import StageDataConfig

_SEGMENTS = 1 << 21  # segments looked at together: bounds the temporary arrays
_MOST_TURNS = np.iinfo(np.uint16).max
_FORMAT = 1

Entry = dict[str, Any]
"""One index of a stage: key, from_sequence, to_sequence (null: in use), reason, spec, continuation (a file's hash)."""


# ---- what a blend is a function of


def blend_spec(stage: StageDataConfig, data: DataConfig, datasets: Mapping[str, TokenDataset], seed: int) -> Entry:
    """Everything that the order of a stage's documents is a function of, JSON-able; how long it is apart."""
    groups = check_stage(stage)
    known = {}
    for name, dataset in datasets.items():
        manifest = dataset.manifest
        assert manifest is not None
        if any(group.task == manifest.task and name in (group.datasets or [name]) for group in groups):
            known[name] = {
                "task": manifest.task,
                "documents": manifest.documents,
                "files": {suffix: entry.model_dump() for suffix, entry in sorted(manifest.files.items())},
            }
    fields = stage.model_dump(mode="json", include=set(BLEND_FIELDS) | {"name", "seq_length", "packing", "stitch"})
    for stratum in fields["strata"] or ():
        del stratum["max_epochs"]  # a warning, no more
    if fields["shuffle_window"] is None:
        del fields["shuffle_window"]  # as before there was one
    limited = stage.epoch_limit is not None or any(group.epoch_limit is not None for group in groups)
    return {
        "version": INDEX_VERSION,
        "stage": {**fields, "packing_mode": stage.packing_mode, "sft": stage.is_sft},
        "datasets": known,
        "validation_fraction": data.validation_fraction,
        "split_seed": data.split_seed,
        "seed": seed,
        # A limit of epochs is a share of the budget.
        "tokens": stage.tokens if limited else None,
    }


BLEND_FIELDS = ("task_mass", "strata", "language_temperature", "source_caps", "epoch_limit", "allow_text_in_sft",
                "shuffle_window")  # fmt: skip
"""Fields of a stage that say what it is trained on: those that may change under `data.on_change: continue`."""


def find_changes(before: Entry, after: Entry, datasets: Mapping[str, TokenDataset]) -> list[str]:
    """What differs between two specs of a stage, as phrases; empty: nothing.

    Raises:
        InputError: a dataset was replaced by another one under its name.
    """
    changes = []
    if before["version"] != after["version"]:
        changes.append(f"this version draws another order ({before['version']} → {after['version']})")
    for name in sorted({*before["datasets"], *after["datasets"]}):
        old, new = before["datasets"].get(name), after["datasets"].get(name)
        if old is None:
            changes.append(f"dataset {name} added ({new['documents']:,} documents)")
        elif new is None:
            changes.append(f"dataset {name} removed")
        elif old["files"] != new["files"]:
            _refuse_replaced(name, old, datasets[name])
            changes.append(f"dataset {name} grown ({old['documents']:,} → {new['documents']:,} documents)")
    old_fields = {"tokens": before["tokens"], **_flat(before["stage"])}
    new_fields = {"tokens": after["tokens"], **_flat(after["stage"])}
    for key in sorted({*old_fields, *new_fields}):
        old_value, new_value = old_fields.get(key), new_fields.get(key)
        if old_value != new_value:
            changes.append(f"{key} {_shown(old_value)} → {_shown(new_value)}")
    return changes


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict | list) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        flat |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _shown(value: Any) -> str:
    return "not set" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _refuse_replaced(name: str, old: Entry, dataset: TokenDataset) -> None:
    """Check that `dataset` is the one that `old` describes with documents added after its own."""
    documents = old["documents"]
    replaced = InputError(
        f"dataset {name} ({dataset.prefix}): its documents are not those that the run began with, with others after "
        "them; put the old ones back, or give the new dataset a name of its own"
    )
    if len(dataset) < documents:
        raise replaced
    index = hashlib.sha256(HEADER.pack(MAGIC, VERSION, CODE_OF_DTYPE[dataset.dtype], documents, documents + 1))
    index.update(np.ascontiguousarray(dataset.id_counts[:documents], dtype="<i4").data)
    index.update(np.ascontiguousarray(dataset.pointers[:documents], dtype="<i8").data)
    index.update(np.arange(documents + 1, dtype="<i8").data)
    if index.hexdigest() != old["files"][".idx"]["sha256"]:
        raise replaced
    ids, left = hashlib.sha256(), int(old["files"][".bin"]["bytes"])
    at = 0
    while left and (chunk := dataset.read_bin(at, min(left, 1 << 22))):
        ids.update(chunk)
        at, left = at + len(chunk), left - len(chunk)
    if left or ids.hexdigest() != old["files"][".bin"]["sha256"]:
        raise replaced


# ---- what was taken


@dataclass(frozen=True)
class Continuation:
    """What a stage's next index takes over from the one before.

    from_sequence: first sequence of the next index; turns: dataset → uint16 [documents]; epochs: stratum → epoch;
    tokens: stratum → tokens trained on in this stage so far.
    """

    from_sequence: int
    turns: dict[str, np.ndarray]
    epochs: dict[str, int]
    tokens: dict[str, int]
    digest: str = field(default="", compare=False)

    @staticmethod
    def after(
        table: SegmentTable,
        strata: Sequence[Entry],
        lengths: Mapping[str, np.ndarray],
        to_sequence: int,
        before: Continuation | None,
    ) -> Continuation:
        """What the first `to_sequence` sequences of a stage have taken, those of its earlier indices included.

        Args:
            table, strata: the index in use, and its strata as it describes them.
            lengths: dataset → int32 tokens of its documents; a dataset that is gone may be missing, and is forgotten.
            to_sequence: how many of the stage's sequences have been trained on.
            before: what the index in use took over.
        """
        names = list(lengths)
        turns = [np.zeros(len(of_dataset), dtype=np.uint16) for of_dataset in lengths.values()]
        for name, earlier in before.turns.items() if before else ():
            if name in names:
                turns[names.index(name)][: len(earlier)] = earlier
        first_epoch = np.array([stratum["first_epoch"] for stratum in strata], dtype=np.int64)
        dataset_of = np.array(
            [names.index(stratum["dataset"]) if stratum["dataset"] in names else -1 for stratum in strata], np.int64
        )
        tokens = np.zeros(len(strata), dtype=np.int64)
        most = np.zeros(len(strata), dtype=np.int64)  # turns of the documents furthest on
        end = int(table.seq_ptr[to_sequence])
        for begin in range(0, end, _SEGMENTS):
            part = slice(begin, min(begin + _SEGMENTS, end))
            stratum = np.asarray(table.stratum[part])
            tokens += np.bincount(stratum, table.length[part], minlength=len(strata)).astype(np.int64)
            for index in np.unique(dataset_of[stratum]).tolist():
                if index < 0:
                    continue
                mine = np.flatnonzero(dataset_of[stratum] == index)
                document = np.asarray(table.document[part])[mine]
                reached = np.asarray(table.start[part])[mine] + np.asarray(table.length[part])[mine]
                whole = reached == lengths[names[index]][document]
                document, which = document[whole], stratum[mine[whole]]
                found, at, counts = np.unique(document, return_index=True, return_counts=True)
                of_found = which[at]
                # A document that was new to its stratum joined the epoch under way: earlier ones are not made up for.
                now = np.maximum(turns[index][found].astype(np.int64), first_epoch[of_found]) + counts
                turns[index][found] = np.minimum(now, _MOST_TURNS)
                np.maximum.at(most, of_found, now)
        epochs, taken = dict(before.epochs) if before else {}, dict(before.tokens) if before else {}
        for k, stratum_row in enumerate(strata):
            name = stratum_row["name"]
            epochs[name] = int(max(most[k] - 1, first_epoch[k]))
            taken[name] = taken.get(name, 0) + int(tokens[k])
        kept = dict(before.turns) if before else {}
        kept |= dict(zip(names, turns, strict=True))
        return Continuation(to_sequence, kept, epochs, taken)

    def begin(self, blend: Blend, tables: Sequence[DocumentTable]) -> dict[str, EpochPosition]:
        """Where each stratum of a new blend continues, by its name; those that start from 0 are left out."""
        positions = {}
        for stratum in blend.strata:
            turns = self._turns_of(tables[stratum.dataset])[stratum.documents]
            most = int(turns.max(initial=0))
            if not most:
                continue  # none of its documents has had a turn
            # A stratum that was not there under this name: its documents that are behind the others are due.
            epoch = self.epochs.get(stratum.name, most - 1)
            positions[stratum.name] = EpochPosition(epoch, stratum.documents[turns <= epoch])
        return positions

    def _turns_of(self, table: DocumentTable) -> np.ndarray:
        """Turns of each row of a table: of a document, or of the part of a stitched unit that is behind."""
        units = getattr(table, "unit_documents", None)
        rows = len(table.lengths) if units is None else int(units.max(initial=-1)) + 1
        turns = np.zeros(max(rows, len(self.turns.get(table.name, ()))), dtype=np.uint16)
        if table.name in self.turns:
            turns[: len(self.turns[table.name])] = self.turns[table.name]
        if units is None or not len(units):
            return turns
        starts = getattr(table, "unit_ptr")[:-1]  # noqa: B009 (a stitched table, which this module need not know)
        behind: np.ndarray = np.minimum.reduceat(turns[units], starts)
        return behind

    def save(self, path: Path) -> None:
        """Write to `path`, whole or not at all."""
        described = {
            "format": _FORMAT, "from_sequence": self.from_sequence, "epochs": self.epochs, "tokens": self.tokens,
            "datasets": list(self.turns),
        }  # fmt: skip
        arrays: dict[str, Any] = {f"turns_{number}": turns for number, turns in enumerate(self.turns.values())}
        arrays["description"] = np.frombuffer(canonical_json(described), dtype=np.uint8)
        with atomic_write(path) as handle:
            np.savez_compressed(handle, **arrays)

    @staticmethod
    def load(path: Path, sha256: str | None = None) -> Continuation:
        """Read what :meth:`save` wrote; `digest` is of the contents, not of the file's compression.

        Raises:
            InputError: missing, damaged, or not what `sha256` (a digest) says.
        """
        remedy = "restore it from a copy of the run directory, or start a new run"
        try:
            data = path.read_bytes()
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                described = json.loads(arrays["description"].tobytes())
                turns = {name: arrays[f"turns_{k}"] for k, name in enumerate(described["datasets"])}
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise InputError(
                f"{path}, what the stage took before its blend changed, cannot be read: {error}; {remedy}"
            ) from error
        hashes = [sha256_hex(array.tobytes()) for array in turns.values()]
        digest = sha256_hex(canonical_json([described, hashes]))
        if sha256 is not None and digest != sha256:
            raise InputError(f"{path}: its contents have the hash {digest}, needed {sha256}; {remedy}")
        return Continuation(described["from_sequence"], turns, described["epochs"], described["tokens"], digest)


# ---- the history of a stage


@dataclass(frozen=True)
class History:
    """The indices of one stage, oldest first: the last one is in use.

    continuation: what that one took over from the one before; closed: the stage is over.
    """

    entries: list[Entry] = field(default_factory=list)
    continuation: Continuation | None = None
    closed: bool = False

    def with_index(self, key: str, spec: Entry) -> History:
        """With the index in use named; a stage that is over keeps what it was trained with."""
        if self.closed:
            return self
        if not self.entries:
            first = {"from_sequence": 0, "to_sequence": None, "reason": "the stage's first blend", "continuation": None}
            return History([{"key": key, **first, "spec": spec}])
        return dataclasses.replace(self, entries=[*self.entries[:-1], {**self.entries[-1], "key": key, "spec": spec}])

    def changed(self, reason: str, continuation: Continuation) -> History:
        """With another index from `continuation.from_sequence` on, to be named by :meth:`with_index`."""
        at = continuation.from_sequence
        following = {"key": "", "from_sequence": at, "to_sequence": None, "reason": reason, "spec": {}}
        following["continuation"] = continuation.digest
        return History([*self.entries[:-1], {**self.entries[-1], "to_sequence": at}, following], continuation)

    def report(self) -> list[Entry]:
        """For blend.json and people: where each index was used, and why."""
        return [
            {name: entry[name] for name in ("key", "from_sequence", "to_sequence", "reason")} for entry in self.entries
        ]


def continuation_path(run_directory: Path, stage: str, key: str, from_sequence: int) -> Path:
    """Where a run keeps what was taken of an index (of that key) up to `from_sequence`."""
    return run_directory / "blend_history" / f"{stage}-{from_sequence}-{key[:16]}.npz"
