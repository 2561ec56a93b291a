"""Texts in five languages and four scripts beside Latin, made of random words: seconds, no files, no network."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path

# Letters, then vowel signs that follow a letter.
LETTERS = {
    "en": ("etaoinshrdlucmfwypvbgkjqxz", ""),
    "hi": ("कखगघचछजझटठडणतथदधनपफबभमयरलवशषसह", "ािीुूेैोौ्ं"),
    "am": ("ሀሁለሉላሌልሎሐመሙሚማሜምሞሠረሩሪራሬርሮሰሱሲሳስሶሸቀቁቂቃቅቆበቡቢባብቦተቱቲታትቶነኑኒናንኖአኡኢእኦከኩኪካክኮወዉዊዋው", ""),
    "ta": ("கஙசஞடணதநபமயரலவழளறன", "ாிீுூெேைொோ்"),
    "zh": ("的一是不了人我在有他这为之大来以个中上们到说国和地也子时道出而要于就下得可你年生", ""),
}
ENDS = {"en": ".", "hi": "।", "am": "።", "ta": ".", "zh": "。"}
SCRIPT = {"en": "Latin", "hi": "Devanagari", "am": "Ethiopic", "ta": "Tamil", "zh": "Han"}


def sentences(language: str, count: int, seed: int = 0, words: int = 120) -> list[str]:
    """Sentences of words that are as unevenly frequent as in a language."""
    rng = random.Random(f"{language}-{seed}")
    letters, signs = LETTERS[language]
    lexicon = []
    for _ in range(words):
        word = ""
        for _ in range(rng.randint(1, 5)):
            word += rng.choice(letters) + (rng.choice(signs) if signs and rng.random() < 0.5 else "")
        lexicon.append(word)
    blank = "" if language == "zh" else " "
    weights = [1 / (rank + 1) for rank in range(words)]
    return [blank.join(rng.choices(lexicon, weights, k=rng.randint(3, 12))) + ENDS[language] for _ in range(count)]


def write_rows(path: Path, rows: Iterable[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_texts(path: Path, *languages: str, count: int = 300, seed: int = 0) -> str:
    """A .jsonl of sentences in the languages, one language after the other."""
    return write_rows(
        path, ({"text": text, "language": name} for name in languages for text in sentences(name, count, seed))
    )
