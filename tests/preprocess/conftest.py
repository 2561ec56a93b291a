"""Small samples with made-up codes: no codec needed."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_speech.data.dataset.indexed import TokenDataset
from megatron_speech.data.dataset.verify import verify_dataset
from megatron_speech.preprocess import preprocess_data
from megatron_speech.preprocess.readers.base import ReadOptions, Row
from megatron_speech.preprocess.readers.open import InputFiles
from megatron_speech.tokens.space import CodecDescription, TokenSpace

CODEC = CodecDescription("toy", "c" * 64, 8000, 25.0, ("a", "b"), (512, 64))


def make_codes(count: int, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [
        np.stack([random.integers(0, 512, n), random.integers(0, 64, n)], axis=1).astype(np.uint16)
        for n in random.integers(3, 30, count)
    ]


def sample_rows(codes: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """Rows as encode_audio writes them: recordings of three segments, five speakers, two languages."""
    offsets = np.cumsum([0, *map(len, codes)])
    return [
        {
            "sample_id": f"s{i}",
            "source_id": f"recording{i // 3}",
            "segment_order": i % 3,
            "transcript": f"utterance  number {i} é",
            "transcript_romanized": f"romanized {i}",
            "language": "hi" if (i // 3) % 4 == 0 else "en",
            "speaker_id": f"speaker{(i // 3) % 5}",
            "dataset_source": "toy" if (i // 3) % 5 < 4 else "other",
            "codes_path": "codes.npy",
            "code_offset": int(offsets[i]),
            "code_len": len(codes[i]),
            "codec_hash": CODEC.hash,
            "mood": {"calm": i % 2 == 0},
        }
        for i in range(len(codes))
    ]


class Corpus:
    """A folder with samples.jsonl, codes.npy and ts.json, and ways to convert it."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.codes = make_codes(count)
        self.rows = sample_rows(self.codes)
        self.space = TokenSpace.build("bytes", CODEC)
        self.space.save(folder / "ts.json")
        np.save(folder / "codes.npy", np.concatenate(self.codes))
        self.write(self.rows)

    @property
    def samples(self) -> Path:
        return self.folder / "samples.jsonl"

    def write(self, rows: Sequence[dict[str, Any] | str], name: str = "samples.jsonl") -> Path:
        path = self.folder / name
        with open(path, "w", encoding="utf-8") as handle:
            for row in rows:
                handle.write((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n")
        return path

    def arguments(self, task: str, *flags: object, prefix: str = "out/data", inputs: Sequence[Path] = ()) -> list[str]:
        values = ["--task", task, "--input", *(inputs or [self.samples]), "--token-space", self.folder / "ts.json"]
        return [str(value) for value in (*values, "--output-prefix", self.folder / prefix, "--workers", 1, *flags)]

    def run(self, task: str, *flags: object, **options: Any) -> int:
        return preprocess_data.main(self.arguments(task, *flags, **options))

    def convert(self, task: str, *flags: object, prefix: str = "out/data", inputs: Sequence[Path] = ()) -> TokenDataset:
        assert self.run(task, *flags, prefix=prefix, inputs=inputs) == 0
        dataset = TokenDataset(self.folder / prefix)
        verify_dataset(dataset.prefix, require_manifest=dataset.manifest is not None).require()
        dataset.check(self.space)
        return dataset

    def files(self, prefix: str = "out/data") -> dict[str, bytes]:
        """Content of the files at a prefix, by suffix."""
        name = Path(prefix).name + "."
        folder = (self.folder / prefix).parent
        if not folder.exists():
            return {}
        return {
            path.name.removeprefix(name): path.read_bytes() for path in folder.iterdir() if path.name.startswith(name)
        }

    def left(self, folder: str = "out") -> list[str]:
        """Names of everything in the output folder."""
        path = self.folder / folder
        return sorted(entry.name for entry in path.iterdir()) if path.exists() else []


@pytest.fixture
def make_corpus(tmp_path: Path) -> Callable[[int], Corpus]:
    return lambda count: Corpus(tmp_path, count)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return Corpus(tmp_path, 60)


@pytest.fixture
def read_rows() -> Callable[..., list[Row]]:
    """Rows of an input. Any part of them, counted or not, is the same rows: that is tried each time."""

    def read(*paths: object, options: ReadOptions | None = None, start: int = 0, stop: int | None = None) -> list[Row]:
        def some(start: int, stop: int | None, *, counted: bool = False) -> list[Row]:
            inputs = InputFiles([str(path) for path in paths], options)
            total = inputs.rows if counted else None
            found = []
            for batch in inputs.batches(start, stop):
                read = pickle.loads(pickle.dumps(batch)).read()  # as it travels to a worker
                assert len(read) == batch.rows
                found += read
            if start == 0 and stop is None:
                assert inputs.known_rows == len(found) and total in (None, len(found))
            return found

        rows = some(start, stop)
        if (start, stop) == (0, None):
            numbers = [row.number for row in rows]
            third = len(rows) // 3
            assert [row.number for row in some(third, 2 * third, counted=True)] == numbers[third : 2 * third]
            assert [row.number for row in some(2 * third, None)] == numbers[2 * third :]
        return rows

    return read


class Killer:
    """Runs commands that die at a chosen change of the disk; see kill_at.py."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        script = Path(__file__).with_name("kill_at.py")
        self._process = subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(self, command: str, argv: list[str], *, kill_at: int = -1, often: bool = True) -> dict[str, Any]:
        request = {"command": command, "argv": argv, "kill_at": kill_at, "often": often}
        request |= {"log": str(self.folder / "log"), "folder": str(self.folder / "out")}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


@pytest.fixture
def killer(tmp_path: Path) -> Iterator[Killer]:
    killer = Killer(tmp_path)
    yield killer
    killer.close()
