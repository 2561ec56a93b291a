"""Both sides of `benchmark train-peer` learn the same tokens of the same documents from the same weights."""

import itertools
import json

import numpy as np
import pytest
from toy_runs import toy_recipe, write_recipe

from megatron_speech import cli
from megatron_speech.benchmark import train_sides
from megatron_speech.benchmark.peer_trainer import PeerSample, PeerSetting, collate, learning_rate, steps_of
from megatron_speech.benchmark.train_sides import Race, peer_samples, train_chunks, train_ours, train_padded
from megatron_speech.parallel import groups
from megatron_speech.recipe.learning_rate import LearningRateConfig
from megatron_speech.recipe.load import load_recipe
from megatron_speech.tokens.space import TokenSpace

STEPS, TURNS = 2, 4


class Conversation:
    """The parent's end, for a side that runs in this process: it is always its turn."""

    def __init__(self):
        self.reports = []

    def recv(self):
        return "go"

    def send(self, message):
        self.reports.append(message)

    @property
    def turns(self):
        return [report for report in self.reports if "ready" not in report]


@pytest.fixture
def race(toy, tmp_path):
    """A race over one stage of the toy recipe, by the stage's name."""

    def make(stage, **changes):
        quiet = [f"run_dir={tmp_path / stage}", f"logging.interval_steps={STEPS}", "validation.interval_steps=0",
                 "checkpoint.interval_steps=0"]  # fmt: skip
        recipe = load_recipe(write_recipe(tmp_path / "toy.yaml", toy_recipe(toy, **changes)), quiet)
        (chosen,) = (one for one in recipe.stages if one.name == stage)
        return Race(recipe.model_copy(update={"stages": [chosen]}), STEPS, TURNS, tmp_path)

    return make


@pytest.fixture
def exact(monkeypatch):
    """The peer in fp32, whatever is faster here."""

    def preferred(loop, steps, limit):
        return 0.0 if not loop.setting.bf16 and loop.setting.attention == "sdpa" else 1.0

    monkeypatch.setattr(train_sides, "_trial", preferred)


def talk(side, race):
    groups.destroy()
    conversation = Conversation()
    side(race, conversation)
    return conversation


@pytest.mark.slow
def test_sft_the_peer_pads_and_learns_the_same(race, exact):
    one = race("sft")
    ours, theirs = talk(train_ours, one), talk(train_padded, one)
    assert len(ours.turns) == len(theirs.turns) == TURNS
    assert theirs.reports[0]["setting"] == "fp32, sdpa attention, 4 samples a micro-batch, padded to 64"
    losses = [[turn["loss"] for turn in side.turns] for side in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0] - 0.05


def test_sft_samples_are_documents_with_their_prompt_masked(race):
    one = race("sft")
    space = TokenSpace.load(one.recipe.token_space)
    begin, speech_end = space.special("<speech_start>"), space.special("<speech_end>")
    samples = [sample for step in peer_samples(one) for sample in step]
    assert len(samples) > 100
    for sample in samples:
        (start,) = np.flatnonzero(sample.input_ids == begin)
        assert sample.input_ids[0] == space.special("<bos>") and sample.input_ids[-1] == speech_end
        assert (sample.labels[: start + 1] == -100).all()
        assert (sample.labels[start + 1 :] == sample.input_ids[start + 1 :]).all()


@pytest.mark.slow
def test_pt_chunks_are_full_rows_of_documents_end_to_end(race, exact):
    one = race("pt")
    stage = one.recipe.stages[0]
    steps = [step for _, step in zip(range(STEPS), peer_samples(one), strict=False)]
    assert [len(step) for step in steps] == [stage.global_batch_sequences] * STEPS
    assert all(len(sample.input_ids) == stage.seq_length for step in steps for sample in step)
    talk(train_ours, one)
    theirs = talk(train_chunks, one).turns
    assert all(turn["tokens"] == turn["positions"] == STEPS * stage.global_batch_tokens for turn in theirs)
    assert theirs[-1]["loss"] < theirs[0]["loss"]


def test_grouping_by_length_keeps_every_sample_and_pads_less():
    generator = np.random.default_rng(0)
    lengths = generator.integers(5, 300, 90)
    turn = [[PeerSample(*(np.full(n, n),) * 2) for n in part] for part in np.array_split(lengths, 9)]
    grouped = steps_of(turn, PeerSetting(5, None, group_by_length=True), seed=1)
    assert [sum(map(len, step)) for step in grouped] == [10] * 9
    assert sorted(len(s.input_ids) for step in grouped for batch in step for s in batch) == sorted(lengths)

    def positions(steps):
        return sum(collate(batch, None, 0)["input_ids"].numel() for step in steps for batch in step)

    assert positions(grouped) < 1.1 * lengths.sum() < positions(steps_of(turn, PeerSetting(5, None), seed=1))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_peer_has_our_learning_rates(schedule):
    config = LearningRateConfig(peak=2e-3, end=None if schedule == "constant" else 1e-4, warmup=3, schedule=schedule)
    rates = [learning_rate(config, step, 20) for step in range(1, 21)]
    assert rates[:3] == pytest.approx([2e-3 / 3, 4e-3 / 3, 2e-3])
    assert rates[-1] == pytest.approx(config.floor)
    assert all(a >= b for a, b in itertools.pairwise(rates[2:]))


@pytest.mark.slow
def test_the_command_lets_three_processes_take_turns(toy, tmp_path, capsys):
    recipe = write_recipe(tmp_path / "toy.yaml", toy_recipe(toy))
    words = ["benchmark", "train-peer", str(recipe), "--steps", "1", "--repetitions", "2", "--threads", "1"]
    assert cli.main([*words, "--json", str(tmp_path / "f.json")]) == 0
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["kind"] == "SFT" and set(found["sides"]) == {"ours", "padded", "dynamic"}
    assert set(found["ratios"]) == {"padded", "dynamic"}
    assert all(len(ratio["wall"]["values"]) == 2 for ratio in found["ratios"].values())
    assert all(
        min(ratio["wall"]["values"]) * 0.5 < ratio["wall"]["overall"] < max(ratio["wall"]["values"]) * 2
        for ratio in found["ratios"].values()
    )
    assert found["sides"]["padded"]["pad_fraction"] > found["sides"]["ours"]["pad_fraction"]
    assert "ours / dynamic: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.sft.loss.text=0.5", "labels of -100"),
        ("stages.sft.packing.mode=bucket", "set packing.mode to auto"),
        ("optimizer.layer_lr_decay=0.9", "drop the rest"),
        ("parallel.tensor=2", "both sides are one"),
        ("stages.sft.lr.schedule=wsd", "set cosine or linear"),
    ],
)
def test_what_the_peer_cannot_do_is_refused(toy, tmp_path, override, said):
    from megatron_speech.benchmark.train_peer import check_comparable
    from megatron_speech.errors import InputError

    recipe = load_recipe(write_recipe(tmp_path / "toy.yaml", toy_recipe(toy)), [override])
    with pytest.raises(InputError, match=said):
        check_comparable(recipe, recipe.stages[-1])
