"""How many speakers a batch has, without reading a name while training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_speech.data.dataset.indexed import TokenDataset
from megatron_speech.data.dataset.speakers import NOBODY, speaker_hashes
from megatron_speech.data.stage import StageData
from megatron_speech.recipe.data import DataConfig
from megatron_speech.recipe.stage import StageDataConfig
from megatron_speech.tokens.space import TokenSpace

S = 32


@pytest.fixture
def datasets(tmp_path: Path, toy_space: TokenSpace, make_dataset: Any, document: Any) -> dict[str, TokenDataset]:
    names = ["ann", "bob", "cid", None]
    speech = [document(codes=5 + k % 7, columns={"speaker_id": names[k % 4]}) for k in range(60)]
    other = [document(codes=6, source="other", columns={"speaker_id": "ann"}) for _ in range(20)]
    return {
        "speech": make_dataset(tmp_path / "speech", toy_space, "speech_lm", [*speech, *other]),
        "text": make_dataset(tmp_path / "text", toy_space, "text_lm", [document(text=9) for _ in range(40)]),
    }


def test_a_name_is_a_speaker_within_its_source(datasets: dict[str, TokenDataset], tmp_path: Path) -> None:
    hashes = speaker_hashes(datasets["speech"], "key", tmp_path)
    table = datasets["speech"].columns("speaker_id", "dataset_source").to_pylist()
    named = {(row["speaker_id"], row["dataset_source"]): int(found) for row, found in zip(table, hashes, strict=True)}
    assert named[None, "toy"] == NOBODY
    assert len(set(named.values())) == 5  # ann, bob and cid of toy, ann of other, nobody
    # The second time nothing is read.
    (tmp_path / "speech.docs.parquet").unlink()
    assert speaker_hashes(datasets["speech"], "key", tmp_path).tolist() == hashes.tolist()


def test_a_batch_has_the_speakers_of_its_documents(
    datasets: dict[str, TokenDataset], toy_space: TokenSpace, tmp_path: Path
) -> None:
    config = StageDataConfig(
        name="pt", task_mass={"speech_lm": 0.8, "text_lm": 0.2}, tokens=20 * S, seq_length=S, global_batch_tokens=4 * S
    )
    data = DataConfig(datasets={name: dataset.prefix for name, dataset in datasets.items()})
    stage = StageData(config, data, datasets, toy_space, seed=1, cache_dir=tmp_path / "cache")
    assert stage.speakers(0, 4) is None  # nobody looked
    stage.load_speakers(dict.fromkeys(datasets, "a") | {"text": "b"})
    table = stage.table
    for first in range(0, 20, 4):
        expected = set()
        for segment in range(int(table.seq_ptr[first]), int(table.seq_ptr[first + 4])):
            dataset = list(datasets.values())[int(table.dataset_of(segment))]
            row = dataset.columns("speaker_id", "dataset_source").slice(int(table.document[segment]), 1).to_pylist()[0]
            if row["speaker_id"] is not None:
                expected.add((row["speaker_id"], row["dataset_source"]))
        assert stage.speakers(first, first + 4) == (len(expected) or None)
    assert np.load(tmp_path / "cache/speakers-b.npy").tolist() == [NOBODY] * 40
