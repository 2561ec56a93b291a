"""Which tokens of a text tokenizer are control tokens, and the tokenizer in which no text spells them.

A control token is

- an id that the caller names: a special or a code of the token space;
- a token that the tokenizer marks as special (`special: true`, sentencepiece's control symbols);
- an added token, or a user-defined symbol of sentencepiece, that is written as a mark: `<…>` or `[…]` around a
  letter, such as `<speech_start>`, `<|im_start|>`, `[INST]`. Other added tokens are text: `"    "`, an emoji;
- an entry of the vocabulary itself that is written as a mark and that no merge makes (of a Unigram model: with the
  score 0 that learnt pieces do not have).

Marking them as special is not enough. Tokenizers look for added tokens before the model sees the text, and
`encode_special_tokens` switches off only that: a Unigram or WordLevel model, or BPE with `ignore_merges`, finds the
token in its vocabulary all the same. Leaving them out is not possible either: the library numbers added tokens by
their place. So they keep their places and are given names that no text has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from megatron_speech.files import sha256_hex

_MARK = re.compile(r"[\s▁]*(<\|.*\|>|<<?[^<>]*[^\W\d_][^<>]*>?>|\[[^\[\]]*[^\W\d_][^\[\]]*\])[\s▁]*", re.DOTALL)
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def is_mark(token: str) -> bool:
    """Whether a token is written as a mark, `<…>` or `[…]` around a letter; a byte's `<0x0A>` is none."""
    return _MARK.fullmatch(token) is not None and _BYTE.fullmatch(token) is None


class HuggingFaceVocabulary:
    """The control tokens of a `tokenizer.json`.

    Args:
        payload: the file.
        ids: id of every token, added ones included, as the library numbers them.
        control_ids: the caller's.
    """

    def __init__(self, payload: bytes, ids: Mapping[str, int], control_ids: Collection[int]) -> None:
        self._payload, self._ids = payload, ids
        self._spec: dict[str, Any] = json.loads(payload)
        self._model: dict[str, Any] = self._spec["model"]
        added = self._spec.get("added_tokens") or []
        hidden = {token["content"] for token in added if token.get("special") or is_mark(token["content"])}
        hidden |= self._marks_of_the_model()
        named = set(control_ids)
        if named:
            hidden |= {token for token, number in ids.items() if number in named}
        self._hidden = hidden
        self._found_in_text = any(t["content"] in hidden and not t.get("special") for t in added)
        self.control = {ids[token] for token in hidden if token in ids}
        unknown = self._model.get("unk_token")
        # A Unigram model names its unknown token by id, the others by the token; byte-level ones name none.
        self.unknown_id: int | None = self._model.get("unk_id") if unknown is None else ids.get(unknown)
        self._tokens_of: set[int] | None = None

    def is_text(self, number: int) -> bool:
        """Whether some text becomes this id."""
        if self._tokens_of is None:
            self._tokens_of = set(self._ids.values())
        return number in self._tokens_of and number not in self.control and number != self.unknown_id

    def _marks_of_the_model(self) -> set[str]:
        vocabulary = self._model.get("vocab") or {}
        if isinstance(vocabulary, list):
            return {piece for piece, score in vocabulary if score >= 0 and is_mark(piece)}
        if "merges" not in self._model:
            return set()
        marks = {token for token in vocabulary if token[-1:] in (">", "]") and is_mark(token)}
        return marks - {product for _, _, product in self._merges()} if marks else set()

    def _merges(self) -> list[tuple[str, str, str]]:
        """(left, right, merged) of each merge."""
        prefix = self._model.get("continuing_subword_prefix") or ""
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in self._model["merges"])
        return [(left, right, left + right.removeprefix(prefix)) for left, right in pairs]

    def without_control(self) -> bytes | None:
        """The file in which no text spells a control token, ids as before; None where the file is one itself.

        Single letters of a BPE model keep their names: without them text would be lost.
        """
        vocabulary = self._model.get("vocab") or {}
        if isinstance(vocabulary, list):
            entries = {piece for piece, _ in vocabulary}
        else:
            entries = set(vocabulary) if self._hidden else set()
        inside = self._hidden & entries
        if "merges" in self._model:
            inside = {token for token in inside if not self._is_letter(token)}
        if not inside and not self._found_in_text:
            return None
        spec = dict(self._spec)
        name = self._names()
        hidden = inside | (self._hidden - entries)
        spec["added_tokens"] = [
            {**token, "content": name(token["content"]), "special": True, "normalized": False}
            if token["content"] in hidden
            else token
            for token in spec.get("added_tokens") or []
        ]
        spec["post_processor"] = None  # may name them, and adds what is not text
        spec["model"] = self._model_without(inside, name) if inside else self._model
        return json.dumps(spec, ensure_ascii=False).encode()

    def _is_letter(self, token: str) -> bool:
        """Whether BPE begins with this symbol."""
        prefix = self._model.get("continuing_subword_prefix") or ""
        suffix = self._model.get("end_of_word_suffix") or ""
        return len(token.removeprefix(prefix).removesuffix(suffix)) <= 1 or _BYTE.fullmatch(token) is not None

    def _names(self) -> Callable[[str], str]:
        """New name of a token: noncharacters, and digits that no text foresees."""
        stem = f"\ufdd0\ufdd1{sha256_hex(self._payload)[:16]}\ufdd1"
        return lambda token: f"{stem}{self._ids.get(token, 0)}\ufdd0"

    def _model_without(self, hidden: set[str], name: Callable[[str], str]) -> dict[str, Any]:
        model = dict(self._model)
        vocabulary = model["vocab"]
        if isinstance(vocabulary, list):
            model["vocab"] = [[name(piece) if piece in hidden else piece, score] for piece, score in vocabulary]
        else:
            model["vocab"] = {name(token) if token in hidden else token: number for token, number in vocabulary.items()}
        if model.get("unk_token") in hidden:
            model["unk_token"] = name(model["unk_token"])
        if "merges" in model:
            merges = zip(model["merges"], self._merges(), strict=True)
            model["merges"] = [merge for merge, parts in merges if hidden.isdisjoint(parts)]
        return model


class SentencePieceVocabulary:
    """The control tokens of a sentencepiece model.

    Args:
        payload: the file.
        control_ids: the caller's.
    """

    def __init__(self, payload: bytes, control_ids: Collection[int]) -> None:
        from sentencepiece import sentencepiece_model_pb2 as pb

        self._types = pb.ModelProto.SentencePiece
        self._model = pb.ModelProto.FromString(payload)
        named = set(control_ids)
        marks = {
            number
            for number, piece in enumerate(self._model.pieces)
            if piece.type == self._types.USER_DEFINED and is_mark(piece.piece)
        }
        never = (self._types.CONTROL, self._types.UNUSED)
        own = {number for number, piece in enumerate(self._model.pieces) if piece.type in never}
        self._named = {number for number in named if 0 <= number < len(self._model.pieces)}
        self._marks = marks
        self.control = own | marks | self._named

    def is_text(self, number: int) -> bool:
        """Whether some text becomes this id."""
        return (
            0 <= number < len(self._model.pieces)
            and number not in self.control
            and self._model.pieces[number].type != self._types.UNKNOWN
        )

    def without_control(self) -> bytes | None:
        """The model in which no text spells a control token, ids as before; None where the model is one itself.

        Symbols that the user defined become control symbols, which sentencepiece does not look for in text; learnt
        pieces become unused ones, which it spells by their parts. Bytes and the unknown piece stay.
        """
        change = {number: self._types.CONTROL for number in self._marks}
        for number in self._named:
            if self._model.pieces[number].type == self._types.USER_DEFINED:
                change[number] = self._types.CONTROL
            elif self._model.pieces[number].type == self._types.NORMAL:
                change[number] = self._types.UNUSED
        if not change:
            return None
        result = type(self._model)()
        result.CopyFrom(self._model)
        for number, kind in change.items():
            result.pieces[number].type = kind
        return bytes(result.SerializeToString())
