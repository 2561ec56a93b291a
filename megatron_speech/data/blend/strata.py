"""Strata: from a stage's masses to leaf strata with target shares and eligible documents.

    task masses / explicit strata ─ resolve ─► leaf strata with shares ─ stage_order ─► documents in order

A leaf stratum is what one group of the recipe (a task, or an explicit stratum) takes from one dataset, language
and source. Its share is a share of the *tokens trained on*: every document token in pretraining; in an SFT stage,
where prompts are not learned, the tokens after the prompt (`target_tokens`; all tokens of a text document).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_speech.data.blend import where as filtering
from megatron_speech.data.blend.shares import bounded_shares, natural_shares
from megatron_speech.data.dataset.document_columns import DocumentTable
from megatron_speech.data.dataset.indexed import TokenDataset, file_of
from megatron_speech.errors import InputError
from megatron_speech.recipe.stage import StageDataConfig, StratumConfig
from megatron_speech.tokens.templates import PROMPTLESS_TASKS, TASKS
from megatron_speech.wording import suggestion

# A leaf per value of `dataset_source` and language: a corpus name, not a file name. More than this is a mistake.
MAX_STRATA = 10_000
_ROWS = 1 << 20  # documents handled at a time: bounds the temporary arrays
_NOBODY = np.uint16(2**16 - 1)  # the leaf of a document that no group takes
_NO_SHARE = 1e-9  # of a stage's tokens: a stratum that is left with less takes nothing
_LIMIT_ROUNDS = 50
REASONS = ("oversize", "without_target", "other_side_of_split", "quotes_held_out")


# ---- what a stage selects


def check_stage(stage: StageDataConfig) -> list[StratumConfig]:
    """Check what can be checked of a stage without data, and return its groups (one per task, or as listed).

    Raises:
        InputError: masses that are not positive, an unknown task, text in SFT, a batch that does not divide, …
    """
    where = f"stage {stage.name!r}"
    if (stage.task_mass is None) == (stage.strata is None):
        found = "both task_mass and strata" if stage.strata is not None else "neither task_mass nor strata"
        raise InputError(f"{where} gives {found}; give exactly one of them")
    if stage.strata is not None:
        groups = list(stage.strata)
    else:
        groups = [StratumConfig(task=task, mass=mass, name=task) for task, mass in (stage.task_mass or {}).items()]
    field = "strata" if stage.strata is not None else "task_mass"
    if not groups:
        raise InputError(f"{where}: {field} is empty; name at least one task and its mass")
    for group in groups:
        if group.task not in TASKS:
            raise InputError(f"{where}: {field} names the unknown task {group.task!r}; {suggestion(group.task, TASKS)}")
        if not (0.0 < group.mass < float("inf")):
            raise InputError(
                f"{where}: the mass of {group.name or group.task} is {group.mass:g}; a mass is a positive number "
                "(leave out what is not wanted)"
            )
        filtering.parse(group.where, f"{where}: stratum {group_name(group)}: where")
        if stage.is_sft and group.task in PROMPTLESS_TASKS and not stage.allow_text_in_sft:
            raise InputError(
                f"{where}: text_lm has mass {group.mass:g} in a stage whose loss.prompt is 0 (SFT); text-only data "
                "belongs in pretraining: take it out, or set allow_text_in_sft: true"
            )
    if stage.loss.prompt != 1.0 and stage.packing_mode == "cut":
        raise InputError(
            f"{where}: packing.mode is cut but loss.prompt is {stage.loss.prompt:g}: in the rest of a cut document "
            "it is not known where its prompt ended; use packing.mode fit, or loss.prompt 1"
        )
    names = [group_name(group) for group in groups]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"{where}: two strata are named {twice}; give every stratum a name of its own")
    if stage.packing.max_tokens is not None:
        if stage.packing_mode != "bucket":
            raise InputError(
                f"{where}: packing.max_tokens is {stage.packing.max_tokens} but packing.mode is {stage.packing_mode}; "
                "it means something in mode bucket only: leave it out"
            )
        if stage.packing.max_tokens > stage.seq_length:
            raise InputError(
                f"{where}: packing.max_tokens {stage.packing.max_tokens} is above seq_length {stage.seq_length}, the "
                "length of the row that it is laid into; lower it, or leave it out"
            )
    if stage.stitch is not None and stage.packing_mode == "bucket":
        raise InputError(
            f"{where}: stitch makes documents of up to seq_length {stage.seq_length} tokens and packing.mode bucket "
            "puts documents of one length beside each other; use packing.mode cut or fit, or leave stitch out"
        )
    if stage.stitch is not None and stage.loss.prompt != 1.0:
        raise InputError(
            f"{where}: stitch with loss.prompt {stage.loss.prompt:g}: only the first prompt of a stitched document "
            "would be predicted from what is learned; stitch in stages with loss.prompt 1"
        )
    for source, cap in stage.source_caps.items():
        if not 0.0 < cap <= 1.0:
            raise InputError(f"{where}: source_caps.{source} is {cap:g}; a cap is a share, above 0 and at most 1")
    if stage.global_batch_tokens % stage.seq_length:
        lower = stage.global_batch_tokens // stage.seq_length * stage.seq_length
        near = f"{lower} or {lower + stage.seq_length}" if lower else f"{stage.seq_length}"
        raise InputError(
            f"{where}: global_batch_tokens {stage.global_batch_tokens} is not a multiple of seq_length "
            f"{stage.seq_length}; nearest: {near}"
        )
    if stage.tokens < stage.global_batch_tokens:
        raise InputError(
            f"{where}: the budget of {stage.tokens} tokens is smaller than one global batch of "
            f"{stage.global_batch_tokens}; raise tokens or lower global_batch_tokens"
        )
    return groups


# ---- strata and shares


@dataclass(frozen=True)
class Stratum:
    """What one group takes from one dataset, language and source.

    name: stable name, part of the shuffle's seed; group: index of the recipe's group; dataset: index of the dataset;
    label: index into :attr:`Blend.labels`; share: target share of the stage's counted tokens; documents: int32, the
    eligible documents in dataset order; tokens, counted: their totals.
    """

    name: str
    group: int
    task: str
    dataset: int
    language: str
    source: str
    label: int
    share: float
    documents: np.ndarray
    tokens: int
    counted: int


@dataclass(frozen=True)
class Blend:
    """The strata of a stage for one side of the split, and what was left out, by reason and dataset name.

    limited: the strata that a limit of epochs holds back: share requested and granted, and the limit; a stratum whose
    share came down to nothing is not among `strata`.
    """

    strata: list[Stratum]
    groups: list[str]
    masses: list[float]
    labels: list[tuple[str, str, str]]
    excluded: dict[str, dict[str, int]]
    limited: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class _Leaf:
    group: int
    dataset: int
    language: int
    source: int


def group_name(group: StratumConfig) -> str:
    """The name of a group in reports: its own, or made of its filters."""
    if group.name is not None:
        return group.name
    filters = [",".join(values) for values in (group.datasets, group.languages, group.sources) if values is not None]
    filters += [f"{column}={json.dumps(value, ensure_ascii=False)}" for column, value in group.where.items()]
    return "/".join([group.task, *filters, *(["otherwise"] if group.otherwise else [])])


def filters_of(groups: Sequence[StratumConfig]) -> list[dict[str, Any]]:
    """The distinct `where` filters of a stage, in the order of its groups: bit i of a document's marks is of filter i.

    Empty filters are none.
    """
    filters: list[dict[str, Any]] = []
    for group in groups:
        if group.where and group.where not in filters:
            filters.append(group.where)
    return filters


def apply_filters(stage: StageDataConfig, table: DocumentTable, dataset: TokenDataset) -> DocumentTable:
    """`table` with the marks that the stage's `where` filters give its documents; read from the documents table.

    Raises:
        InputError: a filter that cannot be read or compared with what the column holds.
    """
    groups = check_stage(stage)
    filters: list[list[filtering.Condition]] = []
    field = f"stage {stage.name!r}: where"
    for wanted in filters_of(groups):
        # A filter of strata that take nothing from this dataset is not applied to it: it may lack the column.
        concerned = any(group.where == wanted and _takes_from(group, table) for group in groups)
        filters.append(filtering.parse(wanted, field) if concerned else [])
    if not any(filters):
        return table
    path = file_of(dataset.prefix, ".docs.parquet")
    return dataclasses.replace(table, marks=filtering.marks(path, filters, len(table.lengths), field))


def _takes_from(group: StratumConfig, table: DocumentTable) -> bool:
    return group.task == table.task and (group.datasets is None or table.name in group.datasets)


def _claims(
    groups: Sequence[StratumConfig], table: DocumentTable, marks: np.ndarray, filters: Sequence[Mapping[str, Any]]
) -> np.ndarray:
    """Which (language, source, marks) cells of a table each group selects, bool [groups, languages, sources, marks].

    A group with `otherwise` selects what the others leave.
    """
    claims = np.zeros((len(groups), len(table.languages), len(table.sources), len(marks)), dtype=bool)
    for index, group in enumerate(groups):
        if not _takes_from(group, table):
            continue
        language = [group.languages is None or value in group.languages for value in table.languages]
        source = [group.sources is None or value in group.sources for value in table.sources]
        passes = np.ones(len(marks), dtype=bool)
        if group.where:
            passes = (marks >> marks.dtype.type(filters.index(group.where)) & marks.dtype.type(1)) != 0
        claims[index] = np.multiply.outer(np.outer(np.array(language, bool), np.array(source, bool)), passes)
    rest = np.array([group.otherwise for group in groups])
    claims[rest] &= ~claims[~rest].any(axis=0)
    return claims


def _find_leaves(
    where: str, groups: Sequence[StratumConfig], tables: Sequence[DocumentTable]
) -> tuple[list[_Leaf], list[np.ndarray]]:
    """The leaves of all groups, and of each table the leaf that its documents belong to.

    Returns:
        The leaves, those of one table together; per table uint16 [D], index into them, _NOBODY where no group takes
        the document.
    """
    leaves: list[_Leaf] = []
    leaf_of_document: list[np.ndarray] = []
    filters = filters_of(groups)
    for index, table in enumerate(tables):
        result = np.full(len(table.lengths), _NOBODY, dtype=np.uint16)
        leaf_of_document.append(result)
        if not len(result) or not any(_takes_from(group, table) for group in groups):
            continue
        known_marks = np.unique(table.marks) if table.marks is not None else np.zeros(1, dtype=np.uint8)
        claims = _claims(groups, table, known_marks, filters)
        claims = claims.reshape(len(groups), -1)
        pieces = [slice(first, first + _ROWS) for first in range(0, len(result), _ROWS)]

        def cells(piece: slice, table: DocumentTable = table, known: np.ndarray = known_marks) -> np.ndarray:
            code = table.language[piece].astype(np.int64) * len(table.sources) + table.source[piece]
            return code if table.marks is None else code * len(known) + np.searchsorted(known, table.marks[piece])

        present = np.zeros(claims.shape[1], dtype=bool)
        for piece in pieces:
            present[cells(piece)] = True
        leaf_of_cell = np.full(claims.shape[1], _NOBODY, dtype=np.uint16)
        numbers: dict[_Leaf, int] = {}
        for cell in np.flatnonzero(present & claims.any(axis=0)).tolist():
            language, source = divmod(cell // len(known_marks), len(table.sources))
            takers = np.flatnonzero(claims[:, cell]).tolist()
            if len(takers) > 1:
                both = " and ".join(group_name(groups[k]) for k in takers)
                filtered = ", documents that pass both of their filters" if len(known_marks) > 1 else ""
                raise InputError(
                    f"{where}: strata {both} both take language {table.languages[language]}, source "
                    f"{table.sources[source]} of dataset {table.name}{filtered}; filters must not overlap"
                )
            leaf = _Leaf(takers[0], index, language, source)
            # Cells that differ in their marks alone are one leaf.
            leaf_of_cell[cell] = min(int(_NOBODY), numbers.setdefault(leaf, len(leaves) + len(numbers)))
        leaves += numbers
        if len(leaves) > MAX_STRATA:
            raise InputError(
                f"{where}: {len(leaves)} combinations of dataset, language and dataset_source, more than "
                f"{MAX_STRATA}; dataset_source names a corpus, not a recording: preprocess with fewer values"
            )
        for piece in pieces:
            result[piece] = leaf_of_cell[cells(piece)]
    return leaves, leaf_of_document


def _leave_out(
    stage: StageDataConfig, table: DocumentTable, leaf: np.ndarray, *, validation: bool
) -> tuple[dict[str, int], int]:
    """Mark in `leaf` the documents that the stage cannot take; returns how many by reason, and the longest's tokens.

    The longest of all documents that a group selects, 0 where documents are cut.
    """
    counts = dict.fromkeys(REASONS, 0)
    limit, counted, longest = stage.max_document_tokens, table.counted(stage), 0
    for first in range(0, len(leaf), _ROWS):
        piece = slice(first, first + _ROWS)
        part = leaf[piece]

        def leave(reason: str, out: np.ndarray, part: np.ndarray = part) -> None:
            out = out & (part != _NOBODY)
            counts[reason] += int(np.count_nonzero(out))
            part[out] = _NOBODY

        if limit is not None:
            lengths = table.lengths[piece]
            longest = max(longest, int(lengths[part != _NOBODY].max(initial=0)))
            leave("oversize", lengths > limit)
        leave("without_target", counted[piece] <= 0)
        leave("other_side_of_split", table.held_out[piece] != validation)
        if not validation:
            leave("quotes_held_out", table.quotes_held_out[piece])
    return counts, longest


def _members(leaf: np.ndarray, first: int, count: int) -> list[np.ndarray]:
    """The documents of leaves first … first + count - 1, int32, ascending: a counting sort, four bytes a document."""
    sizes = np.zeros(count, dtype=np.int64)
    pieces = [slice(start, start + _ROWS) for start in range(0, len(leaf), _ROWS)]
    for piece in pieces:
        part = leaf[piece]
        sizes += np.bincount(part[part != _NOBODY] - first, minlength=count)[:count]
    begins = np.cumsum(sizes) - sizes
    members = np.empty(int(sizes.sum()), dtype=np.int32)
    cursor = begins.copy()
    for piece in pieces:
        part = leaf[piece]
        taken = np.flatnonzero(part != _NOBODY)
        code = (part[taken] - first).astype(np.uint16)
        order = np.argsort(code, kind="stable")
        counts = np.bincount(code, minlength=count)
        at = np.repeat(cursor - (np.cumsum(counts) - counts), counts) + np.arange(len(code))
        members[at] = taken[order] + piece.start
        cursor += counts
    return [members[begin : begin + size] for begin, size in zip(begins.tolist(), sizes.tolist(), strict=True)]


def _refuse_missing(where: str, groups: Sequence[StratumConfig], tables: Sequence[DocumentTable]) -> None:
    """Refuse names in filters and caps that no dataset has, and groups without any dataset."""
    names = {table.name for table in tables}
    languages = {value for table in tables for value in table.languages}
    sources = {value for table in tables for value in table.sources}
    for group in groups:
        for field, wanted, known in (
            ("datasets", group.datasets, names),
            ("languages", group.languages, languages),
            ("sources", group.sources, sources),
        ):
            for value in wanted or ():
                if value not in known:
                    raise InputError(
                        f"{where}: stratum {group_name(group)} names {value!r} in {field}, which no dataset has; "
                        f"{suggestion(value, known)}"
                    )
        if not any(table.task == group.task for table in tables):
            have = ", ".join(f"{table.name} ({table.task})" for table in tables) or "none"
            raise InputError(
                f"{where}: task {group.task} has mass {group.mass:g} but no dataset of that task is listed in "
                f"data.datasets; there are: {have}"
            )


@dataclass(frozen=True)
class _Budget:
    """What limits of epochs are reckoned with, per leaf that has documents: float64 [K] each.

    tokens, counted: of all of a leaf's documents; longest: counted tokens of the longest document; taken: tokens
    that the stage has trained on already; epochs: the limit, inf where there is none. total: tokens to be trained on.
    """

    total: float
    tokens: np.ndarray
    counted: np.ndarray
    longest: np.ndarray
    taken: np.ndarray
    epochs: np.ndarray

    def limits(self, shares: np.ndarray) -> np.ndarray:
        """The greatest share of each leaf, in a mixture of about `shares`, that keeps it within its limit."""
        ratio = self.tokens / self.counted
        total = self.total / float(shares @ ratio) + float(self.longest.max(initial=0.0))
        # Any prefix of the order is within one document of its shares: leave room for that one.
        room = np.maximum(0.0, (self.epochs * self.tokens - self.taken) / ratio - self.longest)
        return np.asarray(np.where(np.isinf(self.epochs), np.inf, room / total))


def _bound(
    where: str,
    stage: StageDataConfig,
    groups: Sequence[StratumConfig],
    keys: Sequence[tuple[int, str, str]],
    natural: np.ndarray,
    budget: _Budget,
) -> tuple[np.ndarray, np.ndarray]:
    """The natural shares within the stage's caps and limits, and which leaves the limits hold back, bool."""
    shares = natural
    for _ in range(_LIMIT_ROUNDS):  # what a budget comes to in counted tokens depends on the shares
        limits = budget.limits(shares)
        before = shares
        shares, missing = bounded_shares(natural, keys, stage.source_caps, limits)
        if missing:
            bounds = [f"source_caps ({', '.join(f'{name}: {cap:g}' for name, cap in stage.source_caps.items())})"]
            if not np.isinf(limits).all():
                bounds.append("epoch limits")
            names = ", ".join(group_name(groups[k]) for k in missing)
            raise InputError(
                f"{where}: {' and '.join(bounds[not stage.source_caps :])} leave {sum(missing.values()):.4g} of the "
                f"stage's tokens without a source: what {names} may take is bounded below its mass; raise a bound, or "
                "add a source"
            )
        if np.allclose(shares, before, rtol=0.0, atol=1e-12):
            break
    return shares, (natural > limits) & (shares >= limits * (1 - 1e-9))


def resolve(
    stage: StageDataConfig,
    tables: Sequence[DocumentTable],
    *,
    validation: bool = False,
    tokens: int | None = None,
    taken: Mapping[str, int] | None = None,
) -> Blend:
    """Turn a stage's masses into leaf strata with target shares and eligible documents.

    Args:
        stage: the stage.
        tables: the datasets' documents, in the order in which datasets are numbered.
        validation: take the held-out side of the split instead of the training side; strata may then be empty.
        tokens: to be trained on, which limits of epochs are reckoned with; None: the stage's budget.
        taken: tokens by stratum that the stage has trained on already.

    Raises:
        InputError: what :func:`check_stage` refuses; a task without a dataset; unknown names in filters or caps;
            overlapping or empty strata; documents that do not fit and may not be dropped; caps that cannot be met.
    """
    where = f"stage {stage.name!r}"
    groups = check_stage(stage)
    _refuse_missing(where, groups, tables)
    leaves, leaf_of_document = _find_leaves(where, groups, tables)
    known_sources = {tables[leaf.dataset].sources[leaf.source] for leaf in leaves}
    for name in stage.source_caps:
        if name not in known_sources:
            raise InputError(
                f"{where}: source_caps names {name!r}, which no dataset of the stage has; "
                f"{suggestion(name, known_sources)}"
            )
    excluded: dict[str, dict[str, int]] = {reason: {} for reason in REASONS}
    kept_documents: list[np.ndarray] = []
    longest = 0
    for index, table in enumerate(tables):
        counts, tokens_of_longest = _leave_out(stage, table, leaf_of_document[index], validation=validation)
        longest = max(longest, tokens_of_longest)
        for reason, count in counts.items():
            if count:
                excluded[reason][table.name] = count
        of_table = sum(leaf.dataset == index for leaf in leaves)
        kept_documents += _members(leaf_of_document[index], len(kept_documents), of_table)
        leaf_of_document[index] = np.zeros(0, np.uint16)  # not needed any more
    if excluded["oversize"] and stage.packing.oversize == "refuse":
        counts_text = ", ".join(f"{count} of dataset {name}" for name, count in excluded["oversize"].items())
        limit = "seq_length" if stage.max_document_tokens == stage.seq_length else "packing.max_tokens"
        raise InputError(
            f"{where}: {sum(excluded['oversize'].values())} documents are longer than {limit} "
            f"{stage.max_document_tokens} ({counts_text}; the longest has {longest} tokens) and packing.mode "
            f"{stage.packing_mode} never cuts; raise {limit}, or set packing.oversize: drop"
        )

    labels = sorted(
        {
            (tables[leaf.dataset].task, tables[leaf.dataset].languages[leaf.language],
             tables[leaf.dataset].sources[leaf.source])
            for leaf in leaves
        },
        key=lambda label: (TASKS.index(label[0]), *label[1:]),
    )  # fmt: skip
    label_ids = {label: index for index, label in enumerate(labels)}

    alive = [index for index, members in enumerate(kept_documents) if len(members)]
    for index, group in enumerate(groups):
        if not validation and not any(leaves[k].group == index for k in alive):
            reasons = {reason: sum(counts.values()) for reason, counts in excluded.items() if counts}
            raise InputError(
                f"{where}: stratum {group_name(group)} has mass {group.mass:g} but no document to train on "
                f"(left out over the whole stage: {reasons or 'nothing'}); change its filters, seq_length or "
                "data.validation_fraction, or leave it out"
            )

    def key(leaf: _Leaf) -> tuple[int, str, str]:
        table = tables[leaf.dataset]
        return leaf.group, table.languages[leaf.language], table.sources[leaf.source]

    def total(values: np.ndarray, members: np.ndarray) -> int:
        pieces = range(0, len(members), _ROWS)
        return sum(int(values[members[first : first + _ROWS]].sum(dtype=np.int64)) for first in pieces)

    def name_of(leaf: _Leaf) -> str:
        member_of, language, source = key(leaf)
        return "/".join([group_name(groups[member_of]), tables[leaf.dataset].name, language, source])

    def epoch_limit(leaf: _Leaf) -> float:
        own = groups[leaf.group].epoch_limit
        return next((limit for limit in (own, stage.epoch_limit) if limit is not None), np.inf)

    def longest_of(leaf: _Leaf, members: np.ndarray) -> int:
        # Only limits need it, and it reads every document.
        return 0 if np.isinf(epoch_limit(leaf)) else int(tables[leaf.dataset].counted(stage)[members].max())

    limited: dict[str, dict[str, float]] = {}

    def counted_of(k: int, tokens: int) -> int:
        table = tables[leaves[k].dataset]
        values = table.counted(stage)
        return tokens if values is table.lengths else total(values, kept_documents[k])

    tokens_of = {k: total(tables[leaves[k].dataset].lengths, kept_documents[k]) for k in alive}
    counted = np.array([counted_of(k, tokens_of[k]) for k in alive], np.float64)
    if validation:
        # Held-out documents are read once each, in order: their proportions are what they are.
        shares = counted / max(1.0, counted.sum())
    else:
        keys = [key(leaves[k]) for k in alive]
        natural = natural_shares([group.mass for group in groups], keys, counted, stage.language_temperature)
        budget = _Budget(
            total=float(stage.n_sequences * stage.seq_length if tokens is None else tokens),
            tokens=np.array([tokens_of[k] for k in alive], np.float64),
            counted=counted,
            longest=np.array([longest_of(leaves[k], kept_documents[k]) for k in alive], np.float64),
            taken=np.array([(taken or {}).get(name_of(leaves[k]), 0) for k in alive], np.float64),
            epochs=np.array([epoch_limit(leaves[k]) for k in alive], np.float64),
        )
        shares, held_back = _bound(where, stage, groups, keys, natural, budget)
        limited = {
            name_of(leaves[k]): {
                "asked": float(natural[i]),
                "given": float(shares[i]),
                "epochs": epoch_limit(leaves[k]),
            }
            for i, k in enumerate(alive)
            if held_back[i]
        }
    strata = []
    for position, k in enumerate(alive):
        if not validation and shares[position] < _NO_SHARE:
            continue
        leaf, table = leaves[k], tables[leaves[k].dataset]
        member_of, language, source = key(leaf)
        strata.append(
            Stratum(
                name=name_of(leaf),
                group=member_of,
                task=table.task,
                dataset=leaf.dataset,
                language=language,
                source=source,
                label=label_ids[(table.task, language, source)],
                share=float(shares[position]),
                documents=kept_documents[k],
                tokens=tokens_of[k],
                counted=int(counted[position]),
            )
        )
    mass = sum(group.mass for group in groups)
    return Blend(
        strata=strata,
        groups=[group_name(group) for group in groups],
        masses=[group.mass / mass for group in groups],
        labels=labels,
        excluded={reason: counts for reason, counts in excluded.items() if counts},
        limited=limited,
    )
