"""The figures that a GPU session left in its folder, as a table.

python benchmarks/gpu_table.py OUT_DIR
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# A position of the loss mask: its token is read (8 bytes); label, position (8 each), weight and group (4 each) written.
_LOSS_MASK_BYTES = 32


def rows(found: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """(what, figure) of every file that is there, by its name without the ending."""
    for policy in ("pt", "sft"):
        for device, sides in found.get(f"loss_mask_{policy}", {}).get("devices", {}).items():
            if device == "cpu":
                continue
            for side, figures in sides.items():
                rate = figures["tokens_per_second"]["median"]
                bandwidth = rate * _LOSS_MASK_BYTES / 1e9
                ratio = figures["ratio_to_reference"]["median"]
                yield (
                    f"loss mask, {policy}, {side} on {device}",
                    f"{rate / 1e9:.2f} G tokens/s, {bandwidth:,.0f} GB/s, {ratio:.2f} × PyTorch",
                )
    for key in ("cuda_fp32", "cuda_bf16"):
        if one := found.get("agreement", {}).get(key):
            yield (
                f"losses of {key.replace('_', ' ')} against the CPU's",
                f"{one['largest_relative_difference']:.1e} at most (allowed {one['tolerance']:.0e})",
            )
    if watched := found.get("syncs"):
        yield "waits for the device within a step", f"{sum(watched['waits'].values())} in {watched['steps']} steps"
    if speed := found.get("speed"):
        for stage in ("pt", "sft"):
            one = speed[stage]
            mfu = "" if one["mfu"] is None else f", MFU {one['mfu']:.1%}"
            yield (
                f"{stage.upper()}, {speed['preset']}, {speed['ids']:,} ids, bf16, torch back-end",
                f"{one['tokens_per_second_per_gpu']:,.0f} tokens/s, {one['tflops_per_gpu']:.0f} TFLOP/s{mfu}, "
                f"{one['memory_gib']:.1f} GiB",
            )
    for one in found.get("head", {}).get("results", []):
        for side, figures in one["sides"].items():
            yield (
                f"head, {one['masked']:.0%} masked, {side}",
                f"{figures['seconds']['median'] * 1e3:.2f} ms, {figures['peak_bytes'] / 2**20:,.0f} MiB",
            )
    engine = found.get("transformer_engine", {})
    if one := engine.get("back_ends"):
        yield (
            "te against torch, same weights",
            f"losses {one['largest_relative_loss_difference']:.1e}, gradients "
            f"{one['largest_relative_gradient_difference']:.1e} at most",
        )
    for kind, losses in engine.get("curves", {}).items():
        yield f"loss curve, {kind}", f"{losses[0]:.3f} → {losses[-1]:.3f}"
    for kind, rates in engine.get("speed", {}).items():
        yield f"tokens/s, {kind}", ", ".join(f"{stage.upper()} {rate:,.0f}" for stage, rate in rates.items())
    for name, one in found.items():
        for failure in one.get("failures", []):
            yield f"**{name}**", failure


def main() -> int:
    """Print the table of the folder that is named."""
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        print(f"usage: {Path(sys.argv[0]).name} OUT_DIR (a folder that gpu_session.sh filled)", file=sys.stderr)
        return 2
    found = {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(sys.argv[1]).glob("*.json"))
    }
    print("| what | figure |\n|---|---|")
    for what, figure in rows(found):
        print(f"| {what} | {figure} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
