"""The quickstart's picture."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from matplotlib.figure import Figure

from megatron_speech.codecs.audio import write_wav


@pytest.fixture(scope="module")
def picture(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("picture", repository / "examples/quickstart/picture.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_recording_is_shown_twice(picture: ModuleType, tmp_path: Path) -> None:
    items = [
        {"canary": canary, "language": language, "wav_path": f"{canary}-{seed}.wav"}
        for language, canaries in (("am", ("am-00", "am-01")), ("en", ("en-00",)), ("hi", ("hi-00", "hi-01")))
        for canary in canaries
        for seed in (1, 2)
    ]
    originals = {item["canary"]: tmp_path for item in items} | {"hi-01": None}
    chosen = [(item["canary"], item["wav_path"]) for item in picture.choose(items, originals)]
    assert chosen == [(f"{name}", f"{name}-1.wav") for name in ("am-00", "en-00", "hi-00", "am-01")]


def test_a_spectrogram_says_its_seconds_and_kilohertz(picture: ModuleType, tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", np.sin(np.arange(4000)).astype(np.float32), 8000)
    axes = Figure().subplots()
    picture.draw_spectrogram(axes, tmp_path / "a.wav", "title", 2.0)
    (image,) = axes.get_images()
    assert list(image.get_extent()) == [0.0, 0.5, 0.0, 4.0]
    assert axes.get_xlim() == (0.0, 2.0)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("s", "kHz")
    assert len(axes.get_xticks()) > 1 and len(axes.get_yticks()) > 1
