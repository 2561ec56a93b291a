"""Codes in arrays: offsets, vectorised folders, LLaSA memmaps, megatron datasets. What disagrees is refused."""

from __future__ import annotations

import gzip
import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers

from megatron_speech.errors import InputError
from megatron_speech.preprocess.readers import arrays
from megatron_speech.preprocess.readers.base import ReadOptions, Row
from megatron_speech.preprocess.readers.open import InputFiles

ReadRows = Callable[..., list[Row]]
COUNT = 1300


def make_codes(shape: tuple[int, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
    """(codes, offsets) of `COUNT` samples, some of them empty."""
    random = np.random.default_rng(1)
    lengths = random.integers(0, 30, COUNT)
    return random.integers(0, 500, (int(lengths.sum()), *shape)), np.append(0, np.cumsum(lengths))


def check(rows: list[Row], codes: np.ndarray, offsets: np.ndarray, field: str = "codes") -> None:
    assert len(rows) == COUNT
    for i, row in enumerate(rows):
        assert row.number == i + 1
        found = row.fields[field]
        assert isinstance(found, np.ndarray) and np.issubdtype(found.dtype, np.integer)
        assert np.array_equal(found, codes[offsets[i] : offsets[i + 1]])


def metadata() -> list[dict[str, Any]]:
    return [{"transcript": f"text {i}", "codes_path": "stale.npy", "code_offset": 3} for i in range(COUNT)]


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def npy(array: np.ndarray) -> bytes:
    handle = io.BytesIO()
    np.save(handle, array)
    return handle.getvalue()


# ---- one array and offsets


@pytest.mark.parametrize("dtype", ["<i2", "<u2", "<i4", ">i4", "<i8"])
@pytest.mark.parametrize("shape", [(), (2,)])
def test_codes_with_offsets(tmp_path: Path, read_rows: ReadRows, dtype: str, shape: tuple[int, ...]) -> None:
    codes, offsets = make_codes(shape)
    np.save(tmp_path / "x.codes.npy", codes.astype(dtype))
    np.save(tmp_path / "x.offsets.npy", offsets)
    check(read_rows(tmp_path / "x.offsets.npy"), codes, offsets)
    (tmp_path / "x.jsonl").write_bytes(jsonl(metadata()))
    rows = read_rows(tmp_path / "x.codes.npy")
    check(rows, codes, offsets)
    assert set(rows[5].fields) == {"transcript", "codes"} and rows[5].fields["transcript"] == "text 5"


def test_metadata_may_be_parquet_or_compressed_and_all_may_be_remote(tmp_path: Path, read_rows: ReadRows) -> None:
    codes, offsets = make_codes((2,))
    memory = fsspec.filesystem("memory")
    for name in ("a", "b"):
        memory.pipe(f"/arrays/{name}.codes.npy", npy(codes))
        memory.pipe(f"/arrays/{name}.offsets.npy", npy(offsets))
    memory.pipe("/arrays/a.jsonl.gz", gzip.compress(jsonl(metadata())))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(metadata()), sink, row_group_size=300)
    memory.pipe("/arrays/b.parquet", sink.getvalue().to_pybytes())
    for name in ("a", "b"):
        rows = read_rows(f"memory://arrays/{name}.offsets.npy")
        check(rows, codes, offsets)
        assert rows[COUNT - 1].fields["transcript"] == f"text {COUNT - 1}"


def test_rows_with_long_arrays_come_in_smaller_batches(
    tmp_path: Path, read_rows: ReadRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "ARRAY_BATCH_BYTES", 800)
    codes, offsets = make_codes()
    np.save(tmp_path / "x.codes.npy", codes)
    np.save(tmp_path / "x.offsets.npy", offsets)
    (tmp_path / "x.jsonl").write_bytes(jsonl(metadata()))
    check(read_rows(tmp_path / "x.offsets.npy"), codes, offsets)
    sizes = [
        sum(row.fields["codes"].nbytes for row in b.read())
        for b in InputFiles([f"{tmp_path}/x.offsets.npy"]).batches(0)
    ]
    assert max(sizes) <= 800 and len(sizes) > COUNT * 15 * 8 / 800


def spoil_offsets(codes: np.ndarray, offsets: np.ndarray, name: str) -> tuple[bytes, bytes, int]:
    """(codes file, offsets file, rows of metadata) with a fault."""
    rows = COUNT
    if name == "overlap":
        offsets = offsets.copy()
        offsets[700] += 1000
    elif name == "late start":
        offsets = offsets + 1
    elif name == "short codes":
        codes = codes[:-1]
    elif name == "nan":
        offsets = np.where(np.arange(len(offsets)) == 4, np.nan, offsets)
    elif name == "rows missing":
        rows -= 1
    elif name == "rows too many":
        rows += 1
    elif name == "float codes":
        codes = codes.astype(np.float32)
    codes_file, offsets_file = npy(codes), npy(offsets)
    if name == "cut codes":
        codes_file = codes_file[:-3]
    elif name == "cut offsets":
        offsets_file = offsets_file[:-8]
    elif name == "no codes":
        codes_file = b""
    return codes_file, offsets_file, rows


OFFSET_FAULTS = {
    "overlap": "x.offsets.npy runs backwards at row 702",
    "late start": "begins at frame 1, needed 0",
    "short codes": "they are not of one conversion",
    "nan": "holds float64 of shape [1301]; needed integers",
    "rows missing": "holds 1,299 rows, but",
    "rows too many": "holds 1,301 rows, but",
    "float codes": "x.codes.npy holds float32 of shape",
    "cut codes": "it is cut off or damaged",
    "cut offsets": "it is cut off or damaged",
    "no codes": "is not a readable .npy file",
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", OFFSET_FAULTS)
def test_offsets_that_disagree_with_the_data_are_refused(tmp_path: Path, name: str, packed: bool) -> None:
    codes, offsets, rows = spoil_offsets(*make_codes(), name)
    (tmp_path / "x.codes.npy").write_bytes(codes)
    (tmp_path / "x.offsets.npy").write_bytes(offsets)
    data = jsonl([{"transcript": "x"}] * rows)
    (tmp_path / f"x.jsonl{'.gz' if packed else ''}").write_bytes(gzip.compress(data) if packed else data)
    with pytest.raises(InputError) as error:
        list(InputFiles([str(tmp_path / "x.offsets.npy")]).batches(0))
    assert OFFSET_FAULTS[name] in str(error.value)


def test_files_that_belong_together_must_all_be_there_once(tmp_path: Path) -> None:
    codes, offsets = make_codes()
    np.save(tmp_path / "x.offsets.npy", offsets)
    with pytest.raises(InputError, match=r"needs .*x.codes.npy beside it"):
        InputFiles([str(tmp_path / "x.offsets.npy")])
    np.save(tmp_path / "x.codes.npy", codes)
    for name in ("x.jsonl", "x.parquet"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match="has its rows twice"):
        InputFiles([str(tmp_path / "x.offsets.npy")])


# ---- vectorised folders


def write_vectorised(folder: Path, name: str, codes: np.ndarray, offsets: np.ndarray, first: int = 0) -> None:
    split, _, rank = name.partition("_")
    rank = f"_{rank}" if rank else ""
    folder.mkdir(exist_ok=True)
    codes.astype("<i4").tofile(folder / f"{split}_codes{rank}.npy")
    np.save(folder / f"{split}_codes_index{rank}.npy", offsets[:-1])
    rows = [
        {"id": f"i{first + i}", "wav_path": "a.wav", "transcript": "x", "dataset_name": "studio", "language": "unknown"}
        for i in range(len(offsets) - 1)
    ]
    (folder / f"{split}_samples{rank}.jsonl").write_bytes(jsonl(rows))


def test_a_vectorised_folder_is_read_split_by_split(tmp_path: Path, read_rows: ReadRows) -> None:
    codes, offsets = make_codes()
    middle = 800
    folder = tmp_path / "v"
    write_vectorised(folder, "train", codes[: offsets[middle]], offsets[: middle + 1])
    write_vectorised(folder, "val", codes[offsets[middle] :], offsets[middle:] - offsets[middle], middle)
    rows = read_rows(folder)
    assert [row.fields["sample_id"] for row in rows] == [f"i{i}" for i in range(COUNT)]
    assert np.array_equal(np.concatenate([row.fields["codes"] for row in rows]), codes)
    assert rows[0].fields["dataset_source"] == "studio" and "language" not in rows[0].fields
    assert len(read_rows(folder / "train_codes.npy")) == middle


def test_unmerged_shards_are_read_in_the_order_of_their_numbers_and_not_beside_merged_ones(
    tmp_path: Path, read_rows: ReadRows
) -> None:
    codes, offsets = make_codes()
    for rank in range(11):
        write_vectorised(tmp_path / "v", f"train_{rank}", codes[:100], np.array([0, 40]), first=rank)
    assert [row.fields["sample_id"] for row in read_rows(tmp_path / "v")] == [f"i{i}" for i in range(11)]
    write_vectorised(tmp_path / "v", "train", codes, offsets)
    assert len(read_rows(tmp_path / "v")) == COUNT


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("overlap", "runs backwards at row 6"),
        ("beyond", "runs backwards at row"),
        ("odd size", "needed a multiple of 4; it is cut off"),
        ("short rows", "holds 1,299 rows, but"),
        ("short index", "holds 1,300 rows, but"),
        ("nan", "holds float64"),
        ("no index", "train_codes.npy needs train_codes_index.npy beside it"),
    ],
)
def test_a_vectorised_folder_that_disagrees_is_refused(tmp_path: Path, fault: str, message: str) -> None:
    codes, offsets = make_codes()
    write_vectorised(tmp_path / "v", "train", codes, offsets)
    write_vectorised(tmp_path / "v", "val", codes, offsets)
    index, data, samples = (tmp_path / "v" / f"train_{n}" for n in ("codes_index.npy", "codes.npy", "samples.jsonl"))
    begins = offsets[:-1].copy()
    if fault == "overlap":
        begins[4] += 10_000
    elif fault == "beyond":
        begins[-1] += 100
    elif fault == "nan":
        begins = np.where(begins == begins[7], np.nan, begins)
    elif fault == "short index":
        begins = begins[:-1]
    np.save(index, begins)
    if fault == "odd size":
        data.write_bytes(data.read_bytes()[:-2])
    elif fault == "short rows":
        samples.write_bytes(jsonl([{"id": 1}] * (COUNT - 1)))
    elif fault == "no index":
        index.unlink()
    with pytest.raises(InputError) as error:
        list(InputFiles([str(tmp_path / "v")]).batches(0))
    assert message in str(error.value)


# ---- LLaSA memmaps

LLASA = [
    f"<|{a}_{b}_{c}|>" for a in ("TEXT", "SPEECH") for b in ("GENERATION", "UNDERSTANDING") for c in ("START", "END")
]


def make_tokenizer(folder: Path, *, specials: bool, codes: int = 0) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["some text", "नमस्ते"], trainer)
    tokenizer.add_special_tokens(["<|eot_id|>"])
    if specials:
        tokenizer.add_tokens(LLASA)
    tokenizer.add_tokens([f"<|s_{i}|>" for i in range(codes)])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def llasa_row(tokenizer: tokenizers.Tokenizer, text: str, codes: np.ndarray, width: int) -> np.ndarray:
    """As LLaSA's script makes it: text and codes between their marks, cut at `width` or padded with the end token."""
    mark = {token: tokenizer.token_to_id(token) for token in LLASA}
    ids = [mark["<|TEXT_UNDERSTANDING_START|>"], *tokenizer.encode(text, add_special_tokens=False).ids]
    ids += [mark["<|TEXT_UNDERSTANDING_END|>"], mark["<|SPEECH_GENERATION_START|>"]]
    ids += [*(codes + tokenizer.get_vocab_size()).tolist(), mark["<|SPEECH_GENERATION_END|>"]]
    ids = (ids + [tokenizer.token_to_id("<|eot_id|>")] * width)[:width]
    return np.array(ids, np.int32)


def write_llasa(folder: Path, rows: list[np.ndarray], split: str = "train") -> None:
    np.stack(rows).tofile(folder / f"{split}_input_ids.memmap")
    np.save(folder / f"{split}_input_ids_shape.npy", np.stack(rows).shape)


TEXTS = ["some text", "नमस्ते दुनिया", "tabs\tand  spaces ", "émoji 😀"]


def test_llasa_rows_become_text_and_codes(tmp_path: Path, read_rows: ReadRows) -> None:
    full = make_tokenizer(tmp_path / "full", specials=True)
    make_tokenizer(tmp_path / "plain", specials=False)
    random = np.random.default_rng(0)
    codes = [random.integers(0, 65536, n) for n in random.integers(1, 120, 600)]
    exact = 200 - 3 - 1 - len(full.encode(TEXTS[0]).ids)
    codes[0] = np.arange(exact)  # no padding at all
    write_llasa(tmp_path, [llasa_row(full, TEXTS[i % 4], c, 200) for i, c in enumerate(codes)])
    for name in ("full", "plain"):  # LLaSA never saves the tokenizer that its memmaps are made with
        rows = read_rows(tmp_path, options=ReadOptions(tokenizer=str(tmp_path / name)))
        assert [row.rejected for row in rows] == [None] * 600
        assert [row.fields["transcript"] for row in rows] == [TEXTS[i % 4] for i in range(600)]
        assert all(np.array_equal(row.fields["codes"], c) for row, c in zip(rows, codes, strict=True))


def test_codes_count_from_the_tokenizers_first_code_where_it_has_one(tmp_path: Path, read_rows: ReadRows) -> None:
    made_with = make_tokenizer(tmp_path / "made", specials=True)
    make_tokenizer(tmp_path / "trained", specials=True, codes=64)  # as training saves it, with a token per code
    write_llasa(tmp_path, [llasa_row(made_with, "some text", np.array([0, 63, 5]), 40)])
    rows = read_rows(tmp_path / "train_input_ids.memmap", options=ReadOptions(tokenizer=str(tmp_path / "trained")))
    assert rows[0].fields["codes"].tolist() == [0, 63, 5]


def test_cut_and_odd_llasa_rows_are_rejected_under_a_rule(tmp_path: Path, read_rows: ReadRows) -> None:
    tokenizer = make_tokenizer(tmp_path / "t", specials=True)
    good = llasa_row(tokenizer, "some text", np.arange(10), 60)
    two_ends, no_text, late = good.copy(), good.copy(), good.copy()
    two_ends[-1] = tokenizer.token_to_id("<|SPEECH_GENERATION_END|>")
    no_text[0] = 5
    late[-1] = 5
    rows = [good, llasa_row(tokenizer, "some text", np.arange(90), 60), two_ends, no_text, late]
    write_llasa(tmp_path, rows)
    found = read_rows(tmp_path, options=ReadOptions(tokenizer=str(tmp_path / "t")))
    rules = [row.rejected.rule if row.rejected else None for row in found]
    assert rules == [None, "llasa_truncated", "llasa_shape", "llasa_shape", "llasa_shape"]
    assert all(row.fields == {} for row in found[1:])


def test_llasa_needs_its_tokenizer_and_a_shape_that_fits(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "t", specials=True)
    write_llasa(tmp_path, [llasa_row(tokenizer, "some text", np.arange(10), 60)])
    with pytest.raises(InputError, match="name its folder with --input-tokenizer"):
        InputFiles([str(tmp_path)])
    options = ReadOptions(tokenizer=str(tmp_path / "t"))
    np.save(tmp_path / "train_input_ids_shape.npy", (2, 60))
    with pytest.raises(InputError, match=r"holds 240 bytes, needed 480 for int32 of shape \[2, 60\]"):
        _ = InputFiles([str(tmp_path)], options).rows
    (tmp_path / "train_input_ids_shape.npy").unlink()
    with pytest.raises(InputError, match=r"needs .*_shape.npy beside it"):
        _ = InputFiles([str(tmp_path)], options).rows


# ---- megatron datasets


def write_megatron(prefix: Path, documents: list[list[np.ndarray]], dtype: type) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        builder.add_document(torch.from_numpy(np.concatenate(sequences)), [len(s) for s in sequences])
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatron_documents_become_text_ids_without_their_end(tmp_path: Path, read_rows: ReadRows, dtype: type) -> None:
    codes, offsets = make_codes()
    parts = [codes[a:b] + 1 for a, b in itertools.pairwise(offsets.tolist())]
    # Every other document of two sequences; every third without an end.
    documents = [
        [part[: len(part) // 2], part[len(part) // 2 :], np.zeros(int(i % 3 > 0), int)] if i % 2 else
        [np.append(part, np.zeros(int(i % 3 > 0), int))]
        for i, part in enumerate(parts)
    ]  # fmt: skip
    write_megatron(tmp_path / "p", documents, dtype)
    check(read_rows(tmp_path / "p.idx", options=ReadOptions(eod=0)), codes + 1, offsets, "text_ids")
    kept = read_rows(tmp_path / "p.bin")
    assert [len(row.fields["text_ids"]) for row in kept] == [sum(map(len, document)) for document in documents]
    assert kept[0].fields["text_ids"].dtype == np.int32
    memory = fsspec.filesystem("memory")
    for ending in ("bin", "idx"):
        memory.pipe(f"/megatron/p.{ending}", (tmp_path / f"p.{ending}").read_bytes())
    check(read_rows("memory://megatron/p.idx", options=ReadOptions(eod=0)), codes + 1, offsets, "text_ids")


def test_a_megatron_index_that_disagrees_with_its_data_is_refused(tmp_path: Path) -> None:
    documents = [[np.arange(i + 1)] for i in range(50)]
    write_megatron(tmp_path / "p", documents, np.int32)
    index, data = (tmp_path / "p.idx").read_bytes(), (tmp_path / "p.bin").read_bytes()
    damage = {
        "is of": (index, data[:-4]),
        "it is cut off or damaged": (index[:-8], data),
        "is no .idx of a megatron dataset": (b"x" + index[1:], data),
        "sequence 4 does not begin where": (index[:34] + index[34:46] + b"\x05" + index[47:], data),
        "its documents are no runs": (index[: -8 * 20] + b"\xff" * 8 + index[-8 * 19 :], data),
        "or not all of one": (b"", data),
    }
    for message, (spoiled, ids) in damage.items():
        (tmp_path / "p.idx").write_bytes(spoiled)
        (tmp_path / "p.bin").write_bytes(ids)
        with pytest.raises(InputError) as error:
            _ = InputFiles([str(tmp_path / "p.idx")]).rows
        assert message in str(error.value)


def test_a_dataset_of_this_project_is_no_input(tmp_path: Path) -> None:
    for ending in ("bin", "idx", "manifest.json"):
        (tmp_path / f"p.{ending}").touch()
    with pytest.raises(InputError, match="is a dataset of this project already"):
        InputFiles([str(tmp_path / "p.idx")])


# ---- refusals that help


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.npy", "is codes without the samples' bounds; name a samples.jsonl"),
        ("x.jsonl.xz", "this compression is not read; recompress it with gzip or zstd"),
        ("x.txt", "is of a format that is not read; write it as .jsonl or .parquet"),
        ("x", "ending '' is unknown; needed .jsonl or .json(.gz, .zst), .parquet, "),
        (
            "folder",
            "is a folder with neither S_codes_index.npy nor S_input_ids.memmap nor wav.scp; name its files, such as",
        ),
    ],
)
def test_what_no_reader_reads_is_told_what_would_be_read(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).mkdir() if name == "folder" else (tmp_path / name).touch()
    with pytest.raises(InputError) as error:
        InputFiles([str(tmp_path / name)])
    assert message in str(error.value)
