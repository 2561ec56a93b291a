"""Text for the data benchmarks: made on the spot, the same everywhere, with the statistics that tokenizers feel.

Words are drawn by Zipf's law from a lexicon (frequent words are short, most words are rare), in several scripts.
What a tokenizer's speed depends on is there: repeated and new words, punctuation, figures, capital letters, scripts
of two and three bytes a letter, one of them without spaces. The text is already normalised, so that a tool that
normalises and one that does not see the same string.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

LEXICON_WORDS = 120_000
ZIPF_EXPONENT = 1.07
ZIPF_SHIFT = 2.7  # Mandelbrot's: the commonest words are less common than a pure power law says
DOCUMENTS_PER_BLOCK = 2048


@dataclass(frozen=True)
class TextProfile:
    """Lengths of a kind of document: log-normal, in words."""

    median_words: float
    sigma: float
    least: int
    most: int


PROFILES = {
    "transcripts": TextProfile(15, 0.5, 2, 60),
    "paragraphs": TextProfile(80, 0.6, 10, 500),
    "pages": TextProfile(600, 0.8, 50, 8000),
}


@dataclass(frozen=True)
class ScriptLetters:
    """Syllables to build words of, what ends a sentence, and whether words are set apart."""

    onsets: tuple[str, ...]
    nuclei: tuple[str, ...]
    codas: tuple[str, ...]
    share: float
    stop: str = "."
    comma: str = ","
    space: str = " "


def _letters(first: int, last: int) -> tuple[str, ...]:
    return tuple(chr(code) for code in range(first, last + 1) if unicodedata.category(chr(code))[0] == "L")


SCRIPTS = {
    "Latin": ScriptLetters(
        (*tuple("t s r n l d c m p b f g h w v k".split()), "st", "tr", "ch", "th", "sh", "pl", "gr", ""),
        (*tuple("e e e a a i i o o u".split()), "ea", "ou", "io"),
        ("", "", "", "n", "r", "s", "t", "l", "nd", "ng"),
        0.6,
    ),
    "Cyrillic": ScriptLetters(
        (*tuple("в н т с р л к м д п г з б ж ш ч".split()), "ст", "пр", ""),
        tuple("о а е и у ы я ю".split()),
        ("", "", "", "н", "т", "й", "ть", "л"),
        0.1,
    ),
    "Devanagari": ScriptLetters(
        _letters(0x0915, 0x0939), ("", "ा", "ि", "ी", "े", "ो", "ु"), ("", "", "ं", "्र"), 0.1, "।"
    ),
    "Arabic": ScriptLetters(
        _letters(0x0628, 0x063A) + _letters(0x0641, 0x0648), ("", "", "ا", "و", "ي"), ("", "", "ة"), 0.08
    ),
    "Ethiopic": ScriptLetters(_letters(0x1208, 0x1246), ("",), ("", "ን", "ም", "ት"), 0.05, "።", "፣"),
    "Han": ScriptLetters(_letters(0x4E00, 0x5A00), ("",), ("",), 0.07, "。", ",", ""),
}


def lexicon(script: ScriptLetters, rng: np.random.Generator, words: int = LEXICON_WORDS) -> list[str]:
    """`words` different words, the commonest first: each is as long as its rank allows."""
    found: dict[str, None] = {}
    while len(found) < words:
        # One syllable for the first hundreds, then more and more of them; log10 of the rank is a good measure.
        rank = len(found) + 1
        size = max(64, rank // 4)
        mean = 0.5 + 0.42 * np.log10(rank)
        counts = np.clip(rng.normal(mean, 0.7, size).round(), 1, 6).astype(int)
        total = int(counts.sum())
        parts = [rng.integers(0, len(kind), total) for kind in (script.onsets, script.nuclei, script.codas)]
        at = 0
        for count in counts.tolist():
            word = "".join(
                script.onsets[parts[0][i]] + script.nuclei[parts[1][i]] + script.codas[parts[2][i]]
                for i in range(at, at + count)
            )
            at += count
            if word:
                found[unicodedata.normalize("NFC", word)] = None
    return list(found)[:words]


class BenchmarkCorpus:
    """Documents of one profile, in all scripts by their shares.

    Args:
        profile: a name of `PROFILES`.
        seed: of everything.
        scripts: names of `SCRIPTS` to use; all by default.
    """

    def __init__(self, profile: str, seed: int = 0, scripts: tuple[str, ...] = tuple(SCRIPTS)) -> None:
        self.profile = PROFILES[profile]
        self.seed = seed
        self.names = scripts
        shares = np.array([SCRIPTS[name].share for name in scripts])
        self._shares = shares / shares.sum()
        self._words = [lexicon(SCRIPTS[name], np.random.default_rng([7, i])) for i, name in enumerate(scripts)]
        weights = (np.arange(LEXICON_WORDS) + 1 + ZIPF_SHIFT) ** -ZIPF_EXPONENT
        self._cumulative = np.cumsum(weights / weights.sum())

    def documents(self, count: int, start: int = 0) -> Iterator[tuple[str, str]]:
        """(script, text) of documents `start` to `start + count`; each depends on its number alone."""
        first = start - start % DOCUMENTS_PER_BLOCK
        for block in range(first, start + count, DOCUMENTS_PER_BLOCK):
            for number, document in enumerate(self._block(block), block):
                if start <= number < start + count:
                    yield document

    def _block(self, block: int) -> Iterator[tuple[str, str]]:
        rng = np.random.default_rng([self.seed, block])
        profile, size = self.profile, DOCUMENTS_PER_BLOCK
        lengths = np.clip(
            np.exp(rng.normal(np.log(profile.median_words), profile.sigma, size)), profile.least, profile.most
        ).astype(int)
        scripts = rng.choice(len(self.names), size, p=self._shares)
        total = int(lengths.sum())
        ranks = np.minimum(np.searchsorted(self._cumulative, rng.random(total)), LEXICON_WORDS - 1)
        marks = rng.random(total)
        ends = np.cumsum(lengths)
        for script, begin, end in zip(scripts.tolist(), (ends - lengths).tolist(), ends.tolist(), strict=True):
            yield self.names[script], self._text(script, ranks[begin:end].tolist(), marks[begin:end].tolist())

    def _text(self, script: int, ranks: list[int], marks: list[float]) -> str:
        of, words = SCRIPTS[self.names[script]], self._words[script]
        pieces, capital = [], True
        for rank, mark in zip(ranks, marks, strict=True):
            word = words[rank]
            if mark > 0.995:
                word = str(int(mark * 1e7) % 3000)
            pieces.append(word.capitalize() if capital else word)
            capital = mark < 0.06
            pieces.append(of.stop + " " if capital else of.comma + " " if mark < 0.12 else of.space)
        if not capital:
            pieces[-1] = of.stop
        return "".join(pieces).strip()

    def write_jsonl(self, path: Path, count: int) -> dict[str, int]:
        """Documents as `{"text": …}` lines; returns how many characters, UTF-8 bytes and documents they are."""
        characters = size = 0
        with open(path, "w", encoding="utf-8") as handle:
            for _, text in self.documents(count):
                handle.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                characters += len(text)
                size += len(text.encode("utf-8"))
        return {"documents": count, "characters": characters, "utf8_bytes": size}


def train_tokenizer(folder: Path, vocabulary: int, seed: int = 0) -> None:
    """A byte-level BPE tokenizer of `vocabulary` pieces in `folder`, as Hugging Face's libraries and ours read it."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Other documents than those that are measured: a tokenizer meets words that it has not seen.
    text = (text for _, text in BenchmarkCorpus("paragraphs", seed + 1_000_003).documents(20_000))
    tokenizer.train_from_iterator(text, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "model_max_length": 10**9,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
