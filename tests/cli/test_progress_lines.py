"""How far a command is, where standard error is no terminal: a line now and then, none for what is short."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from toy_run import write_models, write_rows

from grace_vlm.cli import output
from grace_vlm.cli.main import main
from grace_vlm.cli.output import ProgressBar


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(output, "time", made)
    return made


def test_a_line_every_thirty_seconds(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("answering") as bar:
        for done in range(0, 6001, 64):
            bar.update(done, 6000)
            clock.seconds += 3
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "answering 640 of 6,000, 4 min left"
    assert lines[-1] == "answering 5,760 of 6,000, 11 s left"
    assert len(lines) == 9


def test_what_is_over_within_thirty_seconds_says_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("packing") as bar:
        for done in range(30):
            bar.update(done, 30)
            clock.seconds += 0.9
        clock.seconds += 60
        bar.update(30, 30)  # a last piece that took long: it is done, and what comes next says so
    assert capsys.readouterr().err == ""


def test_a_job_that_goes_on_is_measured_from_where_it_began(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("training") as bar:
        bar.update(9000, 10_000, "loss 0.250")
        clock.seconds += 3600
        bar.update(9100, 10_000, "loss 0.125")
    assert capsys.readouterr().err == "training 9,100 of 10,000, 9 h 0 min left, loss 0.125\n"


def test_a_first_step_of_minutes_says_no_time(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("training") as bar:
        clock.seconds += 200
        bar.update(1, 1000, "loss 2.000")
    assert capsys.readouterr().err == "training 1 of 1,000, loss 2.000\n"


def test_only_one_process_of_a_run_says_it(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("training", is_shown=False) as bar:
        bar.update(1, 1000)
        clock.seconds += 200
        bar.update(2, 1000)
    assert capsys.readouterr().err == ""


def test_rounding_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path)
    write_models(tmp_path)
    monkeypatch.setattr(output, "LINE_SECONDS", 0.0)
    words = ("quantize", tmp_path / "student", tmp_path / "rounded", "--scheme", "w4g128")
    monkeypatch.setattr(sys, "argv", ["grace", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 0
    assert len(lines) == 13, "14 linears; that the last is done nobody need be told"
    assert lines[0] == "quantizing 1 of 14"
