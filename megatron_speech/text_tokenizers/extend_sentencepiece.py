"""New pieces after those of a sentencepiece model.

Old text keeps its ids. A new piece holds at least one character of a new script, so it matches nowhere in text
without; and what is global in the model stays: a Unigram model's unknown score is its lowest score minus a constant,
so no new score is lower; a BPE model merges by score, so every new score is lower and its own merges come first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as pb

from megatron_speech.errors import InputError
from megatron_speech.text_tokenizers.merges import learn_merges
from megatron_speech.text_tokenizers.targets import Targets
from megatron_speech.text_tokenizers.train import train_up_to

SPACE = "▁"
_NORMAL = pb.ModelProto.SentencePiece.NORMAL
_USER_DEFINED = pb.ModelProto.SentencePiece.USER_DEFINED
_UNUSED = pb.ModelProto.SentencePiece.UNUSED

# By how much a new Unigram piece beats the base's own spelling of it. Scores are float32 log probabilities.
_MARGIN = 1e-3


class SentencePieceBase:
    """A sentencepiece model that is to be extended."""

    def __init__(self, payload: bytes, where: str) -> None:
        self.where = where
        self.model = pb.ModelProto()
        try:
            self.model.ParseFromString(payload)
            # Without its dummy prefix the model sees a word as it stands inside a text.
            bare = pb.ModelProto()
            bare.CopyFrom(self.model)
            bare.normalizer_spec.add_dummy_prefix = False
            bare.normalizer_spec.remove_extra_whitespaces = False
            self._bare = sentencepiece.SentencePieceProcessor(model_proto=bare.SerializeToString())
        except Exception as error:  # protobuf's DecodeError, sentencepiece's RuntimeError: both mean a bad file
            raise InputError(f"{where} is not a sentencepiece model: {error}") from error
        spec = self.model.trainer_spec
        self.kind = pb.TrainerSpec.ModelType.Name(spec.model_type).lower()
        if self.kind not in ("unigram", "bpe"):
            raise InputError(f"{where} is a sentencepiece model of type {self.kind}; only unigram and bpe are extended")
        if spec.treat_whitespace_as_suffix:
            raise InputError(f"{where} writes spaces at the ends of words; only models with spaces before are extended")
        self.pieces = {piece.piece for piece in self.model.pieces}
        self.scores = [piece.score for piece in self.model.pieces if piece.type == _NORMAL]
        if not self.scores:
            raise InputError(f"{where} has no piece of its own; needed a trained model")
        self._letters = {p.piece for p in self.model.pieces if p.type in (_NORMAL, _USER_DEFINED) and len(p.piece) == 1}

    @property
    def size(self) -> int:
        """Number of ids."""
        return len(self.model.pieces)

    @property
    def added(self) -> Mapping[str, int]:
        """Control pieces; sentencepiece does not look for them in text."""
        return {}

    def covers(self, character: str) -> bool:
        """Whether the character is a piece."""
        return character in self._letters or character == " "

    def normalize(self, text: str) -> str:
        """The text as the model's pieces spell it."""
        return str(self._bare.normalize(text))

    def extend(self, passages: Sequence[str], targets: Targets, pieces: int, first_id: int, coverage: float) -> bytes:
        """The model with `pieces` more pieces, the first of them with id `first_id`.

        Raises:
            InputError: the passages do not yield so many.
        """
        runs = list(self._runs(passages, targets))
        learn = self._learn_unigram if self.kind == "unigram" else self._learn_bpe
        new = learn(runs, targets, pieces, coverage)
        result = pb.ModelProto()
        result.CopyFrom(self.model)
        for number in range(self.size, first_id):  # rows of the base model that its tokenizer does not use
            result.pieces.add(piece=f"<unused_{number}>", score=0.0, type=_UNUSED)
        for piece, score in new:
            result.pieces.add(piece=piece, score=score, type=_NORMAL)
        result.trainer_spec.vocab_size = len(result.pieces)
        return result.SerializeToString(deterministic=True)

    def _runs(self, passages: Iterable[str], targets: Targets) -> Iterable[str]:
        """Runs of new characters, words with the space before them."""
        table = _KeepTable(targets)
        for passage in passages:
            for run in self.normalize(" " + passage).translate(table).split("\n"):
                if targets.any_in(run):
                    yield run.rstrip(SPACE)

    def _is_piece(self, piece: str, targets: Targets) -> bool:
        return targets.is_piece(piece.removeprefix(SPACE)) and piece not in self.pieces

    # ---- Unigram

    def _learn_unigram(
        self, runs: Sequence[str], targets: Targets, pieces: int, coverage: float
    ) -> list[tuple[str, float]]:
        self._new_letters(Counter(runs), targets, coverage, pieces)
        letters = {letter for run in runs for letter in run}
        # The unknown piece, and letters that the trainer needs and the base has: they do not count.
        wanted = pieces + 1 + sum(not targets.is_new(letter) or self.covers(letter) for letter in letters)
        found: list[tuple[str, float]] = []
        while True:
            payload, size = train_up_to(
                runs,
                wanted,
                model_type="unigram",
                character_coverage=coverage,
                add_dummy_prefix=False,
                split_by_unicode_script=False,  # a run is of new scripts only, and its joiners belong to its words
            )
            trained = [(p.piece, p.score) for p in pb.ModelProto.FromString(payload).pieces if p.type == _NORMAL]
            found = [(piece, score) for piece, score in trained if self._is_piece(piece, targets)]
            if len(found) >= pieces or size < wanted:
                break
            wanted += pieces - len(found)  # pieces that the base has already do not count
        if len(found) < pieces:
            raise _too_few(pieces, len(found))
        # Letters first: without its letter a word has no spelling; then the likeliest.
        found.sort(key=lambda item: (len(item[0].removeprefix(SPACE)) > 1, -item[1], item[0]))
        found = sorted(found[:pieces], key=lambda item: (-item[1], item[0]))
        return self._unigram_scores(found)

    def _unigram_scores(self, found: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
        """Scores on the base's scale.

        One factor for all keeps every comparison among spellings of new pieces as it was learnt. A piece that the base
        can spell is given a little more than that spelling, so that it is used.
        """
        lowest, highest = min(self.scores), max(self.scores)
        factor = min(1.0, lowest / min(score for _, score in found)) if lowest < 0 else 1.0
        result = []
        for piece, score in found:
            score *= factor
            spelling = self._bare.encode(piece.replace(SPACE, " "), out_type=int)
            if not any(self._bare.is_unknown(i) or self._bare.is_byte(i) for i in spelling):
                score = max(score, sum(self._bare.get_score(i) for i in spelling) + _MARGIN)
            result.append((piece, min(max(score, lowest), highest)))
        return result

    # ---- BPE

    def _learn_bpe(
        self, runs: Sequence[str], targets: Targets, pieces: int, coverage: float
    ) -> list[tuple[str, float]]:
        counts = Counter(word for run in runs for word in _words(run))
        new = self._new_letters(counts, targets, coverage, pieces)
        known = self.pieces | set(new)
        words = {tuple(self._spell(word, known)): count for word, count in sorted(counts.items())}
        merges = learn_merges(words, pieces - len(new), lambda piece: self._may_merge(piece, targets), known)
        new += [merge.piece for merge in merges if merge.new]
        if len(new) < pieces:
            raise _too_few(pieces, len(new))
        lowest = min(self.scores)
        return [(piece, lowest - 1 - i) for i, piece in enumerate(new)]

    def _new_letters(self, counts: Counter[str], targets: Targets, coverage: float, pieces: int) -> list[str]:
        """Letters without a piece, the most frequent first, up to the coverage.

        Raises:
            InputError: more than `pieces`.
        """
        letters: Counter[str] = Counter()
        for word, count in counts.items():
            for letter in word:
                letters[letter] += count
        del letters[SPACE]
        enough = coverage * letters.total()
        result, seen = [], 0
        for letter, count in sorted(letters.items(), key=lambda item: (-item[1], item[0])):
            if seen >= enough:
                break
            seen += count
            if targets.is_new(letter) and not self.covers(letter):
                result.append(letter)
        if len(result) > pieces:
            raise InputError(
                f"--pieces is {pieces:,}, but the new scripts of the input have {len(result):,} letters; ask for more "
                "pieces, or lower --character-coverage"
            )
        return result

    def _spell(self, word: str, known: set[str]) -> list[str]:
        """The word as the base's merges leave it, its unknown letters as they are."""
        proto = self._bare.encode(word.replace(SPACE, " "), out_type="proto")
        symbols: list[str] = []
        for piece in proto.pieces:
            surface = piece.surface.replace(" ", SPACE)
            # An unknown piece holds one or more letters; of a byte piece's letter only the last has a surface.
            symbols += [surface] if surface in known else list(surface)
        return symbols

    def _may_merge(self, piece: str, targets: Targets) -> bool:
        return targets.is_piece(piece.removeprefix(SPACE))


class _KeepTable(dict[int, int]):
    """For str.translate: characters that may be in new pieces stay, all others become line ends."""

    def __init__(self, targets: Targets) -> None:
        super().__init__({ord(SPACE): ord(SPACE)})
        self._targets = targets

    def __missing__(self, code: int) -> int:
        self[code] = code if self._targets.may_join(chr(code)) else ord("\n")
        return self[code]


def _words(run: str) -> list[str]:
    """The words of a run, each with the space before it."""
    first, *rest = run.split(SPACE)
    return ([first] if first else []) + [SPACE + word for word in rest if word]


def _too_few(wanted: int, found: int) -> InputError:
    if not found:
        return InputError("the input yields no new piece for the new scripts; give more text")
    return InputError(
        f"--pieces is {wanted:,}, but the input yields at most {found:,} new pieces; ask for {found:,}, "
        "or give more text"
    )
