"""A recipe says everything about a run, and says what is wrong with it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from toy_runs import toy_recipe, write_recipe

from megatron_speech.errors import InputError
from megatron_speech.recipe.learning_rate import LearningRateConfig
from megatron_speech.recipe.load import _models_in, load_recipe, parse_recipe
from megatron_speech.recipe.recipe import Recipe
from megatron_speech.training.position import Position


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe.yaml", toy_recipe(tmp_path))


def test_a_recipe_round_trips_through_yaml(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file, ["stages.pt.tokens=0.5M"])
    recipe.save(tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == recipe
    assert parse_recipe(yaml.safe_load(recipe.to_yaml()), "saved") == recipe


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("stages.0.lr.peek=1", "unknown key 'stages.0.lr.peek'; did you mean 'peak'?"),
        ("optimiser.beta1=0.5", "unknown key 'optimiser'; did you mean 'optimizer'?"),
        ("data.dataset=[a]", "unknown key 'data.dataset'; did you mean 'datasets'?"),
        ("stages.1.loss.speech=1", "unknown key 'stages.1.loss.speech'; did you mean 'special'?"),
        ("model.layers=3", "unknown key 'model.layers'; did you mean 'num_layers'?"),
        ("zzz=3", "unknown key 'zzz'; known: checkpoint, data,"),
        ("model.preset=tinny", "nearest: 'tiny'"),
        ("seed=x", "seed = 'x': input should be a valid integer"),
        ("seed=-1", "seed = -1: input should be greater than or equal to 0"),
        ("precision=fp16", "precision = 'fp16': input should be 'fp32', 'bf16' or 'fp8'"),
        ("stages=[]", "stages = []: list should have at least 1 item"),
        ("stages.0.tokens=many", "stages.0.tokens = 'many'"),
        ("stages.0.tokens=100", "less than one step of global_batch_tokens 512"),
        ("stages.0.global_batch_tokens=500", "= 128; the nearest that are: 384 and 512"),
        ("stages.0.global_batch_tokens=64", "= 128; the nearest that is: 128"),
        ("stages.0.lr.end=1", "stages.0.lr: end 1 is above peak 0.005"),
        ("stages.0.lr.warmup=2.5", "neither a share below 1 nor a whole number of steps"),
        ("stages.0.lr.decay=0.2", "decay 0.2 belongs to schedule wsd, and schedule is cosine"),
        ("stages.0.lr={peak: 1e-3, schedule: wsd, decay: 1.5}", "decay 1.5 is neither a share below 1 nor"),
        ("optimizer.head.lr_multiplier=2", "optimizer.head is set, but model.tie_embeddings is true"),
        ("optimizer.layer_lr_decay=1.1", "optimizer.layer_lr_decay = 1.1: input should be less than or equal to 1"),
        ("stages.1.lr.peak=1", "the learning rate only drops from stage to stage"),
        ("stages.1.name=pt", "two stages are named 'pt'"),
        ("parallel.sequence_parallel=true", "sequence_parallel needs tensor above 1"),
        ("stages.tts.tokens=1", "no stage is named 'tts'; the stages are pt, sft"),
        ("stages.7.tokens=1", "'7' is not an item of a list of 2"),
        ("seed", "is not of the form key=value"),
        ("seed.x=1", "seed holds a value, not a section"),
        ("seed=[1", "is not a YAML value"),
        ("token_space=null", "token_space = None"),
        ("seed=${nowhere}", "nowhere"),
        # What is no number, or no sensible one.
        ("stages.0.lr.peak=1e400", "stages.0.lr.peak = inf: input should be a finite number"),
        ("stages.0.lr.peak=11", "stages.0.lr.peak = 11: input should be less than or equal to 10"),
        ("optimizer.weight_decay=.nan", "optimizer.weight_decay = nan"),
        ("stages.0.task_mass.tts=.inf", "stages.0.task_mass.tts = inf: input should be a finite number"),
        ("model.rope_base=.inf", "model.rope_base = inf: input should be a finite number"),
        ("stages.0.loss.prompt=2", "stages.0.loss.prompt = 2: input should be less than or equal to 1"),
        ("stages.0.loss={text: 0, audio: 0, special: 0}", "are all 0, so that nothing is learned"),
        ("stages.0.loss.z_loss=2", "stages.0.loss.z_loss = 2: input should be less than or equal to 1"),
        ("stages.0.lr.scale_with_batch=sqrt", "scale_with_batch is sqrt and reference_batch_tokens null"),
        ("stages.0.lr.reference_batch_tokens=4k", "scale_with_batch is none and reference_batch_tokens 4000"),
        # What a shell makes of a variable that is not set.
        ("run_dir=", "override 'run_dir=' has no value (an unset shell variable, perhaps?)"),
        ("run_dir=' '", "run_dir is empty; name a path, or leave it out"),
        ("token_space=''", "token_space is empty"),
        ("data.datasets={a: ''}", "data.datasets.a is empty"),
        ("data.cache_dir=''", "data.cache_dir is empty"),
        ("init.checkpoint=''", "init.checkpoint is empty"),
    ],
)
def test_what_is_wrong_is_named(recipe_file: Path, override: str, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(recipe_file, [override])
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "holds no mapping of sections"),
        ("- a\n", "holds no mapping of sections"),
        ("name: [x\n", "is not valid YAML"),
        ("base: recipe.yaml\n", "is its own base"),
        ("base: missing.yaml\nname: x\n", "missing.yaml does not exist"),
        ("name: x\n", "key 'token_space' is missing and has no default"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=re.escape(sentence)):
        load_recipe(path)


def test_the_nearest_batches_take_the_data_parallel_ranks_into_account(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert recipe.data_parallel_size(2) == 2
    with pytest.raises(InputError, match="× 3 data-parallel ranks = 384; the nearest that are: 384 and 768"):
        recipe.data_parallel_size(3)


def test_an_interleaved_pipeline_takes_micro_batches_in_groups(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["parallel.pipeline=4", "parallel.virtual_pipeline=2"])
    with pytest.raises(InputError, match=r"stage sft: .* × 4 .* = 1024; the nearest that is: 1024"):
        recipe.data_parallel_size(4)


def test_a_world_that_the_layout_does_not_divide_is_refused(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["parallel.tensor=2", "parallel.pipeline=2"])
    with pytest.raises(InputError, match=r"6 processes cannot be divided by .* = 4; start 4 or 8 processes"):
        recipe.data_parallel_size(6)


def test_a_learning_rate_may_rise_where_the_stage_says_so(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["stages.sft.lr.peak=1", "stages.sft.allow_lr_increase=true"])
    assert recipe.stages[1].lr.peak == 1.0


def test_paths_are_relative_to_the_file_that_gives_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = toy_recipe(Path("ignored"), token_space="ts.json")
    values["data"]["datasets"] = {"speech": "data/speech", "text": "/data/text"}
    (tmp_path / "shared").mkdir()
    (tmp_path / "work").mkdir()
    write_recipe(tmp_path / "shared" / "base.yaml", values)
    write_recipe(tmp_path / "mine.yaml", {"base": "shared/base.yaml", "name": "mine", "seed": 3})
    monkeypatch.chdir(tmp_path / "work")
    recipe = load_recipe(tmp_path / "mine.yaml", ["data.datasets.speech=here/speech"])
    assert recipe.token_space == str(tmp_path / "shared" / "ts.json")
    assert recipe.data.datasets == {"speech": str(tmp_path / "work" / "here" / "speech"), "text": "/data/text"}
    assert recipe.run_directory == tmp_path / "runs" / "mine"
    assert (recipe.name, recipe.seed) == ("mine", 3)


@pytest.mark.parametrize(
    ("text", "value"), [("0.5M", 500_000), ("2_000_000", 2_000_000), ("3 k", 3_000), ("1e6", 10**6)]
)
def test_token_counts_may_be_written_for_people(recipe_file: Path, text: str, value: int) -> None:
    assert load_recipe(recipe_file, [f"stages.0.tokens={text}"]).stages[0].tokens == value


def _fields(model: type[BaseModel]) -> set[tuple[str, str]]:
    found: set[tuple[str, str]] = set()
    for name, field in model.model_fields.items():
        found.add((model.__name__, name))
        for inner in _models_in(field.annotation):
            found |= _fields(inner)
    return found


def test_every_key_is_read_by_something(repository: Path) -> None:
    sources = "\n".join(
        path.read_text(encoding="utf-8") for path in sorted((repository / "megatron_speech").rglob("*.py"))
    )
    dead = {
        f"{model}.{name}"
        for model, name in _fields(Recipe)
        if not re.search(rf"(\.{name}\b|getattr\(config, field\))", sources)
    }
    assert dead == set()


def test_the_example_recipes_are_valid(repository: Path) -> None:
    recipes = sorted((repository / "examples").rglob("*.yaml"))
    recipes = [path for path in recipes if "stages" in yaml.safe_load(path.read_text(encoding="utf-8"))]
    assert recipes
    for path in recipes:
        assert load_recipe(path).total_steps > 0


@given(data=st.data())
def test_a_position_is_a_function_of_the_step(data: st.DataObject) -> None:
    values = toy_recipe(Path("/toy"))
    for stage in values["stages"]:
        stage["tokens"] = 512 * data.draw(st.integers(1, 9)) + data.draw(st.integers(0, 511))
    recipe = Recipe.model_validate(values)
    before = Position.at_step(recipe, 0)
    for step in range(1, recipe.total_steps + 1):
        position = Position.at_step(recipe, step)
        assert position.consumed_sequences == 8 * step and position.consumed_tokens == 512 * step
        assert (position.stage_index, position.stage_step) in {
            (before.stage_index, before.stage_step + 1),
            (before.stage_index + 1, 0),
        }
        assert position.stage_of_last_step(recipe)[0] == before.stage_index
        before = position
    assert before.stage_index == len(recipe.stages)
    with pytest.raises(ValueError, match="past the end"):
        Position.at_step(recipe, recipe.total_steps + 1)


@pytest.mark.parametrize(("warmup", "steps", "expected"), [(0.1, 100, 10), (5.0, 100, 5), (0.0, 7, 0), (50.0, 10, 9)])
def test_warmup_is_a_share_or_a_number_of_steps(warmup: float, steps: int, expected: int) -> None:
    assert LearningRateConfig(peak=1.0, warmup=warmup).warmup_steps(steps) == expected


@pytest.mark.parametrize(
    ("tokens", "steps"), [(512, 1), (767, 1), (768, 2), (1023, 2), (1024, 2), (1279, 2), (1280, 3), (10_000, 20)]
)
def test_a_budget_is_rounded_to_the_nearest_global_batch(recipe_file: Path, tokens: int, steps: int) -> None:
    stage = load_recipe(recipe_file, [f"stages.0.tokens={tokens}"]).stages[0]
    assert (stage.steps, stage.n_sequences) == (steps, steps * 8)
    assert abs(stage.n_sequences * stage.seq_length - tokens) <= stage.global_batch_tokens / 2


def test_null_drops_what_a_base_names(recipe_file: Path, tmp_path: Path) -> None:
    base = yaml.safe_load(recipe_file.read_text())
    base["data"]["datasets"] = {"speech": "/data/speech", "text": "/data/text"}
    base["init"] = {"checkpoint": "/runs/a", "mode": "fine-tune"}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    layer = {"base": "base.yaml", "data": {"datasets": {"text": None, "more": "more"}}, "init": {"checkpoint": None}}
    (tmp_path / "layer.yaml").write_text(yaml.safe_dump(layer))
    recipe = load_recipe(tmp_path / "layer.yaml", ["stages.pt.task_mass.text_lm=null", "stages.pt.source_caps.a=null"])
    assert recipe.data.datasets == {"speech": "/data/speech", "more": str(tmp_path / "more")}
    assert recipe.init is None
    assert recipe.stages[0].task_mass == {"speech_lm": 0.5, "tts": 0.4} and recipe.stages[0].source_caps == {}


def test_a_rate_that_the_batch_scales_up_counts_as_it_is_trained_with(recipe_file: Path) -> None:
    rule = "stages.1.lr={peak: 4.0e-3, scale_with_batch: linear, reference_batch_tokens: %d}"
    assert load_recipe(recipe_file, [rule % 512]).stages[1].peak_learning_rate == 4e-3
    with pytest.raises(InputError, match=r"lr.peak 0.008 is above lr.peak 0.005 of stage pt"):
        load_recipe(recipe_file, [rule % 256])


def test_types_of_sections_are_found_inside_unions() -> None:
    annotation: Any = list[LearningRateConfig] | None
    assert list(_models_in(annotation)) == [LearningRateConfig]
