"""Frozen audio codecs by name: those of the project, and those that other packages register.

A package offers one by an entry point: in its pyproject.toml, under
`[project.entry-points."megatron_speech.codecs"]`, a line `mycodec = "my_package.codec:MyCodec"` that names a class
without constructor arguments which satisfies :class:`Codec`.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata

from megatron_speech.codecs.base import Codec, check_codes, decode_checked, encode_checked
from megatron_speech.errors import InputError
from megatron_speech.tokens.space import CodecDescription, check_description
from megatron_speech.wording import nearest

__all__ = [
    "Codec",
    "check_codes",
    "codec_names",
    "decode_checked",
    "describe_codec",
    "encode_checked",
    "get_codec",
]

ENTRY_POINT_GROUP = "megatron_speech.codecs"

# Also known where the package is on the path but not installed.
_BUILT_IN = {"codec2": "megatron_speech.codecs.codec2:Codec2"}


_MEMBERS = (
    "name",
    "hash",
    "sample_rate_hz",
    "frame_rate_hz",
    "codebook_names",
    "codebook_sizes",
    "encode",
    "decode",
    "describe",
)


def _registered() -> dict[str, importlib.metadata.EntryPoint]:
    found = {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)}
    # The project's own come last: another package cannot stand in for a name that datasets already carry.
    found |= {name: importlib.metadata.EntryPoint(name, value, ENTRY_POINT_GROUP) for name, value in _BUILT_IN.items()}
    return found


def codec_names() -> list[str]:
    """All names that `get_codec` knows here, sorted."""
    return sorted(_registered())


def get_codec(name: str) -> Codec:
    """The codec called `name`, ready to encode and decode.

    Raises:
        InputError: there is none of that name (the nearest is named), what it needs is not installed, or its rates
            and codebooks are none.
    """
    registered = _registered()
    if name not in registered:
        near = nearest(name.lower(), registered)
        raise InputError(
            f"there is no codec {name!r}"
            + (f"; did you mean {near!r}?" if near else "")
            + f" Known here: {', '.join(sorted(registered))}; others register in the entry-point group "
            f"{ENTRY_POINT_GROUP!r}"
        )
    point = registered[name]
    try:
        factory = point.load()
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"the codec {name!r} ({point.value}) cannot be loaded: {error}; reinstall its package"
        ) from error
    try:
        codec = factory()
    except InputError:
        raise
    except Exception as error:  # another package's code: whatever it raises is why there is no codec
        raise InputError(
            f"the codec {name!r} ({point.value}) cannot be made: {type(error).__name__}: {error}; the class must need "
            "no arguments, and say what it lacks"
        ) from error
    where = f"the codec {name!r} ({point.value})"
    lacking = [member for member in _MEMBERS if not hasattr(type(codec), member) and not hasattr(codec, member)]
    if lacking:
        raise InputError(
            f"{where} does not satisfy megatron_speech.codecs.Codec: it has no {', '.join(lacking)}; see docs/codecs.md"
        )
    check_description(where, codec.sample_rate_hz, codec.frame_rate_hz, codec.codebook_names, codec.codebook_sizes)
    return codec


def describe_codec(name: str) -> CodecDescription:
    """Rates, codebooks and hash of the codec called `name`. Raises like :func:`get_codec`.

    Raises:
        InputError: it describes itself otherwise than its attributes do.
    """
    codec = get_codec(name)
    description = codec.describe()
    for field in dataclasses.fields(CodecDescription):
        said, has = getattr(description, field.name, None), getattr(codec, field.name)
        if said != (tuple(has) if isinstance(has, list) else has):
            raise InputError(
                f"the codec {name!r} describes its {field.name} as {said!r}, but has {has!r}; make them one"
            )
    return description
