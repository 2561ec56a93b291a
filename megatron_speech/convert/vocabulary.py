"""Whether a token space and a backbone mean the same by an id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_speech.errors import InputError
from megatron_speech.files import read_json
from megatron_speech.tokens.layouts import OWN
from megatron_speech.tokens.space import TokenSpace

_SHOWN = 3


def check_vocabulary(space: TokenSpace, source: str, folder: Path, rows: int) -> tuple[int, str]:
    """Check that ids 0 to `rows` − 1 of the space are the backbone's.

    Args:
        space: the ids that the checkpoint will have.
        source: file of the space, for errors.
        folder: the backbone's.
        rows: of its embedding table.

    Returns:
        How many of the rows belong to tokens (tables are often padded beyond them), and one sentence on what was
        compared.

    Raises:
        InputError: the space leaves no room for the rows, or its tokenizer gives an id to another token.
    """
    if _is_space_of(folder, space):
        if rows != space.size:
            raise InputError(
                f"{folder / 'config.json'}: vocab_size is {rows:,}, but its token_space.json has {space.size:,} ids"
            )
        return rows, "the token space is the folder's own"
    last_code = max(int(book.ids[-1]) if book.table is None else int(book.ids.max()) for book in space.codebooks)
    if rows > space.text_size and not (space.layout != OWN and last_code < rows <= space.size):
        raise InputError(
            f"token space {source}: its text has {space.text_size:,} ids (all: {space.size:,}), but the backbone's "
            f"table has {rows:,} rows, which are all kept; make it with `megatron-speech token-space --base {folder}`"
        )
    kind, payload = _tokenizer_of(folder)
    if kind is None:
        return rows, f"{folder} has no tokenizer: only the sizes were compared"
    if kind != space.text_kind:
        raise InputError(
            f"token space {source}: its text is of kind {space.text_kind}, the backbone's tokenizer of kind {kind}; "
            f"make it with `megatron-speech token-space --text-tokenizer {folder} --base {folder}`"
        )
    theirs = _tokens(kind, payload)
    if payload == space.text_payload:
        return min(rows, 1 + max(theirs.values(), default=-1)), "the tokenizers are the same"
    ours = _tokens(kind, space.text_payload)
    other = [token for token, number in theirs.items() if ours.get(token) != number]
    if other:
        shown = ", ".join(f"{token!r} ({theirs[token]}, there {ours.get(token, 'absent')})" for token in other[:_SHOWN])
        raise InputError(
            f"token space {source}: {len(other):,} of the {len(theirs):,} tokens of {folder} have another id in it, "
            f"such as {shown}; make it with that folder's tokenizer, or one that extends it"
        )
    more = f", and has {len(ours) - len(theirs):,} more" if len(ours) > len(theirs) else ""
    return min(rows, 1 + max(theirs.values(), default=-1)), f"every token of the backbone's tokenizer has its id{more}"


def _is_space_of(folder: Path, space: TokenSpace) -> bool:
    path = folder / "token_space.json"
    if not path.is_file():
        return False
    found: Any = read_json(path, "token space")
    return isinstance(found, dict) and found.get("hash") == space.hash


def _tokenizer_of(folder: Path) -> tuple[str | None, bytes]:
    for name, kind in (("tokenizer.json", "huggingface"), ("tokenizer.model", "sentencepiece")):
        if (folder / name).is_file():
            return kind, (folder / name).read_bytes()
    return None, b""


def _tokens(kind: str, payload: bytes) -> dict[str, int]:
    """Every token of a tokenizer and its id, added ones included."""
    if kind == "huggingface":
        import tokenizers

        return dict(tokenizers.Tokenizer.from_str(payload.decode("utf-8")).get_vocab(with_added_tokens=True))
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_proto=payload)
    return {model.id_to_piece(i): i for i in range(model.vocab_size())}
