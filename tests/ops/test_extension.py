from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_speech.ops import compile_check, cuda_library, nvcc
from megatron_speech.ops.extension import extension

ROOT = Path(__file__).resolve().parents[2]
NOTE = "the compiled extension megatron_speech._C is not used"
needs_nvcc = pytest.mark.skipif(nvcc.find_nvcc() is None, reason="no nvcc")

USE_EVERYTHING = """
import numpy as np, torch
from megatron_speech.data.sequences.packing_kernels import pack_cut, pack_fit
from megatron_speech.ops.loss_mask import LossPolicy, loss_mask
for _ in range(2):
    out = loss_mask(
        torch.zeros(1, 5, dtype=torch.int64), torch.tensor([3], dtype=torch.int32),
        torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0], dtype=torch.int32),
        torch.zeros(1, dtype=torch.uint8), LossPolicy())
    cut = pack_cut(np.array([3, 4], np.int32), 5)
    fit, _ = pack_fit(np.array([3, 4], np.int32), 5, open_bins=2)
print(out.labels.tolist(), cut.seq_ptr.tolist(), fit.seq_ptr.tolist())
"""


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_without_the_extension_everything_works_and_it_is_said_once():
    done = run_python(USE_EVERYTHING, MEGATRON_SPEECH_NO_EXTENSION="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[[0, 0, -100, -100]] [0, 2, 3] [0, 1, 2]"
    assert done.stderr.count(NOTE) == 1, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(extension() is None, reason="the extension is not built")
def test_with_the_extension_the_results_are_the_same_and_nothing_is_said():
    done = run_python(USE_EVERYTHING)
    assert done.stdout.strip() == "[[0, 0, -100, -100]] [0, 2, 3] [0, 1, 2]"
    assert NOTE not in done.stderr


@pytest.mark.slow
def test_of_a_group_of_processes_only_the_first_says_it():
    done = run_python(USE_EVERYTHING, MEGATRON_SPEECH_NO_EXTENSION="1", RANK="1")
    assert done.returncode == 0 and NOTE not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(extension() is None, reason="the extension is not built")
def test_an_extension_built_from_other_sources_is_not_called():
    stale = "from megatron_speech import _C; _C.interface = -1\n"
    done = run_python(stale + USE_EVERYTHING)
    assert done.returncode == 0 and "built from other sources" in done.stderr


@pytest.mark.slow
@needs_nvcc
def test_every_cuda_source_compiles_for_hopper_without_a_warning_or_a_spill():
    sources = sorted(cuda_library.source_directory().glob("*.cu"))
    assert sources
    for source in sources:
        kernels = compile_check.check(source, "90a", nvcc.find_nvcc())
        assert kernels and all(line.endswith(" 0 bytes spilled") for line in kernels), kernels


@pytest.mark.slow
@needs_nvcc
def test_a_source_that_does_not_compile_is_told(tmp_path):
    broken = tmp_path / "broken.cu"
    broken.write_text("__global__ void kernel() { int unused; }\n")
    with pytest.raises(nvcc.BuildError, match="unused"):
        compile_check.check(broken, "90a", nvcc.find_nvcc())


@pytest.mark.slow
@needs_nvcc
def test_the_library_is_built_on_first_use_and_then_found(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGATRON_SPEECH_CACHE", str(tmp_path))
    library = cuda_library.ensure_built("90a")
    if tmp_path not in library.parents:
        pytest.skip("the library was built at installation")
    assert cuda_library._open(library).megatron_speech_cuda_source_hash().decode() in library.name
    written = library.stat().st_mtime_ns
    monkeypatch.setattr(nvcc, "build", lambda *_: pytest.fail("built a second time"))
    assert cuda_library.ensure_built("90a") == library and library.stat().st_mtime_ns == written


def test_without_nvcc_the_reason_is_given_instead_of_a_library(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGATRON_SPEECH_CACHE", str(tmp_path))
    monkeypatch.setattr(nvcc, "find_nvcc", lambda: None)
    cuda_library.load.cache_clear()
    library, reason = cuda_library.load((7, 7))
    cuda_library.load.cache_clear()
    assert library is None and "nvcc is not on PATH" in reason


def test_architectures_follow_the_device_and_the_environment(monkeypatch):
    monkeypatch.delenv("MEGATRON_SPEECH_CUDA_ARCH", raising=False)
    assert [cuda_library.architecture_of(c) for c in [(8, 0), (9, 0), (10, 0)]] == ["80", "90a", "100a"]
    assert nvcc.architectures() == ["90a"]
    monkeypatch.setenv("MEGATRON_SPEECH_CUDA_ARCH", "80;90a")
    assert nvcc.architectures() == ["80", "90a"]
