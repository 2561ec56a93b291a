"""One channel per kind of message; long work without a terminal logs how far it is."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from megatron_speech.console import Progress, install_handler, message, output
from megatron_speech.errors import InputError, command


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    package = logging.getLogger("megatron_speech")
    before, level = list(package.handlers), package.level
    install_handler()
    yield
    package.handlers[:] = before
    package.setLevel(level)


def err(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_results_go_to_stdout_and_messages_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    output("a result")
    message("ALARM", "the disk is full")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("a result\n", "ALARM: the disk is full\n")


def test_notices_and_warnings_are_printed_once_by_the_main_process(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install_handler()  # again: a command within a command
    logger = logging.getLogger("megatron_speech.data.stage")
    logger.info("%s is %d", "this", 1)
    logger.warning("look out")
    monkeypatch.setenv("RANK", "1")
    logger.warning("the same, on rank 1")
    assert err(capsys) == ["note: this is 1", "warning: look out"]


def test_a_command_prints_its_notices_and_its_error(capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("megatron_speech").handlers.clear()

    @command
    def main() -> None:
        logging.getLogger("megatron_speech.preprocess").info("resumed")
        raise InputError("file x: needed y")

    assert main() == 2
    assert err(capsys) == ["note: resumed", "error: file x: needed y"]


def test_long_work_without_a_terminal_logs_rate_and_eta_every_half_minute(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Progress("encode", total=10_000, unit="row", initial=1000, clock=clock, terminal=False) as progress:
        for _ in range(8):
            clock.now += 10.0
            progress.update(500)
        assert progress.done == 5000
    assert err(capsys) == [
        "note: encode: 2,500 row of 10,000 row (25%), 50 row/s, eta 2:30",
        "note: encode: 4,000 row of 10,000 row (40%), 50 row/s, eta 2:00",
        "note: encode: 4,000 row in 1:20",
    ]


def test_bytes_are_shown_with_their_prefix_and_an_unknown_total_gives_no_eta(
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = Clock()
    with Progress("staging", total=6_000_000_000, unit="B", clock=clock, terminal=False) as progress:
        clock.now += 30.0
        progress.update(1_500_000_000)
    with Progress("read", total=None, unit="row", clock=clock, terminal=False) as progress:
        clock.now += 60.0
        progress.update(30)
    assert err(capsys) == [
        "note: staging: 1.5 GB of 6.0 GB (25%), 50.0 MB/s, eta 1:30",
        "note: staging: 1.5 GB in 0:30",
        "note: read: 30 row, 0.5 row/s",
        "note: read: 30 row in 1:00",
    ]


def test_short_work_logs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Progress("merge", total=10, unit="B", clock=clock, terminal=False) as progress:
        clock.now += 29.0
        progress.update(10)
    assert err(capsys) == []


def test_on_a_terminal_there_is_a_bar_and_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Progress("merge", total=10, unit="row", clock=clock, terminal=True) as progress:
        clock.now += 100.0
        progress.update(10)
    text = capsys.readouterr().err
    assert "merge" in text and "10/10" in text and "note:" not in text


def test_of_several_processes_only_the_main_one_shows_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    clock = Clock()
    with Progress("index", total=10, unit="row", clock=clock, terminal=True) as progress:
        clock.now += 100.0
        progress.update(10)
    assert err(capsys) == []
