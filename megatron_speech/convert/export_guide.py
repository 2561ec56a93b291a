"""What an exported folder says about itself: README.md, generation_config.json, and speak.py, which a person runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_speech.files import write_json
from megatron_speech.tokens.layouts import CODE_TOKEN
from megatron_speech.tokens.space import TokenSpace
from megatron_speech.tokens.templates import CODES, TEXT, templates

_TEMPERATURE = 0.8  # of `generation.sampling.SamplingConfig`
_MAX_SECONDS = 30.0


def write_guide(
    folder: Path, space: TokenSpace, names: dict[int, str], *, architecture: str, max_position: int, trained: int
) -> None:
    """Write the three files.

    Args:
        folder: of the model.
        space: the ids.
        names: token of each id in the exported tokenizer; empty where it has none for specials and codes.
        architecture: of the model.
        max_position, trained: longest sequence that the folder is for, and that it was trained on here, in tokens.
    """
    write_json(folder / "generation_config.json", generation_config(space))
    (folder / "speak.py").write_text(speak(space), encoding="utf-8")
    (folder / "README.md").write_text(readme(space, names, architecture, max_position, trained), encoding="utf-8")


def generation_config(space: TokenSpace) -> dict[str, Any]:
    """How `generate` draws: until `<speech_end>` (a text: `<eos>`), at most 30 s, all legal ids by temperature."""
    return {
        "bos_token_id": space.special("<bos>"),
        "eos_token_id": [space.special("<speech_end>"), space.special("<eos>")],
        "pad_token_id": space.special("<pad>"),
        "do_sample": True,
        "temperature": _TEMPERATURE,
        "top_k": 0,
        "top_p": 1.0,
        "max_new_tokens": int(_MAX_SECONDS * space.codec.frame_rate_hz) * space.codebook_count,
    }


def prompt_ids(space: TokenSpace) -> tuple[list[int], list[int]]:
    """Ids of a text-to-speech prompt before the ids of the text, and after them."""
    template = templates(space, "tts")["plain"]
    at, stop = template.index(TEXT), template.index(CODES)
    before, after = template[:at], template[at + 1 : stop]
    return (
        [int(number) for name in before for number in space.sequence(name)],
        [int(number) for name in after for number in space.sequence(name)],
    )


def speak(space: TokenSpace) -> str:
    """The script."""
    before, after = prompt_ids(space)
    books = []
    for book in space.codebooks:
        if book.table is None:
            books.append(f"range({book.offset}, {book.offset + book.size})")
        else:
            token = CODE_TOKEN.format("{i}")
            books.append(f'tokenizer.convert_tokens_to_ids([f"{token}" for i in range({book.size})])')
    if space.text_kind == "sentencepiece":
        library, opened = "sentencepiece", 'sentencepiece.SentencePieceProcessor(f"{folder}/tokenizer.model")'
        encoded = "tokenizer.encode(text)"
    else:
        library, opened = "", "transformers.PreTrainedTokenizerFast.from_pretrained(folder)"
        encoded = "tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids"
    libraries = "\n".join(f"import {name}" for name in sorted({library, "soundfile", "torch", "transformers"} - {""}))
    return f'''"""Speech of a text, by transformers and megatron-speech's codec: python speak.py "some text" out.wav"""

import os
import sys
import unicodedata

{libraries}

from megatron_speech.codecs import get_codec

folder = os.path.dirname(os.path.abspath(__file__))
model = transformers.AutoModelForCausalLM.from_pretrained(folder)
tokenizer = {opened}
BEFORE, AFTER, END = {before}, {after}, {space.special("<speech_end>")}
BOOKS = [{", ".join(books)}]  # the legal ids of each codebook, in turn

text = " ".join(unicodedata.normalize("NFC", sys.argv[1]).split())
text_ids = {encoded}
if {{END}}.union(BEFORE, AFTER, *BOOKS).intersection(text_ids):
    sys.exit("the text spells a control token; write it another way")
prompt = [*BEFORE, *text_ids, *AFTER]


def legal(_, ids):
    turn = (len(ids) - len(prompt)) % len(BOOKS)
    return [*BOOKS[turn], END] if turn == 0 and len(ids) > len(prompt) else [*BOOKS[turn]]


found = model.generate(torch.tensor([prompt]), prefix_allowed_tokens_fn=legal)[0, len(prompt) :].tolist()
codes = [BOOKS[i % len(BOOKS)].index(number) for i, number in enumerate(found) if number != END]
codec = get_codec({space.codec.name!r})
frames = torch.tensor(codes[: len(codes) // len(BOOKS) * len(BOOKS)]).view(-1, len(BOOKS))
soundfile.write(sys.argv[2], codec.decode(frames.numpy()), codec.sample_rate_hz)
'''


def readme(space: TokenSpace, names: dict[int, str], architecture: str, max_position: int, trained: int) -> str:
    """The model card."""
    before, after = prompt_ids(space)
    codec = space.codec

    def spelled(ids: list[int]) -> str:
        return "".join(names.get(number) or _special_name(space, number) for number in ids)

    books = "\n".join(
        f"| `{book.name}` | {book.size:,} | {_range(book.ids)} | {_code(names.get(int(book.ids[0])))} |"
        for book in space.codebooks
    )
    specials = "\n".join(
        f"| `{name}` | {number} | {_code(names.get(number))} |" for name, number in space.special_ids.items()
    )
    order = " ".join(f"`{book.name}`" for book in space.codebooks)
    tokenizer = (
        "`tokenizer.model` (sentencepiece) gives the ids of text only; specials and codes are ids without a token."
        if not names
        else "In this tokenizer text that spells a token *is* that token. `split_special_tokens=True` keeps specials "
        "text; speak.py refuses the rest."
    )
    return "".join(
        [
            "---\nlibrary_name: transformers\npipeline_tag: text-to-speech\n---\n\n",
            f"# {architecture} for speech\n\n",
            f"A decoder of text and of the codes of the audio codec `{codec.name}` ({codec.sample_rate_hz:,} Hz, "
            f"{codec.frame_rate_hz:g} frames per second, {len(space.codebooks)} "
            f"{'code' if len(space.codebooks) == 1 else 'codes'} per frame), for up to {max_position:,} tokens; "
            f"the last training had sequences of up to {trained:,}.\n\n",
            '```\npython speak.py "some text" out.wav\n```\n\n',
            "loads this folder with `transformers`, generates codes and writes audio; only the codec is "
            "megatron-speech's.\n\n",
            "## Prompt\n\n",
            f"```\n{spelled(before)}TEXT{spelled(after)}\n```\n\n",
            f"as ids: {before}, those of the text, {after}. The text is in Unicode NFC, blanks are single spaces. "
            f"{tokenizer}\n\n",
            "## Legal ids\n\n",
            f"The speech is frames of {order}, one id of each in this order, until `<speech_end>` "
            f"({space.special('<speech_end>')}), which may stand where a frame begins.\n\n",
            f"| codebook | codes | ids | token of code 0 |\n|---|---|---|---|\n{books}\n\n",
            "`model.generate` does not know that: give it `prefix_allowed_tokens_fn`, as speak.py does.\n\n",
            "## From ids to audio\n\n",
            "The code of an id is its place in its codebook's ids. Codes as an array [frames, codebooks] in "
            "`codes.npy`, or the generated tokens as text in a `.txt`, become audio by\n\n",
            f"```\nmegatron-speech decode --codec {codec.name} --input codes.npy --output out.wav\n```\n\n",
            f"## Specials\n\n| special | id | token |\n|---|---|---|\n{specials}\n",
        ]
    )


def _special_name(space: TokenSpace, number: int) -> str:
    for name, known in space.special_ids.items():
        if known == number:
            return name
    return space.decode_text([number])


def _range(ids: np.ndarray) -> str:
    return f"{ids[0]} … {ids[-1]}" if (np.diff(ids) == 1).all() else f"{ids.min()} … {ids.max()}, by token"


def _code(token: str | None) -> str:
    return "" if token is None else f"`{token}`".replace("|", "\\|")
