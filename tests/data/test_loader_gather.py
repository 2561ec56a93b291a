"""Reading segments: the kernel and its slow equal give the same rows, and refuse what is not there."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from megatron_speech.data.dataset.indexed import TokenDataset
from megatron_speech.data.dataset.indexed_writer import disk_dtype, ids_on_disk, write_index
from megatron_speech.data.loading import gathering
from megatron_speech.data.loading import loader as loader_module
from megatron_speech.data.loading.gathering import Gatherer, Segments
from megatron_speech.data.loading.loader import GlobalBatch
from megatron_speech.data.stage import StageData
from megatron_speech.errors import InputError
from megatron_speech.ops.extension import extension
from megatron_speech.recipe.data import DataConfig
from megatron_speech.recipe.stage import StageDataConfig
from megatron_speech.tokens.space import TokenSpace

S = 64


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> list[TokenDataset]:
    """Three datasets of ids of one, two and four bytes, documents of 0 to 40 tokens; one of them without ids."""
    folder = tmp_path_factory.mktemp("mixed")
    random = np.random.default_rng(1)
    made = []
    for name, dtype, count in (("a", "u1", 30), ("b", "<u2", 50), ("c", "<i4", 20), ("d", "<i4", 3)):
        lengths = random.integers(0, 41, count) if name != "d" else np.zeros(count, np.int64)
        kind = disk_dtype(dtype)
        ids = random.integers(0, min(np.iinfo(kind).max, 1_000_000), int(lengths.sum()))
        (folder / f"{name}.bin").write_bytes(ids_on_disk(ids, lengths, kind))
        with open(folder / f"{name}.idx", "wb") as index:
            write_index(index.write, kind, lengths.astype(np.int32))
        made.append(TokenDataset(folder / name, require_manifest=False))
    return made


def random_rows(datasets: list[TokenDataset], seed: int, rectangular: bool) -> Segments:
    """Rows of 0 to 6 segments that fit S columns; some end at the edge inside their document."""
    random = np.random.default_rng(seed)
    found: list[tuple[int, int, int, int]] = []
    pointers, strides = [0], []
    for _ in range(12):
        row: list[tuple[int, int, int, int]] = []
        used = 0
        stride = int(random.integers(1, 33)) if rectangular else 0
        for k in range(int(random.integers(0, 7))):
            dataset = int(random.integers(len(datasets)))
            document = int(random.integers(len(datasets[dataset])))
            whole = int(datasets[dataset].lengths[document])
            start = int(random.integers(0, whole + 1))
            room = min(stride, S - k * stride) if rectangular else S - used
            if room <= 0:
                break
            length = min(whole - start, room)
            row.append((dataset, document, start, length))
            used += length
        found += row
        strides.append(stride)
        pointers.append(len(found))
    columns = np.array(found, dtype=np.int32).reshape(-1, 4)
    parts = [np.ascontiguousarray(columns[:, k]) for k in range(4)]
    pointers_array = np.array(pointers, dtype=np.int32)
    return Segments(*parts, pointers_array, np.array(strides, dtype=np.int32) if rectangular else None)


def without_extension(monkeypatch: pytest.MonkeyPatch, datasets: list[TokenDataset]) -> Gatherer:
    monkeypatch.setattr(gathering, "extension", lambda: None)
    return Gatherer(datasets)


@pytest.mark.parametrize("rectangular", [False, True])
def test_the_kernel_and_the_reference_read_the_same(
    mixed: list[TokenDataset], monkeypatch: pytest.MonkeyPatch, rectangular: bool
) -> None:
    if extension() is None:
        pytest.skip("the extension is not built")
    kernel, reference = Gatherer(mixed), without_extension(monkeypatch, mixed)
    edges = 0
    for seed in range(60):
        segments = random_rows(mixed, seed, rectangular)
        kernel.will_need(segments)
        found, expected = kernel.gather(segments, S, 7), reference.gather(segments, S, 7)
        assert np.array_equal(found[0], expected[0])
        assert np.array_equal(found[1], expected[1])
        edges += int(found[1].sum())
        for row, (a, b) in enumerate(zip(segments.row_pointers[:-1], segments.row_pointers[1:], strict=True)):
            column = 0
            for k in range(a, b):
                if segments.strides is not None:
                    column = (k - a) * segments.strides[row]
                ids = mixed[segments.dataset[k]].document(segments.document[k], segments.start[k], segments.length[k])
                assert found[0][row, column : column + len(ids)].tolist() == ids.tolist()
                column += len(ids)
    assert edges > 0 or rectangular


@pytest.mark.parametrize("with_kernel", [True, False])
@pytest.mark.parametrize(
    "segment",
    [(9, 0, 0, 1), (-1, 0, 0, 1), (0, 30, 0, 1), (0, -1, 0, 1), (0, 3, -1, 1), (0, 3, 0, 60), (0, 3, 2**31 - 9, 9)],
)
def test_a_segment_that_is_not_there_is_refused(
    mixed: list[TokenDataset], monkeypatch: pytest.MonkeyPatch, with_kernel: bool, segment: tuple[int, ...]
) -> None:
    gatherer = Gatherer(mixed) if with_kernel else without_extension(monkeypatch, mixed)
    columns = [np.array([value], dtype=np.int32) for value in segment]
    with pytest.raises(InputError, match="do not belong together"):
        gatherer.gather(Segments(*columns, np.array([0, 1], dtype=np.int32), None), S, 0)


def test_pages_given_back_are_read_again_unchanged(mixed: list[TokenDataset], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "_DROP_AFTER_BYTES", 1)  # after every batch
    gatherer = Gatherer(mixed)
    segments = random_rows(mixed, 5, False)
    first = gatherer.gather(segments, S, 0)[0]
    assert np.array_equal(gatherer.gather(segments, S, 0)[0], first)


# ---- rectangles, chains and threads, on stages


@pytest.fixture(scope="module")
def spoken(
    tmp_path_factory: pytest.TempPathFactory, toy_space: TokenSpace, make_dataset: Any, document: Any
) -> dict[str, TokenDataset]:
    folder = tmp_path_factory.mktemp("spoken")
    random = np.random.default_rng(0)
    speech = [document(codes=int(n), source_id=f"r{k // 9}") for k, n in enumerate(random.integers(2, 40, 200))]
    pairs = [document(codes=int(n), text=int(t)) for n, t in random.integers(2, 22, (150, 2))]
    text = [document(text=int(n), language="am") for n in random.integers(1, 40, 80)]
    given = [("speech", "speech_lm", speech), ("pairs", "tts", pairs), ("text", "text_lm", text)]
    return {name: make_dataset(folder / name, toy_space, task, rows) for name, task, rows in given}


@pytest.fixture(scope="module")
def open_stage(
    spoken: dict[str, TokenDataset], toy_space: TokenSpace, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., StageData]:
    cache = tmp_path_factory.mktemp("cache")

    def build(workers: int = 1, **fields: Any) -> StageData:
        masses = {"speech_lm": 0.6, "tts": 0.3, "text_lm": 0.1}
        stage = {"name": "s", "task_mass": masses, "tokens": S * 16 * 6, "seq_length": S, "global_batch_tokens": S * 16}
        data = DataConfig(
            datasets={name: dataset.prefix for name, dataset in spoken.items()}, workers=workers, validation_fraction=0
        )
        return StageData(StageDataConfig(**(stage | fields)), data, spoken, toy_space, seed=1, cache_dir=cache)

    return build


def load(stage: StageData, micro_batch_size: int = 4) -> list[GlobalBatch]:
    with stage.loader(0, micro_batch_size, 16) as loader:
        return list(loader)


@pytest.mark.parametrize("loss", [{}, {"prompt": 0.0}], ids=["pt", "sft"])
def test_a_rectangle_holds_whole_documents_at_one_stride_and_learns_nothing_between_them(
    open_stage: Callable[..., StageData], toy_space: TokenSpace, loss: dict[str, float]
) -> None:
    stage = open_stage(packing={"mode": "bucket"}, loss=loss, name="bucket", allow_text_in_sft=True)
    pad = toy_space.special("<pad>")
    modality = toy_space.modality_table().astype(np.int64)
    begins = toy_space.special("<speech_start>")
    datasets = list(stage.datasets.values())
    table = stage.table
    tokens = pads = 0
    for batch in load(stage):
        for micro in batch.micro_batches:
            edges = set(micro.cu_seqlens.tolist())
            for row, sequence in enumerate(micro.sequences.tolist()):
                first, last = int(table.seq_ptr[sequence]), int(table.seq_ptr[sequence + 1])
                stride = int(table.length[first:last].max())
                expected = np.full(S, pad)
                labels = np.full(S, -100)
                positions = np.zeros(S, dtype=np.int64)
                for k in range(first, last):
                    dataset = datasets[table.dataset_of(slice(k, k + 1))[0]]
                    ids = dataset.document(int(table.document[k])).astype(np.int64)
                    assert len(ids) == table.length[k]
                    at = (k - first) * stride
                    assert {row * S + at, row * S + at + len(ids)} <= edges
                    expected[at : at + len(ids)] = ids
                    end = at + stride if k + 1 < last else S
                    positions[at : at + len(ids)] = np.arange(len(ids))
                    positions[at + len(ids) : end] = np.arange(end - at - len(ids))
                    learned = ids[1:].copy()
                    if loss and begins in ids:
                        learned[: int(np.argmax(ids == begins))] = -100
                    labels[at : at + len(ids) - 1] = learned
                assert micro.tokens[row].tolist() == expected.tolist()
                assert micro.labels[row].tolist() == labels.tolist()
                assert micro.position_ids[row].tolist() == positions.tolist()
                assert (micro.loss_weights[row] != 0).tolist() == (labels != -100).tolist()
                known = np.where(labels == -100, 0, labels)
                groups = np.where(labels == -100, -1, modality[known])
                assert (np.where(groups < 0, -1, micro.group_ids[row].numpy() % 3)).tolist() == groups.tolist()
                assert ((micro.group_ids[row] == -1).numpy() == (labels == -100)).all()
                tokens += int(table.length[first:last].sum())
                pads += S - int(table.length[first:last].sum())
    assert tokens == sum(batch.tokens for batch in load(stage))
    assert pads == sum(batch.pad_tokens for batch in load(stage))


@pytest.mark.parametrize("fields", [{}, {"packing": {"mode": "bucket"}}, {"loss": {"prompt": 0.5}}], ids=str)
def test_threads_change_nothing(open_stage: Callable[..., StageData], fields: dict[str, Any]) -> None:
    one, four = load(open_stage(**fields), 1), load(open_stage(workers=4, **fields), 1)
    assert len(one) == len(four) == 6
    for a, b in zip(one, four, strict=True):
        assert (*a.loss_totals.flat, a.tokens, a.pad_tokens, a.consumed_sequences) == (
            *b.loss_totals.flat, b.tokens, b.pad_tokens, b.consumed_sequences,
        )  # fmt: skip
        for x, y in zip(a.micro_batches, b.micro_batches, strict=True):
            assert x.sequences.tolist() == y.sequences.tolist()
            for name in ("tokens", "labels", "loss_weights", "position_ids", "group_ids", "cu_seqlens"):
                assert torch.equal(getattr(x, name), getattr(y, name))


def test_micro_batches_made_together_are_those_made_alone(open_stage: Callable[..., StageData]) -> None:
    rows = open_stage().rows()
    sequences = np.arange(12).reshape(4, 3)
    for together, alone in zip(rows.chunk(sequences).micro_batches, map(rows.micro_batch, sequences), strict=True):
        assert together.max_seqlen == alone.max_seqlen
        assert together.documents.tolist() == alone.documents.tolist()
        for name in ("tokens", "labels", "cu_seqlens", "row_pointers", "counts", "loss_weights", "group_ids"):
            assert torch.equal(getattr(together, name), getattr(alone, name)), name
            assert getattr(together, name).is_contiguous()


def test_an_error_in_a_thread_reaches_the_consumer_with_its_sentence(
    open_stage: Callable[..., StageData], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = open_stage(workers=3)

    def failing(*_: Any) -> Any:
        raise InputError("the file system went away")

    monkeypatch.setattr(gathering.Gatherer, "gather", failing)
    with stage.loader(0, 4, 16) as loader, pytest.raises(InputError, match="the file system went away"):
        next(loader)


def test_what_is_made_ahead_is_bounded_and_asked_for_in_time(
    open_stage: Callable[..., StageData], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module, "_CHUNK_IDS", 4 * S)  # one micro-batch
    source = open_stage().rows()
    asked: list[int] = []
    made: list[int] = []
    ask, make = loader_module.RowSource.will_need, loader_module.RowSource.chunk

    def asking(self: Any, rows: np.ndarray) -> None:
        asked.append(int(rows[0, 0]))
        ask(self, rows)

    def making(self: Any, rows: np.ndarray) -> Any:
        assert int(rows[0, 0]) in asked
        made.append(int(rows[0, 0]))
        return make(self, rows)

    monkeypatch.setattr(loader_module.RowSource, "will_need", asking)
    monkeypatch.setattr(loader_module.RowSource, "chunk", making)
    layout = {"micro_batch_size": 4, "global_batch_sequences": 16, "dp_rank": 0, "dp_size": 1}
    batches = loader_module.global_batches(source, first_sequence=0, n_batches=6, workers=2, **layout)
    for step in range(6):
        next(batches)
        # Four chunks a batch, and at most two a worker beyond it.
        assert len(asked) <= 4 * (step + 1) + 4
    assert next(batches, None) is None
    assert asked == sorted(asked) == sorted(made) == list(range(0, 96, 4))


def test_threads_end_with_the_loader(open_stage: Callable[..., StageData]) -> None:
    stage = open_stage(workers=3)
    for end in (lambda loader: loader.close(), list):
        loader = stage.loader(0, 4, 16)
        next(loader)
        end(loader)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("megatron-speech-loader")]
