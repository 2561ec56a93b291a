"""Documents of several streams: a step is K ids that nothing parts, on disk, in sequences and in batches."""

from __future__ import annotations

import dataclasses
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_speech.data.dataset.dataset_writer import DatasetWriter
from megatron_speech.data.dataset.documents_table import SCHEMA, derive_columns
from megatron_speech.data.dataset.indexed import TokenDataset
from megatron_speech.data.dataset.manifest import CodecEntry, FilterStatistics, Manifest, Totals, write_manifest
from megatron_speech.data.dataset.verify import verify_dataset
from megatron_speech.data.loading import gathering
from megatron_speech.data.loading.gathering import Gatherer
from megatron_speech.data.loading.loader import MicroBatch
from megatron_speech.data.stage import StageData, open_datasets
from megatron_speech.errors import InputError
from megatron_speech.generation.engine import SpeechGenerator
from megatron_speech.modalities import MODALITIES
from megatron_speech.preprocess import preprocess_data
from megatron_speech.preprocess.merge_datasets import merge_inputs
from megatron_speech.recipe.data import DataConfig
from megatron_speech.recipe.stage import StageDataConfig
from megatron_speech.tokens.space import TokenSpace
from megatron_speech.tokens.templates import TEMPLATE_HASH, compile_document, render
from megatron_speech.training.execution import Execution

S = 16


def with_streams(space: TokenSpace, streams: int) -> TokenSpace:
    return dataclasses.replace(space, streams=streams)


def random_grid(space: TokenSpace, steps: int, random: np.random.Generator) -> np.ndarray:
    """A document [steps, K] whose prompt ends, in stream 0, a third of the way; any id elsewhere."""
    grid = random.integers(0, space.size, (steps, space.streams))
    grid[grid[:, 0] == space.special("<speech_start>"), 0] = 0
    if steps > 2:
        grid[steps // 3, 0] = space.special("<speech_start>")
    return grid


def write_grids(prefix: Path, space: TokenSpace, grids: list[np.ndarray], task: str = "speech_lm") -> TokenDataset:
    """Write documents [steps, K]."""
    k = space.streams
    rows = []
    for number, grid in enumerate(grids):
        start = np.flatnonzero(grid[:, 0] == space.special("<speech_start>"))
        targets = (len(grid) - 1 - int(start[0])) * k if len(start) else 0
        rows.append(
            dict.fromkeys(SCHEMA.names)
            | {
                "sample_id": f"sample-{number}",
                "source_id": f"recording-{number}",
                "language": "en",
                "dataset_source": "toy",
                "task": task,
                "tokens": grid.size,
                "target_tokens": targets,
                "duration_seconds": len(grid) / 25.0,
            }
        )
    flat = np.concatenate([grid.reshape(-1) for grid in grids]).astype(space.dtype)
    counts = np.array([grid.size for grid in grids], dtype=np.int32)
    totals = Totals(documents=len(grids), tokens=len(flat), target_tokens=sum(row["target_tokens"] for row in rows))
    manifest = Manifest(
        task=task, dtype=np.dtype(space.dtype).name, streams=k, documents=0, tokens=0, token_space_hash=space.hash,
        template_hash=TEMPLATE_HASH, tokenizer_version="1", normalization_version="1", split_seed=0, seed=0,
        codec=CodecEntry(name="toy", hash=space.codec.hash, frame_rate_hz=25.0, codebooks=1), totals=totals,
        languages={"en": totals}, sources={"toy": totals}, filters=FilterStatistics(), forms={"plain": len(grids)},
        inputs=[], files={},
    )  # fmt: skip
    with DatasetWriter(prefix, space.dtype) as writer:
        writer.add(flat, counts, derive_columns(pa.RecordBatch.from_pylist(rows, schema=SCHEMA), flat, counts))
        writer.finish(manifest)
    return TokenDataset(prefix)


def open_stage(
    folder: Path, space: TokenSpace, datasets: dict[str, TokenDataset], sequences: int, **fields: Any
) -> StageData:
    tasks = {dataset.manifest.task for dataset in datasets.values() if dataset.manifest is not None}
    stage = StageDataConfig(
        **{
            "name": "s", "task_mass": dict.fromkeys(tasks, 1.0), "tokens": S * sequences, "seq_length": S,
            "global_batch_tokens": S * sequences, "max_epochs": 1e9, "allow_text_in_sft": True,
        }
        | fields
    )  # fmt: skip
    data = DataConfig(datasets={name: one.prefix for name, one in datasets.items()}, validation_fraction=0)
    return StageData(stage, data, datasets, space, seed=1, cache_dir=folder / "cache")


def expected_rows(stage: StageData, micro: MicroBatch) -> list[dict[str, Any]]:
    """Each row of a micro-batch, step by step and stream by stream, from the segment table and the documents."""
    table, space, loss = stage.table, stage.space, stage.stage.loss
    modality, weight_of = space.modality_table(), [getattr(loss, name) for name in MODALITIES]
    start, k = space.special("<speech_start>"), space.streams
    rows = []
    for sequence in micro.sequences.tolist():
        tokens = np.full((S, k), space.special("<pad>"))
        labels, weights, groups = np.full((S, k), -100), np.zeros((S, k)), np.full((S, k), -1)
        positions, column = np.zeros(S, dtype=int), 0
        for n in range(int(table.seq_ptr[sequence]), int(table.seq_ptr[sequence + 1])):
            stratum = int(table.stratum[n])
            dataset = list(stage.datasets.values())[int(table.stratum_dataset[stratum])]
            document = dataset.document(int(table.document[n])).astype(int).reshape(-1, k)
            first, length = int(table.start[n]), int(table.length[n])
            has_prompt = loss.prompt != 1.0 and stage.strata[stratum]["task"] != "text_lm"
            ends = np.flatnonzero(document[first : first + length, 0] == start)
            prompt_steps = (int(ends[0]) + 1 if len(ends) else length + 1) if has_prompt else 0
            for step in range(length):
                tokens[column] = document[first + step]
                positions[column] = step
                whole_label = step + 1 < length or column + 1 == S  # the look-ahead, where the document goes on
                if whole_label and first + step + 1 < len(document):
                    for stream in range(k):
                        label = int(document[first + step + 1, stream])
                        weight = weight_of[modality[label]] * (loss.prompt if step + 1 < prompt_steps else 1.0)
                        if weight:
                            labels[column, stream], weights[column, stream] = label, weight
                            groups[column, stream] = stage.strata[stratum]["label"] * 3 + modality[label]
                column += 1
        positions[column:] = np.arange(S - column)
        rows.append(
            {"tokens": tokens, "labels": labels, "loss_weights": weights, "group_ids": groups, "positions": positions}
        )
    return rows


def check_batches(stage: StageData) -> int:
    """Compare every batch with the reference; returns how many steps of documents there were."""
    k = stage.space.streams
    steps = 0
    with stage.loader(0, 2, 4) as loader:
        for batch in loader:
            weights, learned = 0.0, 0
            for micro in batch.micro_batches:
                assert tuple(micro.tokens.shape) == ((2, S) if k == 1 else (2, S, k))
                for row, expected in enumerate(expected_rows(stage, micro)):
                    for name in ("tokens", "labels", "group_ids"):
                        found = getattr(micro, name)[row].reshape(S, k)
                        assert found.tolist() == expected[name].tolist(), name
                    found = micro.loss_weights[row].reshape(S, k).numpy()
                    assert np.allclose(found, expected["loss_weights"], rtol=1e-6)
                    assert micro.position_ids[row].tolist() == expected["positions"].tolist()
                    weights += float(expected["loss_weights"].sum())
                    learned += int((expected["labels"] >= 0).sum())
            assert batch.loss_totals[0].sum() == pytest.approx(weights)
            assert batch.loss_totals[1].sum() == learned
            assert batch.tokens + batch.pad_tokens == 4 * S
            steps += batch.tokens
    return steps


# ---- on disk


def test_upstreams_reader_opens_a_dataset_of_four_streams_as_rows_of_ids(tmp_path: Path, toy_space: TokenSpace) -> None:
    random = np.random.default_rng(0)
    space = with_streams(toy_space, 4)
    grids = [random_grid(space, steps, random) for steps in (5, 1, 12)]
    dataset = write_grids(tmp_path / "d", space, grids)
    assert dataset.streams == 4
    assert dataset.lengths.tolist() == [5, 1, 12] and dataset.id_counts.tolist() == [20, 4, 48]
    for i, grid in enumerate(grids):
        assert dataset.document(i).tolist() == grid.tolist()
    assert dataset.document(2, 3, 2).tolist() == grids[2][3:5].tolist()
    stock = IndexedDataset(str(tmp_path / "d"))
    assert [stock[i].tolist() for i in range(3)] == [grid.reshape(-1).tolist() for grid in grids]
    assert verify_dataset(dataset.prefix, space).findings == []


def test_a_merged_dataset_keeps_the_streams_of_its_parts(tmp_path: Path, toy_space: TokenSpace) -> None:
    random = np.random.default_rng(0)
    space = with_streams(toy_space, 2)
    grids = [random_grid(space, steps, random) for steps in (5, 3, 4)]
    write_grids(tmp_path / "a", space, grids[:2])
    write_grids(tmp_path / "b", space, grids[2:])
    inputs = [str(tmp_path / "a"), str(tmp_path / "b")]
    output = str(tmp_path / "both")
    assert merge_inputs(Namespace(input=inputs, output_prefix=output, allow_missing=False, restart=False)) == 0
    merged = TokenDataset(output)
    assert merged.streams == 2
    assert [merged.document(i).tolist() for i in range(3)] == [grid.tolist() for grid in grids]


def test_half_a_step_is_neither_written_nor_read(tmp_path: Path, toy_space: TokenSpace) -> None:
    space = with_streams(toy_space, 2)
    dataset = write_grids(tmp_path / "d", space, [np.ones((3, 2), dtype=int)])
    assert dataset.manifest is not None
    row = dataset.columns().to_batches()[0]
    with (
        DatasetWriter(tmp_path / "half", space.dtype) as writer,
        pytest.raises(ValueError, match="document 0 has 1 ids beyond whole steps of 2 streams"),
    ):
        writer.add(np.ones(5, dtype=space.dtype), np.array([5], dtype=np.int32), row)
        writer.finish(dataset.manifest)
    with DatasetWriter(tmp_path / "half", space.dtype) as writer:
        writer.add(np.ones(5, dtype=space.dtype), np.array([5], dtype=np.int32), row)
        written = writer.finish(dataset.manifest.model_copy(update={"streams": 1}))
    write_manifest(tmp_path / "half.manifest.json", written.model_copy(update={"streams": 2}))
    with pytest.raises(InputError, match="document 0 has 5 ids, which are no whole steps of the 2 streams"):
        TokenDataset(tmp_path / "half")


# ---- never taken for another number of streams


def test_a_token_space_of_one_stream_does_not_mention_it_and_another_reads_back(
    tmp_path: Path, toy_space: TokenSpace
) -> None:
    toy_space.save(tmp_path / "one.json")
    assert "streams" not in json.loads((tmp_path / "one.json").read_text())
    assert TokenSpace.load(tmp_path / "one.json").streams == 1
    eight = with_streams(toy_space, 8)
    assert eight.hash != toy_space.hash
    eight.save(tmp_path / "eight.json")
    assert TokenSpace.load(tmp_path / "eight.json") == eight
    value = json.loads((tmp_path / "eight.json").read_text()) | {"streams": 4}
    (tmp_path / "edited.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match="the file was edited or damaged"):
        TokenSpace.load(tmp_path / "edited.json")


def test_a_dataset_of_other_streams_than_the_token_space_or_its_neighbours_is_refused(
    tmp_path: Path, toy_space: TokenSpace
) -> None:
    two = with_streams(toy_space, 2)
    first = write_grids(tmp_path / "two", two, [np.ones((4, 2), dtype=int)])
    with pytest.raises(InputError, match=r"two.manifest.json: streams is 2, but the token space has 1"):
        first.check(toy_space)
    first.check(two)
    with pytest.raises(InputError, match="streams is 2, but the token space has 1"):
        open_datasets(DataConfig(datasets={"a": first.prefix}), toy_space)
    # Of equal hashes, as two spaces never have them, so that nothing but the streams tells.
    assert first.manifest is not None
    one = write_grids(tmp_path / "one", toy_space, [np.ones((4, 1), dtype=int)])
    assert one.manifest is not None
    one.manifest.token_space_hash = two.hash
    with pytest.raises(InputError, match="cannot be mixed: streams is 2 in the first and 1 in the second"):
        open_stage(tmp_path, two, {"two": first, "one": one}, 4)
    with pytest.raises(InputError, match="datasets of different numbers of streams cannot be read together: 1 in"):
        Gatherer([first, one])


def test_what_takes_one_stream_says_so(
    tmp_path: Path, toy_space: TokenSpace, capsys: pytest.CaptureFixture[str]
) -> None:
    space = with_streams(toy_space, 8)
    codes = np.zeros(3, dtype=np.int32)
    for what, call in {
        "a task template": lambda: compile_document(space, "speech_lm", code_ids=codes),
        "rendering": lambda: render(space, codes),
        "the model": lambda: Execution.build(None, space),  # type: ignore[arg-type]
        "generation": lambda: SpeechGenerator(None, space, max_sequence_length=8, device="cpu"),  # type: ignore[arg-type]
    }.items():
        with pytest.raises(InputError, match=f"the token space has 8 streams, and {what} is made for documents of 1"):
            call()
    space.save(tmp_path / "ts.json")
    (tmp_path / "samples.jsonl").write_text("")
    arguments = ["--input", str(tmp_path / "samples.jsonl"), "--output-prefix", str(tmp_path / "d"), "--task"]
    assert preprocess_data.main([*arguments, "speech_lm", "--token-space", str(tmp_path / "ts.json")]) != 0
    assert "the token space has 8 streams, and preprocess_data is made for documents of 1" in capsys.readouterr().err


# ---- in sequences and batches


@pytest.mark.parametrize("with_kernel", [True, False], ids=["kernel", "numpy"])
@pytest.mark.parametrize(
    "fields",
    [
        {"packing": {"mode": "cut"}},
        {"packing": {"mode": "fit"}, "loss": {"prompt": 0.25, "audio": 2.0}},
        {"packing": {"mode": "fit"}, "loss": {"prompt": 0.0, "normalize": "modality"}},
    ],
    ids=["cut", "fit", "sft"],
)
def test_batches_of_four_streams_are_those_of_a_naive_reading(
    tmp_path: Path,
    toy_space: TokenSpace,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
    with_kernel: bool,
) -> None:
    if not with_kernel:
        monkeypatch.setattr(gathering, "extension", lambda: None)
    random = np.random.default_rng(3)
    space = with_streams(toy_space, 4)
    longest = 40 if fields["packing"]["mode"] == "cut" else S
    speech = [random_grid(space, int(n), random) for n in random.integers(1, longest, 40)]
    text = [random_grid(space, int(n), random) for n in random.integers(1, longest, 20)]
    datasets = {
        "speech": write_grids(tmp_path / "speech", space, speech),
        "text": write_grids(tmp_path / "text", space, text, "text_lm"),
    }
    for dataset in datasets.values():
        dataset.check(space)
    stage = open_stage(tmp_path, space, datasets, 24, **fields)
    steps = check_batches(stage)
    # Proportions and budgets count steps: 24 sequences of 16 are filled, four ids to a step.
    assert steps == 24 * S or (fields["packing"]["mode"] == "fit" and steps > 0.8 * 24 * S)
    assert stage.blend_report()["tokens"] == steps
    if fields["packing"]["mode"] == "cut":
        assert (np.asarray(stage.table.start) > 0).any()


@given(
    streams=st.sampled_from([1, 2, 3, 8]),
    lengths=st.lists(st.integers(1, 3 * S), min_size=1, max_size=12),
    mode=st.sampled_from(["cut", "fit"]),
    prompt=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_step_is_ever_parted(
    tmp_path_factory: pytest.TempPathFactory,
    toy_space: TokenSpace,
    streams: int,
    lengths: list[int],
    mode: str,
    prompt: float,
    seed: int,
) -> None:
    random, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("grids")
    space = with_streams(toy_space, streams)
    if mode == "fit":
        lengths = [1 + length % S for length in lengths]
    # Every document's target has a step: a stage that learns targets alone takes no others.
    grids = [random_grid(space, max(3, length), random) for length in lengths]
    dataset = write_grids(folder / "d", space, grids)
    loss = {} if mode == "cut" else {"prompt": prompt}
    stage = open_stage(folder, space, {"d": dataset}, 4, packing={"mode": mode}, loss=loss)
    assert check_batches(stage) > 0
