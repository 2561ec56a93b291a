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


def write_tokenizer(folder: Path, space: TokenSpace, max_length: int, architecture: str) -> str:
    """Write the files of the tokenizer; returns one sentence on what was written.

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
        )
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
    if architecture == "Qwen2ForCausalLM" and not _cuts_as_qwen(spec):
        written += (
            "; AutoTokenizer of transformers 5 cuts text as Qwen does beside any Qwen2 model, which this tokenizer "
            "does not: open it with PreTrainedTokenizerFast"
        )
    return written


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


def special_tokens(space: TokenSpace) -> dict[str, Any]:
    """The `generation_config.json` of a speech model: it ends with `<speech_end>`, or a text with `<eos>`."""
    return {
        "bos_token_id": space.special("<bos>"),
        "eos_token_id": [space.special("<speech_end>"), space.special("<eos>")],
        "pad_token_id": space.special("<pad>"),
    }
