"""The rows of a batch on their way to documents: read, filtered, their codes and texts turned into ids."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_speech.preprocess.codes import CodesLoader
from megatron_speech.preprocess.columns import Samples, pick
from megatron_speech.preprocess.filters import Duplicate, FilterRule, Filters
from megatron_speech.preprocess.readers.base import RowRejected
from megatron_speech.ragged import Ragged, edges
from megatron_speech.tokens.control_tags import encode_tagged, without_tags
from megatron_speech.tokens.space import TokenSpace


@dataclass(frozen=True)
class Texts:
    """The texts of a batch as ids, row after row.

    Attributes:
        ids: of each text, int32.
        rows: int64 [rows + 1]: row i has the texts rows[i] to rows[i + 1]; none if it was gone by then.
        characters: of each text, int64 [texts]; 0 of one that came as ids.
        unknown: how many ids of each text stand for what the tokenizer cannot spell, int64 [texts].
        given: which of them came as ids, bool [texts].
    """

    ids: Ragged
    rows: np.ndarray
    characters: np.ndarray
    unknown: np.ndarray
    given: np.ndarray


class Batch:
    """Samples and what is known of them so far. Rows are named by their index.

    Attributes:
        samples: columns of the rows.
        has_texts: whether documents of the task hold text.
        control_tags: whether `[[pause]]` in a text is a token.
        codes: ids of each row's codes, int32 [frames * codebooks]; None where they were not read.
        checksums: of the codes that were read.
        texts: as ids; None where they were not made.
        dropped: rows per rule.
        rejected: rows for the file of rejected ones, in the order in which they were met.
    """

    def __init__(
        self,
        space: TokenSpace,
        loader: CodesLoader,
        samples: Samples,
        path: str,
        has_texts: bool,
        control_tags: bool = False,
    ) -> None:
        self.space = space
        self.loader = loader
        self.samples = samples
        self.path = path
        self.has_texts = has_texts
        self.control_tags = control_tags
        self.frame_rate_hz = space.codec.frame_rate_hz
        self.duplicates: np.ndarray | None = None
        count = len(samples)
        self.codes: list[np.ndarray | None] = [None] * count
        self.checksums: list[str | None] = [None] * count
        self.texts: Texts | None = None
        self.dropped: Counter[str] = Counter()
        self._rejected: dict[int, dict[str, Any]] = {}
        self._gone = set(samples.rejected)
        for row, why in samples.rejected.items():
            self._note(row, why.rule, why.reason, is_sample=False)

    # ---- rows that go

    def alive(self) -> list[int]:
        """Rows that nothing has dropped yet."""
        count = len(self.samples)
        return [row for row in range(count) if row not in self._gone] if self._gone else list(range(count))

    def reject(self, row: int, why: RowRejected) -> None:
        """A row that cannot be used."""
        self._gone.add(row)
        self._note(row, why.rule, why.reason)

    def drop(self, row: int, rule: str, reason: str) -> None:
        """A row that a filter does not let pass."""
        self._gone.add(row)
        self._note(row, rule, reason)["filtered"] = True

    def _note(self, row: int, rule: str, reason: str, *, is_sample: bool = True) -> dict[str, Any]:
        note = {"input": self.path, "line": self.samples.number[row], "rule": rule, "reason": reason}
        if is_sample:
            note["sample_id"] = self.samples.sample_id[row]
        self.dropped[rule] += 1
        self._rejected[row] = note
        return note

    @property
    def rejected(self) -> list[dict[str, Any]]:
        """What became of the rows that are gone, in the order of the input."""
        return [self._rejected[row] for row in sorted(self._rejected)]

    # ---- codes and texts as ids

    def load_codes(self, rows: Iterable[int]) -> None:
        """Read the codes of these rows, where that was not done; a row whose codes are unusable goes."""
        wanted, places = [], []
        for row in rows:
            place = self.samples.codes[row]
            if place is not None and self.codes[row] is None:
                wanted.append(row)
                places.append(place)
        if not wanted:
            return
        found = self.loader.encode(places)
        for row, ids, checksum in zip(wanted, found.ids, found.checksums, strict=True):
            self.codes[row] = ids
            self.checksums[row] = checksum
        for i, why in found.rejected.items():
            self.reject(wanted[i], why)

    def encode_texts(self) -> None:
        """Turn the texts of all rows that are alive into ids, once; a row with a text of none goes."""
        if not self.has_texts or self.texts is not None:
            return
        rows = self.alive()
        texts = pick(self.samples.texts, rows)
        flat = list(itertools.chain.from_iterable(texts))
        counts = np.zeros(len(self.samples), dtype=np.int64)
        counts[rows] = np.fromiter(map(len, texts), np.int64, len(rows))
        problems: dict[int, str] = {}
        if self.control_tags:
            ids, problems = encode_tagged(self.space, flat)
            characters = np.fromiter((len(without_tags(text)) for text in flat), np.int64, len(flat))
        else:
            ids = Ragged.of(self.space.encode_text_batch(flat))
            characters = np.fromiter(map(len, flat), np.int64, len(flat))
            self._count_tags_as_text(flat)
        row_of = np.repeat(np.arange(len(counts)), counts)
        for index, problem in problems.items():
            if (row := int(row_of[index])) not in self._gone:
                self.reject(row, RowRejected("unknown_control", problem))
        given = np.zeros(len(flat), dtype=bool)
        taken = self._given_ids(rows)
        if taken:
            at = edges(counts)[list(taken)]  # the texts that they come before
            counts[list(taken)] = 1
            order = np.insert(np.arange(len(flat)), at, len(flat) + np.arange(len(at)))
            ids = Ragged.of([*ids, *taken.values()]).take(order)
            characters, given = np.insert(characters, at, 0), np.insert(given, at, True)
        unknown = np.zeros(len(ids), dtype=np.int64)
        if self.space.unknown_id is not None:
            unknown = np.diff(edges(ids.flat == self.space.unknown_id)[ids.bounds])
        self.texts = Texts(ids, edges(counts), characters, unknown, given)
        empty = np.searchsorted(self.texts.rows, np.flatnonzero(ids.lengths == 0), side="right") - 1
        for row in np.unique(empty).tolist():
            if row in self._gone:
                continue
            self.reject(row, RowRejected("no_tokens", "the text tokenizer yields nothing for the text"))

    def _count_tags_as_text(self, texts: Sequence[str]) -> None:
        """Say how many texts spell a control tag of the token space and are text all the same."""
        tags = [f"[[{name}]]" for name in self.space.controls]
        count = sum(any(tag in text for tag in tags) for text in texts if "[[" in text) if tags else 0
        if count:
            self.samples.notices["control_tags_as_text"] += count

    def spoken_texts(self, row: int) -> Sequence[str]:
        """The texts of a row without control tags, which nobody says."""
        texts = self.samples.texts[row]
        return [without_tags(text) for text in texts] if self.control_tags else texts

    def _given_ids(self, rows: Sequence[int]) -> dict[int, np.ndarray]:
        """Text that was tokenised before, by row; a row goes where it cannot be the tokenizer's."""
        result = {}
        for row, ids in zip(rows, pick(self.samples.text_ids, rows), strict=True):
            if ids is None:
                continue
            if not len(ids):
                self.reject(row, RowRejected("no_tokens", "field text_ids is empty"))
            elif ids.min() < 0 or ids.max() >= self.space.text_size:
                bad = int(ids[(ids < 0) | (ids >= self.space.text_size)][0])
                reason = f"field text_ids holds {bad}, needed 0 to {self.space.text_size - 1}: another tokenizer's?"
                self.reject(row, RowRejected("text_id_outside_tokenizer", reason))
            elif (special := np.isin(ids, list(self.space.special_ids.values()))).any():
                bad = int(ids[special][0])
                reason = f"field text_ids holds {bad}, a special of the token space: text, without its marks, is needed"
                self.reject(row, RowRejected("text_id_is_special", reason))
            else:
                result[row] = ids
        return result

    # ---- what filters ask

    def frames(self, row: int) -> int | None:
        """Frames of speech: of the codes if they were read, else as the row says."""
        codes = self.codes[row]
        if codes is not None:
            return len(codes) // self.space.codebook_count
        place = self.samples.codes[row]
        return None if place is None else place.length

    def text_counts(self, row: int) -> tuple[int, int]:
        """(text tokens, those of them that the tokenizer cannot spell) of a row whose texts are ids."""
        texts = self.texts
        assert texts is not None
        begin, end = texts.rows[row : row + 2]
        return int(texts.ids.bounds[end] - texts.ids.bounds[begin]), int(texts.unknown[begin:end].sum())

    def apply(self, rules: Iterable[FilterRule]) -> None:
        """Let rows meet rules in their order."""
        for rule in rules:
            rule.prepare(self)
            for row in self.alive():
                try:
                    reason = rule.reason(self, row)
                except RowRejected as why:
                    self.reject(row, why)
                    continue
                if reason is not None:
                    self.drop(row, rule.name, reason)

    def content_hashes(self, of: str) -> tuple[np.ndarray, np.ndarray]:
        """128 bits of each row's content, uint64 [rows] twice; 0 of rows that are gone.

        Args:
            of: "codes" (read and checked for it), "text" or "both".
        """
        if of != "text":
            self.load_codes(self.alive())
        low, high = (np.zeros(len(self.samples), dtype=np.uint64) for _ in range(2))
        for row in self.alive():
            digest = hashlib.blake2b(digest_size=16)
            if of != "text":
                digest.update((self.checksums[row] or "").encode())
            if of != "codes":
                for part in (*(self.samples.roles[row] or ()), *self.samples.texts[row]):
                    encoded = part.encode("utf-8", "surrogatepass")
                    digest.update(len(encoded).to_bytes(8, "little") + encoded)
                given = self.samples.text_ids[row]
                if given is not None:
                    digest.update(np.ascontiguousarray(given, dtype="<i8").tobytes())
            data = digest.digest()
            low[row] = int.from_bytes(data[:8], "little")
            high[row] = int.from_bytes(data[8:], "little") | 1  # never that of a row that is gone
        return low, high


def split_at_duplicate(filters: Filters) -> tuple[list[FilterRule], Duplicate | None, list[FilterRule]]:
    """Rules before the one that finds duplicates, that one, and those after it."""
    rules: list[FilterRule] = list(filters.filters)
    for i, rule in enumerate(rules):
        if isinstance(rule, Duplicate):
            return rules[:i], rule, rules[i + 1 :]
    return rules, None, []
