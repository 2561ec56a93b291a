"""The data of one stage: datasets checked against each other, blended, packed, and ready to be loaded."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from megatron_speech.data.blend import strata as blending
from megatron_speech.data.dataset.indexed import TokenDataset, file_of
from megatron_speech.data.dataset.shard_store import ShardStore
from megatron_speech.data.dataset.sharded import ShardedTokenDataset
from megatron_speech.data.dataset.speakers import NOBODY, speaker_hashes
from megatron_speech.data.dataset.split import SplitSides
from megatron_speech.data.dataset.staging import check_windows, stage_datasets, stage_shards
from megatron_speech.data.loading.gathering import KeptRanges
from megatron_speech.data.sequences.history import Continuation, History, blend_spec
from megatron_speech.data.sequences.index_build import index_builder, index_key
from megatron_speech.data.sequences.index_cache import cached_table, verify_table
from megatron_speech.data.sequences.packing import SegmentTable
from megatron_speech.errors import InputError
from megatron_speech.files import write_json
from megatron_speech.recipe.data import DataConfig
from megatron_speech.recipe.stage import StageDataConfig
from megatron_speech.remote import is_url
from megatron_speech.tokens.space import TokenSpace
from megatron_speech.tokens.templates import (
    PROMPT_END,
    PROMPTLESS_TASKS,
    TEXT_PROMPT_END,
    TEXT_TARGETS,
    template_hash,
)

if TYPE_CHECKING:
    from megatron_speech.data.loading.loader import StageLoader
from megatron_speech.recipe.data import dataset_prefixes

logger = logging.getLogger(__name__)

# As many tell how long documents are: reading a table of a billion takes longer than it is worth.
_REACH_SEGMENTS = 1_000_000

Report = dict[str, Any]


def open_datasets(
    data: DataConfig, space: TokenSpace, base: str | Path | None = None, *, in_place: bool = False
) -> dict[str, TokenDataset]:
    """Open the recipe's datasets and check that they go together and with `space`.

    With `data.stage_datasets` they are first copied to this node's disk, if they are not there yet (`shards`: all but
    what is read of `.bin` later); with `in_place` only those that are URLs are, and the others are read where they lie
    (to look at a blend needs no copy).

    Raises:
        InputError: a dataset is missing or damaged, or its codec, token space or templates are not those of the
            others or of the run; both files and both hashes are named.
    """
    prefixes = dataset_prefixes(data, base)
    stores: dict[str, ShardStore] = {}
    if data.stage_datasets:
        assert data.cache_dir is not None  # checked by DataConfig
        wanted = {name: prefix for name, prefix in prefixes.items() if is_url(prefix) or not in_place}
        if data.stage_datasets == "shards":
            assert data.cache_gib is not None  # likewise
            stores = stage_shards(wanted, data.cache_dir, data.cache_gib)
        else:
            prefixes |= stage_datasets(wanted, data.cache_dir, data.cache_gib)
    datasets = {
        name: ShardedTokenDataset(stores[name]) if name in stores else TokenDataset(prefix)
        for name, prefix in prefixes.items()
    }
    _refuse_mixture(datasets)
    for dataset in datasets.values():
        dataset.check(space)
        manifest = _manifest(dataset)
        found, needed = manifest.template_hash, template_hash(manifest.task)
        if found != needed:
            raise InputError(
                f"{file_of(dataset.prefix, '.manifest.json')}: template_hash is {found}, needed {needed} of "
                f"this version's templates of {manifest.task}; make the dataset anew with preprocess/preprocess_data.py"
            )
    return datasets


def _manifest(dataset: TokenDataset) -> Any:
    if dataset.manifest is None:
        raise InputError(f"dataset {dataset.prefix} has no manifest; training needs one")
    return dataset.manifest


def _refuse_mixture(datasets: Mapping[str, TokenDataset]) -> None:
    hashes = {
        "codec.hash": lambda manifest: manifest.codec.hash,
        "token_space_hash": lambda manifest: manifest.token_space_hash,
        "streams": lambda manifest: manifest.streams,
    }
    first, *others = datasets.values()
    for field, of in hashes.items():
        needed = of(_manifest(first))
        for other in others:
            found = of(_manifest(other))
            if found != needed:
                raise InputError(
                    f"{file_of(first.prefix, '.manifest.json')} and {file_of(other.prefix, '.manifest.json')} cannot "
                    f"be mixed: {field} is {needed} in the first and {found} in the second; make both datasets with "
                    "one codec, one token space and one version"
                )


class StageData:
    """What a stage trains (or validates) on.

    Args:
        stage: the stage.
        data: the recipe's data section.
        datasets: name → dataset, from :func:`open_datasets`; their order numbers them.
        space: the run's token space.
        seed: the run's seed.
        cache_dir: folder of built indices; those of the same content are found again.
        n_sequences: sequences that must be there; None: what the stage's budget gives. For validation an upper
            bound (None: all of them).
        split: "train", or "validation": every held-out document of the stage's strata once, in a fixed order.
        history: the indices that the stage was trained with before this one (see `data.sequences.history`);
            sequences before the change are empty here.

    Attributes:
        n_sequences: number of sequences.
        groups: (task, language, source) of each document group; `group_ids // 3` of a batch indexes it.
        key: hash of everything that the sequences are a function of.
        warnings: sentences worth showing, such as strata that are repeated often.

    Raises:
        InputError: whatever is wrong with the stage or its data, before anything is trained.
    """

    def __init__(
        self,
        stage: StageDataConfig,
        data: DataConfig,
        datasets: Mapping[str, TokenDataset],
        space: TokenSpace,
        *,
        seed: int,
        cache_dir: str | Path,
        n_sequences: int | None = None,
        split: Literal["train", "validation"] = "train",
        history: History | None = None,
    ) -> None:
        groups = blending.check_stage(stage)
        self._speakers: list[np.ndarray] = []
        self._own_max_epochs = {blending.group_name(group): group.max_epochs for group in groups}
        _refuse_mixture(datasets)
        self.stage, self.data, self.space, self.seed, self.split = stage, data, space, seed, split
        self.datasets = dict(datasets)
        wanted = stage.n_sequences if n_sequences is None and split == "train" else n_sequences
        history = history or History()
        inputs: Any = {"split": split, "n_sequences": wanted, "seed": seed, "continuation": history.continuation}
        self.key = index_key(stage, data, self.datasets, **inputs)
        self.history = history.with_index(self.key, blend_spec(stage, data, self.datasets, seed))
        build = index_builder(stage, data, self.datasets, **inputs)
        self._folder = Path(cache_dir) / self.key
        table, self._content = cached_table(Path(cache_dir), self.key, build, joined=stage.stitch is not None)
        self._table: SegmentTable = table
        self.n_sequences = table.n_sequences
        self.groups: list[tuple[str, str, str]] = [tuple(label) for label in self._content["groups"]]
        if split == "train":
            check_windows(stage, data, self.datasets, [stratum["dataset"] for stratum in self.strata])
        self._kept = KeptRanges() if split == "validation" else None
        self.warnings = self._find_warnings()
        if os.environ.get("RANK", "0") == "0":
            for warning in self.warnings:
                logger.warning("%s", warning)

    # ---- reading

    @property
    def continuation(self) -> Continuation | None:
        """What this index took over from an earlier one of the stage; None for the first one."""
        return self.history.continuation

    @property
    def strata(self) -> list[Report]:
        """The strata by number, as the index describes them."""
        strata: list[Report] = self._content["strata"]
        return strata

    @property
    def table(self) -> SegmentTable:
        """Where every token of every sequence comes from."""
        return self._table

    @functools.cached_property
    def reach(self) -> float:
        """Tokens of a token's attention document, on average over the tokens of the first million segments.

        Twice the mean number of positions that a token attends to, less one. Segments that are joined to a chain
        (`stitch`) are one attention document within their sequence.
        """
        table = self.table
        lengths = np.asarray(table.length[:_REACH_SEGMENTS], dtype=np.float64)
        if table.joined is not None and len(lengths):
            begins = np.asarray(table.joined[: len(lengths)]) == 0
            firsts = np.asarray(table.seq_ptr)
            begins[firsts[firsts < len(lengths)]] = True
            lengths = np.add.reduceat(lengths, np.flatnonzero(begins))
        return float((lengths**2).sum() / max(1.0, lengths.sum()))

    def load_speakers(self, keys: Mapping[str, str]) -> None:
        """Find out who speaks in each document, for :meth:`speakers`; `keys`: name → hash of its manifest."""
        folder = self._folder.parent
        self._speakers = [speaker_hashes(dataset, keys[name], folder) for name, dataset in self.datasets.items()]

    def speakers(self, first: int, last: int) -> int | None:
        """How many speakers are in sequences `first` to before `last`; None if none is named, or it was not loaded."""
        table = self._table
        begin, end = (int(table.seq_ptr[min(number, table.n_sequences)]) for number in (first, last))
        if not self._speakers or begin == end:
            return None
        dataset, document = table.dataset_of(slice(begin, end)), np.asarray(table.document[begin:end])
        found = np.concatenate([hashes[document[dataset == number]] for number, hashes in enumerate(self._speakers)])
        found = np.unique(found[found != NOBODY])
        return len(found) or None

    @property
    def documents_due(self) -> int:
        """Documents that the stage, after a change of its blend, takes before it begins epochs of all."""
        partly = [s for s in self.strata if s["documents_due"] < s["documents_available"]]
        return sum(int(stratum["documents_due"]) for stratum in partly)

    def verify(self) -> dict[str, str]:
        """Read the whole index and compare it with its checksums (SHA-256 by column), which are returned.

        Raises:
            InputError: a column is damaged.
        """
        return verify_table(self._folder)

    def loader(
        self,
        start_sequence: int,
        micro_batch_size: int,
        global_batch_sequences: int,
        dp_rank: int = 0,
        dp_size: int = 1,
    ) -> StageLoader:
        """Global batches from sequence `start_sequence` on, as one data-parallel rank sees them.

        Training ends with the last whole global batch; validation fills its last one up with rows of padding.

        Raises:
            InputError: a batch that does not divide among micro-batches and ranks, or a position beyond the end.
        """
        from megatron_speech.data.loading.loader import StageLoader, check_layout, global_batches

        check_layout(f"stage {self.stage.name!r}", micro_batch_size, global_batch_sequences, dp_rank, dp_size)
        if not 0 <= start_sequence <= self.n_sequences:
            raise InputError(
                f"stage {self.stage.name!r}: start_sequence is {start_sequence}, but the stage has sequences 0 to "
                f"{self.n_sequences}; the run directory belongs to another recipe or data"
            )
        left = self.n_sequences - start_sequence
        up = global_batch_sequences - 1 if self.split == "validation" else 0
        source = self.rows()
        return StageLoader(
            lambda: global_batches(
                source,
                first_sequence=start_sequence,
                n_batches=(left + up) // global_batch_sequences,
                micro_batch_size=micro_batch_size,
                global_batch_sequences=global_batch_sequences,
                dp_rank=dp_rank,
                dp_size=dp_size,
                workers=self.data.workers,
            ),
            self.data.prefetch,
        )

    def rows(self) -> Any:
        """The :class:`~.loading.loader.RowSource` of this stage: sequence numbers → micro-batches."""
        import torch

        from megatron_speech.data.loading.loader import RowSource
        from megatron_speech.ops.loss_mask import PROMPTLESS, TEXT_TARGET, LossPolicy

        def flags(task: str) -> int:
            return PROMPTLESS if task in PROMPTLESS_TASKS else TEXT_TARGET if task in TEXT_TARGETS else 0

        loss, strata = self.stage.loss, self._content["strata"]
        return RowSource(
            table=self._table,
            datasets=list(self.datasets.values()),
            stratum_label=np.array([stratum["label"] for stratum in strata], dtype=np.int32),
            document_flags=np.array([flags(stratum["task"]) for stratum in strata], dtype=np.uint8),
            seq_length=self.stage.seq_length,
            pad_id=self.space.special("<pad>"),
            modality_table=torch.from_numpy(self.space.modality_table()),
            policy=LossPolicy(
                text=loss.text,
                audio=loss.audio,
                special=loss.special,
                prompt=loss.prompt,
                prompt_end_id=-1 if loss.prompt == 1.0 else self.space.special(PROMPT_END),
                text_prompt_end_id=self.space.special(TEXT_PROMPT_END),
            ),
            normalizers=loss.normalizers,
            rectangular=self.stage.packing_mode == "bucket",
            pin_memory=torch.cuda.is_available(),
            kept=self._kept,
        )

    # ---- reporting

    def _find_warnings(self) -> list[str]:
        if self.split == "validation":
            if self.n_sequences == 0 and self.data.validation_fraction > 0:
                return [
                    f"stage {self.stage.name!r}: no document is held out (data.validation_fraction "
                    f"{self.data.validation_fraction:g} of few sources): there is nothing to validate on"
                ]
            return []
        where = f"stage {self.stage.name!r}"
        warnings = self._split_findings(where)
        often: dict[float, list[str]] = {}
        for stratum in self.strata:
            limit = self._max_epochs(stratum)
            if (epochs := self._epochs(stratum)) > limit:
                often.setdefault(limit, []).append(f"{stratum['name']} ({epochs:.1f})")
        warnings += [
            f"{where}: repeated more than {limit:g} epochs: {_some(names)}" for limit, names in sorted(often.items())
        ]
        held_back = [
            f"{name} ({row['asked']:.2%} → {row['given']:.2%}, at most {row['epochs']:g} epochs)"
            for name, row in self._content["limited"].items()
        ]
        if held_back:
            warnings.append(
                f"{where}: epoch_limit holds strata back, and their groups' other strata take the rest: "
                f"{_some(held_back)}"
            )
        return warnings

    def _split_findings(self, where: str) -> list[str]:
        """What is worth knowing of the split of the datasets that the stage takes from."""
        taken = {stratum["dataset"] for stratum in self.strata}
        taken |= self._content["excluded_documents"].get("other_side_of_split", {}).keys()
        return [
            finding
            for name, sides in self._content.get("split", {}).items()  # an index of an older version has none
            if name in taken
            for finding in SplitSides(**sides).findings(f"{where}: dataset {name}", self.data.validation_fraction)
        ]

    def _max_epochs(self, stratum: Report) -> float:
        """Epochs above which a stratum is warned about."""
        return self._own_max_epochs.get(stratum["group"]) or self.stage.max_epochs

    def _taken_before(self, stratum: Report) -> int:
        """Tokens of a stratum that earlier indices of the stage held."""
        return self.continuation.tokens.get(stratum["name"], 0) if self.continuation else 0

    def _epochs(self, stratum: Report) -> float:
        """Epochs of a stratum's tokens in the whole stage."""
        tokens = stratum["tokens"] + self._taken_before(stratum)
        return float(tokens / stratum["tokens_available"])

    def blend_report(self) -> Report:
        """Target and realised proportions, JSON-able.

        `tokens` are all tokens of a part, `counted_tokens` those that the proportions are of (`counted`: which
        ones), `target` and `realised` shares of them; `epochs` = tokens / tokens available. After a change of the
        blend all but `epochs` and `tokens_before` are of the sequences from `first_sequence` on, those of the index
        in use; `history` lists the indices before it.
        """
        first = self.continuation.from_sequence if self.continuation else 0
        strata = [dict(stratum) for stratum in self._content["strata"]]
        total = sum(stratum["counted_tokens"] for stratum in strata)
        for stratum in strata:
            stratum["epochs"] = self._epochs(stratum)
            stratum["repeated_too_often"] = stratum["epochs"] > self._max_epochs(stratum)
            stratum["tokens_before"] = self._taken_before(stratum)
            stratum["realised"] = stratum["counted_tokens"] / total if total else 0.0
        tokens = sum(stratum["tokens"] for stratum in strata)
        positions = (self.n_sequences - first) * self.stage.seq_length
        audio_seconds = sum(stratum["audio_seconds"] for stratum in strata)
        for stratum in strata:
            stratum["audio_share"] = stratum["audio_seconds"] / audio_seconds if audio_seconds else 0.0
        return {
            "stage": self.stage.name,
            "split": self.split,
            "key": self.key,
            "seed": self.seed,
            "seq_length": self.stage.seq_length,
            "n_sequences": self.n_sequences,
            "first_sequence": first,
            "packing": self.stage.packing_mode,
            "counted": "target_tokens" if self.stage.is_sft else "tokens",
            "tokens": tokens,
            "counted_tokens": total,
            "pad_tokens": positions - tokens,
            "pad_fraction": (positions - tokens) / positions if positions else 0.0,
            "audio_seconds": audio_seconds,
            "excluded_documents": self._content["excluded_documents"],
            "masses": self._content["masses"],
            "by_task": _sums(strata, "task"),
            "by_language": _sums(strata, "language"),
            "by_source": _sums(strata, "source"),
            "strata": strata,
            "limited": self._content["limited"],
            "split_sides": self._content.get("split", {}),
            "history": self.history.report(),
            "warnings": self.warnings,
        }


def _some(names: list[str], shown: int = 5) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def _sums(strata: list[Report], field: str) -> dict[str, Report]:
    """The strata summed by one of their fields."""
    sums: dict[str, Report] = {}
    for stratum in strata:
        row = sums.setdefault(stratum[field], {})
        for name in (
            "target", "realised", "documents", "tokens", "tokens_before", "counted_tokens", "tokens_available",
            "audio_seconds", "audio_share",
        ):  # fmt: skip
            row[name] = row.get(name, 0) + stratum[name]
    for row in sums.values():
        row["epochs"] = (row["tokens"] + row["tokens_before"]) / row["tokens_available"]
    return dict(sorted(sums.items()))


def save_blend(path: str | Path, stages: list[StageData]) -> None:
    """Write the blend reports of a run's stages as `blend.json`."""
    write_json(path, {"stages": [stage.blend_report() for stage in stages]})
