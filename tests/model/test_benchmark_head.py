"""`benchmark head`: figures of every side, and refusals in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_speech import cli


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_it_reports_time_and_memory_beside_full_logits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    path = tmp_path / "head.json"
    shape = ["--ids", "5000", "--hidden", "16", "--rows", "400", "--masked", "0.5", "1.0", "--repetitions", "2"]
    assert cli.main(["benchmark", "head", *shape, "--dtype", dtype, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["shape"]["ids"] == 5000 and report["environment"]["torch"] and report["date"]
    for result in report["results"]:
        ours, full = result["sides"]["ours"], result["sides"]["full"]
        assert len(ours["seconds"]["values"]) == len(full["seconds_to_ours"]["values"]) == 2
        # All rows in fp32, and their gradient, against 128 rows at once and the gradient of the table.
        assert full["peak_bytes"] >= 2 * 400 * 5000 * 4 > ours["peak_bytes"]
        assert full["peak_bytes_to_ours"] == full["peak_bytes"] / ours["peak_bytes"]
    assert "50% of the rows without loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--rows", "0"], "--rows is 0; it must be above 0"), (["--masked", "1.5"], "--masked is 1.5; a share lies")],
)
def test_what_cannot_be_measured_is_refused(capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    assert cli.main(["benchmark", "head", *flags]) == 2
    assert message in capsys.readouterr().err
