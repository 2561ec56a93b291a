"""`megatron-speech benchmark train-peer RECIPE.yaml`: this project's trainer beside a `transformers` loop, in one run.

All start from the same weights of the same model (LLaMA, Qwen2 or Qwen3) and train on the same documents: every side
is a process of its own, and they take turns of a few optimizer steps. Step by step the documents are the same, but
for the side that groups them by length: there they are the same over the whole run, its turns differ in length, and
the ratio over all turns is the one to look at. Compared are the learned (target) tokens per second of an SFT stage, and
all tokens per second of a PT stage.

    padded    SFT as LLaSA does it: every sample padded to seq_length, labels of -100 on the prompt, full logits
    dynamic   SFT, samples grouped by length and padded to the longest of the micro-batch; the fastest micro-batch
    chunks    PT as run_clm does it: documents end to end in chunks of seq_length

Each peer runs in fp32 or under bf16 autocast, whichever is faster here; ours in the recipe's precision.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from megatron_speech.errors import InputError
from megatron_speech.files import write_json
from megatron_speech.recipe.optimizer import OptimizerConfig
from megatron_speech.recipe.recipe import Recipe
from megatron_speech.recipe.stage import StageConfig

PLAIN_ADAMW = ("beta1", "beta2", "eps", "weight_decay", "clip_grad")
"""What of the section `optimizer` the peer has too."""

PEERS = {"sft": ("padded", "dynamic"), "pt": ("chunks",)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add = parser.add_argument
    add("recipe", type=Path, metavar="RECIPE.yaml", help="what both sides train")
    add("overrides", nargs="*", metavar="key=value", help="replace values of the recipe")
    add("--stage", metavar="S", help="name of the stage; default: the last")
    add("--steps", type=int, default=10, metavar="N", help="optimizer steps of a turn (10)")
    add("--repetitions", type=int, default=5, metavar="N", help="turns of each side that are measured (5)")
    add("--warmup", type=int, default=1, metavar="N", help="turns of each side before that (1)")
    add("--threads", type=int, metavar="N", help="threads of each side; default: OMP_NUM_THREADS, else torch's choice")
    add("--seed", type=int, default=0, help="of the peer's order within a turn (0)")
    add("--json", type=Path, metavar="F", help="write the figures to F")


def run(args: argparse.Namespace) -> int:
    """Let the sides take turns; print and write their figures."""
    for name in ("steps", "repetitions", "warmup", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} is {value}; it has to be at least 1")
    from megatron_speech.environment import detect, prepare_imports

    prepare_imports()
    result = measure(
        args.recipe,
        args.overrides,
        stage=args.stage,
        steps=args.steps,
        repetitions=args.repetitions,
        warmup=args.warmup,
        threads=args.threads,
        seed=args.seed,
    )
    result = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), **result}
    result["environment"] = {**detect(), "transformers": detect()["optional"]["transformers"]}
    print(report(result))
    if args.json is not None:
        write_json(args.json, result)
    return 0


def measure(
    recipe_path: Path,
    overrides: list[str],
    *,
    stage: str | None = None,
    steps: int,
    repetitions: int,
    warmup: int = 1,
    threads: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The figures of one stage: `repetitions` turns of `steps` steps of each side, after `warmup` turns.

    Raises:
        InputError: a recipe that a side cannot train.
    """
    from megatron_speech.benchmark.train_sides import Race
    from megatron_speech.recipe.load import load_recipe

    with tempfile.TemporaryDirectory(prefix="megatron-speech-benchmark-") as folder:
        quiet = [
            f"run_dir={folder}/run",
            f"logging.interval_steps={steps}",
            "logging.tensorboard=false",
            "watchdog.enabled=false",  # it would take a turn of the others for a step that hangs
            "validation.interval_steps=0",
            "checkpoint.interval_steps=0",
        ]
        recipe = load_recipe(recipe_path, [*overrides, *quiet])
        names = [one.name for one in recipe.stages]
        if stage is not None and stage not in names:
            raise InputError(f"{recipe_path} has no stage {stage!r}; its stages are {', '.join(names)}")
        chosen = recipe.stages[names.index(stage) if stage is not None else -1]
        check_comparable(recipe, chosen)
        turns = repetitions + warmup
        # One step more than is run: the stage does not end, so nothing is saved.
        chosen = chosen.model_copy(update={"tokens": (turns * steps + 1) * chosen.global_batch_tokens})
        recipe = recipe.model_copy(update={"stages": [chosen]})
        race = Race(recipe, steps, turns, Path(folder), seed)
        sides = _take_turns(race, ("ours", *PEERS["sft" if race.is_sft else "pt"]), threads)
    return _figures(race, sides, warmup)


def check_comparable(recipe: Recipe, stage: StageConfig) -> None:
    """Refuse what the peer's loop cannot do, before any side is started.

    Raises:
        InputError: names the field.
    """
    where, loss = f"stage {stage.name}", stage.loss
    if recipe.parallel.model_parallel_size > 1:
        raise InputError(f"recipe {recipe.name}: parallel asks for several processes; both sides are one: leave it out")
    if recipe.precision == "fp8":
        raise InputError(f"recipe {recipe.name}: precision is fp8, and the comparison runs on a CPU; set bf16 or fp32")
    if {loss.text, loss.audio, loss.special} != {1.0} or loss.prompt not in (0.0, 1.0):
        raise InputError(
            f"{where}: the peer learns a token or does not, with labels of -100; set loss.text, loss.audio and "
            "loss.special to 1 and loss.prompt to 0 or 1"
        )
    if stage.packing_mode != ("fit" if stage.is_sft else "cut") or stage.stitch is not None:
        raise InputError(
            f"{where}: the peer has documents (SFT) or chunks of them end to end (PT); set packing.mode to auto and "
            "leave stitch out"
        )
    if stage.lr.schedule == "wsd":
        raise InputError(f"{where}: lr.schedule is wsd, which the peer lacks; set cosine or linear")
    if recipe.optimizer != OptimizerConfig(**{name: getattr(recipe.optimizer, name) for name in PLAIN_ADAMW}):
        raise InputError(
            f"recipe {recipe.name}: section optimizer goes beyond {', '.join(PLAIN_ADAMW)}, which is what Trainer's "
            "AdamW knows; drop the rest"
        )


class _Side:
    """A side's process and the parent's end of the conversation."""

    def __init__(self, name: str, race: Any) -> None:
        from megatron_speech.benchmark.train_sides import SIDES, run_side

        self.name = name
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self.process = context.Process(target=run_side, args=(SIDES[name], race, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.facts = self._receive()
        self.turns: list[dict[str, Any]] = []

    def _receive(self) -> dict[str, Any]:
        try:
            message: dict[str, Any] = self._connection.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(f"side {self.name} ended with status {self.process.exitcode}; see above") from None
        if "refused" in message:
            raise InputError(message["refused"])
        return message

    def turn(self) -> None:
        """Let it train one turn."""
        self._connection.send("go")
        self.turns.append(self._receive())

    def stop(self) -> None:
        """End the process."""
        self._connection.close()
        self.process.join(timeout=30)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join()


def _take_turns(race: Any, names: tuple[str, ...], threads: int | None) -> list[_Side]:
    before = os.environ.get("OMP_NUM_THREADS")
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    sides: list[_Side] = []
    try:
        for name in names:  # ours first: the others take its initial weights
            sides.append(_Side(name, race))
        for number in range(race.turns):
            # Forth and back, so that none always follows the same neighbour.
            for side in sides if number % 2 == 0 else reversed(sides):
                side.turn()
    finally:
        for side in sides:
            side.stop()
        if threads is not None:
            os.environ.pop("OMP_NUM_THREADS")
            if before is not None:
                os.environ["OMP_NUM_THREADS"] = before
    return sides


def _figures(race: Any, sides: list[_Side], warmup: int) -> dict[str, Any]:
    """Rates of the measured turns, and of each peer the ratio to ours, turn by turn."""
    from megatron_speech.benchmark.measure import summary

    peers = sides[1:]
    stage, recipe = race.recipe.stages[0], race.recipe
    # The first peer trains the samples that ours trains in the same turn, and counts them.
    work = peers[0].turns
    counted = "learned_tokens" if race.is_sft else "tokens"
    result: dict[str, Any] = {
        "benchmark": "train-peer",
        "stage": stage.name,
        "kind": "SFT" if race.is_sft else "PT",
        "model": recipe.model.model_dump(mode="json"),
        "counted": counted,
        "steps_per_turn": race.steps,
        "turns": len(work) - warmup,
        "data": {
            "samples": sum(turn["samples"] for turn in work),
            "tokens": sum(turn["tokens"] for turn in work),
            "learned_tokens": sum(turn["learned_tokens"] for turn in work),
            "longest_sample": max(turn["longest"] for turn in work),
            "length_quantiles": _quantiles([length for turn in work for length in turn["lengths"]]),
        },
        "sides": {},
        "ratios": {},
    }
    done = {"ours": [{**turn, "positions": race.steps * stage.global_batch_tokens} for turn in work]}
    done |= {side.name: side.turns for side in peers}
    for side in sides:
        result["sides"][side.name] = {
            **{key: value for key, value in side.facts.items() if key != "ready"},
            **{
                f"{counted}_per_{clock}_second": summary(
                    [
                        mine[counted] / turn[f"{clock}_seconds"]
                        for mine, turn in zip(done[side.name][warmup:], side.turns[warmup:], strict=True)
                    ]
                )
                for clock in ("wall", "cpu")
            },
            **{
                f"overall_{clock}": sum(mine[counted] for mine in done[side.name][warmup:])
                / sum(turn[f"{clock}_seconds"] for turn in side.turns[warmup:])
                for clock in ("wall", "cpu")
            },
            "pad_fraction": 1
            - sum(turn["tokens"] for turn in done[side.name]) / sum(turn["positions"] for turn in done[side.name]),
            "losses": [turn["loss"] for turn in side.turns],
        }
    result["sides"]["ours"]["setting"] = (
        f"{recipe.precision}, {stage.micro_batch_size} rows of {stage.seq_length} a micro-batch, packed"
    )
    ours = result["sides"]["ours"]
    for side in peers:
        theirs = result["sides"][side.name]
        result["ratios"][side.name] = {
            clock: {
                **summary([a / b for a, b in zip(ours[rate]["values"], theirs[rate]["values"], strict=True)]),
                "overall": ours[f"overall_{clock}"] / theirs[f"overall_{clock}"],
            }
            for clock, rate in ((clock, f"{counted}_per_{clock}_second") for clock in ("wall", "cpu"))
        }
    return result


def _quantiles(lengths: list[int]) -> dict[str, int]:
    ordered = sorted(lengths)
    return {
        f"{share:.0%}": ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.05, 0.5, 0.95)
    } | {"mean": round(statistics.mean(lengths))}


def report(result: dict[str, Any]) -> str:
    """The figures as lines for people."""
    from megatron_speech.benchmark.measure import spread

    data, sides, counted = result["data"], result["sides"], result["counted"]
    quantiles = ", ".join(f"{name} {value}" for name, value in data["length_quantiles"].items())
    lines = [
        f"{result['kind']} stage {result['stage']}: {data['samples']:,} samples of {quantiles} tokens "
        f"(longest {data['longest_sample']}), {data['learned_tokens'] / data['tokens']:.1%} of them learned; "
        f"{result['turns']} turns of {result['steps_per_turn']} steps each",
    ]
    for name, side in sides.items():
        lines.append(
            f"  {name:8} {spread(side[f'{counted}_per_wall_second'], 0)} {counted.replace('_', ' ')}/s, "
            f"padding {side['pad_fraction']:.1%}, loss {side['losses'][0]:.4f} → {side['losses'][-1]:.4f}; "
            f"{side['setting']}"
        )
    for name, ratio in result["ratios"].items():
        lines.append(
            f"  ours / {name}: {ratio['wall']['overall']:.2f} over all turns, by turn {spread(ratio['wall'], 2)} "
            f"(CPU time {ratio['cpu']['overall']:.2f}, {spread(ratio['cpu'], 2)})"
        )
    return "\n".join(lines)
