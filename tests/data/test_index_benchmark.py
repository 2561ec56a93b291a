"""`benchmark data-index`: runs from files to the first batch, keeps its promises on the way, and cleans up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_speech import cli


@pytest.mark.slow
def test_the_index_benchmark_measures_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "figures.json"
    arguments = ["--documents", "6000", "--strata", "12", "--tokens", "1200000", "--seq-length", "1024"]
    options = ["--folder", str(tmp_path / "work"), "--json", str(out)]
    assert cli.main(["benchmark", "data-index", *arguments, *options]) == 0
    report = json.loads(out.read_text())
    assert "12 strata" in capsys.readouterr().out
    assert report["build"]["n_sequences"] == 1168  # whole batches of 8
    assert report["strata"] == 12
    assert report["build"]["peak_resident_bytes"] >= report["build"]["peak_bytes"]["anonymous"] > 0
    assert report["open"]["first_batch_seconds"]
    assert set(report["index_bytes"]) >= {"seq_ptr.npy", "stratum.npy", "document.npy", "start.npy", "length.npy"}
    assert [row["share_of_stage"] for row in report["proportions"]] == [0.01, 0.1, 1.0]
    # Within a document of its target, and the one that the part ends in.
    assert all(abs(row["its_error_tokens"]) <= 2048 for row in report["proportions"])
    assert list((tmp_path / "work").iterdir()) == []


def test_flags_out_of_range_are_refused_and_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = ["--folder", str(tmp_path / "work")]
    for flags, message in (
        (["--strata", "3"], "--strata is 3; needed at least 10"),
        (["--documents", "50"], "--documents is 50; needed at least 300"),
        (["--documents", str(10**15)], "GiB free, needed about"),
    ):
        assert cli.main(["benchmark", "data-index", *flags, *folder]) == 2
        assert message in capsys.readouterr().err
    assert not any((tmp_path / "work").iterdir())
