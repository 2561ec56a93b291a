"""Finds or builds the CUDA kernels' shared library, and calls it. Nothing here is imported without CUDA in use.

A library that was built at installation lies in the package. Otherwise it is built on first use, by the first
process that asks (others of the machine wait for it), into `~/.cache/megatron_speech` (or
MEGATRON_SPEECH_CACHE), under a name that holds the hash of the sources and the architecture.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import logging
import os
from pathlib import Path

from megatron_speech.ops import nvcc

logger = logging.getLogger(__name__)

_PACKAGE = Path(__file__).resolve().parents[1]


def source_directory() -> Path:
    """The CUDA sources: in an installed package its own copy, in a checkout `csrc/`."""
    installed = _PACKAGE / "csrc"
    return installed if installed.is_dir() else _PACKAGE.parent / "csrc"


def cache_directory() -> Path:
    """Where libraries that are built on first use are kept."""
    asked = os.environ.get("MEGATRON_SPEECH_CACHE")
    return Path(asked) if asked else Path.home() / ".cache" / "megatron_speech"


def architecture_of(capability: tuple[int, int]) -> str:
    """What to build for a device of compute capability (major, minor), unless MEGATRON_SPEECH_CUDA_ARCH says."""
    if os.environ.get("MEGATRON_SPEECH_CUDA_ARCH"):
        return nvcc.architectures()[0]
    # "a" (architecture-specific) exists from Hopper on; older devices have plain names.
    return f"{capability[0]}{capability[1]}" + ("a" if capability[0] >= 9 else "")


def ensure_built(architecture: str) -> Path:
    """Path of the library for `architecture`, built now if it is in neither the package nor the cache.

    Raises:
        nvcc.BuildError: it has to be built and cannot be.
    """
    sources = source_directory()
    built_from = nvcc.source_hash(sources)
    installed = _PACKAGE / nvcc.library_name(architecture)
    if installed.exists() and _open(installed).megatron_speech_cuda_source_hash() == built_from.encode():
        return installed
    directory = cache_directory()
    library = directory / f"{built_from}{nvcc.library_name(architecture)}"
    if not library.exists():
        directory.mkdir(parents=True, exist_ok=True)
        with open(directory / f"{library.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed, also by a killed process
            if not library.exists():
                logger.info("building the CUDA kernels for sm_%s into %s", architecture, library)
                nvcc.build(sources, library, architecture)
    return library


@functools.cache
def load(capability: tuple[int, int]) -> tuple[ctypes.CDLL | None, str]:
    """The library for a device of compute capability (major, minor) and "", or None and why there is none."""
    try:
        return _open(ensure_built(architecture_of(capability))), ""
    except (nvcc.BuildError, OSError) as error:
        return None, str(error)


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.megatron_speech_cuda_source_hash.restype = ctypes.c_char_p
    library.megatron_speech_cuda_error.restype = ctypes.c_char_p
    library.megatron_speech_cuda_error.argtypes = [ctypes.c_int]
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    launch = library.megatron_speech_loss_mask
    launch.restype = ctypes.c_int
    launch.argtypes = [pointer] * 6 + [integer] * 7 + [pointer] * 11
    return library
