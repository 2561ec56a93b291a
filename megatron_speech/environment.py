"""What this process runs on: detected once, printed once, written to RUN/environment.json.

Light to import: no torch. :func:`prepare_imports` has to run before the first `import megatron.core`.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import platform
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_speech import __version__
from megatron_speech.errors import InputError
from megatron_speech.ops.extension import extension_status

OPTIONAL = ("transformer-engine", "flash-attn", "wandb", "transformers", "tensorboard")
"""Distributions that something here can use when they are there; none is required."""

REQUIRED = ("torch", "megatron-core", "numpy", "pydantic", "omegaconf", "pyarrow")
"""Distributions whose versions belong to the record of a run."""


def apex_kind() -> tuple[str, str | None]:
    """What `import apex` would find: ("none" | "nvidia" | "foreign", its location).

    NVIDIA's apex has `apex/optimizers` and `apex/normalization`. The package that PyPI has carried as `apex`
    since 2013 is a web toolkit; megatron-core imports either one by name.
    """
    if sys.modules.get("apex", ...) is None:
        return "none", None  # hidden by hide_foreign_apex
    try:
        spec = importlib.util.find_spec("apex")
    except (ImportError, ValueError):
        return "none", None
    if spec is None:
        return "none", None
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    location = str(folders[0]) if folders else spec.origin
    nvidia = any((folder / "optimizers").is_dir() and (folder / "normalization").is_dir() for folder in folders)
    return ("nvidia" if nvidia else "foreign"), location


_hidden_apex: str | None = None


def hide_foreign_apex() -> str | None:
    """Make `import apex` fail when what it would find is not NVIDIA's; returns the location hidden, or None.

    megatron-core takes any importable `apex` for NVIDIA's and builds its layers from it. A None in
    `sys.modules` is Python's own way to say that a module is not to be imported, so megatron-core then sees
    the same thing as on a machine without apex.
    """
    global _hidden_apex
    kind, location = apex_kind()
    if kind == "foreign":
        for name in [name for name in sys.modules if name == "apex" or name.startswith("apex.")]:
            del sys.modules[name]
        sys.modules["apex"] = None  # type: ignore[assignment]
        _hidden_apex = location
    return _hidden_apex


class _LazyFuser(importlib.abc.MetaPathFinder):
    """Lets megatron-core fuse functions when they are called, not when they are defined.

    Its decorator is `torch.compile`, which imports half of torch to wrap a function, although on a CPU none of them is
    ever called: two seconds of every command.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """Of `megatron.core.jit` alone: the module as it is, with another decorator."""
        if name != "megatron.core.jit":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                load(module)
                module.jit_fuser = _compiled_when_called(module.jit_fuser)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _compiled_when_called(decorator: Callable[..., Any]) -> Callable[..., Any]:
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled: list[Callable[..., Any]] = []

        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            if not compiled:
                compiled.append(decorator(function))
            return compiled[0](*arguments, **options)

        return call

    return decorate


def prepare_imports() -> None:
    """Call before the first `import megatron.core`: hides a foreign apex, and a dozen notices about absent extras.

    What is present and absent is printed once, by :func:`describe`. Functions that megatron-core fuses are compiled
    when they are first called.
    """
    hide_foreign_apex()
    if "megatron.core.jit" not in sys.modules and not any(isinstance(one, _LazyFuser) for one in sys.meta_path):
        sys.meta_path.insert(0, _LazyFuser())
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    # A checkpoint of a run on one process is saved without collectives, which torch thinks worth a notice.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)


def host_name() -> str:
    """The name that an administrator knows this node by: SLURM's, else the system's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def rank_and_size() -> tuple[int, int]:
    """RANK and WORLD_SIZE of a launcher; (0, 1) without one.

    Raises:
        InputError: one without the other, no integers, or a rank outside the world.
    """
    rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is None and (size is None or size == "1"):
        return 0, 1
    if size is None or rank is None:
        present, absent = ("RANK", "WORLD_SIZE") if size is None else ("WORLD_SIZE", "RANK")
        raise InputError(
            f"{present} is set and {absent} is not: a launcher (torchrun, srun) sets both; unset {present} to run one "
            f"process, or set both"
        )
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise InputError(
            f"RANK is {rank!r} and WORLD_SIZE {size!r}; needed are integers, with RANK from 0 to WORLD_SIZE - 1"
        )
    return int(rank), int(size)


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_state() -> dict[str, Any] | None:
    """Commit of the checkout that this package runs from; None when it is installed without one."""
    folder = Path(__file__).resolve().parents[1]
    if not (folder / ".git").exists():
        return None
    try:
        commit = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True)
        status = subprocess.run(
            ["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
        )
    except OSError:  # no git on this machine
        return None
    if commit.returncode:
        return None
    return {"commit": commit.stdout.strip(), "modified": bool(status.stdout.strip())}


def detect() -> dict[str, Any]:
    """The environment as a JSON-able dict. Imports torch; calls :func:`hide_foreign_apex` first."""
    hidden = hide_foreign_apex()
    import torch

    kind, location = apex_kind()
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "megatron-speech": __version__,
        **{name: installed_version(name) for name in REQUIRED},
        "optional": {name: installed_version(name) for name in OPTIONAL},
        "nvidia-apex": location if kind == "nvidia" else None,
        "foreign-apex": hidden,
        "ops": extension_status(),
        "cuda": torch.version.cuda,
        "devices": [{"name": device.name, "memory_gib": device.total_memory / 2**30} for device in devices],
        "cpu_threads": torch.get_num_threads(),
        "git": _git_state(),
    }


def describe(environment: dict[str, Any]) -> str:
    """One or two readable lines of :func:`detect`'s result."""
    devices = environment["devices"]
    device = f"{len(devices)} × {devices[0]['name']}" if devices else f"CPU, {environment['cpu_threads']} threads"
    present = [f"{name} {version}" for name, version in environment["optional"].items() if version]
    absent = [name for name, version in environment["optional"].items() if not version]
    if environment["nvidia-apex"]:
        present.append("NVIDIA apex")
    else:
        absent.append("NVIDIA apex")
    line = (
        f"torch {environment['torch']}, megatron-core {environment['megatron-core']}, Python {environment['python']}; "
        f"{device}; ops: {environment['ops']}; with {', '.join(present) or 'nothing optional'}; "
        f"without {', '.join(absent)}"
    )
    if environment["foreign-apex"]:
        line += (
            f"\nnote: {environment['foreign-apex']} is not NVIDIA apex (PyPI's `apex` is a web toolkit of 2013); it is "
            "kept from megatron-core. `pip uninstall apex` removes it."
        )
    return line
