"""The one place that loads the compiled extension `megatron_speech._C`, and says once when it is not there.

Without it everything still runs, on the PyTorch and NumPy references: slower, same results. Setting
`MEGATRON_SPEECH_NO_EXTENSION=1` asks for that on purpose.
"""

from __future__ import annotations

import functools
import importlib
import logging
import multiprocessing
import os
from types import ModuleType

# Raised together with `interface` in csrc/bindings.cpp whenever a signature changes, so that a build left
# over from older sources is refused instead of called wrongly.
INTERFACE = 7

logger = logging.getLogger(__name__)


@functools.cache
def _find() -> tuple[ModuleType | None, str]:
    """The extension and "", or None and the reason why there is none."""
    if os.environ.get("MEGATRON_SPEECH_NO_EXTENSION", "0") not in ("", "0"):
        return None, "MEGATRON_SPEECH_NO_EXTENSION is set"
    try:
        module = importlib.import_module("megatron_speech._C")
    except ImportError as error:
        return None, f"it was not built, or cannot be loaded: {error}"
    built = getattr(module, "interface", None)
    if built != INTERFACE:
        return None, f"it was built from other sources (interface {built}, needed {INTERFACE})"
    return module, ""


@functools.cache
def _say_missing(reason: str) -> None:
    # One voice per command: not in worker processes, and of a torchrun group only rank 0.
    if multiprocessing.parent_process() is None and os.environ.get("RANK", "0") == "0":
        logger.warning(
            "the compiled extension megatron_speech._C is not used (%s): loss masks and packing run on their PyTorch "
            "and NumPy references, slower with the same results; with a C++ compiler, reinstall to build it",
            reason,
        )


def extension() -> ModuleType | None:
    """The compiled extension, or None after saying once (per command) why the references run instead."""
    module, reason = _find()
    if module is None:
        _say_missing(reason)
    return module


def extension_status() -> str:
    """What `environment.json` says about the extension: "loaded", or why it is not."""
    module, reason = _find()
    return "loaded" if module is not None else f"not used: {reason}"
