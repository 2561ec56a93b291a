"""The index of a stage: the same bytes wherever it is built, a key that covers everything, sums that add up."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from megatron_speech.data.blend import strata as blending
from megatron_speech.data.dataset import document_columns
from megatron_speech.data.dataset.indexed import TokenDataset
from megatron_speech.data.sequences.index_build import index_key, read_tables
from megatron_speech.data.stage import StageData
from megatron_speech.errors import InputError
from megatron_speech.recipe.data import DataConfig
from megatron_speech.recipe.stage import StageDataConfig
from megatron_speech.tokens.space import TokenSpace

S = 64
STAGES: dict[str, dict[str, Any]] = {
    "cut": {},
    "fit": {"packing": {"mode": "fit", "oversize": "drop"}},
    "bucket": {"packing": {"mode": "bucket", "oversize": "drop", "max_tokens": 60}},
    "sft": {"task_mass": {"tts": 1.0}, "loss": {"prompt": 0.0}, "packing": {"oversize": "drop"}},
    "stitched": {"stitch": {"missing": "single"}},
    "windows": {"shuffle_window": {"shards": 3, "shard_mib": 0.0005}},
    "stitched-windows": {"stitch": {"missing": "single"}, "shuffle_window": {"shards": 3, "shard_mib": 0.0005}},
}


@pytest.fixture(scope="module")
def datasets(
    tmp_path_factory: pytest.TempPathFactory, toy_space: TokenSpace, make_dataset: Any, document: Any
) -> dict[str, TokenDataset]:
    folder = tmp_path_factory.mktemp("datasets")
    random = np.random.default_rng(0)

    def talk(k: int) -> dict[str, Any]:
        return {"segment_order": k % 4, "start_time": k % 4, "end_time": k % 4 + 1.0, "speaker_id": "ann"}

    speech = [
        document(codes=int(n), language="en" if k % 3 else "hi", source_id=f"talk-{k // 4}", columns=talk(k))
        for k, n in enumerate(random.integers(1, 80, 240))
    ]
    pairs = [
        document(codes=int(n), text=int(n) // 3, source_id=f"recording-{k}", source=f"corpus-{k % 3}", columns=talk(k))
        for k, n in enumerate(random.integers(5, 40, 150))
    ]
    text = [document(text=int(n), language="am", source="books") for n in random.integers(1, 40, 60)]
    return {
        name: make_dataset(folder / name, toy_space, task, documents, seed=seed)
        for seed, (name, task, documents) in enumerate(
            [("speech", "speech_lm", speech), ("pairs", "tts", pairs), ("text", "text_lm", text)]
        )
    }


def stage_config(**fields: Any) -> StageDataConfig:
    return StageDataConfig(
        **{
            "name": "pt",
            "task_mass": {"speech_lm": 0.6, "tts": 0.3, "text_lm": 0.1},
            "tokens": S * 40 * 8,
            "seq_length": S,
            "global_batch_tokens": S * 40,
            **fields,
        }
    )


def data_config(datasets: dict[str, TokenDataset], **fields: Any) -> DataConfig:
    prefixes = {name: dataset.prefix for name, dataset in datasets.items()}
    return DataConfig(datasets=prefixes, **{"validation_fraction": 0.2} | fields)


@pytest.fixture
def open_stage(datasets: dict[str, TokenDataset], toy_space: TokenSpace, tmp_path: Path) -> Callable[..., StageData]:
    def build(fields: dict[str, Any], folder: str = "cache", **options: Any) -> StageData:
        arguments = {"seed": 3, "cache_dir": tmp_path / folder} | options
        return StageData(stage_config(**fields), data_config(datasets), datasets, toy_space, **arguments)

    return build


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_two_nodes_build_the_same_bytes(
    open_stage: Callable[..., StageData], tmp_path: Path, name: str, split: str
) -> None:
    for folder in ("one", "two"):
        open_stage(STAGES[name], folder, split=split).verify()
    built = contents(tmp_path / "one")
    assert len(built) == (8 if name.startswith("stitched") else 7)  # the columns, index.json, the lock
    assert built == contents(tmp_path / "two")


BUILD = """
import sys, json
from pathlib import Path
from megatron_speech.recipe.data import DataConfig
from megatron_speech.recipe.stage import StageDataConfig
from megatron_speech.data.dataset.indexed import TokenDataset
from megatron_speech.data.sequences.index_build import index_builder
from megatron_speech.data.sequences.index_cache import cached_table
from megatron_speech.ops.extension import extension_status
data, stages = json.loads(sys.argv[1])
datasets = {name: TokenDataset(prefix) for name, prefix in data["datasets"].items()}
for name, stage in stages.items():
    config = StageDataConfig(**stage)
    build = index_builder(
        config, DataConfig(**data), datasets, split="train", n_sequences=config.n_sequences, seed=3
    )
    cached_table(Path(sys.argv[2]), name, build, joined=config.stitch is not None)
print(extension_status())
"""


@pytest.mark.slow
def test_an_index_built_without_a_compiler_is_the_same(
    datasets: dict[str, TokenDataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = {name: stage_config(**fields).model_dump(mode="json") for name, fields in STAGES.items()}
    given = json.dumps([data_config(datasets).model_dump(mode="json"), stages])
    for folder, without in (("compiled", "0"), ("plain", "1")):
        monkeypatch.setenv("MEGATRON_SPEECH_NO_EXTENSION", without)
        done = subprocess.run(
            [sys.executable, "-c", BUILD, given, str(tmp_path / folder)], capture_output=True, text=True, check=True
        )
        assert without == "0" or "MEGATRON_SPEECH_NO_EXTENSION is set" in done.stdout
    assert contents(tmp_path / "plain") == contents(tmp_path / "compiled")


@pytest.mark.parametrize("name", STAGES)
def test_the_report_adds_up_to_what_the_table_holds(
    open_stage: Callable[..., StageData], datasets: dict[str, TokenDataset], name: str
) -> None:
    stage = open_stage(STAGES[name])
    table, report = stage.table, stage.blend_report()
    assert table.n_sequences == stage.n_sequences == 320
    assert int(table.seq_ptr[-1]) == len(table.length)
    columns = [dataset.columns("target_tokens", "duration_seconds") for dataset in datasets.values()]
    counted = np.zeros(len(report["strata"]))
    seconds = np.zeros(len(report["strata"]))
    segments = zip(
        table.stratum.tolist(), table.dataset_of(slice(None)).tolist(), table.document.tolist(),
        table.length.tolist(), strict=True,
    )  # fmt: skip
    for stratum, dataset, document, length in segments:
        source = list(datasets.values())[dataset]
        targets = columns[dataset]["target_tokens"][document].as_py()
        counted[stratum] += targets if name == "sft" else length
        seconds[stratum] += columns[dataset]["duration_seconds"][document].as_py() * length / source.lengths[document]
    rows = report["strata"]
    assert [row["counted_tokens"] for row in rows] == counted.tolist()
    # Of a chain that is cut, the seconds are shared out by tokens over the whole chain.
    tolerance = 0.2 if name.startswith("stitched") else 1e-5
    assert [row["audio_seconds"] for row in rows] == pytest.approx(seconds.tolist(), rel=tolerance)
    for field, values in (("tokens", table.length), ("documents", (table.start == 0).astype(np.int64))):
        assert [row[field] for row in rows] == np.bincount(table.stratum, values, minlength=len(rows)).tolist()


def test_a_whole_epoch_holds_each_document_exactly_once(
    open_stage: Callable[..., StageData], datasets: dict[str, TokenDataset]
) -> None:
    stage = open_stage({"task_mass": {"speech_lm": 1.0}, "packing": {"mode": "fit", "oversize": "drop"}})
    table = stage.table
    eligible = np.sort(np.concatenate([s.documents for s in stage_strata(stage, datasets)]))
    times = np.bincount(table.document, minlength=len(datasets["speech"]))[eligible]
    # The budget ends inside an epoch, and the last window leaves a few documents of it for later.
    assert times.max() - times.min() <= 2
    assert times.sum() == len(table.document)


def stage_strata(stage: StageData, datasets: dict[str, TokenDataset]) -> list[blending.Stratum]:
    return blending.resolve(stage.stage, read_tables(stage.stage, stage.data, datasets)).strata


def test_the_key_covers_what_matters_and_nothing_else(datasets: dict[str, TokenDataset]) -> None:
    base: dict[str, Any] = {"split": "train", "n_sequences": 320, "seed": 3}

    def key(stage: dict[str, Any] | None = None, data: dict[str, Any] | None = None, **options: Any) -> str:
        return index_key(stage_config(**stage or {}), data_config(datasets, **data or {}), datasets, **base | options)

    same = key()
    for fields in ({"max_epochs": 9.0}, {"packing": {"mode": "auto"}}, {"tokens": S * 40 * 9}):
        assert key(fields) == same  # the budget counts through n_sequences
    others = [
        key({"name": "other"}),
        key({"task_mass": {"speech_lm": 1.0}}),
        key({"language_temperature": 0.5}),
        key({"source_caps": {"books": 0.01}}),
        key({"epoch_limit": 2.0}),
        key({"seq_length": 2 * S}),
        key({"packing": {"mode": "fit"}}),
        key({"packing": {"open_sequences": 7}}),
        key({"stitch": {}}),
        key({"stitch": {"max_gap_seconds": 2.0}}),
        key(data={"validation_fraction": 0.1}),
        key(data={"split_seed": 1}),
        key(split="validation"),
        key(n_sequences=321),
        key(seed=4),
    ]
    assert len({same, *others}) == len(others) + 1


def test_another_dataset_of_the_same_name_is_another_key(
    datasets: dict[str, TokenDataset], toy_space: TokenSpace, make_dataset: Any, document: Any, tmp_path: Path
) -> None:
    stage = stage_config(task_mass={"text_lm": 1.0})
    keys = []
    for seed in (1, 2):
        made = make_dataset(tmp_path / str(seed), toy_space, "text_lm", [document(text=9)] * 20, seed=seed)
        found = {"text": made}
        keys.append(index_key(stage, data_config(found), found, split="train", n_sequences=1, seed=0))
    assert keys[0] != keys[1]


# ---- reading the documents


def test_documents_are_read_batch_by_batch_as_they_are(
    toy_space: TokenSpace, make_dataset: Any, document: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    languages = ["sw", "en", "", "am", "en", "hi", "", "sw"] * 9
    documents = [
        document(codes=5 + k, text=3, language=language, source=f"corpus-{k % 5}" if k % 7 else "")
        for k, language in enumerate(languages)
    ]
    dataset = make_dataset(tmp_path / "d", toy_space, "tts", documents)
    stage = stage_config(task_mass={"tts": 1.0}, loss={"prompt": 0.0})
    monkeypatch.setattr(document_columns, "document_batches", small_batches)
    data = data_config({"d": dataset})
    (table,) = read_tables(stage, data, {"d": dataset})
    assert table.languages == ["am", "en", "hi", "sw", "und"]
    assert [table.languages[code] for code in table.language] == [name or "und" for name in languages]
    assert table.sources == [*(f"corpus-{k}" for k in range(5)), "unknown"]
    assert table.language.dtype == table.source.dtype == np.uint16
    columns = dataset.columns("target_tokens", "duration_seconds")
    assert table.targets.tolist() == columns["target_tokens"].to_pylist()
    assert table.seconds.tolist() == pytest.approx(columns["duration_seconds"].to_pylist())
    pretraining = read_tables(stage_config(task_mass={"tts": 1.0}), data, {"d": dataset})[0]
    assert len(pretraining.targets) == 0  # not read where nothing counts them


def small_batches(*args: Any, **options: Any) -> Any:
    from megatron_speech.data.dataset.documents_table import document_batches

    return document_batches(*args, **options | {"batch_rows": 10})


def test_a_source_name_for_every_recording_is_refused(
    toy_space: TokenSpace, make_dataset: Any, document: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document_columns, "MAX_NAMES", 20)
    documents = [document(text=5, source=f"recording-{k}") for k in range(30)]
    dataset = make_dataset(tmp_path / "d", toy_space, "text_lm", documents)
    with pytest.raises(InputError, match="column dataset_source has more than 20 distinct values"):
        read_tables(stage_config(task_mass={"text_lm": 1.0}), data_config({"d": dataset}), {"d": dataset})


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (lambda table: table.drop_columns(["split_hash"]), "column split_hash is missing"),
        (lambda table: table.slice(1), "holds 19 rows, needed 20"),
        (None, "is not a readable parquet file"),
    ],
)
def test_a_damaged_documents_table_is_refused_and_named(
    toy_space: TokenSpace, make_dataset: Any, document: Any, tmp_path: Path, damaged: Any, message: str
) -> None:
    import pyarrow.parquet as pq

    dataset = make_dataset(tmp_path / "d", toy_space, "text_lm", [document(text=9)] * 20)
    path = tmp_path / "d.docs.parquet"
    if damaged is None:
        path.write_bytes(path.read_bytes()[:-9])
    else:
        table: pa.Table = pq.read_table(path)
        pq.write_table(damaged(table), path)
    with pytest.raises(InputError, match=rf"d\.docs\.parquet.*{message}"):
        read_tables(stage_config(task_mass={"text_lm": 1.0}), data_config({"d": dataset}), {"d": dataset})
