"""WebDataset archives: what is a sample, what is counted, what is refused. Archives are made by Python's tarfile."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import zstandard

from megatron_speech.errors import InputError
from megatron_speech.preprocess.readers import webdataset
from megatron_speech.preprocess.readers.base import Row
from megatron_speech.preprocess.readers.open import InputFiles

ReadRows = Callable[..., list[Row]]
Members = Sequence[tuple[str, bytes]]


def npy(array: np.ndarray) -> bytes:
    handle = io.BytesIO()
    np.save(handle, array)
    return handle.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    handle = io.BytesIO()
    np.savez(handle, **arrays)
    return handle.getvalue()


def info(name: str, size: int = 0, **attributes: Any) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = size
    for key, value in attributes.items():
        setattr(member, key, value)
    return member


def tar(members: Members, form: int = tarfile.GNU_FORMAT) -> bytes:
    handle = io.BytesIO()
    with tarfile.open(fileobj=handle, mode="w", format=form) as archive:
        for name, data in members:
            archive.addfile(info(name, len(data)), io.BytesIO(data))
    return handle.getvalue()


def codes_of(i: int) -> np.ndarray:
    return np.arange(i % 40 + 1, dtype=np.uint16) + i


def members(count: int, prefix: str = "train/") -> list[tuple[str, bytes]]:
    result = []
    for i in range(count):
        fields = {"language": "hi", "speaker_id": i % 3}
        result.append((f"{prefix}{i:06d}.json", json.dumps(fields).encode()))
        result.append((f"{prefix}{i:06d}.npy", npy(codes_of(i))))
        result.append((f"{prefix}{i:06d}.txt", f"text {i} नमस्ते".encode()))
    return result


FORMS = {"gnu": tarfile.GNU_FORMAT, "ustar": tarfile.USTAR_FORMAT, "pax": tarfile.PAX_FORMAT}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_every_way_to_the_same_archive_gives_the_same_samples(tmp_path: Path, read_rows: ReadRows, form: str) -> None:
    data = tar(members(1200), FORMS[form])
    memory = fsspec.filesystem("memory")
    for name, packed in (
        ("a.tar", data),
        ("a.tar.gz", gzip.compress(data, 1)),
        ("a.tar.zst", zstandard.compress(data)),
        ("a.tgz", gzip.compress(data, 1)),
    ):
        (tmp_path / name).write_bytes(packed)
        memory.pipe(f"/tars/{name}", packed)
    for url in (
        tmp_path / "a.tar",
        tmp_path / "a.tar.gz",
        tmp_path / "a.tgz",
        "memory://tars/a.tar",
        "memory://tars/a.tar.zst",
    ):
        rows = read_rows(url)
        assert len(rows) == 1200
        for i, row in enumerate(rows):
            assert row.number == i + 1 and row.rejected is None and row.notices == ()
            codes = row.fields.pop("codes")
            assert codes.dtype == np.uint16 and np.array_equal(codes, codes_of(i))
            expected = {"language": "hi", "speaker_id": i % 3, "transcript": f"text {i} नमस्ते"}
            source = f"{str(url).rpartition('/')[2]}/train/{i:06d}"
            assert row.fields == {**expected, "sample_id": f"train/{i:06d}", "source_id": source}


def test_a_range_of_shards_is_one_input(tmp_path: Path, read_rows: ReadRows) -> None:
    for i in range(3):
        (tmp_path / f"s-{i:03d}.tar").write_bytes(tar(members(10 + i, prefix=f"{i}/")))
    rows = read_rows(f"{tmp_path}/s-{{000..002}}.tar")
    assert [row.fields["sample_id"] for row in rows] == [f"{i}/{j:06d}" for i in range(3) for j in range(10 + i)]
    (tmp_path / "s-001.tar").unlink()
    with pytest.raises(InputError, match=r"names 3 files, of which 1 are missing \(.*s-001.tar\)"):
        InputFiles([f"{tmp_path}/s-{{000..002}}.tar"])


def rows_of(tmp_path: Path, read_rows: ReadRows, data: bytes) -> list[Row]:
    """Rows of an archive, the same whether it is read in place or as a stream."""
    (tmp_path / "a.tar").write_bytes(data)
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(data))
    rows, streamed = read_rows(tmp_path / "a.tar"), read_rows(tmp_path / "a.tar.gz")
    for one, other in zip(rows, streamed, strict=True):
        assert (one.number, one.notices, list(one.fields)) == (other.number, other.notices, list(other.fields))
        assert str(one.rejected) == str(other.rejected)
    return rows


def test_foreign_members_are_counted_by_ending_and_harm_nothing(tmp_path: Path, read_rows: ReadRows) -> None:
    foreign = [("README", b"x"), ("._000001.npy", b"mac"), ("train/000000.wav", b"RIFF" * 9999), ("000001.flac", b"y")]
    rows = rows_of(tmp_path, read_rows, tar([*foreign[:2], *members(3), foreign[2], foreign[3], *members(2, "b/")]))
    assert [row.fields.get("sample_id") for row in rows if "codes" in row.fields] == [
        "train/000000", "train/000001", "train/000002", "b/000000", "b/000001",
    ]  # fmt: skip
    notices = Counter(notice for row in rows for notice in row.notices)
    assert notices == {"tar_member:without key": 2, "tar_member:.wav": 1, "tar_member:.flac": 1}
    again = [row for row in rows if row.rejected is not None]  # the .wav of sample 0 came after sample 2
    assert [row.rejected.rule for row in again if row.rejected] == ["tar_key_again"]


def test_members_that_are_not_adjacent_or_twice_reject_their_sample(
    tmp_path: Path, read_rows: ReadRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webdataset, "BATCH_ROWS", 2)
    good = members(6)
    late = [("train/000001.json", b"{}")]
    twice = [("x.npy", npy(codes_of(1))), ("x.npy", npy(codes_of(1)))]
    two_codes = [("y.npy", npy(codes_of(1))), ("y.npz", npz(codes=codes_of(2)))]
    differ = [("z.json", b'{"transcript": "a"}'), ("z.txt", b"b")]
    agree = [("w.json", b'{"transcript": "a"}'), ("w.txt", b"a")]
    rows = rows_of(tmp_path, read_rows, tar([*good, *late, *twice, *two_codes, *differ, *agree]))
    rules = [row.rejected.rule if row.rejected else None for row in rows]
    assert rules == [*[None] * 6, "tar_key_again", *["tar_duplicate_member"] * 3, None]
    assert rows[-1].fields == {"transcript": "a", "sample_id": "w", "source_id": "a.tar/w"}
    assert rows[8].rejected is not None and "field codes is in .npy and again in .npz" in rows[8].rejected.reason


def test_links_and_sparse_files_are_no_data_and_folders_are_nothing(tmp_path: Path, read_rows: ReadRows) -> None:
    handle = io.BytesIO()
    with tarfile.open(fileobj=handle, mode="w", format=tarfile.PAX_FORMAT) as archive:

        def add(name: str, data: bytes = b"", **attributes: Any) -> None:
            archive.addfile(info(name, len(data), **attributes), io.BytesIO(data))

        add("d", type=tarfile.DIRTYPE)
        add("./d/a.npy", npy(codes_of(3)))
        add("d/b.npy", type=tarfile.SYMTYPE, linkname="a.npy")
        add("d/c.npy", type=tarfile.LNKTYPE, linkname="d/a.npy")
        add("d/s.npy", npy(codes_of(3)), pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"})
        add("d/pipe.npy", type=tarfile.FIFOTYPE)
        add("d/" + "long" * 60 + "/" + "é" * 50 + ".npy", npy(codes_of(4)))
    rows = rows_of(tmp_path, read_rows, handle.getvalue())
    assert [row.rejected.rule if row.rejected else None for row in rows] == [
        None, "tar_link", "tar_link", "tar_sparse", None,
    ]  # fmt: skip
    assert rows[0].fields["sample_id"] == "d/a"
    assert rows[4].fields["sample_id"] == "d/" + "long" * 60 + "/" + "é" * 50
    assert rows[3].notices == ("tar_member:device",)


PARTS: dict[str, tuple[Members, str | None, Any]] = {
    "npz by name": ([("a.npz", npz(codes=codes_of(5), other=codes_of(1)))], None, codes_of(5)),
    "npz of one": ([("a.codes.npz", npz(x=codes_of(5)))], None, codes_of(5)),
    "npz of two": ([("a.npz", npz(x=codes_of(5), y=codes_of(5)))], "codes_unreadable", None),
    "two codebooks": ([("a.codes.npy", npy(np.ones((3, 2), np.int32)))], None, np.ones((3, 2))),
    "big endian": ([("a.npy", npy(codes_of(5).astype(">i4")))], None, codes_of(5)),
    "not an npy": ([("a.npy", b"x" * 200)], "codes_unreadable", None),
    "half an npy": ([("a.npy", npy(codes_of(30))[:-4])], "codes_unreadable", None),
    "objects": ([("a.npy", npy(np.array([{}, 1], object)))], "codes_unreadable", None),
    "empty npy": ([("a.npy", b"")], "codes_unreadable", None),
    "bad json": ([("a.json", b'{"x": NaN}')], "not_finite", None),
    "text in latin-1": ([("a.txt", "é".encode("latin-1"))], "bad_text", None),
    "class": ([("a.cls", b"7\n"), ("a.npy", npy(codes_of(5)))], None, codes_of(5)),
    "no class": ([("a.cls", b"cat")], "bad_field", None),
    "key in latin-1": ([("\udce9.npy", npy(codes_of(5)))], "bad_text", None),
}


@pytest.mark.parametrize("name", PARTS)
def test_members_are_what_their_endings_say_or_the_sample_is_rejected(
    tmp_path: Path, read_rows: ReadRows, name: str
) -> None:
    parts, rule, codes = PARTS[name]
    row = rows_of(tmp_path, read_rows, tar([*members(1), *parts]))[1]
    assert (row.rejected.rule if row.rejected else None) == rule
    if rule is None:
        assert np.array_equal(row.fields["codes"], codes)


def test_pretokenised_text_and_a_given_sample_id(tmp_path: Path, read_rows: ReadRows) -> None:
    parts = [("a/b.c.text_ids.npy", b""), ("k.text_ids.npy", npy(codes_of(9))), ("k.json", b'{"sample_id": "own"}')]
    rows = rows_of(tmp_path, read_rows, tar(parts))
    assert rows[0].notices == ("tar_member:.c.text_ids.npy",)
    assert rows[1].fields["sample_id"] == "own" and np.array_equal(rows[1].fields["text_ids"], codes_of(9))


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_an_archive_cut_off_anywhere_is_refused(tmp_path: Path, ending: str) -> None:
    data = tar(members(4))
    used = len(data.rstrip(b"\0")) // 512 * 512 + 512
    path = tmp_path / f"a.{ending}"
    for size in [*range(0, used, 256), used]:
        path.write_bytes(data[:size] if ending == "tar" else gzip.compress(data[:size], 1))
        with pytest.raises(InputError, match=r"a.tar\S* is (cut off at byte|empty)"):
            list(InputFiles([str(path)]).batches(0))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data + data, "goes on after its end-of-archive block"),
        (lambda data: data[:512] + b"x" * 512 + data[1024:], None),
        (lambda data: b"y" + data[1:], "is no tar archive, or damaged: no header at byte 0"),
        (lambda data: data[:1024] + b"zz" + data[1026:], "is no tar archive, or damaged: no header at byte"),
        (lambda data: b"not a tar at all " * 99, "is no tar archive, or damaged"),
        (lambda data: bytes(10240), "holds no rows: no member is named KEY.ENDING"),
    ],
)
@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_damaged_archives_are_refused(tmp_path: Path, ending: str, spoil: Any, message: str | None) -> None:
    data = spoil(tar(members(4)))
    path = tmp_path / f"a.{ending}"
    path.write_bytes(data if ending == "tar" else gzip.compress(data))
    if message is None:  # the data of a member is the member's affair
        assert InputFiles([str(path)]).rows == 4
        return
    with pytest.raises(InputError) as error:
        list(InputFiles([str(path)]).batches(0))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_key_that_comes_again_is_known_among_many() -> None:
    keys = webdataset.SeenKeys()
    for start in range(0, 20_000, 500):
        assert keys.add([f"key {i}" for i in range(start, start + 500)]) == []
    assert keys.add(["new", "key 0", "key 19999", "new", "key 777"]) == [1, 2, 3, 4]
    assert len(keys._blocks) < 16
