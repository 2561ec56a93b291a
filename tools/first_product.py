"""How far it is from `megatron-speech train` to the first matrix product: `python tools/first_product.py RECIPE`.

Counts, in all threads of this process, the calls of functions that the project defines (`megatron_speech`, and
`preprocess` where there is one) between the command line and the first matrix product of the model, the files that
these functions are in, and the hops: the project's frames on the stack at that moment. Bodies of modules and classes
are not counted: importing is not calling. The run is a new one, whose sequence index is built; with `--warm` it finds
the index of a run before it. `--repository DIR` measures another checkout, `--json F` writes the figures.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any


class Reached(BaseException):
    """The first matrix product is about to be computed; no handler of errors may take it for one."""


def main() -> None:
    """Run, count, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--repository", type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument("--warm", action="store_true", help="count a second run, which finds the index of the first")
    parser.add_argument("--files", action="store_true", help="list the files, with their calls")
    parser.add_argument("--json", type=Path, metavar="F")
    args = parser.parse_args()
    root = args.repository.resolve()
    sys.path.insert(0, str(root))
    from megatron_speech.cli import main as command

    names = (str(root / "megatron_speech"), str(root / "preprocess"))
    calls: Counter[str] = Counter()
    hops: list[str] = []

    def count(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        # Bodies of modules and classes are code without local variables.
        if event == "call" and code.co_flags & inspect.CO_OPTIMIZED and code.co_filename.startswith(names):
            calls[code.co_filename] += 1

    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    products = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket in products:
                sys.setprofile(None)
                frame: FrameType | None = sys._getframe()
                while frame is not None:
                    if frame.f_code.co_filename.startswith(names):
                        hops.append(f"{Path(frame.f_code.co_filename).relative_to(root)}:{frame.f_code.co_qualname}")
                    frame = frame.f_back
                raise Reached
            return func(*args, **(kwargs or {}))

    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2 if args.warm else 1):
            calls.clear()
            hops.clear()
            threading.setprofile(count)
            sys.setprofile(count)
            try:
                with Watch():
                    command(["train", str(args.recipe), f"run_dir={folder}", *args.overrides])
            except Reached:
                pass
            finally:
                sys.setprofile(None)
                threading.setprofile(None)  # type: ignore[arg-type]
            if not hops:
                sys.exit("the command ended without a matrix product: does the recipe train?")
    files = {str(Path(name).relative_to(root)): number for name, number in calls.most_common()}
    result = {"calls": calls.total(), "files": len(files), "hops": len(hops), "stack": hops[::-1], "by_file": files}
    print(
        f"{result['calls']:,} calls in {result['files']} files before the first matrix product, {len(hops)} hops to it:"
    )
    print("  " + "\n  ".join(hops[::-1]))
    if args.files:
        print("\n".join(f"{number:8,}  {name}" for name, number in files.items()))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
