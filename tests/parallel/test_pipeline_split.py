"""The automatic split of a pipeline is the best there is, and one that cannot be is refused."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_speech.errors import InputError
from megatron_speech.model.pipeline_split import balance, core_layout, split_layers
from megatron_speech.recipe.model import ModelConfig
from megatron_speech.recipe.parallel import check_pipeline_layout

SPEECH_VOCABULARY = 193_856


def rank_work(split, stages, first, last):
    extra = [0.0] * len(split)
    extra[0] += first
    extra[-1] += last
    return [sum(split[piece] + extra[piece] for piece in range(rank, len(split), stages)) for rank in range(stages)]


def every_split(layers, pieces):
    """All ways to give every piece but the last a layer or more."""
    for counts in itertools.product(range(1, layers + 1), repeat=pieces - 1):
        if sum(counts) <= layers:
            yield (*counts, layers - sum(counts))


@given(
    layers=st.integers(1, 9),
    shape=st.sampled_from([(2, 1), (3, 1), (4, 1), (5, 1), (2, 2), (3, 2), (2, 3)]),
    first=st.floats(0, 3),
    last=st.floats(0, 9),
)
def test_no_other_split_leaves_the_busiest_rank_less_to_do(layers, shape, first, last):
    stages, chunks = shape
    if layers < stages * chunks - 1:
        with pytest.raises(InputError, match=f"model.num_layers is {layers}: .* use {layers + 1} pieces or fewer"):
            balance(layers, stages, chunks, first=first, last=last)
        return
    split = balance(layers, stages, chunks, first=first, last=last)
    assert sum(split) == layers and len(split) == stages * chunks and min(split[:-1]) >= 1
    best = min(max(rank_work(other, stages, first, last)) for other in every_split(layers, stages * chunks))
    assert max(rank_work(split, stages, first, last)) == pytest.approx(best)


def test_a_speech_vocabulary_leaves_the_last_stage_fewer_layers():
    model = ModelConfig(preset="llama-3.2-1b")
    assert split_layers(model, SPEECH_VOCABULARY, 1, None, 2048) == (16,)
    two, four = (split_layers(model, SPEECH_VOCABULARY, stages, None, 2048) for stages in (2, 4))
    # The head costs about as much as six layers.
    assert two == (11, 5)
    assert four[-1] == 0 and sorted(four[:-1]) == [5, 5, 6]
    # A text model's head of 32,000 ids costs one and a half.
    assert split_layers(model, 32_000, 4, None, 2048) == (4, 4, 5, 3)


def test_layers_that_stages_do_not_divide_are_spread():
    assert balance(7, 3, 1, first=0.0, last=0.0) == (2, 2, 3)
    assert balance(10, 2, 2, first=0.0, last=0.0) == (2, 2, 3, 3)


def test_a_later_stage_takes_the_odd_layer_since_it_keeps_fewer_micro_batches():
    assert balance(5, 2, 1, first=0.0, last=0.0) == (2, 3)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ((4, 4, 4), r"pipeline_layout \[4, 4, 4\] has 3 entries: .* needs 4"),
        ((4, 4, 4, 5), "adds up to 17 layers, model.num_layers is 16"),
        ((8, 0, 4, 4), "leaves a piece without a layer"),
        ((8, 10, -6, 4), "leaves a piece without a layer"),
    ],
)
def test_a_split_of_a_recipe_that_cannot_be_is_refused(split, message):
    with pytest.raises(InputError, match=message):
        check_pipeline_layout(split, 16, 2, 2)


def test_the_ends_may_do_without_layers():
    assert check_pipeline_layout([0, 8, 8, 0], 16, 4, None) == (0, 8, 8, 0)
    assert core_layout((0, 2, 0)) == [["embedding"], ["decoder", "decoder"], ["loss"]]
