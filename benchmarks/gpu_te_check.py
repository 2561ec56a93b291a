"""Transformer Engine on one GPU: against the torch back-end, in FP8, and its speed.

    python benchmarks/gpu_te_check.py --json gpu_te_check.json

1. The same weights and packed documents in both back-ends, bf16: losses and gradients of every parameter; and
   documents that do not see each other, to the bit.
2. Loss curves of a small model: torch bf16, TE bf16, FP8 with delayed, tensorwise and blockwise scales.
3. Tokens/s of PT and SFT of a larger preset on torch bf16, TE bf16 and FP8.

Context parallelism needs two GPUs and is not tried here.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gpu_check import RECIPE, make_data
from megatron_speech import cli
from megatron_speech.environment import prepare_imports
from megatron_speech.errors import command
from megatron_speech.files import write_json, write_text

KINDS: dict[str, list[str]] = {
    "torch_bf16": ["precision=bf16", "model.backend=torch"],
    "te_bf16": ["precision=bf16", "model.backend=te"],
    "te_fp8_tensorwise": ["precision=fp8", "fp8.recipe=tensorwise"],
    "te_fp8_delayed": ["precision=fp8", "fp8.recipe=delayed"],
    "te_fp8_blockwise": ["precision=fp8", "fp8.recipe=blockwise"],
}
# Largest relative differences: of the mean loss of a curve's second half, against torch_bf16.
CURVE_TOLERANCE = {"te_bf16": 0.01, "te_fp8_tensorwise": 0.03, "te_fp8_delayed": 0.03, "te_fp8_blockwise": 0.03}


def compare_back_ends(result: dict[str, Any]) -> list[str]:
    """Losses and gradients of both back-ends for the same weights and documents; returns what is wrong."""
    from megatron_speech.model.builder import build_model, global_named_parameters
    from megatron_speech.model.packed import PackedSequences
    from megatron_speech.model.targets import TOKENS, HeadTargets
    from megatron_speech.parallel import groups
    from megatron_speech.recipe.model import ModelConfig

    groups.initialize()
    try:
        config = ModelConfig(preset="smoke", num_query_groups=5, qk_norm=True, qkv_bias=True)
        lengths = [300, 1, 17, 450, 64, 192]
        generator = torch.Generator().manual_seed(0)
        ids, labels = torch.randint(0, 1000, (2, 1, sum(lengths)), generator=generator)
        ids = ids.cuda()
        bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
        weights = torch.full((sum(lengths),), 1.0 / sum(lengths))
        losses, gradients, leak = {}, {}, {}
        for backend in ("torch", "te"):
            (model,) = build_model(config, 1024, precision="bf16", seed=1, backend=backend)
            model.cuda()

            def run(tokens: torch.Tensor, model: Any = model) -> Any:
                packed = PackedSequences.build(bounds, fused=model.fused_attention)
                return model(tokens, None, None, HeadTargets.build(labels, weights), packed)[TOKENS]

            head = run(ids)
            head.total.backward()
            losses[backend] = head.losses.detach().double()
            gradients[backend] = {name: p.grad.double() for name, p in global_named_parameters(model)}
            changed = ids.clone()
            changed[:, : lengths[0]] = 7
            rest = slice(lengths[0], None)
            leak[backend] = float((run(changed).losses[rest] - head.losses[rest]).abs().max())
        difference = float(((losses["te"] - losses["torch"]).abs() / losses["torch"]).max())
        distance = {
            name: float((gradients["te"][name] - g).norm() / g.norm()) for name, g in gradients["torch"].items()
        }
        worst = max(distance, key=lambda name: distance[name])
        result["back_ends"] = {
            "largest_relative_loss_difference": difference,
            "largest_relative_gradient_difference": distance[worst],
            "parameter_of_that_gradient": worst,
            "loss_change_when_another_document_changes": leak,
        }
    finally:
        groups.destroy()
    wrong = [f"{name}: documents leak into each other by {value:.2e}" for name, value in leak.items() if value]
    if not difference <= 0.03:
        wrong.append(f"losses of te and torch differ by {difference:.2e}")
    if not distance[worst] <= 0.1:
        wrong.append(f"the gradient of {worst} differs by {distance[worst]:.2e}")
    return wrong


def train(folder: Path, name: str, kind: str, **fields: Any) -> list[dict[str, Any]]:
    """Train in this process with the options of `kind`; the lines of its metrics.jsonl."""
    recipe = folder / f"{name}_{kind}.yaml"
    write_text(recipe, RECIPE.format(precision="bf16", **fields))
    run = folder / f"{name}_{kind}"
    if cli.main(["train", str(recipe), f"run_dir={run}", *KINDS[kind]]):
        raise RuntimeError(f"{kind} did not train")
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _speed(lines: list[dict[str, Any]], stage: str) -> float:
    """Median tokens/s of a stage, without its first steps."""
    return float(np.median([line["tokens_per_second_per_gpu"] for line in lines if line["stage"] == stage][4:]))


@command
def main() -> int:
    """Run the three parts; a kind that fails does not keep the others from running."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="figures are written here")
    parser.add_argument("--preset", default="llama-3.2-1b", help="shape whose speed is measured (llama-3.2-1b)")
    parser.add_argument("--steps", type=int, default=60, help="steps of each loss curve (60)")
    args = parser.parse_args()
    prepare_imports()
    from megatron_speech.model.specs import transformer_engine_missing

    if missing := transformer_engine_missing():
        print(f"Transformer Engine cannot be tried: {missing}")
        return 1
    result: dict[str, Any] = {"curves": {}, "speed": {}}
    failures = compare_back_ends(result)
    with tempfile.TemporaryDirectory(prefix="gpu-te-check-") as name:
        folder = Path(name)
        make_data(folder, samples=4000)
        small = {"preset": "smoke", "tokens": args.steps // 2 * 8192, "seq": 1024, "rows": 8, "batch": 8192}
        large = {"preset": args.preset, "tokens": 12 * 65_536, "seq": 2048, "rows": 8, "batch": 65_536}
        for kind in KINDS:
            try:
                losses = np.array([line["loss"] for line in train(folder, "curve", kind, **small)])
                result["curves"][kind] = losses.round(4).tolist()
                if kind in ("torch_bf16", "te_bf16", "te_fp8_tensorwise"):
                    lines = train(folder, "speed", kind, **large)
                    result["speed"][kind] = {stage: _speed(lines, stage) for stage in ("pt", "sft")}
            except (RuntimeError, AssertionError, ValueError) as error:  # of one kind: told of, and the check fails
                failures.append(f"{kind}: {str(error).splitlines()[0]}")
    if "torch_bf16" in result["curves"]:
        half = len(result["curves"]["torch_bf16"]) // 2
        reference = np.mean(result["curves"]["torch_bf16"][half:])
        for kind, tolerance in CURVE_TOLERANCE.items():
            if kind in result["curves"]:
                difference = abs(np.mean(result["curves"][kind][half:]) / reference - 1)
                if not difference <= tolerance:
                    failures.append(f"the curve of {kind} is {difference:.1%} from torch_bf16")
    write_json(args.json, {**result, "failures": failures})
    print(json.dumps({"back_ends": result["back_ends"], "speed": result["speed"]}, indent=2))
    rates = ", ".join(f"{kind} {speed['pt']:,.0f}" for kind, speed in result["speed"].items())
    print("; ".join(failures) or f"agrees; PT tokens/s: {rates}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
