"""What a conversion counts while it runs; small, and kept in the journal."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_speech.data.dataset.manifest import COUNTED, Totals
from megatron_speech.errors import InputError
from megatron_speech.preprocess.documents import Documents

SHOWN_DOCUMENTS = 3
SHOWN_REASONS = 3


@dataclass
class Tally:
    """Counts over all batches so far.

    Attributes:
        rows: rows of the input read so far.
        kept: rows that gave at least one document.
        documents: documents made.
        dropped: rows by the rule that dropped them.
        notices: rows that are kept but worth knowing of.
        forms: documents by form of the template.
        totals: sums by (language, source).
        rejected: rows that could not be used; those that a configured filter dropped are not among them.
        reasons: the first of their reasons.
        shown: the first documents, for a dry run; no part of the journal.
    """

    rows: int = 0
    kept: int = 0
    documents: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    notices: Counter[str] = field(default_factory=Counter)
    forms: Counter[str] = field(default_factory=Counter)
    totals: dict[tuple[str, str], Totals] = field(default_factory=dict)
    rejected: int = 0
    reasons: list[str] = field(default_factory=list)
    shown: list[np.ndarray] = field(default_factory=list)

    def add(self, batch: Documents) -> None:
        """Count a batch in."""
        self.rows += batch.rows
        self.kept += batch.kept
        self.documents += len(batch.lengths)
        self.dropped += batch.dropped
        self.notices += batch.notices
        self.forms += batch.forms
        unusable = [row for row in batch.rejected if not row.get("filtered")]
        self.rejected += len(unusable)
        for row in unusable[: max(0, SHOWN_REASONS - len(self.reasons))]:
            self.reasons.append(f"{row['input']} line {row['line']}: {row['reason']}")
        for key, counts in batch.totals.items():
            mine = self.totals.setdefault(key, Totals())
            for name in COUNTED:
                setattr(mine, name, getattr(mine, name) + getattr(counts, name))
        missing = SHOWN_DOCUMENTS - len(self.shown)
        if missing > 0:
            self.shown += np.split(batch.flat, np.cumsum(batch.lengths))[: min(missing, len(batch.lengths))]

    def check(self, rows: int | None, max_rejected: float, *, last: bool) -> None:
        """Refuse an input with too many unusable rows, as soon as it is sure; at the end also one without any usable.

        Args:
            rows: rows of the whole work; None where that is not known before its end.
            max_rejected: share of them that may be unusable.
            last: all of them were read.

        Raises:
            InputError: saying how many rows were rejected by which rule, and the first reasons.
        """
        if last:
            rows = self.rows
        if rows is None or (self.rejected <= max_rejected * rows and not (last and self.kept == 0)):
            return
        if self.kept == 0 and set(self.dropped) == {"no_tokens"}:
            raise InputError(
                f"the text tokenizer yields nothing: none of the {self.rows:,} texts read so far gave a token; "
                "make a token space with a trained tokenizer, or with `bytes`"
            )
        rules = ", ".join(f"{rule} {count:,}" for rule, count in self.dropped.most_common())
        limit = f"more than --max-rejected {max_rejected:g} of the rows"
        raise InputError(
            f"{sum(self.dropped.values()):,} of the {self.rows:,} rows read ({rows:,} in all) cannot be used "
            f"({rules}), {limit if self.kept else 'and no row is left'}; nothing was written; "
            f"first: {'; '.join(self.reasons) or rules}"
        )

    def check_unknown(self, max_unknown: float) -> None:
        """Refuse text that the tokenizer cannot spell.

        Raises:
            InputError: naming the languages in which it is too much.
        """
        tokens = sum(totals.target_text_tokens for totals in self.totals.values())
        unknown = sum(totals.unknown_tokens for totals in self.totals.values())
        if not tokens or unknown <= max_unknown * tokens:
            return
        by_language: dict[str, list[int]] = {}
        for (language, _), totals in self.totals.items():
            counts = by_language.setdefault(language, [0, 0])
            counts[0] += totals.unknown_tokens
            counts[1] += totals.target_text_tokens
        worst = sorted(by_language.items(), key=lambda item: -item[1][0])[:5]
        rates = ", ".join(f"{language} {count / max(of, 1):.2%}" for language, (count, of) in worst if count)
        raise InputError(
            f"{unknown:,} of the {tokens:,} text tokens ({unknown / tokens:.2%}) stand for text that the tokenizer "
            f"cannot spell ({rates}), more than --max-unknown {max_unknown:g}; nothing was written; make a token space "
            "with a tokenizer that knows the script, drop such rows with the filter `unsupported`, or raise the limit"
        )

    def to_json(self) -> dict[str, Any]:
        """Everything but `shown`, JSON-able."""
        return {
            "rows": self.rows,
            "kept": self.kept,
            "documents": self.documents,
            "dropped": dict(self.dropped),
            "notices": dict(self.notices),
            "forms": dict(self.forms),
            "totals": [[*key, totals.model_dump()] for key, totals in self.totals.items()],
            "rejected": self.rejected,
            "reasons": self.reasons,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Tally:
        """What :meth:`to_json` gave."""
        return cls(
            rows=value["rows"],
            kept=value["kept"],
            documents=value["documents"],
            dropped=Counter(value["dropped"]),
            notices=Counter(value["notices"]),
            forms=Counter(value["forms"]),
            totals={(language, source): Totals(**totals) for language, source, totals in value["totals"]},
            rejected=value["rejected"],
            reasons=value["reasons"],
        )
