"""Frozen audio codecs by name: those of the project, and those that other packages register.

A package offers one by an entry point: in its pyproject.toml, under
`[project.entry-points."megatron_speech.codecs"]`, a line `mycodec = "my_package.codec:MyCodec"` that names a class
without constructor arguments which satisfies :class:`Codec`.
"""

from __future__ import annotations

import importlib.metadata

from megatron_speech.codecs.base import Codec
from megatron_speech.errors import InputError
from megatron_speech.tokens.space import CodecDescription
from megatron_speech.wording import nearest

__all__ = ["Codec", "codec_names", "describe_codec", "get_codec"]

ENTRY_POINT_GROUP = "megatron_speech.codecs"

# Also known where the package is on the path but not installed.
_BUILT_IN = {"codec2": "megatron_speech.codecs.codec2:Codec2"}


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
        InputError: there is none of that name (the nearest is named), or what it needs is not installed.
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
    codec = factory()
    if not isinstance(codec, Codec):
        raise InputError(f"the codec {name!r} ({point.value}) does not satisfy megatron_speech.codecs.Codec")
    return codec


def describe_codec(name: str) -> CodecDescription:
    """Rates, codebooks and hash of the codec called `name`. Raises like :func:`get_codec`."""
    return get_codec(name).describe()
