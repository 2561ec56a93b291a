"""The sides of `benchmark train-peer`: each a process that waits for its turn, trains some steps, and reports.

Only one side trains at a time. A report holds the wall and CPU seconds of its turn, all threads of the process
included. (Our loader has two batches ready when a turn begins, and may make their successors after it has ended: a few
milliseconds of a thread that are in no turn, nor are those of the peer, which has its samples in memory.)
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_speech.errors import InputError
from megatron_speech.recipe.recipe import Recipe

if TYPE_CHECKING:
    from megatron_speech.benchmark.peer_trainer import PeerSample, PeerSetting


@dataclass(frozen=True)
class Race:
    """What every side trains: `turns` turns of `steps` optimizer steps of the only stage of `recipe`.

    folder: where our side leaves the initial weights, and a run directory. seed: of the peer's order.
    """

    recipe: Recipe
    steps: int
    turns: int
    folder: Path
    seed: int = 0

    @property
    def weights(self) -> Path:
        """The initial weights, under the peer's names."""
        return self.folder / "initial_weights.pt"

    @property
    def is_sft(self) -> bool:
        """Whether prompts are given and only targets are learned."""
        return self.recipe.stages[0].is_sft


class _Turns:
    """A side's end of the conversation: wait for "go", report after `steps` steps, as often as there are turns."""

    def __init__(self, race: Race, connection: Connection) -> None:
        self._race, self._connection = race, connection
        self._cpu = self._wall = 0.0

    def ready(self, **facts: Any) -> None:
        """Say that the side is set up, and wait for the first turn."""
        self._connection.send({"ready": True, **facts})
        self._wait()

    def _wait(self) -> None:
        self._connection.recv()
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def end(self, *, last: bool, **figures: Any) -> None:
        """Report a turn; wait for the next one unless it was the last."""
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        self._connection.send({"wall_seconds": wall, "cpu_seconds": cpu, **figures})
        if not last:
            self._wait()


def run_side(side: Callable[[Race, Connection], None], race: Race, connection: Connection) -> None:
    """The child process: `side`, with what it raises sent to the parent."""
    from megatron_speech.environment import prepare_imports

    prepare_imports()
    try:
        side(race, connection)
    except InputError as error:
        connection.send({"refused": str(error)})
    except EOFError:  # another side has failed, and the parent has closed its end
        return
    finally:
        connection.close()


# ---- our side


def train_ours(race: Race, connection: Connection) -> None:
    """Train with this project's trainer, its log included."""
    import torch

    from megatron_speech.benchmark.peer_trainer import transformers_weights
    from megatron_speech.model.builder import global_named_parameters
    from megatron_speech.parallel import groups
    from megatron_speech.training import trainer
    from megatron_speech.training.events.event import Event, StageRun
    from megatron_speech.training.run import set_up

    recipe, turns = race.recipe, _Turns(race, connection)
    taken = 0

    def report() -> None:
        line = json.loads((recipe.run_directory / "metrics.jsonl").read_text().splitlines()[-1])
        turns.end(last=taken == race.steps * race.turns, loss=line["loss"])

    class Turns(Event):
        """Stops between turns, where the next step would begin."""

        def before_step(self, stage: StageRun) -> None:
            nonlocal taken
            if taken and taken % race.steps == 0:
                report()
            taken += 1

    try:
        run = set_up(recipe, log_environment=False)
        (chunk,) = run.engine.chunks
        torch.save(transformers_weights(global_named_parameters(chunk), recipe.model, run.space.size), race.weights)
        turns.ready(threads=torch.get_num_threads())
        trainer.train(run, max_steps=race.steps * race.turns, events=[Turns()])
        report()
    finally:
        groups.destroy()


# ---- the peer's side


def peer_samples(race: Race) -> Iterator[list[PeerSample]]:
    """The samples of each optimizer step: for SFT its documents, for PT its rows, as run_clm's chunks.

    Taken from the batches that our side trains on, so that both learn the same tokens.
    """
    from megatron_speech.benchmark.peer_trainer import PeerSample
    from megatron_speech.data.stage import StageData, open_datasets
    from megatron_speech.tokens.space import TokenSpace

    recipe, (stage,) = race.recipe, race.recipe.stages
    space = TokenSpace.load(recipe.token_space)
    datasets = open_datasets(recipe.data, space)
    cache = recipe.data.index_directory(recipe.run_directory)
    data = StageData(stage, recipe.data, datasets, space, seed=recipe.seed, cache_dir=cache)
    with data.loader(0, stage.micro_batch_size, stage.global_batch_sequences) as batches:
        for batch in batches:
            samples: list[PeerSample] = []
            for micro in batch.micro_batches:
                ids, labels = micro.tokens.numpy(), micro.labels.numpy()
                if not race.is_sft:
                    samples += [PeerSample(row, row) for row in ids]
                    continue
                ids, labels = ids.ravel(), labels.ravel()
                for begin, end in _documents(micro.cu_seqlens.numpy(), micro.row_pointers.numpy()):
                    # Ours are the labels of the next token; theirs are shifted in the model.
                    shifted = np.concatenate(([-100], labels[begin : end - 1]))
                    samples.append(PeerSample(ids[begin:end], shifted))
            yield samples


def _documents(cu_seqlens: np.ndarray, row_pointers: np.ndarray) -> list[tuple[int, int]]:
    """(begin, end) of every document of a flattened micro-batch: all segments but the padding after each row."""
    is_padding = np.zeros(len(cu_seqlens) - 1, dtype=bool)
    is_padding[row_pointers[1:] + np.arange(len(row_pointers) - 1)] = True
    bounds = itertools.pairwise(cu_seqlens.tolist())
    return [(a, b) for (a, b), padding in zip(bounds, is_padding, strict=True) if not padding and b > a]


def train_padded(race: Race, connection: Connection) -> None:
    """SFT as LLaSA does it: every sample padded to seq_length, as many to a micro-batch as we have rows."""
    stage = race.recipe.stages[0]
    _train_peer(race, connection, lambda _: [stage.micro_batch_size], pad_to=stage.seq_length)


def train_dynamic(race: Race, connection: Connection) -> None:
    """SFT with padding to the longest of a micro-batch, samples grouped by length, the fastest micro-batch."""
    stage = race.recipe.stages[0]
    share = stage.micro_batch_size * stage.seq_length / stage.global_batch_tokens

    def sizes(samples_per_step: float) -> list[int]:
        alike = max(1, round(samples_per_step * share))  # as many tokens as one of our micro-batches
        return [min(size, max(1, int(samples_per_step))) for size in (stage.micro_batch_size, alike, 2 * alike)]

    _train_peer(race, connection, sizes, pad_to=None)


def train_chunks(race: Race, connection: Connection) -> None:
    """PT as run_clm does it: documents end to end in chunks of seq_length, every token attended and learned."""
    stage = race.recipe.stages[0]
    sizes = [stage.micro_batch_size, stage.global_batch_sequences]
    _train_peer(race, connection, lambda _: sizes, pad_to=stage.seq_length)


SIDES: Mapping[str, Callable[[Race, Connection], None]] = {
    "ours": train_ours,
    "padded": train_padded,
    "dynamic": train_dynamic,
    "chunks": train_chunks,
}


def _train_peer(
    race: Race, connection: Connection, sizes: Callable[[float], Sequence[int]], *, pad_to: int | None
) -> None:
    """The loop in its fastest setting here: precision, attention, and samples of a micro-batch.

    Args:
        race: what to train.
        connection: to the parent.
        sizes: samples per optimizer step → sizes of a micro-batch to try.
        pad_to: as in PeerSetting; where it is None, samples are grouped by length.
    """
    import torch

    from megatron_speech.benchmark.peer_trainer import (
        ATTENTIONS,
        PeerSetting,
        PeerTrainer,
        load_weights,
        steps_of,
        transformers_model,
    )
    from megatron_speech.tokens.space import TokenSpace

    recipe, (stage,) = race.recipe, race.recipe.stages
    torch.manual_seed(race.seed)
    space = TokenSpace.load(recipe.token_space)
    weights = torch.load(race.weights)
    made = list(zip(range(race.steps * race.turns), peer_samples(race), strict=False))
    samples = [step for _, step in made]

    def trainer(setting: PeerSetting) -> PeerTrainer:
        model = transformers_model(recipe.model, space, stage.seq_length, setting.attention)
        load_weights(model, weights)
        return PeerTrainer(model, stage, recipe.optimizer, setting, space.special("<pad>"))

    wanted = sorted(set(sizes(sum(map(len, samples)) / len(samples))))
    candidates = [
        PeerSetting(size, pad_to, group_by_length=pad_to is None, bf16=bf16, attention=attention)
        for size in wanted
        for bf16 in (True, False)
        for attention in ATTENTIONS
    ]
    limit = stage.global_batch_tokens
    seconds = {
        setting: _trial(trainer(setting), steps_of(samples, setting, race.seed), limit) for setting in candidates
    }
    # A second look, as long as a turn, at the best setting of each size: they come close to each other.
    best = [min((one for one in candidates if one.rows == size), key=seconds.__getitem__) for size in wanted]
    again = {
        setting: _trial(trainer(setting), steps_of(samples, setting, race.seed), race.steps * limit) for setting in best
    }
    chosen = min(again, key=again.__getitem__)
    loop, turns = trainer(chosen), _Turns(race, connection)
    turns.ready(
        setting=chosen.describe(),
        tried={setting.describe(): value for setting, value in (seconds | again).items()},
        threads=torch.get_num_threads(),
    )
    steps = steps_of(samples, chosen, race.seed)
    for first in range(0, len(steps), race.steps):
        turn = steps[first : first + race.steps]
        losses, learned, positions = torch.zeros(()), 0, 0
        for micro_batches in turn:
            loss, count = loop.step(micro_batches)
            losses += loss * count
            learned += count
            positions += sum(_positions(rows, chosen) for rows in micro_batches)
        lengths = [len(sample.input_ids) for step in turn for rows in step for sample in rows]
        turns.end(
            last=first + race.steps >= len(steps),
            loss=float(losses / learned),
            learned_tokens=learned,
            tokens=sum(lengths),
            samples=len(lengths),
            longest=max(lengths),
            lengths=lengths,
            positions=positions,
        )


def _positions(samples: Sequence[PeerSample], setting: PeerSetting) -> int:
    longest = max(len(sample.input_ids) for sample in samples)
    return len(samples) * (longest if setting.pad_to is None else setting.pad_to)


def _trial(loop: Any, steps: Sequence[Sequence[Sequence[PeerSample]]], limit: int) -> float:
    """CPU seconds per token over micro-batches spread through `steps`: about `limit` positions, after as many others.

    The loop is spent afterwards: it has trained.
    """
    micro_batches = [samples for step in steps for samples in step]
    positions = sum(_positions(samples, loop.setting) for samples in micro_batches)
    stride = max(1, 2 * positions // limit)
    warm, measured = micro_batches[1::stride] or micro_batches, micro_batches[::stride]
    loop.step(warm)
    begin = time.process_time()
    loop.step(measured)
    return (time.process_time() - begin) / sum(len(sample.input_ids) for samples in measured for sample in samples)
