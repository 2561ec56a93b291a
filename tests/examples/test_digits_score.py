"""Claims about the digits recipe's judge and its report: who is heard, who is not, and what counts as a copy."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "examples" / "digits"))

import classifier
import score

from megatron_speech.codecs import describe_codec, get_codec
from megatron_speech.codecs.audio import read_audio, write_wav
from megatron_speech.tokens.space import TokenSpace

WORDS, SPEAKERS = ("one", "six", "seven"), ("theo", "george", "jackson")


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def samples(fsdd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three words by three speakers, 405 recordings."""
    rows = [json.loads(line) for line in fsdd.read_text().splitlines()]
    chosen = [row for row in rows if row["transcript"] in WORDS and row["speaker_id"] in SPEAKERS]
    folder = tmp_path_factory.mktemp("digits")
    return write_rows(
        folder / "samples.jsonl", ({**row, "wav_path": str(fsdd.parent / row["wav_path"])} for row in chosen)
    )


@pytest.fixture(scope="module")
def scored(samples: Path) -> dict[str, Any]:
    """A report on 'generated' speech that is the codec's rendering of real recordings, one with a wrong label."""
    pytest.importorskip("pycodec2", reason="Codec2 is not installed")
    folder, codec = samples.parent, get_codec("codec2")
    TokenSpace.build("bytes", describe_codec("codec2")).save(folder / "ts.json")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    audio = [read_audio(row["wav_path"], 8000) for row in rows[::15]]
    known = [codec.encode(clip) for clip in audio]
    (folder / "codes").mkdir()
    np.save(folder / "codes/codes.npy", np.concatenate(known).astype(np.uint16))
    places = np.cumsum([0, *map(len, known)])
    at = [
        {"codes_path": "codes.npy", "code_offset": int(a), "code_len": len(c)}
        for a, c in zip(places, known, strict=False)
    ]
    write_rows(folder / "codes/samples.jsonl", at)
    # Two exact copies; the rest starts 5 ms later, which gives other codes.
    said = [known[0], known[1], *(codec.encode(clip[40:]) for clip in audio[2:])]
    np.save(folder / "said.npy", np.concatenate(said))
    places, generated = np.cumsum([0, *map(len, said)]), []
    for i, (row, codes) in enumerate(zip(rows[::15], said, strict=True)):
        write_wav(folder / f"{i}.wav", codec.decode(codes), 8000)
        generated.append(
            {
                "wav_path": f"{i}.wav", "text": row["transcript"], "speaker_id": row["speaker_id"], "seed": i,
                "codes_path": "said.npy", "code_offset": int(places[i]), "code_len": len(codes), "ended": i != 3,
                "invalid_token_rate": 0.25,
            }
        )  # fmt: skip
    generated[5]["text"] = "six" if generated[5]["text"] != "six" else "one"
    write_rows(folder / "generated.jsonl", generated)
    assert run(folder) == 0
    report = json.loads((folder / "report.json").read_text())
    assert isinstance(report, dict)
    return report


def run(folder: Path, *words: str) -> int:
    flags = {"--samples": "samples.jsonl", "--codes": "codes", "--generated": "generated.jsonl",
             "--token-space": "ts.json", "--output": "report.json"}  # fmt: skip
    argv = [word for flag, name in flags.items() for word in (flag, str(folder / name))]
    before, sys.argv = sys.argv, ["score.py", *argv, "--epochs", "8", *words]
    try:
        return int(score.main())
    finally:
        sys.argv = before


@pytest.mark.slow
def test_the_judge_learns_words_and_voices_from_recordings_alone(scored: dict[str, Any]) -> None:
    for listener in ("word", "speaker"):
        assert scored[listener]["original"] >= 0.75  # of some 27 held-out recordings, after a few epochs
        assert scored[listener]["chance"] == pytest.approx(1 / 3)
        assert scored[listener]["applicable"]
    assert scored["judge"]["trained_on"] + scored["judge"]["held_out"] == 405
    assert scored["judge"]["held_out"] >= 20


@pytest.mark.slow
def test_generated_speech_is_scored_beside_its_ceilings(scored: dict[str, Any]) -> None:
    assert scored["utterances"] == 27
    assert scored["word"]["generated"] >= 0.6  # the codec's rendering of real words; one label is wrong
    assert scored["word"]["generated"] <= 26 / 27
    assert scored["word"]["round_trip"] >= 0.6
    assert scored["eos_rate"] == pytest.approx(26 / 27)
    assert scored["invalid_token_rate"] == pytest.approx(0.25)
    assert scored["loop_rate"] == scored["loop_rate_original"] == 0.0
    assert set(scored["per_word"]) == set(WORDS) and set(scored["per_speaker"]) == set(SPEAKERS)
    for table, listener in (("per_word", "word"), ("per_speaker", "speaker")):
        for part, count in (("generated", 27), ("original", scored["judge"]["held_out"])):
            rows = [row[part] for row in scored[table].values()]
            assert sum(row["utterances"] for row in rows) == count
            hits = sum(row["utterances"] * (row[listener] or 0) for row in rows)
            assert hits / count == pytest.approx(scored[listener][part])
        for name, row in scored[table].items():
            assert sum(row["heard_as"].values()) == row["generated"]["utterances"]
            assert row["heard_as"].get(name, 0) == pytest.approx(
                row["generated"]["utterances"] * row["generated"][listener]
            )


@pytest.mark.slow
def test_pocketsphinx_listens_with_the_words_of_the_file(scored: dict[str, Any]) -> None:
    pytest.importorskip("pocketsphinx", reason="pocketsphinx is not installed")
    assert scored["pocketsphinx"]["applicable"]
    assert scored["pocketsphinx"]["original"] >= 0.6
    assert scored["pocketsphinx"]["generated"] >= 0.5


@pytest.mark.slow
def test_copies_of_training_sequences_are_counted(scored: dict[str, Any]) -> None:
    found = scored["copies"]
    assert found["training_sequences"] == 27
    assert found["exact"] == 2
    assert found["nearest_edit_distance"]["min"] == 0.0
    assert found["nearest_edit_distance"]["mean"] > 0.3


def test_words_that_pocketsphinx_lacks_and_foreign_languages_are_not_applicable(tmp_path: Path) -> None:
    row = {"wav_path": "a.wav", "transcript": "zzyqx", "speaker_id": "a"}
    pytest.importorskip("pocketsphinx", reason="pocketsphinx is not installed")
    recogniser, reason = score.open_pocketsphinx(write_rows(tmp_path / "a.jsonl", [row]), ["one", "zzyqx"])
    assert recogniser is None and reason is not None and "'zzyqx'" in reason
    samples = write_rows(tmp_path / "b.jsonl", [{**row, "language": "de"}])
    recogniser, reason = score.open_pocketsphinx(samples, ["one"])
    assert recogniser is None and reason == "it hears English only, the recordings are in de"


@pytest.mark.parametrize("seed", range(5))
def test_nearness_to_training_sequences_equals_the_plain_definitions(seed: int) -> None:
    generator = np.random.default_rng(seed)
    training = [generator.integers(0, 2, (generator.integers(1, 9), 2)) for _ in range(40)]
    generated = [generator.integers(0, 2, (generator.integers(1, 9), 2)) for _ in range(12)]
    rows = [[tuple(frame) for frame in codes.tolist()] for codes in training]
    prefixes, distances, exact = [], [], 0
    for codes in generated:
        mine = [tuple(frame) for frame in codes.tolist()]
        exact += mine in rows
        prefixes.append(max(common_prefix(mine, other) for other in rows))
        distances.append(min(edits(mine, other) / max(len(mine), len(other)) for other in rows))
    found = score.copies(generated, training)
    assert found["exact"] == exact
    assert found["longest_common_prefix_frames"] == {"max": max(prefixes), "mean": pytest.approx(np.mean(prefixes))}
    pytest.importorskip("rapidfuzz", reason="rapidfuzz is not installed")
    assert found["nearest_edit_distance"]["min"] == pytest.approx(min(distances))
    assert found["nearest_edit_distance"]["mean"] == pytest.approx(np.mean(distances), abs=1e-6)


def common_prefix(a: list[Any], b: list[Any]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def edits(a: list[Any], b: list[Any]) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("samples", [], "has no line"),
        ("samples", [{"wav_path": "x.wav", "transcript": "one"}], "line 1: field speaker_id is missing"),
        ("generated", [{"wav_path": "x.wav", "text": "one"}], "line 1: field speaker_id is missing"),
        ("generated", [{"wav_path": "0.wav", "text": "a", "speaker_id": "b"}], "row 1: field codes_path is missing"),
    ],
)
def test_files_that_cannot_be_scored_are_refused(
    scored: Any, samples: Path, tmp_path: Path, capsys: Any, name: str, rows: Any, message: str
) -> None:
    path, out = write_rows(tmp_path / "x.jsonl", rows), tmp_path / "report.json"
    assert run(samples.parent, f"--{name}", str(path), "--output", str(out)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error.replace(
        "names no recording that can be read", "has no line"
    )
    assert not out.exists()


def test_the_held_out_split_belongs_to_the_recording(samples: Path) -> None:
    first, _, _ = classifier.read_recordings(samples, 8000)
    rows = samples.read_text().splitlines()
    again, _, _ = classifier.read_recordings(write_rows(samples.parent / "r.jsonl", map(json.loads, rows[::-1])), 8000)
    assert first == again[::-1]
    assert 0.05 < np.mean([recording.held_out for recording in first]) < 0.15
