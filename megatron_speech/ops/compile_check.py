"""Compiles every CUDA source with warnings as errors: `python -m megatron_speech.ops.compile_check`.

Needs nvcc and no GPU. Prints registers and spills of each kernel. Exit status 1 when a source does not compile;
where there is no nvcc nothing is checked, and it says so.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path

from megatron_speech.errors import command
from megatron_speech.ops import nvcc
from megatron_speech.ops.cuda_library import source_directory


def check(source: Path, architecture: str, compiler: str) -> list[str]:
    """Compile `source` and throw the object away; one line per kernel: name, registers, spilled bytes.

    Raises:
        nvcc.BuildError: it does not compile, or warns.
    """
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "check.o"
        printed = nvcc.run_compiler(
            nvcc.compile_command(compiler, source, output, architecture, "-c", "-Xptxas=-v,--warn-on-spills")
        )
    kernels = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", printed, re.S
    )
    return [f"{name}: {registers} registers, {spilled} bytes spilled" for name, spilled, registers in kernels]


@command
def main() -> int:
    """Check every source for every architecture asked for."""
    parser = argparse.ArgumentParser(prog="python -m megatron_speech.ops.compile_check", description=__doc__)
    parser.add_argument(
        "--architecture", action="append", help="compute capability, as nvcc spells it (default: 90a); can be repeated"
    )
    parser.add_argument("--verbose", action="store_true", help="print registers and spills of every kernel")
    arguments = parser.parse_args()
    compiler = nvcc.find_nvcc()
    if compiler is None:
        print("compile check skipped: no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda")
        return 0
    for architecture in arguments.architecture or nvcc.architectures():
        for source in sorted(source_directory().glob("*.cu")):
            try:
                kernels = check(source, architecture, compiler)
            except nvcc.BuildError as error:
                print(error, file=sys.stderr)
                return 1
            print(f"{source.name}: compiles for sm_{architecture}, {len(kernels)} kernels, no warnings")
            if arguments.verbose:
                print("\n".join(f"  {line}" for line in kernels))
    return 0


if __name__ == "__main__":
    sys.exit(main())
