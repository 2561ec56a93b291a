"""Text streams: any number of rows, normalised as in preprocessing, and bounded samples of them.

A sample is a function of the rows, their order and the seed: each passage (a text, or a part of a long one) draws a
number from its position, and those with the smallest numbers are kept. Memory is bounded by the sample.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_speech.console import Progress
from megatron_speech.data.dataset.split import splitmix64
from megatron_speech.errors import InputError
from megatron_speech.preprocess.readers.base import Row, RowRejected
from megatron_speech.preprocess.readers.open import InputFiles
from megatron_speech.preprocess.samples import TRANSCRIPTS, SampleRules
from megatron_speech.tokens.normalization import normalize_transcript

OTHER_CHARACTERS = 1_000_000  # kept of passages that are not wanted, to check what must not change

# sentencepiece passes over lines of more than 4,192 bytes; UTF-8 has at most 4 bytes a character.
PASSAGE_CHARACTERS = 1_000

_TRANSCRIPT_KEYS = frozenset(name for names in TRANSCRIPTS.values() for name in names)


@dataclass(frozen=True)
class Text:
    """A normalised text and the language of its row."""

    language: str
    text: str


@dataclass
class Corpus:
    """Rows of files as texts; each call of `batches` reads them again.

    Attributes:
        inputs: paths or URLs, as preprocessing takes them.
        json_keys: fields that hold text; `transcript*` is normalised as what is spoken, others as written.
        language_field: the field with the language.
        rows: rows read in the last pass.
        dropped: rows of the last pass without a usable text, by rule.
    """

    inputs: Sequence[str]
    json_keys: tuple[str, ...] = ("text",)
    language_field: str = "language"
    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def batches(self, what: str) -> Iterator[list[Text]]:
        """Texts in batches, in the order of the rows; `what` names the pass in the progress bar.

        Raises:
            InputError: an input cannot be read, or holds no text at all.
        """
        rules = SampleRules("text_lm", json_keys=self.json_keys)
        spoken = set(self.json_keys) <= _TRANSCRIPT_KEYS
        self.rows, self.dropped = 0, Counter()
        reasons: dict[str, str] = {}
        texts_found = False
        inputs = InputFiles(list(self.inputs))
        with Progress(what, total=None, unit="rows") as progress:
            for batch in inputs.batches(0):
                texts: list[Text] = []
                rows = batch.read()
                for row in rows:
                    try:
                        texts += self._texts(row, rules, batch.path, spoken)
                    except RowRejected as error:
                        self.dropped[error.rule] += 1
                        reasons.setdefault(error.rule, f"{batch.path} line {row.number}: {error.reason}")
                self.rows += len(rows)
                progress.update(len(rows))
                if texts:
                    texts_found = True
                    yield texts
        if not texts_found:
            why = next(iter(reasons.values()), "no rows")
            raise InputError(
                f"input {', '.join(self.inputs)} holds no text ({why}); needed a field {' or '.join(self.json_keys)} "
                "(name others with --json-keys)"
            )

    def _texts(self, row: Row, rules: SampleRules, path: str, spoken: bool) -> list[Text]:
        if self.language_field != "language" and row.rejected is None:
            row = Row(row.number, {**row.fields, "language": row.fields.get(self.language_field)})
        sample = rules.sample(row, path)
        if not sample.texts:
            raise RowRejected("no_text", "the row is pretokenised and holds no text")
        return [Text(sample.language, normalize_transcript(text) if spoken else text) for text in sample.texts]

    def describe_dropped(self) -> str:
        """A sentence about rows without text; empty if there were none."""
        if not self.dropped:
            return ""
        rules = ", ".join(f"{count:,} {rule}" for rule, count in sorted(self.dropped.items()))
        return f"note: {sum(self.dropped.values()):,} of {self.rows:,} rows hold no usable text ({rules})"


def passages(text: str) -> list[str]:
    """Cut a long text into passages of at most `PASSAGE_CHARACTERS`, where it can be at line ends or spaces.

    The blank at a cut is dropped; a text without blanks is cut where the passage is full.
    """
    if len(text) <= PASSAGE_CHARACTERS:
        return [text]
    parts = []
    start = 0
    while len(text) - start > PASSAGE_CHARACTERS:
        end = start + PASSAGE_CHARACTERS
        cut = max(text.rfind("\n", start + 1, end + 1), text.rfind(" ", start + 1, end + 1))
        blank = cut > start
        parts.append(text[start : cut if blank else end])
        start = cut + 1 if blank else end
    return [*parts, text[start:]] if start < len(text) else parts


@dataclass
class _Reservoir:
    """Of the passages offered, those with the smallest draws that fill `budget` characters."""

    budget: int
    heap: list[tuple[int, int, str]] = field(default_factory=list)  # (-draw, -position, passage)
    characters: int = 0

    def offer(self, draw: int, position: int, passage: str) -> None:
        if self.characters >= self.budget and self.heap and -draw < self.heap[0][0]:
            return
        heapq.heappush(self.heap, (-draw, -position, passage))
        self.characters += len(passage)
        while self.heap and self.characters - len(self.heap[0][2]) >= self.budget:
            self.characters -= len(heapq.heappop(self.heap)[2])

    def passages(self) -> list[str]:
        """The sample in the order of the input."""
        return [passage for _, _, passage in sorted(self.heap, key=lambda item: -item[1])]


@dataclass(frozen=True)
class SampleOf:
    """A bounded sample.

    Attributes:
        passages: the sample; with a temperature, passages of small languages can occur more than once.
        others: a small sample of the passages that were not wanted.
        characters_read: of the whole input, by language.
        characters: of the sample, by language; without a temperature all under "all".
    """

    passages: list[str]
    others: list[str]
    characters_read: Counter[str]
    characters: dict[str, int]


def draw_sample(
    corpus: Corpus,
    characters: int,
    seed: int,
    temperature: float = 1.0,
    wanted: Callable[[str], bool] | None = None,
) -> SampleOf:
    """Sample a corpus.

    Args:
        corpus: read once, or twice with a temperature.
        characters: bound of the sample, to within one passage per language.
        seed: of the choice.
        temperature: languages weigh characters^temperature; 1 leaves them as they are. A language that has less text
            than its weight requires is repeated.
        wanted: passages for which it is false go to the small sample `others`.
    """
    read: Counter[str] = Counter()
    budgets = {"all": characters}
    repeats = {"all": 1.0}
    if temperature != 1.0:
        for batch in corpus.batches("count"):
            for text in batch:
                read[text.language] += len(text.text)
        total = min(characters, sum(read.values()))
        weights = {language: count**temperature for language, count in sorted(read.items())}
        quotas = {language: total * weight / sum(weights.values()) for language, weight in weights.items()}
        budgets = {language: max(1, min(read[language], round(quota))) for language, quota in quotas.items()}
        repeats = {language: max(1.0, quota / read[language]) for language, quota in quotas.items()}
        read.clear()
    reservoirs = {group: _Reservoir(budget) for group, budget in budgets.items()}
    others = _Reservoir(min(characters, OTHER_CHARACTERS))
    seed_word = splitmix64(np.array([seed & 0xFFFF_FFFF_FFFF_FFFF], dtype=np.uint64))[0]
    position = 0
    for batch in corpus.batches("sample"):
        groups, pieces = [], []
        for text in batch:
            read[text.language] += len(text.text)
            for passage in passages(text.text):
                groups.append(text.language if temperature != 1.0 else "all")
                pieces.append(passage)
        draws = splitmix64(np.arange(position, position + len(pieces), dtype=np.uint64) ^ seed_word).tolist()
        for i, (group, passage, draw) in enumerate(zip(groups, pieces, draws, strict=True)):
            kept = reservoirs[group] if wanted is None or wanted(passage) else others
            kept.offer(draw, position + i, passage)
        position += len(pieces)
    chosen: list[str] = []
    by_group = {}
    for group, reservoir in reservoirs.items():
        repeated = _repeat(reservoir.passages(), repeats[group])
        chosen += repeated
        by_group[group] = sum(map(len, repeated))
    return SampleOf(chosen, others.passages(), read, by_group)


def _repeat(items: list[str], times: float) -> list[str]:
    """Whole copies, and the first passages once more for the rest."""
    whole = int(times)
    return items * whole + items[: round((times - whole) * len(items))]
