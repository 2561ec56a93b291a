"""Task type → document: the one template compiler of preprocessing, training and generation.

The grammar is dumb and deterministic. A template is a row of parts: a special's name, or a field that the caller
fills with ids. Choices (which reference, which transcript, what is learned) are made before or after.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from megatron_speech.errors import InputError
from megatron_speech.files import canonical_json, sha256_hex
from megatron_speech.tokens.layouts import OWN
from megatron_speech.tokens.space import TokenSpace

TASKS = ("speech_lm", "tts", "text_lm", "asr", "interleaved")

# The fields of a template. What follows `prompt_end` is the target: what generation produces and SFT learns.
TEXT, CODES, PROMPT_CODES, REF_TEXT, REF_CODES, TURNS, SEGMENTS = (
    "{text}",
    "{codes}",
    "{prompt_codes}",
    "{ref_text}",
    "{ref_codes}",
    "{turns}",
    "{segments}",
)

TEMPLATES: dict[str, dict[str, tuple[str, ...]]] = {
    "speech_lm": {
        "plain": ("<bos>", "<speech_start>", CODES, "<speech_end>"),
        "continuation": ("<bos>", "<speech_start>", PROMPT_CODES, "<speech_sep>", CODES, "<speech_end>"),
    },
    "tts": {
        "plain": ("<bos>", "<target_text>", TEXT, "</target_text>", "<speech_start>", CODES, "<speech_end>"),
        "cloning": (
            "<bos>",
            "<ref_text>",
            REF_TEXT,
            "</ref_text>",
            "<ref_speech>",
            REF_CODES,
            "</ref_speech>",
            "<target_text>",
            TEXT,
            "</target_text>",
            "<speech_start>",
            CODES,
            "<speech_end>",
        ),
    },
    "text_lm": {
        "plain": ("<bos>", TEXT, "<eos>"),
        "turns": ("<bos>", TURNS),
    },
    # Begins as speech alone does: what was learned of speech serves it.
    "asr": {
        "plain": ("<bos>", "<speech_start>", CODES, "<speech_end>", "<target_text>", TEXT, "</target_text>"),
    },
    # Segments of one recording that follow each other, each as text or as speech (`segment_ids`). Text stands bare: in
    # `<target_text>` it would be what the speech after it says.
    "interleaved": {
        "plain": ("<bos>", SEGMENTS, "<eos>"),
    },
}

# Other projects' models know no marks of a reference: a speaker is cloned by continuing the reference's speech
# (`compile_prompt`).
_KNOWN_LAYOUTS_TTS = {"plain": TEMPLATES["tts"]["plain"]}

# SFT learns what follows this special; everything up to and including its first one is the prompt.
PROMPT_END = "<speech_start>"
# In tasks whose target is text it is this one.
TEXT_PROMPT_END = "<target_text>"
TEXT_TARGETS = ("asr",)
# Tasks of which every token is learned, whatever a stage's loss.prompt says.
PROMPTLESS_TASKS = ("text_lm",)

SYSTEM = "system"
ROLES = ("user", "assistant", SYSTEM)

# The role `system` came later, and changes no document that has no such turn: datasets without one stay what they are.
_HASHED_ROLES = ["user", "assistant"]
# The tasks that there were first share a hash: datasets of them stay what they are when others come.
_FIRST_TASKS = ("speech_lm", "tts", "text_lm")
TEMPLATE_HASH = sha256_hex(
    canonical_json(
        {
            "templates": {task: TEMPLATES[task] for task in _FIRST_TASKS},
            "prompt_end": PROMPT_END,
            "roles": _HASHED_ROLES,
        }
    )
)

Ids = np.ndarray


def prompt_end(task: str) -> str:
    """The special that ends the prompt of a task's documents."""
    return TEXT_PROMPT_END if task in TEXT_TARGETS else PROMPT_END


def template_hash(task: str) -> str:
    """What a dataset's documents of this task are made by: equal hashes mean equal templates."""
    if task in _FIRST_TASKS:
        return TEMPLATE_HASH
    return sha256_hex(canonical_json({"templates": TEMPLATES[task], "prompt_end": prompt_end(task)}))


def templates(space: TokenSpace, task: str) -> dict[str, tuple[str, ...]]:
    """The forms of a task's documents in this id space: name → template.

    Raises:
        InputError: unknown task, or a space of several streams.
    """
    space.require_one_stream("a task template")
    if task not in TEMPLATES:
        raise InputError(f"task {task!r} is unknown; needed: one of {', '.join(TASKS)}")
    if space.layout != OWN and task not in _FIRST_TASKS:
        raise InputError(
            f"task {task} is made for the project's own id space, and this one has the layout of {space.layout}, whose "
            f"models know no such documents; needed: one of {', '.join(_FIRST_TASKS)}"
        )
    return _KNOWN_LAYOUTS_TTS if task == "tts" and space.layout != OWN else TEMPLATES[task]


def _variant(space: TokenSpace, task: str, given: set[str]) -> tuple[str, tuple[str, ...]]:
    """The one template of `task` whose fields are exactly those given."""
    forms = templates(space, task)
    for name, template in forms.items():
        if {part for part in template if part.startswith("{")} == given:
            return name, template
    wanted = "; or ".join(
        f"{name}: {' '.join(part for part in template if part.startswith('{'))}" for name, template in forms.items()
    )
    raise InputError(f"task {task} was given {' '.join(sorted(given)) or 'nothing'}; needed: {wanted}")


def check_role(space: TokenSpace, role: str) -> None:
    """Refuse a role of turns whose specials the id space lacks: those made before there was the role.

    Raises:
        InputError: says what to do.
    """
    if f"<{role}>" not in space.special_ids:
        raise InputError(
            f"a turn of the role {role} needs the special <{role}>, which the token space {space.hash[:12]} lacks; "
            "make a new one with `megatron-speech token-space` (and convert everything of the run with it), or leave "
            "such turns out"
        )


def turn_ids(space: TokenSpace, turns: Sequence[tuple[str, Ids]]) -> Ids:
    """Turns of (role, ids) end to end, each between the specials of its role: what fills the field TURNS.

    Raises:
        InputError: an unknown role, or one whose specials the id space lacks.
    """
    parts: list[Ids | list[int]] = []
    for role, ids in turns:
        if role not in ROLES:
            raise InputError(f"role {role!r} of a turn is unknown; needed: {' or '.join(ROLES)}")
        check_role(space, role)
        parts += [list(space.sequence(f"<{role}>")), ids, list(space.sequence(f"</{role}>"))]
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def segment_ids(space: TokenSpace, segments: Sequence[tuple[str, Ids]]) -> Ids:
    """Segments of a recording end to end: what fills the field SEGMENTS, int32 [n].

    Args:
        space: the id space.
        segments: ("text", ids of its transcript) or ("speech", ids of its codes), in the recording's order.

    Raises:
        InputError: another kind of segment.
    """
    parts: list[Ids | tuple[int, ...]] = []
    for kind, ids in segments:
        if kind == "speech":
            parts += [space.sequence("<speech_start>"), ids, space.sequence("<speech_end>")]
        elif kind == "text":
            parts.append(ids)
        else:
            raise InputError(f"segment {kind!r} is unknown; needed: text or speech")
    return np.concatenate(parts).astype(np.int32) if parts else np.zeros(0, np.int32)


def _fields(
    space: TokenSpace,
    text_ids: Ids | None,
    code_ids: Ids | None,
    prompt_code_ids: Ids | None,
    ref_text_ids: Ids | None,
    ref_code_ids: Ids | None,
    turns: Sequence[tuple[str, Ids]] | None,
    segments: Sequence[tuple[str, Ids]] | None = None,
) -> dict[str, Ids]:
    values = {
        TEXT: text_ids,
        CODES: code_ids,
        PROMPT_CODES: prompt_code_ids,
        REF_TEXT: ref_text_ids,
        REF_CODES: ref_code_ids,
        TURNS: None if turns is None else turn_ids(space, turns),
        SEGMENTS: None if segments is None else segment_ids(space, segments),
    }
    return {name: np.asarray(value, dtype=np.int32) for name, value in values.items() if value is not None}


def compile_document(
    space: TokenSpace,
    task: str,
    *,
    text_ids: Ids | None = None,
    code_ids: Ids | None = None,
    prompt_code_ids: Ids | None = None,
    ref_text_ids: Ids | None = None,
    ref_code_ids: Ids | None = None,
    turns: Sequence[tuple[str, Ids]] | None = None,
    segments: Sequence[tuple[str, Ids]] | None = None,
    append_eod: bool = False,
) -> Ids:
    """One document of `task`, int32 [n].

    Which fields are given decides the form: `speech_lm` takes code_ids (plain) or prompt_code_ids + code_ids
    (continuation); `tts` takes text_ids + code_ids (plain), with ref_text_ids + ref_code_ids too (cloning);
    `text_lm` takes text_ids, or turns of (role, ids); `asr` takes code_ids + text_ids; `interleaved` takes segments.

    Args:
        space: the id space that the ids belong to.
        task: one of `TASKS`.
        text_ids, ref_text_ids: `space.encode_text` output, int [n].
        code_ids, prompt_code_ids, ref_code_ids: `space.encode_codes` output, int [frames * codebooks].
        turns: (role, ids) with role "user", "assistant" or "system".
        segments: (kind, ids) with kind "text" or "speech".
        append_eod: end the document with `<eos>` where the template does not.

    Raises:
        InputError: unknown task or role, or a set of fields that no form of the task has.
    """
    fields = _fields(space, text_ids, code_ids, prompt_code_ids, ref_text_ids, ref_code_ids, turns, segments)
    _, template = _variant(space, task, set(fields))
    parts = [fields[part] if part.startswith("{") else space.sequence(part) for part in template]
    if append_eod and template[-1] != "<eos>":
        parts.append(space.sequence("<eos>"))
    return np.concatenate(parts).astype(np.int32, copy=False)


def compile_prompt(
    space: TokenSpace,
    task: str,
    *,
    text_ids: Ids | None = None,
    code_ids: Ids | None = None,
    prompt_code_ids: Ids | None = None,
    ref_text_ids: Ids | None = None,
    ref_code_ids: Ids | None = None,
) -> Ids:
    """The part of a document before its target, int32 [n]: what generation starts from.

    Takes the fields of :func:`compile_document` without the target: codes, or in the task `asr` text. For `tts` it
    ends with `<speech_start>`, for a continuation with `<speech_sep>`, for `asr` with `<target_text>`.

    Raises:
        InputError: a task that has no target, or a set of fields that no form of the task has.
    """
    fields = _fields(space, text_ids, code_ids, prompt_code_ids, ref_text_ids, ref_code_ids, None)
    target = TEXT if task in TEXT_TARGETS else CODES
    _, template = _variant(space, task, {*fields, target})
    head = template[: template.index(target)]
    parts = [fields[part] if part.startswith("{") else space.sequence(part) for part in head]
    return np.concatenate(parts).astype(np.int32, copy=False)


def compile_cloning_prompt(space: TokenSpace, text: str, ref_text: str, ref_code_ids: Ids) -> Ids:
    """The prompt of `tts` with a reference speaker, int32 [n].

    In the project's own id space it is :func:`compile_prompt`'s. The models of other layouts are given both texts as
    one and the reference's codes as the beginning of the speech.

    Args:
        space: the id space.
        text, ref_text: the text to synthesise, and the transcript of the reference.
        ref_code_ids: the reference, `space.encode_codes` output.
    """
    if space.layout == OWN:
        text_ids, ref_text_ids = space.encode_text_batch([text, ref_text])
        return compile_prompt(space, "tts", text_ids=text_ids, ref_text_ids=ref_text_ids, ref_code_ids=ref_code_ids)
    head = compile_prompt(space, "tts", text_ids=space.encode_text(f"{ref_text} {text}"))
    return np.concatenate([head, np.asarray(ref_code_ids, dtype=np.int32)])


def count_target_tokens(space: TokenSpace, document: Ids, task: str = "tts") -> int:
    """Tokens after the first end of a prompt of `task`: what SFT learns. 0 for a document without one."""
    found = np.flatnonzero(document == space.special(prompt_end(task)))
    return int(len(document) - 1 - found[0]) if len(found) else 0


def render(space: TokenSpace, ids: Ids, *, max_frames: int = 4) -> str:
    """A document as a person reads it: specials by name, text as text, codes as `[n frames: …]`.

    Raises:
        InputError: a space of several streams.
    """
    space.require_one_stream("rendering")
    ids = np.asarray(ids).astype(np.int64)
    names = {value: name for name, value in space.special_ids.items()}
    special = np.isin(ids, list(names))
    known = (ids >= 0) & (ids < space.padded_size)
    audio = known & (space.codebook_table()[np.where(known, ids, 0)] >= 0)
    kind = np.where(special, -1 - np.arange(len(ids)), np.where(audio, 1, 0))  # every special is a run of its own
    edges = np.flatnonzero(np.diff(kind, prepend=np.nan, append=np.nan) != 0) if len(ids) else np.zeros(1, np.int64)
    words = []
    for start, end in itertools.pairwise(edges):
        run = ids[start:end]
        if special[start]:
            words.append(names[int(run[0])])
        elif audio[start]:
            words.append(_render_codes(space, run, max_frames))
        elif (run < space.text_size).all() and run.min() >= 0:
            words.append(space.decode_text(run))
        else:
            words.append(f"[{len(run)} ids outside the token space: {int(run[0])} …]")
    return " ".join(words)


def _render_codes(space: TokenSpace, ids: Ids, max_frames: int) -> str:
    count = space.codebook_count
    codes = [str(code) for code in space.code_table()[ids[: max_frames * count]].tolist()]
    frames = " | ".join(",".join(codes[i : i + count]) for i in range(0, len(codes), count))
    more = " …" if len(ids) > max_frames * count else ""
    unit = "frame" if len(ids) == count else "frames"
    return f"[{len(ids) / count:g} {unit}: {frames}{more}]"
