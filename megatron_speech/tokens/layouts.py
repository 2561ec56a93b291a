"""Id spaces of other people's speech models, for training and inference on their checkpoints.

Both append one token per code to LLaMA 3's tokenizer, and differ in order, in marks and in the prompt around the text:

    llasa     128,256 text ids, 8 marks, then <|s_0|> <|s_1|> … in order: id = 128,264 + code, 193,800 ids
              (github.com/zhenye234/LLaSA_training, train_tts.py; arXiv:2502.04128)
    inworld   128,256 text ids, then codes and 8 marks *sorted as strings* (<|s_0|> <|s_10000|> <|s_10001|> …; a number
              comes after its continuations, since "|" sorts behind the digits), then fillers: 193,856 ids
              (github.com/inworld-ai/tts, tts/core/tokenization.py; arXiv:2507.21138)

Nothing here is computed from those numbers: the tokens are looked up in the tokenizer. One that has none of them is
given them in the order in which those projects append them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_speech.errors import InputError
from megatron_speech.wording import nearest

OWN = "own"

CODE_TOKEN = "<|s_{}|>"

_INSTRUCTION = "Convert the text to speech:"


@dataclass(frozen=True)
class KnownLayout:
    """How a project arranges its ids and its prompt.

    Attributes:
        name: as on the command line.
        marks: the tokens that it adds beside those of the codes, in the order in which it adds them.
        sorts: marks and codes are added in the order of their strings, not marks first and codes by number.
        multiple: the table is filled up to a multiple of this by tokens that nothing uses.
        tokens: name of a special → the token that plays its part; the others take LLaMA 3's reserved tokens.
        sequences: name of a special → the tokens and texts that stand in its place in a document. They hold the token
            of the special itself.
    """

    name: str
    marks: tuple[str, ...]
    sorts: bool
    multiple: int
    tokens: dict[str, str]
    sequences: dict[str, tuple[str, ...]]

    def appended(self, codes: int) -> list[str]:
        """The tokens that the project appends to a tokenizer for `codes` codes, in order."""
        tokens = [*self.marks, *map(CODE_TOKEN.format, range(codes))]
        return sorted(tokens) if self.sorts else tokens


_LLAMA_TOKENS = {"<bos>": "<|begin_of_text|>", "<eos>": "<|end_of_text|>", "<pad>": "<|finetune_right_pad_id|>"}

LAYOUTS = {
    layout.name: layout
    for layout in (
        KnownLayout(
            name="llasa",
            marks=(
                "<|TEXT_GENERATION_START|>",
                "<|TEXT_GENERATION_END|>",
                "<|TEXT_UNDERSTANDING_START|>",
                "<|TEXT_UNDERSTANDING_END|>",
                "<|SPEECH_GENERATION_START|>",
                "<|SPEECH_GENERATION_END|>",
                "<|SPEECH_UNDERSTANDING_START|>",
                "<|SPEECH_UNDERSTANDING_END|>",
            ),
            sorts=False,
            multiple=1,
            tokens={
                **_LLAMA_TOKENS,
                "<target_text>": "<|TEXT_UNDERSTANDING_START|>",
                "</target_text>": "<|TEXT_UNDERSTANDING_END|>",
                "<speech_start>": "<|SPEECH_GENERATION_START|>",
                "<speech_end>": "<|SPEECH_GENERATION_END|>",
            },
            # The chat template of LLaMA 3.2 Instruct, with the date that it has by default.
            sequences={
                "<target_text>": (
                    "<|start_header_id|>",
                    "system",
                    "<|end_header_id|>",
                    "\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n",
                    "<|eot_id|>",
                    "<|start_header_id|>",
                    "user",
                    "<|end_header_id|>",
                    "\n\n" + _INSTRUCTION,
                    "<|TEXT_UNDERSTANDING_START|>",
                ),
                "</target_text>": (
                    "<|TEXT_UNDERSTANDING_END|>",
                    "<|eot_id|>",
                    "<|start_header_id|>",
                    "assistant",
                    "<|end_header_id|>",
                    "\n\n",
                ),
            },
        ),
        KnownLayout(
            name="inworld",
            marks=(
                "<|speech_start|>",
                "<|speech_end|>",
                "<|text_prompt_start|>",
                "<|text_prompt_end|>",
                "<|voice_description_start|>",
                "<|voice_description_end|>",
                "<|sound_effect_start|>",
                "<|sound_effect_end|>",
            ),
            sorts=True,
            multiple=64,
            tokens={
                **_LLAMA_TOKENS,
                "<target_text>": "<|text_prompt_start|>",
                "</target_text>": "<|text_prompt_end|>",
                "<speech_start>": "<|speech_start|>",
                "<speech_end>": "<|speech_end|>",
            },
            sequences={
                "<target_text>": (_INSTRUCTION, "<|text_prompt_start|>"),
                "</target_text>": ("<|text_prompt_end|>", "\n"),
            },
        ),
    )
}


def known_layout(name: str) -> KnownLayout:
    """The layout called `name`.

    Raises:
        InputError: there is none.
    """
    if name not in LAYOUTS:
        near = nearest(name.lower(), LAYOUTS, cutoff=0.0)
        raise InputError(
            f"--layout {name!r} is not known; nearest: {near!r} (all: {', '.join(LAYOUTS)}; none for the project's own)"
        )
    return LAYOUTS[name]


@dataclass(frozen=True)
class ResolvedLayout:
    """Where the tokens of a layout lie in one tokenizer.

    Attributes:
        text_size: ids below this are text.
        special_ids: name of each special → id.
        sequences: name of a special → what stands in its place in a document.
        code_ids: id of each code.
        size: ids in use.
    """

    text_size: int
    special_ids: dict[str, int]
    sequences: dict[str, tuple[int, ...]]
    code_ids: list[int]
    size: int


def resolve(
    layout: KnownLayout,
    specials: Sequence[str],
    codes: int,
    *,
    token_id: Callable[[str], int | None],
    vocabulary_size: int,
    encode: Callable[[str], list[int]],
    where: str,
) -> ResolvedLayout:
    """Find the layout's tokens in a tokenizer, or place them after its last id.

    Args:
        layout: of whom.
        specials: names that need an id.
        codes: size of the codebook.
        token_id: id of a token of the tokenizer.
        vocabulary_size: its ids, added tokens included.
        encode: ids of plain text.
        where: names the tokenizer in errors.

    Raises:
        InputError: the tokenizer has some of the tokens and lacks others, or has another number of codes.
    """
    appended = layout.appended(codes)
    ids = {token: token_id(token) for token in appended}
    missing = [token for token, number in ids.items() if number is None]
    if len(missing) == len(appended):
        text_size = vocabulary_size
        found = {token: vocabulary_size + i for i, token in enumerate(appended)}
        size = -(-(vocabulary_size + len(appended)) // layout.multiple) * layout.multiple
    elif missing:
        raise InputError(
            f"{where} has tokens of the layout {layout.name} but lacks {len(missing):,} of {len(appended):,}, "
            f"{missing[0]} first; name the tokenizer of that project, and a codec with its {codes:,} codes"
        )
    else:
        found = {token: number for token, number in ids.items() if number is not None}
        text_size, size = min(found.values()), vocabulary_size
        if token_id(CODE_TOKEN.format(codes)) is not None:
            raise InputError(
                f"{where} has a token {CODE_TOKEN.format(codes)}, but the codec has {codes:,} codes; "
                "name the codec that the tokenizer was extended for"
            )

    def known(token: str) -> int | None:
        return found[token] if token in found else token_id(token)

    special_ids: dict[str, int] = {}
    reserved = (known(f"<|reserved_special_token_{i}|>") for i in itertools.count())
    for name in specials:
        own = known(layout.tokens[name]) if name in layout.tokens else None
        if own is None:
            own = next(reserved)
            if own is None:  # no more reserved tokens: new ids, whose rows an import draws
                own, size = size, size + 1
                reserved = iter([None] * len(specials))  # type: ignore[assignment]
        special_ids[name] = own
    sequences = {}
    for name, parts in layout.sequences.items():
        sequence: list[int] = []
        for part in parts:
            if not part.startswith("<|"):
                sequence += encode(part)
                continue
            number = known(part)
            if number is None:
                raise InputError(f"{where} lacks {part}, which the prompt of {layout.name} holds; name its tokenizer")
            sequence.append(number)
        sequences[name] = tuple(sequence)
    return ResolvedLayout(
        text_size, special_ids, sequences, [found[CODE_TOKEN.format(code)] for code in range(codes)], size
    )
