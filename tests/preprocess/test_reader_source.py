"""Files by path and URL: what is opened, what is decompressed, and what is said when it cannot be."""

from __future__ import annotations

import gzip
import importlib.util
import io
from pathlib import Path
from typing import Any

import fsspec
import pytest
import zstandard
from fsspec.implementations.local import LocalFileSystem

from megatron_speech.errors import InputError
from megatron_speech.preprocess.readers import source

TEXT = b"".join(b"line %d of a stream that is compressed\n" % i for i in range(20_000))


def gz(data: bytes) -> bytes:
    return gzip.compress(data)


def zst(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


@pytest.mark.parametrize(("ending", "pack"), [("gz", gz), ("zst", zst)])
def test_streams_of_several_members_are_one_stream(tmp_path: Path, ending: str, pack: Any) -> None:
    path = tmp_path / f"x.{ending}"
    for cut in (0, 1, 5, 16 << 10, len(TEXT)):
        path.write_bytes(pack(TEXT[:cut]) + pack(TEXT[cut:]))
        with source.open_binary(str(path)) as handle:
            assert handle.read() == TEXT
    with source.open_binary(str(path), offset=12_345) as handle:
        assert handle.read(100) == TEXT[12_345:12_445]


@pytest.mark.parametrize(("ending", "pack"), [("gz", gz), ("zst", zst)])
def test_a_stream_cut_off_anywhere_is_an_error_and_never_an_end(tmp_path: Path, ending: str, pack: Any) -> None:
    path, data = tmp_path / f"x.{ending}", pack(TEXT[:2000])
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(InputError, match=r"is cut off|is empty|is not a"), source.open_binary(str(path)) as handle:
            handle.read()


@pytest.mark.parametrize(("ending", "pack"), [("gz", gz), ("zst", zst)])
def test_what_follows_a_stream_and_flipped_bytes_are_errors(tmp_path: Path, ending: str, pack: Any) -> None:
    path, data = tmp_path / f"x.{ending}", pack(TEXT)
    path.write_bytes(data + b"garbage")
    with pytest.raises(InputError, match="something else after the end"), source.open_binary(str(path)) as handle:
        handle.read()
    middle = len(data) // 2
    path.write_bytes(data[:middle] + bytes([data[middle] ^ 0x55]) + data[middle + 1 :])
    with pytest.raises(InputError, match=r"is damaged|is cut off"), source.open_binary(str(path)) as handle:
        handle.read()


def test_zeros_after_a_gzip_stream_are_padding(tmp_path: Path) -> None:
    path = tmp_path / "x.gz"
    for zeros in (1, 3, 4, 100_000):
        path.write_bytes(gz(TEXT) + bytes(zeros))
        with source.open_binary(str(path)) as handle:
            assert handle.read() == TEXT


def test_any_fsspec_url_is_opened_and_has_a_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(TEXT)
    memory = fsspec.filesystem("memory")
    memory.pipe("/reader/a.txt.gz", gz(TEXT))
    for url in (str(tmp_path / "a.txt"), f"file://{tmp_path}/a.txt", "memory://reader/a.txt.gz"):
        with source.open_binary(url, offset=7) as handle:
            assert handle.read() == TEXT[7:]
        assert source.fingerprint(url) == source.fingerprint(url)
        assert source.size_bytes(url) == (len(gz(TEXT)) if "memory" in url else len(TEXT))
    before = source.fingerprint("memory://reader/a.txt.gz")
    memory.pipe("/reader/a.txt.gz", gz(TEXT))
    assert source.fingerprint("memory://reader/a.txt.gz") != before


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nowhere://bucket/a.jsonl", "names the protocol nowhere, which is unknown; known are "),
        ("htps://host/a.jsonl", "which is unknown (did you mean 'https'?)"),
        ("gs://bucket/a.jsonl", "input gs://bucket/a.jsonl needs a package that is not installed: "),
        ("memory://reader/no.jsonl", "input memory://reader/no.jsonl does not exist; check the path"),
        ("/no/such/file", "input /no/such/file does not exist; check the path"),
        ("/", "input / is a folder"),
    ],
)
def test_what_cannot_be_opened_is_a_sentence(url: str, message: str) -> None:
    if url.startswith("gs:") and importlib.util.find_spec("gcsfs") is not None:
        pytest.skip("gcsfs is installed here")
    with pytest.raises(InputError) as error, source.open_binary(url):
        pass
    assert message in str(error.value) and "\n" not in str(error.value)


class BrokenFileSystem(LocalFileSystem):
    """As a server: no path on this machine, and a transfer that breaks off."""

    protocol = "broken"

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        class Handle(io.BytesIO):
            def read(self, size: int | None = -1) -> bytes:
                data = super().read(size)
                if not data:
                    raise TimeoutError("no answer")
                return data

        return Handle(TEXT)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:  # type: ignore[override]
        return path.removeprefix("broken:/")


def test_a_transfer_that_breaks_off_is_no_fault_of_the_input() -> None:
    fsspec.register_implementation("broken", BrokenFileSystem, clobber=True)
    with pytest.raises(ConnectionError, match="broke off: TimeoutError: no answer; run the same command again"):
        with source.open_binary("broken://server/a.txt") as handle:
            while handle.read(1 << 20):
                pass


@pytest.mark.parametrize(
    ("base", "relative", "expected"),
    [
        ("/data", "codes/a.npy", "/data/codes/a.npy"),
        ("/data", "/other/a.npy", "/other/a.npy"),
        ("", "a.npy", "a.npy"),
        ("s3://bucket/data", "codes/a.npy", "s3://bucket/data/codes/a.npy"),
        ("s3://bucket/data", "../a.npy", "s3://bucket/a.npy"),
        ("s3://bucket", "a.npy", "s3://bucket/a.npy"),
        ("s3://bucket/data", "gs://x/a.npy", "gs://x/a.npy"),
        ("/data", "s3://bucket/a.npy", "s3://bucket/a.npy"),
    ],
)
def test_join(base: str, relative: str, expected: str) -> None:
    assert source.join(base, relative) == expected


def test_names_of_urls() -> None:
    assert source.folder("https://host/a/b.jsonl?sig=x/y") == "https://host/a"
    assert source.stem("https://host/a/b.jsonl.gz?sig=x/y") == "b"
    assert source.stem("/d/train.v2.tar.zst") == "train.v2" and source.stem("x.offsets.npy") == "x"
    assert source.stem("s3://b/x.tgz") == "x"


def test_globs_and_brace_ranges_name_files_in_order(tmp_path: Path) -> None:
    for i in (0, 1, 2, 10):
        (tmp_path / f"s-{i:03d}.tar").touch()
    fsspec.filesystem("memory").pipe({f"/shards/s-{i}.tar": b"" for i in (9, 10, 11)})
    names = [f"{tmp_path}/s-{i:03d}.tar" for i in (0, 1, 2)]
    assert source.expand(f"{tmp_path}/s-{{000..002}}.tar") == names
    assert source.expand(f"{tmp_path}/s-{{000,002}}.t{{ar,ar}}") == [names[0], names[0], names[2], names[2]]
    assert source.expand(f"{tmp_path}/s-*.tar") == [*names, f"{tmp_path}/s-010.tar"]
    assert source.expand("memory://shards/s-{9..11}.tar") == [f"memory://shards/s-{i}.tar" for i in (9, 10, 11)]
    assert source.expand("memory://shards/s-1*.tar") == [f"memory:///shards/s-{i}.tar" for i in (10, 11)]
    (tmp_path / "odd {name} [1].jsonl").touch()  # a file that is there needs no quoting
    assert source.expand(f"{tmp_path}/odd {{name}} [1].jsonl") == [f"{tmp_path}/odd {{name}} [1].jsonl"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "{folder}/s-{{000..004}}.tar",
            "names 5 files, of which 2 are missing ({folder}/s-003.tar, {folder}/s-004.tar)",
        ),
        ("memory://missing/s-{{0..19}}.tar", "names 20 files, of which 20 are missing (memory://missing/s-0.tar, "),
        ("{folder}/*.parquet", "fits no file; check the pattern"),
        ("{folder}/s-{{3..1}}.tar", "the range {{3..1}} ends before it begins"),
        ("{folder}/s-{{x}}.tar", "{{x}} is no range"),
    ],
)
def test_missing_shards_are_named_before_anything_is_read(tmp_path: Path, pattern: str, message: str) -> None:
    for i in range(3):
        (tmp_path / f"s-{i:03d}.tar").touch()
    with pytest.raises(InputError) as error:
        source.expand(pattern.format(folder=tmp_path))
    assert message.format(folder=tmp_path) in str(error.value)
