"""Builds the compiled kernels; everything else about the package stands in pyproject.toml.

Nothing of torch is needed to build: the CPU kernels take NumPy arrays (pybind11), the CUDA kernels are a plain
shared library that nvcc builds. A build that fails never stops the installation: the package then runs on its
PyTorch and NumPy references.

MEGATRON_SPEECH_CUDA=1 builds the CUDA kernels now, =0 never does; unset, they are built when nvcc and an NVIDIA
GPU are both there. Where they were not built, they are on first use (megatron_speech/ops/cuda_library.py).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import BaseError, CCompilerError

ROOT = Path(__file__).parent
CUDA_SOURCES = ("loss_mask.cu", "loss_mask.h")
CPU_SOURCES = (
    "bindings", "loader_bindings", "text_bindings",
    "loss_mask", "sequence_index", "blend_order", "bucketing", "gather", "byte_bpe",
)  # fmt: skip
CPU_HEADERS = ("kernels", "loader_bindings", "text_bindings", "bucketing", "gather", "byte_bpe")


def note(*lines: str) -> None:
    """Say something that stands out of a build log."""
    print("\n".join(["", *(f"megatron-speech: {line}" for line in lines), ""]), file=sys.stderr, flush=True)


def nvcc_module() -> ModuleType:
    """megatron_speech/ops/nvcc.py by its path: importing the package would ask for its dependencies."""
    spec = importlib.util.spec_from_file_location("_nvcc", ROOT / "megatron_speech" / "ops" / "nvcc.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wants_cuda(nvcc: str | None) -> bool:
    """Whether this installation is to build the CUDA kernels."""
    asked = os.environ.get("MEGATRON_SPEECH_CUDA")
    if asked is not None:
        return asked not in ("", "0")
    return nvcc is not None and (Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None)


class BuildKernels(build_ext):
    """Builds what can be built, and says clearly what could not."""

    def run(self) -> None:
        """Build the C++ extension, then the CUDA library if it is wanted."""
        try:
            super().run()
        except (BaseError, CCompilerError, OSError) as error:
            self.say_not_built(error)
        self.build_cuda()

    def build_extension(self, ext: Extension) -> None:
        """Build one extension; a failure is said and passed over."""
        try:
            super().build_extension(ext)
        except (BaseError, CCompilerError, OSError) as error:
            self.say_not_built(error)

    def say_not_built(self, error: Exception) -> None:
        """What is missing, what that means, and what to do."""
        note(
            f"the C++ kernels were NOT built ({error}).",
            "The package works without them: what they do runs on PyTorch and NumPy, slower.",
            "To have them, install a C++17 compiler (Debian, Ubuntu: apt install g++ python3-dev) and install again.",
        )

    def build_cuda(self) -> None:
        """Build the CUDA library, one per architecture, into the package."""
        nvcc = nvcc_module()
        if not wants_cuda(nvcc.find_nvcc()):
            return
        package = ROOT / "megatron_speech" if self.inplace else Path(self.build_lib) / "megatron_speech"
        for arch in nvcc.architectures():
            try:
                nvcc.build(ROOT / "csrc", package / nvcc.library_name(arch), arch)
            except nvcc.BuildError as error:
                note(
                    f"the CUDA kernels were NOT built: {error}", "They are built on first use where nvcc and a GPU are."
                )
                return


class CopyCudaSources(build_py):
    """An installed package carries the CUDA sources, so that it can build them on the machine that has the GPU."""

    def run(self) -> None:
        """Copy Python files as usual, then the CUDA sources."""
        super().run()
        if self.editable_mode:
            return  # found in csrc/ of the checkout
        target = Path(self.build_lib) / "megatron_speech" / "csrc"
        target.mkdir(parents=True, exist_ok=True)
        for name in CUDA_SOURCES:
            shutil.copyfile(ROOT / "csrc" / name, target / name)


def extensions() -> list[Extension]:
    """The C++ extension, or nothing where it cannot even be described."""
    try:
        import pybind11
    except ImportError:
        note("pybind11 is not there, so the C++ kernels are NOT built; the package runs on its references.")
        return []
    return [
        Extension(
            "megatron_speech._C",
            sources=[f"csrc/{name}.cpp" for name in CPU_SOURCES],
            depends=[*(f"csrc/{name}.h" for name in CPU_HEADERS), *(f"csrc/{name}" for name in CUDA_SOURCES)],
            include_dirs=[pybind11.get_include(), "csrc"],
            language="c++",
            # No fused multiply-add: a sum has to be the same on every machine, and the same as NumPy's.
            extra_compile_args=[
                "-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra",
            ],
            optional=True,
        ),
        Extension(
            "megatron_speech._layers",
            sources=["csrc/layers.cpp"],
            depends=["csrc/vectors.h"],
            include_dirs=[pybind11.get_include(), "csrc"],
            language="c++",
            # Fused multiply-add is what these are about; -Wno-psabi: vectors are passed between inlined functions only.
            extra_compile_args=[
                "-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno",
                "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-psabi",
            ],
            libraries=["dl"] if sys.platform == "linux" else [],
            optional=True,
        ),
    ]  # fmt: skip


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels, "build_py": CopyCudaSources})
