"""Which characters of a text stream are new to a tokenizer, and so may be in new pieces."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron_speech.errors import InputError
from megatron_speech.text_tokenizers.scripts import COMMON, script_of, shared_with

UNCOVERED_LIMIT = 0.05  # share of a script's characters that the vocabulary lacks, above which the script is new
MOST_CHARACTERS = 16  # of a piece, as sentencepiece's own limit


@dataclass(frozen=True)
class ScriptCoverage:
    """How well a tokenizer knows a script: characters read, and those that its vocabulary lacks."""

    characters: int
    uncovered: int

    @property
    def share(self) -> float:
        """Share of the characters that the vocabulary lacks."""
        return self.uncovered / self.characters


def coverage(counts: Counter[str], covers: Callable[[str], bool]) -> dict[str, ScriptCoverage]:
    """Every script of a text by how well `covers` knows its characters, the most frequent script first."""
    totals: Counter[str] = Counter()
    uncovered: Counter[str] = Counter()
    for character, count in counts.items():
        script = script_of(character)
        if script not in COMMON:
            totals[script] += count
            uncovered[script] += 0 if covers(character) else count
    return {name: ScriptCoverage(count, uncovered[name]) for name, count in totals.most_common()}


def new_scripts(found: dict[str, ScriptCoverage]) -> tuple[str, ...]:
    """The scripts that a tokenizer does not cover.

    Raises:
        InputError: it covers all of them.
    """
    new = tuple(name for name, cover in found.items() if cover.share > UNCOVERED_LIMIT)
    if not new:
        listed = ", ".join(found) or "none"
        raise InputError(
            f"the base tokenizer has a token for every letter of the scripts in the input ({listed}); "
            "name the scripts that are to get more pieces with --scripts"
        )
    return new


@dataclass
class Targets:
    """The characters of the new scripts.

    A common or inherited character that is used in a new script by name (a danda, a vedic accent) counts as new where
    the base has no token for it; any other inherited mark or joiner may stand inside a piece.
    """

    scripts: Sequence[str]
    covers: Callable[[str], bool]
    _known: dict[str, bool] = field(default_factory=dict)

    def is_new(self, character: str) -> bool:
        """Whether text with this character may be spelled with new pieces."""
        if character not in self._known:
            script = script_of(character)
            self._known[character] = script in self.scripts or (
                script in COMMON and any(shared_with(character, name) for name in self.scripts)
                and not self.covers(character)
            )  # fmt: skip
        return self._known[character]

    def may_join(self, character: str) -> bool:
        """Whether the character may be in a piece beside new ones."""
        return self.is_new(character) or script_of(character) == "Inherited"

    def is_piece(self, text: str) -> bool:
        """Whether `text` may be a new piece: new characters and their marks, not too long."""
        return (
            0 < len(text) <= MOST_CHARACTERS
            and any(self.is_new(character) for character in text)
            and all(self.may_join(character) for character in text)
        )

    def has_script(self, text: str) -> bool:
        """Whether a text has a letter of the new scripts: shared marks alone do not make it theirs."""
        return any(script_of(character) in self.scripts for character in set(text))

    def any_in(self, text: str) -> bool:
        """Whether a text has a new character."""
        return any(map(self.is_new, set(text)))
