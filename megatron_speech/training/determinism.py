"""The same numbers from the same run, bit for bit, on GPUs too."""

from __future__ import annotations

import os

from megatron_speech.errors import InputError

ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # cuBLAS: one workspace size, so one order of summation
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",  # Transformer Engine: attention's backward pass without atomics
    "NCCL_ALGO": "Ring",  # NCCL: the order of summation does not follow the sizes and the load
}
"""What libraries read when they are first used."""

_ALLOWED = {"CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"), "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",)}


def set_determinism(on: bool) -> None:
    """Let torch choose deterministic kernels only, and configure the libraries below it; before their first use.

    An operation that has no deterministic kernel then raises a RuntimeError that names it. What a process has of
    these variables already is kept, if it serves.

    Raises:
        InputError: a variable of the environment is set to what would let results vary.
    """
    import torch

    for name, value in ENVIRONMENT.items() if on else ():
        found = os.environ.setdefault(name, value)
        if found not in _ALLOWED.get(name, (found,)):
            raise InputError(
                f"deterministic is true, but the environment has {name}={found}; unset it, or set it to {value}"
            )
    torch.use_deterministic_algorithms(on)
