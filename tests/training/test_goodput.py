"""Goodput: every second of a run is training that counts, or lost, and on what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_speech.training.telemetry import goodput
from megatron_speech.training.telemetry.goodput import GoodputHistory, Ledger, expected_goodput, read_goodput, sentence


def start(at: float, step: int, starting: float) -> dict[str, Any]:
    created = at - starting
    return {
        "event": "start",
        "time": at,
        "created": created,
        "step": step,
        "processes": 1,
        "starting": {"all": starting},
    }


def progress(at: float, step: int, event: str = "progress", **seconds: float) -> dict[str, Any]:
    more = {"to": seconds.pop("to")} if event == "rollback" else {}
    return {"event": event, "time": at, "step": step, "seconds": seconds, **more}


def summed(*lines: dict[str, Any]) -> dict[str, Any]:
    history = GoodputHistory()
    for line in lines:
        history.add(line)
    return history.summary()


def test_a_run_without_trouble_loses_its_start_its_saves_and_its_validation() -> None:
    found = summed(start(10, 0, 10), progress(110, 50, training=90, data=2, saving=5, validation=3))
    assert found["seconds"] == 110 and found["training"] == 90
    assert found["goodput"] == pytest.approx(90 / 110)
    assert found["lost"] == {
        "restarts": 0, "starting": 10, "saving": 5, "data": 2, "validation": 3, "skipped": 0, "rollback": 0, "other": 0,
    }  # fmt: skip


def test_a_killed_process_loses_what_is_done_again_the_time_it_was_down_and_its_start() -> None:
    found = summed(
        start(10, 0, 10),
        progress(60, 25, training=50),  # a checkpoint
        progress(90, 40, training=80),  # killed at some time after this
        start(130, 25, 20),
        progress(180, 50, training=50),
    )
    # 50 s to step 25, and 50 s from there on; 30 s were done again, 20 s nobody was there, 20 s were a start.
    assert found["training"] == 100 and found["seconds"] == 180
    assert found["lost"]["restarts"] == 30 + 20 + 20
    assert found["lost"]["other"] == 0 and found["restarts"] == 1


def test_a_rollback_discards_what_was_trained_since_its_checkpoint() -> None:
    found = summed(
        start(0, 0, 0),
        progress(40, 20, training=40),
        progress(61, 30, "rollback", training=60, rollback=1, to=20),
        progress(81, 40, training=80, rollback=1),
    )
    assert found["training"] == 60 and found["lost"]["rollback"] == 21 and found["lost"]["other"] == 0


@given(st.data())
def test_every_second_is_in_one_of_the_sums(data: st.DataObject) -> None:
    now, step, lines, saved = 0.0, 0, [], 0
    for _ in range(data.draw(st.integers(1, 5))):
        down, starting = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 9))
        now += (down if lines else 0) + starting
        step = saved
        lines.append(start(now, step, starting))
        training = saving = 0
        for _ in range(data.draw(st.integers(0, 4))):
            step += 1
            training += data.draw(st.integers(1, 9))
            if data.draw(st.booleans()):
                saving += 1
                saved = step
            now = lines[-1]["time"] + (training + saving if lines[-1]["event"] == "start" else 0)
            begun = next(line["time"] for line in reversed(lines) if line["event"] == "start")
            now = begun + training + saving
            lines.append(progress(now, step, training=training, saving=saving))
    found = summed(*lines)
    assert found["training"] + sum(found["lost"].values()) == pytest.approx(found["seconds"])
    assert found["lost"]["other"] == pytest.approx(0)


def test_the_ledger_writes_what_the_history_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(goodput.time, "time", lambda: now)
    monkeypatch.setattr(goodput.time, "perf_counter", lambda: now)
    ledger = Ledger(created=990.0)
    with ledger.spending("saving"):  # before the first step: a part of starting
        now += 2
    ledger.begin(tmp_path / "goodput.jsonl", 0, 1)
    now += 8
    with ledger.spending("data"):
        now += 1
    ledger.steps = 4
    ledger.skip(1)
    now += 2
    ledger.note(4, event="end")
    expected = {"training": 8.0, "data": 1.0, "skipped": 2.0}
    with open(tmp_path / "goodput.jsonl", "a") as handle:
        handle.write('{"event": "progress", "ti')  # a kill cut the line
    ledger.close()
    history = read_goodput(tmp_path)
    assert history is not None
    found = history.summary()
    assert found["training"] == expected["training"] and found["seconds"] == 23
    assert {name: found["lost"][name] for name in ("starting", "data", "skipped", "saving")} == {
        "starting": 12.0, "data": 1.0, "skipped": 2.0, "saving": 0.0,
    }  # fmt: skip
    assert ledger.record()["goodput"] == pytest.approx(8 / 23)
    assert "goodput 34.8 % of 23 s; lost seconds: starting 12.0, skipped 2.0, data 1.0; 0 restarts" == sentence(found)
    assert "imports 10.0, first batch 2.0" in ledger.start_sentence()
    assert read_goodput(tmp_path / "none") is None
    # The next process begins on a line of its own.
    later = Ledger(created=1010.0)
    later.begin(tmp_path / "goodput.jsonl", 4, 1)
    later.close()
    again = read_goodput(tmp_path)
    assert again is not None and again.summary()["restarts"] == 1


def test_a_day_of_failures_costs_what_they_cost() -> None:
    # 419 in 54 days on 16,384 GPUs are 0.485 a day on 1,024.
    assert expected_goodput(0.0, 1024) == 1.0
    assert 1 - expected_goodput(600.0, 1024) == pytest.approx(0.485 * 600 / 86_400, rel=1e-3)
    assert expected_goodput(600.0, 1024, overhead=0.01) == pytest.approx(expected_goodput(600.0, 1024) - 0.01)
    assert json.dumps(expected_goodput(1e9, 1024)) == "0.0"
