"""Claims about the console script: a mistake is one sentence and exit 2, help needs no room, overrides go anywhere."""

from __future__ import annotations

import argparse

import pytest

from megatron_speech import cli
from megatron_speech.commands import blend as blend_command


def test_an_unknown_command_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspekt", "x"]) == 2
    assert "did you mean 'inspect'?" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    assert stopped.value.code == 0
    assert f"megatron-speech {name}" in capsys.readouterr().out


def test_overrides_may_stand_before_and_after_options(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[argparse.Namespace] = []

    def run(args: argparse.Namespace) -> int:
        seen.append(args)
        return 0

    monkeypatch.setattr(blend_command, "run", run)
    assert cli.main(["blend", "r.yaml", "a=1", "--stage", "pt", "b.c=2", "d=3"]) == 0
    assert seen[0].overrides == ["a=1", "b.c=2", "d=3"] and seen[0].stage == "pt"


@pytest.mark.parametrize("words", [["blend", "r.yaml", "--stagee=pt"], ["inspect", "p", "a=1"], ["train"]])
def test_words_that_nobody_reads_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 2
    assert "error" in capsys.readouterr().err


def test_a_full_disk_is_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(args: argparse.Namespace) -> int:
        with open("/dev/full", "wb") as handle:
            handle.write(b"x" * 100_000)
        return 0

    monkeypatch.setattr(blend_command, "run", run)
    assert cli.main(["blend", "r.yaml"]) == 1
    assert capsys.readouterr().err == (
        "error: No space left on device; free some space and run the same command again\n"
    )


def test_a_word_that_is_no_override_is_named_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["blend", "r.yaml", "a=1", "--stage", "pt", "b=2", "seed", "c=3"])
    assert capsys.readouterr().err.endswith("unrecognized arguments: seed\n")
