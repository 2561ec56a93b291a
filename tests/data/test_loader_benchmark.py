"""The loader's benchmark reads what it says and accounts for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_speech.benchmark import loader
from megatron_speech.tokens.space import MODALITY_AUDIO, MODALITY_TEXT
from megatron_speech.tokens.templates import compile_document


@pytest.mark.parametrize("options", [{}, {"prompt": 0.0, "workers": 2, "cold": True}, {"packing": "bucket"}], ids=str)
def test_figures_are_of_whole_batches_and_memory_is_sampled_along_the_way(
    tmp_path_factory: pytest.TempPathFactory, options: dict[str, Any]
) -> None:
    folder = tmp_path_factory.getbasetemp() / "loader-benchmark"
    folder.mkdir(exist_ok=True)
    batch = loader.SEQ_LENGTH * loader.GLOBAL_BATCH_SEQUENCES
    figures = loader.measure(folder, tokens=2 * batch + 5, dataset_tokens=200_000, samples=2, **options)
    assert figures["positions"] == 2 * batch
    assert 0.6 * 2 * batch < figures["tokens"] <= 2 * batch
    assert figures["tokens"] == 2 * batch or figures["packing"] != "cut"
    assert figures["tokens_per_cpu_second"] > 0
    assert [point["tokens"] for point in figures["memory"]] == [0, batch, 2 * batch]
    assert all(point["rss_anon_bytes"] > 0 for point in figures["memory"])


def test_its_documents_are_those_of_the_task(tmp_path: Path) -> None:
    dataset, space = loader.make_dataset(tmp_path / "d", 30_000), loader.toy_space()
    dataset.check(space)
    assert 30_000 <= dataset.total_tokens < 32_000
    modality = space.modality_table()
    for k in range(len(dataset)):
        ids = dataset.document(k)
        codes = ids[modality[ids] == MODALITY_AUDIO]
        text = ids[modality[ids] == MODALITY_TEXT]
        made = compile_document(space, "tts", text_ids=text, code_ids=codes)
        assert made.tolist() == ids.tolist()
