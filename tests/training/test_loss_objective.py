"""What the optimizer minimises is the stage's `loss` section, written out here over every position by hand."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_runs import LaunchTwo, copy_until, read_metrics, toy_recipe, train, without_timing, write_recipe

from megatron_speech.errors import InputError
from megatron_speech.modalities import MODALITIES
from megatron_speech.model.packed import PackedSequences
from megatron_speech.parallel import groups
from megatron_speech.recipe.load import parse_recipe
from megatron_speech.recipe.loss import LossConfig
from megatron_speech.training.run import Run, set_up
from megatron_speech.training.telemetry.metrics import LossMeter

WEIGHTS = {"text": 0.2, "audio": 0.8, "special": 0.5}


def recipe_with(toy: Path, loss: dict[str, Any], **stage: Any) -> dict[str, Any]:
    """One stage of six steps of four sequences, with this `loss` section."""
    recipe = toy_recipe(toy)
    recipe["stages"] = [
        recipe["stages"][0]
        | {"tokens": 6 * 256, "global_batch_tokens": 256, "micro_batch_size": 1, "loss": loss, **stage}
    ]
    return recipe | {"logging": {"interval_steps": 1, "tensorboard": False}}


# ---- the formula


def test_a_group_without_labels_counts_for_nothing() -> None:
    assert LossConfig().scales(np.array([[8.0], [16.0]])) == [0.125]
    assert LossConfig().scales(np.zeros((2, 1))) == [0.0]
    totals = np.array([[0.0, 40.0, 2.0], [0.0, 50.0, 4.0]])
    assert LossConfig(**WEIGHTS, normalize="modality").scales(totals) == [0.0, 0.8 / 40, 0.25]


def test_divided_by_tokens_the_weights_may_sum_to_anything() -> None:
    for total in (8.0, 0.0, -8.0):
        assert LossConfig(divisor="tokens").scales(np.array([[total], [16.0]])) == [1 / 16]
    assert LossConfig(divisor="tokens").scales(np.zeros((2, 1))) == [0.0]
    # The weight of the modality is in the weights already.
    by_modality = LossConfig(**WEIGHTS, normalize="modality", divisor="tokens")
    assert by_modality.scales(np.array([[0.0, -40.0, 2.0], [0.0, 50.0, 4.0]])) == [0.0, 1 / 50, 1 / 4]


@pytest.mark.parametrize("total", [0.0, -3.0])
def test_weights_that_sum_to_nothing_are_no_divisor(total: float) -> None:
    with pytest.raises(InputError, match=rf"all labels of a global batch sum to {total:g} over 5 labels.*: tokens"):
        LossConfig().scales(np.array([[total], [5.0]]))
    with pytest.raises(InputError, match="weights of audio of a global batch"):
        LossConfig(normalize="modality").scales(np.array([[1.0, total, 2.0], [1.0, 5.0, 2.0]]))


def naive_loss(run: Run, batch: Any, loss: LossConfig) -> torch.Tensor:
    """The loss of a global batch from full logits and the text of its documents, one position after the other."""
    (model,) = run.engine.chunks
    modality_of = run.space.modality_table()
    start = run.space.special("<speech_start>")
    weights_of = [loss.text, loss.audio, loss.special]
    terms: list[tuple[int, float, torch.Tensor]] = []  # modality, weight, loss
    for micro in batch.micro_batches:
        tokens = micro.tokens.view(-1)
        packed = PackedSequences.build(micro.cu_seqlens, position_ids=micro.position_ids)
        logits = model(tokens[None], packed_seq_params=packed)[:, : run.space.size]
        log_p, log_z = logits.log_softmax(-1), logits.logsumexp(-1)
        bounds = micro.cu_seqlens.tolist()
        for begin, end in itertools.pairwise(bounds):
            document = tokens[begin:end].tolist()
            labels = micro.labels.view(-1)[begin:end].tolist()
            has_prompt = start in document
            for at, label in enumerate(labels):
                if label < 0:  # padding, or the end of a document: nothing follows
                    continue
                assert at + 1 == len(document) or label == document[at + 1]
                inside = loss.prompt != 1.0 and has_prompt and start not in document[: at + 1]
                weight = weights_of[modality_of[label]] * (loss.prompt if inside else 1.0)
                share, ids = loss.label_smoothing, run.space.size
                row = -(1 - share) * log_p[begin + at, label] - share / ids * log_p[begin + at].sum()
                terms.append((int(modality_of[label]), weight, row + loss.z_loss * log_z[begin + at] ** 2))
    by_tokens = loss.divisor == "tokens"
    if loss.normalize == "global":
        total = sum(1.0 if by_tokens else weight for _, weight, _ in terms if weight)
        return torch.stack([weight * row for _, weight, row in terms]).sum() / total
    result = torch.zeros(())
    for modality, outer in enumerate(weights_of):
        own = [(weight, row) for m, weight, row in terms if m == modality and weight > 0]
        if own:
            total = torch.stack([weight * row for weight, row in own]).sum()
            if by_tokens:
                result = result + total / len(own)
            else:
                result = result + outer * total / sum(weight for weight, _ in own)
    return result


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss",
    [
        WEIGHTS,
        WEIGHTS | {"prompt": 0.5},
        WEIGHTS | {"normalize": "modality"},
        WEIGHTS | {"prompt": 0.5, "divisor": "tokens"},
        WEIGHTS | {"normalize": "modality", "divisor": "tokens"},
        {"text": 0.0, "audio": 2.0, "prompt": 0.5, "normalize": "modality", "label_smoothing": 0.1, "z_loss": 1e-2},
    ],
    ids=str,
)
def test_loss_and_gradients_are_those_of_the_formula_for_any_micro_batch(
    toy: Path, tmp_path: Path, loss: dict[str, Any]
) -> None:
    recipe = parse_recipe(recipe_with(toy, loss) | {"run_dir": str(tmp_path / "run")}, "test")
    stage = recipe.stages[0]
    run = set_up(recipe, log_environment=False)
    try:
        parameters = [p for p in run.engine.chunks[0].parameters() if p.requires_grad]
        for micro_batch_size in (1, 4):
            with run.stages[0].loader(0, micro_batch_size, 4, 0, 1) as batches:
                batch = next(batches)
            expected = naive_loss(run, batch, stage.loss)
            wanted = torch.autograd.grad(expected, parameters)
            meter = LossMeter(run.stages[0].groups, "cpu", stage.loss)
            run.engine.zero_gradients()
            run.step.run_batch(batch, meter, stage.loss, batch.loss_totals, forward_only=False)
            meter.add_counts(loss_totals=batch.loss_totals, tokens=batch.tokens, pad_tokens=batch.pad_tokens)
            assert meter.read()["loss"] == pytest.approx(expected.item(), rel=1e-5)
            for parameter, gradient in zip(parameters, wanted, strict=True):
                difference = (parameter.main_grad - gradient).abs().max()
                assert difference <= 1e-5 * gradient.abs().max() + 1e-8
    finally:
        groups.destroy()


# ---- whole runs


def weighted_means(line: dict[str, Any]) -> float:
    """The loss that a line's losses by modality add up to."""
    return sum(weight * line.get(f"loss/modality/{name}", 0.0) for name, weight in WEIGHTS.items())


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run) if "split" not in line]


def test_normalised_by_modality_on_one_process_and_on_two(toy: Path, launch_two: LaunchTwo, tmp_path: Path) -> None:
    """Unequal counts on the ranks, and sequences in which a modality does not occur."""
    loss = WEIGHTS | {"normalize": "modality"}
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_with(toy, loss))
    assert train(recipe, tmp_path / "one") == 0
    lines = read_metrics(tmp_path / "one")
    assert len(lines) == 7  # six steps and a validation
    for line in lines:
        assert line["loss"] == pytest.approx(weighted_means(line), rel=1e-5)
    layouts = {
        "data": [],
        "tensor": ["parallel.tensor=2"],
        "pipeline": ["parallel.pipeline=2"],
        "sharded": ["parallel.distributed_optimizer=true"],
    }
    done = launch_two(*([str(recipe), f"run_dir={tmp_path / name}", *more] for name, more in layouts.items()))
    assert done.returncode == 0 and "exit codes [0, 0, 0, 0]" in done.stdout, done.stderr[-3000:]
    for name in layouts:
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
        validation = read_metrics(tmp_path / name)[-1]
        assert validation["loss"] == pytest.approx(lines[-1]["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("task_mass", [{"speech_lm": 1.0}, {"text_lm": 0.5, "speech_lm": 0.5}], ids=str)
def test_a_modality_that_a_batch_has_not_contributes_nothing(
    toy: Path, tmp_path: Path, task_mass: dict[str, float]
) -> None:
    """Speech alone has no text; with a sequence of a dozen tokens a step, some steps have no text, others no codes."""
    loss = WEIGHTS | {"normalize": "modality"}
    short = {"seq_length": 12, "global_batch_tokens": 12, "tokens": 60, "task_mass": task_mass}
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_with(toy, loss, **short))
    assert train(recipe, tmp_path / "run") == 0
    lines = [line for line in read_metrics(tmp_path / "run") if "split" not in line]
    seen = [{name for name in MODALITIES if f"loss/modality/{name}" in line} for line in lines]
    assert any(len(names) < len(MODALITIES) for names in seen)
    for line in lines:
        assert line["loss"] == pytest.approx(weighted_means(line), rel=1e-5)


@pytest.mark.slow
def test_smoothing_and_z_loss_are_in_the_loss_alone_and_only_in_training(toy: Path, tmp_path: Path) -> None:
    loss = WEIGHTS | {"normalize": "modality", "label_smoothing": 0.2, "z_loss": 0.01}
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_with(toy, loss))
    assert train(recipe, tmp_path / "run") == 0
    *steps, validation = read_metrics(tmp_path / "run")
    for line in steps:
        # log Z is about 6 in a model that knows nothing: z-loss adds a third of a nat times the weights.
        assert line["loss"] > weighted_means(line) + 0.1
    assert validation["loss"] == pytest.approx(weighted_means(validation), rel=1e-5)


@pytest.mark.slow
def test_a_continued_run_has_the_same_sums_by_modality_to_the_digit(toy: Path, tmp_path: Path) -> None:
    """Killed between two lines of metrics.jsonl: the sums of the interval come back with the checkpoint."""
    recipe = recipe_with(toy, WEIGHTS | {"normalize": "modality", "z_loss": 1e-3})
    recipe |= {"logging": {"interval_steps": 3, "tensorboard": False}, "checkpoint": {"interval_steps": 2}}
    path = write_recipe(tmp_path / "recipe.yaml", recipe)
    assert train(path, tmp_path / "through") == 0
    continued = copy_until(tmp_path / "through", tmp_path / "continued", 2)
    assert train(path, continued) == 0
    assert without_timing(read_metrics(continued)) == without_timing(read_metrics(tmp_path / "through"))
