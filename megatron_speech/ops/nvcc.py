"""How the CUDA kernels are compiled: one place for setup.py, the build on first use and the compile check.

Imports the standard library only: setup.py loads this file by its path before anything is installed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

DEFAULT_ARCHITECTURE = "90a"  # H100, H200


class BuildError(RuntimeError):
    """nvcc is missing, or refused the sources; the message holds what it said."""


def find_nvcc() -> str | None:
    """Path of nvcc: from CUDA_HOME, else from PATH, else from /usr/local/cuda; None when there is none."""
    home = os.environ.get("CUDA_HOME")
    if home:
        found = shutil.which("nvcc", path=str(Path(home) / "bin"))
        if found:
            return found
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def architectures() -> list[str]:
    """Compute capabilities to build for, as nvcc spells them: MEGATRON_SPEECH_CUDA_ARCH ("90a" or "80;90a")."""
    asked = os.environ.get("MEGATRON_SPEECH_CUDA_ARCH", "").replace(";", " ").replace(",", " ").split()
    return asked or [DEFAULT_ARCHITECTURE]


def library_name(architecture: str) -> str:
    """File name of the kernels' library for one architecture."""
    return f"_cuda_sm{architecture}.so"


def source_hash(directory: Path) -> str:
    """What a library is built from: a hash of the .cu file and the header that it includes."""
    digest = hashlib.sha256()
    for name in ("loss_mask.cu", "loss_mask.h"):
        digest.update((directory / name).read_bytes())
    return digest.hexdigest()[:16]


def compile_command(nvcc: str, source: Path, output: Path, architecture: str, *flags: str) -> list[str]:
    """The nvcc command line; warnings of the device and of the host compiler are errors."""
    return [
        nvcc,
        f"-gencode=arch=compute_{architecture},code=sm_{architecture}",
        "-std=c++17",
        "-O3",
        "-Werror",
        "all-warnings",
        "-Xcompiler=-Wall,-Wextra,-Werror,-fPIC,-fvisibility=hidden",
        *flags,
        "-o",
        str(output),
        str(source),
    ]


def run_compiler(command: list[str]) -> str:
    """Run `command` and return what it printed.

    Raises:
        BuildError: it cannot be started or fails.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be started: {error}") from error
    printed = (done.stdout + done.stderr).strip()
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)} failed with status {done.returncode}:\n{printed}")
    return printed


def build(sources: Path, library: Path, architecture: str) -> None:
    """Build the kernels of directory `sources` into the shared library `library`, whole or not at all.

    Raises:
        BuildError: there is no nvcc, or it fails.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError("nvcc is not on PATH, in CUDA_HOME or in /usr/local/cuda; install the CUDA toolkit")
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-") as scratch:
        output = Path(scratch) / library.name
        define = f'-DMS_SOURCE_HASH="{source_hash(sources)}"'
        run_compiler(compile_command(nvcc, sources / "loss_mask.cu", output, architecture, "-shared", define))
        os.replace(output, library)
