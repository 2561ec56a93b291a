"""Claims about the rows of new ids: the statistics of the known rows, the same for the same seed, no padding drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from backbones import VOCABULARY, make_backbone, make_tokenizer

from megatron_speech.convert.new_rows import KINDS, NewRows, draw_rows
from megatron_speech.model.builder import global_named_parameters
from megatron_speech.training.checkpoint.load import load_for_inference

Import = Callable[..., Path]
TABLES = ("embedding.word_embeddings.weight", "output_layer.weight")


def correlated(rows: int, width: int) -> torch.Tensor:
    """Rows with a mean and strong correlations."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(width, width, generator=generator) / width**0.5
    return torch.randn(rows, width, generator=generator) @ mixing + torch.linspace(-1, 1, width)


@pytest.mark.parametrize("kind", KINDS)
def test_new_rows_have_the_statistics_of_the_known_ones(kind: NewRows) -> None:
    known = correlated(20_000, 24)
    new = torch.empty(40_000, 24)
    draw_rows(known, new, kind=kind, seed=1, name="table")
    covariance = torch.cov(known.T)
    wanted = {
        "covariance": covariance,
        "normal": torch.diag(covariance.diagonal()),
        "mean": torch.zeros_like(covariance),
    }[kind]
    scale = covariance.diagonal().mean()
    # Standard errors: √(σ²/n) of a mean, σ²·√(2/n) of a variance.
    assert (new.mean(0) - known.mean(0)).abs().max() < 5 * (covariance.diagonal().max() / 40_000) ** 0.5 + 1e-6
    assert (torch.cov(new.T) - wanted).abs().max() < 8 * scale * (2 / 40_000) ** 0.5 * (kind != "mean") + 1e-6 * scale


def test_a_seed_is_a_draw_and_a_table_is_one_too() -> None:
    known, draws = correlated(500, 8), {}
    for seed, name in ((1, "a"), (1, "a"), (2, "a"), (1, "b")):
        new = torch.empty(9, 8)
        draw_rows(known, new, kind="covariance", seed=seed, name=name)
        assert torch.equal(draws.setdefault((seed, name), new), new)
    one, *others = draws.values()
    assert not any(torch.equal(one, other) for other in others)


def test_few_and_equal_rows_have_a_factor_too() -> None:
    new = torch.empty(5, 16)
    draw_rows(correlated(3, 16), new, kind="covariance", seed=0, name="few")
    assert new.isfinite().all()
    draw_rows(torch.ones(4, 16), new, kind="covariance", seed=0, name="equal")
    assert torch.equal(new, torch.ones(5, 16))


def test_tables_get_their_own_statistics_and_padding_stays_zero(tmp_path: Path, imported: Import) -> None:
    theirs = make_backbone(tmp_path / "hf", "llama")
    with torch.no_grad():  # a head unlike the table, and rows beyond the tokenizer that no statistic may see
        theirs.lm_head.weight.mul_(3).add_(0.5)
        used = make_tokenizer().get_vocab_size()
        theirs.model.embed_tokens.weight[used:] = 1e3
    theirs.save_pretrained(tmp_path / "hf")
    seeded = {}
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        model, space, _ = load_for_inference(imported(tmp_path / "hf", "--seed", seed, name=name))
        seeded[name] = {key: p.detach() for key, p in global_named_parameters(model) if key in TABLES}
    table, head = (seeded["a"][name] for name in TABLES)
    for ours, known in ((table, theirs.model.embed_tokens.weight), (head, theirs.lm_head.weight)):
        assert torch.equal(ours[:VOCABULARY], known)
        assert len(ours) > space.size and ours[space.size :].count_nonzero() == 0
        new, trained = ours[VOCABULARY : space.size], known[:used]
        assert (new.mean() - trained.mean()).abs() < 0.02 and (new.std() / trained.std() - 1).abs() < 0.05
    for name in TABLES:
        assert torch.equal(seeded["a"][name], seeded["b"][name])
        assert not torch.equal(seeded["a"][name], seeded["c"][name])
