"""`megatron-speech evaluate`: every canary is in the report, every figure beside its ceilings, every refusal clear."""

from __future__ import annotations

import base64
import html
import importlib.util
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml

from megatron_speech.cli import main
from megatron_speech.codecs.audio import write_wav
from megatron_speech.errors import InputError
from megatron_speech.evaluation.canaries import load_canaries
from megatron_speech.evaluation.report import spectrogram
from megatron_speech.generation.engine import SpeechGenerator


@pytest.fixture
def folder(tmp_path: Path, babbler: SpeechGenerator, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place with a checkpoint (the babbler is found there) and a recording."""
    (tmp_path / "checkpoint").mkdir()
    monkeypatch.setattr(SpeechGenerator, "from_checkpoint", classmethod(lambda cls, path, ema: babbler))
    time = np.arange(4000) / 8000
    write_wav(tmp_path / "voice.wav", (0.3 * np.sin(2 * np.pi * 200 * time)).astype(np.float32), 8000)
    monkeypatch.chdir(tmp_path)
    return tmp_path


CANARIES: dict[str, Any] = {
    "name": "a <small> set",
    "decoding": {"temperature": 1.0, "max_seconds": 0.6},
    "scorer": {"kind": "pocketsphinx", "grammar": ["one", "two", "three"]},
    "seeds": [1, 2],
    "items": [
        {"id": "en-a", "text": "one", "language": "en", "category": "numbers", "original_audio": "voice.wav"},
        {"id": "en-b", "text": "2", "expected": "two", "language": "en-US", "category": "numbers", "seed": 7},
        {"id": "hi-a", "text": "नमस्ते <b>", "language": "hi", "reference_audio": "voice.wav", "reference_text": "ओम"},
    ],
}


def evaluate(value: Any, *words: str) -> int:
    Path("c.yaml").write_text(value if isinstance(value, str) else yaml.safe_dump(value, allow_unicode=True))
    return main(["evaluate", "--checkpoint", "checkpoint", "--canaries", "c.yaml", "--output-dir", "out", *words])


def test_every_canary_is_in_the_report(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(CANARIES) == 0
    report = json.loads(Path("out/report.json").read_text())
    page = Path("out/report.html").read_text()
    names = ["en-a_1", "en-a_2", "en-b_7", "hi-a_1", "hi-a_2"]
    assert [item["id"] for item in report["items"]] == names
    for item in report["items"]:
        assert f"<b>{item['id']}</b>" in page and html.escape(item["text"]) in page
        info = soundfile.info(f"out/{item['wav_path']}")
        assert info.frames == item["frames"] * 320
        assert item["generated"]["seconds"] == info.frames / 8000
        assert item["ended"] == (item["stop_reason"] == "end")
    assert "<small> set" not in page and "नमस्ते <b>" not in page  # what users wrote is text, not markup
    # 5 generated players, 1 original; each holds a wav that opens.
    players = re.findall(r'src="data:audio/wav;base64,([^"]+)"', page)
    assert len(players) == 6
    for payload in players:
        assert soundfile.info(io.BytesIO(base64.b64decode(payload))).samplerate == 8000
    assert len(re.findall(r'<img class="spectrum"', page)) == 6
    assert not re.search(r'(src|href)="(https?:)?//', page)
    assert report["overall"]["utterances"] == 5
    assert report["by_language"]["hi"]["utterances"] == 2
    assert set(report["by_category"]) == {"numbers", "general"}
    overall = report["overall"]
    assert overall["stop_failures"] == sum(not item["ended"] for item in report["items"])
    assert overall["eos_rate"] == 1 - overall["stop_failures"] / 5
    assert 0.2 < overall["invalid_token_rate"] < 0.9  # the babbler has no idea of what is legal
    assert "report: out/report.html" in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("pocketsphinx") is None, reason="pocketsphinx is not installed")
def test_rates_stand_beside_ceilings_and_chance_and_only_where_the_scorer_hears(folder: Path) -> None:
    assert evaluate(CANARIES) == 0
    report = json.loads(Path("out/report.json").read_text())
    assert report["scorer"] == {
        "kind": "pocketsphinx", "mode": "grammar", "applied": True, "reason": None, "phrases": ["one", "two", "three"],
    }  # fmt: skip
    assert report["by_language"]["hi"]["speech"] is None
    assert any("no error rate is claimed for hi" in note for note in report["notes"])
    speech = report["overall"]["speech"]
    assert (speech["generated"]["items"], speech["original"]["items"], speech["round_trip"]["items"]) == (3, 1, 1)
    assert speech["guess_exact"] == pytest.approx(1 / 3)
    assert speech["chance"]["items"] == 3
    item = report["items"][2]
    assert item["expected"] == "two"
    assert item["generated"]["transcript"] in {"one", "two", "three", ""}
    assert report["items"][3]["generated"]["transcript"] is None


@pytest.mark.parametrize(
    ("scorer", "note"),
    [
        (None, "names no scorer"),
        ({"kind": "pocketsphinx", "grammar": ["one", "zzyqx"]}, "no pronunciation of 'zzyqx'"),
    ],
)
def test_a_scorer_that_does_not_apply_is_said_not_crashed(folder: Path, scorer: Any, note: str) -> None:
    pytest.importorskip("pocketsphinx", reason="pocketsphinx is not installed")
    assert evaluate({**CANARIES, "scorer": scorer}) == 0
    report = json.loads(Path("out/report.json").read_text())
    assert not report["scorer"]["applied"] and report["overall"]["speech"] is None
    assert note in report["notes"][0]


def test_without_the_extra_the_report_comes_without_scores(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pocketsphinx" else find(name))
    assert evaluate(CANARIES) == 0
    report = json.loads(Path("out/report.json").read_text())
    assert report["notes"] == [
        "error rates are left out: pocketsphinx not installed (pip install 'megatron-speech[evaluation]')"
    ]
    assert html.escape(report["notes"][0]) in Path("out/report.html").read_text()


def test_a_run_adds_its_loss_curves_and_blend(folder: Path) -> None:
    Path("run").mkdir()
    lines = [
        {"step": s, "stage": "pt" if s < 20 else "sft", "loss": 5 - s / 10, "loss/modality/audio": 4.0}
        for s in range(40)
    ]
    lines.append({"step": 39, "stage": "sft", "loss": 1.5, "split": "validation"})
    half = '{"step": 40, "lo'  # a run that is writing at this moment
    Path("run/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + half)
    share = {"target": 0.5, "realised": 0.49}
    stage = {
        "stage": "pt",
        "by_task": {"tts": share, "speech_lm": share},
        "by_language": {"en": {"target": 1, "realised": 1}},
    }
    Path("run/blend.json").write_text(json.dumps({"stages": [stage]}))
    assert evaluate({**CANARIES, "scorer": None}, "--run", "run", "--players", "2") == 0
    page = Path("out/report.html").read_text()
    assert 'alt="loss curves"' in page and 'alt="blend' in page
    assert page.count("<audio") == 3 and 'href="wavs/hi-a_2.wav"' in page
    assert "embedded for the first 2 of 5 utterances" in page


def changed(**changes: Any) -> dict[str, Any]:
    """The canaries with another first item."""
    return {**CANARIES, "items": [{**CANARIES["items"][0], **changes}, *CANARIES["items"][1:]]}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("items: [", "is not valid YAML"),
        ("[]", "holds no mapping"),
        ({"items": []}, "items is []"),
        ({**CANARIES, "decodng": {}}, "unknown field 'decodng'; did you mean 'decoding'?"),
        (
            {**CANARIES, "decoding": {"temprature": 1}},
            "unknown field 'decoding.temprature'; did you mean 'temperature'?",
        ),
        ({**CANARIES, "decoding": {"top_p": 3.0}}, "canary file c.yaml, decoding: top_p is 3"),
        (changed(txt="a"), "unknown field 'items.0.txt'; did you mean 'text'?"),
        (changed(language=False), "items.0.language is False: input should be a valid string; put it in quotes"),
        (changed(id="hi-a"), "two items have the id 'hi-a'"),
        (changed(seeds=[3, 3]), "names a seed twice"),
        (changed(text=" "), "items.0 (en-a): text is empty"),
        (changed(expected="?!"), "items.0 (en-a): nothing in '?!' can be transcribed"),
        (changed(original_audio="gone.wav"), "gone.wav does not exist"),
        (changed(reference_audio="gone.wav", reference_text="a"), "gone.wav does not exist"),
        (changed(reference_text="a"), "reference_text was given without reference_audio"),
    ],
)
def test_a_bad_canary_file_is_refused_in_a_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], value: Any, message: str
) -> None:
    assert evaluate(value) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not Path("out/report.json").exists() and not Path("out/wavs").exists()


def test_flags_that_cannot_be_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["--run", "checkpoint"], "metrics.jsonl is missing"),
        (["--players", "-1"], "--players is -1"),
        (["--checkpoint", "nowhere"], "checkpoint nowhere does not exist"),
    ):
        assert evaluate(CANARIES, *words) == 2
        assert message in capsys.readouterr().err


def test_paths_are_relative_to_the_canary_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("c.yaml").write_text(yaml.safe_dump(CANARIES))
    monkeypatch.chdir("/")
    item = load_canaries(folder / "c.yaml").items[0]
    assert item.original_audio == folder / "voice.wav"
    with pytest.raises(InputError, match="does not exist"):
        load_canaries(folder / "d.yaml")


def test_a_tone_stands_at_its_place_in_the_spectrogram() -> None:
    time = np.arange(8000) / 8000
    picture = spectrogram(np.sin(2 * np.pi * 1000 * time).astype(np.float32), 8000)
    assert picture.max() == 0.0
    assert picture.shape[0] == 129
    assert abs(int(picture.mean(1).argmax()) - 32) <= 1  # 1000 Hz of 4000 in 129 bins
