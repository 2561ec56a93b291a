"""The same codes however a row holds them: lists, one run, a text, arrays by row or by column."""

from __future__ import annotations

import io
import pickle
import tarfile
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_speech.errors import InputError
from megatron_speech.preprocess.readers import pretraining
from megatron_speech.preprocess.readers.base import ReadOptions
from megatron_speech.preprocess.readers.open import InputFiles


def rows_with(corpus: Any, form: str) -> list[dict[str, Any]]:
    rows = []
    for row, codes in zip(corpus.rows, corpus.codes, strict=True):
        plain = {key: value for key, value in row.items() if not key.startswith("code")}
        numbers = codes.reshape(-1).tolist()
        length = {"code_len": len(codes)}
        plain |= {
            "lists": {"codes": codes.tolist()},
            "one run": {"codes": numbers, **length},
            "text": {"codes": " ".join(map(str, numbers)), **length},
            "text with commas": {"codes": ", ".join(map(str, numbers)) + "\n", **length},
            "text as JSON": {"codes": str(codes.tolist())},
        }[form]
        rows.append(plain)
    return rows


@pytest.mark.parametrize("form", ["one run", "text", "text with commas", "text as JSON"])
def test_codes_in_a_row_are_read_in_every_form(corpus: Any, form: str) -> None:
    corpus.write(rows_with(corpus, "lists"))
    corpus.convert("speech_lm", prefix="out/expected")
    corpus.write(rows_with(corpus, form))
    corpus.convert("speech_lm")
    assert corpus.files()["bin"] == corpus.files("out/expected")["bin"]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"codes": [1, 2, 3, 4]}, "in one run, frame by frame, need code_len (frames) beside them"),
        ({"codes": [1, 2, 3, 4], "code_len": 3}, "holds int64 of shape [4], needed integers [frames, 2]"),
        ({"codes": "1 2 three 4", "code_len": 2}, "field codes is the text '1 2 three 4', needed numbers with blanks"),
        ({"codes": "1.5 2", "code_len": 1}, "holds float64 of shape [1, 2], needed integers"),
        ({"codes": [[1, 2, 3], [4, 5, 6]]}, "it is [codebooks, frames]: transpose it"),
    ],
)
def test_codes_that_could_be_misread_are_rejected(corpus: Any, fields: dict[str, Any], reason: str) -> None:
    corpus.write([*rows_with(corpus, "lists"), {"language": "en", **fields}])
    corpus.convert("speech_lm", "--max-rejected", 0.5)
    assert reason in corpus.files()["rejected.jsonl"].decode()


def npy(array: np.ndarray) -> bytes:
    handle = io.BytesIO()
    np.save(handle, array)
    return handle.getvalue()


def test_arrays_in_fortran_order_are_the_same_codes(corpus: Any) -> None:
    corpus.convert("speech_lm", prefix="out/expected")
    expected = corpus.files("out/expected")["bin"]
    folder: Path = corpus.folder
    whole = np.asfortranarray(np.concatenate(corpus.codes))
    assert b"'fortran_order': True" in npy(whole)
    np.save(folder / "codes.npy", whole)  # parts of a large one
    corpus.convert("speech_lm", prefix="out/parts")

    rows = [{**row, "codes_path": f"{i}.npy"} for i, row in enumerate(corpus.rows)]
    rows = [{key: value for key, value in row.items() if key != "code_offset"} for row in rows]
    for i, codes in enumerate(corpus.codes):
        np.save(folder / f"{i}.npy", np.asfortranarray(codes))
    corpus.write(rows, "each.jsonl")
    corpus.convert("speech_lm", inputs=[folder / "each.jsonl"], prefix="out/each")

    np.save(folder / "x.codes.npy", whole)
    np.save(folder / "x.offsets.npy", np.cumsum([0, *map(len, corpus.codes)]))
    (folder / "x.jsonl").write_bytes(corpus.samples.read_bytes())
    corpus.convert("speech_lm", inputs=[folder / "x.offsets.npy"], prefix="out/offsets")

    with tarfile.open(folder / "a.tar", "w") as archive:
        for i, codes in enumerate(corpus.codes):
            member = tarfile.TarInfo(f"{i:03d}.npy")
            member.size = len(npy(np.asfortranarray(codes)))
            archive.addfile(member, io.BytesIO(npy(np.asfortranarray(codes))))
    corpus.convert("speech_lm", "--language", "en", inputs=[folder / "a.tar"], prefix="out/tar")
    for prefix in ("parts", "each", "offsets", "tar"):
        assert corpus.files(f"out/{prefix}")["bin"] == expected, prefix


def test_files_in_place_of_arrays_are_named(corpus: Any) -> None:
    folder: Path = corpus.folder
    np.savez(folder / "a.npz", codes=corpus.codes[0])
    (folder / "b.npy").write_bytes((folder / "a.npz").read_bytes())
    (folder / "c.npy").write_bytes(pickle.dumps([1, 2]))
    (folder / "d.npy").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    (folder / "e.npy").write_bytes(b"<!DOCTYPE html><html>")
    composed, decomposed = (unicodedata.normalize(form, "é.npy") for form in ("NFC", "NFD"))
    np.save(folder / decomposed, corpus.codes[0])
    names = ["a.npz", "b.npy", "c.npy", "d.npy", "e.npy", r"D:\codes\a.npy", composed]
    corpus.write([{"codes_path": name, "language": "en", "sample_id": name} for name in names])
    dataset = corpus.convert("speech_lm", "--max-rejected", 0.9)
    assert dataset.columns("sample_id")["sample_id"].to_pylist() == [composed]
    reasons = corpus.files()["rejected.jsonl"].decode().splitlines()
    parts = ["it is a zip archive"] * 2 + ["it is a Python pickle", "run `git lfs pull`", "it is a web page", "Windows"]
    assert len(reasons) == len(parts) and all(map(str.__contains__, reasons, parts))


# ---- Inworld's pretraining streams

START, END = 300, 301


@pytest.fixture
def stream_tokenizer(tmp_path: Path) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {f"t{i}": i for i in range(200)} | {f"<|s_{i}|>": 200 + i for i in range(100)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer.add_special_tokens(["<|speech_start|>", "<|speech_end|>"])
    assert [tokenizer.token_to_id(name) for name in ("<|speech_start|>", "<|speech_end|>")] == [START, END]
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    return tmp_path / "tokenizer"


def test_codes_of_a_pretraining_stream_are_told_apart_by_marks(
    tmp_path: Path, read_rows: Any, stream_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    random = np.random.default_rng(0)
    codes = [random.integers(0, 100, n) for n in random.integers(0, 40, 500)]
    parts: list[Any] = [part for piece in codes for part in ([START], piece, [END])]
    path = tmp_path / "train_pretraining_codes.npy"
    options = ReadOptions(tokenizer=str(stream_tokenizer))
    np.concatenate(parts).astype("<i4").tofile(path)
    for scanned in (101, 1 << 22):
        monkeypatch.setattr(pretraining, "_SCANNED", scanned)
        rows = read_rows(path, options=options)
        assert [row.rejected for row in rows] == [None] * 500
        assert all(np.array_equal(row.fields["codes"], piece) for row, piece in zip(rows, codes, strict=True))
    np.array([5, START, 1, END, 2, END, START, 3, START, 4, 4, END, START, 9], "<i4").tofile(path)
    rows = read_rows(path, options=options)
    assert [row.fields["codes"].tolist() for row in rows] == [[5], [1], [2], [3], [4, 4], [9]]
    assert [row.rejected is None for row in rows] == [False, True, False, False, True, False]


def test_texts_of_a_pretraining_stream_end_with_the_end_id(tmp_path: Path, read_rows: Any) -> None:

    path = tmp_path / "val_pretraining_tokens.npy"
    np.array([1, 2, 9, 9, 3, 9, 4], "<i4").tofile(path)
    rows = read_rows(path, options=ReadOptions(eod=9))
    assert [row.fields["text_ids"].tolist() for row in rows] == [[1, 2], [], [3], [4]]
    assert [row.notices for row in rows] == [(), (), (), ("text_ids_without_eod",)]


def test_streams_whose_samples_cannot_be_told_apart_are_refused(tmp_path: Path, stream_tokenizer: Path) -> None:

    codes, tokens = tmp_path / "train_pretraining_codes.npy", tmp_path / "train_pretraining_tokens.npy"
    for path in (codes, tokens):
        np.arange(50, dtype="<i4").tofile(path)

    def refusal(path: Path, **options: Any) -> str:
        with pytest.raises(InputError) as error:
            list(InputFiles([str(path)], ReadOptions(**options)).batches(0))
        return str(error.value)

    assert "name the folder of Inworld's tokenizer with --input-tokenizer" in refusal(codes)
    assert "holds no <|speech_start|> (id 300): where a sample ends cannot be told; read the vectorised" in refusal(
        codes, tokenizer=str(stream_tokenizer)
    )
    assert "holds no id 77: where a text ends cannot be told" in refusal(tokens, eod=77)
