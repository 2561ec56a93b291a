"""The text tokenizer of a token space with a token for every id: what `AutoTokenizer` loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from megatron_speech.errors import InputError
from megatron_speech.files import write_json
from megatron_speech.tokens.byte_level import PATTERNS, byte_letters
from megatron_speech.tokens.layouts import CODE_TOKEN, OWN, known_layout
from megatron_speech.tokens.space import TokenSpace

QWEN = 2  # of byte_level.PATTERNS
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True}


def write_tokenizer(folder: Path, space: TokenSpace, max_length: int, architecture: str) -> tuple[str, dict[int, str]]:
    """Write the files of the tokenizer; returns one sentence on what was written, and the token of each id.

    A backbone's own token that plays the part of a special (`<|begin_of_text|>` of `<bos>`) keeps its name; text that
    has the special's name is turned into it by the normaliser, since a tokenizer has one name per id.

    Args:
        folder: of the model.
        space: the ids; those without a token get one: `<speech_start>`, `<|s_7|>` (of a codec with several codebooks
            `<|name_7|>`), `<|unused_7|>`. Text that spells a special or a code then is one.
        max_length: longest sequence of the model, in tokens.
        architecture: of the model beside it.

    Raises:
        InputError: the tokenizer has a token of such a name with another id, or gives no ids in order.
    """
    if space.text_kind == "sentencepiece":
        (folder / "tokenizer.model").write_bytes(space.text_payload)
        return (
            "the text tokenizer is a sentencepiece model, written as tokenizer.model without the tokens of specials "
            "and codes: AutoTokenizer does not give their ids, token_space.json does"
        ), {}
    payload = _byte_tokenizer() if space.text_kind == "bytes" else space.text_payload
    spec = json.loads(payload)
    before = tokenizers.Tokenizer.from_str(payload.decode("utf-8")).get_vocab(with_added_tokens=True)
    named = set(before.values())
    names = _names(space, before)
    added = list(spec.get("added_tokens") or [])
    special = set(space.special_ids.values())
    for number in range(space.size):
        if number not in named:
            added.append(
                {
                    "id": number,
                    "content": names.get(number, f"<|unused_{number}|>"),
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": number in special,
                }
            )
    cuts_as_qwen = _cuts_as_qwen(spec)
    aliases = _take_own_names(spec, added, space, before)
    spec["added_tokens"] = sorted(added, key=lambda token: int(token["id"]))
    text = json.dumps(spec, ensure_ascii=False)
    after = tokenizers.Tokenizer.from_str(text)
    for token in added:
        if after.token_to_id(token["content"]) != token["id"]:
            raise InputError(
                f"the text tokenizer has {token['content']} as id {after.token_to_id(token['content'])}, the token "
                f"space as id {token['id']}: it cannot be exported"
            )
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": max_length,
            "clean_up_tokenization_spaces": False,
            "unk_token": None,
            **{f"{name}_token": after.id_to_token(space.special(f"<{name}>")) for name in ("bos", "eos", "pad")},
        },
    )
    written = f"{len(added):,} added tokens"
    if architecture == "Qwen2ForCausalLM" and not cuts_as_qwen:
        written += (
            "; AutoTokenizer of transformers 5 cuts text as Qwen does beside any Qwen2 model, which this tokenizer "
            "does not: open it with PreTrainedTokenizerFast"
        )
    elif architecture == "Qwen2ForCausalLM" and aliases:
        written += (
            f"; AutoTokenizer of transformers 5 has Qwen's normaliser beside any Qwen2 model, and does not know "
            f"{' and '.join(aliases)}: write {' and '.join(aliases.values())}, or open it with PreTrainedTokenizerFast"
        )
    return written, {number: token for token, number in after.get_vocab(with_added_tokens=True).items()}


def _take_own_names(
    spec: dict[str, Any], added: list[dict[str, Any]], space: TokenSpace, taken: dict[str, int]
) -> dict[str, str]:
    """Let the names of specials stand for the backbone's tokens that play their part; returns name → token.

    The tokens are found after the normaliser then, which turns the one into the other.
    """
    if space.layout != OWN:
        return {}
    tokens = {number: token for token, number in taken.items()}
    kept = {name: tokens[i] for name, i in space.special_ids.items() if i in tokens and name not in taken}
    if not kept:
        return {}
    by_content = {token["content"]: token for token in added}
    for token in kept.values():
        if token not in by_content:  # of the vocabulary alone
            added.append({"id": taken[token], "content": token, **_FLAGS, "special": True})
        else:
            by_content[token]["normalized"] = True
    stages = [{"type": "Replace", "pattern": {"String": name}, "content": token} for name, token in kept.items()]
    own = spec.get("normalizer")
    spec["normalizer"] = {"type": "Sequence", "normalizers": [*([own] if own else []), *stages]}
    return kept


def _cuts_as_qwen(spec: dict[str, Any]) -> bool:
    """Whether a `tokenizer.json` has the normaliser and the pattern that `Qwen2Tokenizer` puts in their place."""
    stages = spec.get("pre_tokenizer") or {}
    pattern = stages.get("pretokenizers", [stages])[0].get("pattern", {}).get("Regex")
    return (spec.get("normalizer") or {}).get("type") == "NFC" and PATTERNS.get(pattern) == QWEN


def _byte_tokenizer() -> bytes:
    """UTF-8 bytes as a `tokenizer.json`: no merges, so that the id of a byte is the byte."""
    letters = {letter: byte for byte, letter in enumerate(byte_letters())}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return str(tokenizer.to_str()).encode()


def _names(space: TokenSpace, taken: dict[str, int]) -> dict[int, str]:
    """Token of each id of a special or a code that the tokenizer may lack."""
    names: dict[int, str] = {}
    if space.layout != OWN:
        # A tokenizer without these tokens was given them right after its own.
        appended = known_layout(space.layout).appended(space.codebooks[0].size)
        names = {space.text_size + i: token for i, token in enumerate(appended)}
    else:
        for book in space.codebooks:
            token = CODE_TOKEN if space.codebook_count == 1 else f"<|{book.name}_{{}}|>"
            names |= {int(number): token.format(code) for code, number in enumerate(book.ids)}
    for name, number in space.special_ids.items():
        if number not in names:
            names[number] = name if name not in taken else f"<|{name.strip('<>')}|>"
    return names
