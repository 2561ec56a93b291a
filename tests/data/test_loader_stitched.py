"""Stitched stages: a chain is one attention document in the batch, and one side of the split holds all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_speech.data.dataset.indexed import TokenDataset
from megatron_speech.data.stage import StageData
from megatron_speech.errors import InputError
from megatron_speech.recipe.data import DataConfig
from megatron_speech.recipe.stage import StageDataConfig
from megatron_speech.tokens.space import TokenSpace

S = 96


@pytest.fixture(scope="module")
def talks(
    tmp_path_factory: pytest.TempPathFactory, toy_space: TokenSpace, make_dataset: Any, document: Any
) -> dict[str, TokenDataset]:
    """Talks of one-second segments with a silence in the middle, as speech and as pairs of text and speech."""
    folder = tmp_path_factory.mktemp("talks")
    random = np.random.default_rng(3)

    def segments(count: int, **fields: Any) -> list[Any]:
        rows = []
        for talk in range(count):
            for k in range(8):
                start = k * 1.0 + (30.0 if k >= 4 else 0.0)
                times = {"segment_order": k, "start_time": start, "end_time": start + 1.0, "speaker_id": f"s{talk}"}
                codes = int(random.integers(5, 25))
                rows.append(document(codes=codes, source_id=f"talk-{talk}", columns=times, **fields))
        return [rows[k] for k in random.permutation(len(rows))]

    return {
        "speech": make_dataset(folder / "speech", toy_space, "speech_lm", segments(30)),
        "pairs": make_dataset(folder / "pairs", toy_space, "tts", segments(30, text=5)),
        "books": make_dataset(folder / "books", toy_space, "text_lm", [document(text=20)] * 40),
    }


def stage_of(talks: dict[str, TokenDataset], space: TokenSpace, cache: Path, **fields: Any) -> StageData:
    split = fields.pop("split", "train")
    held = fields.pop("validation_fraction", 0.3)
    stage = StageDataConfig(
        **{
            "name": "s3", "task_mass": {"speech_lm": 0.5, "tts": 0.4, "text_lm": 0.1}, "tokens": S * 8 * 4,
            "seq_length": S, "global_batch_tokens": S * 8, "stitch": {},
        }
        | fields
    )  # fmt: skip
    names = {name: dataset.prefix for name, dataset in talks.items()}
    data = DataConfig(datasets=names, validation_fraction=held)
    return StageData(stage, data, talks, space, seed=2, cache_dir=cache, split=split)


def facts(talks: dict[str, TokenDataset]) -> list[list[dict[str, Any]]]:
    names = ("source_id", "segment_order", "speaker_id")
    return [dataset.columns(*names).to_pylist() for dataset in talks.values()]


@pytest.mark.parametrize("mode", ["cut", "fit"])
def test_a_chain_is_one_document_whose_positions_run_on(
    talks: dict[str, TokenDataset], toy_space: TokenSpace, tmp_path: Path, mode: str
) -> None:
    stage = stage_of(talks, toy_space, tmp_path, packing={"mode": mode}, name=mode)
    datasets, rows_of = list(talks.values()), facts(talks)
    table = stage.table
    assert table.joined is not None
    assert table.joined.any()
    longest_chain, taken, attended = 0, 0, 0
    with stage.loader(0, 4, 8) as loader:
        for batch in loader:
            for micro in batch.micro_batches:
                assert micro.max_seqlen == max(np.diff(micro.cu_seqlens.tolist()))
                for row, sequence in enumerate(micro.sequences.tolist()):
                    tokens: list[int] = []
                    positions: list[int] = []
                    starts, chain, before = set(), 0, (-1, -1)
                    for k in range(int(table.seq_ptr[sequence]), int(table.seq_ptr[sequence + 1])):
                        dataset, document = int(table.dataset_of(slice(k, k + 1))[0]), int(table.document[k])
                        ids = datasets[dataset].document(document, int(table.start[k]), int(table.length[k])).tolist()
                        if table.joined[k]:
                            one, other = rows_of[before[0]][before[1]], rows_of[dataset][document]
                            assert dataset == before[0]
                            assert one["source_id"] == other["source_id"]
                            assert one["segment_order"] + 1 == other["segment_order"] != 4  # a silence before the 4th
                            chain += 1
                        else:
                            starts.add(row * S + len(tokens))
                            positions_begin = len(tokens)
                            chain = 1
                        longest_chain = max(longest_chain, chain)
                        positions += range(len(tokens) - positions_begin, len(tokens) - positions_begin + len(ids))
                        tokens += ids
                        before = dataset, document
                    used = len(tokens)
                    taken, attended = taken + used, attended + sum(position + 1 for position in positions)
                    assert micro.tokens[row, :used].tolist() == tokens
                    assert micro.position_ids[row, :used].tolist() == positions
                    inside = {int(edge) for edge in micro.cu_seqlens[:-1] if row * S <= edge < row * S + used}
                    assert inside == starts
                    # Every token that has one before it in its chain is learned, a <bos> inside the chain too.
                    has_next = [p > 0 for p in positions[1:]]
                    assert (micro.labels[row, : used - 1] != -100).tolist() == has_next
    assert 2 < longest_chain <= 4
    # What FLOPs are counted by: every position attends to itself and to all before it in its chain.
    assert stage.reach == pytest.approx(2 * attended / taken - 1, rel=1e-12)


def test_all_of_a_recording_falls_on_one_side_of_the_split_in_every_task(
    talks: dict[str, TokenDataset], toy_space: TokenSpace, tmp_path: Path
) -> None:
    rows_of = facts(talks)
    sources: list[set[str]] = []
    for split in ("train", "validation"):
        stage = stage_of(talks, toy_space, tmp_path, split=split, tokens=S * 8 * 40)
        table = stage.table
        datasets = table.dataset_of(slice(None))
        pairs = set(zip(datasets.tolist(), table.document.tolist(), strict=True))
        sources.append({rows_of[dataset][document]["source_id"] for dataset, document in pairs})
        if split == "validation":
            # Once each, whether stitched or not.
            plain = stage_of(talks, toy_space, tmp_path, split=split, stitch=None)
            assert sorted(table.length[table.start == 0].tolist() and pairs) == sorted(
                set(zip(plain.table.dataset_of(slice(None)).tolist(), plain.table.document.tolist(), strict=True))
            )
            assert table.length.sum() == plain.table.length.sum()
    assert sources[0]
    assert sources[1]
    assert not sources[0] & sources[1]


def test_a_dataset_without_adjacency_is_refused_by_name(
    talks: dict[str, TokenDataset], toy_space: TokenSpace, tmp_path: Path, make_dataset: Any, document: Any
) -> None:
    plain = make_dataset(tmp_path / "plain", toy_space, "speech_lm", [document(codes=9)] * 20)
    with pytest.raises(InputError, match=r"dataset plain: .* cannot be stitched: of 20 documents none has all"):
        stage_of({"plain": plain}, toy_space, tmp_path, task_mass={"speech_lm": 1.0}, validation_fraction=0.0)


def test_documents_that_are_left_out_for_want_of_a_neighbour_are_reported(
    talks: dict[str, TokenDataset], toy_space: TokenSpace, tmp_path: Path
) -> None:
    # Hardly two documents fit a sequence together.
    stage = stage_of(talks, toy_space, tmp_path, seq_length=40, tokens=40 * 8, global_batch_tokens=40 * 8,
                     stitch={"singles": "drop"}, name="dropped", task_mass={"speech_lm": 0.9, "text_lm": 0.1},
                     validation_fraction=0.0)  # fmt: skip
    report = stage.blend_report()
    alone = report["excluded_documents"]["without_neighbour"]
    available = {row["dataset"]: row["documents_available"] for row in report["strata"]}
    assert 0 < alone["speech"] <= 240 - 2 * available["speech"]
    assert available["books"] == 40
    assert "books" not in alone
